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

from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_number
from memzoo.layers.graph_memory_signals import effective_number, off_diagonal_cosines, row_entropy
from memzoo.layers.ops.graph_memory import GraphRouting, GraphTables

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


def graph_losses(
    weights: Mapping[str, float],
    tables: GraphTables,
    routing: GraphRouting,
    *,
    centroids: Tensor,
    stream: Tensor,
    momentum: Tensor,
    entropy_floor: float,
    usage_target: float,
) -> dict[str, Tensor]:
    """Return the losses of one cell, weighted; those of weight zero are left out.

    Args:
        weights: Of every loss.
        tables: Of the parameters.
        routing: Of the tokens.
        centroids: C as it is learned, (S, d).
        stream: What the block returns, (batch, time, d); no gradient reaches it.
        momentum: m, a scalar.
        entropy_floor: Entropy in nats that a row of Ebar should have.
        usage_target: Number of slots that should be in use.
    """
    losses = {
        "track": lambda: (1 - momentum) * F.mse_loss(routing.source @ tables.centroids, stream.detach().to(momentum)),
        "ortho": lambda: off_diagonal_cosines(centroids).square().mean(),
        "cluster": lambda: cluster(routing.source, usage_target),
        "edge": lambda: (entropy_floor - row_entropy(tables.transitions)).clamp_min(0).mean(),
        "contrast": lambda: off_diagonal_cosines(tables.transitions).mean(),
    }
    return {name: weight * losses[name]() for name, weight in weights.items() if weight}


def cluster(source: Tensor, usage_target: float) -> Tensor:
    """Return how far the number of slots in use is below its target, a scalar; source: (..., S)."""
    in_use = effective_number(source.flatten(0, -2).mean(0))
    return (usage_target / in_use.clamp_min(1) - 1).clamp_min(0)
