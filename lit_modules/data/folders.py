"""Cache folders: prepared once, named after what they were made from, whole or not there.

A folder is written beside its place and moved there when it is complete and on disk: a process killed at any point
leaves either no folder or a whole one, and what it had begun is removed by the next writer. A folder never changes.
``manifest.json`` names its files, with their sizes and checksums, and holds what else its reader must know.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def prepare_folder(cache_dir: Path, key: str, write: Callable[[Path], None]) -> Path:
    """Return ``cache_dir / key``, written first if it is not there.

    Of several processes that want the same folder, one writes and the others wait for it.

    Args:
        cache_dir: Where folders are kept; it is made if need be.
        key: Name of the folder.
        write: Fills the empty folder that it is given, ``write_manifest`` last, and says by ``writing_to`` which of its
            errors are the cache's.

    Raises:
        ValueError: ``cache_dir`` cannot be written.
    """
    folder = cache_dir / key
    if not folder.is_dir():
        with writing_to(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache_dir / f"{key}.lock").acquire()
        with lock:
            if not folder.is_dir():
                _write_whole(folder, write)
                _remove_leftovers(cache_dir)
    return folder


@contextmanager
def writing_to(cache_dir: Path) -> Iterator[None]:
    """Name ``cache_dir`` where the system refuses what is done within.

    Raises:
        ValueError: It does.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cache_dir={str(cache_dir)!r} cannot be written ({error}); "
            f"pass a folder with room as cache_dir, or set MEMZOO_CACHE to one"
        ) from error


def describe_file(path: Path) -> dict[str, Any]:
    """Wait until a file is on disk, and return its name, size and checksum for the manifest."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "crc32": _crc32(path)}


def check_sizes(folder: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Require files to be as long as they were written.

    Raises:
        ValueError: One is not, or is not there.
    """
    for file in files:
        path = folder / file["name"]
        size = path.stat().st_size if path.is_file() else 0
        if size != file["bytes"]:
            raise corrupt(path, f"it has {size} bytes where {file['bytes']} were written")


def check_contents(folder: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Read files whole and require them to be what was written.

    Raises:
        ValueError: The checksum of one differs.
    """
    for file in files:
        path = folder / file["name"]
        if _crc32(path) != file["crc32"]:
            raise corrupt(path, "its checksum is not the one that was written")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what describes a folder; ``version`` is that of its format."""
    path = folder / "manifest.json"
    checksum = zlib.crc32(json.dumps(manifest).encode())
    path.write_text(json.dumps({**manifest, "crc32": checksum}, indent=1), encoding="utf-8")
    sync(path)


def read_manifest(folder: Path, version: int) -> dict[str, Any]:
    """Read what ``write_manifest`` wrote.

    Raises:
        ValueError: It cannot be read, has changed, or is of another ``version``.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = manifest.pop("crc32")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise corrupt(path, f"it cannot be read ({error})") from error
    if checksum != zlib.crc32(json.dumps(manifest).encode()):
        raise corrupt(path, "its checksum is not the one that was written")
    if manifest["version"] != version:
        raise ValueError(
            f"{path} has format version {manifest['version']}, this memzoo reads {version}; delete {folder}"
        )
    return manifest


def corrupt(path: Path, reason: str) -> ValueError:
    """Return the error that says which folder to delete."""
    return ValueError(f"{path} is corrupt: {reason}; delete the folder {path.parent}, it is then written anew")


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk, where the system can be asked to (Windows knows no open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write ``folder``, which appears whole or not at all. The caller holds the folder's lock."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: we hold its lock
    with writing_to(folder.parent):
        temporary.mkdir()
    try:
        write(temporary)
        with writing_to(folder.parent):
            sync(temporary)
            os.rename(temporary, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what killed processes had begun; a living one holds the lock of its folder."""
    for temporary in cache_dir.glob("*.tmp"):
        try:
            with FileLock(temporary.with_suffix(".lock"), timeout=0):
                shutil.rmtree(temporary, ignore_errors=True)
        except Timeout:
            continue


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
