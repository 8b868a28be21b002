"""Matrix rules: how the matrix memories of the linear-recurrence family are written, forget and are read.

A rule is what those memories do not share. It turns raw gates into decays and write strengths, shapes queries and keys,
and calls the recurrence. A layer gives it projections, a convolution and an output (``MatrixMemory``), or many memories
of its kind (``MixtureOfMemories``).

With row vectors, S the memory of a head, a <= 0 its log decay and beta its write strength, every token does

    S <- exp(a) S,   u = beta (v - k S) or u = v,   S <- S + k^T u,   y = q S / sqrt(K)
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_divisible, check_positive
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.ops.precision import wider

BACKENDS = ("torch", "fla")


class MatrixRule(nn.Module):
    """The rule of ``num_value_heads`` matrix memories side by side.

    Its parameters belong to the rule and not to a memory: memories of one layer share them. What differs from memory to
    memory, the projection that makes the raw gates, is built by ``gate_projection`` and held by the layer.

    Args:
        num_heads: Heads of queries and keys, H.
        key_dim: Width of each, K.
        value_dim: Width of a value head, V.
        num_value_heads: Memories, HV, each ``HV / H`` of which share a query and key head; ``num_heads`` by default.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        backend: Of the recurrence: ``"auto"``, ``"torch"`` or ``"fla"``.

    Shape:
        q, k: (batch, time, H, K). v, y: (batch, time, HV, V). gates: (batch, time, gate_width).
        state: (batch or segments, *state_shape).

    Raises:
        ValueError: A number is not a whole number >= 1, H does not divide HV, or the backend is missing.
    """

    uses_conv: ClassVar[bool] = False
    """Whether its paper's layer convolves queries, keys and values."""

    has_residual: ClassVar[bool] = False
    """Whether a token writes a share of an error, that of what its key recalled before: a delta rule."""

    conv_activation: ClassVar[str | None] = "silu"
    """Follows the convolution. A rule that ``uses_conv`` keeps it where the convolution is left out."""

    def __init__(
        self,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_value_heads: int | None = None,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_divisible("num_value_heads", num_value_heads, "num_heads", num_heads)
        for name, value in (("key_dim", key_dim), ("value_dim", value_dim), ("chunk_size", chunk_size)):
            check_positive(name, value)
        check_backend(backend, BACKENDS)
        self.num_heads, self.num_value_heads = num_heads, num_value_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.chunk_size = chunk_size
        self.backend = backend

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one row's memories: (HV, K, V)."""
        return self.num_value_heads, self.key_dim, self.value_dim

    @property
    def gate_width(self) -> int:
        """Raw gates a token; 0 for a rule without gates."""
        return 0

    def gate_projection(self, dim: int) -> nn.Module | None:
        """Build what makes the raw gates of one memory, (..., dim) -> (..., gate_width); None for a rule without."""
        return None

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Turn raw gates into the write strength beta and the log decay, in at least float32.

        Args:
            gates: What the projection made of every token; None for a rule without gates.
            v: The values, for shapes and device.

        Shape:
            Returns beta (batch, time, HV), None if values are added as they are, and the log decay (batch, time, HV) or
            (batch, time, HV, K), None if nothing is forgotten.
        """
        return None, None

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Shape queries and keys, split into heads: unit length, feature map or rotation, as the rule has it.

        Args:
            q: Queries.
            k: Keys.
            positions: (batch, time), or (time,) for all rows: tokens read before each. Only RetNet looks.
        """
        return q, k

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_residual: bool = False,
    ) -> tuple[Tensor, ...]:
        """Write every token into its memories and read them.

        Args:
            q: Queries that ``prepare`` has shaped.
            k: Keys, likewise.
            v: Values.
            gates: Raw gates; None for a rule without.
            state: The memories so far; zeros by default. Not changed.
            lengths: Tokens that exist in each row; all by default.
            cu_seqlens: Borders of segments that lie one after another in a single row, as in the ops.
            return_residual: Return a third thing, the errors, of a rule that ``has_residual``.

        Returns:
            What was read, in the dtype of ``v``, and the memories, in at least float32; with ``return_residual`` also
            ``v - k S`` of every token and memory before the write, (batch, time, HV, V), detached and like the memories
            in dtype.

        Raises:
            ValueError: The rule has no errors to return, or the arguments do not fit the op.
        """
        if return_residual and not self.has_residual:
            raise ValueError(
                f"return_residual=True, but {type(self).__name__} writes values and corrects no error; use 'deltanet', "
                f"'gated_deltanet' or 'kda'"
            )
        beta, log_decay = self.gate_values(gates, v)
        options: dict[str, Any] = {
            "chunk_size": self.chunk_size,
            "lengths": lengths,
            "cu_seqlens": cu_seqlens,
            "backend": self.backend,
        }
        if beta is None:
            return linear_recurrence(q, k, v, log_decay, state, **options)
        if return_residual:
            return delta_rule(q, k, v, beta, log_decay, state, **options, return_residual=True)
        return delta_rule(q, k, v, beta, log_decay, state, **options)

    def extra_repr(self) -> str:
        """Heads and widths."""
        return (
            f"num_heads={self.num_heads}, num_value_heads={self.num_value_heads}, key_dim={self.key_dim}, "
            f"value_dim={self.value_dim}"
        )


def unit(x: Tensor) -> Tensor:
    """Scale the last axis to unit length: ``x / sqrt(sum x^2 + 1e-6)``, in at least float32."""
    wide = wider(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
