"""Memory as context (MAC): attention over a segment, over what a neural memory recalls for it, and persistent tokens.

Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), section 4.1. Attention
never leaves its segment; all that lies further back reaches it through the memory, which in turn is written with what
the attention made of the segment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.memory_gate import MemoryGate
from memzoo.layers.memory_options import build_memory
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.neural_memory import NeuralMemoryState
from memzoo.layers.neural_memory_parts import unit
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.memory_arguments import Weights, any_row
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.layers.registry import register_layer
from memzoo.layers.rotary import Angles, Rotary
from memzoo.layers.segments import Segments, visible_keys
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace

DEFAULT_CHUNK_SIZE = 64


@dataclass(frozen=True)
class MemoryAsContextState(MixerState):
    """The memory and the running segment; constant in size.

    Attributes:
        memory: The neural memory. In the literal form its position counts the rows it was written with.
        queries: Tail of the convolution of the retrieval's queries; None without one.
        frozen: Weights from which the running segment retrieves, those after the segment before, like
            ``memory.weights``; () in the literal form.
        context: (batch, segment_size, 4, heads, head_dim), a slot for every token of the segment: key and value of what
            was retrieved for it, key and value of the token itself. A segment overwrites the one before it slot by
            slot. None in the literal form.
    """

    memory: NeuralMemoryState
    queries: ShortConvState | None
    frozen: Weights
    context: Tensor | None


class MemoryAsContext(SequenceMixer):
    """Attention over [P || h || S], segment by segment: persistent tokens P, recalled tokens h, the segment S itself.

    With ``M_s`` the memory after segment s and ``M_{s,i}`` the memory after its token i:

        h   = M_{s-1}(q(S))                       retrieved, not written
        y_i = Attention(S_i; P, h_{<=i}, S_{<=i})
        M_{s,i} = M_{s,i-1} written with y_i      keys, values and gates are computed from y
        o_i = W_o gate(y_i, M_{s,i}(q(y_i)))

    The printed equations are for a segment that is known as a whole: there a token sees all of h, and reads the memory
    after the whole segment was written. ``literal=True`` computes those, for encoders.

    Args:
        dim: Width of ``x`` and ``o``.
        segment_size: Tokens of a segment. Part of the model.
        num_persistent_tokens: Learned tokens that every segment sees, N_p; 0 for none.
        num_heads: Heads of the attention, and of the memory unless ``memory`` says otherwise; ``dim / head_dim`` by
            default.
        head_dim: Width of each; ``dim / num_heads`` if that is given, else 64.
        rotary_base: Base of the attention's rotary embedding, of the position in the segment; None for attention
            without positions.
        qk_norm: RMS-normalise the attention's queries and keys.
        gate: How ``y`` and the memory's answer are combined, a form of ``MemoryGate``.
        residual: Add the token itself to what attention makes of it, ``y_i = S_i + Attention(..)``. From its start the
            memory then stores tokens, not averages of a segment.
        literal: Compute the printed equations, which are not causal within a segment.
        retrieved_positions: Give ``h_i`` the position of ``S_i``. Otherwise it is not rotated, so that to a query it
            stands where P stands, at position 0 of the segment.
        shared_query: Ask for ``h`` with the memory's own query projection; otherwise with one apart.
        memory: Keyword options of ``NeuralMemory``. Its ``chunk_size`` need not divide a segment; by default it is 64,
            or that of the segment if smaller.

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and ``MemoryAsContextState``.

    Raises:
        ValueError: An option is out of range, or one of ``memory`` is unknown; in the literal form, a state ends within
            a segment.

    Reference:
        arXiv 2501.00663, section 4.1. Loop twin: ``memzoo.layers.reference.memory_as_context``.

    Note:
        The causal form masks h and reads the memory token by token, since the printed equations show a token its
        future in both places. It writes the rows of S alone, the literal form all N_p + 2 segment_size rows. ``y`` is
        what leaves the attention's own output projection. The paper gives neither segment size, number of persistent
        tokens, positions nor the form of the gate.
        Signals: those of ``NeuralMemory``, as ``memory.theta`` and so on.

    Example:
        >>> import torch
        >>> from memzoo.layers.memory_as_context import MemoryAsContext
        >>> mixer = MemoryAsContext(64, segment_size=16, num_persistent_tokens=4, num_heads=4)
        >>> y, state = mixer(torch.randn(2, 40, 64))
        >>> y.shape
        torch.Size([2, 40, 64])
    """

    state_class = MemoryAsContextState

    def __init__(
        self,
        dim: int,
        *,
        segment_size: int = 64,
        num_persistent_tokens: int = 16,
        num_heads: int | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        gate: str = "sigmoid_memory",
        residual: bool = False,
        literal: bool = False,
        retrieved_positions: bool = True,
        shared_query: bool = True,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive("segment_size", segment_size)
        check_choice("qk_norm", qk_norm, (False, True))
        if num_persistent_tokens:
            check_positive("num_persistent_tokens", num_persistent_tokens, "use 0 for none")
        options = {"chunk_size": min(DEFAULT_CHUNK_SIZE, segment_size)} | dict(memory or {})
        self.segment_size = segment_size
        self.num_persistent_tokens = num_persistent_tokens
        self.literal = literal
        self.retrieved_positions = retrieved_positions
        self.residual = residual
        self.memory = build_memory(dim, options, num_heads=num_heads, head_dim=head_dim)
        self.num_heads, self.head_dim = resolve_heads(dim, num_heads, head_dim)
        inner = self.num_heads * self.head_dim
        self.persistent_memory = PersistentMemory(dim, num_persistent_tokens) if num_persistent_tokens else None
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.rotary = None if rotary_base is None else Rotary(self.head_dim, base=rotary_base)
        self.attention_out = nn.Linear(inner, dim, bias=False)
        self.retrieval_query: nn.Linear | None = None
        self.retrieval_conv: ShortConv | None = None
        if not shared_query:
            asked = self.memory.num_heads * self.memory.head_dim
            self.retrieval_query = nn.Linear(dim, asked, bias=False)
            if self.memory.conv is not None:
                like = self.memory.conv
                self.retrieval_conv = ShortConv(asked, width=like.weight.shape[1], backend=like.backend)
        self.gate = MemoryGate(dim, form=gate)
        self.out = nn.Linear(dim, dim, bias=False)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MemoryAsContextState:
        """Return the state of fresh rows: zeros, which ``mix`` reads as the learned initial memory."""
        like = self.query.weight
        device, dtype = device or like.device, dtype or like.dtype
        memory = self.memory.initial_state(batch_size, device=device, dtype=dtype)
        queries = None
        if memory.conv is not None:
            asked = self.memory.num_heads * self.memory.head_dim
            queries = ShortConvState(torch.zeros_like(memory.conv.tail[..., :asked]))
        frozen: Weights = ()
        context = None
        if not self.literal:
            frozen = tuple(torch.zeros_like(w) for w in memory.weights)
            context = torch.zeros(batch_size, *self._context_shape, device=device, dtype=dtype)
        count = torch.zeros_like(memory.position)
        return MemoryAsContextState(count, count.clone(), memory, queries, frozen, context)

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, MemoryAsContextState]:
        """Retrieve, attend, write, read and gate, one segment after the other; see ``SequenceMixer.mix``."""
        own = cast(MemoryAsContextState | None, state)
        if own is not None:
            self._check_state(own, lengths)
        if lengths is not None:  # what lies behind a row may be NaN, and 0 * NaN would spread it
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0)
        return self._mix_literally(x, own, lengths, trace) if self.literal else self._mix(x, own, lengths, trace)

    def _mix(
        self, x: Tensor, state: MemoryAsContextState | None, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, MemoryAsContextState]:
        before, after, document = counters(state, x, lengths)
        segments = Segments.lay_out(x, self.segment_size, None if state is None else before, lengths)
        # What the memory has no part in, for all segments at once.
        positions = torch.arange(x.shape[1], device=x.device)
        positions = (positions if state is None else before[:, None] + positions) % self.segment_size
        angles = None if self.rotary is None else self.rotary.angles(positions)
        q_h, queries = self._retrieval_queries(x, None if state is None else state.queries, lengths)
        k, v = self._keys_and_values(x, angles)
        per_token = (x, q_h, self._queries(x, angles), k, v, *self._output_gates(x))
        tokens = x.new_empty(0, self.dim) if self.persistent_memory is None else self.persistent_memory.tokens
        persistent = self._keys_and_values(tokens[None], None)

        memory: NeuralMemoryState | None = None
        frozen: Weights = ()
        context: Tensor | None = None
        if state is not None:
            memory, frozen, context = state.memory, state.frozen, cast(Tensor, state.context).to(k.dtype)
        fresh = state is None and lengths is None  # every row fills its segments from their first slots, to the end
        outputs, reads, reports = [], [], []
        for s, (tokens, asked, q, k, v, *gates) in enumerate(zip(*map(segments.cut, per_token), strict=True)):
            slots, begins = segments.slots[s], segments.begins[s]
            current = memory.weights if fresh and memory else self.memory.current_weights(memory, len(x))
            frozen = _where(begins, current, frozen) if frozen and begins is not None else current
            h = self.memory.output(self.memory.recall(asked, frozen), tokens, *gates)
            places = angles if len(segments.slots) == 1 else slots
            k_h, v_h = self._keys_and_values(h, places if self.retrieved_positions else None)
            seen: tuple[Tensor, ...] = (k_h, v_h, k, v)
            if not fresh or s >= len(segments.slots) - 2:  # a state holds slots of the last segment and the one before
                context = segments.put(context, torch.stack(seen, 2), s)
            if not fresh:
                seen = cast(Tensor, context).unbind(2)
            keys, values = (
                torch.cat((p.expand(len(x), -1, -1, -1), seen[i], seen[i + 2]), 1) for i, p in enumerate(persistent)
            )
            visible = visible_keys(slots, seen[0].shape[1], self.num_persistent_tokens)
            y = self._attend(tokens, q, keys, values, visible)
            report = Trace() if trace is not None and trace.wants_signals else None
            known = s * self.segment_size if state is None else None
            read, memory = self.memory.mix_heads(y, memory, lengths=segments.counts[s], trace=report, position=known)
            outputs.append(y)
            reads.append(read)
            reports.append({} if report is None else report.signals)
        _hand_on(reports, trace, segments)
        if state is None and len(outputs) == 1:  # the learned M_0 itself, which a state must not share
            frozen = tuple(w.clone(memory_format=torch.contiguous_format) for w in frozen)
        assert memory is not None
        y = segments.join(outputs)
        o = self.out(self.gate(y, self.memory.output(segments.join(reads), y)))
        return o, MemoryAsContextState(after, document, memory, queries, frozen, context)

    def _mix_literally(
        self, x: Tensor, state: MemoryAsContextState | None, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, MemoryAsContextState]:
        _, after, document = counters(state, x, lengths)
        segments = Segments.lay_out(x, self.segment_size, None, lengths)
        memory = None if state is None else state.memory
        q_h, queries = self._retrieval_queries(x, None if state is None else state.queries, lengths)
        rows = torch.arange(len(x), device=x.device)[:, None]

        outputs, answers, reports = [], [], []
        for s, (tokens, asked) in enumerate(zip(segments.cut(x), segments.cut(q_h), strict=True)):
            h = self.memory.output(self.memory.recall(asked, self.memory.current_weights(memory, len(x))), tokens)
            context, positions, own, written = self._printed_context(h, tokens, segments.slots[s], segments.counts[s])
            k, v = self._keys_and_values(context, positions)
            y = self._attend(context, self._queries(context, positions), k, v, None)
            q, _ = self.memory.queries(y, self._query_tail(memory), lengths=written)
            report = Trace() if trace is not None and trace.wants_signals else None
            _, memory = self.memory.mix_heads(y, memory, lengths=written, trace=report)
            outputs.append(y[rows, own])
            answers.append(self.memory.output(self.memory.recall(q[rows, own], memory.weights), outputs[-1]))
            signals = {} if report is None else report.signals
            reports.append({name: signal[rows, own] for name, signal in signals.items()})
        _hand_on(reports, trace, segments)
        assert memory is not None
        o = self.out(self.gate(segments.join(outputs), segments.join(answers)))
        return o, MemoryAsContextState(after, document, memory, queries, (), None)

    def _printed_context(
        self, h: Tensor, tokens: Tensor, slots: Tensor, count: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return [P || h || S] of every row, from the left.

        Returns:
            The context (batch, places, dim), its positions (places,) or (batch, places), the places of S (batch or 1,
            tokens), and how many places are filled (batch,), None if all are.
        """
        parts, positions = [h, tokens], [slots if self.retrieved_positions else torch.zeros_like(slots), slots]
        if self.persistent_memory is not None:
            parts.insert(0, self.persistent_memory.tokens.expand(len(h), -1, -1))
            positions.insert(0, slots.new_zeros(self.num_persistent_tokens))
        context, position = torch.cat(parts, 1), torch.cat(positions)
        places = torch.arange(len(position), device=h.device)
        first = places[None, -len(slots)]
        if count is None:
            return context, position, first[:, None] + slots, None
        gap = (len(slots) - count)[:, None]  # behind the h of a row that ends in this segment
        first = first - gap
        source = torch.where(places < first, places, places + gap).clamp_max(len(places) - 1)
        context = context[torch.arange(len(h), device=h.device)[:, None], source]
        return context, position[source], first + slots, torch.where(count > 0, first[:, 0] + count, 0)

    def _retrieval_queries(
        self, x: Tensor, tail: ShortConvState | None, lengths: Tensor | None
    ) -> tuple[Tensor, ShortConvState | None]:
        """Return what the tokens ask the memory for, (batch, time, memory heads, width), and the convolution's tail."""
        if self.retrieval_query is None:
            return self.memory.queries(x, tail, lengths=lengths)
        asked = self.retrieval_query(x)
        if self.retrieval_conv is None:
            asked, tail = F.silu(asked), None
        else:
            asked, tail = self.retrieval_conv(asked, tail, lengths=lengths)
        asked = asked.unflatten(-1, (self.memory.num_heads, self.memory.head_dim))
        return unit(asked), tail

    def _output_gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gates of what is retrieved for the tokens ``x``, if there are any."""
        return () if self.memory.output_gate is None else (self.memory.output_gate(x),)

    def _query_tail(self, memory: NeuralMemoryState | None) -> ShortConvState | None:
        """Return the tail of the convolution of the queries with which ``memory`` would be read next."""
        if memory is None or memory.conv is None:
            return None
        return ShortConvState(memory.conv.tail[..., : self.memory.num_heads * self.memory.head_dim])

    def _queries(self, x: Tensor, positions: Tensor | Angles | None) -> Tensor:
        return self._rotate(self.query_norm(self.query(x).unflatten(-1, (self.num_heads, self.head_dim))), positions)

    def _keys_and_values(self, x: Tensor, positions: Tensor | Angles | None) -> tuple[Tensor, Tensor]:
        """Return keys and values (batch, time, heads, head_dim); the keys are not rotated without positions."""
        k, v = self.key_value(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return self._rotate(self.key_norm(k), positions), v

    def _rotate(self, x: Tensor, positions: Tensor | Angles | None) -> Tensor:
        return x if self.rotary is None or positions is None else cast(Tensor, self.rotary(x, positions))

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Return y for the tokens ``x``; ``visible`` broadcasts to (batch, heads, queries, keys), None is causal."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None)
        projected: Tensor = self.attention_out(y.transpose(1, 2).flatten(2))
        return projected + x if self.residual else projected

    @property
    def _context_shape(self) -> tuple[int, ...]:
        return self.segment_size, 4, self.num_heads, self.head_dim

    def _check_state(self, state: MemoryAsContextState, lengths: Tensor | None) -> None:
        slots = None if self.literal else self._context_shape
        given = None if state.context is None else tuple(state.context.shape[1:])
        memories = [tuple(w.shape[1:]) for w in state.memory.weights]
        own = [tuple(w.shape) for w in self.memory.initial_weights]
        if given != slots or memories != own:
            raise ValueError(
                f"state holds a context of shape {given} and memories of {memories}; this layer's are {slots} and "
                f"{own}: pass what its previous call returned, or None to start afresh"
            )
        if not self.literal or torch.compiler.is_compiling() or state.position.is_meta:
            return
        within = state.position % self.segment_size > 0
        if (within if lengths is None else within & (lengths > 0)).any():
            raise ValueError(
                f"state ends within a segment, after {state.position.tolist()} tokens with "
                f"segment_size={self.segment_size}; literal=True needs whole segments: end all calls but the last one "
                f"at a multiple of segment_size, or use literal=False"
            )

    def extra_repr(self) -> str:
        """Segment and heads."""
        form = "literal, " if self.literal else ""
        return f"{form}segment_size={self.segment_size}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def _where(rows: Tensor, yes: Weights, no: Weights) -> Weights:
    if not any_row(rows):
        return no
    return tuple(torch.where(rows.view(-1, 1, 1, 1), a, b) for a, b in zip(yes, no, strict=True))


def _hand_on(reports: list[dict[str, Tensor]], trace: Trace | None, segments: Segments) -> None:
    """Tell ``trace`` what the memory reported segment by segment."""
    if trace is not None:
        for name in reports[0]:
            trace.scope("memory").signal(name, segments.join([report[name] for report in reports]))


@register_layer("memory_as_context", "mixer")
def _memory_as_context(dim: int, **overrides: Any) -> MemoryAsContext:
    small: dict[str, Any] = dict(segment_size=4, num_persistent_tokens=3, num_heads=2, memory={"chunk_size": 3})
    return MemoryAsContext(dim, **small | overrides)
