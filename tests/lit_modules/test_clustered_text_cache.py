"""The prepared folder of clustered text: written once, and named when something is wrong with it."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers import ClusterTree
from tests.lit_modules.clustered_text_cases import Counted, folders, small, texts_of, write_documents

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


def test_the_tree_is_fitted_on_training_windows_alone(folder: Path) -> None:
    embedder = Counted()
    data = small(folder, window=150, sequence_length=150, embedder=embedder)
    data.prepare_data()
    asked = embedder.texts[: -len(texts_of(data, data.validation_rows))]
    assert ClusterTree.fit(data.embed(asked), branching=2, depth=2).fingerprint == data.tree.fingerprint


def test_another_start_embeds_nothing(folder: Path) -> None:
    first, second = Counted(), Counted()
    data = small(folder, embedder=first)
    data.prepare_data()
    assert len(first.texts) == len(set(first.texts)) > 0
    same = small(folder, embedder=second, batch_size=2, level=1, within=(1, 0), pack_documents=False)
    same.prepare_data()
    same.setup()
    assert second.texts == []
    assert same.tree.fingerprint == data.tree.fingerprint
    assert len(folders(data)) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"window": 31},
        {"sequence_length": 31},
        {"depth": 3},
        {"branching": 3},
        {"seed": 1},
        {"route_prefix": 8},
        {"tails": "drop"},
        {"end_of_text": 0},
        {"validation_fraction": 0.4},
        {"embedder": Counted("another")},
    ],
    ids=lambda option: next(iter(option)),
)
def test_whatever_changes_rows_makes_a_folder_of_its_own(option: dict[str, Any], folder: Path) -> None:
    data = small(folder, embedder=Counted())
    data.prepare_data()
    small(folder, **{"embedder": Counted()} | option).prepare_data()
    assert len(folders(data)) == 2


def test_a_saved_tree_routes_other_text(folder: Path, tmp_path: Path) -> None:
    tree = small(folder, branching=3, depth=1).tree
    tree.save(tmp_path / "tree.safetensors")
    data = small(folder, tree=tmp_path / "tree.safetensors", within=(1, 2))
    assert data.tree.fingerprint == tree.fingerprint
    assert (data.branching, data.depth) == (3, 1)
    assert data.training_rows[0]["paths"].shape == (1,)
    assert (next(iter(data.train_dataloader()))["paths"] == 2).all()


def test_two_processes_at_once_write_once(folder: Path, tmp_path: Path) -> None:
    start, log = FORK.Barrier(2), tmp_path / "log"

    class Logged(Counted):
        def embed(self, texts: Sequence[str]) -> Tensor:
            with log.open("a") as handle:
                handle.write(f"{os.getpid()}\n")
            return super().embed(texts)

    def prepare() -> None:
        torch.set_num_threads(1)
        data = small(folder, embedder=Logged())
        start.wait(30)
        data.prepare_data()
        assert len(data.training_rows) > 0

    children = [FORK.Process(target=prepare) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert len(log.read_text().split()) == 2  # training and validation, by one of them
    assert len(set(log.read_text().split())) == 1


def test_damage_is_named_with_the_folder_to_delete(folder: Path) -> None:
    data = small(folder)
    data.prepare_data()
    (place,) = folders(data)
    path = place / "training-tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"training-tokens.npy is corrupt: its checksum.*delete the folder .*{place}"):
        small(folder).prepare_data()
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"training-tokens.npy is corrupt: it has 100 bytes"):
        data.setup()


def test_a_failed_preparation_leaves_nothing(folder: Path) -> None:
    class Failing(Counted):
        def embed(self, texts: Sequence[str]) -> Tensor:
            raise RuntimeError("no embedding today")

    data = small(folder, embedder=Failing())
    with pytest.raises(RuntimeError, match="no embedding today"):
        data.prepare_data()
    assert [path.name for path in data.cache_dir.glob("leaves-*") if path.suffix != ".lock"] == []


def test_an_error_of_the_embedder_is_not_laid_on_the_cache(folder: Path) -> None:
    class Absent(Counted):
        def embed(self, texts: Sequence[str]) -> Tensor:
            raise OSError("no such model")

    data = small(folder, embedder=Absent())
    with pytest.raises(OSError, match=r"^no such model$"):
        data.prepare_data()
    assert [path.name for path in data.cache_dir.glob("leaves-*") if path.suffix != ".lock"] == []


def test_a_full_disk_is_laid_on_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(ClusterTree, "save", fail)
    with pytest.raises(ValueError, match=r"cache_dir='.*cache' cannot be written \(No space left on device\)"):
        small(folder).prepare_data()
