"""TaskBoundary and ContinualEval; checks are numbered as in the spec."""

import math
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memzoo.lit_modules import (
    ClassIncrementalModule,
    ContinualEval,
    ElasticWeightConsolidation,
    Replay,
    TaskBoundary,
)
from memzoo.lit_modules.continual_callbacks import evaluating
from memzoo.lit_modules.continual_metrics import average_accuracy
from tests.lit_modules.continual_cases import CLASSES, Net, Seen, linear, module, pictures, stream, trainer


def fitted(lit: Any, data: Any, *callbacks: Any, **options: Any) -> Any:
    run = trainer(data, *callbacks, **options)
    run.fit(lit, data)
    return run


class Told(ClassIncrementalModule):
    """Notes what it is told, and at which step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.told: list[tuple[int, str, Any]] = []

    def on_task_start(self, task: int) -> None:
        self.told.append((self.trainer.global_step, "start", task))

    def on_task_end(self, task: int) -> None:
        self.told.append((self.trainer.global_step, "end", task))

    def on_classes_added(self, classes: list[int]) -> None:
        self.told.append((self.trainer.global_step, "classes", classes))


# TaskBoundary


def test_a_module_is_told_of_each_task_once_in_order():
    data, seen, lit = stream(), Seen(), Told(Net())
    fitted(lit, data, seen, TaskBoundary())
    first = [sum(batch[0] < 2 * task for batch in seen.batches) for task in range(4)]
    expected: list[tuple[int, str, Any]] = []
    for task in range(3):
        expected += [(first[task], "start", task), (first[task], "classes", data.task_classes[task])]
        expected += [(first[task + 1], "end", task)]
    assert lit.told == expected


def test_classes_are_added_once_where_all_tasks_have_them():
    data, lit = stream(scenario="domain"), Told(Net())
    fitted(lit, data, TaskBoundary())
    assert [value for _, name, value in lit.told if name == "classes"] == [data.class_order]


def test_a_model_is_told_what_it_has_methods_for():
    class Growing(Net):
        def on_classes_added(self, classes: list[int]) -> None:
            added.append(classes)

    added: list[list[int]] = []
    data = stream()
    fitted(module(Growing()), data, TaskBoundary())
    assert added == data.task_classes


@pytest.mark.parametrize(("reset", "steps"), [("keep", "all"), ("reinit", "task")])
def test_the_optimiser_keeps_or_forgets_what_it_has_gathered(reset, steps):
    data, seen = stream(), Seen()
    lit = module(optimizer="adam", learning_rate=0.01)
    run = fitted(lit, data, seen, TaskBoundary(reset))
    taken = {int(state["step"]) for state in run.optimizers[0].state.values()}
    expected = {"all": len(seen.batches), "task": sum(batch[0] >= 4 for batch in seen.batches)}
    assert taken == {expected[steps]}


def test_a_module_that_cannot_be_told_is_refused():
    class Other(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(
        ValueError, match="calls on_task_start, on_task_end, on_classes_added of the module, which Other lacks"
    ):
        trainer(stream(), TaskBoundary()).fit(Other(), stream())
    with pytest.raises(ValueError, match="optimizer_reset='new'"):
        TaskBoundary("new")


# The matrix


class Predictions(pl.Callback):
    """Stores what the model says to all test samples, before training and after each task."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def store(self, trainer: Any, lit: Any, row: int) -> None:
        mode = lit.training
        lit.eval()
        with torch.no_grad():
            batches = [next(iter(loader)) for loader in trainer.datamodule.test_dataloader()]
            self.rows[row] = [(lit(batch["inputs"]).argmax(1), batch["labels"]) for batch in batches]
        lit.train(mode)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.store(trainer, pl_module, -1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % 2:
            self.store(trainer, pl_module, trainer.current_epoch // 2)


def test_02_the_matrix_equals_brute_force_on_stored_predictions():
    data, stored, measured = stream(), Predictions(), ContinualEval()
    fitted(module(linear()), data, stored, measured)
    expected = torch.empty(4, 3, dtype=torch.float64)
    for row, tasks in stored.rows.items():
        for task, (said, labels) in enumerate(tasks):
            expected[row, task] = sum(int(a == b) for a, b in zip(said, labels, strict=True)) / len(labels)
    assert torch.equal(measured.matrix, expected)
    assert sorted(measured.rows) == [-1, 0, 1, 2]
    assert measured.trace == []


def test_sanity_checks_and_validations_never_enter_the_matrix():
    matrices = []
    for options in ({}, {"num_sanity_val_steps": 0, "limit_val_batches": 0}, {"num_sanity_val_steps": -1}):
        measured = ContinualEval(split="val", every_n_steps=1)
        fitted(module(linear()), stream(validation=0.3), measured, **options)
        assert measured._metric.total.tolist() == [[6] * 3] * 4  # each sample once a row
        matrices.append((measured.matrix.tolist(), str(measured.trace)))
    assert matrices[0] == matrices[1] == matrices[2]


def test_the_logger_has_each_row_by_task():
    logged: list[tuple[int, dict[str, float]]] = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step, dict(metrics)))

    data, measured, seen = stream(), ContinualEval(every_n_steps=3), Seen()
    fitted(module(linear()), data, measured, seen, logger=Logger())
    rows = [(step, metrics) for step, metrics in logged if "test/accuracy/task_0" in metrics]
    assert [step for step, _ in rows] == [sum(batch[0] < 2 * task for batch in seen.batches) for task in range(4)]
    for (_, metrics), row in zip(rows, [-1, 0, 1, 2], strict=True):
        assert [metrics[f"test/accuracy/task_{task}"] for task in range(3)] == measured.matrix[row].tolist()
    assert rows[-1][1]["test/average_accuracy"] == average_accuracy(measured.matrix)
    means = measured.matrix.mean(1).roll(1).tolist()  # of classes of one size
    assert [metrics["test/macro_accuracy"] for _, metrics in rows] == pytest.approx(means)
    assert "anytime/minimum_accuracy" in logged[-1][1]


