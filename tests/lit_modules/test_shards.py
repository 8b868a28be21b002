import errno
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from memzoo.lit_modules.data import corpus, shards
from memzoo.lit_modules.data.corpus import TextFile, find_text_files
from memzoo.lit_modules.data.shards import TokenCache, prepare_cache
from memzoo.lit_modules.data.tokenizer import ByteTokenizer

TEXTS = {"a.txt": "first document\n" * 3, "b.txt": "", "c.txt": "the second\n", "d.txt": "third ☃ one\n" * 4}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "text"


def find(source: Path) -> list[TextFile]:
    return find_text_files([str(source)])


def prepare(source: Path, cache_dir: Path, shard_tokens: int = 20) -> Path:
    return cache_dir / prepare_cache(cache_dir, find(source), ByteTokenizer(), shard_tokens=shard_tokens)


def leftovers(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.suffix != ".lock")


def assert_whole(folder: Path) -> None:
    cache = TokenCache(folder)
    cache.verify()
    assert cache.read(0, sum(d.tokens for d in cache.documents)).tobytes().decode() == "".join(TEXTS.values())


@pytest.mark.parametrize(
    ("shard_tokens", "sizes"), [(16, [16] * 7), (30, [30, 30, 30, 22]), (112, [112]), (113, [112])]
)
def test_any_range_reads_the_tokens_across_shards(shard_tokens: int, sizes: list[int], source: Path, cache_dir: Path):
    cache = TokenCache(prepare(source, cache_dir, shard_tokens))
    text = "".join(TEXTS.values()).encode()
    assert [len(np.load(path)) for path in sorted(cache.folder.glob("*.npy"))] == sizes
    for start in range(0, len(text), 3):
        for stop in range(start + 1, len(text) + 1):
            assert cache.read(start, stop).tobytes() == text[start:stop]


def test_documents_are_those_that_hold_text(source: Path, cache_dir: Path):
    cache = TokenCache(prepare(source, cache_dir))
    assert [(d.name, d.start, d.tokens, d.bytes) for d in cache.documents] == [
        ("a.txt", 0, 45, 45),
        ("c.txt", 45, 11, 11),
        ("d.txt", 56, 56, 56),
    ]


def test_a_long_file_is_the_same_in_pieces(source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 7)
    monkeypatch.setattr(shards, "GROUP_BYTES", 30)
    assert_whole(prepare(source, cache_dir))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65537, np.uint32)])
def test_ids_are_stored_in_the_narrowest_type(vocab_size: int, dtype: type, source: Path, cache_dir: Path):
    class Last(ByteTokenizer):
        fingerprint = f"last of {vocab_size}"

        def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[Any]]:
            narrowest = np.min_scalar_type(vocab_size - 1)
            return [np.full(len(piece), vocab_size - 1, narrowest) for piece in pieces]

    cache = TokenCache(cache_dir / prepare_cache(cache_dir, find(source), Last()))
    tokens = cache.read(0, 10)
    assert tokens.dtype == dtype
    assert (tokens == vocab_size - 1).all()


def test_a_second_run_writes_nothing(source: Path, cache_dir: Path):
    folder = prepare(source, cache_dir)
    before = {path: path.stat().st_mtime_ns for path in [cache_dir, folder, *folder.iterdir()]}
    for path in source.iterdir():
        os.utime(path, (0, 0))  # contents decide, not dates
    assert prepare(source, cache_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in [cache_dir, folder, *folder.iterdir()]} == before


