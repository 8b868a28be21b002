"""What changes the slots of a graph memory besides the gradient: write-back, and maintenance of dead and double slots.

arXiv 2604.23862, official code: ``write_back``, ``reset_dead_centroids``, ``merge_similar_centroids``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

USAGE_DECAY = 0.99


def source_mass(source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of the sources of all real tokens (S,), and how many there are ().

    Shape:
        source: (batch, time, S). mask: (batch, time) bool; None if all are real.
    """
    if mask is None:
        return source.sum((0, 1)), source.new_full((), source.shape[:2].numel())
    return source.masked_fill(~mask[..., None], 0).sum((0, 1)), mask.sum().to(source)


def gather_writes(source: Tensor, content: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum what is written into every slot, by each real token into its likeliest source.

    Shape:
        source: (batch, time, S). content: (batch, time, d). mask: (batch, time) bool; None if all are real. Returns the
        sums (S, d) and counts (S,), at least float32.
    """
    slot = source.argmax(-1).flatten()
    real = source.new_ones(len(slot)) if mask is None else mask.flatten().to(source)
    tokens = content.flatten(0, 1).to(source.dtype)
    if mask is not None:
        tokens = tokens.masked_fill(~mask.flatten()[:, None], 0)
    sums = tokens.new_zeros(source.shape[-1], tokens.shape[-1]).index_add_(0, slot, tokens)
    return sums, real.new_zeros(source.shape[-1]).index_add_(0, slot, real)


def spread_tokens(x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Return at most ``count`` tokens, (<= count, d), evenly spread over all real ones and never the same one twice.

    Of fewer real tokens than ``count``, some are returned more than once; without any, tokens of zeros.

    Shape:
        x: (batch, time, d). mask: (batch, time) bool; None if all are real.
    """
    tokens = x.flatten(0, 1)
    count = min(count, len(tokens))
    middle = 2 * torch.arange(count, device=x.device) + 1
    if mask is None:
        return tokens[middle * len(tokens) // (2 * count)]
    real_first = (~mask.flatten()).to(torch.uint8).argsort(stable=True)
    tokens = tokens.masked_fill(~mask.flatten()[:, None], 0)
    return tokens[real_first[middle * mask.sum() // (2 * count)]]


def write(centroids: Tensor, sums: Tensor, counts: Tensor, momentum: Tensor) -> Tensor:
    """Return normalize(m C + (1 - m) mean).

    A slot keeps its direction if no token was written into it, or one that is not finite.

    Shape:
        centroids, sums: (S, d). counts: (S,). momentum: (). Returns (S, d).
    """
    mean = sums / counts.clamp_min(1)[:, None]
    moved = momentum * centroids + (1 - momentum) * mean
    takes = (counts > 0) & moved.isfinite().all(-1)
    return F.normalize(torch.where(takes[:, None], moved, centroids.to(moved)), dim=-1)


def advanced_usage(usage: Tensor, mass: Tensor, tokens: Tensor) -> Tensor:
    """Return the running mean of the sources after ``tokens`` () more, whose sources add up to ``mass`` (S,)."""
    return torch.where(tokens > 0, USAGE_DECAY * usage + (1 - USAGE_DECAY) * mass / tokens.clamp_min(1), usage)


def check_statistics(
    statistics: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> None:
    """Require statistics of these names, behind a prefix, and shapes.

    Raises:
        ValueError: One is missing or has another shape.
    """
    for name, shape in expected.items():
        path = f"{prefix}{name}"
        if path not in statistics or statistics[path].shape != shape:
            found = f"of shape {tuple(statistics[path].shape)}" if path in statistics else "missing"
            raise ValueError(
                f"statistics[{path!r}] is {found}, not of shape {shape}; pass trace.statistics of a forward pass of "
                f"this model in training mode"
            )


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

    @classmethod
    def of(cls, centroids: Tensor, usage: Tensor, age: Tensor, states: Tensor, generator: torch.Generator) -> Self:
        """Copy a cell's slots. Tokens that have no direction, zero or not finite, are left out.

        Raises:
            ValueError: ``states`` has another shape.
        """
        dim = centroids.shape[1]
        if states.dim() != 2 or states.shape[1] != dim or not len(states):
            raise ValueError(f"states has shape {tuple(states.shape)}; it must be (count >= 1, {dim})")
        centroids, usage, age, tokens = (part.cpu().clone() for part in (centroids, usage, age, states))
        tokens = tokens[tokens.isfinite().all(-1) & tokens.any(-1)].unique(dim=0)
        return cls(centroids, usage, age, tokens, generator)

    def maintain(self, dead_usage: float, merge_cosine: float, merge_age: int) -> tuple[int, int]:
        """Do as ``reset_dead``, then as ``merge_similar``, and return how many each has seeded; none without tokens."""
        if not len(self.states):
            return 0, 0
        return self.reset_dead(dead_usage), self.merge_similar(merge_cosine, merge_age)

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
        merged, seeds = 0, self._tokens(len(pairs))
        for i, j in pairs.tolist():
            if F.cosine_similarity(self.centroids[i], self.centroids[j], dim=0) <= cosine:
                continue  # one of them has been seeded since
            less_used = j if self.usage[i] >= self.usage[j] else i
            self._seed(torch.tensor([less_used]), seeds[merged : merged + 1])
            merged += 1
        return merged

    def _tokens(self, count: int) -> Tensor:
        """Draw tokens, each once where there are enough: slots seeded alike would stay alike until they may merge."""
        if count <= len(self.states):
            return self.states[torch.randperm(len(self.states), generator=self.generator)[:count]]
        return self.states[torch.randint(len(self.states), (count,), generator=self.generator)]

    def _seed(self, slots: Tensor, directions: Tensor) -> None:
        self.centroids[slots] = F.normalize(directions, dim=-1).to(self.centroids)
        self.usage[slots] = 1 / len(self.usage)
        self.age[slots] = 0
