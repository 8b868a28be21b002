"""Attention as a sequence mixer: the memory that keeps every token, and the one that keeps a window of them."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from memzoo.layers.cross_attention import SharedKeys, check_shareable
from memzoo.layers.errors import check_choice, check_divisible, check_number, check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.attention import (
    BACKENDS,
    AttentionState,
    attention,
    check_window,
    remember,
    shared_attention,
)
from memzoo.layers.ops.attention_checks import check_dropout
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.packing import Ragged
from memzoo.layers.registry import register_layer
from memzoo.layers.rotary import Angles, Rotary, positions_from
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


class Attention(SequenceMixer):
    """Causal multi-head attention over everything seen so far.

    Its state keeps the keys (after normalisation and rotation) and values of every token, so it grows.

    Args:
        dim: Width of the residual stream.
        num_heads: Query heads; ``dim // head_dim`` by default.
        head_dim: Width of a head; ``dim // num_heads`` if those are given, else 64.
        num_kv_heads: Heads of keys and values, each shared by ``num_heads / num_kv_heads`` query heads; ``num_heads``
            by default.
        rotary_base: Base of the rotary position embedding; None for attention without positions.
        qk_norm: RMS-normalise queries and keys head by head, before the rotation; "full" normalises all heads together,
            over their whole width (OpenLM).
        num_prefix_tokens: Learned tokens that every query sees: persistent memory (Titans, section 3.3). They are
            ``prefix_tokens`` (num_prefix_tokens, dim), read through the layer's own projections. Their keys are not
            rotated: all of them stand at position 0.
        bias: Add learned biases to queries, keys, values and outputs.
        scale: Factor of the scores, ``head_dim ** -0.5`` by default.
        dropout: Probability with which a weight of attention is dropped in training.
        backend: ``"auto"``, ``"torch"`` or ``"flash_attn"``, as in ``ops.attention``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and an ``AttentionState``; ``return_memory`` gives the heads'
        reads side by side, before ``out``.

    Raises:
        ValueError: Widths or numbers of heads do not divide, ``dropout`` is no probability, or the backend is missing.

    Reference:
        Vaswani et al., arXiv 1706.03762; grouped queries: Ainslie et al., arXiv 2305.13245.
    """

    state_class = AttentionState
    window: int | None = None

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool | Literal["full"] = False,
        num_prefix_tokens: int = 0,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divisible("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        if scale is not None:
            check_number("scale", scale)
        if num_prefix_tokens:
            check_positive("num_prefix_tokens", num_prefix_tokens, "use 0 for none")
        check_choice("qk_norm", qk_norm, (False, True, "full"))
        check_dropout("dropout", dropout)
        check_backend(backend, BACKENDS)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.value_shape = (num_kv_heads, head_dim)
        self.memory_dim = num_heads * head_dim
        self.scale, self.dropout, self.backend = scale, dropout, backend
        self.query = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.qk_norm, self.norms_all_heads = qk_norm, qk_norm == "full"
        self.query_norm = self._head_norm(qk_norm, num_heads)
        self.key_norm = self._head_norm(qk_norm, num_kv_heads)
        self.rotary = None if rotary_base is None else Rotary(head_dim, base=rotary_base)
        self.prefix_tokens = nn.Parameter(torch.empty(num_prefix_tokens, dim)) if num_prefix_tokens else None
        self.no_weight_decay = ("prefix_tokens",) if num_prefix_tokens else ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prefix tokens as large as normalised tokens are; the projections draw themselves."""
        if self.prefix_tokens is not None:
            nn.init.normal_(self.prefix_tokens)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """Return the state of ``batch_size`` fresh rows: no slots, or an empty ring of ``window`` slots."""
        like = self.key.weight
        device, dtype = device or like.device, dtype or like.dtype
        counter = torch.zeros(batch_size, dtype=torch.long, device=device)
        keys, values = (
            torch.zeros(batch_size, self.window or 0, *heads, dtype=dtype, device=device)
            for heads in ((self.num_kv_heads, self.head_dim), self.value_shape)
        )
        return AttentionState(counter, counter.clone(), keys, values)

    def mix(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        lengths: Tensor | None,
        trace: Trace | None,
        donate: bool,
        return_memory: bool = False,
    ) -> tuple[Any, AttentionState]:
        """Attend, with the layer's own prefix tokens; nothing is reported to ``trace``."""
        prefix_tokens = None if self.prefix_tokens is None else self.prefix_tokens[None]
        own = cast(AttentionState | None, state)
        memory, end = self._read(x, own, lengths=lengths, donate=donate, prefix_tokens=prefix_tokens)
        y = self.out(memory)
        return ((y, memory) if return_memory else y), end

    def attend(
        self,
        x: Tensor,
        state: AttentionState | None,
        *,
        lengths: Tensor | None,
        donate: bool,
        prefix_tokens: Tensor | None,
    ) -> tuple[Tensor, AttentionState]:
        """``mix`` with prefix tokens that the caller brings, in place of the layer's own.

        Args:
            x: Rows that begin at the left.
            state: As in ``mix``, and so ``lengths`` and ``donate``.
            lengths: Tokens that exist in each row.
            donate: The caller gives ``state`` away.
            prefix_tokens: Tokens that every query sees, without positions and outside the window; None for none.

        Shape:
            x: (batch, time, dim). prefix_tokens: (batch or 1, num_prefix, dim). Returns (batch, time, dim) and the
            state.
        """
        memory, end = self._read(x, state, lengths=lengths, donate=donate, prefix_tokens=prefix_tokens)
        return self.out(memory), end

    def share(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, AttentionState, SharedKeys, Tensor]:
        """``forward``, and what layers after this one may read: its keys and values, for ``CrossAttention``.

        Args:
            x: The tokens.
            state: As in ``forward``, and so ``mask``, ``doc_ids``, ``trace`` and ``donate``.
            mask: True at real tokens.
            doc_ids: Documents packed in one row.
            trace: Collects losses and signals.
            donate: Allow the storage of ``state`` to be reused. The shared keys lie in that of the returned state: they
                hold until that one is given away in turn.
            last_only: Attend for each row's last real token alone, as the prefill of a prompt may: keys and values are
                computed for all tokens, queries and outputs for one. What is shared is then for one query a row too.

        Shape:
            x: (batch, time, dim). Returns y (batch, time, dim), the state, the shared keys, and the heads' reads before
            ``out`` (batch, time, memory_dim). With ``last_only``, y and reads have time 1, and are zero in a row
            without tokens.

        Raises:
            ValueError: The layer has a window, prefix tokens or normalised queries, which other layers do not; or as in
                ``forward``.
        """
        check_shareable(window=self.window, qk_norm=self.qk_norm, prefix_tokens=self.prefix_tokens)
        self.check_call(x, state, mask, doc_ids)
        rows, start = self.unpack(state, mask, doc_ids)
        tokens, lengths = (x, None) if rows is None else (rows.gather(x), rows.lengths)
        donate = donate and rows is None
        before = None if start is None else start.position
        if last_only:
            k, v = self._keys_and_values(tokens, self._angles(tokens, before))
            end = remember(k, v, state=start, lengths=lengths, donate=donate)
        else:
            memory, end = self._read(tokens, start, lengths=lengths, donate=donate, prefix_tokens=None)
            y = self.out(memory)
            if before is None and end.keys.shape[1] < tokens.shape[1]:  # slots are counted by the longest row
                before = torch.zeros_like(end.position)
            shared = SharedKeys(end.keys, end.values, before, rows, self._rotary_base)
        if rows is not None:
            end = self.pack(end, state, rows, has_documents=doc_ids is not None)
        if last_only:
            shared = SharedKeys(end.keys, end.values, (end.position - 1).clamp_min(0), None, self._rotary_base)
            y, memory = self._read_last(tokens, shared, rows)
        elif rows is not None:
            y, memory = rows.scatter(y), rows.scatter(memory)
        if trace is not None and trace.wants_signals:
            self.report_state(end, trace)
        return y, end, shared, memory

    def _read_last(self, tokens: Tensor, shared: SharedKeys, rows: Ragged | None) -> tuple[Tensor, Tensor]:
        """Outputs and reads, each of time 1, for the last token of every row of the batch; zero where there is none."""
        last, empty = (tokens[:, -1:], None) if rows is None else rows.last_tokens(tokens)
        q = self._queries(last, self._angles(last, shared.first))
        reads = shared_attention(
            q, shared.keys, shared.values, shared.first, scale=self.scale, dropout=self._active_dropout
        )
        memory = self._join(reads)
        y = self.out(memory)
        return (y, memory) if empty is None else (y.masked_fill(empty, 0), memory.masked_fill(empty, 0))

    def _read(
        self,
        x: Tensor,
        state: AttentionState | None,
        *,
        lengths: Tensor | None,
        donate: bool,
        prefix_tokens: Tensor | None,
    ) -> tuple[Tensor, AttentionState]:
        """Attend: the heads' reads (batch, time, memory_dim) and the state."""
        angles = self._angles(x, None if state is None else state.position)
        q, k, v = self._queries(x, angles), *self._keys_and_values(x, angles)
        prefix = None if prefix_tokens is None else self._keys_and_values(prefix_tokens, None)
        return self._look(q, k, v, prefix, state, lengths=lengths, donate=donate)

    def _look(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        state: AttentionState | None,
        *,
        lengths: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, AttentionState]:
        """Attend by queries that are rotated already; what is returned is that of ``_read``."""
        y, end = attention(
            q,
            k,
            v,
            window=self.window,
            prefix=prefix,
            state=state,
            lengths=lengths,
            scale=self.scale,
            dropout=self._active_dropout,
            donate=donate,
            backend=self.backend,
        )
        return self._join(y), end

    @property
    def _active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def _rotary_base(self) -> float | None:
        return None if self.rotary is None else self.rotary.base

    def _angles(self, x: Tensor, first: Tensor | None) -> Angles | None:
        """Rotations of tokens that begin at position ``first``, or at 0; None where nothing is rotated."""
        return None if self.rotary is None else self.rotary.angles(positions_from(first, x))

    def _queries(self, x: Tensor, angles: Angles | None) -> Tensor:
        return self._rotate(self._heads(self.query(x), self.query_norm), angles)

    def _keys_and_values(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        k = self._rotate(self._heads(self.key(x), self.key_norm), angles)
        return k, self.value(x).unflatten(-1, self.value_shape)

    def _head_norm(self, qk_norm: bool | str, heads: int) -> nn.Module:
        if not qk_norm:
            return nn.Identity()
        return RMSNorm(heads * self.head_dim if self.norms_all_heads else self.head_dim)

    def _heads(self, projected: Tensor, norm: nn.Module) -> Tensor:
        """Split queries or keys into heads and normalise them."""
        y: Tensor = self._split(norm(projected)) if self.norms_all_heads else norm(self._split(projected))
        return y

    def _rotate(self, heads: Tensor, angles: Angles | None) -> Tensor:
        return heads if self.rotary is None or angles is None else self.rotary(heads, angles)

    def _split(self, x: Tensor) -> Tensor:
        """(..., heads * head_dim) -> (..., heads, head_dim) of queries or keys, in the order of ``ops.attention``."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def _join(self, reads: Tensor) -> Tensor:
        """What ``ops.attention`` read -> (batch, time, memory_dim)."""
        return reads.flatten(2)

    def extra_repr(self) -> str:
        """Heads."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


class SlidingWindowAttention(Attention):
    """Causal attention over the last ``window`` tokens, the current one among them.

    Its state is a ring of ``window`` keys and values, constant in the length of the context; time is linear in it.
    Prefix tokens stay visible outside the window (Titans, MAG).

    Args:
        dim: Width of the residual stream.
        window: Keys a query sees, its own among them.
        num_heads: As in ``Attention``, and so the rest.
        head_dim: Width of a head.
        num_kv_heads: Heads of keys and values.
        rotary_base: Base of the rotary position embedding, or None.
        qk_norm: RMS-normalise queries and keys, head by head or "full".
        num_prefix_tokens: Learned tokens that every query sees.
        bias: Add learned biases.
        scale: Factor of the scores.
        dropout: Of the weights of attention, in training.
        backend: ``"auto"``, ``"torch"`` or ``"flash_attn"``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and an ``AttentionState``.

    Raises:
        ValueError: The window keeps no keys, or as in ``Attention``.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool | Literal["full"] = False,
        num_prefix_tokens: int = 0,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
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
            dropout=dropout,
            backend=backend,
        )
        check_window(window)
        self.window = window

    def extra_repr(self) -> str:
        """Window and heads."""
        return f"window={self.window}, {super().extra_repr()}"


@register_layer("attention", "mixer", state_size="grows")
def _build_attention(dim: int, **overrides: Any) -> Attention:
    return Attention(dim, **dict(num_heads=4, num_kv_heads=2) | overrides)


@register_layer("sliding_window_attention", "mixer")
def _build_sliding_window_attention(dim: int, **overrides: Any) -> SlidingWindowAttention:
    return SlidingWindowAttention(dim, **dict(window=5, num_heads=4, num_kv_heads=2) | overrides)
