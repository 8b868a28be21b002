"""Corpus: the text files of a run, found in a fixed order, fingerprinted, and checked to be text."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 1 << 20

# Folders of the standard library that are not its sources: other people's packages, tests, and generated tables.
NOT_SOURCES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
HELP_TEXTS = frozenset({"pydoc_data"})  # prose in tables


@dataclass(frozen=True)
class TextFile:
    """One document to be.

    Attributes:
        name: POSIX path relative to what was asked for, so the same on every machine.
        path: Where it lies on this one.
        sha256: Of its contents, in hexadecimal.
        bytes: Its size.
    """

    name: str
    path: Path
    sha256: str
    bytes: int


def find_text_files(
    paths: Sequence[str] | None, suffixes: Sequence[str] | None = None, *, argument: str = "paths"
) -> list[TextFile]:
    """Find and fingerprint files, sorted by name; a file reached twice counts once.

    Args:
        paths: Files, folders and glob patterns (``**`` crosses folders). A folder stands for all files below it, hidden
            ones left out. None: the sources of the running Python's standard library, without its tests and tables.
        suffixes: File name endings to take from folders; None takes all.
        argument: What the caller calls ``paths``, for messages.

    Raises:
        ValueError: Nothing is found, nothing but empty files is found, or a file is not UTF-8 text.
    """
    if paths is None:
        named = _standard_library(argument)
    else:
        found: dict[Path, str] = {}
        for pattern in paths:
            for name, path in _expand(pattern, suffixes, argument):
                found.setdefault(path.resolve(), name)
        named = [(name, path) for path, name in found.items()]
    files = [_fingerprint(name, path) for name, path in sorted(named, key=lambda item: item[0])]
    if not any(file.bytes for file in files):
        asked = f"{argument}={list(paths or [])!r}"
        raise ValueError(f"{asked} holds no text: {len(files)} file(s), all empty; pass files that are not")
    return files


def find_longest_files(count: int) -> list[TextFile]:
    """Find and fingerprint the longest files of the running Python's standard library, longest first, ties by name.

    They are among its sources, as ``find_text_files(None)`` has them, and the texts of its interactive help.

    Raises:
        ValueError: It has fewer.
    """
    named = _standard_library("books", NOT_SOURCES - HELP_TEXTS)
    if len(named) < count:
        raise ValueError(f"num_books={count} is more than the {len(named)} files of the standard library; lower it")
    longest = sorted(named, key=lambda item: (-item[1].stat().st_size, item[0]))
    return [_fingerprint(name, path) for name, path in longest[:count]]


def read_text(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces of about ``PIECE_BYTES`` that end after a line, checked to be UTF-8 without NUL bytes.

    Raises:
        ValueError: It is not text, or cannot be read.
    """
    position = 0
    try:
        with path.open("rb") as handle:
            while piece := handle.read(PIECE_BYTES):
                piece += handle.readline()  # a line feed is never part of another UTF-8 character
                _check_text(path, piece, position)
                position += len(piece)
                yield piece
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); leave it out or change its permissions") from error


def _check_text(path: Path, piece: bytes, position: int) -> None:
    offset, problem = piece.find(b"\0"), "a NUL byte"
    if offset < 0:
        try:
            piece.decode("utf-8")
        except UnicodeDecodeError as error:
            offset, problem = error.start, "no valid UTF-8"
        else:
            return
    raise ValueError(
        f"{path} is not text: {problem} at offset {position + offset}; convert it to UTF-8 or leave it out "
        f"(suffixes=['.txt'] takes only such files from a folder)"
    )


def _fingerprint(name: str, path: Path) -> TextFile:
    digest, size = hashlib.sha256(), 0
    for piece in read_text(path):
        digest.update(piece)
        size += len(piece)
    return TextFile(name, path, digest.hexdigest(), size)


def _expand(pattern: str, suffixes: Sequence[str] | None, argument: str) -> list[tuple[str, Path]]:
    """Return the (name, path) of every file that one entry of ``paths`` stands for."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if pattern and path.is_dir():
        files = _walk(path, lambda name: suffixes is None or name.endswith(tuple(suffixes)))
        if not files:
            wanted = "visible file" if suffixes is None else f"file that ends in {' or '.join(suffixes)}"
            raise ValueError(f"{argument}={pattern!r} is a folder without a {wanted}; pass another folder or suffixes")
        return files
    depth = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if depth is None:
        raise ValueError(f"{argument}={pattern!r} does not exist; pass a file, a folder or a pattern ('a/**/*.md')")
    root = Path(*path.parts[:depth])
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]
    if not files:
        raise ValueError(f"{argument}={pattern!r} matches no file; check the pattern ('**' crosses folders)")
    return files


def _standard_library(argument: str, skip: frozenset[str] = NOT_SOURCES) -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, lambda name: name.endswith(".py"), skip=skip)
    if not files:
        raise ValueError(
            f"{argument}=None: this Python keeps no sources of its standard library in {root}; pass {argument}"
        )
    return files


def _walk(root: Path, wanted: Callable[[str], bool], skip: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and wanted(name)]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return found
