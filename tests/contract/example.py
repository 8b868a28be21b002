"""The smallest memory that keeps the contract, and a model of it: what docs/contract.md shows."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class ExponentialAverageState(MixerState):
    """The running average. average: (batch, dim), at least float32."""

    average: Tensor


class ExponentialAverage(SequenceMixer):
    """A memory that fades: ``h_t = a h_{t-1} + (1 - a) W_in x_t``, ``y_t = W_out h_t``, one learned ``a`` a channel."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.write = nn.Linear(dim, dim, bias=False)
        self.decay = nn.Parameter(torch.linspace(-2.0, 2.0, dim))
        self.read = nn.Linear(dim, dim, bias=False)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ExponentialAverageState:
        device = device or self.decay.device
        count = torch.zeros(batch_size, dtype=torch.long, device=device)
        precision = torch.promote_types(dtype or self.decay.dtype, torch.float32)
        average = torch.zeros(batch_size, self.dim, dtype=precision, device=device)
        return ExponentialAverageState(count, count.clone(), average)

    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Tensor, ExponentialAverageState]:
        fresh = self.initial_state(len(x), device=x.device, dtype=x.dtype)
        start = fresh if state is None else cast(ExponentialAverageState, state)
        _, position, document = counters(state, x, lengths)
        h, keep = start.average, torch.sigmoid(self.decay)
        history = []
        for t, write in enumerate(self.write(x).unbind(1)):
            new = keep * h + (1 - keep) * write
            h = new if lengths is None else torch.where((t < lengths)[:, None], new, h)
            history.append(h)
        averages = torch.stack(history, 1)
        if trace is not None:
            trace.signal("average_norm", averages.norm(dim=-1))
        return self.read(averages.to(x.dtype)), ExponentialAverageState(position, document, h)
