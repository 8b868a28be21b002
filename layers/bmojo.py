"""B'MOJO: attention over a window, over what a state space remembers, and over the tokens it did not see coming.

Zancato et al., "B'MOJO: Hybrid State Space Realizations of Foundation Models with Eidetic and Fading Memory" (arXiv
2407.06324). Without stored tokens it is B'MOJO-F, which is exact, from the official code of 2026. The eidetic part is a
design that satisfies every published statement: the paper's own equations for it were not available.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.layers.bmojo_eidetic import POSITIONS, EideticMemory
from memzoo.layers.bmojo_fading import FadingTokens
from memzoo.layers.bmojo_heads import BMojoHeads
from memzoo.layers.bmojo_parts import Call, Pair, build_ssm, check_innovation, check_segments
from memzoo.layers.bmojo_retrieval import numbers
from memzoo.layers.bmojo_selection import Predictor
from memzoo.layers.bmojo_state import BMojoState, check_state, empty_state
from memzoo.layers.errors import check_choice, check_count, check_divisible, check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.ops.attention import SMALLEST_BLOCK
from memzoo.layers.ops.bmojo_attention import Band, Segment, joint_attention
from memzoo.layers.registry import register_layer
from memzoo.layers.state import MixerState
from memzoo.layers.stores import MemoryStore
from memzoo.layers.trace import Trace

TARGETS = ("fading", "input")


class BMojo(BMojoHeads):
    """One softmax over stored tokens, fading tokens and a window.

    With u the input, f = SSM(u) and b = i // window, query i sees

        eidetic   k_s, v_s of the tokens s in E_b, s <= i - window
        fading    k'_j, v'_j, projections of f_j, with j <= i - lag, i - lag - j < span, and stride a divisor of j + 1
        window    k_j, v_j of the last ``window`` tokens, its own among them

    E_b holds at most ``num_eidetic`` of the tokens s < b window: those that were hardest to predict. It changes where a
    chunk of ``window`` tokens ends. Nothing is differentiated through the choice; keys and values of what was chosen
    are.

    Args:
        dim: Width of the residual stream.
        num_heads: Query heads; ``dim // head_dim`` by default.
        head_dim: Width of a head; ``dim // num_heads`` if that is given, else 64.
        num_kv_heads: Heads of keys and values; ``num_heads`` by default.
        window: Keys of the window, and tokens of a chunk.
        num_eidetic: Tokens in store; 0 for B'MOJO-F.
        ssm: ``"mamba2"``, ``"mamba"``, ``"gated_deltanet"``, or a mixer of width ``dim``. Without fading keys the layer
            has none, unless ``ssm_output``.
        ssm_options: Keyword options of the named SSM.
        fading_lag: Tokens by which the latest fading key lies behind the query; ``window`` by default.
        fading_span: Reach of the fading keys behind that; ``window`` by default, 0 for none.
        fading_stride: Every how many tokens a fading key is kept.
        tie_projections: Read fading tokens through the projections of the window.
        qk_norm: RMS-normalise queries and keys.
        rotary_base: Base of the rotary position embedding; None for attention without positions.
        bias: Add learned biases to queries, keys, values and outputs.
        target: What is predicted: the fading tokens or the input.
        predictor: ``"ema"`` of the last targets, the ``"previous"`` one, a learned ``"conv"`` over them, channel by
            channel, or a function of (batch, time, taps, dim), the latest first, that returns (batch, time, dim).
        predictor_taps: Targets that the predictor sees.
        predictor_rate: What a target weighs in the average, relative to the one after it.
        score: Distance of target and prediction over the sum of their norms (``"norm"``), the distance (``"l2"``),
            one minus their ``"cosine"``; or ``"residual"``, what the SSM's own delta rule corrects, beta |v - k S|
            over all heads: nothing is predicted then, and neither ``target`` nor the predictor's options are read.
        warmup_score: Score of the first ``predictor_taps`` tokens, whose predictor sees zeros; None for no rule.
        selection: The ``"top_k"`` scores, of equal ones the earlier; of these, those above a ``"threshold"``; the
            latest tokens (``"fifo"``); or a ``"random"`` choice by position.
        threshold: For that selection.
        eidetic_positions: Stored keys stand at their ``"true"`` positions; at those, but no farther than 2 ``window``
            from a query (``"clamp"``); or where the query stands (``"none"``).
        in_context: Whether there is a window.
        segment_bias: Learn a bias a head for the logits of each segment, at first zero.
        eidetic_dropout: Probability that a row's stored tokens are out of sight, drawn for each call of training.
        eidetic_norm: Normalise the queries of stored tokens by a gain of their own: a sharper or flatter read.
        ssm_output: Add what the SSM gives to what the layer does, with or without fading keys.
        store: Where tokens go when their chunk ends, all of them or those above the threshold; a chunk then sees the
            ``num_eidetic`` that the queries of the chunk before it score highest, on average. Scores then decide what a
            threshold admits and what a ``TopKStore`` keeps. What a store gives carries no gradient. It grows with every
            fresh row until ``forget``. None for the state, in which those of the largest scores are kept.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``BMojoState``.

    Raises:
        ValueError: An option is out of range, or options exclude each other.

    Reference:
        arXiv 2407.06324. B'MOJO-F: awslabs/hybrid-model-factory, ``bmojo_f``. Loop: ``memzoo.layers.reference.bmojo``.

    Note:
        With ``num_eidetic=0`` and the other defaults every equation is that of the official code (there ``bias`` is on
        for queries, keys and values). The eidetic part is a design that satisfies every published statement. Its
        defaults are a choice.

        ``predictor="conv"`` learns by a loss of its own, ``trace.losses["predictor"]``. Signals: ``score`` (batch,
        time) and ``eidetic_turnover`` (rows,), the share of stored tokens that came with the call; ``eidetic_age``
        (batch,), their mean distance from the end; those of the SSM as ``ssm.decay`` and so on.

    Example:
        >>> import torch
        >>> from memzoo.layers import BMojo
        >>> mixer = BMojo(64, num_heads=4, window=8, num_eidetic=4, ssm_options={"head_dim": 16})
        >>> y, state = mixer(torch.randn(2, 20, 64))
        >>> y.shape, state.eidetic_count
        (torch.Size([2, 20, 64]), tensor([4, 4]))
    """

    state_class = BMojoState

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        window: int = 512,
        num_eidetic: int = 0,
        ssm: str | SequenceMixer = "mamba2",
        ssm_options: Mapping[str, Any] | None = None,
        fading_lag: int | None = None,
        fading_span: int | None = None,
        fading_stride: int = 1,
        tie_projections: bool = True,
        qk_norm: bool = True,
        rotary_base: float | None = 10000.0,
        bias: bool = False,
        target: str = "fading",
        predictor: str | Predictor = "ema",
        predictor_taps: int = 4,
        predictor_rate: float = 0.5,
        score: str = "norm",
        warmup_score: float | None = None,
        selection: str = "top_k",
        threshold: float | None = None,
        eidetic_positions: str = "true",
        in_context: bool = True,
        segment_bias: bool = False,
        eidetic_dropout: float = 0.0,
        eidetic_norm: bool = False,
        ssm_output: bool = False,
        store: MemoryStore | None = None,
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divisible("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        check_choice("qk_norm", qk_norm, (False, True))
        check_positive("window", window, "it counts the token itself, and is the size of a chunk")
        check_count("num_eidetic", num_eidetic, "use 0 for none")
        self.fading = FadingTokens(
            window if fading_lag is None else fading_lag,
            window if fading_span is None else fading_span,
            fading_stride,
        )
        fades = self.fading.span > 0
        check_choice("target", target, TARGETS)
        check_segments(
            eidetic=num_eidetic > 0,
            fading=fades,
            window=in_context,
            scored=fades or ssm_output or target == "input" or score == "residual",
            segment_bias=segment_bias,
            tie_projections=tie_projections,
            eidetic_norm=eidetic_norm,
        )
        self.window, self.num_eidetic = window, num_eidetic
        self.in_context, self.target = in_context, target
        check_positive("predictor_taps", predictor_taps)
        self.eidetic = EideticMemory(
            size=num_eidetic,
            chunk=window,
            predictor=predictor,
            taps=1 if predictor == "previous" else predictor_taps,
            rate=predictor_rate,
            score=score,
            warmup_score=warmup_score,
            selection=selection,
            threshold=threshold,
            positions="true" if rotary_base is None and eidetic_positions in POSITIONS else eidetic_positions,
            dropout=eidetic_dropout,
        )
        self.store = store
        self.ssm = build_ssm(dim, ssm, ssm_options) if fades or ssm_output else None
        self.adds_ssm = ssm_output
        self.by_residual = num_eidetic > 0 and score == "residual"
        if self.by_residual:
            check_innovation(self.ssm)
        self._build_heads(
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm=qk_norm,
            eidetic_norm=eidetic_norm,
            tie_projections=tie_projections,
            rotary_base=rotary_base,
            bias=bias,
            segment_bias=segment_bias,
        )
        learned = num_eidetic > 0 and predictor == "conv"
        self.predictor_weight = nn.Parameter(torch.empty(self.eidetic.taps, dim)) if learned else None
        self.no_weight_decay = ("segment_bias",) if segment_bias else ()
        self.reset_parameters()

    @property
    def store(self) -> MemoryStore | None:
        """Where tokens are stored; None for in the state. A state goes on with the store that it began with alone."""
        return self._store

    @store.setter
    def store(self, store: MemoryStore | None) -> None:
        if store is not None and not self.num_eidetic:
            raise ValueError("store is given, but num_eidetic=0 fetches nothing from it; use num_eidetic >= 1")
        if store is not None and self.eidetic.selection not in ("top_k", "threshold"):
            raise ValueError(
                f"selection={self.eidetic.selection!r} is not what a store goes by; use 'threshold' to store some "
                f"tokens only, or 'top_k' to store all"
            )
        self._store = store

    def forget(self, state: BMojoState) -> None:
        """Drop what a state's rows have in the store, when no other state goes on with it.

        Documents that ended within a call have no row any more: what they left goes when the store does.

        Raises:
            ValueError: The layer has no store, or the state is another store's.
        """
        if self.store is None or state.eidetic_sequence is None:
            raise ValueError("there is no store to forget in; set the layer's store, and pass a state that it made")
        self.store.drop({number for number in numbers(self.store, state.eidetic_sequence) if number})

    def reset_parameters(self) -> None:
        """Start the biases at zero and the learned predictor at the plain average; the projections draw themselves."""
        if self.segment_bias is not None:
            nn.init.zeros_(self.segment_bias)
        if self.predictor_weight is not None:
            nn.init.constant_(self.predictor_weight, 1 / self.eidetic.taps)

    def residual_outputs(self) -> list[nn.Linear]:
        """Return the projections that write to the residual stream: this layer's, and the SSM's where it is added."""
        if self.ssm is None or not self.adds_ssm:
            return [self.out]
        declared = getattr(self.ssm, "residual_outputs", None)
        own = [getattr(self.ssm, "out", None)] if declared is None else declared()
        return [self.out, *(output for output in own if isinstance(output, nn.Linear))]

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of a row of every tensor of the state but those of the SSM; None for what is left out."""
        k, heads = self.num_eidetic, (self.num_kv_heads, self.head_dim)
        window = (self.window, *heads) if self.in_context or k else None
        fading = (self.fading.slots, *heads) if self.fading.span else None
        store, number = ((k, *heads), (k,)) if k else (None, None)
        return {
            "window_keys": window,
            "window_values": window,
            "fading_keys": fading,
            "fading_values": fading,
            "eidetic_keys": store,
            "eidetic_values": store,
            "eidetic_scores": number,
            "eidetic_positions": number,
            "eidetic_count": () if k else None,
            "pending_scores": (self.window,) if k else None,
            "targets": (self.eidetic.taps, self.dim) if k and not self.by_residual else None,
            "eidetic_sequence": () if k and self.store is not None else None,
            "eidetic_queries": heads if k and self.store is not None else None,
        }

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BMojoState:
        """Return the state of ``batch_size`` fresh rows: empty rings, an empty store, and that of the SSM."""
        like = self.out.weight
        return empty_state(self.state_shapes(), self.ssm, batch_size, device or like.device, dtype or like.dtype)

    def report_state(self, state: BMojoState, trace: Trace) -> None:
        """Report how long ago the stored tokens were read, on average."""
        age = state.age()
        if age is not None:
            trace.signal("eidetic_age", age)

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, BMojoState]:
        """Remember, select and attend; see ``SequenceMixer.mix``."""
        own = cast(BMojoState | None, state)
        if own is not None:
            check_state(own, self.state_shapes(), self.ssm)
        call = Call.of(x, own, lengths, block=self._block(x.shape[1]), donate=donate)
        x = call.blank(x)
        fading, innovation, ssm = self._run_ssm(x, own, call, trace)
        queries = self._queries(x, call)
        segments: list[Segment | Band] = []
        fields: dict[str, Tensor | None] = dict.fromkeys(self.state_shapes())
        if self.in_context or self.num_eidetic:
            pair = self._keys_and_values(x, call.positions, fading=False)
            rings = (None, None) if own is None else (own.window_keys, own.window_values)
            turned = call.turn(rings, pair, self.window)
            past = call.reach(self.window) - 1
            streams = turned if call.is_step else call.line_up(rings, pair, past)
            fields |= {"window_keys": turned[0], "window_values": turned[1]}
            if self.num_eidetic:
                scores = innovation
                if scores is None:
                    target = x if fading is None or self.target == "input" else fading
                    scores, fields["targets"] = self.eidetic.scores(target, own, call, self.predictor_weight, trace)
                stored, more = self._eidetic_segments(scores, streams, past, queries, own, call, trace)
                segments += stored
                fields |= more
            if self.in_context:
                segments.append(self._window_segment(streams, past, call))
        if fading is not None and self.fading.span:
            segment, turned = self.fading.segment(
                fading,
                (None, None) if own is None else (own.fading_keys, own.fading_values),
                call,
                project=lambda tokens, positions: self._keys_and_values(tokens, positions, fading=True),
                query="own" if self.tie_projections else "fading",
                bias=self._bias("fading"),
            )
            segments.append(segment)
            fields |= {"fading_keys": turned[0], "fading_values": turned[1]}
        y = joint_attention(
            queries,
            segments,
            block=call.block,
            scale=self.head_dim**-0.5,
            sees_one=self.in_context and not (call.is_step and lengths is not None),
        )
        y = self.out(y.flatten(2))
        if fading is not None and self.adds_ssm:
            y = y + fading
        return y, BMojoState(call.after, call.document, ssm, **fields)

    def _eidetic_segments(
        self,
        scores: Tensor,
        streams: Pair,
        past: int,
        queries: dict[str, Tensor],
        state: BMojoState | None,
        call: Call,
        trace: Trace | None,
    ) -> tuple[list[Segment], dict[str, Tensor]]:
        """Return what is seen of the stored tokens, and their fields of the new state."""
        if trace is not None:
            trace.signal("score", scores)
        name, retrieval = "own" if self.eidetic_norm is None else "eidetic", None
        if self.store is not None:
            asking = queries[name if self.eidetic.positions == "true" else "unrotated"]
            retrieval = self.eidetic.retrieval(self.store, asking, self._turned)
        kept, stored, fields = self.eidetic.choose(scores, streams, past, state, call, retrieval=retrieval, trace=trace)
        bias = self._bias("eidetic")
        segments = self.eidetic.segments(
            kept, stored, call, turn=self._turned, query=name, bias=bias, training=self.training
        )
        return segments, fields

    def _run_ssm(
        self, x: Tensor, state: BMojoState | None, call: Call, trace: Trace | None
    ) -> tuple[Tensor | None, Tensor | None, MixerState | None]:
        """Return the fading tokens, the innovation of every token where it is the score, and the state of the SSM."""
        if self.ssm is None:
            return None, None, None
        before, scope = None if state is None else state.ssm, None if trace is None else trace.scope("ssm")
        wanted = {"return_innovation": True} if self.by_residual else {}
        fading, ssm = self.ssm.mix(x, before, lengths=call.lengths, trace=scope, donate=call.donate, **wanted)
        innovation = None
        if wanted:
            fading, innovation = fading
        return call.blank(fading), innovation, ssm

    def _block(self, time: int) -> int:
        """Queries that are read together: a chunk, so that they see one store; any number of them without a store."""
        return min(time, self.window if self.num_eidetic else max(self.window, SMALLEST_BLOCK))

    def _window_segment(self, streams: Pair, past: int, call: Call) -> Segment | Band:
        """The last ``window`` tokens: of the ring for a step, else of the stream."""
        if call.is_step:
            keys, values = (ring[:, None] for ring in streams)
            visible = (call.in_ring(self.window, call.after) >= 0)[:, None, None]
            return Segment(keys, values, visible, "own", self._bias("window"))
        return Band(*streams, past + 1, past, None if call.is_fresh else call.before, "own", self._bias("window"))


@register_layer("bmojo", "mixer")
def _bmojo(dim: int, **overrides: Any) -> BMojo:
    ssm_options = {"num_heads": 2, "head_dim": 8, "state_dim": 6, "chunk_size": 4}
    small: dict[str, Any] = dict(num_heads=4, num_kv_heads=2, window=5, num_eidetic=3, ssm_options=ssm_options)
    return BMojo(dim, **small | overrides)
