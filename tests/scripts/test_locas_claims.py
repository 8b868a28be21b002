"""What the claims of Locas measure."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from memzoo.lit_modules import TestTimeTrainingModule

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.locas")
    sys.path.remove(str(SCRIPTS))


def test_every_memory_has_as_many_candidates_to_choose_from(claims):
    chosen = {
        name: len(settings["candidates"])
        for name, settings in claims.STREAM.variants.items()
        if name != "no memory" and claims.PAPERS not in name
    }
    assert set(chosen.values()) == {6}, chosen
    assert {len(settings["candidates"]) for settings in claims.INIT.variants.values()} == {1, 3}


def test_every_candidate_is_a_module(claims):
    for claim in claims.CLAIMS.claims.values():
        for settings in claim.variants.values():
            for own in settings["candidates"]:
                TestTimeTrainingModule(
                    "transformer_tiny",
                    memory=own["memory"],
                    memory_options=own["options"],
                    memory_learning_rate=own["rate"],
                    steps_per_chunk=own["steps"],
                )


@pytest.mark.parametrize("tuning", [False, True], ids=["testing", "choosing"])
def test_settings_are_chosen_on_other_books_than_those_tested_on(claims, tuning, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path))
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"book {number} " * 40)
    (tmp_path / "text.txt").write_text("other words " * 400)
    data = claims.Books(
        tmp_path / "text.txt",
        books=[str(tmp_path / f"{number}.txt") for number in range(6)],
        chunk_length=64,
        window=64,
        sequence_length=32,
    )
    data.tuning = tuning
    documents = {int(batch["document"]) for batch in data.test_dataloader()}
    assert documents == ({3, 4, 5} if tuning else {0, 1, 2})