# The trace


def test_the_trace_has_all_updates_that_were_asked_for_and_the_tasks_so_far():
    data, seen, measured = stream(), Seen(), ContinualEval(every_n_steps=3, samples=None)
    fitted(module(linear()), data, seen, measured)
    steps = len(seen.batches)
    ends = [sum(batch[0] < 2 * task for batch in seen.batches) for task in (1, 2, 3)]
    expected = [(0, -1)]
    for step in range(1, steps + 1):
        task = seen.batches[step - 1][0] // 2
        if step in ends or step % 3 == 0:
            expected.append((step, task))
    assert [(one.step, one.trained) for one in measured.trace] == expected
    for one in measured.trace:
        known = [not math.isnan(value) for value in one.accuracies]
        begins = one.step in (0, *ends[:-1])  # where the next task is looked at before its first update
        assert known == [task <= one.trained + begins for task in range(3)]
    assert measured.trace[-1].accuracies == tuple(measured.matrix[2].tolist())
    assert measured.trace[0].accuracies[0] == measured.matrix[-1, 0]


def test_the_trace_takes_the_first_samples_and_the_matrix_all():
    data, measured = stream(), ContinualEval(every_n_steps=1, samples=2)
    fitted(module(linear()), data, measured)
    values = [value for one in measured.trace for value in one.accuracies if not math.isnan(value)]
    assert {*values} <= {0.0, 0.5, 1.0}
    assert measured._metric.total.tolist() == [[6] * 3] * 4


@pytest.mark.parametrize("budget", [0, 1000, 10**6])
def test_the_device_keeps_no_more_of_the_trace_than_it_may(budget, monkeypatch):
    class Moved(dict[str, Tensor]):
        """A batch that is on the device."""

    kept: list[tuple[bool, int]] = []

    class Look(ContinualEval):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_end(trainer, pl_module)
            for batch in (one for batches in self._kept.values() for one in batches):
                kept.append((isinstance(batch, Moved), sum(value.nbytes for value in batch.values())))

    data, measured, plain = stream(), Look(every_n_steps=2, device_bytes=budget), ContinualEval(every_n_steps=2)
    fitted(module(linear()), data, plain)
    run = trainer(data, measured)
    monkeypatch.setattr(run.strategy, "batch_to_device", lambda batch, **_: Moved(batch))
    run.fit(module(linear()), data)
    assert sum(size for moved, size in kept if moved) <= budget
    assert sum(moved for moved, _ in kept) == {0: 0, 1000: 1, 10**6: 3}[budget]
    assert [size for _, size in kept] == [6 * (16 * 4 + 3 * 8)] * 3
    assert str(measured.trace) == str(plain.trace)
    assert measured._kept == {}  # the fit is over


def test_gathered_batches_are_one_update():
    measured = ContinualEval(every_n_steps=1)
    fitted(module(linear()), stream(num_tasks=1, batch_size=4), measured, accumulate_grad_batches=3)
    steps = [one.step for one in measured.trace]
    assert steps == sorted(set(steps))


# What it leaves alone


