"""Rows: tokens packed into rows of one length, split by document, and the order in which they are visited."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from memzoo.lit_modules.data.shards import Document, TokenCache


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of document number ``document``; ``start < stop``."""

    document: int
    start: int
    stop: int


def split_documents(documents: Sequence[Document], fraction: float, least: int) -> tuple[list[Span], list[Span]]:
    """Split into training and validation spans.

    A document is held out if a hash of its contents falls below ``fraction``: adding, renaming or moving files moves no
    other document to the other side, and copies of one text stay together. Where chance makes that a bad split - few
    documents, or one that outweighs the rest - the last ``fraction`` of all tokens is held out instead.

    Args:
        documents: In the order of their tokens.
        fraction: Share to hold out.
        least: Tokens that each side needs.
    """
    total = sum(document.tokens for document in documents)
    held_out = [int(document.sha256[:16], 16) < fraction * 2**64 for document in documents]
    held = sum(document.tokens for document, out in zip(documents, held_out, strict=True) if out)
    if least <= held <= min(4 * fraction * total, total - least):
        whole = all_spans(documents)
        sides = [[span for span, out in zip(whole, held_out, strict=True) if out == side] for side in (False, True)]
        return sides[0], sides[1]
    cut = total - max(round(fraction * total), least)
    return _between(documents, 0, cut), _between(documents, cut, total)


def all_spans(documents: Sequence[Document]) -> list[Span]:
    """Return every document as a span."""
    return [Span(index, 0, document.tokens) for index, document in enumerate(documents)]


def _between(documents: Sequence[Document], first: int, last: int) -> list[Span]:
    """Return what the documents have at positions ``first`` to ``last`` of the corpus."""
    clipped = [
        Span(i, max(first - document.start, 0), min(last - document.start, document.tokens))
        for i, document in enumerate(documents)
    ]
    return [span for span in clipped if span.start < span.stop]


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of ``sequence_length + 1`` tokens, each a dict of tensors.

    Attributes:
        sequence_length: Inputs in a row.
        num_tokens: Tokens of the text in all rows.
        bytes_per_token: UTF-8 bytes of a target on average.
    """

    sequence_length: int
    num_tokens: int
    bytes_per_token: float

    def __len__(self) -> int:
        raise NotImplementedError


class PackedRows(TokenRows):
    """Rows of ``sequence_length + 1`` tokens cut from the concatenation of some documents.

    The last token of a row is the first of the next, so with inputs ``tokens[:-1]`` and targets ``tokens[1:]`` every
    token but the very first is a target exactly once, and the inputs of consecutive rows join without a gap. The tail
    that fills no row is left out: fewer than ``sequence_length`` tokens.

    Args:
        cache: Where the tokens are.
        spans: What to concatenate, in this order; together more than ``sequence_length`` tokens.
        sequence_length: Inputs in a row.
        with_documents: Add ``doc_ids``.

    Attributes:
        num_tokens: Tokens in the spans.
        bytes_per_token: UTF-8 bytes of the spans over their tokens (a span that is part of a document has its average).

    Shape:
        A row is a dict of ``tokens`` and, if asked for, ``doc_ids`` (number of the document in the corpus), each
        (sequence_length + 1,) int64.
    """

    def __init__(
        self, cache: TokenCache, spans: Sequence[Span], sequence_length: int, *, with_documents: bool = True
    ) -> None:
        documents = [cache.documents[span.document] for span in spans]
        self.cache = cache
        self.sequence_length = sequence_length
        self.with_documents = with_documents
        self._ids = np.array([span.document for span in spans])
        self._starts = np.array([document.start + span.start for document, span in zip(documents, spans, strict=True)])
        self._lengths = np.array([span.stop - span.start for span in spans])
        self._stops = self._lengths.cumsum()
        self.num_tokens = int(self._lengths.sum())
        density = np.array([document.bytes / document.tokens for document in documents])
        self.bytes_per_token = float((density * self._lengths).sum() / self.num_tokens)

    def __len__(self) -> int:
        return (self.num_tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        position = index * self.sequence_length
        missing = self.sequence_length + 1
        span = int(np.searchsorted(self._stops, position, side="right"))
        offset = position - int(self._stops[span] - self._lengths[span])
        pieces, counts, first = [], [], span
        while missing:
            count = min(missing, int(self._lengths[span]) - offset)
            start = int(self._starts[span]) + offset
            pieces.append(self.cache.read(start, start + count))
            counts.append(count)
            missing, span, offset = missing - count, span + 1, 0
        row = {"tokens": torch.from_numpy(np.concatenate(pieces).astype(np.int64))}
        if self.with_documents:
            row["doc_ids"] = torch.from_numpy(self._ids[first:span].repeat(counts).astype(np.int64))
        return row


Drawn = TypeVar("Drawn", covariant=True)


class ResumableSampler(DistributedSampler[Drawn]):
    """A sampler that knows where in an epoch to begin."""

    _resume = (0, 0)

    def resume(self, epoch: int, batches: int) -> None:
        """Leave out the first ``batches`` batches of ``epoch`` and go on from there."""
        self.set_epoch(epoch)
        self._resume = (epoch, batches)

    @property
    def batches_done(self) -> int:
        """Batches that the present epoch leaves out."""
        epoch, batches = self._resume
        return batches if epoch == self.epoch else 0


class RowSampler(ResumableSampler[int]):
    """The rows one device visits in an epoch, in an order that depends on nothing but the arguments and the epoch.

    Args:
        rows: The data set.
        batch_size: Rows in a batch of this device.
        num_replicas: Devices that share the rows.
        rank: This device among them.
        contiguous: Cut the rows into one stream for every place in a batch, so that place ``i`` of a batch continues
            place ``i`` of the batch before; every epoch alike. Rows that do not fill the streams evenly are left out,
            fewer than there are streams. Otherwise rows are shuffled by seed and epoch, and a few repeat where the
            devices do not divide them.
        seed: Of the shuffle.

    Attributes:
        batch_size: As given, or less where ``contiguous`` finds fewer rows than places.

    Raises:
        ValueError: ``contiguous`` finds fewer rows than devices.
    """

    def __init__(
        self,
        rows: TokenRows | ConcatDataset[Any],
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        contiguous: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.contiguous = contiguous
        self.batch_size = batch_size
        if contiguous:
            self.batch_size = min(batch_size, len(rows) // num_replicas)
            if not self.batch_size:
                raise ValueError(
                    f"contiguous=True needs a row for every device, but {len(rows)} rows meet {num_replicas} devices; "
                    f"lower sequence_length, pass more text, or use fewer devices"
                )
            self._rows_per_stream = len(rows) // (self.batch_size * num_replicas)
            self.num_samples = self._rows_per_stream * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = self._streams() if self.contiguous else super().__iter__()
        return islice(order, self.batches_done * self.batch_size, None)

    def _streams(self) -> Iterator[int]:
        first = self.rank * self.batch_size
        for step in range(self._rows_per_stream):
            for stream in range(first, first + self.batch_size):
                yield stream * self._rows_per_stream + step


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader over a ``ResumableSampler`` whose place within the epoch goes into Lightning's checkpoints."""

    sampler: ResumableSampler[Any]
    _place: tuple[int, int] = (0, 0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        epoch, done = self.sampler.epoch, self.sampler.batches_done
        for batch in super().__iter__():
            done += 1
            self._place = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of its batches that were handed out."""
        epoch, batches = self._place
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were handed out, with the next epoch if there were no more."""
        epoch, batches = state["epoch"], state["batches"]
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        self.sampler.resume(epoch, batches)
        self._place = (epoch, batches)
