"""What a stream of tasks leaves a model with: scalars of the accuracy matrix, and of a trace of accuracies on the way.

Pure functions. The matrix ``R[i, j]`` is the accuracy on task ``j`` right after task ``i`` was trained, (tasks, tasks),
from 0 to 1, NaN where it was not measured. It may have one row more: the last, ``R[-1]``, is then the accuracy before
any training, as ``TaskMatrix`` gives it. What a scalar needs and was not measured makes it NaN, and what it does not
need (tasks that were not trained yet, in most) may be NaN and never enters it. A scalar over fewer than two tasks that
is defined from two on is NaN.

Libraries mean different things by one name (see ``forgetting``): say which ``mode`` a number was computed with.
"""

from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from memzoo.layers.errors import check_choice, check_positive

BackwardTransferMode = Literal["gem", "all_pairs"]
ForgettingMode = Literal["chaudhry", "clipped", "first_minus_last"]
Matrix = Tensor | Sequence[Sequence[float]]
Vector = Tensor | Sequence[float]

# Of the matrix: after the last task, or on average over the tasks


def average_accuracy(matrix: Matrix, *, after: int | None = None, sizes: Vector | None = None) -> float:
    """Return ``ACC_k = mean_{j <= k} R[k, j]``: the accuracy on all tasks so far, right after task ``k``.

    Args:
        matrix: The accuracy matrix.
        after: Task ``k``; the last by default.
        sizes: (tasks,) test samples of each task, for the accuracy of a sample (micro) and not that of a task (macro).

    Raises:
        ValueError: There is no such task, or an argument has another shape.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(average_accuracy(R), 5)
        0.7
    """
    rows, _ = split_matrix(matrix)
    last = len(rows) - 1 if after is None else after
    if not 0 <= last < len(rows):
        raise ValueError(f"after={after} is no task of {len(rows)}; use 0 to {len(rows) - 1}, or None for the last")
    return float((rows[last, : last + 1] * _weights(sizes, len(rows))[: last + 1]).sum() / _total(sizes, last + 1))


def average_incremental_accuracy(matrix: Matrix, *, sizes: Vector | None = None) -> float:
    """Return ``AIA = mean_k ACC_k``, see ``average_accuracy``; some papers call it "average accuracy".

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(average_incremental_accuracy(R), 5)
        0.76667
    """
    tasks = len(split_matrix(matrix)[0])
    return sum(average_accuracy(matrix, after=task, sizes=sizes) for task in range(tasks)) / tasks


def lower_triangle_accuracy(matrix: Matrix) -> float:
    """Return the mean of ``R[i, j]`` over all ``j <= i``.

    Reference:
        Díaz-Rodríguez et al., arXiv 1810.13166.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(lower_triangle_accuracy(R), 5)
        0.73333
    """
    rows, _ = split_matrix(matrix)
    return float(rows[_pairs(len(rows), 0)].mean())


def learning_accuracy(matrix: Matrix) -> float:
    """Return ``LA = mean_j R[j, j]``: how well each task was learned when it was its turn.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(learning_accuracy(R), 5)
        0.86667
    """
    return float(split_matrix(matrix)[0].diagonal().mean())


def intransigence(matrix: Matrix, joint: Vector, *, task: int | None = None) -> float:
    """Return ``I_k = R*_k - R[k, k]``: what a task could have reached, less what it did when it was its turn.

    Args:
        matrix: The accuracy matrix.
        joint: (tasks,) ``R*``, the accuracies of a model that was trained on tasks 0 to ``k`` together.
        task: ``k``; the mean over all tasks by default.

    Raises:
        ValueError: There is no such task, or an argument has another shape.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(intransigence(R, [0.9, 0.9, 0.95]), 5)
        0.05
    """
    rows, _ = split_matrix(matrix)
    gaps = _vector("joint", joint, len(rows)) - rows.diagonal()
    if task is None:
        return float(gaps.mean())
    if not 0 <= task < len(rows):
        raise ValueError(f"task={task} is no task of {len(rows)}; use 0 to {len(rows) - 1}, or None for the mean")
    return float(gaps[task])


