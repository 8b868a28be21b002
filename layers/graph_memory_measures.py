"""Measures of slots, their use and their edges: plain functions of tensors, for losses, signals and figures.

Entropies are in nats, with 1e-8 inside the logarithm, as in the official code of the Graph Memory Transformer
(arXiv 2604.23862).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.graph_memory import SMALL


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


def mean_of_real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the tokens that are real; nan if none is.

    Args:
        values: Of every token.
        mask: True at real tokens; all are without one.

    Shape:
        values: (batch, time, ...). mask: (batch, time), bool. Returns (...).
    """
    values = values.flatten(0, 1)
    if mask is None:
        return values.mean(0)
    return _of_real(values, mask).sum(0) / mask.sum()


def move_counts(source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how many tokens have their likeliest source at i and their likeliest target at j.

    Args:
        source: Probabilities of the slots that every token is at.
        target: Of those that it moves to.
        mask: True at the tokens that count; all do without one.

    Shape:
        source, target: (batch, time, S). mask: (batch, time), bool. Returns (S, S) whole numbers.
    """
    num_slots = source.shape[-1]
    moves = (source.argmax(-1) * num_slots + target.argmax(-1)).flatten()
    real = torch.ones_like(moves) if mask is None else mask.flatten().to(moves)
    # Not bincount, which waits for the device to learn the length of its result.
    counts = moves.new_zeros(num_slots**2).index_add_(0, moves, real)
    return counts.view(num_slots, num_slots)


def soft_moves(source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what part of all movement goes from i to j: the mean of source_i target_j, which adds up to one.

    Arguments and shapes as in ``move_counts``; nan if no token is real.
    """
    source, target = source.flatten(0, 1), target.flatten(0, 1)
    if mask is None:
        return source.mT @ target / len(source)
    return _of_real(source, mask).mT @ target / mask.sum()


def mutual_information(source: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how many nats the slot says about the token that is at it: H of the mean source - mean H, at most ln S.

    Shape:
        source: (batch, time, S). mask: (batch, time), bool, True at real tokens. Returns a scalar; nan if none is real.
    """
    return row_entropy(mean_of_real(source, mask)) - mean_of_real(row_entropy(source), mask)


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


def _of_real(values: Tensor, mask: Tensor) -> Tensor:
    """Return values (batch time, ...) with zeros where the mask (batch, time) is False."""
    return values.masked_fill(~mask.reshape(-1, *[1] * (values.dim() - 1)), 0)
