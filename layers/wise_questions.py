"""Stored questions of WISE: what the site reads of some edits, to measure and to train with again."""

from typing import Any

import torch
from torch import Generator, Tensor

from memzoo.layers.wise_shards import PENDING, GrowingBuffers

EVERY_ROW = ("inputs", "counted", "shard", "memory")
_STEP, _OFFSET = 6364136223846793005, 1442695040888963407  # Knuth's linear congruential generator


def derived_seed(seed: int, *numbers: int) -> int:
    """Return a seed for one of many things that are drawn apart from each other."""
    for number in (0, *numbers):
        seed = ((seed + number) * _STEP + _OFFSET) % 2**63
    return seed


class WiseQuestions(GrowingBuffers):
    """A bounded number of questions of each shard that is not merged, and of each memory.

    What the site reads does not depend on the side memory, so this is all that is needed of a question: the host need
    not be called again, and the text is not kept.

    Args:
        width: Of what the site reads.
        like: Dtype and device.

    Attributes:
        inputs: (questions, tokens, width), padded to the longest.
        counted: (questions, tokens) bool.
        shard: (questions,) the number of the shard that learned each.
        memory: (questions,) the number of the memory that it was merged into, or ``PENDING``.
    """

    inputs: Tensor
    counted: Tensor
    shard: Tensor
    memory: Tensor

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        device = like.device
        self.register_buffer("inputs", like.new_zeros(0, 0, width))
        self.register_buffer("counted", torch.zeros(0, 0, dtype=torch.bool, device=device))
        for name in ("shard", "memory"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64, device=device))

    def clear(self) -> None:
        """Forget all."""
        width = self.inputs.shape[-1]
        self.fit({"inputs": (0, 0, width), "counted": (0, 0), "shard": (0,), "memory": (0,)})

    def __len__(self) -> int:
        return len(self.shard)

    def offer(self, x: Tensor, counted: Tensor, shard: int, *, before: int, limit: int, generator: Generator) -> None:
        """Store a question, maybe in the place of another of its shard, so that each offered is as likely to be kept.

        Args:
            x: (tokens, width).
            counted: (tokens,).
            shard: The shard that learned it.
            before: How many of that shard were offered before.
            limit: How many of it are stored.
            generator: Of the draw, on the CPU.
        """
        if before >= limit:
            place = int(torch.randint(before + 1, (), generator=generator))
            if place >= limit:
                return
            self.drop(torch.arange(len(self), device=self.shard.device) == (self.shard == shard).nonzero()[place])
        x, counted = x[counted], counted[counted]
        self._lengthen(len(x))
        missing = self.inputs.shape[1] - len(x)
        x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        counted = torch.cat([counted, counted.new_zeros(missing)])
        self.append(inputs=x, counted=counted, shard=torch.tensor(shard), memory=torch.tensor(PENDING))

    def join(self, memory: int, *, limit: int, generator: Generator) -> None:
        """Say that the pending shards were merged, and leave as many questions of their memory as are stored of one."""
        self.memory = torch.where(self.memory == PENDING, memory, self.memory)
        own = (self.memory == memory).nonzero().flatten()
        surplus = torch.randperm(len(own), generator=generator)[limit:].to(own.device)
        dropped = torch.zeros_like(self.memory, dtype=torch.bool)
        dropped[own[surplus]] = True
        self.drop(dropped)

    def drop(self, rows: Tensor) -> None:
        """Forget some questions, and the padding that no other needs.

        Args:
            rows: (questions,) bool.
        """
        self.keep(EVERY_ROW, ~rows)
        longest = int(self.counted.any(0).sum())
        self.inputs, self.counted = self.inputs[:, :longest].contiguous(), self.counted[:, :longest].contiguous()

    def draw(self, rows: Tensor, count: int, generator: Generator) -> "tuple[Tensor, Tensor]":
        """Return ``inputs`` and ``counted`` of up to ``count`` of some questions."""
        own = rows.nonzero().flatten()
        chosen = own[torch.randperm(len(own), generator=generator)[:count].to(own.device)]
        return self.inputs[chosen], self.counted[chosen]

    def _lengthen(self, tokens: int) -> None:
        missing = tokens - self.inputs.shape[1]
        if missing > 0:
            pad: Any = torch.nn.functional.pad
            self.inputs = pad(self.inputs, (0, 0, 0, missing))
            self.counted = pad(self.counted, (0, missing))
