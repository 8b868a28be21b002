"""The gate between a layer's output and a memory's (Titans, arXiv 2501.00663, sections 4.1 and 4.2)."""

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_width
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.elementwise import silu_product

FORMS = ("sigmoid_memory", "sigmoid_both", "silu_memory", "convex")


class MemoryGate(nn.Module):
    """Combine an output ``y`` with what a memory says, ``m``: the paper's circled cross.

    Both are normalised with a learned gain each, ``y' = g_y RMS(y)`` and ``m' = g_m RMS(m)``; then

    | form | output |
    |---|---|
    | "sigmoid_memory" | ``y' * sigmoid(m')`` |
    | "sigmoid_both" | ``sigmoid(y') * sigmoid(m')`` |
    | "silu_memory" | ``y' * silu(m')`` |
    | "convex" | ``s * y' + (1 - s) * m'``, ``s = sigmoid(balance)`` learned, one a channel, 1/2 at the start |

    Args:
        dim: Width of ``y`` and ``m``.
        form: One of the above.

    Shape:
        y, m: (batch, time, dim). Returns the same.

    Raises:
        ValueError: The form is unknown, or a shape is wrong.

    Reference:
        arXiv 2501.00663, section 4.2.

    Note:
        The paper normalises both with learnable vectors and applies "a non-linearity", without saying to which.
    """

    def __init__(self, dim: int, *, form: str = "sigmoid_memory") -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        self.dim = dim
        self.form = form
        self.norm = RMSNorm(dim)
        self.memory_norm = RMSNorm(dim)
        self.balance = nn.Parameter(torch.empty(dim)) if form == "convex" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give both sides of a convex combination the same weight; the norms start at one by themselves."""
        if self.balance is not None:
            nn.init.zeros_(self.balance)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        """Gate ``y`` with ``m``."""
        check_width("y", y, self.dim)
        check_width("m", m, self.dim, like=y)
        y, m = self.norm(y), self.memory_norm(m)
        if self.balance is not None:
            share = self.balance.sigmoid().to(y.dtype)
            return share * y + (1 - share) * m
        if self.form == "silu_memory":
            return silu_product(m, y)
        return (y.sigmoid() if self.form == "sigmoid_both" else y) * m.sigmoid()

    def extra_repr(self) -> str:
        """Width and form."""
        return f"{self.dim}, form={self.form!r}"
