"""The smallest sequence mixer: the sum of everything seen so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.state import MixerState


@dataclass(frozen=True)
class RunningSumState(MixerState):
    total: Tensor  # (batch, dim)


class RunningSum(SequenceMixer):
    """It leaves NaN to the right of a row's end, as a layer may, and reports its input and the size of it."""

    def initial_state(self, batch_size, *, device=None, dtype=None):
        position, document = (torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(2))
        return RunningSumState(position, document, torch.zeros(batch_size, self.dim, device=device, dtype=dtype))

    def mix(self, x, state, *, lengths, trace, donate):
        _, after, document = counters(state, x, lengths)
        y = x.cumsum(1) + (0 if state is None else state.total[:, None])
        total = y[:, -1]
        if lengths is not None:
            slot = torch.arange(x.shape[1])
            start = torch.zeros_like(total) if state is None else state.total
            last = y.take_along_dim((lengths - 1).clamp_min(0)[:, None, None], 1)[:, 0]
            total = torch.where((lengths > 0)[:, None], last, start)
            y = y.masked_fill((slot >= lengths[:, None])[..., None], torch.nan)
        if trace is not None:
            trace.signal("input", x)
            trace.loss("size", x.abs().sum())
        return y, RunningSumState(after, document, total)
