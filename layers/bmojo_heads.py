"""The projections of B'MOJO: queries, keys and values of the window, of fading tokens and of stored ones."""

from typing import cast

import torch
from torch import Tensor, nn

from memzoo.layers.bmojo_parts import Call, Pair
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.norm import RMSNorm
from memzoo.layers.rotary import Rotary

SEGMENTS = ("eidetic", "fading", "window")


class BMojoHeads(SequenceMixer):
    """A mixer that projects its input for up to three kinds of keys; what it attends to is for the subclass to say.

    Attributes:
        query: The projection of queries; and so ``key``, ``value``, and ``out`` to the residual stream.
        fading_query: The same for fading tokens, if they have projections of their own; and so ``fading_key`` and
            ``fading_value``.
        query_norm: Of queries; and so ``key_norm``, ``fading_query_norm`` and ``fading_key_norm``.
        eidetic_norm: Of the queries of stored tokens, if they have one of their own.
        rotary: None for attention without positions.
        segment_bias: (segments, heads) for the logits, if there is one.
    """

    def _build_heads(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        eidetic_norm: bool,
        tie_projections: bool,
        rotary_base: float | None,
        bias: bool,
        segment_bias: bool,
    ) -> None:
        dim = self.dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.tie_projections = tie_projections

        def project(heads: int) -> nn.Linear:
            return nn.Linear(dim, heads * head_dim, bias=bias)

        def norm() -> nn.Module:
            return RMSNorm(head_dim) if qk_norm else nn.Identity()

        self.query, self.key, self.value = project(num_heads), project(num_kv_heads), project(num_kv_heads)
        self.query_norm, self.key_norm = norm(), norm()
        self.eidetic_norm = RMSNorm(head_dim) if eidetic_norm else None
        self.fading_query = self.fading_key = self.fading_value = None
        self.fading_query_norm = self.fading_key_norm = None
        if not tie_projections:
            self.fading_query, self.fading_key = project(num_heads), project(num_kv_heads)
            self.fading_value = project(num_kv_heads)
            self.fading_query_norm, self.fading_key_norm = norm(), norm()
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.rotary = None if rotary_base is None else Rotary(head_dim, base=rotary_base)
        self.segment_bias = nn.Parameter(torch.empty(len(SEGMENTS), num_heads)) if segment_bias else None

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate (..., heads, head_dim) to positions (...)."""
        if self.rotary is None:
            return x
        turned: Tensor = self.rotary(x, positions)
        return turned

    def _queries(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """Queries by name: "own" for all keys but those of another name.

        "fading" are for fading tokens if untied, "eidetic" for stored ones with a norm of their own, "unrotated" for
        stored ones that do not stand at their true positions.
        """
        projected = self._split(self.query(x))
        plain = self.query_norm(projected)
        own = self._turned(plain, call.positions)
        queries = {"own": own, "unrotated": plain}
        if self.eidetic_norm is not None:
            plain = self.eidetic_norm(projected)
            queries |= {"unrotated": plain, "eidetic": self._turned(plain, call.positions)}
        if self.fading_query is not None and self.fading_query_norm is not None:
            own = self.fading_query_norm(self._split(self.fading_query(x)))
            queries["fading"] = self._turned(own, call.positions)
        return queries

    def _keys_and_values(self, x: Tensor, positions: Tensor, *, fading: bool) -> Pair:
        key, value, norm = self.key, self.value, self.key_norm
        if fading and self.fading_key is not None and self.fading_value is not None:
            key, value, norm = self.fading_key, self.fading_value, cast(nn.Module, self.fading_key_norm)
        return self._turned(norm(self._split(key(x))), positions), self._split(value(x))

    def _bias(self, segment: str) -> Tensor | None:
        return None if self.segment_bias is None else self.segment_bias[SEGMENTS.index(segment)]
