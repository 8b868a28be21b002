"""Books, and the data that streams them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from memzoo.lit_modules.data import BookStreamData
from memzoo.lit_modules.objective import NextTokens

BOOKS = {
    "ahab.txt": "Call me Ishmael. " * 5,
    "bovary.txt": "Nous étions à l'étude. ",
    "casmurro.txt": "Uma noite, " * 3,
}


def write_documents(folder: Path) -> Path:
    """Write twenty documents, and the books in a folder below."""
    (folder / "books").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text("".join(f"line {i:02d}.{j}: {i * j:05d}\n" for j in range(3)))
    for name, text in BOOKS.items():
        (folder / "books" / name).write_text(text, encoding="utf-8")
    return folder


def small(folder: Path, **options: Any) -> BookStreamData:
    given = {"books": folder / "books", "sequence_length": 16, "batch_size": 4, "validation_fraction": 0.2}
    return BookStreamData(folder, **given | {"chunk_length": 8, "window": 20} | options)


def scored(batch: dict[str, Tensor]) -> list[int]:
    pieces = NextTokens.of(batch)
    return pieces.targets[pieces.counted].tolist()


def streamed(loader: Any) -> dict[int, list[int]]:
    """What is asked for, by book."""
    books: dict[int, list[int]] = {}
    for batch in loader:
        books.setdefault(int(batch["document"]), []).extend(scored(batch))
    return books


def on_devices(data: BookStreamData, devices: int, rank: int) -> BookStreamData:
    share = {"num_replicas": devices, "rank": rank}
    data.setup()
    data.trainer = SimpleNamespace(world_size=devices, distributed_sampler_kwargs=share)
    return data


def quiet(tmp_path: Path, **options: Any) -> pl.Trainer:
    given = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **given | options)
