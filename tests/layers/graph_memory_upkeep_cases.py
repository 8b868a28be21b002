"""Stacks of graph memory cells, and cells with slots where they are told."""

import torch
from torch import nn

from tests.layers.graph_memory_cases import (
    DIM,
    SLOTS,
    build,
    randn,
)


class Stack(nn.Module):
    """A residual stream with one cell after the other."""

    def __init__(self, depth=2, **options):
        super().__init__()
        self.cells = nn.ModuleList(build(seed=seed, **options) for seed in range(depth))

    def forward(self, x, trace=None):
        for number, cell in enumerate(self.cells):
            x = x + cell(x, residual=x, trace=None if trace is None else trace.scope(f"cells.{number}"))
        return x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(count, seed=3):
    return nn.functional.normalize(randn(count, DIM, seed=seed), dim=-1)


def cell_at(centroids, usage=None, age=None, **options):
    """A cell whose slots are in a known condition; by default orthogonal, in use and old."""
    cell = build(num_slots=len(centroids), **options)
    with torch.no_grad():
        cell.centroids.copy_(centroids)
        cell.usage.copy_(torch.full((len(centroids),), 1 / len(centroids)) if usage is None else torch.tensor(usage))
        cell.age.copy_(torch.full((len(centroids),), 200) if age is None else torch.tensor(age))
    return cell


def orthogonal():
    return torch.linalg.qr(randn(DIM, DIM))[0][:SLOTS]
