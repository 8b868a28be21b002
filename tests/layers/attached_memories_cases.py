"""Hosts for attached memories, and what is fetched for them."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers import AttachedMemories, SwiGLU
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import BankLayout

PATHS = torch.tensor([[0, 1], [1, 3], [0, 0]])


class Stack(nn.Module):
    """Feed-forwards one after the other, on a residual stream."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(SwiGLU(8), SwiGLU(8), SwiGLU(8))


def inputs(batch: int = 3, dim: int = 8) -> Tensor:
    return torch.randn(batch, 5, dim, generator=torch.Generator().manual_seed(1))


def fetch(layout: BankLayout, paths: Tensor = PATHS, *, std: float = 0.3, fresh: bool = False) -> Fetched:
    """Blocks of normal numbers, or initial ones, in the layout's dtype."""

    def block(node: Any) -> Tensor:
        if fresh:
            return layout.initial_block(node, seed=0).to(layout.dtype)
        generator = torch.Generator().manual_seed(100 * node.level + node.node)
        return (std * torch.randn(layout.block_shape(node.level), generator=generator)).to(layout.dtype)

    return Fetched.of(layout, paths, block)


def layout_of(memories: AttachedMemories, dtype: torch.dtype = torch.float32) -> BankLayout:
    return memories.layout((4, 2), branching=2, dtype=dtype)


class Odd(nn.Module):
    """A feed-forward that nobody recognises; called by keyword, it returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)

    def forward(self, *, hidden: Tensor) -> tuple[Tensor, str]:
        return self.outer(self.inner(hidden).relu()), "more"
