"""Rows of one leaf: documents that the tree routes alike, packed together, and batches of rows from one node.

Pretraining with hierarchical memories (arXiv 2510.02375), its training data: windows of the same leaf share rows, so
that a row reads one path of memory blocks. A row is stored with its leaf before its first token; the loader strips it
and turns it into the path, which the ids of coarser nodes follow from by integer division.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from memzoo.layers.errors import check_choice, check_positive
from memzoo.lit_modules.data.rows import ResumableLoader, ResumableSampler, TokenRows

Tails = Literal["pad", "drop"]
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class StoredRows:
    """Packed rows as they are kept, in memory or memory-mapped.

    Attributes:
        tokens: (rows, 1 + sequence_length + 1); the first is the leaf, 0 stands for padding.
        documents: (rows, sequence_length + 1) the document of every token, counted from 1 in each row; 0 is padding.
    """

    tokens: Integers
    documents: Integers

    @classmethod
    def open(cls, place: Path) -> Self:
        """Map what ``pack_leaves`` wrote to a place."""
        return cls(*(np.load(path, mmap_mode="r") for path in cls.files(place)))

    @staticmethod
    def files(place: Path) -> tuple[Path, Path]:
        """Return the files of tokens and documents: ``place`` is what their names begin with."""
        return place.with_name(f"{place.name}-tokens.npy"), place.with_name(f"{place.name}-documents.npy")

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.tokens, np.memmap):  # a worker process maps the files anew instead of receiving them
            return StoredRows.open, (Path(str(self.tokens.filename).removesuffix("-tokens.npy")),)
        return StoredRows, (self.tokens, self.documents)


def pack_leaves(
    documents: Sequence[Integers],
    lengths: Integers,
    leaves: Integers,
    sequence_length: int,
    *,
    vocab_size: int,
    tails: Tails = "pad",
    end_of_text: int | None = None,
    place: Path | None = None,
) -> StoredRows:
    """Concatenate the documents of every leaf, in their order, and cut them into rows of ``sequence_length + 1``.

    The last token of a row is the first of the leaf's next, as in ``PackedRows``: every token that follows another of
    its document is a target once. Rows are in the order of their leaves.

    Args:
        documents: Token ids of each, asked for one at a time.
        lengths: Of the documents.
        leaves: Of the documents.
        sequence_length: Inputs in a row.
        vocab_size: Greater than all token ids.
        tails: What becomes of the last row of a leaf: "pad" fills it up, "drop" leaves it out, and with it whole leaves
            that hold less than a row: the rarest texts.
        end_of_text: Token to put behind every document.
        place: What the names of the files to write begin with; None keeps the rows in memory.

    Raises:
        ValueError: ``tails`` is unknown, or no row comes about.
    """
    check_choice("tails", tails, get_args(Tails))
    lengths = np.asarray(lengths, dtype=np.int64) + (end_of_text is not None)
    order = np.argsort(leaves, kind="stable")
    present, firsts = np.unique(leaves[order], return_index=True)
    groups = np.split(order, firsts[1:])
    targets = np.array([lengths[group].sum() - 1 for group in groups], dtype=np.int64)
    counts = targets // sequence_length if tails == "drop" else -(-targets // sequence_length)
    if not counts.sum():
        raise ValueError(
            f"sequence_length={sequence_length} and tails={tails!r} make no row of {len(lengths)} documents in "
            f"{len(present)} leaves; lower sequence_length, pass more text, or use tails='pad'"
        )

    greatest = max(vocab_size - 1, int(present[-1]))
    stored = StoredRows(
        _allocate(place, 0, (int(counts.sum()), sequence_length + 2), np.min_scalar_type(greatest)),
        _allocate(place, 1, (int(counts.sum()), sequence_length + 1), np.min_scalar_type(sequence_length + 1)),
    )
    first = 0
    for leaf, group, count in zip(present, groups, counts.tolist(), strict=True):
        if not count:
            continue
        rows, room = slice(first, first + count), count * sequence_length + 1
        ends = [] if end_of_text is None else [np.array([end_of_text])]
        stream = np.concatenate([piece for index in group for piece in (documents[index], *ends)])
        owners = np.arange(1, len(group) + 1).repeat(lengths[group])
        stored.tokens[rows, 0] = leaf
        stored.tokens[rows, 1:] = _cut(stream, room, sequence_length)
        numbers = _cut(owners, room, sequence_length)
        stored.documents[rows] = np.where(numbers > 0, numbers - numbers[:, :1] + 1, 0)
        first += count
    for array in (stored.tokens, stored.documents):
        if isinstance(array, np.memmap):
            array.flush()
    return stored


def _allocate(place: Path | None, which: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> Integers:
    if place is None:
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(StoredRows.files(place)[which], mode="w+", dtype=dtype, shape=shape)


def _cut(stream: Integers, room: int, sequence_length: int) -> Integers:
    """Return rows that overlap by one, of a stream cut or filled with zeros to ``room`` numbers."""
    stream = np.pad(stream[:room], (0, max(0, room - len(stream))))
    return sliding_window_view(stream, sequence_length + 1)[::sequence_length]


def strip_leaf(stored: Tensor, branching: int, depth: int) -> tuple[Tensor, Tensor]:
    """Split stored rows into the tokens, and the paths that their first numbers, the leaves, stand for.

    Shape:
        stored: (..., 1 + count). Returns (..., count), and (..., depth): ``leaf // branching ** (depth - level)`` for
        the levels from 1 on.
    """
    divisors = branching ** torch.arange(depth - 1, -1, -1, device=stored.device)
    return stored[..., 1:], stored[..., :1] // divisors


class LeafRows(TokenRows):
    """Packed rows with the path of each, as ``NextTokens`` and memory banks take them.

    Args:
        stored: The rows.
        branching: Children of a node of the tree.
        depth: Its levels.
        with_documents: Add ``doc_ids``.
        bytes_per_token: UTF-8 bytes of a target on average; NaN if the tokens are of no text.

    Attributes:
        leaves: (rows,) int64.
        num_tokens: Real tokens that follow another in their row, so that none counts twice.

    Shape:
        A row is a dict of ``tokens`` (sequence_length + 1,), ``paths`` (depth,) and, if asked for, ``doc_ids`` like
        ``tokens``, counted from 1 in each row, all int64; and where any row is padded, ``mask`` like it, True for real
        tokens. ``rows[[3, 1]]`` is a batch of rows: the same with an axis before.

    Raises:
        ValueError: A leaf is not in the tree.
    """

    def __init__(
        self,
        stored: StoredRows,
        *,
        branching: int,
        depth: int,
        with_documents: bool = True,
        bytes_per_token: float = math.nan,
    ) -> None:
        self.stored = stored
        self.branching = branching
        self.depth = depth
        self.with_documents = with_documents
        self.bytes_per_token = bytes_per_token
        self.sequence_length = stored.documents.shape[1] - 1
        self.leaves = torch.from_numpy(stored.tokens[:, 0].astype(np.int64))
        self.num_tokens = int(np.count_nonzero(stored.documents)) - len(self)
        self.padded = not stored.documents[:, -1].all()
        if (last := int(self.leaves.max())) >= branching**depth:
            raise ValueError(
                f"stored holds leaf {last}; branching={branching} and depth={depth} make {branching**depth} leaves: "
                f"open the rows with the tree that they were routed with"
            )

    def __len__(self) -> int:
        return len(self.stored.tokens)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        stored = torch.from_numpy(self.stored.tokens[index].astype(np.int64))
        documents = torch.from_numpy(self.stored.documents[index].astype(np.int64))
        tokens, paths = strip_leaf(stored, self.branching, self.depth)
        row = {"tokens": tokens, "paths": paths}
        if self.with_documents:
            row["doc_ids"] = documents
        if self.padded:
            row["mask"] = documents > 0
        return row


def numbers_within(rows: LeafRows, within: tuple[int, int] | None) -> Tensor:
    """Return the numbers of the rows whose path holds the node ``within`` (level, node), in order; None is the root."""
    level, node = (0, 0) if within is None else within
    nodes = rows.leaves // rows.branching ** (rows.depth - level)
    return torch.nonzero(nodes == node).flatten()


def refuse_empty(within: tuple[int, int] | None, count: int, what: str) -> ValueError:
    """Return the error that says that none of ``count`` rows of ``what`` are in a node."""
    return ValueError(f"within={within} holds none of the {count} {what}; name a node that has some")


class TreeBucketedSampler(ResumableSampler[list[int]]):
    """The batches one device visits in an epoch, each a list of rows from one node of the tree.

    The rows of every node are shuffled, cut into batches, and the batches of all nodes mixed. A node's batches, and
    their order, depend on ``seed``, the epoch and the node alone: a job ``within`` a subtree visits the very batches,
    in the same order, that a job of the same ``level`` over the whole tree takes from there. The last batch of a node
    may have fewer rows. Devices take turns; where they do not divide the batches, a few are visited twice.

    Args:
        rows: What to visit.
        batch_size: Rows in a batch of this device.
        level: Rows of a batch share the node of this level, so that few distinct blocks are fetched; 0, the root, mixes
            all rows, as the paper does.
        within: (level, node) to visit the rows of one node alone; ``level`` is then at least that of the node.
        num_replicas: Devices that share the rows.
        rank: This device among them.
        seed: Of the shuffles.

    Raises:
        ValueError: An argument is out of range, or there is no row within the node.
    """

    def __init__(
        self,
        rows: LeafRows,
        batch_size: int,
        *,
        level: int = 0,
        within: tuple[int, int] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, num_replicas=num_replicas, rank=rank, seed=seed)
        check_positive("batch_size", batch_size)
        check_level(level, within, rows.branching, rows.depth)
        self.batch_size = batch_size
        self.level = level if within is None else max(level, within[0])
        chosen = numbers_within(rows, within)
        if not len(chosen):
            raise refuse_empty(within, len(rows), "training rows")
        nodes = (rows.leaves[chosen] // rows.branching ** (rows.depth - self.level)).numpy()
        order = np.argsort(nodes, kind="stable")
        self._nodes, firsts, counts = np.unique(nodes[order], return_index=True, return_counts=True)
        self._members = np.split(chosen.numpy()[order], firsts[1:])
        # Batches of all nodes, one node after the other, as slices of their rows, one node after the other.
        self._batches_of = -(-counts // batch_size)
        before = self._batches_of.cumsum() - self._batches_of
        within_node = np.arange(self._batches_of.sum()) - before.repeat(self._batches_of)
        self._starts = firsts.repeat(self._batches_of) + within_node * batch_size
        self._stops = np.minimum(self._starts + batch_size, (firsts + counts).repeat(self._batches_of))
        self.num_samples = -(-len(self._starts) // num_replicas)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[list[int]]:
        rows, order = self._shuffled()
        for turn in range(self.batches_done, self.num_samples):
            batch = order[(turn * self.num_replicas + self.rank) % len(order)]
            yield rows[self._starts[batch] : self._stops[batch]].tolist()

    def _shuffled(self) -> tuple[Integers, Integers]:
        """Return the epoch's rows, node after node, and the order of all devices' batches.

        Each batch has a random time, those of a node in their order.
        """
        rows, times = [], []
        for node, members, count in zip(self._nodes.tolist(), self._members, self._batches_of.tolist(), strict=True):
            rng = np.random.default_rng((self.seed, self.epoch, self.level, node))
            rows.append(rng.permutation(members))
            times.append(np.sort(rng.random(count)))
        return np.concatenate(rows), np.argsort(np.concatenate(times), kind="stable")


def check_level(level: int, within: tuple[int, int] | None, branching: int, depth: int) -> None:
    """Require a level of the tree, or 0 for the root, and a node of it.

    Raises:
        ValueError: There is none.
    """
    if not 0 <= level <= depth:
        raise ValueError(f"level={level} is not in the tree; use 0 to mix all rows, or up to depth={depth}")
    if within is not None and not (1 <= within[0] <= depth and 0 <= within[1] < branching ** within[0]):
        raise ValueError(
            f"within={within} is no node of the tree; use (level, node), 1 <= level <= {depth}, 0 <= node < "
            f"{branching} ** level"
        )


def bucketed_loader(
    rows: LeafRows,
    batch_size: int,
    trainer: pl.Trainer | None,
    options: dict[str, Any],
    *,
    level: int = 0,
    within: tuple[int, int] | None = None,
    seed: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """Return the loader of training rows for a trainer, or a plain loop: its batches are a ``TreeBucketedSampler``'s.

    Under a trainer's ``overfit_batches`` it has those of the first epoch, in the same order in all.

    Args:
        rows: What to visit.
        batch_size: Rows in a batch of one device.
        trainer: Says which part of the batches is this device's; None if there is one device.
        options: Of the loader.
        level: As in the sampler, and so up to ``seed``.
        within: As there.
        seed: As there.
    """
    if trainer is not None and trainer.overfit_batches:  # type: ignore[attr-defined]
        batches: Any = list(TreeBucketedSampler(rows, batch_size, level=level, within=within, seed=seed))
        return DataLoader(Subset(rows, batches), batch_size=None, **options)
    share = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
    sampler = TreeBucketedSampler(rows, batch_size, level=level, within=within, seed=seed, **share)
    return ResumableLoader(rows, batch_size=None, sampler=sampler, **options)  # what is loaded is a batch already
