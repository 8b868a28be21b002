"""Shards: a corpus tokenised once into memory-mapped arrays, in a folder named after what is in it.

A cache folder holds ``manifest.json`` and ``tokens-00000.npy``, ``tokens-00001.npy``, ... in numpy's own format. Its
name is a hash of the tokenizer and of the names and contents of the files, so a changed corpus is another folder and a
folder never changes. It is written beside its place and moved there when it is complete and on disk: a process killed
at any point leaves either no folder or a whole one, and what it had begun is removed by the next writer.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from memzoo.lit_modules.data.corpus import TextFile, read_text
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
        manifest = _read_manifest(folder)
        self.documents = [Document(**document) for document in manifest["documents"]]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._stops = list(accumulate(shard["tokens"] for shard in self._shards))
        self._arrays: list[NDArray[np.unsignedinteger] | None] = [None] * len(self._shards)
        for shard in self._shards:
            path = folder / shard["name"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["bytes"]:
                raise _corrupt(path, f"it has {size} bytes where {shard['bytes']} were written")

    def verify(self) -> None:
        """Read every shard and compare its checksum with the manifest's.

        Raises:
            ValueError: A shard has changed since it was written.
        """
        for shard in self._shards:
            path = self.folder / shard["name"]
            if _crc32(path) != shard["crc32"]:
                raise _corrupt(path, "its checksum is not the one that was written")

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
    folder = cache_dir / key
    if not folder.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir / f"{key}.lock"):
                if not folder.is_dir():
                    _write(folder, files, tokenizer, shard_tokens)
                    _remove_leftovers(cache_dir)
        except OSError as error:
            raise ValueError(
                f"cache_dir={str(cache_dir)!r} cannot be written ({error}); "
                f"pass a folder with room as cache_dir, or set MEMZOO_CACHE to one"
            ) from error
    TokenCache(folder).verify()
    return key


def cache_key(files: Sequence[TextFile], tokenizer: Tokenizer) -> str:
    """Return a hash of the format, the tokenizer, and the names and contents of the files."""
    content = [VERSION, tokenizer.fingerprint, [[file.name, file.sha256] for file in files]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _write(folder: Path, files: Sequence[TextFile], tokenizer: Tokenizer, shard_tokens: int) -> None:
    """Tokenise into ``folder``, which appears whole or not at all. The caller holds the folder's lock."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: we hold its lock
    temporary.mkdir()
    try:
        shards = _ShardWriter(temporary, shard_tokens)
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
        _write_manifest(
            temporary,
            {
                "version": VERSION,
                "tokenizer": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "shards": shards.written,
                "documents": [asdict(document) for document in documents],
            },
        )
        _sync(temporary)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        _sync(path)
        size = path.stat().st_size
        self.written.append({"name": path.name, "tokens": len(tokens), "bytes": size, "crc32": _crc32(path)})


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    checksum = zlib.crc32(json.dumps(manifest).encode())
    path.write_text(json.dumps({**manifest, "crc32": checksum}, indent=1), encoding="utf-8")
    _sync(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = manifest.pop("crc32")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise _corrupt(path, f"it cannot be read ({error})") from error
    if checksum != zlib.crc32(json.dumps(manifest).encode()):
        raise _corrupt(path, "its checksum is not the one that was written")
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {manifest['version']}, this memzoo reads {VERSION}; delete {folder}"
        )
    return manifest


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what killed processes had begun; a living one holds the lock of its folder."""
    for temporary in cache_dir.glob("*.tmp"):
        try:
            with FileLock(temporary.with_suffix(".lock"), timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)
        except Timeout:
            continue


def _corrupt(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is corrupt: {reason}; delete the folder {path.parent}, it is then written anew")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk, where the system can be asked to (Windows knows no open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
