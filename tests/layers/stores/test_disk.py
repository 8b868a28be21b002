"""DiskStore: what a folder holds when it is opened again, whatever ended the process that wrote to it."""

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memzoo.layers.stores import DiskStore, HostStore, database
from tests.layers.stores.store_cases import APPENDS, FEW, HEADS, WIDTH, Model, entries, queries, run, same

[QUERY] = queries(1)
ROWS = 5  # of a numbered chunk

CHUNK = f"""
import torch
from memzoo.layers.stores import DiskStore, Entries

def chunk(number):
    rows = torch.arange({ROWS})
    keys = (number + rows[:, None, None] / 8).expand({ROWS}, {HEADS}, {WIDTH})
    return Entries(keys, -keys, number * {ROWS} + rows, keys[:, 0, 0])
"""
DEFINED: dict[str, Any] = {}
exec(CHUNK, DEFINED)


@FEW
@given(APPENDS, APPENDS, st.integers(1, 6))
def test_opening_it_again_goes_on_where_it_was(tmp_path_factory, first, second, count):
    path, model = tmp_path_factory.mktemp("store"), Model()
    with DiskStore(path, synchronous=True) as store:
        versions = run(store, model, first)
    with DiskStore(path, synchronous=True) as store:
        assert store.snapshot() == versions[-1]
        versions += run(store, model, second)
        for sequence, held in model.sequences.items():
            for version in versions:
                expected = model.query(sequence, QUERY, count, held.end, version)
                same(store.query(sequence, QUERY, count, before=held.end, version=version), expected)


def test_what_was_dropped_stays_so_and_what_is_shared_is_kept_until_nobody_shares_it(tmp_path):
    with DiskStore(tmp_path, synchronous=True) as store:
        parent = store.append(0, 0, entries([0, 1, 2, 3]))
        parent = store.append(parent, 4, entries([4, 5]))
        child = store.append(parent, 2, entries([2]))
        store.drop([parent])
    with DiskStore(tmp_path, synchronous=True) as store:
        with pytest.raises(ValueError, match=f"sequence={parent}"):
            store.query(parent, QUERY, 9, before=9)
        assert store.query(child, QUERY, 9, before=9).positions.tolist() == [0, 1, 2]
        assert count(tmp_path, "blocks") == 2  # of the parent's, the one that the child shares
        store.drop([child])
        assert count(tmp_path, "blocks") == count(tmp_path, "sequences") == 0
    with DiskStore(tmp_path, synchronous=True) as store:
        assert store.append(0, 0, entries([])) == child + 1


def count(path: Path, table: str) -> int:
    [rows] = sqlite3.connect(path / "entries.sqlite").execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_finds_what_a_host_store_finds_across_blocks(tmp_path, dtype, monkeypatch):
    """Of keys in many blocks, multiplied in several batches, with a fork and an end inside of a block."""
    monkeypatch.setattr(database, "BLOCK_BYTES", 7 * HEADS * WIDTH * dtype.itemsize)
    monkeypatch.setattr(database, "PRODUCT_BYTES", 600)
    generator = torch.Generator().manual_seed(1)
    with DiskStore(tmp_path, synchronous=True) as disk, HostStore() as host:
        for store in (disk, host):
            generator.manual_seed(1)
            sequence = 0
            for start in (0, 40, 90):
                new = entries([*range(start, start + 37)], seed=start, dtype=dtype)
                keys = torch.randn(37, HEADS, WIDTH, generator=generator).to(dtype)
                sequence = store.append(sequence, start, replace(new, keys=keys))
            fork = store.append(sequence, 55, entries([*range(56, 80)], seed=5, dtype=dtype))
            assert (sequence, fork) == (1, 2)
        for query in torch.randn(6, HEADS, WIDTH, generator=generator).to(dtype):
            for one in (sequence, fork):
                for before in (0, 1, 25, 60, 999):
                    for wanted in (1, 9, 500):
                        expected = host.query(one, query, wanted, before=before)
                        same(disk.query(one, query, wanted, before=before), expected)


def test_keys_that_are_not_numbers_are_held_like_others(tmp_path):
    keys = torch.tensor([1.0, torch.nan, torch.inf, 2.0])[:, None, None].expand(4, HEADS, WIDTH).double()
    with DiskStore(tmp_path, synchronous=True) as disk, HostStore() as host:
        for store in (disk, host):
            store.append(0, 0, replace(entries([0, 1, 2, 3]), keys=keys))
            found = store.query(1, QUERY.abs() + 1, 2, before=9)
            assert found.positions.tolist() == [1, 2]


# Who writes, who reads.


def test_one_store_at_a_time_writes_and_others_read(tmp_path):
    with DiskStore(tmp_path / "a folder%20#?", synchronous=True) as store:
        path = store.path
        with pytest.raises(ValueError, match=r"a folder.*is being written to by another store"):
            DiskStore(path)
        sequence = store.append(0, 0, entries([0, 1]))
        with DiskStore(path, read_only=True) as reader:
            version = reader.snapshot()
            assert version == store.snapshot()
            fork = store.append(store.append(sequence, 2, entries([2])), 1, entries([1]))
            assert reader.snapshot() == store.snapshot()
            same(reader.query(fork, QUERY, 9, before=9), store.query(fork, QUERY, 9, before=9))
            assert reader.query(sequence, QUERY, 9, before=9, version=version).positions.tolist() == [0, 1]
            store.drop([sequence])
            with pytest.raises(ValueError, match=f"sequence={sequence}"):
                reader.query(sequence, QUERY, 9, before=9)
            for change in (lambda: reader.append(0, 0, entries([0])), lambda: reader.drop([fork])):
                with pytest.raises(ValueError, match="read_only=True"):
                    change()
        with pytest.raises(ValueError, match="is closed"):
            reader.snapshot()
    with DiskStore(path, read_only=True) as reader:
        same(reader.query(fork, QUERY, 9, before=9), reader.query(fork, QUERY, 9, before=9, version=version + 2))


