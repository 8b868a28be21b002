"""A bank in use by several threads, copies of it, and what is left when it was closed."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.layers.banks.layout import Node
from memzoo.layers.banks.storage import Mark
from memzoo.layers.memory_bank import MemoryBank
from tests.layers.banks import bank_cases as cases
from tests.layers.banks.bank_cases import COARSE, FINE, PATH, both, values


@pytest.fixture(params=["ram", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryBank]:
    with cases.filled(tmp_path / "bank" if request.param == "disk" else None, copy_bytes=2**16) as bank:
        yield bank


# Threads


def test_a_fetch_sees_all_of_a_put_or_nothing(bank: MemoryBank) -> None:
    """While another thread goes on putting, committing and blocking."""
    ended, seen = threading.Event(), []
    bank.put(both(bank, 0.0))

    def read(**options: Any) -> None:
        while not ended.is_set():
            seen.append(values(bank, **options))

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read), pool.submit(read, dtype=torch.float64)]
        for number in range(60):
            bank.put(both(bank, float(number)))
            if number % 10 == 3:
                bank.commit()
            if number % 10 == 7:
                bank.block(1, 0, subtree=True)
                bank.unblock(1, 0, subtree=True)
            bank.prefetch(PATH)
        ended.set()
        for reader in readers:
            reader.result(timeout=60)
    assert all(len(set(found)) <= 1 and len(found) in (0, 2) for found in seen)
    assert values(bank) == values(bank, dtype=torch.float64) == [59.0, 59.0]


def change_while(bank: MemoryBank, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Make a change after the next block was read and before it is returned."""
    read, changed = bank._read, []

    def reading(node: Node) -> torch.Tensor:
        block = read(node)
        if not changed:
            changed.append(1)
            change()
        return block

    monkeypatch.setattr(bank, "_read", reading)


