"""Kimi Delta Attention: Gated DeltaNet whose key channels each forget at a rate of their own.

Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (arXiv 2510.26692).
"""

from typing import Any, Unpack

from torch import Tensor, nn

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import KimiDeltaAttentionRule
from memzoo.layers.registry import register_layer


class KimiDeltaAttention(MatrixMemory):
    """The delta rule with a decay of every key channel, from a projection of rank V:

        a_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias),   beta_t = sigmoid(W_b x_t),   |q_t| = |k_t| = 1
        S   = diag(exp(a_t)) S_{t-1}
        S_t = S + k_t^T beta_t (v_t - k_t S)
        o_t = q_t S_t / sqrt(K)

    The output gate is a sigmoid, of rank V too.

    Args:
        dim: Width of ``x`` and ``y``.
        decay_lower_bound: l < 0: ``a_t = l sigmoid(exp(A_log) (W_2 W_1 x_t + dt_bias))``, so that no token forgets more
            than exp(l); -5.0 is usual. None for the decay above.
        negative_eigenvalues: Double beta, so that a write may turn a direction around (arXiv 2411.12537).
        conv_width: Width of the short convolution with SiLU over q, k, v; None for SiLU alone.
        output_gate: Gate the normalised output.
        options: Those of ``MatrixMemory``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``, or the bound is not below zero.

    Reference:
        arXiv 2510.26692, equation 1.

    Note:
        ``rule.decay_log`` is A_log and ``rule.step_bias`` dt_bias. The bounded decay is that of released code;
        that its first decays are those of the unbounded one is a choice of ours. Some code gives W_2 of the output gate
        a bias; the released model has none.
    """

    rule_class = KimiDeltaAttentionRule

    def __init__(
        self,
        dim: int,
        *,
        decay_lower_bound: float | None = None,
        negative_eigenvalues: bool = False,
        conv_width: int | None = 4,
        output_gate: bool = True,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        rule = {"decay_lower_bound": decay_lower_bound, "negative_eigenvalues": negative_eigenvalues}
        super().__init__(dim, rule, conv_width=conv_width, output_gate=output_gate, **options)

    def build_output_gate(self, width: int) -> nn.Module:
        """Build the low-rank projection."""
        rank = self.rule.value_dim
        return nn.Sequential(nn.Linear(self.dim, rank, bias=False), nn.Linear(rank, width, bias=False))

    def gate_activation(self, gate: Tensor) -> Tensor:
        """Apply the sigmoid."""
        return gate.sigmoid()


@register_layer("kimi_delta_attention", "mixer")
def _kimi_delta_attention(dim: int, **overrides: Any) -> KimiDeltaAttention:
    return KimiDeltaAttention(dim, **dict(num_heads=2, chunk_size=4) | overrides)
