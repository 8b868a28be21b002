"""Sparse gradients: the rows of a table with more than one axis of rows."""

from typing import Any

import torch
from torch import Tensor


class SparseRows(torch.autograd.Function):
    """``table.flatten(0, 1)`` whose backward takes a sparse gradient, as ``embedding_bag(sparse=True)`` makes.

    A view of a table refuses that. The gradient of the table has two sparse axes and one dense.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.size = table.shape
        return table.detach().flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        row, width = gradient._indices()[0], ctx.size[1]
        places = torch.stack([row.div(width, rounding_mode="floor"), row % width])
        return torch.sparse_coo_tensor(places, gradient._values(), ctx.size, check_invariants=False)
