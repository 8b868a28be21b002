"""Gated Memory Unit: read another layer's memory through a gate of one's own.

SambaY (arXiv 2507.06607). A layer late in the network reuses the token mixing of an earlier one: no keys, no state, two
matrix products.
"""

from typing import Any

from torch import Tensor, nn

from memzoo.layers.errors import check_divisible, check_dtype, check_positive, check_width
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.elementwise import silu_product
from memzoo.layers.registry import register_layer
from memzoo.layers.trace import Trace


class GatedMemoryUnit(nn.Module):
    """Gate a memory's read-out with the current token: ``y = W_out (memory * silu(W_gate x))``.

    Linear in ``memory`` and token-wise, so causal whenever the memory is. If the memory is a mixture ``M = A V`` of
    values over time, the gate reweights that mixture channel by channel.

    Args:
        dim: Width of the residual stream.
        memory_dim: Width of the memory, the ``memory_dim`` of the layer that is called with ``return_memory``.
        norm: RMS-normalise the gated memory before ``W_out``: the paper's choice for memories of linear attention
            (Mamba-2, Gated DeltaNet), to stabilise training. The scale of the memory then no longer matters.
        norm_groups: Neighbouring parts of the memory that are normalised by themselves.
        norm_eps: Added to the mean square.

    Shape:
        x: (batch, time, dim). memory: (batch, time, memory_dim), the same positions. Returns (batch, time, dim).

    Raises:
        ValueError: A width is not a whole number >= 1, or ``x`` and ``memory`` do not fit.

    Reference:
        Ren et al., arXiv 2507.06607; the normalised form as in microsoft/ArchScale.
    """

    def __init__(
        self, dim: int, memory_dim: int, *, norm: bool = False, norm_groups: int = 1, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_divisible("memory_dim", memory_dim, "norm_groups", norm_groups)
        self.dim, self.memory_dim = dim, memory_dim
        self.gate = nn.Linear(dim, memory_dim, bias=False)
        self.norm = RMSNorm(memory_dim, eps=norm_eps, groups=norm_groups) if norm else None
        self.out = nn.Linear(memory_dim, dim, bias=False)

    def forward(self, x: Tensor, memory: Tensor, *, trace: Trace | None = None) -> Tensor:
        """Read every token's memory; nothing is reported to ``trace``."""
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        check_width("memory", memory, self.memory_dim, like=x)
        check_dtype("memory", memory, self)
        gated = silu_product(self.gate(x), memory)
        y: Tensor = self.out(gated if self.norm is None else self.norm(gated))
        return y


@register_layer("gated_memory_unit", "reader")
def _build(dim: int, **overrides: Any) -> GatedMemoryUnit:
    return GatedMemoryUnit(dim, **dict(memory_dim=2 * dim) | overrides)
