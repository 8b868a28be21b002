"""Decay inside a chunk: the ways in which what is kept of a memory enters the products of queries and keys.

With a_t the log decay of a step and b_i = a_1 + ... + a_i, a matrix memory in chunk form needs, for the rows x_i (they
read after i steps) and y_j (they were written at step j),

    scores(x, y)_ij = sum_c x_ic y_jc exp(b_ic - b_jc)   for j <= i, 0 above
    from_start(x)_i = x_i exp(b_i)                        what a row sees of the memory that the chunk began with
    to_end(y)_j     = y_j exp(b_C - b_j)                  what is left of a write when the chunk ends
    through         = exp(b_C)                            what is left of the memory that the chunk began with

exp(b_i) and exp(-b_j) are never formed apart: no exponent is positive, so that no decay is too strong.

The gradient needs no pass of its own. b_i stands wherever x_i does and -b_j wherever y_j does, always as their factor
in the exponent: d b_i = sum over the readers x of <x_i, d x_i> - sum over the writers y of <y_i, d y_i>, and the memory
that the chunk hands on gives d b_C = <S_C, d S_C>. A channel keeps its own sum, a head adds up its channels.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from memzoo.layers.ops.unit_triangular import corners

FORGETS_ALL = -1e4
"""A log decay that leaves nothing in any dtype; differences of sums of it stay exact, those of -inf are NaN."""


class ChunkDecay(ABC):
    """Decay of the chunks of a sequence; shapes are (chunks, heads, size, ...)."""

    @staticmethod
    def of(log_decay: Tensor | None) -> "ChunkDecay":
        """Return the decay of log decays (chunks, heads, size, 1 or key width); None keeps everything."""
        if log_decay is None:
            return NoDecay()
        return HeadDecay(log_decay) if log_decay.shape[-1] == 1 else ChannelDecay(log_decay)

    @abstractmethod
    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the decayed products of rows x and y, (chunks, heads, size, size), zero above the diagonal."""

    @abstractmethod
    def scores_backward(self, d_scores: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and y for one of the scores: zero above the diagonal, and overwritten."""

    def from_start(self, x: Tensor) -> Tensor:
        """Return the rows x (..., key width) times what is left of the chunk's start."""
        return x if self.start is None else x * self.start

    def from_start_(self, x: Tensor) -> Tensor:
        """``from_start`` in the storage of x."""
        return x if self.start is None else x.mul_(self.start)

    def to_end(self, y: Tensor) -> Tensor:
        """Return the rows y (..., key width) times what will be left of them at the chunk's end."""
        return y if self.end is None else y * self.end

    def to_end_(self, y: Tensor) -> Tensor:
        """``to_end`` in the storage of y."""
        return y if self.end is None else y.mul_(self.end)

    start: Tensor | None = None
    """(chunks, heads, size, 1 or key width), exp(b_i); None for one."""

    end: Tensor | None = None
    """(chunks, heads, size, 1 or key width), exp(b_C - b_j); None for one."""

    through: Tensor | None = None
    """(chunks, heads, 1 or key width, 1), exp(b_C); None for one."""


class NoDecay(ChunkDecay):
    """Everything is kept."""

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).tril_()

    def scores_backward(self, d_scores: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return d_scores @ y, d_scores.mT @ x


class HeadDecay(ChunkDecay):
    """One decay for all channels of a head, log_decay (chunks, heads, size, 1).

    Differences of running sums are taken in float64: after strong decays those sums are large, and in float32 the weak
    decays behind them would drown in rounding.
    """

    def __init__(self, log_decay: Tensor) -> None:
        dtype = log_decay.dtype
        exact = torch.float32 if log_decay.device.type == "mps" else torch.float64
        total = log_decay.to(exact).clamp_min(FORGETS_ALL).cumsum(-2)
        high = total.to(dtype)
        low = (total - high).to(dtype)  # the difference of the sums in two parts: twice as fast as in float64
        self.table = (high - high.mT).add_(low - low.mT).tril_().exp_().tril_()
        self.start = total.to(dtype).exp()
        self.end = (total[..., -1:, :] - total).to(dtype).exp()
        self.through = self.start[..., -1:, :]

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).mul_(self.table)

    def scores_backward(self, d_scores: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d_scores.mul_(self.table)
        return d_scores @ y, d_scores.mT @ x


class ChannelDecay(ChunkDecay):
    """A decay for every key channel, log_decay (chunks, heads, size, key width), size a power of two.

    The lower triangle is halved again and again: the square of the rows of a second half and the columns of the first
    half is one product of rows decayed since the middle and columns decayed until the middle. Their exponents are sums
    of decays on either side, built up from level to level, so nothing cancels and nothing overflows.
    """

    def __init__(self, log_decay: Tensor) -> None:
        size = log_decay.shape[-2]
        # Sums of decays inside a block: from its start up to i, and behind j up to its end.
        since, until = log_decay, torch.zeros_like(log_decay)
        self.levels: list[tuple[Tensor, Tensor]] = []
        span = 1
        while span < size:
            since_middle, until_middle = _pairs(since, span)[..., 1, :, :], _pairs(until, span)[..., 0, :, :]
            self.levels.append((since_middle.exp(), until_middle.exp()))
            whole_first = _pairs(since, span)[..., 0, -1:, :]
            whole_second = since_middle[..., -1:, :]
            since = torch.stack((_pairs(since, span)[..., 0, :, :], since_middle + whole_first), -3).view_as(since)
            until = torch.stack((until_middle + whole_second, _pairs(until, span)[..., 1, :, :]), -3).view_as(until)
            span *= 2
        self.start, self.end = since.exp(), until.exp()
        self.through = self.start[..., -1:, :].mT

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        scores = torch.diag_embed((x * y).sum(-1))
        for level, (since, until) in enumerate(self.levels):
            span = 2**level
            rows = _pairs(x, span)[..., 1, :, :] * since
            columns = _pairs(y, span)[..., 0, :, :] * until
            corners(scores, span).copy_(rows @ columns.mT)
        return scores

    def scores_backward(self, d_scores: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        d_x, d_y = diagonal * y, diagonal * x
        for level, (since, until) in enumerate(self.levels):
            span = 2**level
            corner = corners(d_scores, span)
            rows = _pairs(x, span)[..., 1, :, :] * since
            columns = _pairs(y, span)[..., 0, :, :] * until
            _pairs(d_x, span)[..., 1, :, :] += (corner @ columns) * since
            _pairs(d_y, span)[..., 0, :, :] += (corner.mT @ rows) * until
        return d_x, d_y


def _pairs(x: Tensor, span: int) -> Tensor:
    """View (..., size, d) as pairs of neighbouring blocks, (..., pairs, 2, span, d)."""
    pairs: Tensor = x.unflatten(-2, (-1, 2, span))
    return pairs
