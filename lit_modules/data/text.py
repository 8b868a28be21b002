"""TextData: text files as packed rows of tokens, for Lightning or a plain loop."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.data.corpus import TextFile, find_text_files
from memzoo.lit_modules.data.rows import (
    PackedRows,
    ResumableLoader,
    RowSampler,
    Span,
    TokenRows,
    all_spans,
    split_documents,
)
from memzoo.lit_modules.data.shards import TokenCache, prepare_cache
from memzoo.lit_modules.data.tokenizer import load_tokenizer

PathLike = str | os.PathLike[str]
Loader = DataLoader[dict[str, Tensor]]


class TextData(pl.LightningDataModule):
    """Text files, tokenised once into memory-mapped shards and packed into rows.

    Without arguments: the sources of the running Python's standard library, as bytes; real text on every machine.

    Each file is a document. Documents are concatenated and cut into rows of ``sequence_length + 1`` tokens that overlap
    by one, so that every token is a target once; what is left out is the tail of each split, less than a row. Training
    documents follow each other in an order shuffled by ``seed``, and rows are shuffled again every epoch, unless
    ``contiguous``. Validation rows, which also serve testing and prediction, keep the order of the file names.

    Args:
        paths: Files, folders, and glob patterns (``**`` crosses folders), one or several. A folder stands for all files
            below it, hidden ones left out. None: the standard library's sources, without its tests and tables.
        tokenizer: ``bytes``, or the path of a ``tokenizer.json`` of the `tokenizers` library.
        sequence_length: Inputs, and targets, in a row.
        batch_size: Rows in a batch of one device.
        validation_fraction: Share of the documents to hold out, chosen by a hash of their contents; where there are too
            few documents for that, the last part of the text.
        validation_paths: Text to validate on instead, given like ``paths``; nothing is then held out from ``paths``.
        val_sequence_lengths: Lengths of rows to validate on beside ``sequence_length``: what a model that is trained on
            short rows makes of long ones. Each, and ``sequence_length``, has a loader that is named by it. All of them
            read the same text, but for what fills no row, in batches of as many tokens as those of training, rounded
            down to whole rows, or of one row. Under a trainer's ``limit_val_batches``, which counts batches, they do so
            if the lengths divide ``batch_size * sequence_length``: those that do not read less, longer ones read more.
            Neither the split nor prediction, which is of ``sequence_length`` alone, depends on them. None, or no
            length, for one loader.
        suffixes: File name endings to take from folders, such as ``.md``; None takes all files.
        pack_documents: Add ``doc_ids``, so that documents that share a row do not see each other.
        contiguous: Row ``i`` of a batch continues row ``i`` of the batch before, for states carried over batches; no
            shuffling then, and fewer than ``batch_size`` rows of a split are left out on each device. The streams begin
            afresh with every epoch.
        cache_dir: Where shards are kept; by default ``text`` in ``$MEMZOO_CACHE``, or else in ``~/.cache/memzoo``.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of the order of documents and rows. It does not change the split.

    Shape:
        A batch is a dict of ``tokens`` (batch, sequence_length + 1) int64 and, with ``pack_documents``, ``doc_ids`` of
        the same shape and type, the number of each token's document. Inputs are ``tokens[:, :-1]``, targets
        ``tokens[:, 1:]``. The last batch of an epoch may have fewer rows.

    Raises:
        ValueError: An argument is out of range or the tokenizer cannot be read; from ``prepare_data`` and ``setup``:
            files are missing, not text or too short, or the cache cannot be written or is corrupt.
    """

    def __init__(
        self,
        paths: Sequence[PathLike] | PathLike | None = None,
        *,
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
        super().__init__()
        check_positive("sequence_length", sequence_length)
        check_positive("batch_size", batch_size)
        if not 0 < validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={validation_fraction} is not between 0 and 1, both excluded; use 0.05, or name "
                f"files in validation_paths"
            )
        if isinstance(val_sequence_lengths, int):
            raise ValueError(
                f"val_sequence_lengths={val_sequence_lengths} is no list; use [{val_sequence_lengths}], or None"
            )
        for length in val_sequence_lengths or ():
            check_positive("val_sequence_lengths", length)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; use 0 to load in the main process")
        # Plain strings and lists from here on: checkpoints carry the arguments, and load without unpickling classes.
        paths, validation_paths, suffixes = as_list(paths), as_list(validation_paths), as_list(suffixes)
        val_sequence_lengths = list(val_sequence_lengths or ()) or None
        tokenizer, cache_dir = os.fspath(tokenizer), None if cache_dir is None else os.fspath(cache_dir)
        self.save_hyperparameters(logger=False)
        self.paths = paths
        self.tokenizer = load_tokenizer(tokenizer)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.validation_paths = validation_paths
        self.val_sequence_lengths = val_sequence_lengths
        self.suffixes = suffixes
        self.pack_documents = pack_documents
        self.contiguous = contiguous
        self.cache_dir = _default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.num_workers = num_workers
        self.seed = seed
        self._keys: list[str] = []  # names of the caches: paths, validation_paths if given, a subclass's own
        self._rows: tuple[TokenRows, dict[int, TokenRows]] | None = None  # for training, for validation by length

    @property
    def vocab_size(self) -> int:
        """Size of the embedding that the tokens need."""
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes in a validation token on average: bits per byte are ``nats / (log(2) * bytes_per_token)``."""
        return self.validation_rows.bytes_per_token

    @property
    def main_loader(self) -> str | None:
        """Name of the validation loader that plain metrics, such as ``val/loss``, are of; None where there is one."""
        return None if self.val_sequence_lengths is None else str(self.sequence_length)

    @property
    def training_rows(self) -> TokenRows:
        """The training split, in the order of its documents."""
        return self._split()[0]

    @property
    def validation_rows(self) -> TokenRows:
        """The validation split, in rows as long as those of training."""
        return self._split()[1][self.sequence_length]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids)

    def prepare_data(self) -> None:
        """Find the files and tokenise them, unless the cache holds exactly these already. Runs on one process."""
        self._use([prepare_cache(self.cache_dir, files, self.tokenizer) for files in self._find_files()])

    def setup(self, stage: str | None = None) -> None:
        """Map the shards and split them. Runs on every process; the others learn from the first what it prepared."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self._use(self.trainer.strategy.broadcast(self._keys))
        if not self._keys:  # without a trainer
            self.prepare_data()
        if self._rows is None:
            self._rows = self._open()
            for name, rows in (("training", self.training_rows), ("validation", self.validation_rows)):
                rank_zero_info(f"TextData: {rows.num_tokens:,} {name} tokens in {len(rows):,} rows")

    def train_dataloader(self) -> Loader:
        """Return the loader of the training rows. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return DataLoader(self.training_rows, **self._loader_options(self.batch_size))
        return ResumableLoader(self.training_rows, **self._sampled(self.training_rows, self.batch_size))

    def val_dataloader(self) -> Loader | dict[str, Loader]:
        """Return the loader of the validation rows, in order; with ``val_sequence_lengths``, loaders by length."""
        loaders = {str(length): self._validation_loader(rows) for length, rows in self._split()[1].items()}
        return loaders[str(self.sequence_length)] if self.val_sequence_lengths is None else loaders

    def test_dataloader(self) -> Loader | dict[str, Loader]:
        """Return what ``val_dataloader`` does."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        """Return the loader of the validation rows of ``sequence_length``, in order."""
        return self._validation_loader(self.validation_rows)

    def _validation_loader(self, rows: TokenRows) -> Loader:
        batch_size = max(1, self.batch_size * self.sequence_length // rows.sequence_length)
        if self.contiguous:
            return DataLoader(rows, **self._sampled(rows, batch_size))
        return DataLoader(rows, **self._loader_options(batch_size))

    def _find_files(self) -> list[list[TextFile]]:
        """Return the files of ``paths``, and those of ``validation_paths`` if given."""
        found = [find_text_files(self.paths, self.suffixes)]
        if self.validation_paths is not None:
            found.append(find_text_files(self.validation_paths, self.suffixes, argument="validation_paths"))
        return found

    def _use(self, keys: list[str]) -> None:
        if keys != self._keys:
            self._keys, self._rows = keys, None

    def _split(self) -> tuple[TokenRows, dict[int, TokenRows]]:
        if self._rows is None:
            self.setup()
        assert self._rows is not None
        return self._rows

    def _open(self) -> tuple[TokenRows, dict[int, TokenRows]]:
        (training_cache, training), (validation_cache, validation) = self._spans()
        lengths = dict.fromkeys((self.sequence_length, *(self.val_sequence_lengths or ())))
        return (
            self._pack("training", training_cache, training, self.sequence_length),
            {length: self._pack("validation", validation_cache, validation, length) for length in lengths},
        )

    def _spans(self) -> tuple[tuple[TokenCache, list[Span]], tuple[TokenCache, list[Span]]]:
        """Return what to train on, in its order, and what to validate on."""
        training_cache = validation_cache = TokenCache(self.cache_dir / self._keys[0])
        if self.validation_paths is None:
            least = self.sequence_length + 1
            training, validation = split_documents(training_cache.documents, self.validation_fraction, least)
        else:
            validation_cache = TokenCache(self.cache_dir / self._keys[1])
            training, validation = all_spans(training_cache.documents), all_spans(validation_cache.documents)
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(self.seed))
        return (training_cache, [training[i] for i in order.tolist()]), (validation_cache, validation)

    def _pack(self, split: str, cache: TokenCache, spans: list[Span], length: int) -> TokenRows:
        self._check_size(split, cache, spans, length)
        return PackedRows(cache, spans, length, with_documents=self.pack_documents)

    def _check_size(self, split: str, cache: TokenCache, spans: list[Span], length: int) -> None:
        held, least = sum(span.stop - span.start for span in spans), length + 1
        if held < least:
            argument = "sequence_length" if length == self.sequence_length else "val_sequence_lengths"
            total = sum(document.tokens for document in cache.documents)
            raise ValueError(
                f"{argument}={getattr(self, argument)} needs {least} tokens in the {split} split, which holds {held} "
                f"of {total}; lower {argument}, or pass more text"
            )

    def _sampled(self, rows: TokenRows, batch_size: int) -> dict[str, Any]:
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        devices = share.get("num_replicas", 1)
        if self.contiguous and len(rows) < devices and rows.sequence_length != self.sequence_length:
            raise ValueError(
                f"val_sequence_lengths={self.val_sequence_lengths} and contiguous=True need a row for every device, "
                f"but {len(rows)} rows of {rows.sequence_length} meet {devices} devices; lower val_sequence_lengths, "
                f"pass more text, or use fewer devices"
            )
        sampler = RowSampler(rows, batch_size, contiguous=self.contiguous, seed=self.seed, **share)
        return self._loader_options(sampler.batch_size) | {"sampler": sampler}

    def _loader_options(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def as_list(value: Sequence[PathLike] | PathLike | None) -> list[str] | None:
    """Return one path or several as plain strings."""
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        return [os.fspath(value)]
    return [os.fspath(item) for item in value]


def _default_cache_dir() -> Path:
    root = os.environ.get("MEMZOO_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "memzoo") / "text"
