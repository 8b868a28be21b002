"""What the claims of B'MOJO measure."""

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memzoo.lit_modules.data import TextData

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.bmojo")
    sys.path.remove(str(SCRIPTS))


def test_costs_are_those_of_the_model_and_of_a_row_of_its_state(claims):
    settings = claims.eidetic(16)
    model = claims.build(settings)
    numbers = sum(t.numel() for t in model.initial_state(1).named_tensors().values() if t.is_floating_point())
    assert claims.costs(settings) == f"{model.num_parameters():,} and {numbers // 2:,}"


def test_every_variant_builds_and_the_first_tokens_are_the_pairs(claims):
    for claim in claims.CLAIMS.claims.values():
        for settings in claim.variants.values():
            with torch.device("meta"):
                claims.build(settings)
    model = claims.build(claims.SELECTION.variants["first"])
    _, state = model(torch.randint(64, (2, 128)))
    assert state.blocks[0].eidetic_positions.tolist() == [[*range(16)]] * 2


def test_a_stack_alternates(claims):
    names = [type(block.mixer).__name__ for block in claims.build(claims.ORDERED["Mamba-2, then a window"]).blocks]
    assert names == ["Mamba2", "SlidingWindowAttention"]


def test_the_same_bytes_are_read_behind_others_and_behind_none(claims, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}\n" for n in range(500)))
    here = partial(TextData, paths=[str(tmp_path / "text.txt")], cache_dir=tmp_path / "cache")
    monkeypatch.setattr(claims, "TextData", here)
    sizes = dict(vocab_size=256, dim=16, depth=1, hidden_dim=16)
    short = dict(model="bmojo", sizes=sizes, lengths=[8, 16, 32], steps=2, rows=4, learning_rate=1e-3, test_bytes=128)
    options = dict(num_heads=2, fading_span=0)
    narrow = claims.measure(short | {"options": options | {"window": 1}}, 0)  # it sees the last byte alone
    wide = claims.measure(short | {"options": options | {"window": 32}}, 0)
    assert set(narrow) == {"8 tokens", "16 tokens", "32 tokens", claims.BEHIND, claims.ALONE}
    assert narrow[claims.BEHIND] == pytest.approx(narrow[claims.ALONE], rel=1e-5)
    assert narrow["8 tokens"] == pytest.approx(narrow["32 tokens"], rel=1e-5)
    assert wide[claims.BEHIND] != pytest.approx(wide[claims.ALONE], rel=1e-5)
