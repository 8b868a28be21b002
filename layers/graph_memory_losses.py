"""The five auxiliary losses of a graph memory cell (arXiv 2604.23862, official code): what keeps its graph diverse.

With u the mean of the sources over the tokens, H the entropy in nats and m the momentum of the write-back:

    track      (1 - m) mean( (h - w C')^2 )                 the source centre stays near the block's output h
    ortho      mean_{i != j} cos(C_i, C_j)^2                centroids point in different directions
    cluster    max(0, usage_target / exp H(u) - 1)          at least so many slots are in use
    edge       mean_i max(0, entropy_floor - H(Ebar_i))     a slot leads to many others
    contrast   mean_{i != j} cos(Ebar_i, Ebar_j)            slots lead to different ones

``track`` is the only loss that moves m, and m -> 1 makes it vanish: the official weights have m > 0.997 everywhere.
"""

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_number
from memzoo.layers.graph_memory_measures import effective_number, off_diagonal_cosines, row_entropy
from memzoo.layers.graph_memory_slots import source_mass
from memzoo.layers.ops.graph_memory import GraphRouting, GraphTables
from memzoo.layers.trace import Trace

LOSS_WEIGHTS: Mapping[str, float] = {"track": 1.0, "ortho": 0.05, "cluster": 0.3, "edge": 0.1, "contrast": 0.5}


def all_weights(chosen: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weight of every loss: the official ones but for those chosen.

    Raises:
        ValueError: There is no such loss, or a weight is negative.
    """
    for name, weight in (chosen or {}).items():
        check_choice("loss_weights", name, tuple(LOSS_WEIGHTS))
        check_number(f"loss_weights[{name!r}]", weight, zero=True)
    return {**LOSS_WEIGHTS, **(chosen or {})}


def default_entropy_floor(num_slots: int) -> float:
    """Return the floor of a row's entropy: the official 4 nats of 128 slots, as large a part of ln(S - 1) of others."""
    return 4.0 * log(num_slots - 1) / log(127)


def report_losses(trace: Trace, losses: Mapping[str, Tensor]) -> None:
    """Report the losses of one cell. A model's are the means of its cells."""
    for name, loss in losses.items():
        trace.pool(name, (loss,), _mean_of_cells)


def graph_losses(
    weights: Mapping[str, float],
    tables: GraphTables,
    routing: GraphRouting,
    *,
    centroids: Tensor,
    stream: Tensor,
    mask: Tensor | None,
    momentum: Tensor,
    entropy_floor: float,
    usage_target: float,
) -> dict[str, Tensor]:
    """Return the losses of one cell, weighted.

    Args:
        weights: Of every loss.
        tables: Of the parameters.
        routing: Of the tokens.
        centroids: C as it is learned, (S, d).
        stream: What the block returns, (batch, time, d), without gradients.
        mask: True at real tokens, (batch, time); None if all are.
        momentum: m, a scalar.
        entropy_floor: Entropy in nats that a row of Ebar should have.
        usage_target: Number of slots that should be in use.
    """
    losses = {
        "track": lambda: (1 - momentum) * distance(routing.source @ tables.centroids, stream, mask),
        "ortho": lambda: off_diagonal_cosines(centroids).square().mean(),
        "cluster": lambda: cluster(routing.source, mask, usage_target),
        "edge": lambda: (entropy_floor - row_entropy(tables.transitions)).clamp_min(0).mean(),
        "contrast": lambda: off_diagonal_cosines(tables.transitions).mean(),
    }
    return {name: weight * losses[name]() if weight else centroids.new_zeros(()) for name, weight in weights.items()}


def distance(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean square of the differences of real tokens, (batch, time, d) both."""
    if mask is None:
        return F.mse_loss(x, y.to(x.dtype))
    squares = (x - y.to(x.dtype)).square().mean(-1).masked_fill(~mask, 0)
    return squares.sum() / mask.sum().clamp_min(1)


def cluster(source: Tensor, mask: Tensor | None, usage_target: float) -> Tensor:
    """Return how far the number of slots in use is below its target, in parts of that number; source: (batch, time, S).

    Without real tokens it is 0.
    """
    mass, tokens = source_mass(source, mask)
    in_use = effective_number(torch.where(tokens > 0, mass, torch.ones_like(mass)))
    return (usage_target / in_use.clamp_min(1) - 1).clamp_min(0) * (tokens > 0)


def _mean_of_cells(losses: Tensor) -> Tensor:
    return losses.mean()
