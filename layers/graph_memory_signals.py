"""What graph memory cells let be looked at: how slots are used, how edges spread, where tokens go.

All of it follows from the routing that a forward pass has anyway and from the parameters. Entropies are in nats, with
1e-8 inside the logarithm, as in the official code of the Graph Memory Transformer (arXiv 2604.23862).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.graph_memory import SMALL, GraphRouting, GraphTables
from memzoo.layers.trace import Trace


def report_signals(
    trace: Trace,
    *,
    routing: GraphRouting,
    tables: GraphTables,
    centroids: Tensor,
    usage: Tensor,
    gate: Tensor,
    momentum: Tensor,
    temperature: Tensor,
    movement: Tensor,
    dead_usage: float = 1e-3,
) -> None:
    """Report everything worth looking at of one forward pass of a cell.

    Of every token: ``similarity, source, prior, target``, each (batch, time, S), ``source_centre, target_centre,
    movement``, each (batch, time, d), and ``source_entropy, target_entropy`` (batch, time). Of the text, by every
    token's likeliest slots: ``transitions`` (S, S), the number of tokens by source and target; ``argmax_effective,
    argmax_gini``, how many sources are used and how unevenly; ``self_route``, the share of tokens that stay; and
    ``batch_effective``, how many sources are used softly. Of the cell: ``slots`` (S, d), C'; ``usage`` (S,);
    ``usage_effective, dead, centroid_cosine, coverage, edge_entropy, edge_peak, edge_cosine, gate, momentum,
    temperature``.

    Args:
        trace: Where to.
        routing: Of the tokens.
        tables: Of the parameters.
        centroids: As they are stored, before their norm.
        usage: Running mean of the sources.
        gate: Sigmoid of g, which scales what the cell adds.
        momentum: Sigmoid of omega.
        temperature: Of the sources.
        movement: Target centre minus source centre.
        dead_usage: A slot that is used less is dead.

    Shape:
        centroids: (S, d). usage: (S,). gate: () or (d,). momentum, temperature: (). movement: (batch, time, d).
    """
    for name in ("similarity", "source", "prior", "target"):
        trace.signal(name, getattr(routing, name))
    trace.signal("source_entropy", row_entropy(routing.source))
    trace.signal("target_entropy", row_entropy(routing.target))
    source_centre = routing.source @ tables.centroids
    trace.signal("source_centre", source_centre)
    trace.signal("target_centre", source_centre + movement)
    trace.signal("movement", movement)
    _report_choices(trace, routing)
    trace.signal("slots", tables.centroids)
    trace.signal("usage", usage.clone())  # a buffer, as it is now
    trace.signal("usage_effective", effective_number(usage))
    trace.signal("dead", (usage < dead_usage).sum())
    trace.signal("centroid_cosine", off_diagonal_cosines(centroids).mean())
    trace.signal("coverage", coverage(centroids))
    trace.signal("edge_entropy", row_entropy(tables.transitions).mean())
    trace.signal("edge_peak", tables.transitions.amax(-1).mean())
    trace.signal("edge_cosine", off_diagonal_cosines(tables.transitions).mean())
    trace.signal("gate", gate)
    trace.signal("momentum", momentum)
    trace.signal("temperature", temperature.clone())


def _report_choices(trace: Trace, routing: GraphRouting) -> None:
    transitions = transition_counts(routing.source, routing.target)
    chosen = transitions.sum(1)
    trace.signal("transitions", transitions)
    trace.signal("batch_effective", effective_number(routing.source.flatten(0, -2).mean(0)))
    trace.signal("argmax_effective", effective_number(chosen.to(routing.source)))
    trace.signal("argmax_gini", gini(chosen.to(routing.source)))
    trace.signal("self_route", transitions.diagonal().sum() / chosen.sum().to(routing.source))


def row_entropy(p: Tensor) -> Tensor:
    """Return the entropy of probabilities along the last axis, (..., S) -> (...)."""
    return -(p * (p + SMALL).log()).sum(-1)


def effective_number(usage: Tensor) -> Tensor:
    """Return how many equally used slots would have the entropy of these: exp(H), (..., S) -> (...).

    Args:
        usage: Not negative, not all zero; made to add up to one.
    """
    return row_entropy(usage / usage.sum(-1, keepdim=True)).exp()


def gini(counts: Tensor) -> Tensor:
    """Return the Gini coefficient of what slots hold, (..., S) -> (...): 0 if equal, 1 - 1/S if one slot holds all.

    Args:
        counts: Floating, not negative, not all zero.
    """
    num_slots = counts.shape[-1]
    rank = torch.arange(1, num_slots + 1, dtype=counts.dtype, device=counts.device)
    weights = 2 * rank - num_slots - 1
    return (weights * counts.sort(-1).values).sum(-1) / (num_slots * counts.sum(-1))


def off_diagonal_cosines(rows: Tensor) -> Tensor:
    """Return the cosines of each row with all other rows, (S, d) -> (S, S - 1)."""
    unit = F.normalize(rows, dim=-1)
    pairs = (unit @ unit.mT).flatten()
    # All but every (S + 1)-th, the diagonal, without an index that the device would have to be waited for.
    return pairs[1:].view(len(rows) - 1, len(rows) + 1)[:, :-1].reshape(len(rows), len(rows) - 1)


def coverage(centroids: Tensor) -> Tensor:
    """Return how far a centroid is from its nearest other one, on average: mean of 1 - max cos, (S, d) -> ()."""
    return (1 - off_diagonal_cosines(centroids).amax(-1)).mean()


def transition_counts(source: Tensor, target: Tensor) -> Tensor:
    """Return how many tokens have their likeliest source at i and their likeliest target at j.

    Shape:
        source, target: (..., S) probabilities. Returns (S, S) whole numbers.
    """
    num_slots = source.shape[-1]
    moves = (source.argmax(-1) * num_slots + target.argmax(-1)).flatten()
    # Not bincount, which waits for the device to learn the length of its result.
    counts = moves.new_zeros(num_slots**2).index_add_(0, moves, torch.ones_like(moves))
    return counts.view(num_slots, num_slots)


def slot_tokens(assignments: Tensor, tokens: Tensor, num_slots: int, top: int) -> list[list[tuple[int, int]]]:
    """Return for every slot the tokens that choose it most: what it stands for.

    Args:
        assignments: The slot of each token.
        tokens: Their ids.
        num_slots: S.
        top: At most so many a slot.

    Shape:
        assignments, tokens: whole numbers of equal shape.

    Returns:
        For every slot pairs of a token's id and how often it chose the slot, most frequent first, of equally frequent
        ones the smaller id.
    """
    pairs, counts = torch.stack((assignments.flatten(), tokens.flatten())).unique(dim=1, return_counts=True)
    table: list[list[tuple[int, int]]] = [[] for _ in range(num_slots)]
    for slot, token, count in zip(*pairs.tolist(), counts.tolist(), strict=True):  # in the order of slot, then token
        table[slot].append((token, count))
    return [sorted(row, key=lambda entry: -entry[1])[:top] for row in table]
