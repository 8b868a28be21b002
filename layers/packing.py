"""Packing: masks and documents, turned into rows that start at the left and end where they end.

A masked token must not exist for a layer, and documents packed in one row must not see each other. Both are one
operation: gather each document's real tokens into a row of its own (``Ragged``), run the layer on those rows, and put
its outputs back. Rows are padded to the longest; a layer that knows segments takes them end to end, without padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Ragged:
    """A batch of rows cut out of a (batch, time) grid.

    Attributes:
        index: (rows, length) position in the flattened grid of every slot; slots past a row's end repeat position 0.
            (1, tokens) where the rows lie end to end.
        lengths: (rows,) real tokens of each row; may be 0.
        owner: (rows,) the batch row each was cut from; rows of one owner are in order.
        last: (batch,) the last row of each batch row: its state is the one to carry on.
        inverse: (batch, time) position of every token in the flattened slots; 0 where masked.
        real: (batch, time) bool, tokens that exist; None if all do.
        first_document: (rows,) whether the row is the first of its owner, and so may continue a passed state.
        document: (rows,) id of the row's document; 0 without ``doc_ids`` or where the row is empty.
        cu_seqlens: (rows + 1,) where each row begins and the last one ends, if they lie end to end; None if padded.
    """

    index: Tensor
    lengths: Tensor
    owner: Tensor
    last: Tensor
    inverse: Tensor
    real: Tensor | None
    first_document: Tensor
    document: Tensor
    cu_seqlens: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """(batch, time, ...) -> (rows, length, ...), zeros past a row's end: no NaN of a masked token travels."""
        out = x.flatten(0, 1)[self.index]
        if self.cu_seqlens is not None:
            return out
        inside = torch.arange(self.index.shape[1], device=x.device) < self.lengths[:, None]
        return out.masked_fill(~_like(inside, out), 0)

    def last_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last token of every batch row, (batch, 1, ...), and which have none, (batch, 1, 1) bool.

        Args:
            x: (rows, length, ...), rows that are padded.
        """
        lengths = self.lengths[self.last]
        return x[self.last, (lengths - 1).clamp_min(0)][:, None], (lengths == 0)[:, None, None]

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


def split_documents(doc_ids: Tensor, mask: Tensor | None = None, *, end_to_end: bool = False) -> Ragged:
    """Rows of one document each. A document is a run of equal ids among a row's real tokens.

    The number of rows is the number of documents, known only from the data. A batch row without real tokens keeps one
    empty row, so that it keeps its state.

    Args:
        doc_ids: (batch, time) integers.
        mask: (batch, time) bool, True at real tokens; None if all are.
        end_to_end: Lay the rows end to end, with ``cu_seqlens``, if there is any token; otherwise pad them.
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
    begin = starts.flatten().nonzero().squeeze(1)  # aligned slot at which each row begins
    lengths = torch.zeros_like(begin).index_add_(0, row_of, exists.flatten().long())
    tokens = aligned.index[exists]  # position of every real token, row after row
    cu_seqlens = None
    if end_to_end and len(tokens):
        index, slots = tokens[None], torch.arange(len(tokens), device=device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    else:
        longest = max(int(lengths.max()), 1)
        inside = torch.arange(longest, device=device) < lengths[:, None]
        index = torch.zeros_like(inside, dtype=torch.long).masked_scatter(inside, tokens)
        slots = inside.flatten().nonzero().squeeze(1)
    inverse = torch.zeros(batch * time, dtype=torch.long, device=device).index_copy(0, tokens, slots)
    return Ragged(
        index=index,
        lengths=lengths,
        owner=begin // time,
        last=starts.sum(1).cumsum(0) - 1,
        inverse=inverse.view(batch, time),
        real=mask,
        first_document=begin % time == 0,
        document=torch.where(lengths > 0, ids.flatten()[begin], 0),
        cu_seqlens=cu_seqlens,
    )


def _like(grid: Tensor, x: Tensor) -> Tensor:
    return grid.view(*grid.shape, *([1] * (x.dim() - 2)))
