"""The plain occupants of the channel slot: SwiGLU, gated as in today's language models, and GPT-2's feed-forward."""

from typing import Any, Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_dtype, check_positive, check_width
from memzoo.layers.ops.elementwise import silu_product
from memzoo.layers.registry import register_layer
from memzoo.layers.trace import Trace


class SwiGLU(nn.Module):
    """Gated feed-forward: ``y = W_down (silu(W_gate x) * W_up x)``.

    Args:
        dim: Width of the residual stream.
        hidden_dim: Width of the gate. By default ``8/3 * dim`` rounded up to ``multiple_of``, which makes the three
            matrices as large as the two of a plain feed-forward with expansion 4.
        multiple_of: Of what the default ``hidden_dim`` is a multiple.

    Shape:
        x: (batch, time, dim). Returns the same.

    Raises:
        ValueError: A width is not a whole number >= 1, or ``x`` does not fit.

    Reference:
        Shazeer, arXiv 2002.05202, equation 6.
    """

    def __init__(self, dim: int, *, hidden_dim: int | None = None, multiple_of: int = 64) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("multiple_of", multiple_of)
        if hidden_dim is None:
            hidden_dim = -(-8 * dim // (3 * multiple_of)) * multiple_of
        check_positive("hidden_dim", hidden_dim)
        self.dim, self.memory_dim = dim, hidden_dim
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    @overload
    def forward(self, x: Tensor, *, trace: Trace | None = None, return_memory: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, *, trace: Trace | None = None, return_memory: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, *, trace: Trace | None = None, return_memory: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Transform every token by itself; nothing is reported to ``trace``.

        With ``return_memory``, return ``W_up x`` (batch, time, memory_dim) too, for a ``GatedMemoryUnit`` to read.
        """
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        up = self.up(x)
        y: Tensor = self.down(silu_product(self.gate(x), up))
        return (y, up) if return_memory else y


@register_layer("swiglu", "channel")
def _build(dim: int, **overrides: int) -> SwiGLU:
    return SwiGLU(dim, **dict(multiple_of=8) | overrides)


class FeedForward(nn.Module):
    """Two matrices with a GELU between them: ``y = W_down gelu(W_up x)``.

    Args:
        dim: Width of the residual stream.
        hidden_dim: Width between the matrices; ``4 * dim`` by default.
        bias: Add learned biases to both.

    Shape:
        x: (batch, time, dim). Returns the same.

    Raises:
        ValueError: A width is not a whole number >= 1, or ``x`` does not fit.

    Reference:
        Vaswani et al., arXiv 1706.03762, equation 2, with the GELU of GPT-2 (Hendrycks and Gimpel, arXiv 1606.08415) in
        its exact form.
    """

    def __init__(self, dim: int, *, hidden_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        check_positive("dim", dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_positive("hidden_dim", hidden_dim)
        self.dim = dim
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Transform every token by itself; nothing is reported to ``trace``."""
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


@register_layer("feed_forward", "channel")
def _build_feed_forward(dim: int, **overrides: Any) -> FeedForward:
    return FeedForward(dim, **dict(hidden_dim=24) | overrides)
