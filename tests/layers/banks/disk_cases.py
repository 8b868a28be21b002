"""A small bank on disk, and commits to it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from memzoo.layers.banks.disk import DiskStorage
from memzoo.layers.banks.disk_files import BlockFile
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import BlockStorage, Mark
from memzoo.layers.cluster_tree import ClusterTree

LAYOUT = BankLayout(num_layers=2, dim=8, rows=(3, 2, 0), branching=3)
A, B, C = Node(1, 0), Node(1, 2), Node(2, 7)
GENERIC = Node(2, 9)
NODES = [Node(level, node) for level in LAYOUT.levels for node in range(LAYOUT.num_nodes(level) + 1)]
Contents = tuple[tuple[bytes, ...], Mapping[Node, bytes], str]


def tree(seed: int = 0) -> ClusterTree:
    generator = torch.Generator().manual_seed(seed)
    return ClusterTree([torch.randn(3**level, 4, generator=generator) for level in (1, 2, 3)])


def block(node: Node, number: int, layout: BankLayout = LAYOUT) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + 100 * node.level + node.node)
    return torch.randn(layout.block_shape(node.level), generator=generator).to(layout.dtype)


def new(path: Path, layout: BankLayout = LAYOUT) -> DiskStorage:
    return DiskStorage.create(path, layout, tree(), seed=5)


def first_commit(storage: BlockStorage) -> None:
    storage.write({A: block(A, 1), B: block(B, 1), GENERIC: block(GENERIC, 1)}, {C: Mark.BLOCKED})


def second_commit(storage: BlockStorage) -> None:
    """One of everything: a block replaced, one new, one deleted, one only blocked, another tree."""
    storage.write({A: block(A, 2), C: block(C, 2)}, {B: Mark.DELETED, Node(3, 5): Mark.BLOCKED}, tree(1))


def contents(storage: BlockStorage) -> Contents:
    """All that a storage holds, to compare."""
    marks = [storage.marks(level) for level in range(1, LAYOUT.depth + 1)]
    written = [node for node in NODES if int(marks[node.level - 1][node.node]) & Mark.WRITTEN]
    blocks = {node: storage.read(node).view(torch.uint8).numpy().tobytes() for node in written}
    return tuple(level.numpy().tobytes() for level in marks), blocks, storage.tree.fingerprint


def raw(disk: DiskStorage, node: Node) -> bytes:
    start = node.node * 4096
    return (disk.path / f"level_{node.level}.blocks").read_bytes()[start : start + LAYOUT.block_bytes(node.level)]


def flip(disk: DiskStorage, node: Node, place: int) -> None:
    """Change one bit of a block."""
    with BlockFile(disk.path / f"level_{node.level}.blocks", writable=True) as file:
        file.write(bytes([raw(disk, node)[place] ^ 1]), node.node * 4096 + place)
