"""Routing of WISE: how far a side memory departs from the main one, and whether an input is to read it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.precision import wider
from memzoo.layers.wise_options import Granularity, Reduce

MAIN = -1  # what a decision says of an input that reads the main memory alone
LONG = 100  # tokens, beyond which reduce="easyedit" is no mean
BELOW = 1e-6  # share of a threshold that a response may be below it: that edits set it, which are to be above it


def slack(dtype: torch.dtype) -> float:
    """Return ``BELOW``, or by how much rounding may change a response that is computed in a dtype, if that is more.

    The same question in a batch of another shape responds otherwise, in bfloat16 by about a fifth of its ``eps``.
    """
    return max(BELOW, torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Routing:
    """What was decided in a call of the host.

    Attributes:
        activations: (sides, rows) how far each side memory responds; of granularity "token" (sides, rows, tokens), of
            "batch" (sides, 1).
        thresholds: (sides,) above which a memory is read.
        chosen: The number of the side memory that is read, or ``MAIN``; without the first axis of ``activations``.
    """

    activations: Tensor
    thresholds: Tensor
    chosen: Tensor

    @classmethod
    def decide(cls, activations: Tensor, thresholds: Tensor) -> "Routing":
        """Choose the side memory that responds most, if it does so above its threshold."""
        strongest, chosen = activations.max(0)
        return cls(activations, thresholds, torch.where(strongest > thresholds[chosen], chosen, MAIN))


@dataclass(frozen=True)
class Indicator:
    """Measures how far a side memory departs from the main one, in at least float32.

    Attributes:
        reduce: As in ``WiseOptions``.
        activation: Between the matrices of the feed-forward, for the indicator "activated"; None for "linear".
    """

    reduce: Reduce
    activation: Callable[[Tensor], Tensor] | None

    def of_tokens(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the length of what a side memory changes, (..., dim) -> (...).

        Args:
            y: What the main matrix returns.
            z: What the side matrix returns beside it.
        """
        if self.activation is not None:
            z = self.activation(y + z) - self.activation(y)
        length: Tensor = torch.linalg.vector_norm(wider(z), dim=-1)
        return length

    def of_call(self, y: Tensor, z: Tensor, counted: Tensor | None, granularity: Granularity) -> Tensor:
        """Return what is compared with a threshold: of "sample" (rows,), of "batch" (1,), of "token" (rows, tokens)."""
        if granularity == "token":
            return self.of_tokens(y, z)
        rows = self.of_rows(y, z, counted)
        return rows if granularity == "sample" else rows.mean(0, keepdim=True)

    def of_rows(self, y: Tensor, z: Tensor, counted: Tensor | None) -> Tensor:
        """Return one number a row, (rows, tokens, dim) -> (rows,); 0 of a row in which no token counts.

        Args:
            y: As in ``of_tokens``.
            z: Like it.
            counted: (rows, tokens) bool; None if all count.
        """
        tokens = self.of_tokens(y, z)
        counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
        tokens = torch.where(counted, tokens, 0)
        if self.reduce == "max":
            return tokens.amax(1)
        if self.reduce == "last":
            places = torch.arange(tokens.shape[1], device=tokens.device)
            last = torch.where(counted, places, 0).amax(1, keepdim=True)
            return tokens.gather(1, last)[:, 0]
        mean: Tensor = tokens.sum(1) / counted.sum(1).clamp_min(1)
        return torch.where(counted.sum(1) > LONG, tokens.amax(1), mean) if self.reduce == "easyedit" else mean


def mixed(y: Tensor, beside: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return ``y`` itself where ``chosen`` is ``MAIN``, elsewhere with what the chosen side memory returns beside it.

    Shape:
        y, beside: (rows, tokens, dim). chosen: (rows,), (1,) or (rows, tokens).
    """
    result, chosen = y, chosen.view(*chosen.shape, *[1] * (y.dim() - chosen.dim()))
    for number, z in enumerate(beside):
        result = torch.where(chosen == number, y + z.to(y.dtype), result)
    return result


def routing_loss(edit: Tensor, unrelated: Tensor, margins: Tensor) -> Tensor:
    """Return ``max(0, D_i - alpha) + max(0, beta - D_e) + max(0, gamma - (D_e - D_i))``, each the mean over its rows.

    Args:
        edit: D_e, (rows,) of an edit.
        unrelated: D_i, (others,) of what it must not touch, maybe none; the last term takes every pair.
        margins: (alpha, beta, gamma).

    Reference:
        Wang et al., arXiv 2405.14768, L_a; the paper does not say how rows are put together.
    """
    alpha, beta, gamma = margins
    loss = F.relu(beta - edit).mean()
    if len(unrelated):
        loss = loss + F.relu(unrelated - alpha).mean() + F.relu(gamma - (edit[:, None] - unrelated)).mean()
    return loss
