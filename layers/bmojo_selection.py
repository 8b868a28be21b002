"""Which tokens B'MOJO stores: how badly each was predicted, and who stays when the store is full.

Everything here is detached, but for a learned predictor's own loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PREDICTORS = ("ema", "previous", "conv")
SCORES = ("norm", "l2", "cosine", "residual")
SELECTIONS = ("top_k", "threshold", "fifo", "random")

Predictor = Callable[[Tensor], Tensor]


def predict(history: Tensor, weights: Tensor) -> Tensor:
    """Predict every target by those before it: ``yhat_t = sum_m a_m y_{t - m}``, m = 1 .. taps.

    Args:
        history: Targets, led by those of the ``taps`` tokens before the first.
        weights: a_m, the latest target's first; one a tap, or one a tap and channel.

    Shape:
        history: (batch, taps + time, dim). weights: (taps,) or (taps, dim). Returns (batch, time, dim).
    """
    taps = len(weights)
    time = history.shape[1] - taps
    guess: Tensor = weights[0] * history[:, taps - 1 : taps - 1 + time]
    for m in range(1, taps):
        guess = torch.addcmul(guess, weights[m], history[:, taps - 1 - m : taps - 1 - m + time])
    return guess


def predict_by(predictor: Predictor, history: Tensor, taps: int) -> Tensor:
    """``predict`` by a function of the targets before each token, (batch, time, taps, dim), the latest first."""
    past = history[:, :-1].unfold(1, taps, 1).flip(-1).movedim(-1, 2)
    guess = predictor(past)
    if guess.shape != past[:, :, 0].shape:
        raise ValueError(
            f"predictor returned shape {tuple(guess.shape)}; it must return (batch, time, dim) = "
            f"{tuple(past[:, :, 0].shape)}"
        )
    return guess


def innovation(target: Tensor, guess: Tensor, score: str) -> Tensor:
    """How far a target lies from its prediction: (batch, time, dim) each -> (batch, time)."""
    if score == "cosine":
        cosine: Tensor = (_unit(target) * _unit(guess)).sum(-1)
        return 1 - cosine
    distance = _norm(target - guess)
    return distance if score == "l2" else distance / _above_zero(_norm(target) + _norm(guess))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _unit(x: Tensor) -> Tensor:
    return x / _above_zero(_norm(x))[..., None]


def _above_zero(norm: Tensor) -> Tensor:
    """Keep a quotient by norms finite, and not by adding to them: f is small where training begins."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def prediction_loss(target: Tensor, guess: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean squared error over the tokens that exist, of (batch, time, dim) each."""
    error: Tensor = (target - guess).square().mean(-1)
    if lengths is None:
        return error.mean()
    real = torch.arange(error.shape[1], device=error.device) < lengths[:, None]
    return error.masked_fill(~real, 0).sum() / real.sum().clamp_min(1)


def targets_before(state: Tensor | None, target: Tensor, taps: int) -> Tensor:
    """Lead the targets (batch, time, dim) with the ``taps`` before them; zeros where there are none."""
    if state is None:
        return F.pad(target, (0, 0, taps, 0))
    return torch.cat((state.to(target.dtype), target), 1)


def last_targets(history: Tensor, taps: int, lengths: Tensor | None) -> Tensor:
    """The last ``taps`` targets that exist, of what ``targets_before`` gave; a copy."""
    if lengths is None:
        return history[:, -taps:].clone()
    index = lengths[:, None] + torch.arange(taps, device=history.device)
    return history.take_along_dim(index[..., None], dim=1)


@dataclass(frozen=True)
class Kept:
    """The tokens in store, in the order of their positions; empty slots are at the end, and zero.

    Attributes:
        slots: (..., k) slot of the store before the call that holds the token; -1 if the call brought it.
        positions: (..., k) its place in the sequence.
        scores: (..., k) how badly it was predicted.
        exists: (..., k) bool.
    """

    slots: Tensor
    positions: Tensor
    scores: Tensor
    exists: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Kept":
        """Apply a function to every tensor."""
        return Kept(*(function(tensor) for tensor in (self.slots, self.positions, self.scores, self.exists)))

    @staticmethod
    def nothing(scores: Tensor, size: int) -> "Kept":
        """Return ``size`` empty slots for every row of scores (batch, ...)."""
        zeros = torch.zeros(len(scores), size, dtype=torch.long, device=scores.device)
        return Kept(zeros - 1, zeros, scores.new_zeros(zeros.shape), zeros.bool())

    @staticmethod
    def stack(stores: "list[Kept]") -> "Kept":
        """Put stores side by side: (batch, k) each -> (batch, stores, k)."""
        fields: Any = (
            [getattr(store, name) for store in stores] for name in ("slots", "positions", "scores", "exists")
        )
        return Kept(*(torch.stack(tensors, 1) for tensors in fields))


