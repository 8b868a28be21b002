"""Cross-attention: queries of one's own over keys and values that an earlier layer computed (YOCO, SambaY)."""

from dataclasses import dataclass

from torch import Tensor, nn

from memzoo.layers.differential_read import DifferentialRead
from memzoo.layers.errors import check_divisible, check_dtype, check_number, check_positive, check_width
from memzoo.layers.ops.attention import shared_attention
from memzoo.layers.packing import Ragged
from memzoo.layers.rotary import Rotary, positions_from
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of a layer, for the queries of later ones at the same tokens: what ``Attention.share`` returns.

    Attributes:
        keys: (rows, slots, num_kv_heads, head_dim), of every token so far.
        values: (rows, slots, num_kv_heads, head_dim), or half as many heads of twice the width (differential).
        first: (rows,) tokens before the first query of each row; None where the queries' tokens are those of the keys.
        rows: How the (batch, time) grid of queries was cut into rows; None if it was not.
        rotary_base: Base of the rotation that the keys have; None if they have none.
    """

    keys: Tensor
    values: Tensor
    first: Tensor | None = None
    rows: Ragged | None = None
    rotary_base: float | None = None


def check_shareable(*, window: int | None, qk_norm: bool | str, prefix_tokens: Tensor | None) -> None:
    """Require that queries of other layers may see what a layer's own do, no less and no more.

    Args:
        window: Of the layer that is to share its keys.
        qk_norm: Whether it normalises them, or "full".
        prefix_tokens: Its own, or None.

    Raises:
        ValueError: They may not.
    """
    if window is not None:
        raise ValueError(
            f"window={window} forgets keys that other layers' queries may see; share those of a layer with window=None"
        )
    if qk_norm:
        raise ValueError(
            f"qk_norm={qk_norm} makes keys for normalised queries, and CrossAttention does not normalise its own; "
            f"share those of a layer with qk_norm=False"
        )
    if prefix_tokens is not None:
        raise ValueError(
            f"num_prefix_tokens={len(prefix_tokens)} are read by this layer alone; share keys of a layer with "
            f"num_prefix_tokens=0"
        )


class CrossAttention(nn.Module):
    """Causal attention without keys and values of its own: it projects queries and outputs only.

    It carries no state. What it reads is an argument, so there is no cache to be forgotten: ``shared`` comes from the
    ``share`` of an ``Attention`` that was given the same tokens, mask and documents.

    Args:
        dim: Width of the residual stream.
        num_heads: Query heads.
        head_dim: Width of a head, that of the sharing layer.
        num_kv_heads: Heads of keys and values in the sharing layer.
        rotary_base: Base of the rotary embedding, that of the sharing layer; None for attention without positions.
        bias: Add learned biases to queries and outputs.
        scale: Factor of the scores, ``head_dim ** -0.5`` by default.
        differential_layer: The layer's place in the model, from 0, if the sharing layer is a ``DifferentialAttention``;
            this one is then differential too. None for plain attention.

    Shape:
        x: (batch, time, dim), at the places of the ``x`` that was shared; (batch, 1, dim) after ``last_only``. Returns
        the same, zeros at masked tokens.

    Raises:
        ValueError: Widths or numbers of heads do not divide, or ``x`` and ``shared`` do not fit.

    Reference:
        Sun et al., arXiv 2405.05254; arXiv 2507.06607.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        rotary_base: float | None = None,
        bias: bool = False,
        scale: float | None = None,
        differential_layer: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_divisible("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        check_positive("head_dim", head_dim)
        if scale is not None:
            check_number("scale", scale)
        self.dim = dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale
        self.query = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.rotary = None if rotary_base is None else Rotary(head_dim, base=rotary_base)
        self.differential = (
            None
            if differential_layer is None
            else DifferentialRead(num_heads, num_kv_heads, head_dim, layer_index=differential_layer)
        )

    def forward(self, x: Tensor, shared: SharedKeys, *, trace: Trace | None = None) -> Tensor:
        """Attend to the shared keys and values; nothing is reported to ``trace``."""
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        self._check_shared(x, shared)
        tokens = x if shared.rows is None else shared.rows.gather(x)
        q = self.query(tokens)
        q = q.unflatten(-1, (-1, self.head_dim)) if self.differential is None else self.differential.split(q)
        if self.rotary is not None:
            q = self.rotary(q, positions_from(shared.first, tokens))
        y = shared_attention(q, shared.keys, shared.values, shared.first, scale=self.scale)
        y = self.out(y.flatten(2) if self.differential is None else self.differential(y))
        return y if shared.rows is None else shared.rows.scatter(y)

    def _check_shared(self, x: Tensor, shared: SharedKeys) -> None:
        heads = (self.num_kv_heads, self.head_dim)
        if shared.keys.shape[2:] != heads:
            raise ValueError(
                f"shared keys have shape {tuple(shared.keys.shape)}; their heads must be (num_kv_heads, head_dim) = "
                f"{heads}: share them by a layer with these, or build this one with those"
            )
        wide = heads if self.differential is None else (self.num_kv_heads // 2, 2 * self.head_dim)
        if shared.values.shape[2:] != wide:
            raise ValueError(
                f"shared values have shape {tuple(shared.values.shape)}; their heads must be {wide}: both layers must "
                f"be differential, or none"
            )
        own = None if self.rotary is None else self.rotary.base
        if shared.rotary_base != own:
            raise ValueError(
                f"shared keys have rotary_base={shared.rotary_base}, this layer's queries {own}; give both layers the "
                f"same rotary_base"
            )
        if shared.rows is not None:
            grid = tuple(shared.rows.inverse.shape)
        else:
            grid = (shared.keys.shape[0], shared.keys.shape[1] if shared.first is None else x.shape[1])
        if tuple(x.shape[:2]) != grid:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but what is shared is for (batch, time) = {grid}; "
                f"both must cover the same positions"
            )

    def extra_repr(self) -> str:
        """Heads."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
