"""Small banks for tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memzoo.layers import ClusterTree
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.memory_bank import MemoryBank

BRANCHING, WIDTH = 3, 5
PATH = torch.tensor([[0, 1, 4]])
COARSE, FINE = Node(1, 0), Node(2, 1)  # what is on it


def tree(seed: int = 0, depth: int = 3, branching: int = BRANCHING) -> ClusterTree:
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(branching**level, WIDTH, generator=generator) for level in range(1, depth + 1)]
    return ClusterTree([torch.nn.functional.normalize(level, dim=-1) for level in levels])


def layout(**changes: Any) -> BankLayout:
    return BankLayout(**dict(num_layers=2, dim=8, rows=(3, 2, 0), branching=BRANCHING, dtype=torch.float32) | changes)


def random_block(shape: BankLayout, node: Node, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 100 * node.level + node.node)
    return torch.randn(shape.block_shape(node.level), generator=generator).to(shape.dtype)


def every_node(shape: BankLayout, *, generic: bool = True) -> list[Node]:
    return [Node(level, node) for level in shape.levels for node in range(shape.num_nodes(level) + generic)]


def filled(
    path: Path | None = None, seed: int = 0, cache_bytes: Any = 2**20, copy_bytes: int = 0, **changes: Any
) -> MemoryBank:
    """A bank all of whose blocks are random."""
    shape = layout(**changes)
    bank = MemoryBank.create(tree(depth=shape.depth), shape, path=path, cache_bytes=cache_bytes, copy_bytes=copy_bytes)
    bank.put({node: random_block(shape, node, seed) for node in every_node(shape)})
    bank.commit()
    return bank


def embeddings(count: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def both(bank: MemoryBank, value: float) -> dict[Node, torch.Tensor]:
    return {node: torch.full(bank.layout.block_shape(node.level), value) for node in (COARSE, FINE)}


def values(bank: MemoryBank, **options: Any) -> list[float]:
    return [float(block.view(-1)[0]) for block in bank.fetch(PATH, **options).blocks]
