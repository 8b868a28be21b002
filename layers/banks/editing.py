"""Changes of a whole bank: places for new children, merging what was trained apart, copies."""

import secrets
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memzoo.layers.banks.disk_files import sync_folder
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import Mark
from memzoo.layers.cluster_tree import ClusterTree

if TYPE_CHECKING:
    from memzoo.layers.memory_bank import MemoryBank


def descendants(branching: int, depth: int, root: Node) -> list[Node]:
    """Return a node and all below it, level by level."""
    nodes = []
    for level in range(root.level, depth + 1):
        count = branching ** (level - root.level)
        nodes += [Node(level, node) for node in range(root.node * count, (root.node + 1) * count)]
    return nodes


def subtree_nodes(layout: BankLayout, subtree: int) -> list[Node]:
    """Return the nodes below a child of the root, itself among them; of number ``branching``, the generic ones."""
    if subtree == layout.branching:
        return [Node(level, layout.num_nodes(level)) for level in range(1, layout.depth + 1)]
    return descendants(layout.branching, layout.depth, Node(1, subtree))


def free_child(
    tree: ClusterTree, level: int, node: int, marks: Callable[[int], Tensor], uncommitted: Container[Node]
) -> Node:
    """Find a child that was deleted or that nothing is routed to, with no block in it or below it.

    Args:
        tree: The tree.
        level: Of the parent, 0 for the root.
        node: Number of the parent.
        marks: Returns those of a level.
        uncommitted: Nodes with blocks that are not marked yet.

    Raises:
        ValueError: There is no such node, or it has no such child.
    """
    if not 0 <= level < tree.depth or not 0 <= node < tree.branching**level:
        raise ValueError(
            f"level={level}, node={node} is no node that has children; use levels 0 (the root, node 0) to "
            f"{tree.depth - 1}"
        )
    first = node * tree.branching
    remedy = f"delete one with its subtree, or make room: bank.copy_to(path, branching={tree.branching + 1})"
    for number in range(tree.branching):
        child = Node(level + 1, first + number)
        deleted = int(marks(child.level)[child.node]) & Mark.DELETED
        if not deleted and not tree.repeated[level][child.node]:
            continue
        if not any(_is_in_use(own, marks, uncommitted) for own in descendants(tree.branching, tree.depth, child)):
            return child
        remedy = f"empty what is below child {child.node}: bank.delete({child.level}, {child.node}, subtree=True)"
    raise ValueError(f"node={node} of level {level} has no place for another child; {remedy}")


def _is_in_use(node: Node, marks: Callable[[int], Tensor], uncommitted: Container[Node]) -> bool:
    return bool(int(marks(node.level)[node.node]) & (Mark.WRITTEN | Mark.BLOCKED)) or node in uncommitted


def with_child(tree: ClusterTree, nodes: Sequence[Node], centroid: Tensor) -> ClusterTree:
    """Return a tree in which a child and its descendants have another centroid.

    Args:
        tree: The tree.
        nodes: The child, and its descendants.
        centroid: (width,).

    Raises:
        ValueError: ``centroid`` does not fit, is not finite, or is that of another child.
    """
    if centroid.shape != (tree.width,) or not centroid.is_floating_point() or not centroid.isfinite().all():
        raise ValueError(
            f"centroid has shape {tuple(centroid.shape)} and dtype {centroid.dtype}; it must be finite floating point "
            f"numbers, ({tree.width},), a mean of L2-normalised embeddings"
        )
    centroids = [level.clone() for level in tree.centroids]
    new, child = centroid.detach().to(centroids[0]), nodes[0]
    first = child.node - child.node % tree.branching
    for sibling in range(first, first + tree.branching):
        if sibling != child.node and torch.equal(centroids[child.level - 1][sibling], new):
            raise ValueError(
                f"centroid is that of node {sibling} of level {child.level}: no context could choose between them; use "
                f"another"
            )
    for node in nodes:
        centroids[node.level - 1][node.node] = new
    return ClusterTree(centroids)


def check_part(bank: "MemoryBank", subtree: int, part: "MemoryBank") -> None:
    """Require a part to be merged to belong to a bank.

    Raises:
        ValueError: It does not, or there is no such subtree.
    """
    branching = bank.layout.branching
    if isinstance(subtree, bool) or not isinstance(subtree, int) or not 0 <= subtree <= branching:
        raise ValueError(
            f"parts has subtree={subtree!r}; use 0 to {branching - 1}, the children of the root, or {branching} for "
            f"the generic blocks"
        )
    if part is bank or (bank.path is not None and part.path == bank.path):
        raise ValueError(f"parts[{subtree}] is the bank itself; pass a copy that was trained")
    for name in ("layout", "seed"):
        if getattr(part, name) != getattr(bank, name):
            raise ValueError(
                f"parts[{subtree}] has {name}={getattr(part, name)}, the bank {getattr(bank, name)}; merge copies of "
                f"one bank"
            )
    if part.tree.fingerprint != bank.tree.fingerprint:
        raise ValueError(f"parts[{subtree}] has another tree than the bank; merge copies of one bank")


@contextmanager
def folder_in_one(path: Path | None) -> Iterator[Path | None]:
    """Give a folder to fill that takes its place at the end, or is removed if something fails; None as it is.

    Raises:
        ValueError: There is something at ``path``.
    """
    if path is None:
        yield None
        return
    if path.exists():
        raise ValueError(f"path={str(path)!r} exists; choose a new folder for the copy")
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        partial.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def widened(tree: ClusterTree, branching: int) -> ClusterTree:
    """Return a tree in which every node has more children; nothing is routed to the new ones.

    Raises:
        ValueError: ``branching`` is less than the tree's.
    """
    if branching < tree.branching:
        raise ValueError(f"branching={branching} is less than the tree's {tree.branching}; use as many, or more")
    centroids, numbers = [], torch.zeros(1, dtype=torch.int64)  # of the old nodes, in the new order; repeated for room
    for level in tree.centroids:
        children = torch.arange(branching)
        children[tree.branching :] = 0  # the twin of the first child: it loses every tie
        numbers = (numbers[:, None] * tree.branching + children).flatten()
        centroids.append(level[numbers])
    return ClusterTree(centroids)


def renumbered(node: Node, branching: int, wider: int) -> Node:
    """Return where a node of a tree is in a wider one; a generic one stays behind the last."""
    if node.node == branching**node.level:
        return Node(node.level, wider**node.level)
    number, rest = 0, node.node
    for place in range(node.level):
        number += rest % branching * wider**place
        rest //= branching
    return Node(node.level, number)
