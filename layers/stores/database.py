"""The tables of a store on disk, and what is read from and written to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memzoo.layers.stores.branches import Branch, Drop
from memzoo.layers.stores.ranking import largest_norm
from memzoo.layers.stores.store import Entries, Layout

if TYPE_CHECKING:
    from sqlite3 import Connection

FORMAT = 1
SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, fact TEXT NOT NULL)",
    # kept: of a dropped sequence, the position before which others share its entries
    "CREATE TABLE sequences (number INTEGER PRIMARY KEY, shared TEXT NOT NULL, stop INTEGER NOT NULL, kept INTEGER)",
    # first, last: positions of its entries; largest: norm of its keys
    """CREATE TABLE blocks (
        id INTEGER PRIMARY KEY, sequence INTEGER NOT NULL, version INTEGER NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, largest REAL NOT NULL, keys BLOB NOT NULL, "values" BLOB NOT NULL,
        positions BLOB NOT NULL, scores BLOB NOT NULL
    )""",
    "CREATE INDEX blocks_in_order ON blocks (sequence, first)",
)
PAGE_BYTES = 2**15
MAPPED_BYTES = 2**31  # the most that SQLite maps
LOG_BYTES = 2**26  # of the write-ahead log, from which on the writer waits for readers to let it begin again
APPLICATION = 0x6D656D7A  # "memz": tells a store from other databases
BLOCK_BYTES = 2**16  # of keys, at most: what is found is read by blocks
PRODUCT_BYTES = 2**20  # of keys that are multiplied at once, about


def connect(file: Path, *, read_only: bool) -> "Connection":
    """Open a database for one thread at a time. Transactions begin where they are said to."""
    import sqlite3  # some builds of Python lack it, and they can do without a store on disk

    address = f"{file.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    connection = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=60)
    connection.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
    return connection


def prepare(connection: "Connection", file: Path, identity: int) -> None:
    """Make the tables where there are none, for a store of that identity; have commits survive a loss of power.

    Raises:
        ValueError: The file is something else.
    """
    from sqlite3 import DatabaseError

    try:
        [tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except DatabaseError as error:
        raise ValueError(f"{str(file)!r} is not a store ({error}); use another path") from error
    if tables and connection.execute("PRAGMA application_id").fetchone() != (APPLICATION,):
        raise ValueError(f"{str(file)!r} is another program's database; use another path")
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            for statement in SCHEMA:
                connection.execute(statement)
            note(connection, format=FORMAT, identity=identity, version=0, last=0, layout=None)


def fold_log(connection: "Connection", file: Path) -> None:
    """Have the log begin again where it has grown long: readers that overlap would keep it growing."""
    log = file.with_name(file.name + "-wal")
    if log.exists() and log.stat().st_size > LOG_BYTES:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # RESTART would leave it long, and so be due every time


def note(connection: "Connection", **facts: Any) -> None:
    """Write facts about the store."""
    rows = [(name, json.dumps(fact)) for name, fact in facts.items()]
    connection.executemany("REPLACE INTO facts VALUES (?, ?)", rows)


def noted(connection: "Connection") -> dict[str, Any]:
    """Return the facts about the store.

    Raises:
        ValueError: It was written in another format, or is not there.
    """
    from sqlite3 import DatabaseError

    try:
        facts = {name: json.loads(fact) for name, fact in connection.execute("SELECT name, fact FROM facts")}
    except DatabaseError as error:
        raise ValueError(f"there is no store to read here ({error}); open it for writing first") from error
    if facts["format"] != FORMAT:
        raise ValueError(f"the store has format={facts['format']}, this version of memzoo reads {FORMAT}; use another")
    return facts


def write_branch(connection: "Connection", number: int, shared: tuple[tuple[int, int], ...], end: int) -> None:
    """Write a new sequence, or where an old one goes on now."""
    connection.execute(
        "INSERT INTO sequences VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE SET stop = excluded.stop",
        (number, json.dumps(shared), end),
    )


def branches(connection: "Connection", where: str = "TRUE") -> Iterator[tuple[Branch, int | None]]:
    """Return sequences; for a dropped one, with the position before which others share its entries."""
    for number, shared, end, kept in connection.execute(f"SELECT * FROM sequences WHERE {where}"):
        yield Branch(number, tuple((other, before) for other, before in json.loads(shared)), end), kept


def write_entries(connection: "Connection", number: int, version: int, entries: Entries) -> None:
    """Write entries of a sequence's own, as blocks."""
    rows = max(1, BLOCK_BYTES // max(1, entries.keys[:1].nbytes))
    for start in range(0, len(entries), rows):
        block = entries.select(slice(start, start + rows))
        facts = int(block.positions[0]), int(block.positions[-1]), largest_norm(block.keys)
        data = (tensor.view(torch.uint8).numpy() for tensor in block.tensors)
        statement = "INSERT INTO blocks VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        connection.execute(statement, (number, version, *facts, *data))


def delete(connection: "Connection", drop: Drop) -> None:
    """Delete the blocks that nobody shares. One that is shared in part stays, and its rest is not read."""
    for number, end in drop.unshared:
        connection.execute("DELETE FROM blocks WHERE sequence = ? AND first >= ?", (number, end))
        if end:
            connection.execute("UPDATE sequences SET kept = ? WHERE number = ?", (end, number))
        else:
            connection.execute("DELETE FROM sequences WHERE number = ?", (number,))


class Scan:
    """The products of a query with all keys of spans, and the entries behind them.

    Args:
        connection: Inside of a transaction.
        layout: Of the entries.
        version: The latest that is seen.
    """

    def __init__(self, connection: "Connection", layout: Layout, version: int) -> None:
        self.connection, self.layout, self.version = connection, layout, version
        self.dtype = torch.promote_types(layout.dtype, torch.float32)
        self.ids: list[int] = []
        self.sizes: list[int] = []
        self.largest = 0.0

    def products(self, spans: tuple[tuple[int, int], ...], query: Tensor) -> Tensor:
        """Multiply all keys, in the order of their positions."""
        flat = query.flatten().to("cpu", self.dtype)
        products, waiting = [flat.new_empty(0)], bytearray()
        for keys in self._keys(spans, flat.numel() * self.layout.dtype.itemsize):
            waiting += keys
            if len(waiting) >= PRODUCT_BYTES:
                products.append(self._rows(waiting, len(flat)) @ flat)
                waiting = bytearray()
        return torch.cat([*products, self._rows(waiting, len(flat)) @ flat])

    def entries(self, index: Tensor) -> Entries:
        """Return the entries of some of the products, in rising order."""
        ends = torch.tensor(self.sizes, dtype=torch.long, device="cpu").cumsum(0)
        blocks, counts = torch.bucketize(index, ends, right=True).unique_consecutive(return_counts=True)
        found = [self.layout.empty()]
        for block, rows in zip(blocks.tolist(), index.split(counts.tolist()), strict=True):
            found.append(self._block(self.ids[block]).select(rows - (ends[block] - self.sizes[block])))
        return Entries.join(found)

    def _keys(self, spans: tuple[tuple[int, int], ...], row_bytes: int) -> Iterator[memoryview]:
        statement = """SELECT id, last, largest, keys FROM blocks
            WHERE sequence = ? AND first < ? AND version <= ? ORDER BY first"""
        for number, before in spans:
            for name, last, largest, keys in self.connection.execute(statement, (number, before, self.version)):
                rows = len(keys) // row_bytes if last < before else self._rows_before(name, before)
                self.ids.append(name)
                self.sizes.append(rows)
                self.largest = max(self.largest, largest)
                yield memoryview(keys)[: rows * row_bytes]

    def _rows_before(self, name: int, before: int) -> int:
        [positions] = self.connection.execute("SELECT positions FROM blocks WHERE id = ?", (name,)).fetchone()
        return int(torch.searchsorted(_tensor(bytearray(positions), torch.long), before))

    def _rows(self, data: bytearray, width: int) -> Tensor:
        return _tensor(data, self.layout.dtype).to(self.dtype).view(-1, width)

    def _block(self, name: int) -> Entries:
        statement = 'SELECT keys, "values", positions, scores FROM blocks WHERE id = ?'
        keys, values, positions, scores = map(bytearray, self.connection.execute(statement, (name,)).fetchone())
        shape = -1, self.layout.kv_heads, self.layout.head_dim
        return Entries(
            _tensor(keys, self.layout.dtype).view(shape),
            _tensor(values, self.layout.dtype).view(shape),
            _tensor(positions, torch.long),
            _tensor(scores, self.layout.score_dtype),
        )


def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
