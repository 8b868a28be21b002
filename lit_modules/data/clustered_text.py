"""ClusteredTextData: text files cut into windows, clustered, and packed by the leaf that each window comes to.

The training data of pretraining with hierarchical memories (arXiv 2510.02375): windows are embedded and routed once,
beforehand, so that training pays nothing for it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ngram_embedding import Embedder, HashedNgrams
from memzoo.lit_modules.data.folders import (
    check_contents,
    check_sizes,
    describe_file,
    prepare_folder,
    read_manifest,
    write_manifest,
    writing_to,
)
from memzoo.lit_modules.data.leaf_rows import (
    Integers,
    LeafRows,
    StoredRows,
    Tails,
    bucketed_loader,
    check_level,
    numbers_within,
    pack_leaves,
    refuse_empty,
)
from memzoo.lit_modules.data.rows import Span, TokenRows
from memzoo.lit_modules.data.shards import TokenCache
from memzoo.lit_modules.data.text import Loader, PathLike, TextData
from memzoo.lit_modules.data.tokenizer import Tokenizer

VERSION = 1
EMBEDDED_AT_ONCE = 512
SPLITS = ("training", "validation")
TREE = "tree.safetensors"


class Windows(Sequence[Integers]):
    """Spans of documents, cut into windows that do not overlap; the last of a span may be shorter.

    Args:
        cache: Where the tokens are.
        spans: What to cut.
        window: Tokens of a window.

    Attributes:
        lengths: Tokens of the windows.
        bytes: UTF-8 bytes of the windows; each token counts for the average of its document.
    """

    def __init__(self, cache: TokenCache, spans: Sequence[Span], window: int) -> None:
        self.cache = cache
        edges = [
            (cache.documents[span.document].start + start, min(window, span.stop - start), span.document)
            for span in spans
            for start in range(span.start, span.stop, window)
        ]
        self._starts, self.lengths, owners = np.array(edges, dtype=np.int64).T
        self.bytes = self.lengths * np.array([document.bytes / document.tokens for document in cache.documents])[owners]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Integers:  # type: ignore[override]
        start = int(self._starts[index])
        return self.cache.read(start, start + int(self.lengths[index]))

    def embed(self, embedder: Embedder, tokenizer: Tokenizer, prefix: int | None = None) -> Tensor:
        """Embed the text of every window, or of its first ``prefix`` tokens: (windows, width)."""
        embedded = []
        with tqdm(total=len(self), desc="Embedding", unit=" windows", delay=2, leave=False) as bar:
            for first in range(0, len(self), EMBEDDED_AT_ONCE):
                group = range(first, min(first + EMBEDDED_AT_ONCE, len(self)))
                embedded.append(embedder.embed([tokenizer.decode(self[index][:prefix].tolist()) for index in group]))
                bar.update(len(group))
        return torch.cat(embedded)


class ClusteredTextData(TextData):
    """Text files as ``TextData`` reads them, in windows that are packed by the leaf of a tree of clusters.

    Every document is cut into windows; a window is embedded by its text, and routed. Windows of one leaf share rows and
    do not see each other. The tree is fitted on the windows of the training split, or loaded. Rows and tree are kept in
    a folder of ``cache_dir``, named after all that they depend on, so that another start finds them there.

    Validation rows are read in an order that is drawn once, by ``seed``, so that a trainer's ``limit_val_batches`` has
    rows of many leaves; prediction reads them in the order of ``validation_rows``, leaf by leaf.

    With ``pack_documents``, the first token of a window is never a target. ``bytes_per_token`` is of the targets in the
    rows that validation reads: ``end_of_text`` is one of no bytes.

    Validation windows are routed by the same tree on the whole of their own text, as the paper does for perplexity: the
    path then knows of text that is still to be predicted. Say so when reporting it, or set ``route_prefix``; what is
    predicted within the prefix still is part of it.

    Args:
        paths: As in ``TextData``, and so up to ``suffixes``: files, folders and glob patterns; None for the standard
            library's sources.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json``.
        sequence_length: Inputs, and targets, in a row.
        batch_size: Rows in a batch of one device.
        validation_fraction: Share of the documents to hold out.
        validation_paths: Text to validate on instead.
        suffixes: File name endings to take from folders.
        window: Tokens of a window. Rows of as many inputs hold one whole window each; count ``end_of_text`` to it.
        branching: Children of a node of the tree.
        depth: Levels of the tree.
        tree: File of a saved tree to route with, instead of fitting one; it brings its own ``branching`` and ``depth``.
        embedder: Of the windows' texts; ``HashedNgrams()`` by default.
        route_prefix: First tokens of a validation window to route it by; None for all.
        tails: What becomes of the last row of a leaf: "pad" fills it up, "drop" leaves it out, and with it whole leaves
            that hold less than a row: the rarest texts. Validation rows are always padded.
        end_of_text: Token to put behind every window; 0 is free where ``tokenizer`` is ``bytes``.
        pack_documents: Add ``doc_ids``, so that windows that share a row do not see each other.
        level: Rows of a training batch share the node of this level, so that few distinct blocks are fetched; 0 mixes
            all rows, as the paper does.
        within: (level, node) to train and validate on the rows of one node alone, an independent job.
        cache_dir: Where tokens and rows are kept; by default ``text`` in ``$MEMZOO_CACHE``, or ``~/.cache/memzoo``.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of the order of windows and rows, and of the tree. It does not change the split.

    Shape:
        A batch is a dict of ``tokens`` (batch, sequence_length + 1) and ``paths`` (batch, depth) int64; ``doc_ids``
        like ``tokens``, if asked for; and ``mask`` like ``tokens``, True for real ones, if any row of the split is
        padded.

    Raises:
        ValueError: As from ``TextData``; or ``tree`` is no saved tree, or does not fit the embedder; from the loaders:
            no row is ``within`` the node.
    """

    def __init__(
        self,
        paths: Sequence[PathLike] | PathLike | None = None,
        *,
        tokenizer: PathLike = "bytes",
        sequence_length: int = 2048,
        batch_size: int = 8,
        validation_fraction: float = 0.05,
        validation_paths: Sequence[PathLike] | PathLike | None = None,
        suffixes: Sequence[str] | str | None = None,
        window: int = 2048,
        branching: int = 16,
        depth: int = 3,
        tree: PathLike | None = None,
        embedder: Embedder | None = None,
        route_prefix: int | None = None,
        tails: Tails = "pad",
        end_of_text: int | None = None,
        pack_documents: bool = True,
        level: int = 0,
        within: tuple[int, int] | None = None,
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
            suffixes=suffixes,
            pack_documents=pack_documents,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
        )
        for name, count in dict(window=window, branching=branching, depth=depth).items():
            check_positive(name, count)
        if route_prefix is not None:
            check_positive("route_prefix", route_prefix)
        check_choice("tails", tails, get_args(Tails))
        if end_of_text is not None and not 0 <= end_of_text < self.vocab_size:
            raise ValueError(f"end_of_text={end_of_text} is no token; ids are within [0, {self.vocab_size})")
        tree = None if tree is None else os.fspath(tree)
        self._given_tree = None if tree is None else ClusterTree.load(tree)
        if self._given_tree is not None:
            branching, depth = self._given_tree.branching, self._given_tree.depth
        check_level(level, within, branching, depth)
        self.window = window
        self.branching = branching
        self.depth = depth
        self.embedder: Embedder = HashedNgrams() if embedder is None else embedder
        self.route_prefix = route_prefix
        self.tails: Tails = tails
        self.end_of_text = end_of_text
        self.level = level
        self.within = within
        self._tree: ClusterTree | None = None
        # Plain values, as in TextData, and in place of what it saved.
        paths, validation_paths, suffixes = self.paths, self.validation_paths, self.suffixes
        tokenizer, cache_dir = os.fspath(tokenizer), None if cache_dir is None else os.fspath(cache_dir)
        self.save_hyperparameters(ignore=["embedder"], logger=False)

    @property
    def tree(self) -> ClusterTree:
        """The tree that windows are routed by."""
        self._split()
        assert self._tree is not None
        return self._tree

    def embed(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Embed texts, or the texts of (rows, time) token ids: what ``tree.route`` takes.

        Shape:
            Returns (rows, width).
        """
        if isinstance(texts, Tensor):
            texts = [self.decode(row) for row in texts.tolist()]
        return self.embedder.embed(texts)

    def prepare_data(self) -> None:
        """Tokenise, embed, cluster and pack, unless the cache holds it already. Runs on one process."""
        super().prepare_data()
        folder = self._prepare_leaves()
        check_contents(folder, read_manifest(folder, VERSION)["files"])

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the training rows. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        rows = self.training_rows
        assert isinstance(rows, LeafRows)
        options = self._loader_options(self.batch_size)
        del options["batch_size"]
        return bucketed_loader(
            rows, self.batch_size, self.trainer, options, level=self.level, within=self.within, seed=self.seed
        )

    def val_dataloader(self) -> Loader:
        """Return the loader of the validation rows, in one order that mixes the leaves."""
        numbers = self._validation_numbers()
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(self.seed))
        return self._loader_of(numbers[order])

    def predict_dataloader(self) -> Loader:
        """Return the loader of the validation rows, leaf by leaf."""
        return self._loader_of(self._validation_numbers())

    def _loader_of(self, numbers: Tensor) -> Loader:
        return DataLoader(Subset(self.validation_rows, numbers.tolist()), **self._loader_options(self.batch_size))

    def _validation_numbers(self) -> Tensor:
        rows = self.validation_rows
        assert isinstance(rows, LeafRows)
        numbers = numbers_within(rows, self.within)
        if not len(numbers):
            raise refuse_empty(self.within, len(rows), "validation rows")
        return numbers

    def _open(self) -> tuple[TokenRows, dict[int, TokenRows]]:
        folder = self._prepare_leaves()
        check_sizes(folder, read_manifest(folder, VERSION)["files"])
        self._tree = ClusterTree.load(folder / TREE)
        training, validation = (
            LeafRows(
                StoredRows.open(folder / split),
                branching=self.branching,
                depth=self.depth,
                with_documents=self.pack_documents,
                bytes_per_token=self._bytes_per_token(np.load(_text_file(folder, split))),
            )
            for split in SPLITS
        )
        return training, {self.sequence_length: validation}

    def _bytes_per_token(self, text: NDArray[np.float64]) -> float:
        """Return the bytes of a target within the node on average, NaN if there is none.

        Shape:
            text: (3, leaves), the bytes, tokens and windows of every leaf.
        """
        level, node = (0, 0) if self.within is None else self.within
        leaves = self.branching ** (self.depth - level)
        inside = text[:, node * leaves : (node + 1) * leaves]
        num_bytes, tokens, windows = inside.sum(1)
        read = tokens - (windows if self.pack_documents else np.count_nonzero(inside[2]))
        ends = 0 if self.end_of_text is None else windows
        with np.errstate(invalid="ignore"):
            return float(num_bytes / tokens * read / (read + ends))

    def _prepare_leaves(self) -> Path:
        """Return the folder of rows and tree, written first if it is not there."""
        spans = self._spans()
        for split, (cache, own) in zip(SPLITS, spans, strict=True):
            self._check_size(split, cache, own, self.sequence_length)
        tree = self._given_tree
        content = [
            VERSION,
            self._keys,
            [_fingerprint(own) for _, own in spans],
            self.embedder.fingerprint,
            [self.branching, self.depth, self.seed] if tree is None else tree.fingerprint,
            [self.window, self.sequence_length, self.route_prefix, self.tails, self.end_of_text],
        ]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return prepare_folder(self.cache_dir, f"leaves-{key}", self._write_leaves)

    def _write_leaves(self, folder: Path) -> None:
        """Embed, cluster and pack into ``folder``, which is empty."""
        training, validation = (Windows(cache, spans, self.window) for cache, spans in self._spans())
        embedded = training.embed(self.embedder, self.tokenizer)
        tree = self._given_tree
        if tree is None:
            tree = ClusterTree.fit(embedded, branching=self.branching, depth=self.depth, seed=self.seed)
        paths = tree.route(embedded)
        validation_paths = tree.route(validation.embed(self.embedder, self.tokenizer, self.route_prefix))
        with writing_to(self.cache_dir):
            tree.save(folder / TREE)
            self._pack_leaves(folder, SPLITS[0], training, paths[:, -1].numpy(), self.tails)
            self._pack_leaves(folder, SPLITS[1], validation, validation_paths[:, -1].numpy(), "pad")
            packed = (path for split in SPLITS for path in StoredRows.files(folder / split))
            files = [folder / TREE, *packed, *(_text_file(folder, split) for split in SPLITS)]
            write_manifest(folder, {"version": VERSION, "files": [describe_file(path) for path in files]})

    def _pack_leaves(self, folder: Path, split: str, windows: Windows, leaves: Integers, tails: Tails) -> None:
        pack_leaves(
            windows,
            windows.lengths,
            leaves,
            self.sequence_length,
            vocab_size=self.vocab_size,
            tails=tails,
            end_of_text=self.end_of_text,
            place=folder / split,
        )
        count = self.branching**self.depth
        text = [np.bincount(leaves, own, count) for own in (windows.bytes, windows.lengths, np.ones(len(windows)))]
        np.save(_text_file(folder, split), np.stack(text))


def _text_file(folder: Path, split: str) -> Path:
    """Return the file of the bytes, tokens and windows of every leaf."""
    return folder / f"{split}-text.npy"


def _fingerprint(spans: Sequence[Span]) -> str:
    numbers = np.array([(span.document, span.start, span.stop) for span in spans], dtype="<i8")
    return hashlib.sha256(numbers.tobytes()).hexdigest()
