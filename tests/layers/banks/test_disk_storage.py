"""DiskStorage: what it keeps, what its files are, and who may read and write."""

import base64
import copy
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.layers.banks.disk import DiskStorage, NotWrittenError
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import Mark, RamStorage
from tests.layers.banks.disk_cases import (
    GENERIC,
    LAYOUT,
    A,
    B,
    C,
    block,
    contents,
    first_commit,
    flip,
    new,
    raw,
    second_commit,
    tree,
)

# What it keeps.


def test_09_it_holds_what_a_storage_in_memory_holds(tmp_path):
    ram = RamStorage(LAYOUT, tree(), seed=5)
    with new(tmp_path / "bank") as disk:
        assert contents(disk) == contents(ram)
        for commit in (first_commit, second_commit):
            commit(ram)
            commit(disk)
            assert contents(disk) == contents(ram)
    for read_only in (False, True):
        with DiskStorage(tmp_path / "bank", read_only=read_only) as disk:
            assert contents(disk) == contents(ram)
            assert (disk.layout, disk.seed, disk.version) == (LAYOUT, 5, 2)
            assert disk.verify() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blocks_are_cast_to_the_dtype_of_the_layout(tmp_path, dtype):
    layout = BankLayout(num_layers=2, dim=8, rows=(3, 2, 0), branching=3, dtype=dtype)
    given = torch.randn(layout.block_shape(1), dtype=torch.float64).T.contiguous().T.requires_grad_()
    with new(tmp_path / "bank", layout) as disk:
        disk.write({A: given})
        assert disk.read(A).equal(given.to(dtype))
        assert disk.read(A).dtype == dtype


def test_a_block_in_several_pieces(tmp_path, monkeypatch):
    for module in ("disk_format", "disk_files", "journal"):
        monkeypatch.setattr(f"memzoo.layers.banks.{module}.PIECE", 100)
    monkeypatch.setattr("memzoo.layers.banks.disk_files.SHARED", 200)
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        second_commit(disk)
        assert disk.read(A).equal(block(A, 2))
        assert raw(disk, B) == bytes(LAYOUT.block_bytes(1))
        assert disk.verify() == []
        flip(disk, A, LAYOUT.block_bytes(1) - 1)
        assert disk.verify() == [A]


def test_it_reads_into_memory_that_is_there(tmp_path):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        slots = torch.zeros(3, *LAYOUT.block_shape(1), dtype=LAYOUT.dtype)
        disk.read_into(A, slots[1])
        assert slots[1].equal(block(A, 1))
        assert not slots[::2].any()
        for bad in (slots[1].T, slots[1][:1], slots[1].float(), slots[1].to("meta")):
            with pytest.raises(ValueError, match=r"out has shape .* it must be contiguous"):
                disk.read_into(A, bad)


def test_what_is_not_written_is_not_read(tmp_path):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        second_commit(disk)
        for node in (B, Node(1, 1)):
            with pytest.raises(NotWrittenError, match=f"node={node.node} of level 1 was never written, or was deleted"):
                disk.read(node)
        with pytest.raises(ValueError, match=r"node=10 is not in level 2"):
            disk.read(Node(2, 10))
        with pytest.raises(ValueError, match=r"level=3 owns no blocks"):
            disk.read(Node(3, 0))


def test_a_commit_that_changes_nothing_is_none(tmp_path):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        disk.write({})
        disk.write({}, {}, tree())
        assert disk.version == 1


def test_a_deleted_block_is_zero_on_the_disk(tmp_path):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        assert raw(disk, B) == block(B, 1).view(torch.uint8).numpy().tobytes()
        disk.write({A: block(A, 3)}, {B: Mark.DELETED, A: Mark(0)})
        assert raw(disk, B) == raw(disk, A) == bytes(LAYOUT.block_bytes(1))
        assert sorted(file.name for file in disk.path.iterdir()) == names(disk), "no journal holds it either"
        disk.write({B: block(B, 4)}, {B: Mark.WRITTEN})
        assert disk.read(B).equal(block(B, 4))


def names(disk: DiskStorage) -> list[str]:
    return ["bank.json", "level_1.blocks", "level_2.blocks", "lock", f"tree-{disk.tree.fingerprint[:16]}.safetensors"]


# The format.


