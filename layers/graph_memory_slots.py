"""What changes the slots of a graph memory besides the gradient: write-back, and maintenance of dead and double slots.

arXiv 2604.23862, official code: ``write_back``, ``reset_dead_centroids``, ``merge_similar_centroids``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

USAGE_DECAY = 0.99


def gather_writes(source: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the tokens of every slot, each token counted for its likeliest source.

    Shape:
        source: (batch, time, S). stream: (batch, time, d). Returns the sums (S, d) and counts (S,), at least float32.
    """
    slot = source.argmax(-1).flatten()
    tokens = stream.flatten(0, -2).to(source.dtype)
    sums = tokens.new_zeros(source.shape[-1], tokens.shape[-1]).index_add_(0, slot, tokens)
    counts = tokens.new_zeros(source.shape[-1]).index_add_(0, slot, tokens.new_ones(len(slot)))
    return sums, counts


def write(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: Tensor) -> Tensor:
    """Return normalize(m C + (1 - m) mean); a slot without tokens keeps its direction.

    Shape:
        centroids, sums: (S, d). counts: (S,). momentum: (). Returns (S, d).
    """
    mean = sums / counts.clamp_min(1)[:, None]
    return F.normalize(momentum * centroids + (1 - momentum) * mean, dim=-1)


def advanced_usage(usage: Tensor, source_mass: Tensor, tokens: Tensor) -> Tensor:
    """Return the running mean of the sources after ``tokens`` more, whose sources add up to ``source_mass`` (S,)."""
    return USAGE_DECAY * usage + (1 - USAGE_DECAY) * source_mass / tokens


@dataclass
class Slots:
    """The slots of one cell, on the CPU and without gradients, to be changed in place.

    Attributes:
        centroids: (S, d).
        usage: (S,).
        age: (S,).
        states: (count, d), tokens to seed slots from.
        generator: Of the choice of tokens.
    """

    centroids: Tensor
    usage: Tensor
    age: Tensor
    states: Tensor
    generator: torch.Generator

    def reset_dead(self, threshold: float) -> int:
        """Seed every slot that is used less than ``threshold`` with a token's direction, and return how many.

        If that is more than half of them, with random directions.
        """
        dead = (self.usage < threshold).nonzero()[:, 0]
        if len(dead) > len(self.usage) / 2:
            seeds = torch.randn(len(dead), self.states.shape[1], generator=self.generator).to(self.centroids)
        else:
            seeds = self._tokens(len(dead))
        self._seed(dead, seeds)
        return len(dead)

    def merge_similar(self, cosine: float, age: int) -> int:
        """Of every two slots closer than ``cosine`` and older than ``age``, seed the less used one; return how many."""
        old = (self.age >= age).nonzero()[:, 0]
        unit = F.normalize(self.centroids[old], dim=-1)
        pairs = old[(unit @ unit.mT).triu(1).gt(cosine).nonzero()]
        merged = 0
        for i, j in pairs.tolist():
            if F.cosine_similarity(self.centroids[i], self.centroids[j], dim=0) <= cosine:
                continue  # one of them has been seeded since
            less_used = j if self.usage[i] >= self.usage[j] else i
            self._seed(torch.tensor([less_used]), self._tokens(1))
            merged += 1
        return merged

    def _tokens(self, count: int) -> Tensor:
        return self.states[torch.randint(len(self.states), (count,), generator=self.generator)]

    def _seed(self, slots: Tensor, directions: Tensor) -> None:
        self.centroids[slots] = F.normalize(directions, dim=-1).to(self.centroids)
        self.usage[slots] = 1 / len(self.usage)
        self.age[slots] = 0
