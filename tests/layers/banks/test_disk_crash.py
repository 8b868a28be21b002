"""DiskStorage: whatever fails or ends the process at whichever call, and whoever reads meanwhile, a commit is whole."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memzoo.layers.banks.disk import CorruptBlockError, DiskStorage, NotWrittenError
from memzoo.layers.banks.journal import JOURNAL
from memzoo.layers.banks.storage import RamStorage
from tests.layers.banks.disk_cases import (
    LAYOUT,
    A,
    B,
    C,
    Contents,
    block,
    contents,
    first_commit,
    new,
    second_commit,
    tree,
)

CALLS = [
    name
    for name in ("open", "write", "fsync", "replace", "unlink", "ftruncate", "posix_fallocate", "mkdir")
    if hasattr(os, name)
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The end of a process loses nothing that was not waited for; the order of what is, has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Path:
    """A bank with one commit, to copy."""
    with new(tmp_path_factory.mktemp("disk") / "bank") as disk:
        first_commit(disk)
    return disk.path


@pytest.fixture(scope="module")
def before() -> Contents:
    ram = RamStorage(LAYOUT, tree())
    first_commit(ram)
    return contents(ram)


@pytest.fixture(scope="module")
def after() -> Contents:
    ram = RamStorage(LAYOUT, tree())
    first_commit(ram)
    second_commit(ram)
    return contents(ram)


@contextmanager
def at_every_call(act: Callable[[int, str], None]) -> Iterator[None]:
    """Do something before each call that changes files, and in the middle of each that writes."""
    numbers, real, acting = itertools.count(), {name: getattr(os, name) for name in CALLS}, []

    def instead(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not acting:
                acting.append(name)
                try:
                    act(next(numbers), name)
                finally:
                    acting.clear()
            if name == "write" and len(args[1]) > 1:
                return real[name](args[0], args[1][: len(args[1]) // 2])  # the rest is another call
            return real[name](*args, **options)

        return call

    try:
        for name in CALLS:
            setattr(os, name, instead(name))
        yield
    finally:
        for name, own in real.items():
            setattr(os, name, own)


def left_by_kills(work: Callable[[], object], folder: Path, into: Path) -> list[Path]:
    """Do some work, and return copies of what a process that is killed before each call leaves of a folder."""
    left = []
    with at_every_call(lambda number, _: left.append(shutil.copytree(folder, into / str(number)))):
        work()
    assert len(left) > 15
    return [*left, shutil.copytree(folder, into / "end")]


def refusal(work: Callable[[], object]) -> str:
    """Do some work, and return the message of the error if it fails."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def commit(path: Path) -> None:
    with DiskStorage(path) as disk:
        second_commit(disk)


def at_one_version(reader: DiskStorage) -> Contents:
    while True:
        version = reader.version
        try:
            found = contents(reader)
        except NotWrittenError:  # it was, at the version before
            assert reader.version > version
        if reader.version == version:
            return found


def fresh(path: Path) -> Contents:
    with DiskStorage(path, read_only=True) as reader:
        return contents(reader)


def test_a_process_killed_at_any_call_leaves_the_state_before_or_after(bank, tmp_path, before, after):
    path, whole = shutil.copytree(bank, tmp_path / "bank"), []
    for left in left_by_kills(lambda: commit(path), path, tmp_path):
        found = fresh(left)
        assert found in (before, after), "of who opens it to read, before any writer does"
        with DiskStorage(left) as disk:
            assert contents(disk) == found
            assert disk.verify() == []
            assert len(list(left.iterdir())) == 5, "nothing is left over"
            second_commit(disk)
            assert contents(disk) == after
        whole.append(found == after)
    assert whole == sorted(whole)
    assert len(set(whole)) == 2


def test_a_process_killed_while_it_finishes_another_ones_commit(bank, tmp_path, after):
    path = shutil.copytree(bank, tmp_path / "bank")
    half = next(left for left in left_by_kills(lambda: commit(path), path, tmp_path) if (left / JOURNAL).exists())
    for left in left_by_kills(lambda: DiskStorage(half), half, tmp_path / "again"):
        assert fresh(left) == after
        with DiskStorage(left) as disk:
            assert contents(disk) == after
            assert disk.version == 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that kills")
