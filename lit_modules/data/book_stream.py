"""BookStreamData: books streamed from beginning to end, a chunk a batch, for models that learn while they read.

The long documents of test-time training (Locas, arXiv 2602.05085; TempLoRA): a model scores a chunk with what came
before it in view, then learns it, then goes on to the next. The books are never trained or validated on beforehand.
"""

import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.data.corpus import TextFile, find_longest_files, find_text_files
from memzoo.lit_modules.data.rows import TokenRows
from memzoo.lit_modules.data.shards import Document, TokenCache, prepare_cache
from memzoo.lit_modules.data.text import Loader, PathLike, TextData, as_list
from memzoo.lit_modules.objective import NOT_SCORED


class Tokens(Protocol):
    """A text's token ids: a tensor of one axis, an array, a list, or what reads them when they are asked for."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, part: slice, /) -> Any:
        """Return those of a slice."""


@dataclass(frozen=True)
class StoredTokens:
    """Tokens ``start`` to ``stop`` of a cache, read when they are asked for."""

    cache: TokenCache
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> Tensor:
        first, last, _ = part.indices(len(self))
        return torch.from_numpy(self.cache.read(self.start + first, self.start + last).astype("int64"))


class BookChunks(Dataset[dict[str, Tensor]]):
    """The chunks of some books, in the order in which they are read.

    A chunk asks for the next ``chunk_length`` tokens of its book, the last one for what is left, behind a prefix of at
    most ``window - chunk_length`` tokens that were asked for before. Every token of a book but the first is asked for
    exactly once; no chunk has tokens of two books.

    ``DataLoader(chunks)`` makes a batch of each: what ``TestTimeTrainingModule`` is tested on.

    Args:
        books: The tokens of every book, at least 2.
        chunk_length: Targets of a chunk.
        window: Inputs that a chunk has at most, prefix and chunk together; ``chunk_length`` for no prefix.

    Attributes:
        num_targets: Tokens that are asked for, in all books.

    Shape:
        A chunk is a dict of int64 tensors. ``tokens`` (prefix + chunk + 1,): inputs are ``tokens[:-1]``, targets
        ``tokens[1:]``. ``labels`` like ``tokens``, ``NOT_SCORED`` up to the first input of the chunk. Without axes:
        ``document``, the number of the book; ``chunk``, the number of the chunk in it; ``position``, how many of its
        tokens were asked for before; ``prefix``, how many of the first inputs are prefix.

    Raises:
        ValueError: ``window`` is less than ``chunk_length``, there are no books, or one has fewer than 2 tokens.
    """

    def __init__(self, books: Sequence[Tokens], *, chunk_length: int = 1024, window: int = 2048) -> None:
        check_window(chunk_length, window)
        short = [number for number, book in enumerate(books) if len(book) < 2]
        if short or not books:
            what = f"books[{short[0]}] has {len(books[short[0]])} tokens" if short else "books is empty"
            raise ValueError(f"{what}; a stream needs books of at least 2 tokens, one to read and one to predict")
        self.books = books
        self.chunk_length = chunk_length
        self.window = window
        self.num_targets = sum(len(book) - 1 for book in books)
        self._stops = list(accumulate(-(-(len(book) - 1) // chunk_length) for book in books))

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        document = bisect_right(self._stops, index)
        chunk = index - self.chunks_of(document).start
        position = chunk * self.chunk_length
        prefix = min(self.window - self.chunk_length, position)
        tokens = torch.as_tensor(self.books[document][position - prefix : position + self.chunk_length + 1]).long()
        labels = tokens.clone()
        labels[: prefix + 1] = NOT_SCORED
        places = {"document": document, "chunk": chunk, "position": position, "prefix": prefix}
        return {"tokens": tokens, "labels": labels} | {name: torch.tensor(place) for name, place in places.items()}

    def chunks_of(self, document: int) -> range:
        """Return the indices of a book's chunks."""
        return range(self._stops[document - 1] if document else 0, self._stops[document])