def test_a_reader_may_come_before_the_first_entries(tmp_path):
    with DiskStore(tmp_path, synchronous=True) as store, DiskStore(tmp_path, read_only=True) as reader:
        assert reader.snapshot() == 0
        sequence = store.append(0, 0, entries([0]))
        same(reader.query(sequence, QUERY, 9, before=9), entries([0]))


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no store to read"):
        DiskStore(tmp_path / "nothing", read_only=True)
    with DiskStore(tmp_path, synchronous=True) as store, store._writing as connection:
        database.note(connection, format=99)
    for _ in range(2):  # nothing is left locked
        with pytest.raises(ValueError, match="format=99"):
            DiskStore(tmp_path)


def test_the_layout_is_that_of_the_folder(tmp_path):
    with DiskStore(tmp_path, synchronous=True) as store:
        store.append(0, 0, entries([0]))
    with DiskStore(tmp_path, synchronous=True) as store:
        with pytest.raises(ValueError, match="use another store for them"):
            store.append(0, 0, entries([0], heads=HEADS + 1))
        with pytest.raises(ValueError, match="query has shape"):
            store.query(1, QUERY[:1], 1, before=1)


# What ends the process.


def program(path: Path, body: str) -> subprocess.Popen[str]:
    code = f"{CHUNK}\nstore = DiskStore({str(path)!r})\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def forked(path: Path, body: str) -> tuple[BaseProcess, TextIO]:
    """Start a program that is to be killed, and return what it prints: a fork, which has imported torch already."""
    reading, writing = os.pipe()

    def work() -> None:
        os.close(reading)
        with open(writing, "w") as out:
            exec(f"{CHUNK}\nstore = DiskStore({str(path)!r})\n{body}", {"out": out})

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    os.close(writing)
    return process, open(reading)


def held(store: DiskStore, sequence: int = 1) -> int:
    """Return how many chunks a sequence holds, all of them whole, and as they were written."""
    found = store.query(sequence, QUERY.float(), 10**6, before=10**6)
    chunks, rest = divmod(len(found), ROWS)
    assert rest == 0
    for number in range(chunks):
        same(found.select(slice(number * ROWS, (number + 1) * ROWS)), DEFINED["chunk"](number))
    return chunks


def test_a_killed_process_leaves_all_that_it_flushed_and_only_whole_appends(tmp_path):
    """SIGKILL at random moments, while the writer is busy."""
    body = """
number = store.query(1, torch.zeros(2, 3), 10**6, before=10**6).positions.numel() // 5 if store.snapshot() else 0
sequence = 1 if store.snapshot() else 0
while True:
    for _ in range(3):
        sequence = store.append(sequence, number * 5, chunk(number))
        number += 1
    store.flush()
    print(number, file=out, flush=True)
"""
    chance = random.Random(0)
    acknowledged = 0
    for _ in range(3):
        process, printed = forked(tmp_path, body)
        with printed:
            for _ in range(chance.randint(1, 8)):
                acknowledged = int(printed.readline())
            time.sleep(chance.random() / 50)
            process.kill()
            rest = printed.read().split()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        acknowledged = int(rest[-1]) if rest else acknowledged
        with DiskStore(tmp_path, synchronous=True) as store:
            number = held(store)
            assert acknowledged <= number <= acknowledged + 3
            assert store.append(1, number * ROWS, DEFINED["chunk"](number)) == 1
            assert held(store) == number + 1


def test_a_program_that_just_ends_leaves_all_that_it_appended(tmp_path):
    body = "sequence = 0\nfor number in range(50):\n    sequence = store.append(sequence, number * 5, chunk(number))"
    assert program(tmp_path, body).wait(60) == 0
    with DiskStore(tmp_path) as store:
        assert held(store) == 50


def test_what_is_not_a_store_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="is a file"):
        DiskStore(tmp_path / "file")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "entries.sqlite").write_text("no database, but long enough to be taken for one" * 9)
    with pytest.raises(ValueError, match="is not a store"):
        DiskStore(tmp_path / "text")
    (tmp_path / "other").mkdir()
    other = sqlite3.connect(tmp_path / "other" / "entries.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    with pytest.raises(ValueError, match="another program's database"):
        DiskStore(tmp_path / "other")
    assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    with pytest.raises(ValueError, match="no store to read here"):
        DiskStore(tmp_path / "other", read_only=True)
    other.close()


def test_a_store_stays_where_it_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with DiskStore("store", synchronous=True) as store:
        sequence = store.append(0, 0, entries([0, 1]))
        monkeypatch.chdir(tmp_path / "elsewhere")
        store._disconnect()
        assert len(store.query(sequence, QUERY, 9, before=9)) == 2
    assert not (tmp_path / "elsewhere" / "store").exists()


def test_the_log_begins_again_when_it_is_long(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LOG_BYTES", 2**20)
    with DiskStore(tmp_path, synchronous=True) as store:
        sequence, sizes = 0, []
        for number in range(40):
            with store._reading() as old:
                old.execute("SELECT * FROM facts").fetchall()
            sequence = store.append(sequence, number * 100, entries([*range(number * 100, number * 100 + 100)]))
            sizes.append((tmp_path / "entries.sqlite-wal").stat().st_size)
    assert max(sizes) < 2**21  # all appends together are many times that
    emptied = sizes.count(0)
    assert 0 < emptied < len(sizes) / 2, "it is cut when it is long, and not at every commit"
