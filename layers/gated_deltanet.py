"""Gated DeltaNet: the delta rule on a memory that can also be cleared.

Yang, Kautz and Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464).
"""

from typing import Any, Unpack

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import GatedDeltaNetRule
from memzoo.layers.registry import register_layer


class GatedDeltaNet(MatrixMemory):
    """DeltaNet with the decay of Mamba-2, one a token and head:

        a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   beta_t = sigmoid(W_b x_t),   |q_t| = |k_t| = 1
        S   = exp(a_t) S_{t-1}
        S_t = S + k_t^T beta_t (v_t - k_t S)
        o_t = q_t S_t / sqrt(K)

    Args:
        dim: Width of ``x`` and ``y``.
        negative_eigenvalues: Double beta, so that a write may turn a direction around (arXiv 2411.12537).
        conv_width: Width of the short convolution with SiLU over q, k, v; None for SiLU alone.
        output_gate: Gate the normalised output with ``silu(W x)``.
        options: Those of ``MatrixMemory``. The paper has ``value_dim = 2 * head_dim``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``.

    Reference:
        arXiv 2412.06464, equation 10.

    Note:
        ``rule.decay_log`` is A_log and ``rule.step_bias`` dt_bias; ``gates`` makes [a | b].
    """

    rule_class = GatedDeltaNetRule

    def __init__(
        self,
        dim: int,
        *,
        negative_eigenvalues: bool = False,
        conv_width: int | None = 4,
        output_gate: bool = True,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        rule = {"negative_eigenvalues": negative_eigenvalues}
        super().__init__(dim, rule, conv_width=conv_width, output_gate=output_gate, **options)


@register_layer("gated_deltanet", "mixer")
def _gated_deltanet(dim: int, **overrides: Any) -> GatedDeltaNet:
    return GatedDeltaNet(dim, **dict(num_heads=2, chunk_size=4) | overrides)
