"""The coordinate check of maximal update parametrisation: updates of order one whatever the size."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from memzoo.arch import CausalLM, create_model
from memzoo.arch.sambay import SambaY
from memzoo.lit_modules import MuPlusPlus, coordinate_check
from tests.lit_modules.mup_cases import RATE, TINY, transformer

# The coordinate check


def transformers(size: int, tied: bool) -> CausalLM:
    return transformer(32 * size, 2 * size, tie_embeddings=tied)


def sambays(size: int, tied: bool) -> CausalLM:
    heads = dict(num_heads=2 * size, num_kv_heads=size, head_dim=16, window=8)
    return SambaY(64, 8 * size, aspect_ratio=2, tie_embeddings=tied, **heads)


def growth(build, mup: MuPlusPlus | None) -> dict[str, float]:
    """Each coordinate after four steps: how many times as large it is after two doublings."""
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    first, _, last = (
        row for row in coordinate_check(build, (1, 2, 4), tokens, learning_rate=RATE, mup=mup) if row.step == 4
    )
    names = ("features", "features_update", "logits", "logits_update")
    return {name: getattr(last, name) / getattr(first, name) for name in names}


@pytest.mark.parametrize(
    ("build", "base", "tied"),
    [
        (transformers, MuPlusPlus(32, 2), True),
        (transformers, MuPlusPlus(32, 2), False),
        (sambays, MuPlusPlus(16, 8), True),
        pytest.param(sambays, MuPlusPlus(16, 8), False, marks=pytest.mark.slow),
    ],
)
def test_15_width_and_depth_leave_updates_and_residual_outputs_of_order_one(build, base, tied):
    """The rates of embedding and head fall with sqrt(l0 / l), and the logits' updates with them: by 2 at 4 l0."""
    found = growth(partial(build, tied=tied), base)
    assert 0.67 < found["features"] < 1.5
    assert 0.67 < found["features_update"] < 1.5
    assert 0.67 < 2 * found["logits_update"] < 1.5
    standard = growth(partial(build, tied=tied), None)
    assert standard["features"] > 20
    assert standard["features_update"] > 20
    assert standard["logits_update"] > 2


@pytest.mark.parametrize("tied", [True, False])
def test_15_width_alone_changes_nothing(tied):
    found = growth(lambda size: transformer(32 * size, tie_embeddings=tied), MuPlusPlus(32, 2))
    for name in ("features", "features_update", "logits_update"):
        assert 0.67 < found[name] < 1.5, name


@pytest.mark.parametrize("wrong", ["base_dim", "base_depth"])
def test_the_check_notices_a_rule_that_does_not_follow_the_size(wrong, monkeypatch):
    monkeypatch.setattr(MuPlusPlus, "groups", without(wrong))

    def build(size: int) -> CausalLM:
        return transformer(32 * size) if wrong == "base_dim" else transformer(32, 2 * size)

    assert growth(build, MuPlusPlus(32, 2))["features_update"] > 1.5


def without(wrong: str):
    """Return groups that take the model for one of the base's width, or depth."""
    groups = MuPlusPlus.groups

    def changed(self, model, *args):
        same = {"base_dim": model.dim, "base_depth": len(model.blocks)}[wrong]
        return groups(replace(self, **{wrong: same}), model, *args)

    return changed


@pytest.mark.parametrize("name", TINY)
def test_the_check_runs_on_every_backbone_and_its_first_row_has_moved_nowhere(name):
    def build(size: int) -> CausalLM:
        return create_model(name, vocab_size=16)

    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = coordinate_check(build, (7,), tokens, learning_rate=RATE, mup=MuPlusPlus(64, 2), steps=1)
    assert [(row.size, row.step) for row in rows] == [(7, 0), (7, 1)]
    assert (rows[0].features_update, rows[0].logits_update) == (0, 0)
    assert rows[0].features > 0 < rows[1].features_update
    assert rows[1].logits_update > 0