def test_05_evaluation_leaves_weights_buffers_random_numbers_and_modes_as_they_were():
    data, lit = stream(), module()
    run = trainer(data)
    lit.train()
    lit.model.drop.eval()
    before = {name: value.clone() for name, value in lit.state_dict().items()}
    modes = [part.training for part in lit.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with evaluating(run, lit):
        assert not any(part.training for part in lit.modules())
        assert torch.is_inference_mode_enabled()
        for batch in data.task_loader("test", 0):
            lit(batch["inputs"])
        torch.rand(3), random.random(), np.random.rand()
    assert all(torch.equal(before[name], value) for name, value in lit.state_dict().items())
    assert [part.training for part in lit.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_05_modes_come_back_after_an_error():
    lit = module()
    lit.train()
    with pytest.raises(RuntimeError), evaluating(trainer(stream()), lit):
        raise RuntimeError
    assert all(part.training for part in lit.modules())
    assert torch.is_grad_enabled()


def test_05_a_run_is_the_same_to_the_bit_with_evaluation_and_without():
    """With dropout, normalisation by batch and a counter of uses in the model."""
    outcomes = []
    for callbacks in ([], [ContinualEval(every_n_steps=1)], [ContinualEval(every_n_steps=2, samples=2)]):
        lit = module()
        torch.manual_seed(3)
        fitted(lit, stream(), *callbacks)
        outcomes.append((lit.state_dict(), torch.get_rng_state(), lit.online_accuracy))
    for state, rng, online in outcomes[1:]:
        assert all(torch.equal(outcomes[0][0][name], value) for name, value in state.items())
        assert torch.equal(outcomes[0][1], rng)
        assert online == outcomes[0][2]
    assert int(outcomes[0][0]["model.usage"]) == 2 * stream().size("train")


# Two views, oracles, labels


def test_09_told_the_task_a_model_is_never_worse():
    views = [ContinualEval(logits=logits, every_n_steps=1) for logits in ("all", "task")]
    fitted(module(linear()), stream(scenario="task"), *views)
    told, untold = views[1].matrix, views[0].matrix
    assert (told >= untold).all()
    assert (told > untold).any()
    for one, other in zip(views[1].trace, views[0].trace, strict=True):
        assert all(a >= b for a, b in zip(one.accuracies, other.accuracies, strict=True) if not math.isnan(a))


def test_11_joint_training_beats_the_stream_and_what_is_done_against_forgetting():
    def last(strategy: Any = None, **options: Any) -> float:
        measured = ContinualEval()
        fitted(module(linear(), strategy=strategy), stream(**pictures(common=2.0), **options), measured, TaskBoundary())
        return average_accuracy(measured.matrix)

    joint = last(num_tasks=1, epochs_per_task=20)
    strategies = (None, Replay(20), ElasticWeightConsolidation(1.0, samples=10))
    in_turn = [last(strategy, epochs_per_task=10) for strategy in strategies]
    assert joint >= max(in_turn)
    assert joint > in_turn[0] + 0.1


def test_12_another_numbering_of_the_classes_leaves_the_matrix_unchanged():
    names = torch.tensor([3, 0, 5, 1, 4, 2])  # of the classes 0 to 5
    matrices = []
    for permuted in (False, True):
        data = stream(class_order=list(range(CLASSES)), epochs_per_task=5)
        lit = module(linear())
        if permuted:
            labels = names[data.source.labels]
            data = stream(labels=labels, class_order=names.tolist(), epochs_per_task=5)
            head = lit.model[1]
            with torch.no_grad():
                head.weight.copy_(head.weight[names.argsort()])
                head.bias.copy_(head.bias[names.argsort()])
        measured = ContinualEval(every_n_steps=4)
        fitted(lit, data, measured)
        matrices.append((measured.matrix.tolist(), str(measured.trace)))
    assert matrices[0] == matrices[1]


# Refusals


def test_a_second_fit_begins_anew():
    measured, told = ContinualEval(every_n_steps=2), TaskBoundary()
    for _ in range(2):
        fitted(module(linear()), stream(), measured, told)
        assert sorted(measured.rows) == [-1, 0, 1, 2]
        assert measured._metric.total.tolist() == [[6] * 3] * 4
        steps = [one.step for one in measured.trace]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("options", "of_data", "message"),
    [
        ({"logits": "task"}, {}, r"logits='task' .* use ClassStreamData\(scenario='task'\)"),
        ({"split": "val"}, {"validation": 0.0}, "split='val' of the data is empty"),
    ],
)
def test_data_that_cannot_be_measured_so_are_refused(options, of_data, message):
    with pytest.raises(ValueError, match=message):
        fitted(module(linear()), stream(**of_data), ContinualEval(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "split='train'"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"samples": 0}, "samples=0"),
        ({"device_bytes": -1}, "device_bytes=-1 is negative"),
        ({"window": 1}, "window=1 holds a single evaluation"),
        ({"logits": "current"}, "logits='current'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContinualEval(**options)


def test_there_is_no_matrix_before_a_fit():
    with pytest.raises(ValueError, match="nothing was measured yet"):
        _ = ContinualEval().matrix
