"""Scalars of accuracy matrices and traces; checks are numbered as in the spec."""

import doctest
import math

import numpy as np
import pytest
import torch

from memzoo.lit_modules import continual_metrics
from memzoo.lit_modules.continual_metrics import (
    average_accuracy,
    average_anytime_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    lower_triangle_accuracy,
    minimum_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

NAN = math.nan
A = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
B = [[0.6, 0.0, 0.0], [0.8, 0.7, 0.0], [0.7, 0.9, 0.5]]


def about(value: float) -> object:
    return pytest.approx(value, abs=1e-5)


# The matrix


def test_01_the_first_worked_matrix():
    assert average_accuracy(A) == about(0.7)
    assert average_incremental_accuracy(A) == about(0.76667)
    assert learning_accuracy(A) == about(0.86667)
    assert backward_transfer(A) == about(-0.25)
    assert backward_transfer(A, mode="all_pairs") == about(-0.26667)
    assert forgetting(A) == about(0.25)
    assert forward_transfer(A, [0.1] * 3) == about(0.05)
    assert lower_triangle_accuracy(A) == about(0.73333)


def test_01_the_second_worked_matrix_has_three_values_of_forgetting_and_two_signs():
    assert forgetting(B, mode="chaudhry") == about(-0.05)
    assert forgetting(B, mode="first_minus_last") == about(-0.15)
    assert forgetting(B, mode="clipped") == about(0.05)
    assert backward_transfer(B) == about(0.15)


def test_01_the_worked_trace():
    trace, trained = [[0.9, NAN], [0.3, 0.2], [0.6, 0.5], [0.8, 0.7]], [0, 1, 1, 1]
    assert minimum_accuracy(trace, trained) == about(0.3)
    assert worst_case_accuracy(trace, trained) == about(0.5)
    assert windowed_forgetting([[0.9], [0.3], [0.6], [0.8]], 2) == about(0.6)


def test_forgetting_is_never_negative_if_clipped_and_minus_backward_transfer_from_first_to_last():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        matrix = torch.rand(5, 5, generator=generator, dtype=torch.float64)
        assert forgetting(matrix, mode="clipped") >= max(forgetting(matrix), 0)
        assert forgetting(matrix, mode="first_minus_last") == pytest.approx(-backward_transfer(matrix))


def test_sizes_weigh_tasks_by_their_samples():
    assert average_accuracy(A, sizes=[1, 1, 2]) == about((0.5 + 0.7 + 1.8) / 4)
    assert average_accuracy(A, after=1, sizes=[3, 1, 100]) == about((1.8 + 0.8) / 4)
    micro = average_incremental_accuracy(A, sizes=[3, 1, 4])
    assert micro == about((0.9 + 0.65 + (1.5 + 0.7 + 3.6) / 8) / 3)


def test_intransigence_is_what_joint_training_reaches_more():
    assert intransigence(A, [0.9, 0.9, 0.95], task=1) == about(0.1)
    assert intransigence(A, [0.9, 0.9, 0.95]) == about(0.05)
    with pytest.raises(ValueError, match=r"joint has shape \(2,\); it must be \(3,\)"):
        intransigence(A, [0.9, 0.9])


def test_08_tasks_that_were_not_trained_yet_are_not_averaged_in():
    lower = torch.tensor(A).tril() + torch.full((3, 3), NAN).triu(1)
    scalars = (
        average_accuracy,
        average_incremental_accuracy,
        lower_triangle_accuracy,
        learning_accuracy,
        backward_transfer,
        lambda m: backward_transfer(m, mode="all_pairs"),
        forgetting,
        lambda m: forgetting(m, mode="clipped"),
        lambda m: forgetting(m, mode="first_minus_last"),
    )
    for scalar in scalars:
        assert scalar(lower) == scalar(torch.tensor(A))
    assert math.isnan(forward_transfer(lower, [0.1] * 3))
    assert average_accuracy([[0.9, NAN, NAN], [NAN] * 3, [NAN] * 3], after=0) == about(0.9)


def test_08_what_is_needed_and_missing_makes_a_scalar_nan_and_never_0():
    lacking = torch.tensor(A)
    lacking[2, 0] = NAN
    for scalar in (average_accuracy, backward_transfer, forgetting, lower_triangle_accuracy):
        assert math.isnan(scalar(lacking))
    assert learning_accuracy(lacking) == about(0.86667)


def test_one_task_has_neither_transfer_nor_forgetting():
    assert average_accuracy([[0.5]]) == average_incremental_accuracy([[0.5]]) == learning_accuracy([[0.5]]) == 0.5
    for scalar in (backward_transfer, forgetting, forward_transfer):
        assert math.isnan(scalar([[0.5]]))


def test_the_additional_row_is_the_accuracy_before_training_and_changes_nothing_else():
    with_row = [*A, [0.1, 0.1, 0.1]]
    assert forward_transfer(with_row) == about(0.05)
    assert math.isnan(forward_transfer(A))
    assert forgetting(with_row) == forgetting(A)
    assert average_accuracy(with_row) == average_accuracy(A)


# The trace


def test_06_the_present_task_and_evaluations_before_a_task_ended_are_not_in_the_minimum():
    trace = [[0.0, NAN], [0.9, 0.0], [0.7, 0.1], [0.8, 0.6]]
    assert minimum_accuracy(trace, [0, 0, 1, 1]) == about(0.7)
    assert minimum_accuracy(trace[:3], [0, 0, 1]) == about(0.7)
    assert math.isnan(minimum_accuracy(trace[:2], [0, 0]))
    assert worst_case_accuracy(trace[:2], [0, 0]) == about(0.9)
    assert math.isnan(worst_case_accuracy([[0.3, NAN]], [-1]))


def test_06_each_task_has_the_minimum_since_it_was_left():
    trace = [[0.9, NAN, NAN], [0.5, 0.1, NAN], [0.6, 0.8, NAN], [0.4, 0.3, 0.2], [0.7, 0.7, 0.9]]
    trained = [0, 1, 1, 2, 2]
    assert minimum_accuracy(trace, trained) == about((0.4 + 0.3) / 2)
    assert worst_case_accuracy(trace, trained) == about(0.9 / 3 + 2 / 3 * 0.35)


def brute(values: list[float], window: int, sign: int) -> float:
    pairs = [(m, n) for n in range(len(values)) for m in range(n) if n - m < window]
    return max([0.0, *(sign * (values[n] - values[m]) for m, n in pairs)])


@pytest.mark.parametrize("window", [2, 3, 7, 100])
def test_07_windowed_changes_equal_all_pairs(window):
    trace = np.random.default_rng(window).random((40, 3))
    trace[np.random.default_rng(0).random(trace.shape) < 0.2] = NAN
    columns = [[value for value in column if value == value] for column in trace.T.tolist()]
    rows = trace.tolist()
    assert windowed_forgetting(rows, window) == pytest.approx(np.mean([brute(c, window, -1) for c in columns]))
    assert windowed_plasticity(rows, window) == pytest.approx(np.mean([brute(c, window, 1) for c in columns]))


def test_07_plasticity_sees_what_lies_below_the_running_maximum():
    assert windowed_plasticity([[0.9], [0.1], [0.8]], 3) == about(0.7)
    assert windowed_plasticity([[0.9], [0.5], [0.1]], 3) == 0
    assert windowed_forgetting([[0.1], [0.5], [0.9]], 3) == 0


def test_a_task_that_was_never_measured_is_no_part_of_windowed_changes():
    assert windowed_forgetting([[0.9, NAN], [0.3, NAN]], 2) == about(0.6)
    assert math.isnan(windowed_forgetting([[NAN], [NAN]], 2))


def test_average_anytime_accuracy_is_of_the_tasks_trained_by_then():
    trace = [[0.1, 0.1], [0.8, 0.0], [0.4, 0.6]]
    assert average_anytime_accuracy(trace, [-1, 0, 1]) == about((0.8 + 0.5) / 2)
    assert math.isnan(average_anytime_accuracy([[0.1, NAN]], [-1]))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forgetting(A, mode="max"), "mode='max'"),
        (lambda: backward_transfer(A, mode="mean"), "mode='mean'"),
        (lambda: average_accuracy([[0.1, 0.2]]), r"matrix has shape \(1, 2\); it must be \(tasks, tasks\)"),
        (lambda: average_accuracy(A, after=3), "after=3 is no task of 3; use 0 to 2"),
        (lambda: average_accuracy(A, sizes=[1, 2]), r"sizes has shape \(2,\); it must be \(3,\)"),
        (lambda: intransigence(A, [1, 1, 1], task=-1), "task=-1 is no task of 3"),
        (lambda: windowed_forgetting([[0.1]], 1), "window=1 holds a single evaluation"),
        (lambda: windowed_plasticity([0.1], 2), r"trace has shape \(1,\)"),
        (lambda: minimum_accuracy([[0.1, 0.2]], [2]), r"trained=\[2\] does not fit 1 evaluations of 2 tasks"),
        (lambda: minimum_accuracy([[0.1, 0.2]] * 2, [1, 0]), "goes back to an earlier task"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(continual_metrics).failed == 0
    assert doctest.testmod(continual_metrics).attempted >= 15
