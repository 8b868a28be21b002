"""Where the blocks of a memory bank are kept, and a place in memory."""

from collections.abc import Mapping
from enum import IntFlag
from typing import Protocol

import torch
from torch import Tensor

from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.cluster_tree import ClusterTree


class Mark(IntFlag):
    """What is noted of a node. Without any mark it is as it was created: its block is the initial one, adding nothing.

    WRITTEN: its block is kept. BLOCKED: it is not to be read. DELETED: its block was overwritten, and it is not to be
    read; a child may be added in its place.
    """

    WRITTEN = 1
    BLOCKED = 2
    DELETED = 4


class NotWrittenError(ValueError):
    """A block was asked for that was never written, or that was deleted."""


class BlockStorage(Protocol):
    """Keeps blocks and marks. What is written is there as a whole or not at all.

    Attributes:
        layout: Of the blocks.
        tree: Whose nodes own them.
        seed: Of the initial blocks.
        device: Where blocks are returned.
    """

    layout: BankLayout
    tree: ClusterTree
    seed: int
    device: torch.device

    def marks(self, level: int) -> Tensor:
        """Return the marks of a level's nodes and, last, of its generic block, (num_nodes + 1,) uint8."""

    def read(self, node: Node) -> Tensor:
        """Return a written block, of ``layout.block_shape`` and ``layout.dtype``; not to change.

        Raises:
            NotWrittenError: There is none.
        """

    def write(
        self,
        blocks: Mapping[Node, Tensor],
        marks: Mapping[Node, int] | None = None,
        tree: ClusterTree | None = None,
    ) -> None:
        """Keep blocks, marking their nodes as written, then set marks, and the tree, in one."""

    def close(self) -> None:
        """Let go of files."""


def check_tree(tree: ClusterTree, layout: BankLayout) -> None:
    """Require a tree with a level for each of the layout's, and as many children of a node.

    Raises:
        ValueError: It has others.
    """
    if (tree.branching, tree.depth) != (layout.branching, layout.depth):
        raise ValueError(
            f"tree has {tree.depth} levels of branching={tree.branching}, the layout rows={layout.rows} and "
            f"branching={layout.branching}; give rows for every level of the tree, and its branching"
        )


class RamStorage:
    """Blocks in memory, of those nodes that were ever written.

    Args:
        layout: Of the blocks.
        tree: Whose nodes own them.
        seed: Of the initial blocks.
        device: Where they are kept.
    """

    def __init__(
        self, layout: BankLayout, tree: ClusterTree, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.layout, self.tree, self.seed, self.device = layout, tree, seed, torch.device(device)
        self._blocks: dict[Node, Tensor] = {}
        self._marks = {
            level: torch.zeros(layout.num_nodes(level) + 1, dtype=torch.uint8) for level in range(1, layout.depth + 1)
        }

    def marks(self, level: int) -> Tensor:
        return self._marks[level]

    def read(self, node: Node) -> Tensor:
        block = self._blocks.get(node)
        if block is None:
            raise NotWrittenError(f"node={node.node} of level {node.level} was never written, or was deleted")
        return block

    def write(
        self,
        blocks: Mapping[Node, Tensor],
        marks: Mapping[Node, int] | None = None,
        tree: ClusterTree | None = None,
    ) -> None:
        for node, block in blocks.items():
            with torch.inference_mode(False):  # whoever reads it may want gradients
                self._blocks[node] = block.detach().to(self.device, self.layout.dtype, copy=True)
            self._marks[node.level][node.node] |= int(Mark.WRITTEN)
        for node, mark in (marks or {}).items():
            self._marks[node.level][node.node] = int(mark)
            if not mark & Mark.WRITTEN:
                self._blocks.pop(node, None)
        self.tree = self.tree if tree is None else tree

    def close(self) -> None:
        """Nothing to let go of."""