class BookSampler(DistributedSampler[int]):
    """The chunks of the books of one device, in order: books are dealt out in turn, none is cut or read twice.

    It is a ``DistributedSampler`` because Lightning leaves those alone; others it replaces where there are several
    devices, and its own would deal out single chunks.

    Args:
        chunks: The data set.
        num_replicas: Devices that share the books.
        rank: This device among them.

    Raises:
        ValueError: There are fewer books than devices.
    """

    def __init__(self, chunks: BookChunks, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(chunks, num_replicas=num_replicas, rank=rank, shuffle=False)
        num_books = len(chunks.books)
        if num_books < num_replicas:
            raise ValueError(
                f"books: {num_books} of them meet {num_replicas} devices, and each streams whole books; use "
                f"devices={num_books}, or more books"
            )
        self._own = [chunks.chunks_of(document) for document in range(rank, num_books, num_replicas)]
        self.num_samples = sum(map(len, self._own))

    def __iter__(self) -> Iterator[int]:
        for chunks in self._own:
            yield from chunks


class BookStreamData(TextData):
    """Text to train and validate on as ``TextData`` has it, and books to test on, streamed from their beginning.

    The books are left out of what is trained and validated on, and so are files of equal contents. Copies that differ,
    by a line or the encoding of line ends, are not known as such. A checkpoint that was trained with this data module
    knows what it has seen, and refuses to be tested on that. Books are tokenised and kept as all text is.

    The test loader gives the chunks of ``BookChunks``, one a batch, book after book. Where there are several devices,
    each streams books of its own, dealt out in turn, so that devices may have more or fewer batches than others.

    Without arguments, it streams the longest files of the running Python's standard library, its help texts among them,
    and trains on the other sources. Measurements then are of one version of Python.

    Args:
        paths: As in ``TextData``, and so up to ``validation_paths``: files, folders and glob patterns; None for the
            standard library's sources.
        books: What to stream, given like ``paths``, in the order of the names. None: the longest files of the standard
            library, the longest first, ties by name.
        num_books: How many, if ``books`` is None.
        max_book_tokens: Stream so many tokens of the beginning of each book; None for all.
        chunk_length: Targets of a chunk. The last one of a book may have fewer.
        window: Inputs that a chunk has at most: before those of the chunk itself, ``window - chunk_length`` of the
            tokens that come before it. Equal to ``chunk_length``, there are none.
        held_out: Validation batches that ``held_out_batches`` has.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json``.
        sequence_length: Inputs, and targets, in a row to train or validate on.
        batch_size: Such rows in a batch of one device.
        validation_fraction: Share of the documents to hold out.
        validation_paths: Text to validate on instead.
        val_sequence_lengths: As in ``TextData``.
        suffixes: File name endings to take from folders, those of ``books`` too; None takes all files.
        pack_documents: Add ``doc_ids`` to rows, so that documents that share one do not see each other.
        contiguous: Rows continue those of the batch before, as in ``TextData``.
        cache_dir: Where shards are kept; by default ``text`` in ``$MEMZOO_CACHE``, or else in ``~/.cache/memzoo``.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of the order of documents and rows.

    Shape:
        Training and validation batches are those of ``TextData``. A test batch is a dict of int64 tensors: ``tokens``
        and ``labels`` (1, prefix + chunk + 1); ``document``, ``chunk``, ``position`` and ``prefix`` (1,), as
        ``BookChunks`` says.

    Raises:
        ValueError: An argument is out of range; as from ``TextData``; from ``prepare_data``: a book has fewer than 2
            tokens, or there is nothing but books to train or validate on; from ``test_dataloader``: there are fewer
            books than devices.
    """

    def __init__(
        self,
        paths: Sequence[PathLike] | PathLike | None = None,
        *,
        books: Sequence[PathLike] | PathLike | None = None,
        num_books: int = 3,
        max_book_tokens: int | None = None,
        chunk_length: int = 1024,
        window: int = 2048,
        held_out: int = 8,
        tokenizer: PathLike = "bytes",
        sequence_length: int = 1024,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        validation_paths: Sequence[PathLike] | PathLike | None = None,
        val_sequence_lengths: Sequence[int] | None = None,
        suffixes: Sequence[str] | str | None = None,
        pack_documents: bool = True,
        contiguous: bool = False,
        cache_dir: PathLike | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            paths,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            validation_paths=validation_paths,
            val_sequence_lengths=val_sequence_lengths,
            suffixes=suffixes,
            pack_documents=pack_documents,
            contiguous=contiguous,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
        )
        check_positive("num_books", num_books)
        check_positive("held_out", held_out)
        check_window(chunk_length, window)
        if max_book_tokens is not None and max_book_tokens < 2:
            raise ValueError(
                f"max_book_tokens={max_book_tokens} leaves nothing to predict; use at least 2, or None for whole books"
            )
        self.books = as_list(books)
        self.num_books = num_books
        self.max_book_tokens = max_book_tokens
        self.chunk_length = chunk_length
        self.window = window
        self.held_out = held_out
        self._streamed: tuple[BookChunks, list[str], float] | None = None  # with the books' names, bytes of a target
        # Plain values, as in TextData, and in place of what it saved.
        paths, validation_paths, suffixes, books = self.paths, self.validation_paths, self.suffixes, self.books
        val_sequence_lengths = self.val_sequence_lengths
        tokenizer, cache_dir = os.fspath(tokenizer), None if cache_dir is None else os.fspath(cache_dir)
        self.save_hyperparameters(logger=False)

    @property
    def chunks(self) -> BookChunks:
        """The chunks of all books, in the order in which one device reads them."""
        return self._stream()[0]

    @property
    def book_names(self) -> list[str]:
        """The books' file names, relative to what was asked for, by the number that batches call ``document``."""
        return self._stream()[1]

    @property
    def test_tokens(self) -> int:
        """Targets in all books, whatever the number of devices."""
        return self.chunks.num_targets

    @property
    def test_bytes_per_token(self) -> float:
        """UTF-8 bytes of a target in the books on average; each counts for the average of its book."""
        return self._stream()[2]

    def prepare_data(self) -> None:
        """Find the books and all other files and tokenise them, unless the cache holds exactly these already."""
        books = self._find_books()
        names = ("paths", "validation_paths")
        others = [_leave_out(books, *item) for item in zip(self._find_files(), names, strict=False)]
        key = self._prepare_books(books)
        self._use([*(prepare_cache(self.cache_dir, files, self.tokenizer) for files in others), key])

    def test_dataloader(self) -> Loader:
        """Return the loader of the books' chunks, one a batch; of this device's books where there are several."""
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return DataLoader(self.chunks, sampler=BookSampler(self.chunks, **share), **self._loader_options(1))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: which documents were trained or validated on."""
        caches = [TokenCache(self.cache_dir / key) for key in self._keys[:-1]]
        return {"seen": sorted({_mark(document) for cache in caches for document in cache.documents})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the books are none of what the run of a checkpoint was trained or validated on.

        Raises:
            ValueError: One is.
        """
        seen = {*state_dict["seen"]}
        books = zip(TokenCache(self.cache_dir / self._keys[-1]).documents, self.book_names, strict=True)
        if known := [name for document, name in books if _mark(document) in seen]:
            raise ValueError(
                f"books: {known} are among what the checkpoint was trained or validated on; stream others, or train "
                f"with the same books, num_books and paths"
            )

    def held_out_batches(self) -> Loader:
        """Return a loader of ``held_out`` batches of ``validation_rows``, evenly spread, the same ones on every device.

        Measure the loss on them before and after a book: what a model has kept.
        """
        rows = self.validation_rows
        count = min(self.held_out * self.batch_size, len(rows))
        return DataLoader(Subset(rows, [index * len(rows) // count for index in range(count)]), self.batch_size)

    def _find_books(self) -> list[TextFile]:
        if self.books is None:
            return find_longest_files(self.num_books)
        return find_text_files(self.books, self.suffixes, argument="books")

    def _prepare_books(self, books: Sequence[TextFile]) -> str:
        key = prepare_cache(self.cache_dir, books, self.tokenizer)
        counts = {document.sha256: document.tokens for document in TokenCache(self.cache_dir / key).documents}
        for book in books:
            tokens = counts.get(book.sha256, 0)
            if tokens < 2:
                raise ValueError(f"books: {book.path} is too short to stream, with {tokens} of 2 tokens; leave it out")
        return key

    def _stream(self) -> tuple[BookChunks, list[str], float]:
        self._split()
        assert self._streamed is not None
        return self._streamed

    def _open(self) -> tuple[TokenRows, dict[int, TokenRows]]:
        cache, limit = TokenCache(self.cache_dir / self._keys[-1]), self.max_book_tokens or sys.maxsize
        books = [
            StoredTokens(cache, document.start, document.start + min(document.tokens, limit))
            for document in cache.documents
        ]
        chunks = BookChunks(books, chunk_length=self.chunk_length, window=self.window)
        streamed = zip(cache.documents, books, strict=True)
        num_bytes = sum(document.bytes / document.tokens * (len(book) - 1) for document, book in streamed)
        names = _distinct([document.name for document in cache.documents])
        self._streamed = chunks, names, num_bytes / chunks.num_targets
        rank_zero_info(f"BookStreamData: {chunks.num_targets:,} tokens of {len(books)} books in {len(chunks):,} chunks")
        return super()._open()


def _mark(document: Document) -> str:
    """Return what tells contents apart, shortened for a checkpoint."""
    return document.sha256[:16]


def _distinct(names: Sequence[str]) -> list[str]:
    """Number names that are there twice."""
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def check_window(chunk_length: int, window: int) -> None:
    """Require that a chunk fits into the window.

    Raises:
        ValueError: It does not.
    """
    check_positive("chunk_length", chunk_length)
    check_positive("window", window)
    if window < chunk_length:
        raise ValueError(
            f"window={window} does not hold a chunk of chunk_length={chunk_length}; use window >= {chunk_length} (what "
            f"is more is prefix), or a lower chunk_length"
        )


def _leave_out(books: Sequence[TextFile], files: Sequence[TextFile], argument: str) -> list[TextFile]:
    """Return the files that have the contents of no book.

    Raises:
        ValueError: They hold no text.
    """
    contents = {book.sha256 for book in books}
    others = [file for file in files if file.sha256 not in contents]
    if not any(file.bytes for file in others):
        raise ValueError(
            f"{argument} holds no text but the books, which are neither trained nor validated on; add other files to "
            f"{argument}, or stream other books"
        )
    return others
