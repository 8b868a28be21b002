"""Linear attention: the sum of all key-value products as a memory that never forgets.

Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236).
"""

from typing import Any, Unpack

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import LinearAttentionRule
from memzoo.layers.registry import register_layer


class LinearAttention(MatrixMemory):
    """Attention with the kernel ``phi(q) . phi(k)`` in place of the exponential, so that its past fits a matrix:

        S_t = S_{t-1} + phi(k_t)^T v_t,   z_t = z_{t-1} + phi(k_t)
        o_t = phi(q_t) S_t / (phi(q_t) . z_t)

    Args:
        dim: Width of ``x`` and ``y``.
        feature_map: phi: ``"elu"`` for elu + 1, ``"relu"`` or ``"identity"``.
        normalize: Divide by ``phi(q) . z``; not with ``"identity"``, where that may be zero.
        conv_width: Width of a short convolution with SiLU over q, k, v; None for none.
        output_gate: Gate the normalised output with ``silu(W x)``.
        options: Those of ``MatrixMemory``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``, or the feature map is unknown or cannot be normalised.

    Reference:
        arXiv 2006.16236, equations 9 to 12 and section 3.3.

    Note:
        The paper's layer ends with the division. A norm of every head follows here, as in the rest of the family.
    """

    rule_class = LinearAttentionRule

    def __init__(
        self,
        dim: int,
        *,
        feature_map: str = "elu",
        normalize: bool = True,
        conv_width: int | None = None,
        output_gate: bool = False,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        rule = {"feature_map": feature_map, "normalize": normalize}
        super().__init__(dim, rule, conv_width=conv_width, output_gate=output_gate, **options)


@register_layer("linear_attention", "mixer")
def _linear_attention(dim: int, **overrides: Any) -> LinearAttention:
    return LinearAttention(dim, **dict(num_heads=2, chunk_size=4) | overrides)
