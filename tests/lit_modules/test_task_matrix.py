"""TaskMatrix and AnytimeTracker; checks are numbered as in the spec."""

import doctest
import math

import pytest
import torch
from torch import Tensor

from memzoo.lit_modules import AnytimeTracker, TaskMatrix, task_matrix
from memzoo.lit_modules.continual_metrics import (
    average_anytime_accuracy,
    minimum_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

TASKS = 3


def answers(seed: int = 0, count: int = 90) -> list[tuple[Tensor, Tensor, int, Tensor]]:
    """Return scores, classes, the task trained, and the task of each sample, for all rows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(count, 4, generator=generator),
            torch.randint(4, (count,), generator=generator),
            trained,
            torch.randint(TASKS, (count,), generator=generator),
        )
        for trained in range(-1, TASKS)
    ]


def filled(*batches: tuple[Tensor, Tensor, int, Tensor]) -> TaskMatrix:
    metric = TaskMatrix(TASKS)
    for batch in batches:
        metric.update(*batch)
    return metric


def test_02_the_matrix_equals_brute_force_on_stored_predictions():
    stored = answers()
    matrix = filled(*stored).compute()
    assert matrix.shape == (TASKS + 1, TASKS)
    assert matrix.dtype == torch.float64
    for scores, target, trained, task in stored:
        for one in range(TASKS):
            hits = [int(s.argmax() == t) for s, t, k in zip(scores, target, task, strict=True) if k == one]
            assert matrix[trained, one] == sum(hits) / len(hits)


def test_03_two_halves_merged_equal_the_whole():
    stored = answers()
    halves = [
        filled(*((scores[rows], target[rows], trained, task[rows]) for scores, target, trained, task in stored))
        for rows in (slice(0, 31), slice(31, None))
    ]
    whole = filled(*stored)
    halves[0].merge_state(halves[1])
    assert torch.equal(halves[0].compute(), whole.compute())
    assert torch.equal(halves[0].total, whole.total)
    assert whole._reductions == dict.fromkeys(["correct", "total"], whole._reductions["total"])  # as devices reduce


def test_what_was_not_measured_is_nan_and_what_is_all_wrong_is_0():
    metric = TaskMatrix(2)
    metric.update(torch.tensor([1, 1]), torch.tensor([0, 0]), 0, 1)
    assert metric.compute().nan_to_num(nan=-1.0).tolist() == [[-1, 0], [-1, -1], [-1, -1]]


def test_the_last_row_is_row_minus_1():
    metric = filled((torch.tensor([2]), torch.tensor([2]), -1, torch.tensor([1])))
    assert metric.compute()[-1].nan_to_num(nan=-1.0).tolist() == [-1, 1, -1]


def test_reset_and_state_round_trip():
    metric = filled(*answers())
    metric.persistent(True)
    other = TaskMatrix(TASKS)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.compute(), metric.compute())
    metric.reset()
    assert metric.compute().isnan().all()


@pytest.mark.parametrize(
    ("trained", "task", "message"),
    [(3, 0, "trained_task=3 is not within"), (-2, 0, "trained_task=-2"), (0, 3, "eval_task=3 is not within")],
)
def test_a_task_that_is_none_is_refused(trained, task, message):
    with pytest.raises(ValueError, match=message):
        TaskMatrix(3).update(torch.tensor([0]), torch.tensor([0]), trained, task)


# On the way


def walk(length: int = 60, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Return a trace whose tasks are known from the time they are trained, with gaps, and the task of each place."""
    generator = torch.Generator().manual_seed(seed)
    trained = [-1, *(min(place * TASKS // length, TASKS - 1) for place in range(length))]
    trace = torch.rand(length + 1, TASKS, generator=generator, dtype=torch.float64)
    for place, task in enumerate(trained):
        trace[place, task + 2 :] = math.nan
    trace[5, 0] = trace[30, 0] = trace[31, 1] = math.nan
    return trace, trained


@pytest.mark.parametrize("window", [2, 5, 100])
def test_06_07_the_tracker_equals_the_functions_of_the_whole_trace_at_every_evaluation(window):
    trace, trained = walk()
    tracker = AnytimeTracker(TASKS, window)
    for place, row in enumerate(trace):
        tracker.update(row, trained[place])
        so_far, tasks = trace[: place + 1], trained[: place + 1]
        expected = {
            "minimum_accuracy": minimum_accuracy(so_far, tasks),
            "worst_case_accuracy": worst_case_accuracy(so_far, tasks),
            "windowed_forgetting": windowed_forgetting(so_far, window),
            "windowed_plasticity": windowed_plasticity(so_far, window),
            "average_anytime_accuracy": average_anytime_accuracy(so_far, tasks),
        }
        found = {name: float(value) for name, value in tracker.compute().items()}
        assert found == pytest.approx(expected, nan_ok=True), place


def test_the_state_of_the_tracker_does_not_grow():
    trace, trained = walk()
    tracker = AnytimeTracker(TASKS, 4)
    sizes = set()
    for row, task in zip(trace, trained, strict=True):
        tracker.update(row, task)
        sizes.add(sum(getattr(tracker, name).numel() for name in tracker._defaults))
    assert len(sizes) == 1


def test_devices_that_measured_the_same_reduce_to_it():
    trace, trained = walk()
    trackers = [AnytimeTracker(TASKS, 4) for _ in range(2)]
    for tracker in trackers:
        for row, task in zip(trace, trained, strict=True):
            tracker.update(row, task)
    expected = {name: float(value) for name, value in trackers[1].compute().items()}
    trackers[0]._reduce_states({name: getattr(trackers[1], name) for name in trackers[0]._defaults})
    assert {name: float(value) for name, value in trackers[0].compute().items()} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AnytimeTracker(2, 1), "window=1 holds a single evaluation"),
        (lambda: AnytimeTracker(0), "num_tasks=0"),
        (lambda: AnytimeTracker(2).update(torch.zeros(3), 0), r"accuracies have shape \(3,\); they must be \(2,\)"),
        (lambda: AnytimeTracker(2).update(torch.zeros(2), 2), r"trained_task=2 is not within \[-1, 2\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluations_go_forward():
    tracker = AnytimeTracker(2)
    tracker.update(torch.zeros(2), 1)
    with pytest.raises(ValueError, match="trained_task=0 is not within"):
        tracker.update(torch.zeros(2), 0)


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(task_matrix).failed == 0
