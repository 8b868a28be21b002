"""A tree of clusters: embeddings find their way from the root to a leaf.

Pretraining with hierarchical memories (arXiv 2510.02375, section 2 and its appendix): balanced k-means, node by node,
and a greedy descent. The nodes on a path name the memories that a document reads. The tree is fitted once, and not
learned with the model.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_positive
from memzoo.layers.ops.precision import no_autocast, wider

_FORMAT = "memzoo cluster tree, version 1"
_GATHERED = 2**22  # numbers of centroids gathered at once, 16 MB in float32


class ClusterTree:
    """Centroids of every level of a tree in which each node has ``branching`` children.

    Levels count from 1, the children of the root. Nodes of a level count from 0, so that the children of node ``i`` are
    ``i * branching`` to ``(i + 1) * branching - 1`` of the next level. A tree is on the CPU and does not change.

    Args:
        centroids: Of every level, from the first. They are held in at least float32, and never normalised.

    Shape:
        centroids[l - 1]: (branching ** l, width).

    Attributes:
        centroids: As given.
        branching: Children of a node.
        depth: Levels.
        width: Of an embedding.

    Raises:
        ValueError: The levels do not fit together, or hold what is not a finite number.
    """

    def __init__(self, centroids: Sequence[Tensor]) -> None:
        if not centroids:
            raise ValueError("centroids=() holds no level; pass one tensor a level, or use ClusterTree.fit(embeddings)")
        self.centroids = tuple(_matrix(f"centroids[{i}]", level) for i, level in enumerate(centroids))
        self.depth, (self.branching, self.width) = len(centroids), self.centroids[0].shape
        if self.branching < 2:
            raise ValueError(f"centroids[0] has {self.branching} rows; the root needs at least two children")
        for level, tensor in enumerate(self.centroids, start=1):
            if tensor.shape != (self.branching**level, self.width):
                raise ValueError(
                    f"centroids[{level - 1}] has shape {tuple(tensor.shape)}; with {self.branching} children a node "
                    f"and width {self.width}, level {level} must be {(self.branching**level, self.width)}"
                )

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        embeddings: Tensor,
        *,
        branching: int = 16,
        depth: int = 4,
        max_share: float | None = None,
        steps: int = 20,
        sample: int = 6400,
        seed: int = 0,
    ) -> Self:
        """Cluster embeddings, from the root to the leaves, each node among the rows that are routed to it.

        A node starts from k-means++ and takes ``steps`` steps of expectation-maximisation, each on rows it has not seen
        until it has seen all. In every step, a cluster that holds more than ``max_share`` of the sample hands half of
        it, drawn at random, to the smallest. That balances what centroids are means of; routing itself has no bound.

        A node with no more rows than children makes each row a centroid, and repeats them for the children that are
        left; one without rows repeats its own. Repeated centroids lose every tie, so nothing is routed there.

        Args:
            embeddings: One row for each document; rows are L2-normalised first.
            branching: Children of a node.
            depth: Levels.
            max_share: From 1 / branching to 1, which is no balancing. None is 1.5 / branching, the paper's.
            steps: Of expectation-maximisation.
            sample: Rows of a step.
            seed: Of all that is drawn; the global random state is neither read nor changed.

        Shape:
            embeddings: (rows, width).

        Raises:
            ValueError: An argument is out of range, or ``embeddings`` has no rows or is not finite.
        """
        for name, value in dict(branching=branching, depth=depth, steps=steps, sample=sample).items():
            check_positive(name, value)
        if branching < 2:
            raise ValueError(f"branching={branching} makes a chain, not a tree; use branching >= 2")
        if sample < branching:
            raise ValueError(f"sample={sample} is too small to start branching={branching} clusters; use a larger one")
        share = 1.5 / branching if max_share is None else max_share
        if max_share is not None and not 1 / branching <= max_share <= 1:
            raise ValueError(f"max_share={max_share!r} is not within 1 / branching={1 / branching:.4g} and 1; use one")
        points = F.normalize(_matrix("embeddings", embeddings), dim=-1)
        if not len(points):
            raise ValueError(f"embeddings has shape {tuple(points.shape)}: no rows; pass at least one")

        generator = torch.Generator().manual_seed(seed)
        nodes = torch.zeros(len(points), dtype=torch.int64)
        levels, parents = [], points.new_zeros(1, points.shape[1])
        for _ in range(depth):
            members = nodes.argsort(stable=True).split(nodes.bincount(minlength=len(parents)).tolist())
            level = []
            for parent, rows in zip(parents, members, strict=True):
                if len(rows) > branching:
                    level.append(_k_means(points, rows, branching, share, steps, sample, generator))
                else:
                    own = points[rows] if len(rows) else parent.unsqueeze(0)
                    level.append(own[torch.arange(branching) % len(own)])
            parents = torch.cat(level)
            levels.append(parents)
            nodes = nearest_children(points, nodes, parents, branching)
        return cls(levels)

    @torch.no_grad()
    def route(
        self,
        embeddings: Tensor,
        *,
        blocked: Mapping[int, Tensor] | None = None,
        keep: Tensor | None = None,
        margin: float = 0.1,
    ) -> Tensor:
        """Descend to the nearest child, level by level: ``depth * branching`` distances a row.

        The leaf need not be the nearest of all leaves. Rows are L2-normalised first; of children as near as each other
        the first is taken.

        Args:
            embeddings: One row for each document, on any device.
            blocked: By level, the nodes to pass over: the next nearest child is taken.
            keep: Paths to stay on, for a text that goes on: at each level, a row leaves its node for a child of the
                same parent only if that is nearer by ``margin``. Numbers that name no node keep nothing.
            margin: From 0 to below 1, of the distance to the node that is left.

        Shape:
            embeddings: (batch, width). blocked[l]: (branching ** l,) booleans. keep: (batch, depth) int64. Returns
            (batch, depth) int64, nested: the node of level l is ``paths[:, -1] // branching ** (depth - l)``.

        Raises:
            ValueError: ``embeddings`` does not fit or is not finite, ``blocked`` or ``keep`` does not fit, ``margin``
                is out of range, or a row comes to a node whose children are all blocked.
        """
        x = F.normalize(_matrix("embeddings", embeddings), dim=-1)
        if x.shape[1] != self.width:
            raise ValueError(
                f"embeddings has shape {tuple(x.shape)}: its width is {x.shape[1]}, the tree was fitted on "
                f"{self.width}; use the embedder that it was fitted with"
            )
        masks = self._masks(blocked or {})
        if not 0 <= margin < 1:
            raise ValueError(f"margin={margin!r} is not in [0, 1); use 0 to leave a node for any that is nearer")
        if keep is not None and keep.shape != (len(x), self.depth):
            raise ValueError(f"keep has shape {tuple(keep.shape)}; it must be (batch, depth), {(len(x), self.depth)}")
        nodes, path = torch.zeros(len(x), dtype=torch.int64), []
        for level, centroids in enumerate(self.centroids, start=1):
            mask = masks.get(level)
            if mask is not None:
                self._check_ways_on(level, nodes, mask)
            kept = None if keep is None else keep[:, level - 1].cpu()
            nodes = nearest_children(x, nodes, centroids, self.branching, mask, kept, margin)
            path.append(nodes)
        return torch.stack(path, dim=-1).to(embeddings.device)

    def num_nodes(self, level: int) -> int:
        """Count the nodes of a level.

        Raises:
            ValueError: There is no such level.
        """
        if not 1 <= level <= self.depth:
            raise ValueError(f"level={level} is not in the tree; use 1 to depth={self.depth}")
        return int(self.branching**level)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the centroids: what was trained with one tree must not be read with another."""
        digest = hashlib.sha256(_FORMAT.encode())
        for level in self.centroids:
            digest.update(f"{level.dtype} {tuple(level.shape)}".encode())
            digest.update(level.numpy().data)
        return digest.hexdigest()

    @cached_property
    def repeated(self) -> tuple[Tensor, ...]:
        """By level, which nodes have the centroid of an earlier sibling: it wins every tie, so nothing is routed there.

        Shape:
            repeated[l - 1]: (branching ** l,) booleans.
        """
        found = []
        for centroids in self.centroids:
            siblings = centroids.view(-1, self.branching, self.width)
            first = siblings[..., 0]
            pairs = (
                (first.unsqueeze(-1) == first.unsqueeze(-2)).tril(-1).nonzero()
            )  # few: only these are compared whole
            parent, later, earlier = pairs.unbind(-1)
            equal = (siblings[parent, later] == siblings[parent, earlier]).all(-1)
            mask = torch.zeros(first.shape, dtype=torch.bool)
            mask[parent[equal], later[equal]] = True
            found.append(mask.flatten())
        return tuple(found)

    def save(self, path: str | Path) -> None:
        """Write the centroids to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        levels = {f"level_{level}": tensor for level, tensor in enumerate(self.centroids, start=1)}
        try:
            save_file(levels, partial, metadata={"format": _FORMAT, "fingerprint": self.fingerprint})
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that ``save`` wrote, bit for bit.

        Raises:
            ValueError: The file holds no tree, or is not as it was written.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except SafetensorError as error:
            raise ValueError(
                f"path={str(path)!r} is not a saved tree ({error}); write it with tree.save(path)"
            ) from error
        if facts.get("format") != _FORMAT:
            raise ValueError(f"path={str(path)!r} holds no {_FORMAT}; write it with tree.save(path)")
        tree = cls([tensors[f"level_{level}"] for level in range(1, len(tensors) + 1)])
        if tree.fingerprint != facts["fingerprint"]:
            raise ValueError(
                f"path={str(path)!r} holds centroids with fingerprint {tree.fingerprint[:12]}, not the "
                f"{facts['fingerprint'][:12]} they were saved with: the file is damaged; copy it again"
            )
        return tree

    def __repr__(self) -> str:
        return f"{type(self).__name__}(branching={self.branching}, depth={self.depth}, width={self.width})"

    def _masks(self, blocked: Mapping[int, Tensor]) -> dict[int, Tensor]:
        for level, mask in blocked.items():
            if mask.shape != (self.num_nodes(level),) or mask.dtype != torch.bool:
                raise ValueError(
                    f"blocked[{level}] has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be "
                    f"({self.num_nodes(level)},) booleans, one for each node of the level"
                )
        return {level: mask.cpu() for level, mask in blocked.items()}

    def _check_ways_on(self, level: int, nodes: Tensor, mask: Tensor) -> None:
        ends = mask.view(-1, self.branching).all(-1)[nodes]
        if ends.any():
            row = int(ends.nonzero()[0])
            parent = f"node {int(nodes[row])} of level {level - 1}" if level > 1 else "the root"
            raise ValueError(
                f"blocked[{level}] holds all children of {parent}, which row {row} of embeddings comes to; free one of "
                f"them" + (", or block that node too" if level > 1 else "")
            )


def nearest_children(
    x: Tensor,
    nodes: Tensor,
    centroids: Tensor,
    branching: int,
    blocked: Tensor | None = None,
    kept: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Find the nearest child of every row's node, or the one to keep where none is nearer by the margin.

    Shape:
        x: (rows, width). nodes: (rows,), in a level. centroids: (nodes of the next level, width), and blocked of as
        many booleans. kept: (rows,), in the next level. Returns (rows,), in the next level.
    """
    offsets, found = torch.arange(branching), []
    size = max(1, _GATHERED // (branching * x.shape[1]))
    kept = torch.full_like(nodes, -1) if kept is None else kept
    for points, parents, own in zip(x.split(size), nodes.split(size), kept.split(size), strict=True):
        children = parents.unsqueeze(-1) * branching + offsets
        distances = relative_distances(points, centroids[children])
        if blocked is not None:
            distances = distances.masked_fill(blocked[children], math.inf)
        nearest = distances.argmin(-1, keepdim=True)
        stays = own.unsqueeze(-1) == children
        if stays.any():
            squared = distances + points.square().sum(-1, keepdim=True)
            bound = squared.masked_fill(~stays, math.inf).amin(-1, keepdim=True) * (1 - margin) ** 2
            stays &= (squared.gather(-1, nearest) >= bound) & bound.isfinite()
            nearest = torch.where(stays.any(-1, keepdim=True), stays.int().argmax(-1, keepdim=True), nearest)
        found.append(children.gather(-1, nearest).squeeze(-1))
    return torch.cat(found)


def relative_distances(x: Tensor, candidates: Tensor) -> Tensor:
    """Return ``|c|^2 - 2 x . c``, the squared distance without ``|x|^2``, which is common to all candidates.

    Sums rather than a matrix product: equal candidates must tie to the bit, and a row must not depend on its batch.

    Shape:
        x: (rows, width). candidates: (rows, count, width). Returns (rows, count).
    """
    return candidates.square().sum(-1) - 2 * (candidates * x.unsqueeze(-2)).sum(-1)


def balance(assigned: Tensor, count: int, max_share: float, generator: Generator) -> Tensor:
    """Split every overfull cluster, the largest first, evenly at random with the smallest of that moment.

    Of an odd number the cluster keeps the larger half. One that becomes overfull by what it is handed stays so.

    Args:
        assigned: The cluster of every point.
        count: Number of clusters.
        max_share: Of all points; a cluster with more is overfull.
        generator: Draws who goes.

    Shape:
        assigned: (points,). Returns the same, new.
    """
    assigned, sizes = assigned.clone(), assigned.bincount(minlength=count)
    overfull = sizes > max_share * len(assigned)
    for cluster in sizes.argsort(descending=True, stable=True)[: int(overfull.sum())].tolist():
        members = (assigned == cluster).nonzero().squeeze(-1)
        leaving = members[torch.randperm(len(members), generator=generator)[: len(members) // 2]]
        smallest = int(sizes.argmin())
        assigned[leaving] = smallest
        sizes[cluster] -= len(leaving)
        sizes[smallest] += len(leaving)
    return assigned


def _k_means(
    points: Tensor, rows: Tensor, count: int, max_share: float, steps: int, sample: int, generator: Generator
) -> Tensor:
    """Return the (count, width) centroids of more than ``count`` rows. A cluster left empty keeps its centroid."""
    order = rows[torch.randperm(len(rows), generator=generator)]
    window = torch.arange(min(sample, len(rows)))
    centroids = _plus_plus(points[order[window]], count, generator)
    with no_autocast(points.device):
        for step in range(steps):
            batch = points[order[(window + step * len(window)) % len(order)]]
            distances = torch.addmm(centroids.square().sum(-1), batch, centroids.T, alpha=-2)
            assigned = balance(distances.argmin(-1), count, max_share, generator)
            members = F.one_hot(assigned, count).to(batch.dtype)
            sizes = members.sum(0).unsqueeze(-1)
            centroids = torch.where(sizes > 0, members.T @ batch / sizes.clamp(min=1), centroids)
    return centroids


def _plus_plus(points: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose ``count`` points, each with a chance that grows with its squared distance to those before (k-means++)."""
    chances = points.new_ones(len(points), dtype=torch.float64)
    distances = torch.full_like(chances, math.inf)
    chosen = []
    for _ in range(count):
        point = points[torch.multinomial(chances, 1, generator=generator)]
        chosen.append(point)
        distances = distances.minimum((points - point).double().square().sum(-1))
        # Where every point has been chosen, or its twin, all are as good.
        chances = distances if distances.any() else torch.ones_like(distances)
    return torch.cat(chosen)


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """Take finite rows to the CPU and to at least float32.

    Raises:
        ValueError: They are something else.
    """
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; it must be floating point of two axes, "
            f"(rows, width)"
        )
    tensor = wider(tensor.detach().cpu()).contiguous()
    if not tensor.isfinite().all():
        row = int((~tensor.isfinite().all(-1)).nonzero()[0])
        raise ValueError(f"{name} is not finite in row {row}; leave such rows out, or embed them again")
    return tensor
