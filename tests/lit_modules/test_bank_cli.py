"""``memzoo bank``."""

from pathlib import Path

import pytest
import torch

from memzoo.layers import MemoryBank
from memzoo.layers.banks.layout import Node
from memzoo.lit_modules.cli import main
from tests.layers.banks import bank_cases as cases


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cases.filled(tmp_path / "bank").close()
    return tmp_path / "bank"


def run(*words: object) -> int:
    return main(["bank", *map(str, words)])


def test_info_says_what_a_bank_holds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("block", path, 2, 4) == run("delete", path, 1, 1) == 0
    assert run("info", path) == 0
    head, *rows = capsys.readouterr().out.splitlines()[2:]
    assert head.startswith("ffn memories for 2 layers of width 8, torch.float32; 1,296 parameters, 240 on a path")
    assert [row.split() for row in rows[1:]] == [
        ["1", "3", "3", "576", "3", "0", "1"],
        ["2", "9", "2", "384", "10", "1", "0"],
    ]


def test_verify_finds_what_is_damaged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", path) == 0
    assert "14 blocks are as they were written" in capsys.readouterr().out
    with (path / "level_2.blocks").open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"damage")
    assert run("verify", path) == 2
    said = capsys.readouterr().err
    assert "level 2, node 3" in said
    assert "1 damaged blocks" in said


def test_nodes_are_blocked_and_freed(path: Path) -> None:
    assert run("block", path, 1, 0, "--subtree") == 0
    with MemoryBank.open(path) as bank:
        closed = [node for node in cases.every_node(bank.layout) if not bank.is_readable(node)]
    assert closed == [Node(1, 0), Node(2, 0), Node(2, 1), Node(2, 2)]
    assert run("unblock", path, 1, 0, "--subtree") == 0
    with MemoryBank.open(path) as bank:
        assert all(map(bank.is_readable, cases.every_node(bank.layout)))


def test_parts_are_copied_and_merged(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / f"part{number}" for number in range(2)]
    for number, part in enumerate(parts):
        assert run("copy", path, part) == 0
        with MemoryBank.open(part) as bank:
            bank.put({Node(1, number): torch.ones(bank.layout.block_shape(1))})
            bank.commit()
    assert run("merge", path, f"0={parts[0]}", f"1={parts[1]}") == 0
    with MemoryBank.open(path) as bank:
        assert [bool((bank.block_of(1, node) == 1).all()) for node in range(3)] == [True, True, False]
    assert run("copy", path, parts[0]) == 2
    assert "exists" in capsys.readouterr().err
    assert run("copy", path, tmp_path / "wider", "--branching", "4") == 0
    with MemoryBank.open(tmp_path / "wider") as bank:
        assert bank.layout.branching == 4


def test_what_cannot_be_done_is_one_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("info", tmp_path / "none"), "none"),
        (("block", path, 4, 0), "level=4 is not in the tree"),
        (("delete", path, 1, 9), "node=9 is not in level 1"),
        (("merge", path, tmp_path / "part"), "write 3=runs/part3"),
        (("merge", path, f"0={path}", f"0={path}"), "names a subtree twice"),
        (("merge", path, f"0={path}"), "is the bank itself"),
    ):
        assert run(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
