"""What was fetched from a memory bank for a batch, and what one layer of a model reads of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from memzoo.layers.banks.layout import BankLayout, Node

Slabs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Group:
    """A node's memory in one layer, and the rows of the batch that read it.

    Attributes:
        level: Of the node.
        slabs: The matrices of ``BankLayout.slabs``, each (rows of the level, width).
        rows: (readers,) int64, rows of the batch; None where all read it.
    """

    level: int
    slabs: Slabs
    rows: Tensor | None


@dataclass(frozen=True)
class LayerMemories:
    """What one layer reads of what was fetched.

    Attributes:
        layout: Of the bank.
        groups: Its memories, coarse levels first.
        batch_size: Rows of the batch that they were fetched for.
    """

    layout: BankLayout
    groups: tuple[Group, ...]
    batch_size: int

    @property
    def is_shared(self) -> bool:
        """Whether every row of the batch reads the same blocks."""
        return all(group.rows is None for group in self.groups)


@dataclass(frozen=True)
class Fetched:
    """The blocks that the rows of a batch read, each distinct one once.

    Attributes:
        layout: Of the bank.
        nodes: Of the blocks, coarse levels first.
        blocks: Theirs, each ``layout.block_shape(level)``. They may be leaves that require gradients, from before the
            first call of ``layers``.
        readers: Rows of the batch that read each block, (readers,) int64 each; None where all do.
        batch_size: Rows of the batch.
    """

    layout: BankLayout
    nodes: tuple[Node, ...]
    blocks: tuple[Tensor, ...]
    readers: tuple[Tensor | None, ...]
    batch_size: int

    @classmethod
    def of(cls, layout: BankLayout, paths: Tensor, block: Callable[[Node], Tensor | None]) -> Self:
        """Gather the blocks on some paths.

        Args:
            layout: Of the bank.
            paths: The node of every level, (batch, depth); the number of a level's nodes stands for its generic block.
            block: Returns a node's block, or None where it has none to read.
        """
        nodes, blocks, readers = [], [], []
        for level in layout.levels:
            found, where = paths[:, level - 1].cpu().unique(return_inverse=True)
            for number, node in enumerate(found.tolist()):
                if (own := block(Node(level, node))) is not None:
                    nodes.append(Node(level, node))
                    blocks.append(own)
                    readers.append(None if len(found) == 1 else (where == number).nonzero().squeeze(-1).to(own.device))
        return cls(layout, tuple(nodes), tuple(blocks), tuple(readers), len(paths))

    def layers(self) -> tuple[LayerMemories, ...]:
        """Return what each layer reads, in order. They are views of the blocks, made once."""
        made: tuple[LayerMemories, ...] | None = self.__dict__.get("_layers")
        if made is None:
            # Whoever asks first may do so without gradients, and the next one want them.
            with torch.inference_mode(False), torch.enable_grad():
                made = tuple(map(self._layer, range(self.layout.num_layers)))
            object.__setattr__(self, "_layers", made)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views: copies make their own, of copied blocks."""
        return {name: value for name, value in self.__dict__.items() if name != "_layers"}

    def _layer(self, index: int) -> LayerMemories:
        groups = tuple(
            Group(node.level, self.layout.split(block[index], node.level), rows)
            for node, block, rows in zip(self.nodes, self.blocks, self.readers, strict=True)
        )
        return LayerMemories(self.layout, groups, self.batch_size)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move and cast the blocks; each is copied once, not at all where nothing changes."""
        blocks = tuple(block.to(device=device, dtype=dtype) for block in self.blocks)
        readers = tuple(rows if rows is None else rows.to(device) for rows in self.readers)
        return replace(self, blocks=blocks, readers=readers)

    @property
    def nbytes(self) -> int:
        """Count the bytes of the blocks."""
        return sum(block.nbytes for block in self.blocks)
