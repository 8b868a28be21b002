"""Classifiers with a bottleneck, and with an analytic head, in a stream."""

from typing import Any

import pytest
import torch
from torch import nn

from memzoo.arch.dkvb_classifier import DKVBClassifier
from memzoo.arch.frozen_classifier import FrozenClassifier
from memzoo.layers.analytic_classifier import AnalyticClassifier
from memzoo.lit_modules import ContinualEval, TaskBoundary
from memzoo.lit_modules.continual_metrics import average_accuracy
from tests.lit_modules.continual_cases import CLASSES, every_place, linear, module, pictures, stream, trainer


def bottleneck() -> DKVBClassifier:
    torch.manual_seed(0)
    return DKVBClassifier(nn.Flatten(), CLASSES, feature_dim=16, num_codebooks=16, num_pairs=16, dim_key=4)


def analytic() -> FrozenClassifier:
    return FrozenClassifier(nn.Flatten(), CLASSES, feature_dim=16, head="analytic", head_options={"hidden": 64})


OPTIONS: dict[str, Any] = {"learning_rate": 5.0, "key_options": {"epochs": 3}}


def run(lit: Any, *callbacks: Any, ckpt_path: str | None = None, **of_data: Any) -> ContinualEval:
    data, measured = stream(**pictures(common=2.0), **of_data), ContinualEval(every_n_steps=1)
    trainer(data, measured, TaskBoundary(), *callbacks).fit(lit, data, ckpt_path=ckpt_path)
    return measured


def test_the_bottleneck_keeps_what_a_linear_probe_forgets():
    probe = run(module(linear()), epochs_per_task=10)
    own = run(module(bottleneck(), precompute=True, **OPTIONS), epochs_per_task=10)
    assert average_accuracy(own.matrix) > average_accuracy(probe.matrix) + 0.1


def test_codes_computed_once_give_the_same_values_and_the_same_usage():
    lits = [module(bottleneck(), precompute=precompute, **OPTIONS) for precompute in (False, True)]
    matrices = [run(lit).matrix for lit in lits]
    assert torch.equal(*matrices)
    states = [lit.state_dict() for lit in lits]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    usage = lits[0].model.bottleneck.usage
    assert usage.sum() == 2 * stream().size("train") * 16  # of training alone: nothing that was measured counts


@pytest.mark.parametrize("case", ["bottleneck", "analytic"])
def test_04_they_go_on_from_any_place_to_the_same_state(case, tmp_path):
    def fresh(seed: int) -> Any:
        if case == "bottleneck":
            return module(bottleneck(), seed=seed, precompute=True, **OPTIONS)
        return module(analytic(), seed=seed, eval_logits="seen")

    lit = fresh(0)
    measured = run(lit, *every_place(tmp_path), epochs_per_task=1)
    state = lit.state_dict()
    places = sorted(tmp_path.glob("*.ckpt"))
    assert len(places) == 9
    for place in places:
        other = fresh(1)
        again = run(other, ckpt_path=str(place), epochs_per_task=1)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items()), place.name
        assert torch.equal(again.matrix, measured.matrix), place.name


def test_the_analytic_classifier_equals_one_that_has_seen_all_at_once():
    lit = module(analytic(), eval_logits="seen")
    run(lit, epochs_per_task=1)
    data = stream(**pictures(common=2.0), epochs_per_task=1)
    joint = AnalyticClassifier(16, hidden=64)
    joint.learn(torch.cat(list(data.unlabelled())).flatten(1), data._rows["train"].samples.label)
    torch.testing.assert_close(lit.model.head.weight, joint.weight, rtol=1e-6, atol=1e-6)