def test_09_another_process_is_read_while_it_writes_until_it_is_killed(tmp_path):
    new(tmp_path / "bank").close()
    process = multiprocessing.get_context("spawn").Process(target=write_on, args=(tmp_path / "bank",))
    process.start()
    with DiskStorage(tmp_path / "bank", read_only=True) as reader:
        while reader.version < 8:
            assert process.is_alive()
            time.sleep(0.01)
            reader.refresh()
            last = same_number(reader)
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    with DiskStorage(tmp_path / "bank") as disk:
        assert same_number(disk) == disk.version >= last
        assert disk.verify() == []


def write_on(path: Path) -> None:
    with DiskStorage(path) as disk:
        for number in itertools.count(1):
            disk.write({node: block(node, number) for node in (A, B, C)})


def same_number(storage: DiskStorage) -> int:
    """Check that all blocks are of one commit, and return its number."""
    while number := storage.version:
        found = [storage.read(node) for node in (A, B, C)]
        if storage.version == number:
            assert all(own.equal(block(node, number)) for own, node in zip(found, (A, B, C), strict=True))
            break
    return number


def test_readers_see_the_state_before_or_after_at_every_call(bank, tmp_path, before, after):
    path = shutil.copytree(bank, tmp_path / "bank")
    seen: dict[str, list[bool]] = {"old": [], "fresh": [], "writer": []}

    with DiskStorage(path, read_only=True) as old, DiskStorage(path) as writer:

        def look(*_: object) -> None:
            for name, found in (("old", at_one_version(old)), ("fresh", fresh(path)), ("writer", contents(writer))):
                assert found in (before, after), name
                seen[name].append(found == after)

        with at_every_call(look):
            second_commit(writer)
        assert contents(old) == after
    for name, whole in seen.items():
        assert whole == sorted(whole), name
        assert len(set(whole)) == 2


