"""Books streamed by several devices and workers."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from tests.lit_modules.book_stream_cases import on_devices, quiet, small, streamed, write_documents
from tests.lit_modules.processes import run_two


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


def test_devices_stream_whole_books_in_turn(folder: Path):
    whole = streamed(small(folder).test_dataloader())
    for devices in (1, 2, 3):
        for rank in range(devices):
            data = on_devices(small(folder), devices, rank)
            loader = data.test_dataloader()
            own = {book: whole[book] for book in range(rank, 3, devices)}
            assert streamed(loader) == own
            assert len(loader) == len(list(loader))
            assert data.test_tokens == sum(map(len, whole.values()))


def test_more_devices_than_books_are_refused_only_where_books_are_read(folder: Path):
    data = on_devices(small(folder), 4, 0)
    with pytest.raises(ValueError, match=r"books: 3 of them meet 4 devices.*use devices=3, or more books"):
        data.test_dataloader()
    next(iter(data.val_dataloader()))


def test_workers_deliver_the_same_chunks_in_order(folder: Path):
    first, second = (list(small(folder, num_workers=workers).test_dataloader()) for workers in (0, 2))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


class Recorder(pl.LightningModule):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[dict[str, Tensor]] = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches.append(batch)


def stream_in_two(folder: str) -> None:
    module = Recorder()
    trainer = quiet(Path(folder), strategy="ddp", devices=2)
    trainer.test(module, datamodule=small(Path(folder)), verbose=False)
    books = streamed(module.batches)
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(books))


@pytest.mark.slow
def test_a_trainer_with_two_processes_leaves_the_books_where_they_are(folder: Path):
    expected = streamed(small(folder).test_dataloader())
    run_two(stream_in_two, str(folder))
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [{*books} for books in found] == [{"0", "2"}, {"1"}]
    assert {int(book): tokens for books in found for book, tokens in books.items()} == expected