@dataclass(frozen=True)
class Chunks:
    """The tokens of a call by the chunks that they lie in, and in the first of these the tokens before the call.

    Attributes:
        first: (batch,) number of the first chunk.
        scores: (batch, chunks + 1, chunk) of the tokens. What is not read yet is anything.
        positions: (batch, chunks + 1, chunk) of the tokens.
        ended: (batch, chunks) whether a chunk ends in this call.
        pending: (batch, chunk) scores of the tokens of the chunk that has not ended then; zero behind them.
    """

    first: Tensor
    scores: Tensor
    positions: Tensor
    ended: Tensor
    pending: Tensor

    @staticmethod
    def of(scores: Tensor, pending: Tensor | None, before: Tensor, after: Tensor, chunk: int) -> "Chunks":
        """Lay out the scores of a call.

        Args:
            scores: Of the tokens of the call.
            pending: Of the tokens of the first chunk that came before the call, from its slot 0. None for fresh rows.
            before: Tokens before the call.
            after: Tokens after the call.
            chunk: Tokens of a chunk.

        Shape:
            scores: (batch, time). pending: (batch, chunk). before, after: (batch,).
        """
        batch, time = scores.shape
        # Shapes depend on shapes alone, so these are the chunks that may end.
        count = time // chunk if pending is None else (time + chunk - 1) // chunk
        first, phase = before // chunk, before % chunk
        places = torch.arange((count + 1) * chunk, device=scores.device)
        token = places - phase[:, None]  # of the call, in every place of its chunks
        held = torch.cat((scores.new_zeros(batch, chunk) if pending is None else pending.to(scores), scores), 1)
        index = torch.where(token < 0, places, token.clamp(0, time - 1) + chunk).clamp_max(held.shape[1] - 1)
        grid = held.gather(1, index).unflatten(1, (count + 1, chunk))
        positions = ((first * chunk)[:, None] + places).view_as(grid)
        rest = grid[torch.arange(batch, device=scores.device), after // chunk - first]
        outside = torch.arange(chunk, device=scores.device) >= (after % chunk)[:, None]
        ended = positions[:, :-1, -1] < after[:, None]
        return Chunks(first, grid, positions, ended, rest.masked_fill(outside, 0))


@dataclass(frozen=True)
class Law:
    """Who is stored: at most ``size`` of the tokens of the chunks that have ended.

    Attributes:
        selection: "top_k" and "threshold" keep the highest scores, "fifo" the latest tokens, "random" a choice that
            positions alone decide. Of equal ones the earliest stay.
        size: Slots.
        threshold: Scores up to it are not stored; for "threshold".
    """

    selection: str
    size: int
    threshold: float | None = None

    def run(self, chunks: Chunks, kept: Kept) -> Kept:
        """Select, at the end of every chunk that ends in this call.

        Args:
            chunks: The tokens.
            kept: What is in store before them.

        Shape:
            Returns what is in store while the tokens of a chunk are read, (batch, chunks + 1, size), the last entry
            being the store after the call.
        """
        stores = [kept]
        for number in range(chunks.ended.shape[1]):
            kept = self._update(
                kept, chunks.scores[:, number], chunks.positions[:, number], chunks.ended[:, number, None]
            )
            stores.append(kept)
        return Kept.stack(stores)

    def _update(self, kept: Kept, scores: Tensor, positions: Tensor, ended: Tensor) -> Kept:
        """Let the tokens of a chunk compete with those in store."""
        candidates = Kept(
            torch.cat((kept.slots, torch.full_like(positions, -1)), 1),
            torch.cat((kept.positions, positions), 1),
            torch.cat((kept.scores, scores), 1),
            torch.cat((kept.exists, self._admits(scores) & ended), 1),
        )
        priority = self._priority(candidates)
        lowest = -torch.inf if priority.is_floating_point() else torch.iinfo(priority.dtype).min
        priority = priority.masked_fill(~candidates.exists, lowest)
        # Candidates are in the order of positions, so a stable sort gives ties to the earlier.
        best = priority.sort(dim=1, descending=True, stable=True).indices[:, : self.size]
        width = priority.shape[1]
        best = best.masked_fill(~candidates.exists.gather(1, best), width).sort(dim=1).values
        exists = best < width
        found = candidates.map(lambda tensor: tensor.gather(1, best.clamp_max(width - 1)))
        return Kept(
            found.slots.masked_fill(~exists, -1),
            found.positions.masked_fill(~exists, 0),
            found.scores.masked_fill(~exists, 0),
            exists,
        )

    def _admits(self, scores: Tensor) -> Tensor:
        if self.threshold is None:
            return torch.ones_like(scores, dtype=torch.bool)
        return scores > self.threshold

    def _priority(self, candidates: Kept) -> Tensor:
        if self.selection == "fifo":
            return candidates.positions
        if self.selection == "random":
            return -hashed(candidates.positions)
        return candidates.scores


def hashed(positions: Tensor) -> Tensor:
    """Numbers below 2**32 that look random, and are the same for every cut into calls: lowbias32 of position + 1."""
    x: Tensor = positions + 1
    for factor, shift in ((0x7FEB352D, 16), (0x846CA68B, 15), (1, 16)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x
