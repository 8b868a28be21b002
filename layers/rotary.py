"""Rotary position embedding: positions as rotations, so that a product of query and key sees only their distance."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_divisible
from memzoo.layers.ops.elementwise import rotate_halves


class Angles(NamedTuple):
    """How far each pair of a token is rotated.

    Attributes:
        cos: (batch, time, 1, head_dim / 2), or (time, 1, head_dim / 2) for all rows.
        sin: Likewise.
    """

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Rotate the pairs ``(x_i, x_{i + head_dim / 2})`` by ``position * base^(-2i / head_dim)``.

    Holds no parameter, buffer or cache: the angles are computed at every call, in float64 where the device has it, so
    that far positions stay exact and no cast of the module can round them.

    Args:
        head_dim: Width of a head, even.
        base: Wavelengths run from ``2 pi`` to ``2 pi base`` tokens.

    Shape:
        x: (batch, time, heads, head_dim). positions: (batch, time), or (time,) for all rows; or their ``angles``.
            Returns the shape of x.

    Raises:
        ValueError: ``head_dim`` is odd, or ``base`` is not positive.

    Reference:
        Su et al., arXiv 2104.09864, equation 34, in the half-split layout of Llama.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        check_divisible("head_dim", head_dim, "the two halves that rotate", 2)
        if not base > 0:
            raise ValueError(f"base={base!r} is not positive; use base > 0 (10000.0 is usual, more for long contexts)")
        self.head_dim = head_dim
        self.base = base

    def forward(self, x: Tensor, positions: Tensor | Angles) -> Tensor:
        """Rotate every head of ``x`` to its position; several tensors of the same positions can share ``angles``."""
        angles = self.angles(positions) if isinstance(positions, Tensor) else positions
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotate_halves(x.to(wide), angles.cos.to(wide), angles.sin.to(wide)).to(x.dtype)

    def angles(self, positions: Tensor) -> Angles:
        """Return the cosines and sines of the rotations to these positions."""
        exact = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
        pair = torch.arange(self.head_dim // 2, dtype=exact, device=positions.device)
        frequency = self.base ** (pair * (-2 / self.head_dim))
        angle = positions.to(exact)[..., None, None] * frequency
        return Angles(angle.cos(), angle.sin())

    def extra_repr(self) -> str:
        """Width and base."""
        return f"{self.head_dim}, base={self.base}"


def positions_from(first: Tensor | None, x: Tensor) -> Tensor:
    """Return the positions of the tokens of ``x`` (batch, time, ...): (time,), or (batch, time) behind ``first``.

    Args:
        first: (batch,) position of every row's first token; None for 0.
        x: The tokens.
    """
    positions = torch.arange(x.shape[1], device=x.device)
    return positions if first is None else first[:, None] + positions
