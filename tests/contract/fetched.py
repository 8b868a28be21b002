"""Layers and a model that read memories in every call, for the contract: their blocks are parameters of their own."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.arch import HierarchicalMemoryLM
from memzoo.layers import BankLayout, LayerMemories, MemoryAttention, MemoryFeedForward, Node, SwiGLU
from memzoo.layers.banks.fetched import Group


class Memory(nn.Module):
    """A block a level, which all rows read."""

    def __init__(self, layout: BankLayout) -> None:
        super().__init__()
        self.layout = layout
        blocks = (layout.initial_block(Node(level, 0), seed=0) for level in layout.levels)
        self.blocks = nn.ParameterList(map(nn.Parameter, blocks))

    def forward(self, layer: int, batch: int) -> LayerMemories:
        """Return what a layer reads for so many rows."""
        split = self.layout.split
        groups = [
            Group(level, split(block[layer], level), None)
            for level, block in zip(self.layout.levels, self.blocks, strict=True)
        ]
        return LayerMemories(self.layout, tuple(groups), batch)


class ReadingFeedForward(MemoryFeedForward):
    """A SwiGLU with hidden units fetched for it."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(SwiGLU(dim, multiple_of=8), **options)
        self.memory = Memory(BankLayout(1, dim, (3, 2), branching=2, dtype=torch.float32))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return super().forward(x, self.memory(0, len(x)), *args, **options)


class ReadingAttention(MemoryAttention):
    """Attention with keys and values, or patches, fetched for it."""

    def __init__(self, dim: int, *, kind: Any) -> None:
        super().__init__(dim, num_heads=2, head_dim=6)
        sizes: dict[str, Any] = {"attention_dim": 12, "num_heads": 2, "dtype": torch.float32}
        self.memory = Memory(BankLayout(1, dim, (3, 2), branching=2, kind=kind, **sizes))

    def forward(self, x: Tensor, state: Any = None, **options: Any) -> Any:
        return super().forward(x, state, memories=self.memory(0, len(x)), **options)


class ReadingLM(HierarchicalMemoryLM):
    """The tiny model with memories fetched for every block."""

    def __init__(self, vocab_size: int = 256, dim: int = 16, depth: int = 2, **options: Any) -> None:
        super().__init__(vocab_size, dim, depth, num_heads=2, hidden_dim=24, **options)
        self.memory = Memory(self.layout((3, 2), branching=2, dtype=torch.float32))

    def forward_features(self, tokens: Tensor, state: Any = None, *, memories: None = None, **options: Any) -> Any:
        reads = [{"memories": self.memory(index, len(tokens))} for index in range(len(self.blocks))]
        absent = {"mask": None, "doc_ids": None, "trace": None, "donate": False}
        return self.read(tokens, state, **absent | options, options=reads)
