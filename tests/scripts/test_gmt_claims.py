"""What the claims of the Graph Memory Transformer measure."""

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memzoo.layers import GraphMemoryCell
from memzoo.lit_modules.data import TextData

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.gmt")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def measured(claims, tmp_path, monkeypatch):
    """Run a claim's settings on a small model and a small text."""
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}\n" for n in range(500)))
    monkeypatch.setattr(claims, "TextData", partial(TextData, paths=[str(tmp_path / "text.txt")], cache_dir=tmp_path))
    sizes = dict(vocab_size=256, dim=8, depth=1, num_heads=1, context=16)
    return lambda settings: claims.measure(settings | dict(sizes=sizes, steps=2, rows=2, test_batches=3), 0)


def test_as_many_parameters_are_about_as_many(claims):
    cells, narrow = (
        claims.build(claims.ORDER.variants[name]).num_parameters() for name in list(claims.ORDER.variants)[1:3]
    )
    assert abs(narrow / cells - 1) < 0.01


def test_a_blind_source_routes_alike_and_passes_no_gradient(claims):
    torch.manual_seed(0)
    cell, x = GraphMemoryCell(8, num_slots=4, navigation_dim=4), torch.randn(1, 5, 8, requires_grad=True)
    blind = claims.BlindSource(8, num_slots=4, navigation_dim=4)
    blind.load_state_dict(cell.state_dict())
    assert torch.equal(blind.route(x).target, cell.route(x).target)
    (to_scores,) = torch.autograd.grad(blind.route(x).scores[..., 0].sum(), x)
    assert to_scores.any()
    assert not blind.route(x).source.requires_grad
    with torch.no_grad():
        cell.query.weight.zero_()
        blind.query.weight.zero_()
    (seen,), (unseen,) = (torch.autograd.grad(c(x).square().sum() + c(x)[..., 0].sum(), x) for c in (cell, blind))
    assert seen.any()
    assert not unseen.any()


def test_losses_are_measured_without_writing_and_the_drift_beside_them(claims, measured):
    official, deferred = (measured(claims.STABILITY.variants[name]) for name in ("official", "official, deferred"))
    assert official["loss"] != official["loss, written"]
    assert "loss, written" not in deferred
    assert {"slots in use", "slots a token", "nearest", "worth of edges", "gradient"} <= deferred.keys()


def test_edges_that_start_at_zero_are_worth_nothing_without_training(claims, measured, monkeypatch):
    monkeypatch.setattr(
        claims.GraphMemoryTransformer,
        "_draw_weights",
        lambda self: [torch.nn.init.zeros_(cell.edges) for cell in self.cells()],
    )
    assert measured(claims.gmt() | {"learning_rate": 1e-12})["worth of edges"] == pytest.approx(0, abs=1e-6)


def test_maintenance_and_temperatures_reach_the_cells(claims, measured, monkeypatch):
    temperatures, maintained = [], []
    monkeypatch.setattr(claims, "set_temperature", lambda model, value: temperatures.append(round(value, 4)))
    monkeypatch.setattr(claims, "maintain", lambda *_: maintained.append(True))
    monkeypatch.setattr(claims, "MAINTAIN_EVERY", 2)
    measured(claims.gmt(maintained=True))
    assert temperatures == [1.0, 0.2398, 0.1]
    assert maintained == [True]


def test_a_layer_is_timed_with_its_losses(claims):
    for settings in claims.SPEED.variants.values():
        assert claims.measure(claims.shorten(settings), 0)["tokens a second"] > 0
