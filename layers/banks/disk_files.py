"""Reading and writing the files of a memory bank: at offsets, checked, and so that they stay written."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self, cast

from memzoo.layers.banks.disk_format import PIECE, checksum_of_piece, checksum_of_pieces

SHARED = 2**22  # bytes from which on two threads copy a block that is in memory
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlockFile:
    """A file that is read and written at offsets; by many threads at once where the system has ``preadv``.

    Args:
        path: Of a file that is there.
        writable: Whether to write to it too.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self._file = open(path, "r+b" if writable else "rb", buffering=0)  # noqa: SIM115 - closed by close
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Count its bytes."""
        return os.fstat(self._file.fileno()).st_size

    def read(self, out: memoryview, offset: int) -> int | None:
        """Fill memory from the file, and return the checksum of it; None if it ends before, or cannot be read."""
        digests: list[int | None] = [None] * -(-len(out) // PIECE)
        starts = iter(range(0, len(out), PIECE))

        def work() -> None:
            for start in starts:
                piece = out[start : start + PIECE]
                if not self._fill(piece, offset + start):
                    return
                digests[start // PIECE] = checksum_of_piece(piece)  # now, while it is in the processor's cache

        if len(out) < SHARED or not self._is_in_memory(offset, len(out)):
            work()  # one after another, as a disk reads best
        else:
            other = _in_other_thread(work)
            try:
                work()
            finally:
                if other is not None and not other.cancel():
                    other.result()
        return None if None in digests else checksum_of_pieces(cast(list[int], digests))

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes."""
        with self._lock:
            os.lseek(self._file.fileno(), offset, os.SEEK_SET)
            write_all(self._file.fileno(), data)

    def reserve(self, offset: int, count: int) -> None:
        """Take the place for bytes that were never written, so that the disk is not full when they are.

        Raises:
            OSError: It is full. A file system that cannot reserve says nothing.
        """
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), offset, count)
            except OSError as error:
                if error.errno in _FULL:
                    raise

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._file.fileno())

    def after_fork(self) -> None:
        """Let go of what threads of the other process were doing."""
        self._lock = Lock()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_in_memory(self, offset: int, count: int) -> bool:
        """Whether the system seems to have bytes of the file in its cache: it has the first and the last."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        try:
            return all(
                os.preadv(self._file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
                for place in (offset, offset + count - 1)
            )
        except OSError:  # it would have to wait for the disk, or the file system does not say
            return False

    def _fill(self, piece: memoryview, offset: int) -> bool:
        done = 0
        while done < len(piece):
            try:
                count = self._read_some(piece[done:], offset + done)
            except OSError:  # the disk says itself that it cannot
                count = 0
            if not count:
                return False
            done += count
        return True

    def _read_some(self, piece: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [piece], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(piece) or 0


def _in_other_thread(work: Callable[[], None]) -> "Future[None] | None":
    try:
        return _other_thread(os.getpid()).submit(work)
    except RuntimeError:  # the interpreter is shutting down, and starts no more work
        return None


@cache
def _other_thread(process: int) -> ThreadPoolExecutor:
    """Return the thread that shares in reading, one in each process: a fork has none of its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"memory-blocks-{process}")


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write bytes to an open file."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def write_whole(path: Path, write: Callable[[int], None]) -> None:
    """Put a new file in a place, on the disk as a whole or not at all.

    Args:
        path: Of the file.
        write: Writes its contents to a file descriptor.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with BlockFile(path, writable=True) as file:
        file.sync()


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where a system has such a thing."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
