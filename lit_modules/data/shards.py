"""Shards: a corpus tokenised once into memory-mapped arrays, in a folder named after what is in it.

A cache folder holds ``manifest.json`` and ``tokens-00000.npy``, ``tokens-00001.npy``, ... in numpy's own format. Its
name is a hash of the tokenizer and of the names and contents of the files, so a changed corpus is another folder.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from memzoo.lit_modules.data.corpus import TextFile, read_text
from memzoo.lit_modules.data.folders import (
    check_contents,
    check_sizes,
    describe_file,
    prepare_folder,
    read_manifest,
    write_manifest,
    writing_to,
)
from memzoo.lit_modules.data.tokenizer import Tokenizer

VERSION = 1
SHARD_TOKENS = 1 << 26
GROUP_BYTES = 1 << 24


@dataclass(frozen=True)
class Document:
    """One file's tokens.

    Attributes:
        name: Of the file, relative to what was asked for.
        sha256: Of the file's contents.
        bytes: Size of the file.
        start: Position of its first token in the corpus.
        tokens: How many there are; at least 1.
    """

    name: str
    sha256: str
    bytes: int
    start: int
    tokens: int


class TokenCache:
    """The tokens of a corpus, memory-mapped.

    Args:
        folder: A folder that ``prepare_cache`` made.

    Attributes:
        documents: In the order of their tokens, without gaps.

    Raises:
        ValueError: The manifest or the size of a shard is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder, VERSION)
        self.documents = [Document(**document) for document in manifest["documents"]]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._stops = list(accumulate(shard["tokens"] for shard in self._shards))
        self._arrays: list[NDArray[np.unsignedinteger] | None] = [None] * len(self._shards)
        check_sizes(folder, self._shards)

    def verify(self) -> None:
        """Read every shard and compare its checksum with the manifest's.

        Raises:
            ValueError: A shard has changed since it was written.
        """
        check_contents(self.folder, self._shards)

    def read(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Return the tokens at positions ``start`` to ``stop`` of the corpus, ``start < stop``."""
        index = int(np.searchsorted(self._stops, start, side="right"))
        pieces = []
        while start < stop:
            begin = self._stops[index] - self._shards[index]["tokens"]
            end = min(stop, self._stops[index])
            pieces.append(self._array(index)[start - begin : end - begin])
            start, index = end, index + 1
        return np.concatenate(pieces)

    def _array(self, index: int) -> NDArray[np.unsignedinteger]:
        array = self._arrays[index]
        if array is None:
            array = np.load(self.folder / self._shards[index]["name"], mmap_mode="r")
            self._arrays[index] = array
        return array

    def __reduce__(self) -> tuple[type["TokenCache"], tuple[Path]]:
        return TokenCache, (self.folder,)  # a worker process maps the files anew instead of receiving their contents


def prepare_cache(
    cache_dir: Path, files: Sequence[TextFile], tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS
) -> str:
    """Return the name of the corpus's folder in ``cache_dir``, tokenising it first if it is not there.

    Of several processes that want the same corpus, one writes and the others wait for it. A file above about a mebibyte
    is tokenised in pieces that end after a line.

    Raises:
        ValueError: The folder cannot be written, an existing one is corrupt, or a file changes meanwhile.
    """
    key = cache_key(files, tokenizer)

    def write(empty: Path) -> None:
        with writing_to(cache_dir):
            _write(empty, files, tokenizer, shard_tokens)

    folder = prepare_folder(cache_dir, key, write)
    TokenCache(folder).verify()
    return key


def cache_key(files: Sequence[TextFile], tokenizer: Tokenizer) -> str:
    """Return a hash of the format, the tokenizer, and the names and contents of the files."""
    content = [VERSION, tokenizer.fingerprint, [[file.name, file.sha256] for file in files]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _write(folder: Path, files: Sequence[TextFile], tokenizer: Tokenizer, shard_tokens: int) -> None:
    """Tokenise into ``folder``, which is empty."""
    shards = _ShardWriter(folder, shard_tokens)
    counts = [0] * len(files)
    total = sum(file.bytes for file in files)
    with tqdm(total=total, desc="Tokenising", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for group in _groups(files):
            owners, pieces = zip(*group, strict=True)
            for owner, tokens in zip(owners, tokenizer.encode_pieces(pieces), strict=True):
                counts[owner] += len(tokens)
                shards.add(tokens)
            bar.update(sum(len(piece) for piece in pieces))
    shards.flush()
    starts = accumulate(counts, initial=0)
    documents = [
        Document(file.name, file.sha256, file.bytes, start, count)
        for file, start, count in zip(files, starts, counts, strict=False)
        if count
    ]
    write_manifest(
        folder,
        {
            "version": VERSION,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "shards": shards.written,
            "documents": [asdict(document) for document in documents],
        },
    )


def _groups(files: Sequence[TextFile]) -> Iterator[list[tuple[int, bytes]]]:
    """Yield the files' pieces with the index of their file, enough at a time to keep every core busy."""
    group: list[tuple[int, bytes]] = []
    size = 0
    for index, file in enumerate(files):
        digest = hashlib.sha256()
        for piece in read_text(file.path):
            digest.update(piece)
            group.append((index, piece))
            size += len(piece)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if digest.hexdigest() != file.sha256:
            raise ValueError(f"{file.path} changed while it was read; run again when nothing writes to it")
    if group:
        yield group


class _ShardWriter:
    """Gathers tokens and writes them in arrays of ``shard_tokens``; the last one is shorter."""

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.written: list[dict[str, Any]] = []
        self._waiting: list[NDArray[np.unsignedinteger]] = []
        self._count = 0

    def add(self, tokens: NDArray[np.unsignedinteger]) -> None:
        while self._count + len(tokens) >= self.shard_tokens:
            room = self.shard_tokens - self._count
            self._waiting.append(tokens[:room])
            self.flush()
            tokens = tokens[room:]
        self._waiting.append(tokens)
        self._count += len(tokens)

    def flush(self) -> None:
        tokens = np.concatenate(self._waiting) if self._waiting else np.empty(0, np.uint8)
        self._waiting, self._count = [], 0
        if not len(tokens):
            return
        path = self.folder / f"tokens-{len(self.written):05d}.npy"
        np.save(path, tokens)
        self.written.append({**describe_file(path), "tokens": len(tokens)})