def test_a_copy_of_what_changes_meanwhile_is_not_kept(bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    change_while(bank, monkeypatch, lambda: bank.put(both(bank, 3.0)))
    assert values(bank, dtype=torch.float64) == [3.0, 3.0]
    assert values(bank, dtype=torch.float64) == values(bank) == [3.0, 3.0]


def test_copies_follow_every_kind_of_change(bank: MemoryBank) -> None:
    wide = {"dtype": torch.float64}
    bank.put(both(bank, 1.0))
    assert values(bank, **wide) == [1.0, 1.0]
    bank.put(both(bank, 2.0))
    bank.commit()
    assert values(bank, **wide) == [2.0, 2.0]
    bank.block(*FINE)
    assert values(bank, **wide) == [2.0]
    bank.unblock(*FINE)
    assert values(bank, **wide) == [2.0, 2.0]
    bank.delete(*COARSE)
    assert values(bank, **wide) == [2.0]


def test_changes_of_a_node_are_counted(bank: MemoryBank) -> None:
    before = [bank.changes(node) for node in (COARSE, FINE)]
    bank.put({FINE: both(bank, 1.0)[FINE]})
    bank.block(*FINE)
    bank.fetch(PATH)
    assert [bank.changes(node) for node in (COARSE, FINE)] == [before[0], before[1] + 2]


def test_a_fetch_behind_a_commit_does_not_join_a_reading_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        assert bank.cache is not None
        read, started, go = bank.cache._read, threading.Event(), threading.Event()

        def slowly(node: Node, out: torch.Tensor) -> None:
            read(node, out)
            if not started.is_set():
                started.set()
                assert go.wait(30)

        monkeypatch.setattr(bank.cache, "_read", slowly)
        ahead = bank.prefetch(PATH)
        assert started.wait(30)
        bank.put(both(bank, 4.0))
        bank.commit()
        try:
            assert values(bank) == [4.0, 4.0]
        finally:
            go.set()
        ahead.result(timeout=30)
        assert values(bank) == [4.0, 4.0]


def test_what_does_not_change_stays_in_the_cache(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        assert bank.statistics is not None
        bank.fetch(PATH)
        bank.block(1, 2)
        bank.put({Node(2, 8): torch.zeros(bank.layout.block_shape(2))})
        bank.commit()
        bank.fetch(PATH)
        assert sum(bank.statistics.misses.values()) == 2


def test_a_put_behind_a_delete_is_refused_and_never_written(bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if both begin at once: a change waits for the one before it."""
    started, cast = threading.Event(), bank._cast

    def slowly(node: Any, block: torch.Tensor) -> torch.Tensor:
        started.set()
        return cast(node, block)

    monkeypatch.setattr(bank, "_cast", slowly)
    with ThreadPoolExecutor(1) as pool:
        with bank._change():
            putting = pool.submit(bank.put, both(bank, 1.0))
            assert not started.wait(0.05), "a put went on beside another change"
            bank.delete(*FINE)
        with pytest.raises(ValueError, match="deleted"):
            putting.result(timeout=30)
    bank.commit()
    assert bank.mark(FINE) == Mark.DELETED


def test_a_delete_that_counts_but_fails_halfway_stays_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        bank.put(both(bank, 1.0))
        with monkeypatch.context() as patched:
            patched.setattr("memzoo.layers.banks.journal.Journal.apply", _fails)
            with pytest.raises(ValueError, match="no space left"):
                bank.delete(*FINE)
        assert FINE not in bank.fetch(PATH).nodes
        bank.commit()
        assert bank.mark(FINE) == Mark.DELETED
    with MemoryBank.open(tmp_path / "bank") as again:
        assert again.fetch(PATH).nodes == (COARSE,)
        assert values(again) == [1.0]


def _fails(*_: object) -> None:
    raise OSError("no space left on device")


def test_a_fetch_beside_a_merge_sees_all_of_a_subtree_or_nothing(tmp_path: Path) -> None:
    """Also where some of its blocks are cached and others are not."""
    ended, seen = threading.Event(), []
    with cases.filled(tmp_path / "bank", cache_bytes={1: 2**20, 2: 0}) as bank:
        bank.put(both(bank, 0.0))
        bank.commit()
        parts = [bank.copy_to(), bank.copy_to()]
        for number, part in enumerate(parts):
            part.put(both(part, 1.0 + number))

        def read() -> None:
            while not ended.is_set():
                seen.append(values(bank))

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            for number in range(12):
                bank.merge({0: parts[number % 2]})
            ended.set()
            reading.result(timeout=60)
        assert all(found in ([0.0, 0.0], [1.0, 1.0], [2.0, 2.0]) for found in seen)
        assert values(bank) == [2.0, 2.0]


def test_a_merge_that_counts_but_fails_halfway_stays_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        part = bank.copy_to()
        part.put(both(bank, 2.0))
        bank.put(both(bank, 1.5))
        with monkeypatch.context() as patched:
            patched.setattr("memzoo.layers.banks.journal.Journal.apply", _fails)
            with pytest.raises(ValueError, match="no space left"):
                bank.merge({0: part})
        assert values(bank) == [2.0, 2.0]
        bank.commit()
    with MemoryBank.open(tmp_path / "bank") as again:
        assert values(again) == [2.0, 2.0]


def test_a_commit_that_fails_before_it_counts_keeps_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        part = bank.copy_to()
        bank.put(both(bank, 1.5))
        with monkeypatch.context() as patched:
            patched.setattr("memzoo.layers.banks.journal.Journal.write", _fails)
            with pytest.raises(ValueError, match="no space left"):
                bank.merge({0: part})
        assert values(bank) == [1.5, 1.5]


def test_two_threads_of_a_reader_take_up_a_commit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.filled(tmp_path / "bank") as writer, MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
        reader.fetch(PATH)
        writer.put(both(writer, 1.0))
        writer.commit()
        assert reader._disk is not None
        refresh, handed = reader._disk.refresh, threading.Event()

        def slowly() -> object:
            changed = refresh()
            if changed and not handed.is_set():
                handed.set()
                threading.Event().wait(0.2)  # the other thread has the time to read what is cached
            return changed

        monkeypatch.setattr(reader._disk, "refresh", slowly)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(values, reader)
            assert handed.wait(30)
            assert values(reader) == [1.0, 1.0]
            assert first.result(timeout=30) == [1.0, 1.0]


# Gradients


def test_what_was_first_used_in_inference_mode_can_be_trained_through(tmp_path: Path) -> None:
    for path in (None, tmp_path / "bank"):
        with torch.inference_mode():
            bank = cases.filled(path, copy_bytes=2**16)
            bank.put(both(bank, 1.0))
            bank.fetch(PATH)
            bank.fetch(PATH, dtype=torch.float64)
        with bank:
            for dtype in (torch.float32, torch.float64):
                x = torch.ones(8, dtype=dtype, requires_grad=True)
                gate = bank.fetch(PATH, dtype=dtype).layers()[0].groups[0].slabs[0]
                (gate @ x).square().sum().backward()
                assert x.grad is not None


def test_numbers_that_the_layout_cannot_hold_are_refused() -> None:
    bank = cases.filled(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        bank.put(both(bank, 1e6))


# Copies of the whole


def test_a_copy_made_while_another_process_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.filled(tmp_path / "bank") as writer, MemoryBank.open(tmp_path / "bank", read_only=True) as reader:

        def commit() -> None:
            writer.put(both(writer, 1.0))
            writer.commit()

        change_while(reader, monkeypatch, commit)
        with pytest.raises(ValueError, match="was written to meanwhile"):
            reader.copy_to(tmp_path / "copy")
        assert [path.name for path in tmp_path.iterdir()] == ["bank"]
        reader.copy_to(tmp_path / "copy").close()


def test_a_copy_is_written_some_blocks_at_a_time(bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memzoo.layers.memory_bank.COPIED_AT_ONCE", 1)
    other = bank.copy_to()
    assert other.written() == bank.written()
    assert all(torch.equal(other.block_of(*node), bank.block_of(*node)) for node in bank.written())


def test_copying_leaves_what_lies_beside_alone(bank: MemoryBank, tmp_path: Path) -> None:
    (tmp_path / "copy.partial").mkdir()
    bank.copy_to(tmp_path / "copy").close()
    assert (tmp_path / "copy.partial").exists()


# The end


def test_a_closed_bank_says_so(bank: MemoryBank) -> None:
    bank.fetch(PATH)
    bank.close()
    bank.close()
    calls: list[Callable[[], object]] = [
        lambda: bank.fetch(PATH),
        lambda: bank.prefetch(PATH),
        lambda: bank.put({}),
        bank.commit,
        lambda: bank.block(1, 0),
        lambda: bank.block_of(1, 0),
        lambda: bank.route(cases.embeddings()),
        bank.written,
        bank.verify,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_a_closed_bank_leaves_neither_threads_nor_itself() -> None:
    bank = cases.filled()
    bank.close()
    del bank
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memory-bank")]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda bank: bank.block(1, 1.7), "node=1.7"),
        (lambda bank: bank.mark(Node(1, -1)), "node=-1"),
        (lambda bank: bank.is_readable(Node(1, 99)), "node=99"),
        (lambda bank: bank.block_of(3, 0), "level=3 owns no blocks"),
        (lambda bank: bank.marks(4), "level=4"),
    ],
    ids=["float", "negative", "large", "no blocks", "no level"],
)
def test_nodes_that_are_none_are_refused(bank: MemoryBank, call: Callable[[MemoryBank], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(bank)


def test_plain_pairs_name_nodes_too(bank: MemoryBank) -> None:
    bank.put({(1, 0): torch.ones(bank.layout.block_shape(1))})  # type: ignore[dict-item]
    assert values(bank)[0] == 1.0