# Of the matrix: what tasks do to one another


def backward_transfer(matrix: Matrix, *, mode: BackwardTransferMode = "gem") -> float:
    """Return what training on later tasks has added to the accuracy on earlier ones; mostly negative.

    Args:
        matrix: The accuracy matrix.
        mode: "gem" is ``1 / (T - 1) * sum_{j < T - 1} (R[T - 1, j] - R[j, j])``, after the last task; "all_pairs" the
            mean of ``R[i, j] - R[j, j]`` over all ``j < i``.

    Raises:
        ValueError: There is no such mode.

    Reference:
        "gem": Lopez-Paz and Ranzato, arXiv 1706.08840. "all_pairs": Díaz-Rodríguez et al., arXiv 1810.13166.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(backward_transfer(R), 5), round(backward_transfer(R, mode="all_pairs"), 5)
        (-0.25, -0.26667)
    """
    check_choice("mode", mode, get_args(BackwardTransferMode))
    rows, _ = split_matrix(matrix)
    gains = rows - rows.diagonal()
    return float((gains[-1, :-1] if mode == "gem" else gains[_pairs(len(rows), -1)]).mean())


def forward_transfer(matrix: Matrix, before: Vector | None = None) -> float:
    """Return ``FWT = 1 / (T - 1) * sum_{j >= 1} (R[j - 1, j] - b_j)``: what earlier tasks do for one not trained yet.

    Args:
        matrix: The accuracy matrix, with the tasks that were not trained yet.
        before: (tasks,) ``b``, the accuracies before any training; by default the additional row of the matrix, and
            NaN without one.

    Raises:
        ValueError: An argument has another shape.

    Reference:
        Lopez-Paz and Ranzato, arXiv 1706.08840.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(forward_transfer(R, [0.1, 0.1, 0.1]), 5)
        0.05
    """
    rows, own = split_matrix(matrix)
    start = own if before is None else _vector("before", before, len(rows))
    return float((rows.diagonal(1) - start[1:]).mean())


def forgetting(matrix: Matrix, *, mode: ForgettingMode = "chaudhry") -> float:
    """Return how much of what was once known of the earlier tasks is lost after the last.

    Args:
        matrix: The accuracy matrix.
        mode: "chaudhry" is ``1 / (T - 1) * sum_{j < T - 1} (max_{j <= l <= T - 2} R[l, j] - R[T - 1, j])``, from -1
            to 1; "clipped" has ``l = T - 1`` in the maximum as well, and so is never negative; "first_minus_last" has
            ``R[j, j]`` for the maximum: the backward transfer of "gem" with the other sign.

    Raises:
        ValueError: There is no such mode.

    Note:
        Of the libraries, continuum has "chaudhry", Mammoth and PILOT have "clipped" with zeros for what was not
        measured, and Avalanche has "first_minus_last".

    Reference:
        Chaudhry et al., arXiv 1801.10112.

    Example:
        >>> R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
        >>> round(forgetting(R), 5)
        0.25
        >>> R = [[0.6, 0.0, 0.0], [0.8, 0.7, 0.0], [0.7, 0.9, 0.5]]
        >>> [round(forgetting(R, mode=mode), 5) for mode in ("chaudhry", "first_minus_last", "clipped")]
        [-0.05, -0.15, 0.05]
    """
    check_choice("mode", mode, get_args(ForgettingMode))
    rows, _ = split_matrix(matrix)
    last = len(rows) - 1
    stop = {"chaudhry": [last] * last, "clipped": [last + 1] * last, "first_minus_last": range(1, last + 1)}[mode]
    best = [rows[task:end, task].amax() for task, end in enumerate(stop)]
    return float((torch.stack(best) - rows[-1, :-1]).mean()) if best else float("nan")


