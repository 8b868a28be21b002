"""Commits in a thread of their own: nothing changes under a reader, nothing is lost, no error is swallowed."""

import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from memzoo.layers.stores import DiskStore, HostStore, database, host
from memzoo.layers.stores.writer import Writer
from tests.layers.stores.store_cases import entries, queries, same

[QUERY] = queries(1)
SECONDS = 20.0  # that nothing here takes


@pytest.fixture(params=["host", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    opened = HostStore(synchronous=False) if request.param == "host" else DiskStore(tmp_path / "store")
    yield opened
    opened.close()


class Gate:
    """Stands in for a function, and lets callers through from the ``after``-th call on only when it is open."""

    def __init__(self, function: Any, after: int = 0) -> None:
        self.function, self.left = function, after
        self.reached, self.open = Event(), Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.left == 0:
            self.reached.set()
            assert self.open.wait(SECONDS)
        else:
            self.left -= 1
        return self.function(*args, **options)


def everything(store: Any, sequence: int, version: int | None = None) -> list[int]:
    return store.query(sequence, QUERY, 999, before=999, version=version).positions.tolist()


def test_a_version_stays_what_it_is_while_appends_wait_and_flush_shows_them(store):
    sequence = store.append(0, 0, entries([0, 1]))
    store.flush()
    version, before = store.snapshot(), store.query(sequence, QUERY, 9, before=9)
    gate = store._writer._commit = Gate(store._writer._commit)
    passed = entries([2, 3])
    assert store.append(sequence, 2, passed) == sequence
    passed.positions.zero_()  # the caller's own
    assert gate.reached.wait(SECONDS)
    assert store.append(sequence, 4, entries([5])) == sequence
    fork = store.append(sequence, 3, entries([3, 4]))
    other = store.append(0, 0, entries([0]))
    for pinned in (version, None):
        same(store.query(sequence, QUERY, 9, before=9, version=pinned), before)
        same(store.query(fork, QUERY, 9, before=9, version=pinned), before)
        assert everything(store, other, pinned) == []
    assert store.snapshot() == version
    gate.open.set()
    store.flush()
    assert store.snapshot() == version + 2  # what waited together was committed together
    assert everything(store, sequence) == [0, 1, 2, 3, 5]
    assert everything(store, sequence, version + 1) == [0, 1, 2, 3]
    assert everything(store, fork) == [0, 1, 2, 3, 4]
    assert everything(store, other) == [0]
    same(store.query(sequence, QUERY, 9, before=9, version=version), before)


def test_nothing_of_a_commit_is_seen_before_all_of_it_is(store, monkeypatch):
    """The writer is stopped within a commit, with some of it written."""
    sequence = store.append(0, 0, entries([0, 1]))
    store.flush()
    version, before = store.snapshot(), store.query(sequence, QUERY, 9, before=9)
    waiting = store._writer._commit = Gate(store._writer._commit)
    store.append(sequence, 2, entries([2]))
    assert waiting.reached.wait(SECONDS)
    store.append(sequence, 3, entries([3, 4]))
    store.append(sequence, 5, entries([5, 6]))
    new = store.append(0, 0, entries([0]))
    where = (host._Rows, "extend") if isinstance(store, HostStore) else (database, "write_entries")
    gate = Gate(getattr(*where), after=3)
    monkeypatch.setattr(*where, lambda *args: gate(*args))
    waiting.open.set()
    assert gate.reached.wait(SECONDS)
    assert store.snapshot() == version + 1
    assert everything(store, sequence) == [0, 1, 2]
    assert everything(store, new) == []
    same(store.query(sequence, QUERY, 9, before=9, version=version), before)
    gate.open.set()
    store.flush()
    assert everything(store, sequence) == [0, 1, 2, 3, 4, 5, 6]
    assert everything(store, new) == [0]


def test_readers_in_other_threads_see_versions_that_do_not_change_and_whole_appends(store):
    sequence = store.append(0, 0, entries([0, 1, 2]))
    store.flush()
    version, pinned = store.snapshot(), store.query(sequence, QUERY, 2, before=999)
    faults: list[BaseException] = []

    def read() -> None:
        try:
            seen = 0
            while seen < 3 * 40:
                same(store.query(sequence, QUERY, 2, before=999, version=version), pinned)
                latest = store.snapshot()
                found = everything(store, sequence, latest)
                assert found == [*range(len(found))]
                assert len(found) % 3 == 0
                assert found == everything(store, sequence, latest)
                assert len(found) >= seen
                seen = len(found)
        except BaseException as fault:
            faults.append(fault)

    readers = [Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for start in range(3, 3 * 40, 3):
        store.append(sequence, start, entries([start, start + 1, start + 2], seed=start))
    store.flush()
    for reader in readers:
        reader.join(SECONDS)
    assert not faults


def test_what_cannot_be_committed_is_said_by_every_call_and_nothing_of_it_is_seen(store, monkeypatch):
    sequence = store.append(0, 0, entries([0]))
    store.flush()
    version = store.snapshot()
    where = (host._Rows, "extend") if isinstance(store, HostStore) else (database, "note")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(*where, fail)
    store.append(sequence, 1, entries([1, 2]))
    for call in (
        store.flush,
        store.flush,
        lambda: store.append(sequence, 3, entries([3])),
        lambda: store.drop([sequence]),
    ):
        with pytest.raises(RuntimeError, match="no space left"):
            call()
    assert store.snapshot() == version
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="no space left"):
        store.close()
    if isinstance(store, DiskStore):
        with DiskStore(store.path, synchronous=True) as again:
            assert again.snapshot() == version
            assert everything(again, sequence) == [0]
            assert again.append(sequence, 1, entries([1])) == sequence


def test_a_query_goes_on_after_the_writer_failed(store):
    sequence = store.append(0, 0, entries([0]))
    store.flush()
    store._writer._commit = lambda items: 1 / 0
    store.append(sequence, 1, entries([1]))
    with pytest.raises(RuntimeError, match="division by zero"):
        store.flush()
    assert everything(store, sequence) == [0]
    with pytest.raises(RuntimeError, match="division by zero"):
        store.close()


def test_close_commits_what_waits(tmp_path):
    with DiskStore(tmp_path) as store:
        sequence = store.append(0, 0, entries([0, 1]))
    with DiskStore(tmp_path) as store:
        assert everything(store, sequence) == [0, 1]


# The writer alone.


def test_items_are_committed_in_order_by_a_thread_that_ends_with_them():
    commits: list[list[int]] = []
    writer: Writer[int] = Writer(commits.append, synchronous=False)
    for round_ in range(3):
        for item in range(50):
            writer.put(50 * round_ + item)
        writer.flush()
        assert [*chain(*commits)] == [*range(50 * (round_ + 1))]
    for thread in threading.enumerate():
        if thread.name == "memory store writer":
            thread.join(SECONDS)
            assert not thread.is_alive()


def test_a_synchronous_writer_has_no_thread_and_raises_where_it_puts():
    threads = []
    writer: Writer[int] = Writer(lambda items: threads.append(threading.current_thread()), synchronous=True)
    writer.put(1)
    assert threads == [threading.current_thread()]
    failing: Writer[int] = Writer(lambda items: 1 / 0, synchronous=True)  # type: ignore[arg-type, return-value]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="division by zero") as raised:
            failing.put(1)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_interrupt_stays_one():
    def interrupt(items: list[int]) -> None:
        raise KeyboardInterrupt

    writer: Writer[int] = Writer(interrupt, synchronous=True)
    with pytest.raises(KeyboardInterrupt):
        writer.put(1)
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        writer.put(2)
