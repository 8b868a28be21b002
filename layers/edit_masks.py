"""Edit masks: which entries of a matrix a shard of edits may change.

WISE (arXiv 2405.14768): each shard of a stream of edits learns in its own random part of the side memory, a share rho
of the entries. The parts of two shards overlap in a share rho^2, of k in rho^k (theorem 2.1), and the overlap anchors
their merge. A mask follows from its seed, so it need not be kept.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from memzoo.layers.errors import check_choice, check_number, check_positive

MaskKind = Literal["exact", "bernoulli"]

_CHUNK = 2**20  # entries drawn at once; part of what a seed means


def edit_mask(shape: Sequence[int], ratio: float, *, seed: int, kind: MaskKind = "exact") -> Tensor:
    """Draw the entries that may change. A mask of 45 million takes a core about a second, and some bytes an entry.

    Args:
        shape: Of the matrix.
        ratio: Share of the entries, rho, above 0 and at most 1.
        seed: Of the draw; the global random state is neither read nor changed.
        kind: "exact" draws ``round(ratio N)`` entries, every such set being as likely; "bernoulli" draws every entry by
            itself with probability ``ratio``, as EasyEdit does.

    Shape:
        Returns bool of ``shape``, on the CPU.

    Raises:
        ValueError: An argument is out of range.
    """
    entries = _check(shape, ratio)
    check_choice("kind", kind, get_args(MaskKind))
    generator = torch.Generator().manual_seed(seed)
    if kind == "bernoulli":
        return _each(entries, ratio, generator).view(*shape)
    return _exactly(round(ratio * entries), torch.ones(entries, dtype=torch.bool), generator).view(*shape)


def disjoint_masks(shape: Sequence[int], ratio: float, count: int, *, seed: int) -> list[Tensor]:
    """Draw several exact masks that have no entry in common; the first is that of ``edit_mask``.

    Args:
        shape: Of the matrix.
        ratio: Share of the entries in each mask; all shares together are at most 1.
        count: Number of masks.
        seed: Of all draws.

    Shape:
        Returns ``count`` times bool of ``shape``, on the CPU.

    Raises:
        ValueError: An argument is out of range, or there are not enough entries.
    """
    entries = _check(shape, ratio)
    check_positive("count", count)
    size = round(ratio * entries)
    if count * size > entries:
        raise ValueError(
            f"ratio={ratio!r} of {entries} entries cannot be drawn count={count} times without overlap; use "
            f"count * ratio <= 1, or masks that overlap"
        )
    generator = torch.Generator().manual_seed(seed)
    free, masks = torch.ones(entries, dtype=torch.bool), []
    for _ in range(count):
        mask = _exactly(size, free, generator)
        free &= ~mask
        masks.append(mask.view(*shape))
    return masks


def _exactly(size: int, free: Tensor, generator: Generator) -> Tensor:
    """Draw ``size`` of the free entries.

    Every entry is drawn by itself first; then as many of those drawn are put back as are too many, or of the others
    added as are missing. No step prefers an entry to another, so no set of this size is preferred either. A permutation
    would do the same with eight bytes an entry.
    """
    mask = free & _each(len(free), size / max(1, int(free.count_nonzero())), generator)
    surplus = int(mask.count_nonzero()) - size
    _flip(mask, mask if surplus > 0 else free ^ mask, abs(surplus), generator)
    return mask


def _each(entries: int, probability: float, generator: Generator) -> Tensor:
    """Draw every entry by itself."""
    mask = torch.empty(entries, dtype=torch.bool)
    for chunk in mask.split(_CHUNK):
        torch.lt(torch.rand(len(chunk), generator=generator), probability, out=chunk)
    return mask


def _flip(mask: Tensor, among: Tensor, count: int, generator: Generator) -> None:
    """Change ``count`` entries of ``mask``, drawn from those that are true in ``among``."""
    sizes = [int(chunk.count_nonzero()) for chunk in among.split(_CHUNK)]
    ranks = torch.empty(0, dtype=torch.int64)  # among the true ones, in their order
    while len(ranks) < count:
        drawn = torch.rand(count - len(ranks), dtype=torch.float64, generator=generator) * sum(sizes)
        ranks = torch.cat([ranks, drawn.long()]).unique()
    first = 0
    for size, own, candidates in zip(sizes, mask.split(_CHUNK), among.split(_CHUNK), strict=True):
        here = ranks[(first <= ranks) & (ranks < first + size)] - first
        chosen = candidates.nonzero().flatten()[here]
        own[chosen] = ~own[chosen]
        first += size


def _check(shape: Sequence[int], ratio: float) -> int:
    """Return how many entries there are."""
    for axis, size in enumerate(shape):
        check_positive(f"shape[{axis}]", size)
    check_number("ratio", ratio)
    if ratio > 1:
        raise ValueError(f"ratio={ratio!r} is more than everything; use 0 < ratio <= 1")
    return math.prod(shape)
