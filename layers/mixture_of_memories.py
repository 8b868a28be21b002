"""Mixture-of-Memories: several matrix memories, of which every token writes and reads a few."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.balance import BALANCES, report_balance
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.fla_checkpoint import mixture_from_fla
from memzoo.layers.heads import resolve_heads
from memzoo.layers.matrix_memory import positions
from memzoo.layers.matrix_rules import MATRIX_RULES
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.precision import no_autocast, wider
from memzoo.layers.registry import register_layer
from memzoo.layers.routing import Buckets, rows_of
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace

CONV_PLACES = ("bucket", "input")


@dataclass(frozen=True)
class MixtureOfMemoriesState(MixerState):
    """The memories after the tokens read so far; their size does not depend on the number of tokens.

    Attributes:
        memories: (batch, M or M + 1, value_heads, K, V), at least float32; the shared one is the last.
        conv: Tails of the short convolution: of every memory, (batch, memories, width - 1, channels of [q | k | v]),
            or of the input, (batch, 1, width - 1, dim). None without one.
        tokens_seen: (batch, M) int64, tokens that were routed to every memory.
    """

    memories: Tensor
    conv: Tensor | None
    tokens_seen: Tensor


class MixtureOfMemories(SequenceMixer):
    """Matrix memories of which every token writes and reads the ``top_k`` that a router picks, and a shared one.

    With x a token, p = softmax(W_r x) over the memories, and w the largest k of p over their sum:

        q = W_q x,   [k_m | v_m] = W_m x,   gates_m = G_m x      for the k memories m it goes to
        o_m, S_m = rule(conv(q, k_m, v_m), gates_m, S_m)          conv and S_m see the tokens that went to m, in order
        y = W_out (RMSNorm(sum_m w_m o_m + o_shared) * silu(W_o x))

    A memory that a token does not go to stays as it is, bit for bit. The shared memory takes every token, with weight
    1. All memories share the query projection, the convolution and the rule's own parameters. Routing is computed in
    at least float32. No token is ever dropped and none padded: projections see as many rows as there are copies.

    Args:
        dim: Width of ``x`` and ``y``.
        num_memories: M, the shared one not counted.
        top_k: Memories a token goes to.
        shared: Have a shared memory.
        rule: How a memory is written: ``"gated_deltanet"``, ``"deltanet"``, ``"kda"``, ``"gla"``, ``"retnet"`` or
            ``"linear_attention"``.
        rule_options: Arguments of the rule that only it has, such as ``{"gate_rank": 8}`` for "gla".
        num_heads: Heads of queries and keys; ``dim / head_dim`` by default.
        head_dim: Width of each, K; ``dim / num_heads`` if that is given, else 64.
        value_dim: Width of a value head, V; ``head_dim`` by default.
        num_value_heads: Matrices of a memory, groups of which share a query and key head; ``num_heads`` by default.
        renormalize: Divide the weights by their sum. With ``top_k=1`` they are then all 1, and only the balance loss
            trains the router; False uses p itself.
        conv: ``"bucket"``: each memory convolves the queries, keys and values of its own tokens, as the published code
            does. ``"input"``: ``x`` is convolved before routing and projections; then all memories are asked with the
            same query, and one tail is carried instead of M + 1. None: no convolution.
        conv_width: Width of the convolution.
        balance: The auxiliary loss, reported to the trace: ``"layer"``, ``"pooled"`` or ``"layer_sequence"``, see
            ``memzoo.layers.balance``; None for none. With ``top_k=1`` the last one does not reach the router.
        balance_weight: Its factor. The paper's ablation is best at 0.001, its released configurations have 0.01.
        tie_key_values: Let all memories share one projection to keys, values and gates; only the routing differs.
        output_gate: Gate the normalised output.
        norm_eps: Of the norm.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        backend: Of the recurrence: ``"auto"``, ``"torch"`` or ``"fla"``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MixtureOfMemoriesState``.

    Raises:
        ValueError: An option is unknown, ``top_k`` exceeds ``num_memories``, or widths do not divide.

    Reference:
        arXiv 2502.13685, equations 3 to 8; parts it leaves open as in flash-linear-attention's ``fla/layers/mom.py``,
        whose checkpoints ``load_fla_state_dict`` reads. Unlike that code, training is causal: its convolution runs
        across the borders of memories, and its sort may change the order of tokens.

    Note:
        Loss: ``balance``. Signals: ``load`` (M,), the share of the copies that every memory gets; ``load_entropy`` (),
        that of the load over log M; ``router_probabilities`` (batch, time, M); ``memory_norm`` (batch, memories).
    """

    state_class = MixtureOfMemoriesState
    native_segments = True

    def __init__(
        self,
        dim: int,
        *,
        num_memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        rule: str = "gated_deltanet",
        rule_options: dict[str, Any] | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_value_heads: int | None = None,
        renormalize: bool = True,
        conv: str | None = "bucket",
        conv_width: int = 4,
        balance: str | None = "layer",
        balance_weight: float = 0.01,
        tie_key_values: bool = False,
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive("num_memories", num_memories)
        check_positive("top_k", top_k)
        if top_k > num_memories:
            raise ValueError(f"top_k={top_k} exceeds num_memories={num_memories}; a token goes to a memory once")
        check_choice("rule", rule, MATRIX_RULES)
        check_choice("conv", conv, (*CONV_PLACES, None))
        check_positive("conv_width", conv_width, "it counts the current token; use conv=None for no convolution")
        check_choice("balance", balance, (*BALANCES, None))
        if not 0 <= balance_weight < math.inf:
            raise ValueError(f"balance_weight={balance_weight} is no finite number >= 0; 0.01 is usual")
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        self.rule_name = rule
        sizes: dict[str, Any] = {
            "num_heads": num_heads,
            "key_dim": head_dim,
            "value_dim": head_dim if value_dim is None else value_dim,
            "num_value_heads": num_value_heads,
            "chunk_size": chunk_size,
            "backend": backend,
        }
        try:
            self.rule = MATRIX_RULES[rule](**sizes, **rule_options or {})
        except TypeError as error:
            raise ValueError(
                f"rule_options={rule_options} do not fit rule={rule!r} ({error}); pass what that rule alone takes"
            ) from None
        self.num_memories, self.top_k, self.shared = num_memories, top_k, shared
        self.renormalize = renormalize
        self.balance, self.balance_weight = balance, balance_weight
        keys, values = num_heads * head_dim, self.rule.num_value_heads * self.rule.value_dim
        self.widths = (keys, keys, values)
        own = 1 if tie_key_values else num_memories + shared
        self.tie_key_values = tie_key_values
        self.router = nn.Linear(dim, num_memories, bias=False)
        self.query = nn.Linear(dim, keys, bias=False)
        self.key_value = nn.ModuleList(nn.Linear(dim, keys + values, bias=False) for _ in range(own))
        gates = [self.rule.gate_projection(dim) for _ in range(own)]
        self.gates = None if gates[0] is None else nn.ModuleList(gate for gate in gates if gate is not None)
        self.conv_place = conv
        self.conv = None
        if conv is not None:
            channels = sum(self.widths) if conv == "bucket" else dim
            self.conv = ShortConv(channels, width=conv_width, activation=self.rule.conv_activation)
        self.norm = RMSNorm(self.rule.value_dim, eps=norm_eps)
        self.output_gate = nn.Linear(dim, values, bias=False) if output_gate else None
        self.out = nn.Linear(values, dim, bias=False)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixtureOfMemoriesState:
        """Return the state of ``batch_size`` fresh rows: empty memories."""
        like = self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        count = torch.zeros(batch_size, dtype=torch.long, device=device)
        seen = torch.zeros(batch_size, self.num_memories, dtype=torch.long, device=device)
        kept = torch.promote_types(dtype, torch.float32)
        memories = torch.zeros(batch_size, *self._state_shapes[0], dtype=kept, device=device)
        tails = self._state_shapes[1]
        conv = None if tails is None else torch.zeros(batch_size, *tails, device=device, dtype=dtype)
        return MixtureOfMemoriesState(count, count.clone(), memories, conv, seen)

    def report_state(self, state: MixtureOfMemoriesState, trace: Trace) -> None:
        """Report how much every memory holds."""
        trace.signal("memory_norm", state.memories.flatten(2).norm(dim=-1))

    def mix(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        lengths: Tensor | None,
        trace: Trace | None,
        donate: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MixtureOfMemoriesState]:
        """Write and read the memories; see ``SequenceMixer.mix``."""
        own = cast(MixtureOfMemoriesState | None, state)
        before, after, document = counters(state, x, lengths, cu_seqlens)
        rows = len(before)
        if own is None:
            own = self.initial_state(rows, device=x.device, dtype=x.dtype)
        self._check_state(own)
        tails = own.conv
        convolved = x
        if self.conv is not None and self.conv_place == "input":
            tail = ShortConvState(cast(Tensor, tails)[:, 0])
            convolved, tail = self.conv(x, tail, lengths=lengths, cu_seqlens=cu_seqlens)
            tails = tail.tail[:, None]

        row_of = rows_of(x, rows, cu_seqlens)
        position = positions(x, before, cu_seqlens).flatten()
        tokens, real = convolved.flatten(0, 1), None
        if lengths is not None:  # only tokens that exist are routed
            slot = torch.arange(x.shape[1], device=x.device)
            real = (slot < lengths[:, None]).flatten().nonzero().squeeze(1)
            tokens, row_of, position = tokens[real], row_of[real], position[real]
        probabilities, weights, indices = self._route(tokens)
        buckets = Buckets.of(indices, row_of, self.num_memories, rows)
        o, memories, tails = self._recur(tokens, position, buckets, weights, own.memories, tails, donate)
        if real is not None:
            o = o.new_zeros(x.shape[0] * x.shape[1], *o.shape[1:]).index_copy(0, real, o)
        seen = buckets.seen.T + own.tokens_seen
        if trace is not None:
            self._report(trace, x, real, probabilities, indices, row_of, rows, buckets)
        y = self.output(o.unflatten(0, x.shape[:2]), x)
        return y, MixtureOfMemoriesState(after, document, memories, tails, seen)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Turn what was read for the tokens ``x``, (batch, time, value_heads, V), into (batch, time, dim)."""
        y = self.norm(o).flatten(2)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(x))
        projected: Tensor = self.out(y)
        return projected

    def load_fla_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load the weights of flash-linear-attention's ``MomAttention``, names and shapes as there.

        Raises:
            ValueError: Names or shapes are not those of a layer with these options.
        """
        self.load_state_dict(mixture_from_fla(self, state_dict))

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities (tokens, M) and the weights and memories (tokens, k) of every token."""
        with no_autocast(tokens.device):
            wide = wider(tokens)
            logits = F.linear(wide, self.router.weight.to(wide.dtype))
            probabilities = logits.softmax(-1)
            indices = logits.topk(self.top_k, dim=-1).indices  # where a router is sure, probabilities tie at zero
            weights = probabilities.gather(-1, indices)
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, weights, indices

    def _recur(
        self,
        tokens: Tensor,
        position: Tensor,
        buckets: Buckets,
        weights: Tensor,
        memories: Tensor,
        tails: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write and read every bucket; return the reads (tokens, value_heads, V), the memories and the tails."""
        rows, count = memories.shape[:2]
        q, kv, gates = self._project(tokens, buckets)
        lengths = buckets.counts
        if self.shared:  # one more memory, that takes every token
            lengths = [*lengths, buckets.row_counts]
        held = [(m, b) for m in range(count) for b in range(rows) if lengths[m][b]]
        if not held:  # nothing to read; parameters stay in the graph, as distributed training expects
            nothing = 0 * sum(parameter.sum() for parameter in self.parameters())
            return q.new_zeros(0, self.rule.num_value_heads, self.rule.value_dim) + nothing, memories, tails
        ends = torch.tensor([0, *(lengths[m][b] for m, b in held)]).cumsum(0)
        where = torch.tensor([b * count + m for m, b in held]).to(tokens.device, non_blocking=True)

        if self.conv is not None and self.conv_place == "bucket":
            flat = cast(Tensor, tails).flatten(0, 1)
            keys = self.widths[0]
            border = ends.to(tokens.device, non_blocking=True)
            part = flat.index_select(0, where)
            q, q_tail = self._convolve(q, part, slice(keys), border)
            kv, kv_tail = self._convolve(kv, part, slice(keys, None), border)
            tails = _replace(flat, where, torch.cat((q_tail, kv_tail), -1), donate).view_as(cast(Tensor, tails))
        elif self.conv is None and self.rule.uses_conv:
            q, kv = F.silu(q), F.silu(kv)
        rule = self.rule
        k, v = kv.split(self.widths[1:], dim=-1)
        q, k = (part.unflatten(-1, (rule.num_heads, rule.key_dim))[None] for part in (q, k))
        v = v.unflatten(-1, (rule.num_value_heads, rule.value_dim))[None]
        q, k = rule.prepare(q, k, self._copied(position, buckets)[None])
        flat = memories.flatten(0, 1)
        gates = None if gates is None else gates[None]
        o, new = rule(q, k, v, gates, flat.index_select(0, where), cu_seqlens=ends)
        memories = _replace(flat, where, new, donate).view_as(memories)
        o, copies = o[0], len(buckets.order)
        read = buckets.put(o[:copies].flatten(1))
        y = (weights.to(read.dtype)[:, None] @ read)[:, 0]
        if self.shared:
            y = y + o[copies:].flatten(1)
        return y.unflatten(-1, o.shape[1:]), memories, tails

    def _project(self, tokens: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries, [keys | values] and raw gates of every copy, those of the shared memory last."""
        q = self._copied(self.query(tokens), buckets)
        if self.tie_key_values:
            gates = None if self.gates is None else self._copied(self.gates[0](tokens), buckets)
            return q, self._copied(self.key_value[0](tokens), buckets), gates
        parts = [*buckets.take(tokens).split(buckets.sizes), *([tokens] if self.shared else [])]
        kv = torch.cat([project(part) for project, part in zip(self.key_value, parts, strict=True)])
        if self.gates is None:
            return q, kv, None
        return q, kv, torch.cat([gate(part) for gate, part in zip(self.gates, parts, strict=True)])

    def _copied(self, x: Tensor, buckets: Buckets) -> Tensor:
        """(tokens, ...) -> a row for every copy of a token, those of the shared memory last."""
        return torch.cat((buckets.take(x), x)) if self.shared else buckets.take(x)

    def _convolve(self, x: Tensor, tails: Tensor, channels: slice, ends: Tensor) -> tuple[Tensor, Tensor]:
        conv = cast(ShortConv, self.conv)
        y, state = conv(x[None], ShortConvState(tails[..., channels]), cu_seqlens=ends, channels=channels)
        return y[0], state.tail

    def _check_state(self, state: MixtureOfMemoriesState) -> None:
        """Require the state of a layer with these options."""
        expected = self._state_shapes
        tails = None if state.conv is None else tuple(state.conv.shape[1:])
        given = tuple(state.memories.shape[1:]), tails, state.tokens_seen.shape[1]
        if given != expected:
            raise ValueError(
                f"state holds memories {given[0]}, convolution tails {given[1]} and counts of {given[2]} memories, "
                f"this layer's are {expected[0]}, {expected[1]} and {expected[2]}; pass what its previous call "
                f"returned, or None to start afresh"
            )

    @property
    def _state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None, int]:
        """Shapes of one row's memories and tails, and the number of counts."""
        count, tails = self.num_memories + self.shared, None
        if self.conv is not None:
            channels, width = self.conv.weight.shape
            tails = (count if self.conv_place == "bucket" else 1, width - 1, channels)
        return (count, *self.rule.state_shape), tails, self.num_memories

    def _report(
        self,
        trace: Trace,
        x: Tensor,
        real: Tensor | None,
        probabilities: Tensor,
        indices: Tensor,
        row_of: Tensor,
        rows: int,
        buckets: Buckets,
    ) -> None:
        if self.balance is not None:
            report_balance(trace, self.balance, self.balance_weight, probabilities, indices, row_of, rows)
        if not trace.wants_signals:
            return
        load = buckets.seen.sum(1) / max(len(buckets.order), 1)
        trace.signal("load", load)
        if self.num_memories > 1:
            trace.signal("load_entropy", -torch.xlogy(load, load).sum() / math.log(self.num_memories))
        if real is not None:
            grid = probabilities.new_zeros(x.shape[0] * x.shape[1], self.num_memories)
            probabilities = grid.index_copy(0, real, probabilities)
        trace.signal("router_probabilities", probabilities.unflatten(0, x.shape[:2]))

    def extra_repr(self) -> str:
        """Memories and how they are chosen."""
        return (
            f"num_memories={self.num_memories}, top_k={self.top_k}, shared={self.shared}, rule={self.rule_name!r}, "
            f"renormalize={self.renormalize}, conv={self.conv_place!r}, balance={self.balance!r}"
        )


def _replace(old: Tensor, where: Tensor, new: Tensor, donate: bool) -> Tensor:
    """Return ``old`` with the rows ``where`` replaced; in its own storage if it may be reused."""
    may_write = torch.is_inference_mode_enabled() or not old.is_inference()
    if donate and may_write and not torch.is_grad_enabled() and old.dtype == new.dtype:
        return old.index_copy_(0, where, new)
    return old.to(torch.promote_types(old.dtype, new.dtype)).index_copy(0, where, new)


@register_layer("mixture_of_memories", "mixer", compiles=False, routed=True)
def _mixture_of_memories(dim: int, **overrides: Any) -> MixtureOfMemories:
    return MixtureOfMemories(dim, **{"num_memories": 3, "num_heads": 2} | overrides)
