"""Packing: masks and documents, turned into rows that start at the left and end where they end.

A masked token must not exist for a layer, and documents packed in one row must not see each other. Both are one
operation: gather each document's real tokens into a row of its own (``Ragged``), run the layer on those rows, and put
its outputs back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """A batch of rows cut out of a (batch, time) grid.

    Attributes:
        index: (rows, length) position in the flattened grid of every slot; slots past a row's end repeat position 0.
        lengths: (rows,) real tokens of each row; may be 0.
        owner: (rows,) the batch row each was cut from; rows of one owner are in order.
        last: (batch,) the last row of each batch row: its state is the one to carry on.
        inverse: (batch, time) position of every token in the flattened (rows, length) slots; 0 where masked.
        real: (batch, time) bool, tokens that exist; None if all do.
        first_document: (rows,) whether the row is the first of its owner, and so may continue a passed state.
        document: (rows,) id of the row's document; 0 without ``doc_ids`` or where the row is empty.
    """

    index: Tensor
    lengths: Tensor
    owner: Tensor
    last: Tensor
    inverse: Tensor
    real: Tensor | None
    first_document: Tensor
    document: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """(batch, time, ...) -> (rows, length, ...), zeros past a row's end: no NaN of a masked token travels."""
        out = x.flatten(0, 1)[self.index]
        inside = torch.arange(self.index.shape[1], device=x.device) < self.lengths[:, None]
        return out.masked_fill(~_like(inside, out), 0)

    def scatter(self, y: Tensor) -> Tensor:
        """(rows, length, ...) -> (batch, time, ...), zeros at masked tokens."""
        out = y.flatten(0, 1)[self.inverse]
        if self.real is None:
            return out
        return out.masked_fill(~_like(self.real, out), 0)


def left_align(mask: Tensor) -> Ragged:
    """Rows of the real tokens alone, one a batch row. Shapes are static, so this compiles.

    Args:
        mask: (batch, time) bool, True at real tokens.
    """
    batch, time = mask.shape
    lengths = mask.sum(1)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    rows = torch.arange(batch, device=mask.device)
    slot = (mask.cumsum(1) - 1).clamp_min(0)
    return Ragged(
        index=order + rows[:, None] * time,
        lengths=lengths,
        owner=rows,
        last=rows,
        inverse=slot + rows[:, None] * time,
        real=mask,
        first_document=torch.ones_like(rows, dtype=torch.bool),
        document=torch.zeros_like(rows),
    )


def split_documents(doc_ids: Tensor, mask: Tensor | None = None) -> Ragged:
    """Rows of one document each. A document is a run of equal ids among a row's real tokens.

    The number of rows is the number of documents, known only from the data. A batch row without real tokens keeps one
    empty row, so that it keeps its state.

    Args:
        doc_ids: (batch, time) integers.
        mask: (batch, time) bool, True at real tokens; None if all are.
    """
    batch, time = doc_ids.shape
    device = doc_ids.device
    real = torch.ones_like(doc_ids, dtype=torch.bool) if mask is None else mask
    # Each real token is compared with the real token before it, however many masked ones lie between.
    aligned = left_align(real)
    ids = doc_ids.flatten()[aligned.index]
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    exists = torch.arange(time, device=device) < aligned.lengths[:, None]
    starts &= exists
    starts[:, 0] = True  # an empty batch row still owns one row
    row_of = starts.flatten().cumsum(0) - 1  # (batch * time,) ragged row of every aligned slot
    count = int(starts.sum())
    lengths = torch.zeros(count, dtype=torch.long, device=device).index_add_(0, row_of, exists.flatten().long())
    begin = starts.flatten().nonzero().squeeze(1)  # aligned slot at which each row begins
    longest = max(int(lengths.max()), 1)
    slots = torch.arange(longest, device=device)
    inside = slots < lengths[:, None]
    source = torch.where(inside, begin[:, None] + slots, 0)
    index = torch.where(inside, aligned.index.flatten()[source], 0)
    inverse = torch.zeros(batch * time, dtype=torch.long, device=device)
    flat = torch.arange(count, device=device)[:, None] * longest + slots
    inverse[index[inside]] = flat[inside]
    owner = begin // time
    return Ragged(
        index=index,
        lengths=lengths,
        owner=owner,
        last=starts.sum(1).cumsum(0) - 1,
        inverse=inverse.view(batch, time),
        real=mask,
        first_document=begin % time == 0,
        document=torch.where(lengths > 0, ids.flatten()[begin], 0),
    )


def _like(grid: Tensor, x: Tensor) -> Tensor:
    return grid.view(*grid.shape, *([1] * (x.dim() - 2)))
