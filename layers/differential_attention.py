"""Differential attention: the difference of two attention maps, so that what both of them see cancels."""

from typing import Any

from torch import Tensor

from memzoo.layers.attention import Attention
from memzoo.layers.differential_read import DifferentialRead
from memzoo.layers.errors import check_choice
from memzoo.layers.ops.attention import check_window
from memzoo.layers.registry import register_layer


class DifferentialAttention(Attention):
    """Causal attention by pairs of heads: one map of a pair is subtracted from the other, and the read is normalised.

    ``DifferentialRead``, its ``differential``, says how. Heads 2h and 2h + 1 are a pair; their two maps read the values
    of both, so the state holds as many numbers as that of plain attention with as many heads.

    Args:
        dim: Width of the residual stream.
        layer_index: The layer's place in the model, from 0; sets how much of the second map is taken away at first.
        window: Keys a query sees, its own among them; None for all.
        num_heads: Query heads, even, and so the rest as in ``Attention``.
        head_dim: Width of a head.
        num_kv_heads: Heads of keys and values, even.
        rotary_base: Base of the rotary position embedding, or None.
        qk_norm: RMS-normalise queries and keys.
        num_prefix_tokens: Learned tokens that every query sees.
        bias: Add learned biases.
        scale: Factor of the scores.
        backend: ``"auto"`` or ``"torch"``; flash-attn needs values as wide as keys.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and an ``AttentionState`` with keys (batch, slots,
        num_kv_heads, head_dim), even heads before odd ones, and values (batch, slots, num_kv_heads / 2, 2 head_dim).

    Raises:
        ValueError: A number of heads is odd, ``layer_index`` is negative, the window keeps no keys, or as in
            ``Attention``.

    Reference:
        Ye et al., arXiv 2410.05258; paired like the official code of SambaY (arXiv 2507.06607).
    """

    def __init__(
        self,
        dim: int,
        *,
        layer_index: int,
        window: int | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        num_prefix_tokens: int = 0,
        bias: bool = False,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        check_choice("backend", backend, ("auto", "torch"))  # flash-attn wants values as wide as keys
        check_choice("qk_norm", qk_norm, (False, True))
        super().__init__(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            rotary_base=rotary_base,
            qk_norm=qk_norm,
            num_prefix_tokens=num_prefix_tokens,
            bias=bias,
            scale=scale,
            backend=backend,
        )
        check_window(window)
        self.window = window
        self.differential = DifferentialRead(self.num_heads, self.num_kv_heads, self.head_dim, layer_index=layer_index)
        self.value_shape = (self.num_kv_heads // 2, 2 * self.head_dim)

    def _split(self, x: Tensor) -> Tensor:
        return self.differential.split(x)

    def _join(self, reads: Tensor) -> Tensor:
        joined: Tensor = self.differential(reads)
        return joined

    def extra_repr(self) -> str:
        """Window and heads."""
        return f"window={self.window}, {super().extra_repr()}"


def _build(dim: int, **overrides: Any) -> DifferentialAttention:
    return DifferentialAttention(dim, **dict(layer_index=1, num_heads=4, num_kv_heads=2) | overrides)


@register_layer("differential_attention", "mixer", state_size="grows")
def _build_full(dim: int, **overrides: Any) -> DifferentialAttention:
    return _build(dim, **overrides)


@register_layer("sliding_window_differential_attention", "mixer")
def _build_window(dim: int, **overrides: Any) -> DifferentialAttention:
    return _build(dim, **dict(window=5) | overrides)
