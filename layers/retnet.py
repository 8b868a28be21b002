"""RetNet: linear attention that forgets at a constant rate, another in every head.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models" (arXiv 2307.08621).
"""

from typing import Any, Unpack

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import RetNetRule
from memzoo.layers.registry import register_layer


class RetNet(MatrixMemory):
    """Multi-scale retention, with queries and keys rotated to their positions:

        S_t = gamma_h S_{t-1} + k_t^T v_t,   gamma_h = 1 - 2^(-5 - h),   h = 0, 1, ...
        o_t = q_t S_t / sqrt(K)

    Args:
        dim: Width of ``x`` and ``y``.
        rotary_base: Base of the rotary position embedding.
        conv_width: Width of a short convolution with SiLU over q, k, v; None for none.
        output_gate: Gate the normalised output with ``silu(W x)``.
        options: Those of ``MatrixMemory``; ``head_dim`` is even. The paper has ``value_dim = 2 * head_dim``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``, or the width of a head is odd.

    Reference:
        arXiv 2307.08621, equations 6 to 8.

    Note:
        The paper normalises a head by its mean and variance (GroupNorm), and its scores by their sum in the parallel
        form; here RMSNorm does both, which any factor of a head's output leaves unchanged.
    """

    rule_class = RetNetRule

    def __init__(
        self,
        dim: int,
        *,
        rotary_base: float = 10000.0,
        conv_width: int | None = None,
        output_gate: bool = True,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        super().__init__(dim, {"rotary_base": rotary_base}, conv_width=conv_width, output_gate=output_gate, **options)


@register_layer("retnet", "mixer")
def _retnet(dim: int, **overrides: Any) -> RetNet:
    return RetNet(dim, **dict(num_heads=2, chunk_size=4) | overrides)
