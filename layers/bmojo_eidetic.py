"""The tokens that B'MOJO stores: chosen where a chunk ends, read by the chunks after it.

A design that satisfies every published statement on the eidetic memory of arXiv 2407.06324.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memzoo.layers.bmojo_parts import Call, Pair, Turn
from memzoo.layers.bmojo_retrieval import Fields, Retrieval
from memzoo.layers.bmojo_selection import (
    PREDICTORS,
    SCORES,
    SELECTIONS,
    Chunks,
    Kept,
    Law,
    Predictor,
    innovation,
    last_targets,
    predict,
    predict_by,
    prediction_loss,
    targets_before,
)
from memzoo.layers.bmojo_state import BMojoState
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ops.attention_cache import take
from memzoo.layers.ops.bmojo_attention import Segment
from memzoo.layers.stores import MemoryStore
from memzoo.layers.trace import Trace

POSITIONS = ("true", "clamp", "none")


@dataclass(frozen=True)
class EideticMemory:
    """The options of the store, and what is done with them; the layer holds the parameters.

    Attributes:
        size: Slots.
        chunk: Tokens of a chunk, those of the window.
        predictor: As ``predictor`` of ``BMojo``, and so the rest.
        taps: Targets that the predictor sees.
        rate: What a target weighs of the one after it, in the average.
        score: Kind of distance between target and prediction.
        warmup_score: Score of the first ``taps`` tokens, or None.
        selection: Who is stored.
        threshold: For the selection of that name.
        positions: Where stored keys stand.
        dropout: Probability that a row's store is out of sight, in training.

    Raises:
        ValueError: An option is out of range, or a threshold comes without its selection, or that without a threshold.
    """

    size: int
    chunk: int
    predictor: str | Predictor
    taps: int
    rate: float
    score: str
    warmup_score: float | None
    selection: str
    threshold: float | None
    positions: str
    dropout: float

    def __post_init__(self) -> None:
        if not callable(self.predictor):
            check_choice("predictor", self.predictor, PREDICTORS)
        check_positive("predictor_taps", self.taps)
        _check_share("predictor_rate", self.rate)
        check_choice("score", self.score, SCORES)
        check_choice("selection", self.selection, SELECTIONS)
        check_choice("eidetic_positions", self.positions, POSITIONS)
        _check_share("eidetic_dropout", self.dropout)
        for name, value in (("warmup_score", self.warmup_score), ("threshold", self.threshold)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} is not a finite number; use one, or None for no rule")
        if self.score == "residual" and (self.predictor != "ema" or self.warmup_score is not None):
            raise ValueError(
                f"score='residual' needs no predictor, but predictor={self.predictor!r} and "
                f"warmup_score={self.warmup_score!r} are given; leave them out, or use another score"
            )
        if self.predictor == "conv" and self.selection in ("fifo", "random"):
            raise ValueError(
                f"predictor='conv' learns scores that selection={self.selection!r} does not read; use another predictor"
            )
        parameters = self.predictor.parameters() if isinstance(self.predictor, nn.Module) else ()
        if any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                f"predictor={type(self.predictor).__name__} has parameters that nothing would train; freeze them with "
                f"requires_grad_(False), or use predictor='conv'"
            )
        if (self.threshold is None) == (self.selection == "threshold"):
            raise ValueError(
                f"threshold={self.threshold!r} with selection={self.selection!r}; one needs the other: pass a number "
                f"with selection='threshold', None with any other"
            )

    def retrieval(self, store: MemoryStore, queries: Tensor, turn: Turn) -> Retrieval:
        """Return what writes to a store and fetches from it for (batch, time, heads, head_dim) queries."""
        turned = None if self.positions == "true" else turn
        return Retrieval(store, self.size, self.chunk, self.threshold, queries.detach(), turned)

    def choose(
        self,
        scores: Tensor,
        streams: Pair,
        past: int,
        state: BMojoState | None,
        call: Call,
        *,
        retrieval: Retrieval | None,
        trace: Trace | None,
    ) -> tuple[Kept, Pair, Fields]:
        """Choose at the end of every chunk.

        Args:
            scores: (batch, time) of the tokens.
            streams: Keys and values: of a step the rings after it, else those of the call, in order.
            past: How many entries of the streams came before the call.
            state: Before the call.
            call: Its layout.
            retrieval: From where to fetch; None to choose by the law of this memory.
            trace: Where to report.

        Returns:
            What was in store for every chunk of the call and after it; its keys and values (batch, chunks, size, heads,
            d); the fields of the new state.
        """
        pending = None if state is None else state.pending_scores
        chunks = Chunks.of(scores, pending, call.before, call.after, self.chunk)
        before = self._held(state, chunks.scores)
        if retrieval is None:
            kept, (keys, values) = self._keep(chunks, before, streams, past, state, call)
            fields: Fields = {}
        else:
            # Host work, row by row: nothing that a graph could hold.
            run: Callable[..., tuple[Kept, Pair, Fields]] = torch.compiler.disable(retrieval.run)
            kept, (keys, values), fields = run(chunks, before, streams, past, state, call)
        last = kept.map(lambda tensor: tensor[:, -1].clone())
        count = last.exists.sum(1)
        if trace is not None and trace.wants_signals:
            came = last.exists & (last.positions >= call.before[:, None])
            trace.signal("eidetic_turnover", came.sum(1) / count.clamp_min(1))
        fields |= {
            "eidetic_keys": keys[:, -1].clone(),
            "eidetic_values": values[:, -1].clone(),
            "eidetic_scores": last.scores,
            "eidetic_positions": last.positions,
            "eidetic_count": count,
            "pending_scores": chunks.pending,
        }
        return kept, (keys, values), fields

    def _keep(
        self, chunks: Chunks, kept: Kept, streams: Pair, past: int, state: BMojoState | None, call: Call
    ) -> tuple[Kept, Pair]:
        """Choose by the law, and gather what was chosen."""
        with torch.no_grad():
            kept = Law(self.selection, self.size, self.threshold).run(chunks, kept)
        # What is not in an old slot came with one of the last chunks: in a step it is in the ring, which is in order.
        place = kept.positions % self.chunk
        if not call.is_step:
            place = kept.positions - call.before[:, None, None] + past
        held = (None, None) if state is None else (state.eidetic_keys, state.eidetic_values)
        keys, values = (_pick(x, stream, kept, place) for x, stream in zip(held, streams, strict=True))
        return kept, (keys, values)

    def segments(
        self, kept: Kept, stored: Pair, call: Call, *, turn: Turn, query: str, bias: Tensor | None, training: bool
    ) -> list[Segment]:
        """Return what every block of queries sees of the store: a segment for every way in which keys are turned.

        Args:
            kept: As ``choose`` returns it, and so ``stored``.
            stored: Keys and values.
            call: The layout.
            turn: Rotates keys (..., heads, d) by positions (...); the same keys where there are none.
            query: Name of the queries that are rotated; "unrotated" is that of the others.
            bias: Of the segment.
            training: Whether the store may drop out.
        """

        straddles = not (call.is_fresh or call.is_step)  # a block that begins inside a chunk meets the stores of two

        def seen(x: Tensor) -> Tensor:
            here = x[:, : call.blocks]
            return torch.cat((here, x[:, 1 : call.blocks + 1]), 2) if straddles else here

        exists, positions = seen(kept.exists), seen(kept.positions)
        keys, values = map(seen, stored)
        queries, places = call.queries[..., None], positions[:, :, None]
        visible = exists[:, :, None] & (places <= queries - self.chunk)
        if straddles:
            number = call.before[:, None] // self.chunk + torch.arange(call.blocks, device=keys.device)
            chunk = torch.stack((number, number + 1), -1).repeat_interleave(self.size, -1)
            visible = visible & (queries // self.chunk == chunk[:, :, None])
        if training and self.dropout:
            visible = visible & (torch.rand(len(keys), 1, 1, 1, device=keys.device) >= self.dropout)
        if self.positions == "true":
            return [Segment(keys, values, visible, query, bias)]
        if self.positions == "none":
            return [Segment(turn(keys, -positions), values, visible, "unrotated", bias)]
        # Farther than twice the window, a query that is not turned meets keys that are turned to that distance from it.
        farthest = 2 * self.chunk
        near = queries - places <= farthest
        far = turn(keys, -positions - farthest)
        return [
            Segment(keys, values, visible & near, query, bias),
            Segment(far, values, visible & ~near, "unrotated", bias),
        ]

    def _held(self, state: BMojoState | None, scores: Tensor) -> Kept:
        """What is in store before the call."""
        if state is None:
            return Kept.nothing(scores, self.size)
        slots = torch.arange(self.size, device=scores.device)
        exists = slots < cast(Tensor, state.eidetic_count)[:, None]
        held = cast(Tensor, state.eidetic_scores).to(scores.dtype)
        return Kept(torch.where(exists, slots, -1), cast(Tensor, state.eidetic_positions), held, exists)

    def scores(
        self, target: Tensor, state: BMojoState | None, call: Call, weight: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, Tensor]:
        """Return how badly every token was predicted (batch, time), in at least float32, and the last targets.

        Args:
            target: What is predicted.
            state: Before the call.
            call: Its layout.
            weight: Of the learned predictor, (taps, dim).
            trace: Where to report.
        """
        target = target.detach().to(torch.promote_types(target.dtype, torch.float32))
        history = targets_before(None if state is None else state.targets, target, self.taps)
        learns = weight is not None and trace is not None
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            guess = self._predict(history, weight)
        if learns and trace is not None:
            trace.loss("predictor", prediction_loss(target, guess, call.lengths))
        with torch.no_grad():
            scores = innovation(target, guess, self.score)
            if self.warmup_score is not None:
                scores = scores.masked_fill(call.positions < self.taps, self.warmup_score)
        return scores, last_targets(history, self.taps, call.lengths)

    def _predict(self, history: Tensor, weight: Tensor | None) -> Tensor:
        if callable(self.predictor):
            return predict_by(self.predictor, history, self.taps)
        if weight is not None:
            return predict(history, weight.to(history.dtype))
        average = self.rate ** torch.arange(self.taps, dtype=history.dtype, device=history.device)
        return predict(history, average / average.sum())


def _pick(held: Tensor | None, stream: Tensor, kept: Kept, place: Tensor) -> Tensor:
    """Gather the keys or values of all stores, from old slots or from ``place`` in the stream; zeros in empty slots.

    Shape:
        held: (batch, size, heads, d). stream: (batch, time, heads, d). kept, place: (batch, chunks, size).
        Returns (batch, chunks, size, heads, d).
    """
    shape = place.shape[1:]
    found: Tensor = take(stream, place.clamp(0, stream.shape[1] - 1).flatten(1)).unflatten(1, shape)
    if held is not None:
        old = take(held, kept.slots.clamp_min(0).flatten(1)).unflatten(1, shape)
        found = torch.where((kept.slots >= 0)[..., None, None], old.to(found.dtype), found)
    return found.masked_fill(~kept.exists[..., None, None], 0)


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not in [0, 1]; use a share")
