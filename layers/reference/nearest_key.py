"""Nearest key, one query, one codebook and one key at a time. Slow, and the definition of what is right."""

import math

import torch
from torch import Tensor


def nearest_key(
    queries: Tensor, keys: Tensor, *, topk: int = 1, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the ``topk`` keys nearest to each query, of equally near ones those with the lowest index first.

        d(c, j) = sum_i (q_ci - k_cji)^2

    A codebook that allows no key allows all; one that allows fewer than ``topk`` gives -1, at distance infinity, after
    them.

    Shape:
        queries: (..., codebooks, dim_key). keys: (codebooks, pairs, dim_key). allowed: (codebooks, pairs) bool.
        Returns indices (..., codebooks, topk), int64, and squared distances (..., codebooks, topk).
    """
    codebooks, pairs, dim_key = keys.shape
    flat = queries.detach().reshape(-1, codebooks, dim_key)
    indices = torch.zeros(len(flat), codebooks, topk, dtype=torch.int64)
    distances = torch.zeros(len(flat), codebooks, topk, dtype=queries.dtype)
    for row, heads in enumerate(flat):
        for c in range(codebooks):
            open_to = [j for j in range(pairs) if allowed is None or allowed[c, j]] or [*range(pairs)]
            measured = [(float((heads[c] - keys[c, j]).square().sum()), j) for j in open_to]
            nearest = sorted(measured)[:topk]
            nearest += [(math.inf, -1)] * (topk - len(nearest))
            for place, (distance, j) in enumerate(nearest):
                indices[row, c, place], distances[row, c, place] = j, distance
    return indices.view(*queries.shape[:-1], topk), distances.view(*queries.shape[:-1], topk)
