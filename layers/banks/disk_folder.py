"""The folder of a memory bank: made, claimed for writing, and what lies in it."""

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from memzoo.layers.banks.disk_files import sync_file, sync_folder, write_all, write_whole
from memzoo.layers.banks.disk_format import HEADER, Header, check_byte_order, file_bytes, level_file, tree_file
from memzoo.layers.banks.journal import Journal
from memzoo.layers.cluster_tree import ClusterTree


@dataclass(frozen=True, eq=False)
class State:
    """What a folder holds: a header and, while the commit that it is of is not in its place, that one's journal."""

    header: Header
    journal: Journal | None

    @classmethod
    def load(cls, folder: Path) -> Self:
        # The journal before the header: a commit that has gone by in between leaves a header that is newer than both.
        journal, header = Journal.load(folder), Header.load(folder)
        return cls(journal.header, journal) if journal is not None and journal.follows(header) else cls(header, None)

    @property
    def key(self) -> tuple[bytes, bool]:
        """What tells states apart."""
        return self.header.stamp, self.journal is None


def make_folder(target: Path, header: Header, tree: ClusterTree) -> Path:
    """Make the folder of a bank, whole or not at all, and return it.

    Raises:
        ValueError: There is something in its place, or it could not be made.
    """
    check_byte_order()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"path={str(target)!r} is there already; open it, remove it, or name another folder")
    place = partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        save_tree(tree, partial)
        for level in header.layout.levels:
            _make_sparse(partial / level_file(level), file_bytes(header.layout, level))
        write_whole(partial / HEADER, lambda descriptor: write_all(descriptor, header.text))
        sync_folder(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
        place = target
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"path={str(target)!r} cannot be made ({error}); name another folder") from error
        raise
    return target


def load(folder: Path, known: ClusterTree | None = None) -> tuple[State, ClusterTree]:
    """Read what a folder holds, and its tree, if that is not a known one.

    Raises:
        ValueError: A file is missing or damaged.
    """
    while True:
        state = State.load(folder)
        fingerprint, path = state.header.tree, folder / tree_file(state.header.tree)
        if known is not None and known.fingerprint == fingerprint:
            return state, known
        try:
            tree = ClusterTree.load(path)
        except FileNotFoundError:
            if State.load(folder).key != state.key:
                continue  # a commit with another tree went by
            raise ValueError(f"path={str(path)!r} is missing; copy the bank again") from None
        if tree.fingerprint != fingerprint:
            raise ValueError(
                f"path={str(path)!r} holds a tree with fingerprint {tree.fingerprint[:12]}, the bank's has "
                f"{fingerprint[:12]}; copy the bank again"
            )
        return state, tree


def save_tree(tree: ClusterTree, folder: Path) -> None:
    """Put a tree in a folder, on the disk.

    Raises:
        OSError: It could not be written.
    """
    from safetensors import SafetensorError

    path = folder / tree_file(tree.fingerprint)
    try:
        tree.save(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync_file(path)


def claim(path: Path) -> Callable[[], None]:
    """Keep others from writing to a folder, until the process ends or what is returned is called.

    Raises:
        ValueError: Someone else does, or the folder is not to be written to.
    """
    from filelock import FileLock, Timeout

    lock, process = FileLock(path / "lock", thread_local=False), os.getpid()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"path={str(path)!r} is being written to by another bank; close that one, or open this one with "
            f"read_only=True"
        ) from None
    except OSError as error:
        raise ValueError(f"path={str(path)!r} cannot be written to ({error}); use read_only=True") from error

    def release() -> None:
        if os.getpid() == process:
            lock.release()

    return release


def _make_sparse(path: Path, size: int) -> None:
    write_whole(path, lambda descriptor: os.ftruncate(descriptor, size))
