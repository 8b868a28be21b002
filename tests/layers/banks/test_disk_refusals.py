"""DiskStorage: what is damaged, and what is refused."""

import json
import os
import sys

import pytest
from safetensors import SafetensorError

from memzoo.layers.banks.disk import CorruptBlockError, DiskStorage
from memzoo.layers.banks.disk_files import BlockFile
from memzoo.layers.banks.layout import Node
from memzoo.layers.banks.storage import Mark
from tests.layers.banks.disk_cases import (
    A,
    B,
    C,
    block,
    contents,
    first_commit,
    flip,
    new,
    second_commit,
    tree,
)


def test_18_a_flipped_byte_is_found_before_use(tmp_path):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        flip(disk, B, 17)
        for read_only in (True, False):
            if not read_only:
                disk.close()
            with DiskStorage(disk.path, read_only=read_only) as again:
                with pytest.raises(CorruptBlockError, match=r"block of node 2 of level 1 in '.*level_1.blocks'"):
                    again.read(B)
                assert again.read(A).equal(block(A, 1))
                assert again.verify() == [B]
    with DiskStorage(disk.path) as again:
        again.write({B: block(B, 2)})
        assert again.verify() == []


def test_18_a_disk_that_fails_is_as_bad_as_a_flipped_byte(tmp_path, monkeypatch):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        monkeypatch.setattr(BlockFile, "_read_some", lambda *_: (_ for _ in ()).throw(OSError(5, "bad sector")))
        with pytest.raises(CorruptBlockError, match="is not what was written"):
            disk.read(A)


def test_a_level_file_cut_short(tmp_path):
    with new(tmp_path / "bank") as disk:
        disk.write({Node(1, 3): block(Node(1, 3), 1)})
        os.truncate(disk.path / "level_1.blocks", 3 * 4096)
        assert disk.verify() == [Node(1, 3)]
    with pytest.raises(ValueError, match=r"level_1.blocks' has 12288 bytes, not 16384; copy the bank again"):
        DiskStorage(disk.path, read_only=True)
    (disk.path / "level_1.blocks").unlink()
    for _ in range(2):  # nothing is left locked
        with pytest.raises(ValueError, match=r"level_1.blocks' cannot be opened"):
            DiskStorage(disk.path)


def test_any_byte_of_the_header_that_changes_is_found(tmp_path):
    new(tmp_path / "bank").close()
    path = tmp_path / "bank" / "bank.json"
    text = path.read_bytes()
    for place in range(0, len(text), 7):
        if bytes([text[place]]).isalnum():
            other = b"1" if text[place : place + 1] != b"1" else b"2"
            path.write_bytes(text[:place] + other + text[place + 1 :])
            with pytest.raises(ValueError, match=r"damaged|not the header|format_version"):
                DiskStorage(path.parent, read_only=True)
    for bad in (b"", text[:-1], b"[]", b"\xff" * 9):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"bank.json' is not as it was written: the file is damaged"):
            DiskStorage(path.parent)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "another", "is not the header of a memory bank"),
        ("format_version", 2, "format_version=2; this version"),
    ],
)
def test_headers_of_others(tmp_path, key, value, message):
    new(tmp_path / "bank").close()
    path = tmp_path / "bank" / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        DiskStorage(path.parent)


def test_the_tree_must_be_that_of_the_bank(tmp_path):
    new(tmp_path / "bank").close()
    [path] = (tmp_path / "bank").glob("tree-*")
    tree(1).save(path)
    with pytest.raises(ValueError, match=r"holds a tree with fingerprint .* the bank's has"):
        DiskStorage(tmp_path / "bank")
    path.write_bytes(b"no tree")
    with pytest.raises(ValueError, match="is not a saved tree"):
        DiskStorage(tmp_path / "bank", read_only=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"tree-.*is missing; copy the bank again"):
        DiskStorage(tmp_path / "bank", read_only=True)


def test_a_bank_that_was_replaced_or_removed_is_not_followed(tmp_path):
    new(tmp_path / "bank").close()
    with DiskStorage(tmp_path / "bank", read_only=True) as reader:
        (tmp_path / "bank").rename(tmp_path / "old")
        with pytest.raises(ValueError, match="holds no memory bank"):
            reader.refresh()
        new(tmp_path / "bank").close()
        with pytest.raises(ValueError, match="holds another bank by now"):
            reader.refresh()


def test_places_that_hold_no_bank(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "nothing"):
        for read_only in (True, False):
            with pytest.raises(ValueError, match=f"{name}' holds no memory bank"):
                DiskStorage(tmp_path / name, read_only=read_only)
    assert list((tmp_path / "empty").iterdir()) == []
    new(tmp_path / "empty").close()  # an empty folder may become one
    for name, message in (
        ("file", "is there already"),
        ("empty", "is there already"),
        ("file/below", "cannot be made"),
    ):
        with pytest.raises(ValueError, match=message):
            new(tmp_path / name)


def test_a_machine_of_the_other_byte_order_is_refused(tmp_path, monkeypatch):
    new(tmp_path / "bank").close()
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (lambda: DiskStorage(tmp_path / "bank"), lambda: new(tmp_path / "other")):
        with pytest.raises(ValueError, match="use a little-endian machine"):
            call()


def test_a_tree_that_cannot_be_written(tmp_path, monkeypatch):
    with new(tmp_path / "bank") as disk:
        first_commit(disk)
        before = contents(disk)

        def full(*_, **__):
            raise SafetensorError("I/O error: no space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(ValueError, match=r"nothing was written .*no space left"):
            second_commit(disk)
        assert contents(disk) == before
        with pytest.raises(ValueError, match=r"cannot be made .*no space left"):
            new(tmp_path / "other")
    assert os.listdir(tmp_path) == ["bank"]


def test_blocks_and_marks_that_do_not_fit(tmp_path):
    with new(tmp_path / "bank") as disk:
        for blocks, marks, message in (
            ({A: block(C, 1)}, {}, r"blocks\[\(1, 0\)\] has shape \(2, 48\); it must be \(2, 72\)"),
            ({Node(3, 0): block(A, 1)}, {}, "level=3 owns no blocks"),
            ({Node(1, 4): block(A, 1)}, {}, "node=4 is not in level 1"),
            ({}, {Node(3, 28): Mark.BLOCKED}, "marks has node 28 of level 3"),
            ({}, {Node(4, 0): Mark.BLOCKED}, "level=4 is not in the tree"),
        ):
            with pytest.raises(ValueError, match=message):
                disk.write(blocks, marks)
        assert disk.version == 0
