"""Gated linear attention: every key channel of the memory is forgotten at a rate that the token decides.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635).
"""

from typing import Any, Unpack

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import GatedLinearAttentionRule
from memzoo.layers.registry import register_layer


class GatedLinearAttention(MatrixMemory):
    """Linear attention with a data-dependent decay of every key channel:

        a_t = log sigmoid(W_2 W_1 x_t + b) / 16
        S_t = diag(exp(a_t)) S_{t-1} + k_t^T v_t
        o_t = q_t S_t / sqrt(K)

    Args:
        dim: Width of ``x`` and ``y``.
        gate_rank: Rank of ``W_2 W_1``.
        gate_divisor: What the log decay is divided by, so that channels forget slowly to begin with.
        conv_width: Width of a short convolution with SiLU over q, k, v; None for none.
        output_gate: Gate the normalised output with ``silu(W x)``.
        options: Those of ``MatrixMemory``. The paper has ``value_dim = 2 * head_dim = dim / num_heads``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``, or the rank or the divisor is not positive.

    Reference:
        arXiv 2312.06635, equation 3.
    """

    rule_class = GatedLinearAttentionRule

    def __init__(
        self,
        dim: int,
        *,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        conv_width: int | None = None,
        output_gate: bool = True,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        rule = {"gate_rank": gate_rank, "gate_divisor": gate_divisor}
        super().__init__(dim, rule, conv_width=conv_width, output_gate=output_gate, **options)


@register_layer("gated_linear_attention", "mixer")
def _gated_linear_attention(dim: int, **overrides: Any) -> GatedLinearAttention:
    return GatedLinearAttention(dim, **dict(num_heads=2, gate_rank=3, chunk_size=4) | overrides)
