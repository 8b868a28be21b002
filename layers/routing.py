"""Routing: which memories a token goes to, and all tokens of a memory side by side, in order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buckets:
    """The tokens of every (memory, row), one bucket after another: memory by memory, in it row by row, in it in order.

    A token that goes to k memories has k copies. Only buckets that hold a token are listed; nothing is padded.

    Attributes:
        order: (copies,) where every copy comes from, an index into the flattened (tokens, k).
        place: (tokens * k,) where every copy lies; the inverse of ``order``.
        counts: Tokens of every bucket, memories first: ``counts[memory][row]``.
        row_counts: Tokens of every row.
        seen: (memories, rows), ``counts`` on the device.
        k: Copies of a token.
    """

    order: Tensor
    place: Tensor
    counts: list[list[int]]
    row_counts: list[int]
    seen: Tensor
    k: int

    @staticmethod
    def of(indices: Tensor, row_of: Tensor, num_memories: int, num_rows: int) -> "Buckets":
        """Sort the tokens of ``indices`` (tokens, k), the memories they go to, and ``row_of`` (tokens,), their rows.

        The sort is stable: a memory must read its tokens in order. Waits for the device once, for the counts.
        """
        bucket = (indices * num_rows + row_of[:, None]).flatten()
        order = torch.argsort(bucket, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        ends = torch.cat((bucket, row_of + num_memories * num_rows))
        counts = bucket.new_zeros((num_memories + 1) * num_rows).index_add_(0, ends, torch.ones_like(ends))
        counts = counts.view(-1, num_rows)
        *own, rows = counts.tolist()
        return Buckets(order, place, own, rows, counts[:-1], indices.shape[1])

    def take(self, x: Tensor) -> Tensor:
        """(tokens, ...) -> (copies, ...), every token copied into its buckets."""
        copies: Tensor = _Copies.apply(x, self.order, self.place, self.k)
        return copies

    def put(self, y: Tensor) -> Tensor:
        """(copies, ...) -> (tokens, k, ...), every copy back at its token."""
        taken: Tensor = _Copies.apply(y, self.place, self.order, 1)
        back: Tensor = taken.unflatten(0, (-1, self.k))
        return back

    @property
    def sizes(self) -> list[int]:
        """Copies of every memory."""
        return [sum(rows) for rows in self.counts]


class _Copies(torch.autograd.Function):
    """Rows ``index // k`` of x. Both directions gather: ``inverse`` says where each copy went."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, index if k == 1 else index // k)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        d_x = d_y.index_select(0, inverse)
        return d_x if ctx.k == 1 else d_x.unflatten(0, (-1, ctx.k)).sum(1), None, None, None


def rows_of(x: Tensor, rows: int, cu_seqlens: Tensor | None) -> Tensor:
    """Return the row of every token of ``x``, (batch * time,).

    Args:
        x: (batch, time, dim).
        rows: Their number.
        cu_seqlens: (rows + 1,) borders of rows that lie end to end; None if every row is one of ``x``.
    """
    row = torch.arange(rows, device=x.device)
    if cu_seqlens is None:
        return row.repeat_interleave(x.shape[1])
    return row.repeat_interleave(cu_seqlens.diff(), output_size=x.shape[1])
