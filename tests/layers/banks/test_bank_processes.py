"""A bank in several processes: forked while others work, copied, pickled."""

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.layers.banks.journal import Journal
from memzoo.layers.banks.layout import Node
from memzoo.layers.memory_bank import MemoryBank
from tests.layers.banks import bank_cases as cases
from tests.layers.banks.bank_cases import FINE, PATH, both, values


@pytest.fixture(params=["ram", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryBank]:
    with cases.filled(tmp_path / "bank" if request.param == "disk" else None, copy_bytes=2**16) as bank:
        yield bank


def _forked(bank: MemoryBank, expected: list[float], results: Any, go: Any) -> None:
    results.put(bank.prefetch(PATH).result(timeout=30) is None)
    go.wait(30)
    results.put(values(bank) == expected)
    try:
        bank.put({})
        results.put(bank.path is None)
    except ValueError as error:
        results.put("forked" in str(error))


def test_a_forked_process_is_a_reader_that_follows(bank: MemoryBank) -> None:
    """Also where a thread was reading at the moment of the fork."""
    bank.put(both(bank, 1.0))
    bank.commit()
    bank.put({Node(1, 2): torch.zeros(bank.layout.block_shape(1))})  # of the writer alone, until it commits
    on_disk = bank.path is not None
    if bank.cache is not None:
        bank.prefetch(PATH).result(timeout=30)
        bank.cache._blocks[2].pop(FINE)
        bank.cache._reading[FINE] = Future()  # as if a thread, which a fork does not copy, were reading it
    context = multiprocessing.get_context("fork")
    results, go = context.Queue(), context.Event()
    process = context.Process(
        target=_forked, args=(bank, [2.0, 2.0] if on_disk else [1.0, 1.0], results, go), daemon=True
    )
    process.start()
    if bank.cache is not None:
        bank.cache._reading.pop(FINE)
    assert results.get(timeout=60)
    bank.put(both(bank, 2.0))
    bank.commit()
    go.set()
    assert results.get(timeout=60)
    assert results.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert values(bank) == [2.0, 2.0]


def _fetched(bank: MemoryBank, results: Any) -> None:
    results.put((values(bank), values(bank, dtype=torch.float64)))


def in_fork(bank: MemoryBank) -> tuple[list[float], list[float]]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_fetched, args=(bank, results), daemon=True)
    process.start()
    found = results.get(timeout=60)
    process.join(timeout=60)
    return found


def test_a_process_forked_while_a_thread_commits_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()
    apply = Journal.apply

    def slowly(journal: Journal, files: Any) -> None:
        started.set()
        assert go.wait(60)
        apply(journal, files)

    with cases.filled(tmp_path / "bank") as bank, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Journal, "apply", slowly)
        bank.put(both(bank, 1.0))
        committing = pool.submit(bank.commit)
        try:
            assert started.wait(60)
            assert in_fork(bank) == ([1.0, 1.0], [1.0, 1.0])
        finally:
            go.set()
        committing.result(timeout=60)


def test_a_forked_process_sees_no_copy_of_what_its_parent_has_not_committed(bank: MemoryBank) -> None:
    bank.put(both(bank, 1.0))
    bank.commit()
    bank.put(both(bank, 2.0))
    assert values(bank, dtype=torch.float64) == [2.0, 2.0]
    expected = [1.0, 1.0] if bank.path is not None else [2.0, 2.0]
    assert in_fork(bank) == (expected, expected)


def test_a_block_is_read_although_no_thread_can_be_started_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the interpreter is shutting down, and another thread goes on."""

    def refuses(process: int) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    with cases.filled(tmp_path / "bank", cache_bytes=0) as bank:
        monkeypatch.setattr("memzoo.layers.banks.disk_files.SHARED", 1)
        monkeypatch.setattr("memzoo.layers.banks.disk_files._other_thread", refuses)
        assert len(values(bank)) == 2


def test_a_copied_bank_is_one_of_its_own_in_memory_and_a_reader_on_disk(bank: MemoryBank) -> None:
    bank.put(both(bank, 1.0))
    bank.commit()
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert values(other) == [1.0, 1.0]
        assert other.read_only == (bank.path is not None)
        if not other.read_only:
            other.put(both(bank, 5.0))
        other.close()
    assert values(bank) == [1.0, 1.0]
