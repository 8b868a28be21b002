"""TaskMatrix and AnytimeTracker: what ``continual_metrics`` needs, counted on the way and over devices."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.metrics import SUM_DTYPE


class TaskMatrix(Metric):
    """Accuracy on every task after training on each of them.

    Counts are kept, not shares, so that batches and devices of any size give what all samples at once would. A row is
    the task that was trained last; the last row, which is row -1, is from before any training.

    Args:
        num_tasks: Of the stream.
        **options: Of ``torchmetrics.Metric``.

    Shape:
        ``compute`` returns (num_tasks + 1, num_tasks), float64, NaN where nothing was counted.

    Raises:
        ValueError: ``num_tasks`` is below 1.

    Example:
        >>> metric = TaskMatrix(2)
        >>> metric.update(torch.tensor([3, 1]), torch.tensor([3, 0]), trained_task=0, eval_task=0)
        >>> metric.update(torch.tensor([[0.1, 0.9]]), torch.tensor([1]), trained_task=-1, eval_task=1)
        >>> metric.compute().tolist()
        [[0.5, nan], [nan, nan], [nan, 1.0]]
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, **options: Any) -> None:
        super().__init__(**options)
        check_positive("num_tasks", num_tasks)
        self.num_tasks = num_tasks
        counts = torch.zeros(num_tasks + 1, num_tasks, dtype=torch.long)
        self.add_state("correct", counts, dist_reduce_fx="sum")
        self.add_state("total", counts.clone(), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, trained_task: int, eval_task: int | Tensor) -> None:
        """Count a batch.

        Args:
            preds: (batch,) classes, or (batch, classes) scores of which the largest wins.
            target: (batch,) classes.
            trained_task: The last task that was trained, from 0; -1 before any.
            eval_task: That of the samples, or (batch,) of each.

        Raises:
            ValueError: There is no such task.
        """
        predicted = preds if preds.dim() == 1 else preds.argmax(1)
        tasks = torch.as_tensor(eval_task, device=target.device).expand(target.shape)
        if not -1 <= trained_task < self.num_tasks:
            raise ValueError(f"trained_task={trained_task} is not within [-1, {self.num_tasks}); -1 is before training")
        if len(tasks) and not 0 <= int(tasks.min()) <= int(tasks.max()) < self.num_tasks:
            raise ValueError(f"eval_task={eval_task} is not within [0, {self.num_tasks}); pass the task of the samples")
        hits = (predicted == target).long()
        self.correct[trained_task].index_add_(0, tasks, hits)
        self.total[trained_task].index_add_(0, tasks, torch.ones_like(hits))

    def compute(self) -> Tensor:
        """Return the matrix."""
        return self.correct.to(SUM_DTYPE) / self.total


class AnytimeTracker(Metric):
    """The anytime scalars of ``continual_metrics`` from a state that does not grow with the number of evaluations.

    ``minimum_accuracy``, ``worst_case_accuracy``, ``windowed_forgetting``, ``windowed_plasticity`` and
    ``average_anytime_accuracy`` are what the functions of these names give for all evaluations so far. Minima depend on
    how often one looks: give ``rho``, the updates between two evaluations, beside the numbers.

    Every device must be updated with the same accuracies, those over all samples.

    Args:
        num_tasks: Of the stream.
        window: Evaluations of a task that windowed forgetting and plasticity look back over, itself included.
        **options: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_tasks`` is below 1, or ``window`` below 2.

    Example:
        >>> tracker = AnytimeTracker(2, window=2)
        >>> for trained, row in ((0, [0.9, torch.nan]), (1, [0.3, 0.2]), (1, [0.6, 0.5]), (1, [0.8, 0.7])):
        ...     tracker.update(torch.tensor(row, dtype=torch.float64), trained_task=trained)
        >>> {name: round(float(value), 4) for name, value in tracker.compute().items()}
        {'minimum_accuracy': 0.3, 'worst_case_accuracy': 0.5, 'windowed_forgetting': 0.3, 'windowed_plasticity': 0.3, \
'average_anytime_accuracy': 0.6125}
    """

    full_state_update = True
    minima: Tensor
    recent: Tensor
    drops: Tensor
    rises: Tensor
    latest: Tensor
    trained: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, num_tasks: int, window: int = 10, **options: Any) -> None:
        super().__init__(**options)
        check_positive("num_tasks", num_tasks)
        check_positive("window", window)
        if window < 2:
            raise ValueError(f"window={window} holds a single evaluation and no change; use window >= 2")
        self.num_tasks, self.window = num_tasks, window
        unknown = torch.full((num_tasks,), torch.nan, dtype=SUM_DTYPE)
        # The devices agree, so that any of their values will do; of NaN, too.
        for name, start in {
            "minima": torch.full((num_tasks,), torch.inf, dtype=SUM_DTYPE),
            "recent": unknown.expand(window - 1, num_tasks).clone(),  # oldest first
            "drops": unknown.clone(),
            "rises": unknown.clone(),
            "latest": unknown.clone(),
            "trained": torch.full((), -1),
            "total": torch.zeros((), dtype=SUM_DTYPE),
            "count": torch.zeros((), dtype=torch.long),
        }.items():
            self.add_state(name, start, dist_reduce_fx="max")

    def update(self, accuracies: Tensor, trained_task: int) -> None:
        """Add an evaluation.

        Args:
            accuracies: (num_tasks,), NaN for a task that was not measured.
            trained_task: The task of the update before it, from 0; -1 before any.

        Raises:
            ValueError: The shape is another, or the task is none or before that of the last evaluation.
        """
        if accuracies.shape != (self.num_tasks,):
            raise ValueError(f"accuracies have shape {tuple(accuracies.shape)}; they must be ({self.num_tasks},)")
        if not int(self.trained) <= trained_task < self.num_tasks:
            raise ValueError(
                f"trained_task={trained_task} is not within [{int(self.trained)}, {self.num_tasks}), from that of the "
                f"last evaluation on; pass evaluations in their order, or reset() for another stream"
            )
        row = accuracies.to(self.latest)
        measured = ~row.isnan()
        left = torch.arange(self.num_tasks, device=row.device) < trained_task
        self.minima = torch.where(left & measured, self.minima.minimum(row), self.minima)
        before = self.recent.nan_to_num(nan=-torch.inf).amax(0), self.recent.nan_to_num(nan=torch.inf).amin(0)
        for name, change in (("drops", before[0] - row), ("rises", row - before[1])):
            largest = getattr(self, name).nan_to_num(nan=0.0).maximum(change)
            setattr(self, name, torch.where(measured, largest, getattr(self, name)))
        # A window is of evaluations of a task: where it was not measured, its window stays.
        self.recent = torch.where(measured, torch.cat([self.recent[1:], row[None]]), self.recent)
        self.latest = row
        self.trained = torch.full_like(self.trained, trained_task)
        if trained_task >= 0:
            self.total = self.total + row[: trained_task + 1].mean()
            self.count = self.count + 1

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        present = int(self.trained)
        unknown = self.latest.new_full((), torch.nan)
        minimum = self.minima[:present].mean() if present > 0 else unknown
        minimum = torch.where(minimum.isinf(), unknown, minimum)  # of a task that was not measured since
        own = self.latest[present] if present >= 0 else unknown
        return {
            "minimum_accuracy": minimum,
            "worst_case_accuracy": (own + present * minimum) / (present + 1) if present > 0 else own,
            "windowed_forgetting": self.drops.nanmean(),
            "windowed_plasticity": self.rises.nanmean(),
            "average_anytime_accuracy": self.total / self.count,
        }
