"""Routing through a tree of clusters, one row and one child at a time. Slow, and the definition of what is right.

Pretraining with hierarchical memories (arXiv 2510.02375). C_l holds the centroids of level l, branching^l rows of width
c; the children of node i of level l are the nodes i branching ... (i + 1) branching - 1 of level l + 1. With
x = embedding / |embedding|, from the root i_0 = 0 on:

    i_l = argmin over the children j of i_{l-1} of |x - C_l[j]|^2,  of equal ones the first

Where a path k is kept with a margin m: i_l = k_l if it is one of these children, not blocked, and
|x - C_l[i_l]| >= (1 - m) |x - C_l[k_l]|.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def route(
    embeddings: Tensor,
    centroids: Sequence[Tensor],
    blocked: Mapping[int, Tensor] | None = None,
    keep: Tensor | None = None,
    margin: float = 0.1,
) -> Tensor:
    """Find the path of every row.

    Args:
        embeddings: Rows, of any length.
        centroids: Of every level, from the first.
        blocked: By level from 1, which nodes are passed over.
        keep: Paths to stay on.
        margin: By which a node must be nearer than the one to stay at, relative to the distance to that.

    Shape:
        embeddings: (batch, c). centroids[l - 1]: (branching^l, c). blocked[l]: (branching^l,) booleans.
        keep: (batch, depth).
        Returns (batch, depth) int64.
    """
    branching, masks = len(centroids[0]), blocked or {}
    paths = []
    for b, row in enumerate(embeddings.double()):
        x = row / row.norm()
        path, node = [], 0
        for level, C in enumerate(centroids, start=1):
            children = range(node * branching, (node + 1) * branching)
            free = [child for child in children if level not in masks or not masks[level][child]]
            distance = {child: float((x - C[child].double()).norm()) for child in free}
            node = min(free, key=lambda child: distance[child])
            own = None if keep is None else int(keep[b, level - 1])
            if own in distance and distance[node] >= (1 - margin) * distance[own]:
                node = own
            path.append(node)
        paths.append(path)
    return torch.tensor(paths, dtype=torch.int64)
