"""Everything on disk, in a database of SQLite: it outlives the process, and may be larger than memory.

Entries are only added, so a version is the number of a commit, and to read it is to read what commits up to it wrote.
SQLite's write-ahead log does the rest: a commit is there as a whole or not at all, whatever ends the process. Readers
never wait for the writer; the writer waits for them only when the log has grown long and is to begin again.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from memzoo.layers.stores import database
from memzoo.layers.stores.branches import Append, Branch, BranchingStore, Drop, Span
from memzoo.layers.stores.ranking import best, candidates, rounding
from memzoo.layers.stores.store import Entries, Layout

if TYPE_CHECKING:
    from sqlite3 import Connection


class DiskStore(BranchingStore):
    """A ``MemoryStore`` in a folder.

    It finds exactly what a ``HostStore`` finds. Opening the folder again goes on behind the last commit, however the
    process ended; what ``flush`` has waited for is on the disk. One store at a time may write to a folder, and any
    number read it.

    Args:
        path: The folder; made if it is not there.
        synchronous: Commit in the call that appends. Otherwise a thread does, all that waits in one commit.
        read_only: Read a folder that another process may be writing to. ``snapshot`` follows its commits.

    Raises:
        ValueError: Another store writes to the folder, or there is nothing to read in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, synchronous: bool = False, read_only: bool = False) -> None:
        super().__init__(synchronous=synchronous)
        self.path, self.read_only = Path(path).absolute(), read_only
        self._file = self.path / "entries.sqlite"
        self._idle: list[Connection] = []
        if read_only and not self._file.exists():
            raise ValueError(f"path={str(path)!r} holds no store to read; open it for writing first")
        with ExitStack() as opened:
            if not read_only:
                _make(self.path)
                opened.callback(_claim(self.path))
                self._writing = opened.enter_context(closing(database.connect(self._file, read_only=False)))
                database.prepare(self._writing, self._file, self._identity)
            opened.callback(self._disconnect)
            self._load()
            self._opened = opened.pop_all()

    def append(self, sequence: int, start: int, entries: Entries) -> int:
        """See ``MemoryStore``."""
        self._check_writable()
        return super().append(sequence, start, entries)

    def snapshot(self) -> int:
        """See ``MemoryStore``."""
        if not self.read_only:
            return self._version
        self._check_open()
        with self._reading() as connection:
            return int(database.noted(connection)["version"])

    def drop(self, sequences: Iterable[int]) -> None:
        """See ``MemoryStore``."""
        self._check_writable()
        super().drop(sequences)

    def _check_writable(self) -> None:
        if self.read_only:
            raise ValueError(f"the store at path={str(self.path)!r} is open with read_only=True; open it for writing")

    def _load(self) -> None:
        with self._reading() as connection:
            facts = database.noted(connection)
            self._identity, self._version, self._last = facts["identity"], facts["version"], facts["last"]
            self._layout = Layout.from_json(facts["layout"])
            if self.read_only:
                return
            for branch, kept in database.branches(connection):
                if kept is None:
                    self._branches[branch.number] = branch
                else:
                    self._shared[branch.number] = kept

    def _commit(self, items: list[Append | Drop]) -> None:
        version = self._version + 1
        layout = None if self._layout is None else self._layout.as_json()
        with self._writing as connection:
            connection.execute("BEGIN IMMEDIATE")
            for item in items:
                if isinstance(item, Drop):
                    database.delete(connection, item)
                    continue
                database.write_branch(connection, item.number, item.shared, item.end)
                database.write_entries(connection, item.number, version, item.entries)
            database.note(connection, version=version, last=self._last, layout=layout)
        self._version = version
        database.fold_log(self._writing, self._file)

    def _find(self, spans: tuple[Span, ...], query: Tensor, count: int, version: int) -> Entries:
        with self._reading() as connection:
            scan = database.Scan(connection, cast(Layout, self._layout), version)
            products = scan.products(spans, query)
            found = scan.entries(candidates(products, count, rounding(query, scan.largest, products.dtype)))
        return found.select(best(found.keys, query, count))

    def _branch(self, sequence: int) -> Branch:
        if not self.read_only:
            return super()._branch(sequence)
        with self._reading() as connection:
            self._layout = Layout.from_json(database.noted(connection)["layout"])
            rows = database.branches(connection, f"number = {int(sequence)} AND kept IS NULL")
            return self._known(sequence, {branch.number: branch for branch, _ in rows})

    @contextmanager
    def _reading(self) -> "Iterator[Connection]":
        """See the database as it is now, whatever is committed meanwhile."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = database.connect(self._file, read_only=True)
        try:
            with connection:
                connection.execute("BEGIN")
                yield connection
        finally:
            self._idle.append(connection)
            if self._closed:
                self._disconnect()

    def _disconnect(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _release(self) -> None:
        self._opened.close()


def _make(path: Path) -> None:
    """Make a folder, or take one that is there.

    Raises:
        ValueError: A file is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"path={str(path)!r} is a file, or below one; name a folder") from error


def _claim(path: Path) -> Callable[[], None]:
    """Keep others from writing to a folder, until the process ends or what is returned is called.

    Raises:
        ValueError: Someone else does.
    """
    from filelock import FileLock, Timeout

    claim = FileLock(path / "lock", thread_local=False)
    try:
        claim.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"path={str(path)!r} is being written to by another store; close that one, or open this one with "
            f"read_only=True"
        ) from None
    return claim.release
