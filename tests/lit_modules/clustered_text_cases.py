"""Texts of a few subjects, and the data of their clusters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from memzoo.layers import HashedNgrams
from memzoo.lit_modules.data import ClusteredTextData, LeafRows

SUBJECTS = (
    "harbour anchor tide reef",
    "flour oven dough whisk",
    "verdict jury clause appeal",
    "violin chord tempo aria",
)


def write_documents(folder: Path) -> Path:
    """Write sixteen documents of 120 to 150 bytes, each about one of four subjects, no two alike."""
    folder.mkdir()
    for i in range(16):
        subject = SUBJECTS[i % 4]
        (folder / f"{i:02d}.txt").write_text((f"{i:02d} {subject} " * 9)[: 120 + 2 * i])
    return folder


class Counted:
    """Hashed n-grams that note the texts they are asked for."""

    def __init__(self, fingerprint: str = "counted") -> None:
        self.fingerprint = fingerprint
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        return HashedNgrams(64).embed(texts)


def small(folder: Path, **options: Any) -> ClusteredTextData:
    sizes = dict(sequence_length=32, window=32, batch_size=4, validation_fraction=0.25, branching=2, depth=2)
    return ClusteredTextData(folder, **sizes | dict(cache_dir=folder.parent / "cache") | options)


def texts_of(data: ClusteredTextData, rows: LeafRows) -> list[tuple[str, list[int]]]:
    """Return every document that rows hold, whole or in two parts put together, with its path."""
    found: list[tuple[str, list[int]]] = []
    before = None
    for row in rows:
        ids, tokens = row["doc_ids"], row["tokens"]
        pieces = [data.decode(tokens[(ids == i)].tolist()) for i in range(1, int(ids.max()) + 1)]
        path = row["paths"].tolist()
        if before == path:  # the first token is the last of the row before
            found[-1] = (found[-1][0] + pieces[0][1:], path)
            pieces = pieces[1:]
        found += [(piece, path) for piece in pieces]
        before = path
    return found


def folders(data: ClusteredTextData) -> list[Path]:
    return sorted(path for path in data.cache_dir.glob("leaves-*") if path.is_dir())
