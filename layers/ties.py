"""TIES: merge several changes of one matrix into one that does not cancel them out.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (arXiv 2306.01708), as WISE (arXiv 2405.14768)
merges the shards of a side memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memzoo.layers.errors import check_number
from memzoo.layers.ops.precision import wider


@torch.no_grad()
def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float | Sequence[float]) -> Tensor:
    """Trim, elect a sign, and take the mean of what agrees with it, entry by entry.

        trim:   d_i = delta_i where |delta_i| is among the ``round(density N)`` largest, else 0
        elect:  s = + where sum_i w_i d_i >= 0, else -
        mean:   sum of w_i d_i / sum of w_i, both over the d_i of sign s; 0 where there are none

    Entries as large as the smallest that is kept are kept too, so the result does not depend on an order. Where each
    entry was changed by one delta only and nothing is trimmed, the result is their union; to the bit if the weights are
    powers of two. Opposite changes of equal weight leave the positive one.

    Args:
        deltas: Changes of one matrix.
        weights: Of each, above zero; only their ratios matter.
        density: Share of the entries that is kept of each, above 0 and at most 1; never less than one entry. One for
            all, or one for each: 1 for what was merged already, and would be trimmed again and again.

    Shape:
        deltas[i]: any, the same for all. Returns the same, in their dtype.

    Raises:
        ValueError: There is nothing to merge, an argument does not fit, or a number is out of range.
    """
    densities = list(density) if isinstance(density, Sequence) else [density] * len(deltas)
    _check(deltas, weights, densities)
    thresholds = [_threshold(delta, share) for delta, share in zip(deltas, densities, strict=True)]
    total = torch.zeros_like(wider(deltas[0]))
    for delta, weight, threshold in zip(deltas, weights, thresholds, strict=True):
        total += weight * _trim(delta, threshold)
    positive = total >= 0
    total, share = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight, threshold in zip(deltas, weights, thresholds, strict=True):
        trimmed = _trim(delta, threshold)
        agrees = torch.where(positive, trimmed > 0, trimmed < 0).to(total.dtype)
        total += weight * trimmed * agrees
        share += weight * agrees
    return torch.where(share > 0, total / share, 0).to(deltas[0].dtype)


def _threshold(delta: Tensor, density: float) -> Tensor:
    """Return the smallest absolute value that is kept."""
    kept = max(1, round(density * delta.numel()))
    return delta.abs().flatten().topk(kept, sorted=False).values.min()


def _trim(delta: Tensor, threshold: Tensor) -> Tensor:
    return wider(torch.where(delta.abs() >= threshold, delta, 0))


def _check(deltas: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float]) -> None:
    if not deltas or not deltas[0].numel():
        raise ValueError("deltas holds nothing to merge; pass at least one tensor with entries")
    if len(weights) != len(deltas):
        raise ValueError(f"weights has length {len(weights)} for {len(deltas)} deltas; pass one for each")
    if len(densities) != len(deltas):
        raise ValueError(
            f"density has length {len(densities)} for {len(deltas)} deltas; pass one for each, or a number"
        )
    for index, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        if delta.shape != deltas[0].shape or delta.dtype != deltas[0].dtype or not delta.is_floating_point():
            raise ValueError(
                f"deltas[{index}] is {delta.dtype} of shape {tuple(delta.shape)}, deltas[0] {deltas[0].dtype} of shape "
                f"{tuple(deltas[0].shape)}; pass changes of one matrix, in one floating-point dtype"
            )
        check_number(f"weights[{index}]", weight)
    for density in densities:
        check_number("density", density)
        if density > 1:
            raise ValueError(f"density={density!r} is more than everything; use 0 < density <= 1")