# Of a trace (De Lange et al., arXiv 2205.13452): accuracies (evaluations, tasks) in the order in which they were
# measured, NaN where they were not, and for each evaluation which task the update before it was of, -1 before any.


def minimum_accuracy(trace: Matrix, trained: Sequence[int]) -> float:
    """Return ``minACC = 1 / (k - 1) * sum_{j < k} min_{n > t_j} A(E_j, f_n)``, tasks from 1, ``k`` the present one.

    The minimum of a task counts only after it was left: over evaluations behind an update of a later task. NaN while
    the first task is trained, or where a task was not measured since.

    Args:
        trace: (evaluations, tasks) accuracies; it is cut after any evaluation for the value there.
        trained: (evaluations,) the task, from 0, whose update an evaluation came after.

    Raises:
        ValueError: An argument has another shape, or tasks do not ascend.

    Reference:
        De Lange et al., arXiv 2205.13452.

    Example:
        >>> trace = [[0.9, float("nan")], [0.3, 0.2], [0.6, 0.5], [0.8, 0.7]]
        >>> round(minimum_accuracy(trace, [0, 1, 1, 1]), 5)
        0.3
    """
    values, tasks = _trace(trace, trained)
    present = int(tasks[-1])
    if present < 1:
        return float("nan")
    minima = [_least(values[tasks > task, task]) for task in range(present)]
    return float(torch.stack(minima).mean())


def worst_case_accuracy(trace: Matrix, trained: Sequence[int]) -> float:
    """Return ``WC-ACC = 1 / k * A(E_k, f) + (1 - 1 / k) * minACC``: of the present task now, of the others at worst.

    Args:
        trace: As for ``minimum_accuracy``.
        trained: As there.

    Example:
        >>> trace = [[0.9, float("nan")], [0.3, 0.2], [0.6, 0.5], [0.8, 0.7]]
        >>> round(worst_case_accuracy(trace, [0, 1, 1, 1]), 5)
        0.5
    """
    values, tasks = _trace(trace, trained)
    present = int(tasks[-1])
    if present < 1:
        return float("nan") if present < 0 else float(values[-1, 0])
    own = float(values[-1, present])
    return (own + present * minimum_accuracy(values, trained)) / (present + 1)


def windowed_forgetting(trace: Matrix, window: int) -> float:
    """Return ``WF_D``: the largest drop ``A_m - A_n``, ``m < n``, within ``D`` evaluations; of each task, their mean.

    A task that never drops counts 0, one that was never measured is left out; what was not measured is no evaluation
    of that task.

    Args:
        trace: As for ``minimum_accuracy``.
        window: ``D``, consecutive evaluations of a task.

    Raises:
        ValueError: ``window`` is below 2, or the trace has another shape.

    Example:
        >>> round(windowed_forgetting([[0.9], [0.3], [0.6], [0.8]], 2), 5)
        0.6
    """
    return _largest_change(trace, window, sign=-1)


def windowed_plasticity(trace: Matrix, window: int) -> float:
    """Return ``WP_D``: the largest rise ``A_n - A_m``, ``m < n``, within ``D`` evaluations; of each task, their mean.

    Args:
        trace: As for ``minimum_accuracy``.
        window: As for ``windowed_forgetting``.

    Note:
        The authors' code skips what lies below the running maximum, and finds no rise in the example.

    Example:
        >>> round(windowed_plasticity([[0.9], [0.1], [0.8]], 3), 5)
        0.7
    """
    return _largest_change(trace, window, sign=1)