def test_an_outsider_reads_it_with_numpy_alone(tmp_path):
    layout = BankLayout(num_layers=2, dim=8, rows=(3, 2, 0), branching=3, dtype=torch.float32)
    with new(tmp_path / "bank", layout) as disk:
        disk.write({A: block(A, 1, layout), C: block(C, 1, layout)})
    header = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert (header["format"], header["format_version"], header["layout"]["dtype"]) == (
        "memzoo memory bank",
        1,
        "float32",
    )
    for level, node in (A, C):
        facts = header["levels"][level - 1]
        blocks = np.memmap(tmp_path / "bank" / facts["file"], "<f4", "r").reshape(facts["blocks"], -1)
        found = blocks[node, : facts["block_bytes"] // 4].reshape(facts["block_shape"])
        np.testing.assert_array_equal(found, block(Node(level, node), 1, layout).numpy())
        slabs = found.reshape(2, 3, layout.rows[level - 1], 8)  # layers, (gate, up, down), rows, width
        for layer in range(2):
            for slab, expected in zip(
                slabs[layer], layout.split(block(Node(level, node), 1, layout)[layer], level), strict=True
            ):
                np.testing.assert_array_equal(slab, expected.numpy())
        marks = np.frombuffer(base64.b64decode(facts["marks"]), np.uint8)
        assert np.flatnonzero(marks).tolist() == [node]
        assert facts["stride"] % 4096 == 0
        assert np.frombuffer(base64.b64decode(facts["checksums"]), "<u8").astype(bool).tolist() == (marks > 0).tolist()
    assert "file" not in header["levels"][2]


def test_a_bank_of_billions_of_parameters_takes_no_place_at_first(tmp_path):
    layout = BankLayout(num_layers=35, dim=512, rows=(256, 64, 16, 0), branching=16)
    centroids = [torch.zeros(16**level, 1) for level in range(1, 5)]
    with DiskStorage.create(tmp_path / "bank", layout, type(tree())(centroids)) as disk:
        files = list(disk.path.glob("*.blocks"))
        assert sum(file.stat().st_size for file in files) > 2 * layout.bank_parameters == 9_248_440_320
        assert sum(file.stat().st_blocks * 512 for file in files) < 2**20
        assert disk.path.joinpath("bank.json").stat().st_size < 2**18


# Who reads.


def test_readers_follow_what_is_committed(tmp_path):
    with new(tmp_path / "bank") as writer, DiskStorage(writer.path, read_only=True) as reader:
        assert reader.refresh() is None
        first_commit(writer)
        assert reader.version == 0
        assert reader.refresh() == {A, B, C, GENERIC}
        assert (reader.version, reader.refresh()) == (1, None)
        second_commit(writer)
        writer.write({}, None, tree(2))
        assert reader.refresh() == {A, B, C, Node(3, 5)}
        assert contents(reader) == contents(writer)
        writer.write({}, None, tree(3))
        assert reader.refresh() == set(), "a commit, but of no node"
        assert reader.tree.fingerprint == tree(3).fingerprint
        assert writer.refresh() is None


def test_refresh_reads_no_header_when_nothing_changed(tmp_path, monkeypatch):
    with new(tmp_path / "bank") as writer, DiskStorage(writer.path, read_only=True) as reader:
        first_commit(writer)
        reader.refresh()
        monkeypatch.setattr(Path, "read_bytes", None)
        assert reader.refresh() is None


def test_a_read_moves_on_to_the_commit_that_replaced_its_block(tmp_path):
    with new(tmp_path / "bank") as writer:
        first_commit(writer)
        with DiskStorage(writer.path, read_only=True) as reader:
            second_commit(writer)
            assert reader.read(GENERIC).equal(block(GENERIC, 1))
            assert reader.version == 1
            assert reader.read(A).equal(block(A, 2))
            assert reader.version == 2
            with pytest.raises(NotWrittenError):
                reader.read(B)
            assert reader.refresh() == {A, B, C, Node(3, 5)}, "what the read took up is still told"
            assert reader.refresh() is None


def test_one_storage_at_a_time_writes(tmp_path):
    with new(tmp_path / "bank") as writer:
        with pytest.raises(ValueError, match=r"bank.*is being written to by another bank"):
            DiskStorage(writer.path)
        with DiskStorage(writer.path, read_only=True) as reader, pytest.raises(ValueError, match="read_only=True"):
            first_commit(reader)
    for call in (lambda: first_commit(writer), lambda: writer.read(A), writer.refresh):
        with pytest.raises(ValueError, match="is closed"):
            call()
    writer.close()
    with DiskStorage(writer.path) as again:
        first_commit(again)


def test_copies_of_a_writer_are_readers(tmp_path):
    with new(tmp_path / "bank") as writer:
        first_commit(writer)
        for other in (pickle.loads(pickle.dumps(writer)), copy.deepcopy(writer)):
            with other:
                assert contents(other) == contents(writer)
                assert other.read_only


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_fork_of_a_writer_is_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("memzoo.layers.banks.disk_files.SHARED", 1)  # a fork has none of its parent's threads
    with new(tmp_path / "bank") as writer:
        first_commit(writer)
        assert writer.read(A).equal(block(A, 1))
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=fork, args=(writer, theirs))
        process.start()
        assert ours.recv() == "was opened by the process that this is a fork of"
        second_commit(writer)
        ours.send("go on")
        assert ours.recv() == contents(writer)
        process.join(30)
        assert process.exitcode == 0
        with pytest.raises(ValueError, match="is being written to"):
            DiskStorage(writer.path)


def fork(storage, pipe) -> None:
    try:
        first_commit(storage)
    except ValueError as error:
        pipe.send(str(error).split("' ")[1].split(";")[0])
    pipe.recv()
    storage.read(A)
    pipe.send(contents(storage))
    storage.close()


def test_without_positioned_reads(tmp_path, monkeypatch):
    for name in ("preadv", "posix_fadvise", "posix_fallocate", "O_DIRECTORY"):
        monkeypatch.delattr(os, name, raising=False)
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        second_commit(disk)
        assert disk.read(A).equal(block(A, 2))
        assert disk.verify() == []
