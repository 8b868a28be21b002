"""Reading and writing a bank: spec section 16, checks 9, 12 and 18, in memory and on disk."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers.banks.layout import Node
from memzoo.layers.memory_bank import MemoryBank
from tests.layers.banks import bank_cases as cases

PATHS = torch.tensor([[0, 1, 4], [2, 7, 21], [0, 0, 2], [0, 1, 5]])


@pytest.fixture(params=["ram", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryBank]:
    with cases.filled(tmp_path / "bank" if request.param == "disk" else None) as bank:
        yield bank


def expected(bank: MemoryBank, paths: Tensor, seed: int = 0) -> dict[Node, Tensor]:
    nodes = {Node(level, int(path[level - 1])) for path in paths for level in bank.layout.levels}
    return {node: cases.random_block(bank.layout, node, seed) for node in nodes}


def same_blocks(bank: MemoryBank, paths: Tensor, seed: int = 0) -> bool:
    fetched, right = bank.fetch(paths), expected(bank, paths, seed)
    assert set(fetched.nodes) == set(right)
    return all(torch.equal(block, right[node]) for node, block in zip(fetched.nodes, fetched.blocks, strict=True))


# Fetching


def test_a_fetch_holds_every_distinct_block_once_and_says_who_reads_it(bank: MemoryBank) -> None:
    fetched = bank.fetch(PATHS)
    assert fetched.nodes == ((1, 0), (1, 2), (2, 0), (2, 1), (2, 7))
    readers = [None if rows is None else rows.tolist() for rows in fetched.readers]
    assert readers == [[0, 2, 3], [1], [2], [0, 3], [1]]
    assert same_blocks(bank, PATHS)
    assert fetched.nbytes == 4 * (2 * bank.layout.block_size(1) + 3 * bank.layout.block_size(2))


def test_layers_are_views_of_the_blocks(bank: MemoryBank) -> None:
    fetched = bank.fetch(PATHS[:1])
    layers = fetched.layers()
    assert len(layers) == 2
    assert all(layer.is_shared for layer in layers)
    group = layers[1].groups[0]
    assert (group.level, group.rows) == (1, None)
    assert [tuple(slab.shape) for slab in group.slabs] == [(3, 8)] * 3
    assert torch.equal(torch.cat([slab.flatten() for slab in group.slabs]), fetched.blocks[0][1])
    assert group.slabs[0].untyped_storage().data_ptr() == fetched.blocks[0].untyped_storage().data_ptr()


def test_generic_paths_read_the_generic_blocks(bank: MemoryBank) -> None:
    paths = bank.generic_paths(2)
    assert paths.tolist() == [[3, 9, 27]] * 2
    assert same_blocks(bank, paths)
    assert same_blocks(bank, torch.cat([paths, PATHS]))


def test_what_was_never_written_is_left_out(tmp_path: Path) -> None:
    for path in (None, tmp_path / "bank"):
        with MemoryBank.create(cases.tree(), cases.layout(), path=path, seed=3) as bank:
            assert bank.fetch(PATHS).nodes == ()
            assert bank.written() == []
            node = Node(2, 7)
            assert torch.equal(bank.block_of(*node), bank.layout.initial_block(node, 3))
            bank.put({node: cases.random_block(bank.layout, node)})
            assert bank.fetch(PATHS).nodes == (node,)
            assert bank.written() == [node]


def test_blocks_are_cast_and_copies_kept_within_their_budget(tmp_path: Path) -> None:
    for path in (None, tmp_path / "bank"):
        with cases.filled(path, dtype=torch.bfloat16) as bank:
            kept, wide = bank.fetch(PATHS), bank.fetch(PATHS, dtype=torch.float32)
            for before, after in zip(kept.blocks, wide.blocks, strict=True):
                assert before.dtype == torch.bfloat16
                assert torch.equal(after, before.float())
        if path is not None:
            with MemoryBank.open(path, copy_bytes=2**20) as bank:
                first, second = (bank.fetch(PATHS, dtype=torch.float32) for _ in range(2))
                assert all(a is b for a, b in zip(first.blocks, second.blocks, strict=True))


# In memory and on disk


@pytest.mark.parametrize("cache_bytes", [2**20, 800, 0, {1: 600}], ids=str)
def test_09_a_bank_on_disk_is_the_one_in_memory(tmp_path: Path, cache_bytes: Any) -> None:
    """Bit for bit, also when blocks have to go and come again, and when they were prefetched."""
    memory = cases.filled()
    cases.filled(tmp_path / "bank").close()
    with MemoryBank.open(tmp_path / "bank", cache_bytes=cache_bytes) as disk:
        for seed in range(12):
            paths = memory.route(cases.embeddings(5, seed))
            assert torch.equal(disk.route(cases.embeddings(5, seed)), paths)
            if seed % 2:
                disk.prefetch(paths)
            ours, theirs = disk.fetch(paths), memory.fetch(paths)
            assert ours.nodes == theirs.nodes
            assert all(torch.equal(a, b) for a, b in zip(ours.blocks, theirs.blocks, strict=True))


def test_09_a_prefetched_path_is_not_read_again(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        assert bank.statistics is not None
        bank.prefetch(PATHS).result(timeout=60)
        assert sum(bank.statistics.misses.values()) == 5
        assert same_blocks(bank, PATHS)
        assert sum(bank.statistics.misses.values()) == sum(bank.statistics.hits.values()) == 5


def _read(path: Path, results: Any) -> None:
    with MemoryBank.open(path, read_only=True) as bank:
        results.put(same_blocks(bank, PATHS))


def test_09_a_second_process_reads_while_the_first_may_write(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank"):
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        process = context.Process(target=_read, args=(tmp_path / "bank", results))
        process.start()
        assert results.get(timeout=60)
        process.join()


def test_09_a_reader_follows_the_writer_commit_by_commit(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank") as writer, MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
        assert same_blocks(reader, PATHS)
        held = reader.fetch(PATHS)
        before = [block.clone() for block in held.blocks]
        writer.put({node: cases.random_block(writer.layout, node, 5) for node in cases.every_node(writer.layout)})
        assert same_blocks(reader, PATHS), "nothing was committed yet"
        assert same_blocks(writer, PATHS, 5)
        writer.commit()
        assert same_blocks(reader, PATHS, 5)
        assert all(torch.equal(a, b) for a, b in zip(held.blocks, before, strict=True)), "what was handed out changed"
        writer.block(1, 0)
        assert Node(1, 0) not in reader.fetch(PATHS).nodes


def test_a_block_that_another_process_deletes_during_a_fetch_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        cases.filled(tmp_path / "bank") as writer,
        MemoryBank.open(tmp_path / "bank", read_only=True, cache_bytes=0) as reader,
    ):
        follow, rounds = reader._follow, []

        def then_deleted() -> None:
            follow()
            if not rounds:
                writer.delete(2, 7)
                writer.put({Node(1, 2): cases.random_block(writer.layout, Node(1, 2), 5)})
                writer.commit()
            rounds.append(1)

        monkeypatch.setattr(reader, "_follow", then_deleted)
        fetched = reader.fetch(PATHS[1:2])
        assert fetched.nodes == (Node(1, 2),)
        assert torch.equal(fetched.blocks[0], cases.random_block(writer.layout, Node(1, 2), 5))
        assert len(rounds) > 2, "there was no second round"


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        bank.put({node: torch.zeros(bank.layout.block_shape(node.level)) for node in cases.every_node(bank.layout)})
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert same_blocks(bank, PATHS)


def test_a_failed_commit_changes_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        bank.put({node: cases.random_block(bank.layout, node, 5) for node in cases.every_node(bank.layout)})
        with monkeypatch.context() as patched, MemoryBank.open(tmp_path / "bank", read_only=True) as reader:
            patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left on device")))
            with pytest.raises(ValueError, match="no space left"):
                bank.commit()
            assert same_blocks(reader, PATHS)
        assert same_blocks(bank, PATHS, 5)
        bank.commit()
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert same_blocks(bank, PATHS, 5)


def test_18_a_flipped_byte_is_found_before_the_block_is_used(tmp_path: Path) -> None:
    with cases.filled(tmp_path / "bank") as bank:
        assert bank.verify() == []
    file = tmp_path / "bank" / "level_2.blocks"
    data = bytearray(file.read_bytes())
    data[7 * 4096 + 11] ^= 1
    file.write_bytes(data)
    with MemoryBank.open(tmp_path / "bank") as bank:
        assert bank.verify() == [Node(2, 7)]
        bank.fetch(PATHS[[0, 2, 3]])
        for read in (lambda: bank.prefetch(PATHS).result(timeout=60), lambda: bank.fetch(PATHS)):
            with pytest.raises(ValueError, match=r"node 7 of level 2"):
                read()


# Routing


def test_12_rerouting_passes_over_what_is_closed(bank: MemoryBank) -> None:
    x = cases.embeddings(40)
    paths = bank.route(x)
    assert torch.equal(bank.route(x, reroute=True), paths)
    bank.block(1, 0)
    bank.delete(2, 7)
    again = bank.route(x, reroute=True)
    assert not (again[:, 0] == 0).any()
    assert not (again[:, 1] == 7).any()
    free = (paths[:, 0] != 0) & (paths[:, 1] != 7)
    assert torch.equal(again[free], paths[free])
    assert torch.equal(bank.route(x), paths)
    bank.unblock(1, 0)
    assert torch.equal(bank.route(x, reroute=True)[:, 0], paths[:, 0])


def test_a_text_that_goes_on_stays_on_its_path_unless_another_is_clearly_nearer(bank: MemoryBank) -> None:
    x, y = cases.embeddings(40), cases.embeddings(40, seed=3)
    paths = bank.route(x)
    for margin in (0.0, 0.2):
        moved = bank.route(y, keep=paths, margin=margin)
        assert torch.equal(moved, bank.tree.route(y, keep=paths, margin=margin))
    assert not torch.equal(bank.route(y, keep=paths, margin=0.2), bank.route(y))


# Refusals


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), "(2, 2)"),
        (torch.zeros(3), "(3,)"),
        (torch.zeros(1, 3), "torch.float32"),
        (torch.tensor([[0, 10, 0]]), "node 10 of level 2"),
        (torch.tensor([[-1, 0, 0]]), "node -1 of level 1"),
    ],
    ids=["depth", "rank", "dtype", "high", "low"],
)
def test_bad_paths_are_refused(bank: MemoryBank, paths: Tensor, words: str) -> None:
    for call in (bank.fetch, bank.prefetch):
        with pytest.raises(ValueError, match="paths") as refusal:
            call(paths)
        assert words in str(refusal.value)


def test_bad_blocks_are_refused_and_nothing_is_put(bank: MemoryBank) -> None:
    good = torch.zeros(bank.layout.block_shape(1))
    bank.delete(1, 1)
    for node, block, words in (
        (Node(1, 0), good[:1], r"blocks\[\(1, 0\)\] has shape \(1, 72\)"),
        (Node(1, 0), good.long(), r"torch.int64"),
        (Node(1, 0), good + torch.nan, "not finite"),
        (Node(1, 1), good, "deleted"),
        (Node(1, 4), good, "node=4 is not in level 1"),
        (Node(3, 0), good, "level=3 owns no blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            bank.put({Node(1, 2): good, node: block})
    assert same_blocks(bank, PATHS[1:2])


def test_bad_banks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tree has 2 levels"):
        MemoryBank.create(cases.tree(depth=2), cases.layout())
    with pytest.raises(ValueError, match="cache_bytes=-1"):
        MemoryBank.create(cases.tree(), cases.layout(), path=tmp_path / "new", cache_bytes=-1)
    with pytest.raises(ValueError, match=r"cache_bytes\[2\]=0.5"):
        MemoryBank.create(cases.tree(), cases.layout(), path=tmp_path / "newer", cache_bytes={2: 0.5})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="device='meta' is for a bank in memory"):
        MemoryBank.create(cases.tree(), cases.layout(), path=tmp_path / "new", device="meta")
    cases.filled(tmp_path / "bank").close()
    with MemoryBank.open(tmp_path / "bank", read_only=True) as bank:
        for call in (bank.commit, lambda: bank.put({}), lambda: bank.block(1, 0), lambda: bank.merge({})):
            with pytest.raises(ValueError, match="read_only=True"):
                call()