def average_anytime_accuracy(trace: Matrix, trained: Sequence[int]) -> float:
    """Return ``AAA``: the mean over evaluations of the mean accuracy on the tasks that were trained by then.

    Evaluations before any training do not count.

    Args:
        trace: As for ``minimum_accuracy``.
        trained: As there.

    Example:
        >>> trace = [[0.9, float("nan")], [0.3, 0.2], [0.6, 0.5], [0.8, 0.7]]
        >>> round(average_anytime_accuracy(trace, [0, 1, 1, 1]), 5)
        0.6125
    """
    values, tasks = _trace(trace, trained)
    means = [row[: task + 1].mean() for row, task in zip(values, tasks.tolist(), strict=True) if task >= 0]
    return float(torch.stack(means).mean()) if means else float("nan")


# Parts


def split_matrix(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Return the accuracies after each task, (tasks, tasks), and those before any training, (tasks,), NaN without.

    Raises:
        ValueError: It is neither (tasks, tasks) nor (tasks + 1, tasks).
    """
    rows = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu()
    if rows.dim() != 2 or not rows.shape[1] or rows.shape[0] - rows.shape[1] not in (0, 1):
        raise ValueError(
            f"matrix has shape {tuple(rows.shape)}; it must be (tasks, tasks), or (tasks + 1, tasks) with a last row "
            f"from before any training"
        )
    tasks = rows.shape[1]
    return rows[:tasks], rows[tasks] if len(rows) > tasks else rows.new_full((tasks,), torch.nan)


def _pairs(tasks: int, diagonal: int) -> Tensor:
    return torch.ones(tasks, tasks, dtype=torch.bool).tril(diagonal)


def _vector(name: str, values: Vector, tasks: int) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if vector.shape != (tasks,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; it must be ({tasks},), one for each task")
    return vector


def _weights(sizes: Vector | None, tasks: int) -> Tensor:
    return torch.ones(tasks, dtype=torch.float64) if sizes is None else _vector("sizes", sizes, tasks)


def _total(sizes: Vector | None, count: int) -> float:
    return count if sizes is None else float(torch.as_tensor(sizes, dtype=torch.float64)[:count].sum())


def _trace(trace: Matrix, trained: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    values = torch.as_tensor(trace, dtype=torch.float64).detach().cpu()
    if values.dim() != 2 or not values.numel():
        raise ValueError(
            f"trace has shape {tuple(values.shape)}; it must be (evaluations, tasks), one of each at least"
        )
    if trained is None:
        return values, torch.empty(0)
    tasks = torch.as_tensor(trained)
    if tasks.shape != values.shape[:1] or not -1 <= int(tasks.min()) <= int(tasks.max()) < values.shape[1]:
        raise ValueError(
            f"trained={list(trained)!r} does not fit {values.shape[0]} evaluations of {values.shape[1]} tasks; pass "
            f"for each evaluation the task, from 0, that the update before it was of, and -1 before any"
        )
    if (tasks.diff() < 0).any():
        raise ValueError(f"trained={list(trained)!r} goes back to an earlier task; pass evaluations in their order")
    return values, tasks


def _least(values: Tensor) -> Tensor:
    measured = values[~values.isnan()]
    return measured.amin() if len(measured) else values.new_full((), torch.nan)


def _largest_change(trace: Matrix, window: int, sign: int) -> float:
    check_positive("window", window)
    if window < 2:
        raise ValueError(f"window={window} holds a single evaluation and no change; use window >= 2")
    values, _ = _trace(trace, None)
    changes = []
    for column in values.T:
        measured = (sign * column[~column.isnan()]).tolist()
        if measured:
            changes.append(_largest_rise(measured, window))
    return sum(changes) / len(changes) if changes else float("nan")


def _largest_rise(values: Sequence[float], window: int) -> float:
    """Return the largest ``values[n] - values[m]``, ``0 < n - m < window``, and 0 at least; in one pass."""
    largest, minima = 0.0, deque[int]()  # of the window, their places; values ascend
    for place, value in enumerate(values):
        if minima and place - minima[0] >= window:
            minima.popleft()
        if minima:
            largest = max(largest, value - values[minima[0]])
        while minima and values[minima[-1]] >= value:
            minima.pop()
        minima.append(place)
    return largest