def test_contents_names_and_tokenizer_make_the_key(source: Path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    keys = [shards.cache_key(find(source), ByteTokenizer()), shards.cache_key(find(source), Other())]
    (source / "a.txt").rename(source / "a2.txt")
    keys.append(shards.cache_key(find(source), ByteTokenizer()))
    (source / "a2.txt").write_text("other text\n")
    keys.append(shards.cache_key(find(source), ByteTokenizer()))
    assert len(set(keys)) == 4


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "tokens-00001.npy is corrupt: its checksum": lambda folder: flip(folder / "tokens-00001.npy", -1),
    "tokens-00000.npy is corrupt: its checksum": lambda folder: flip(folder / "tokens-00000.npy", 9),
    "tokens-00002.npy is corrupt: it has 3 bytes": lambda folder: os.truncate(folder / "tokens-00002.npy", 3),
    "tokens-00003.npy is corrupt: it has 0 bytes": lambda folder: (folder / "tokens-00003.npy").unlink(),
    "manifest.json is corrupt: it cannot be read": lambda folder: os.truncate(folder / "manifest.json", 100),
    "manifest.json is corrupt: it cannot be read .*No such file": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_with_the_folder_to_delete(message: str, source: Path, cache_dir: Path):
    folder = prepare(source, cache_dir)
    DAMAGE[message](folder)
    with pytest.raises(ValueError, match=rf"{message}.*delete the folder .*{folder.name}"):
        prepare(source, cache_dir)


def test_a_changed_manifest_is_refused(source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    folder = prepare(source, cache_dir)
    written = (folder / "manifest.json").read_text()
    manifest = json.loads(written)
    manifest["documents"][0]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is corrupt: its checksum"):
        TokenCache(folder)
    (folder / "manifest.json").write_text(written)
    monkeypatch.setattr(shards, "VERSION", shards.VERSION + 1)
    with pytest.raises(ValueError, match="has format version 1, this memzoo reads 2; delete"):
        TokenCache(folder)


def kill_self(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_on_second_call(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[object] = []

    def run(*args: object, **kwargs: object) -> Any:
        calls.append(args)
        if len(calls) == 2:
            kill_self()
        return function(*args, **kwargs)

    return run


def kill_afterwards(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: object, **kwargs: object) -> None:
        function(*args, **kwargs)
        kill_self()

    return run


KILLS: dict[str, Callable[[], tuple[object, str, Callable[..., Any]]]] = {
    "as the folder is made": lambda: (Path, "mkdir", kill_on_second_call(Path.mkdir)),
    "between two shards": lambda: (np, "save", kill_on_second_call(np.save)),
    "within a shard": lambda: (np, "save", kill_afterwards(lambda path, array: path.write_bytes(b"\x93NUM"))),
    "before the manifest": lambda: (shards, "write_manifest", kill_self),
    "before the rename": lambda: (os, "rename", kill_self),
    "after the rename": lambda: (os, "rename", kill_afterwards(os.rename)),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_writer_leaves_nothing_or_a_whole_cache(moment: str, source: Path, cache_dir: Path):
    cache_dir.mkdir(parents=True)

    def write() -> None:
        owner, name, replacement = KILLS[moment]()
        setattr(owner, name, replacement)  # in the child alone
        prepare(source, cache_dir)

    child = FORK.Process(target=write)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    folders = [name for name in leftovers(cache_dir) if not name.endswith(".tmp")]
    assert len(folders) == (moment == "after the rename")
    for name in folders:
        assert_whole(cache_dir / name)
    folder = prepare(source, cache_dir)
    assert_whole(folder)
    assert leftovers(cache_dir) == [folder.name]


def test_two_processes_at_once_write_once(source: Path, cache_dir: Path, tmp_path: Path):
    start, log = FORK.Barrier(2), tmp_path / "log"

    def write() -> None:
        save = np.save

        def logged(path: Path, array: NDArray[Any]) -> None:
            with log.open("a") as handle:
                handle.write(f"{os.getpid()}\n")
            save(path, array)

        np.save = logged  # in the child alone
        start.wait(30)
        assert_whole(prepare(source, cache_dir))

    children = [FORK.Process(target=write) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    writers = log.read_text().split()
    assert len(writers) == 6  # shards of one cache
    assert len(set(writers)) == 1


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(source: Path, cache_dir: Path):
    for name in ("dead.tmp", "living.tmp"):
        (cache_dir / name).mkdir(parents=True)
        (cache_dir / name / "tokens-00000.npy").touch()
    with FileLock(cache_dir / "living.lock"):
        folder = prepare(source, cache_dir)
    assert leftovers(cache_dir) == sorted([folder.name, "living.tmp"])


def test_cache_dir_that_cannot_be_written_is_named(source: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir='.*/file/text' cannot be written.*MEMZOO_CACHE"):
        prepare(source, tmp_path / "file" / "text")


def test_a_full_disk_leaves_nothing(source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    save = np.save

    def full(path: Path, array: NDArray[Any]) -> None:
        if path.name == "tokens-00002.npy":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ValueError, match=r"cache_dir=.*No space left on device.*room"):
        prepare(source, cache_dir)
    assert leftovers(cache_dir) == []


def test_a_file_that_changes_meanwhile_is_refused(source: Path, cache_dir: Path):
    files = find(source)
    with (source / "c.txt").open("a") as handle:
        handle.write("more\n")
    with pytest.raises(ValueError, match=r"c\.txt changed while it was read"):
        prepare_cache(cache_dir, files, ByteTokenizer())
    assert leftovers(cache_dir) == []


def test_a_pickled_cache_maps_the_files_anew(source: Path, cache_dir: Path):
    cache = TokenCache(prepare(source, cache_dir))
    cache.read(0, 50)
    message = pickle.dumps(cache)
    assert len(message) < 500
    assert pickle.loads(message).read(0, 5).tobytes() == b"first"
