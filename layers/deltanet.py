"""DeltaNet: a memory that replaces what it held under a key instead of adding to it.

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv 2406.06484), after
Schlag, Irie and Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174).
"""

from typing import Any, Unpack

from memzoo.layers.matrix_memory import MatrixMemory, MatrixMemoryOptions
from memzoo.layers.matrix_rules import DeltaNetRule
from memzoo.layers.registry import register_layer


class DeltaNet(MatrixMemory):
    """Linear attention with the delta rule, one step of online regression of values on keys a token:

        beta_t = sigmoid(W_b x_t),   |q_t| = |k_t| = 1
        S_t = S_{t-1} + k_t^T beta_t (v_t - k_t S_{t-1})
        o_t = q_t S_t / sqrt(K)

    Args:
        dim: Width of ``x`` and ``y``.
        negative_eigenvalues: Double beta, so that a write may turn a direction around, which tracking states needs.
        conv_width: Width of the short convolution with SiLU over q, k, v; None for SiLU alone.
        output_gate: Gate the normalised output with ``silu(W x)``; the paper does not.
        options: Those of ``MatrixMemory``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: As in ``MatrixMemory``.

    Reference:
        arXiv 2406.06484; negative eigenvalues: Grazzi et al., arXiv 2411.12537.
    """

    rule_class = DeltaNetRule

    def __init__(
        self,
        dim: int,
        *,
        negative_eigenvalues: bool = False,
        conv_width: int | None = 4,
        output_gate: bool = False,
        **options: Unpack[MatrixMemoryOptions],
    ) -> None:
        rule = {"negative_eigenvalues": negative_eigenvalues}
        super().__init__(dim, rule, conv_width=conv_width, output_gate=output_gate, **options)


@register_layer("deltanet", "mixer")
def _deltanet(dim: int, **overrides: Any) -> DeltaNet:
    return DeltaNet(dim, **dict(num_heads=2, chunk_size=4) | overrides)