def test_a_disk_that_is_full_at_any_call(bank, tmp_path, before, after):
    for number in itertools.count():
        path = shutil.copytree(bank, tmp_path / str(number))
        reached = []

        def full(count: int, name: str, number: int = number, reached: list[int] = reached) -> None:
            if count >= number and name not in ("unlink", "open"):  # it stays full
                reached.append(count)
                raise OSError(errno.ENOSPC, "No space left on device")

        with DiskStorage(path) as disk, DiskStorage(path, read_only=True) as reader:
            with at_every_call(full):
                message = refusal(lambda disk=disk: second_commit(disk))
                if message:
                    nothing = "nothing was written" in message
                    assert nothing != ("is whole in its journal" in message)
                    assert contents(disk) == fresh(path) == (before if nothing else after)
                    assert at_one_version(reader) in (before, after)
            assert disk.verify() == []
            second_commit(disk)
            assert contents(disk) == at_one_version(reader) == fresh(path) == after
            assert reader.refresh() is None or reader.version == disk.version
            assert sorted(path.glob("*.partial")) == []
            assert not path.joinpath(JOURNAL).exists()
        if not reached:
            break
    assert number > 30


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs a system that reserves space")
def test_space_is_reserved_before_a_commit_counts(bank, tmp_path, monkeypatch, before, after):
    def refuse(*_: object) -> None:
        raise OSError(reason, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with DiskStorage(shutil.copytree(bank, tmp_path / "bank")) as disk:
        reason = errno.ENOSPC
        with pytest.raises(ValueError, match=r"nothing was written to path=.*make room"):
            second_commit(disk)
        assert contents(disk) == before
        reason = errno.EOPNOTSUPP  # a file system that does not reserve may still have room
        second_commit(disk)
        assert contents(disk) == after


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    for number in itertools.count():
        reached = []

        def full(count: int, name: str, number: int = number, reached: list[int] = reached) -> None:
            if count == number:
                reached.append(count)
                raise OSError(errno.ENOSPC, "No space left on device")

        with at_every_call(full):
            message = refusal(lambda: new(tmp_path / "bank").close())
        if not reached:
            break
        if "cannot be made" in message:
            assert list(tmp_path.iterdir()) == []
        else:
            assert not message or "cannot be written to" in message, "it was made, but could not be opened"
            assert contents(DiskStorage(tmp_path / "bank", read_only=True)) == contents(RamStorage(LAYOUT, tree()))
            shutil.rmtree(tmp_path / "bank")
    assert number > 10


def test_a_process_killed_while_it_makes_a_folder(tmp_path):
    (tmp_path / "work").mkdir()
    fresh_bank = contents(RamStorage(LAYOUT, tree()))
    for left in left_by_kills(lambda: new(tmp_path / "work" / "bank").close(), tmp_path / "work", tmp_path / "left"):
        with DiskStorage(left / "bank") if (left / "bank").exists() else new(left / "bank") as disk:
            assert contents(disk) == fresh_bank


def test_a_journal_that_is_not_whole_is_dropped(bank, tmp_path, before, after):
    half = shutil.copytree(bank, tmp_path / "half")
    with DiskStorage(half) as disk:

        def stop(_: int, name: str) -> None:
            if name == "write" and disk.version == 2:
                raise OSError(errno.EIO, "broken")

        with at_every_call(stop), pytest.raises(ValueError, match="is whole in its journal"):
            second_commit(disk)
    journal = half.joinpath(JOURNAL).read_bytes()
    for number, damaged in enumerate(
        [
            b"",
            journal[:-1],
            journal[:-30],
            journal[: LAYOUT.block_bytes(1)],
            journal[1:],
            bytes([journal[0] ^ 1]) + journal[1:],
        ]
    ):
        path = shutil.copytree(half, tmp_path / str(number))
        path.joinpath(JOURNAL).write_bytes(damaged)
        if number < 4:
            assert fresh(path) == before
        else:
            with DiskStorage(path, read_only=True) as reader, pytest.raises(CorruptBlockError, match="journal"):
                reader.read(A)
        with DiskStorage(path) as disk:
            assert contents(disk) == before
            assert not path.joinpath(JOURNAL).exists()
    with DiskStorage(half) as disk:
        assert contents(disk) == after


def test_a_journal_of_another_bank_or_of_an_earlier_commit_is_not_followed(bank, tmp_path, after):
    path = shutil.copytree(bank, tmp_path / "bank")
    with DiskStorage(path) as disk:
        kept: list[bytes] = []

        def keep(*_: object) -> None:
            if not kept and path.joinpath(JOURNAL).exists():
                kept.append(path.joinpath(JOURNAL).read_bytes())

        with at_every_call(keep):
            second_commit(disk)
    path.joinpath(JOURNAL).write_bytes(kept[0])
    with DiskStorage(path, read_only=True) as reader:
        assert reader.version == 2
        assert contents(reader) == after
    with new(tmp_path / "other") as other:
        first_commit(other)
    other.path.joinpath(JOURNAL).write_bytes(kept[0])
    with DiskStorage(other.path, read_only=True) as reader:
        assert reader.version == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_what_a_step_relies_on_is_on_the_disk_before_it(bank, tmp_path, monkeypatch):
    """The order in which a commit waits for the disk: what a loss of power would show otherwise."""
    path, log = shutil.copytree(bank, tmp_path / "bank"), []
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "unlink")}

    def instead(name: str) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **options: Any) -> Any:
            if name == "replace":
                what = Path(rest[0]).name
            else:
                what = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target).name
            log.append((name, what))
            return real[name](target, *rest, **options)

        return call

    with DiskStorage(path) as disk:
        for name in real:
            monkeypatch.setattr(os, name, instead(name))
        second_commit(disk)
        monkeypatch.undo()
        trees = [what for _, what in log if what.startswith("tree-")]
    steps = [
        [("fsync", disk.path.joinpath(trees[0]).name)],
        [("fsync", "journal.partial")],
        [("replace", "journal")],
        [("fsync", "bank")],
        [("write", "level_1.blocks"), ("write", "level_2.blocks")],
        [("fsync", "level_1.blocks"), ("fsync", "level_2.blocks"), ("fsync", "bank.json.partial")],
        [("replace", "bank.json")],
        [("fsync", "bank")],
        [("unlink", "journal")],
    ]
    place = -1
    for step in steps:
        found = [log.index(call, place + 1) for call in step]
        place = max(found)
    assert log.index(("write", "level_1.blocks")) > log.index(("fsync", "bank"))
    assert ("write", "level_1.blocks") not in log[log.index(("fsync", "level_1.blocks")) :]
    assert log[-1] == ("unlink", "journal")
