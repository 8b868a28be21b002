"""What ClassIncrementalModule counts of its answers: online, in validation and test, and on several devices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memzoo.arch import DKVBClassifier, FrozenClassifier
from memzoo.lit_modules import ContinualEval
from memzoo.lit_modules.class_incremental_parts import best_class
from tests.lit_modules.continual_cases import CLASSES, Seen, linear, module, pictures, stream, trainer
from tests.lit_modules.processes import run_two

NAN = math.nan


def fitted(lit: Any, data: Any, *callbacks: Any, **options: Any) -> Any:
    run = trainer(data, *callbacks, **options)
    run.fit(lit, data)
    return run


# One answer


def test_the_best_class_is_of_those_that_are_allowed():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert best_class(logits).tolist() == [1, 0]
    assert best_class(logits, torch.tensor([True, False, True])).tolist() == [2, 0]
    assert best_class(logits, torch.tensor([[False, False, True], [False, True, False]])).tolist() == [2, 1]
    assert best_class(logits[:, :0]).tolist() == [-1, -1]


def test_scores_that_are_none_name_no_class():
    logits = torch.tensor([[0.0, NAN, 1.0], [NAN] * 3, [-math.inf] * 3, [0.0, 1.0, 0.0]])
    allowed = torch.tensor([True, False, True])
    assert best_class(logits).tolist() == [-1, -1, -1, 1]
    assert best_class(logits, allowed).tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize("policy", ["all", "seen", "task"])
def test_a_model_that_says_nan_is_right_of_nothing(policy):
    lit, measured = module(linear(), eval_logits=policy), ContinualEval()
    with torch.no_grad():
        lit.model[1].weight.fill_(NAN)
    run = fitted(lit, stream(scenario="task"), measured)
    assert not measured.matrix.any()
    assert lit.online_accuracy == 0
    assert run.callback_metrics["val/accuracy"] == 0


# Online


def test_a_head_that_learns_need_not_answer_first():
    """A Gram matrix is solved for every answer, so that answering at each step costs as much as a run."""
    solved = {}
    for asked in (True, False):
        head = {"hidden": 32, "form": "gram"}
        model = FrozenClassifier(nn.Flatten(), CLASSES, feature_dim=16, head="analytic", head_options=head)
        lit, steps = module(model, online_accuracy=asked), []
        inner = model.head._solve
        model.head._solve = lambda: (steps.append(1), inner())  # noqa: B023
        run = fitted(lit, stream(epochs_per_task=1, validation=0.0))
        solved[asked] = len(steps)
        assert lit.seen == list(range(CLASSES))
        assert math.isnan(lit.online_accuracy) is not asked
        assert ("train/online_accuracy" in run.callback_metrics) is asked
        total = run.global_step
    assert solved == {True: total - 1, False: 0}


def test_a_model_of_gradients_trains_the_same_without_the_online_accuracy():
    lits = [module(online_accuracy=asked) for asked in (True, False)]
    for lit in lits:
        torch.manual_seed(0)
        fitted(lit, stream())
    assert all(torch.equal(a, b) for a, b in zip(*(lit.parameters() for lit in lits), strict=True))
    assert math.isnan(lits[1].online_accuracy)
    assert lits[1].seen == list(range(CLASSES))


# Means


def test_the_mean_over_classes_is_logged():
    """Of classes of different sizes it is another than the mean over samples or tasks."""

    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores + 9 * nn.functional.one_hot(x.flatten(1)[:, 0].long(), CLASSES)

    labels = torch.cat([torch.zeros(48), torch.arange(1, CLASSES).repeat(8)]).long()
    said = torch.where(torch.arange(len(labels)) % 2 == 0, labels, 0)  # class 0 is always right
    images = torch.randn(len(labels), 1, 4, 4)
    images[:, 0, 0, 0] = said
    data = stream(images=images, labels=labels, class_order=[0, 1, 2, 3, 4, 5])
    lit = module(Says(), learning_rate=1e-9)
    run = fitted(lit, data)
    for split in ("val", "test"):
        if split == "test":
            run.test(lit, data, verbose=False)
        rows = data._rows[split].samples
        right = labels[rows.image] == said[rows.image]
        shares = [right[rows.label == one].double().mean().item() for one in range(CLASSES)]
        tasks = [right[rows.task == one].double().mean().item() for one in range(3)]
        assert float(run.callback_metrics[f"{split}/macro_accuracy"]) == pytest.approx(sum(shares) / CLASSES)
        assert float(run.callback_metrics[f"{split}/accuracy"]) == pytest.approx(sum(tasks) / 3)
    assert sum(shares) / CLASSES != pytest.approx(sum(tasks) / 3)


def test_the_share_of_pairs_that_were_never_fetched_is_logged():
    torch.manual_seed(0)
    model = DKVBClassifier(nn.Flatten(), CLASSES, feature_dim=16, num_codebooks=4, num_pairs=32, dim_key=4)
    logged: list[float] = []

    class Log(Seen):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            logged.append(pl_module.model.bottleneck.fraction_unused)

    run = fitted(module(model), stream(), Log())
    assert float(run.callback_metrics["train/fraction_unused"]) == pytest.approx(logged[-1])
    assert 0 <= logged[-1] < logged[0]
    assert "train/fraction_unused" not in fitted(module(), stream()).callback_metrics


# Two devices


def odd() -> Any:
    """Return a stream with tasks of odd sizes, of which samplers repeat some for two devices."""
    return stream(**pictures(noise=1.5), num_tasks=2, epochs_per_task=1, validation=0.0, batch_size=1)


def two_devices(folder: str) -> None:
    """Fit and test in each of two processes, and write what each has found."""
    noted: list[tuple[list[int], list[int]]] = []

    class Noted(Seen):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            noted.append((pl_module.seen, pl_module._online))

    data, lit, seen = odd(), module(linear(), eval_logits="seen"), Noted()
    run = trainer(data, seen, devices=2, strategy="ddp")
    run.fit(lit, data)
    run.test(lit, data, verbose=False)
    tested = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("test/")}
    found = {"noted": noted, "tested": tested, "labels": [labels for _, labels, _ in seen.batches]}
    Path(folder, f"{run.global_rank}.json").write_text(json.dumps(found))
    if run.is_global_zero:
        torch.save(lit.state_dict(), Path(folder, "weights.pt"))


@pytest.mark.slow
def test_two_devices_count_what_one_does(tmp_path):
    run_two(two_devices, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    labels = [first.pop("labels"), second.pop("labels")]
    assert labels[0] != labels[1]
    assert first == second
    so_far: set[int] = set()
    for step, (seen, (_, asked)) in enumerate(first["noted"]):
        so_far |= {*labels[0][step], *labels[1][step]}
        assert seen == sorted(so_far)
        assert asked == 2 * (step + 1)
    data, lit = odd(), module(linear(), eval_logits="seen")
    assert all(data.task_size(task, "test") % 2 for task in range(2))
    lit.load_state_dict(torch.load(tmp_path / "weights.pt"))
    lit.seen = [*range(CLASSES)]
    alone = trainer(data)
    alone.test(lit, data, verbose=False)
    assert {name: float(value) for name, value in alone.callback_metrics.items()} == pytest.approx(first["tested"])
    assert 0.1 < first["tested"]["test/accuracy"] < 1
