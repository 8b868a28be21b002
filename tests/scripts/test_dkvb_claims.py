"""What the claims of the bottleneck measure."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.dkvb")
    sys.path.remove(str(SCRIPTS))


def test_the_claims_are_asked_of_five_seeds(claims):
    assert claims.CLAIMS.seeds == 5


def test_every_check_names_variants_of_its_claim_and_a_metric_that_is_shown(claims):
    for claim in claims.CLAIMS.claims.values():
        results = {name: dict.fromkeys(claim.columns, 0.5) for name in claim.variants}
        assert all(isinstance(check.margin(results), float) for check in claim.checks)


def test_the_thresholds_are_those_of_the_miniature(claims):
    shown = {check.statement for check in claims.STREAM.checks}
    assert "DKVB, PCA-32 reaches 0.93 (accuracy)" in shown
    assert "linear probe, pixels stays within 0.3 (accuracy)" in shown
    assert "DKVB, PCA-32 is ahead of linear probe, pixels by 0.5" in shown
    assert "DKVB, PCA-32 is within 0.03 of DKVB, PCA-32, all at once, or above" in shown


def test_the_digits_are_the_same_for_all_variants_of_a_seed(claims):
    one, other = (claims.digits(settings, 3) for settings in (claims.dkvb(), claims.probe("mlp", "pixels")))
    assert one.class_order == other.class_order
    images = next(iter(one.unlabelled()))
    assert torch.equal(images, next(iter(other.unlabelled())))
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert (one.size("train"), one.size("test")) == (1347, 450)
    assert claims.digits(claims.dkvb(), 4).class_order != one.class_order


@pytest.mark.parametrize("name", ["stream", "keys", "gap"])
def test_a_run_of_every_kind_measures_what_is_shown(claims, name):
    claim = claims.CLAIMS.claims[name]
    kinds = {}
    for settings in claim.variants.values():
        kinds.setdefault((settings["model"], str(settings["strategy"]), settings["key_classes"]), settings)
    for (model, _, _), settings in kinds.items():
        found = claims.measure(claims.shorten(settings), 0)
        assert set(found) >= set(claim.columns) - ({"used"} if model != "dkvb" else set())
        assert all(0 <= value <= 1 for value in found.values())


def test_keys_of_some_classes_are_from_these_alone(claims):
    settings = claims.dkvb(key_classes=2, keys={"method": "sample"})
    data, model = claims.digits(settings, 0), claims.classifier(settings)
    claims.give_keys(model, data, settings)
    seen = list(data.task_loader("train", 0))
    z = model.encoder(torch.cat([batch["inputs"] for batch in seen]))
    assert set(torch.cat([batch["labels"] for batch in seen]).tolist()) == set(data.class_order[:2])
    heads = torch.einsum("bd,cdk->bck", z, model.bottleneck.projection)
    apart = torch.cdist(model.bottleneck.keys[:3], heads[:, :3].transpose(0, 1)).amin(-1)
    assert apart.max() < 1e-2
