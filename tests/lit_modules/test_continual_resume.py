"""A run through a stream that was killed goes on as if it had not been (check 4 of the spec)."""

from typing import Any

import pytest
import torch

from memzoo.lit_modules import ContinualEval, ElasticWeightConsolidation, Replay, TaskBoundary
from tests.lit_modules.continual_cases import Coded, Learner, Seen, every_place, module, stream, trainer


def run(data: Any, lit: Any, *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> tuple[Any, Seen, Any]:
    """Fit, and return the weights, which batches were trained on, and what was measured."""
    seen, measured = Seen(), ContinualEval(every_n_steps=2, samples=3)
    told = TaskBoundary("reinit")
    torch.manual_seed(0 if ckpt_path is None else 99)  # what a new process has drawn before is no help
    trainer(data, seen, measured, told, *callbacks, **options).fit(lit, data, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in lit.state_dict().items()}, seen, measured


CASES: dict[str, Any] = {
    "plain": lambda: ({}, {}),
    "adam": lambda: ({"optimizer": "adam", "learning_rate": 0.01}, {}),
    "replay": lambda: ({"strategy": Replay(10, replayed=5)}, {}),
    "ewc": lambda: ({"strategy": ElasticWeightConsolidation(5.0, samples=4, labels="model")}, {}),
    "blurry": lambda: ({"train_logits": "seen", "eval_logits": "seen"}, {"blurry": 0.3}),
    "sizes": lambda: ({}, {"first_classes": 1, "num_tasks": 2}),
    "coded": lambda: ({"model": Coded(), "precompute": True}, {}),
    "learner": lambda: ({"model": Learner()}, {"epochs_per_task": 1}),
}


QUICK = ("replay", "sizes", "learner")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_04_a_run_killed_after_any_step_or_epoch_goes_on_to_the_same_weights(case, tmp_path):
    options, of_data = CASES[case]()
    data = stream(**of_data)
    weights, seen, measured = run(data, module(**options), *every_place(tmp_path))
    places = sorted(tmp_path.glob("*.ckpt"))
    assert len(places) == len(seen.batches) + data.num_tasks * data.epochs_per_task
    for place in places:
        options, of_data = CASES[case]()
        again, later, remeasured = run(stream(**of_data), module(seed=7, **options), ckpt_path=str(place))
        assert later.batches == seen.batches[len(seen.batches) - len(later.batches) :], place.name
        assert all(torch.equal(weights[name], again[name]) for name in weights), place.name
        assert torch.equal(remeasured.matrix.nan_to_num(), measured.matrix.nan_to_num()), place.name
        assert str(remeasured.trace) == str(measured.trace), place.name
        assert set(remeasured.rows) == set(measured.rows), place.name
