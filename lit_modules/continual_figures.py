"""ContinualFigures: what a stream of tasks has come to, said, drawn and written, and functions that draw it."""

import csv
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy as np
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from memzoo.lit_modules.callbacks import say
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.class_incremental import ClassIncrementalModule
from memzoo.lit_modules.continual_callbacks import ContinualEval, Evaluation
from memzoo.lit_modules.continual_metrics import (
    BackwardTransferMode,
    ForgettingMode,
    Matrix,
    average_accuracy,
    average_anytime_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    lower_triangle_accuracy,
    minimum_accuracy,
    split_matrix,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

MOST_NUMBERS = 12  # tasks, for which the accuracies are written into the cells
BINS = 40


def matrix_figure(matrix: Matrix, *, title: str = "") -> tuple[Figure, Axes]:
    """Draw an accuracy matrix as a heat map: the lower, the later a task was trained; above all, before any.

    Args:
        matrix: As ``continual_metrics`` has it; what was not measured stays white.
        title: Above.
    """
    rows, before = split_matrix(matrix)
    started = not before.isnan().all()
    values = (torch.cat([before[None], rows]) if started else rows).numpy()
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), label="accuracy")
    tasks = len(rows)
    names = ["before", *range(tasks)] if started else [*range(tasks)]
    if tasks <= MOST_NUMBERS:
        axes.set_xticks(range(tasks), [f"{task}" for task in range(tasks)])
        axes.set_yticks(range(len(names)), [f"{name}" for name in names])
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = values[row, column]
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xlabel("measured on task")
    axes.set_ylabel("trained up to task")
    axes.set_title(title)
    return figure, axes


def trace_figure(trace: Sequence[Evaluation], *, title: str = "") -> tuple[Figure, Axes]:
    """Draw the accuracy on each task along the training, where tasks begin, and how low each fell once it was left.

    Args:
        trace: The evaluations, in order.
        title: Above.
    """
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    steps = np.array([one.step for one in trace])
    trained = np.array([one.trained for one in trace])
    values = np.array([one.accuracies for one in trace]).reshape(len(trace), -1)
    for task, column in enumerate(values.T):
        known = ~np.isnan(column)
        if not known.any():
            continue
        color = f"C{task % 10}"
        axes.plot(steps[known], column[known], color=color, linewidth=1.2, label=f"task {task}")
        left = known & (trained > task)
        if left.any():
            axes.axhline(column[left].min(), color=color, linestyle=":", linewidth=0.9)
    for place in np.flatnonzero(np.diff(trained) > 0):
        axes.axvline(steps[place], color="0.4", linestyle="--", linewidth=0.8)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if values.shape[1] <= MOST_NUMBERS and len(trace):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure, axes


def usage_figure(usage: Tensor, *, title: str = "") -> tuple[Figure, Axes]:
    """Draw how many pairs of a bottleneck were fetched how often in training; those never fetched are in the legend.

    Args:
        usage: (codebooks, pairs) counts.
        title: Above.
    """
    counts = usage.detach().flatten().double().cpu().numpy()
    fetched = counts[counts > 0]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    edges = np.unique(np.round(np.geomspace(1, max(fetched, default=1) + 1, BINS + 1))) - 0.5  # between whole numbers
    label = f"{len(counts):,} pairs, {np.mean(counts == 0):.1%} never"
    axes.hist(fetched, edges.tolist(), color="C0", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("times fetched")
    axes.set_ylabel("pairs")
    axes.set_title(title)
    axes.legend(fontsize=8)
    return figure, axes


class ContinualFigures(Callback):
    """Say at the end of a fit what the stream has left the model with; draw it and write it.

    Of the first ``ContinualEval`` of the trainer. To the run's folder go ``results.json`` (matrix, scalars with the
    names of their modes, rho, seeds, order of the classes, versions), ``matrix.png`` and, with a trace, ``trace.csv``
    and ``trace.png``; of a model with a ``bottleneck``, ``usage.png``. The figures go to TensorBoard too.

    Raises:
        ValueError: The trainer has no ``ContinualEval``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be something to show."""
        if stage == "fit" and _measured(trainer) is None:
            raise ValueError("ContinualFigures shows what ContinualEval measures; add that callback, or leave this out")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, draw and write."""
        measured = _measured(trainer)
        assert measured is not None
        assert isinstance(pl_module, ClassIncrementalModule)
        if not trainer.is_global_zero:
            return
        if not any(row >= 0 for row in measured.rows):
            say(trainer, "no task was trained to its end, so there is nothing to show")
            return
        results, name = stream_results(trainer, pl_module, measured), type(pl_module.model).__name__
        say(trainer, stream_line(name, results))
        figures = {"matrix": matrix_figure(measured.matrix, title=name)[0]}
        if measured.trace:
            figures["trace"] = trace_figure(measured.trace, title=name)[0]
        usage = getattr(getattr(pl_module.model, "bottleneck", None), "usage", None)
        if usage is not None:
            figures["usage"] = usage_figure(usage, title=name)[0]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
                if measured.trace:
                    write_trace(folder / "trace.csv", measured.trace)
                for title, figure in figures.items():
                    figure.savefig(folder / f"{title}.png", dpi=150)
            if isinstance(logger, TensorBoardLogger):
                for title, figure in figures.items():
                    logger.experiment.add_figure(title, figure, trainer.global_step)


def stream_results(trainer: Trainer, module: ClassIncrementalModule, measured: ContinualEval) -> dict[str, Any]:
    """Return all that a run measured and what it takes to run it again, in plain values; None for what is NaN."""
    data = data_module(trainer)
    sizes = [data.task_size(task, measured.split) for task in range(data.num_tasks)]
    seed = os.environ.get("PL_GLOBAL_SEED")
    results = {
        "model": type(module.model).__name__,
        "strategy": None if module.strategy is None else module.strategy.describe(),
        "learner": None if module.learner is None else type(module.learner).__name__,
        "optimizer": module.hparams["optimizer"],
        "learning_rate": module.hparams["learning_rate"],
        "label_smoothing": module.hparams["label_smoothing"],
        "train_logits": module.hparams["train_logits"],
        "eval_logits": measured.logits or module.hparams["eval_logits"],
        "scenario": data.scenario,
        "num_tasks": data.num_tasks,
        "epochs_per_task": data.epochs_per_task,
        "class_order": data.class_order,
        "task_classes": data.task_classes,
        "blurry": data.blurry,
        "seeds": {"data": data.seed, "everything": None if seed is None else int(seed)},
        "split": measured.split,
        "sizes": sizes,
        "matrix": measured.matrix[: data.num_tasks].tolist(),
        "before": measured.matrix[data.num_tasks].tolist(),
        "scalars": matrix_scalars(measured.matrix, sizes),
        "online_accuracy": module.online_accuracy,
        "rho": measured.every_n_steps,
        "window": measured.window,
        "samples": measured.samples,
        "anytime": trace_scalars(measured.trace, measured.window),
        "steps": trainer.global_step,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
    }
    return {name: _plain(value) for name, value in results.items()}


def matrix_scalars(matrix: Matrix, sizes: Sequence[int]) -> dict[str, Any]:
    """Return all scalars of an accuracy matrix; those that are computed in several ways by the names of these."""
    micro = torch.tensor(sizes)
    return {
        "average_accuracy": {
            "macro": average_accuracy(matrix),
            "micro": average_accuracy(matrix, sizes=micro),
        },
        "average_incremental_accuracy": {
            "macro": average_incremental_accuracy(matrix),
            "micro": average_incremental_accuracy(matrix, sizes=micro),
        },
        "lower_triangle_accuracy": lower_triangle_accuracy(matrix),
        "learning_accuracy": learning_accuracy(matrix),
        "backward_transfer": {mode: backward_transfer(matrix, mode=mode) for mode in get_args(BackwardTransferMode)},
        "forward_transfer": forward_transfer(matrix),
        "forgetting": {mode: forgetting(matrix, mode=mode) for mode in get_args(ForgettingMode)},
    }


def trace_scalars(trace: Sequence[Evaluation], window: int) -> dict[str, float]:
    """Return all scalars of a trace; none without one."""
    if not trace:
        return {}
    values, trained = [one.accuracies for one in trace], [one.trained for one in trace]
    return {
        "minimum_accuracy": minimum_accuracy(values, trained),
        "worst_case_accuracy": worst_case_accuracy(values, trained),
        "windowed_forgetting": windowed_forgetting(values, window),
        "windowed_plasticity": windowed_plasticity(values, window),
        "average_anytime_accuracy": average_anytime_accuracy(values, trained),
    }


def stream_line(name: str, results: Mapping[str, Any]) -> str:
    """Return one line: how good a model is after the last task, and what it has forgotten."""
    scalars, lowest = results["scalars"], results["anytime"].get("minimum_accuracy")
    line = (
        f"{name}: {_percent(scalars['average_accuracy']['macro'])} on all {results['num_tasks']} tasks after the last"
    )
    line += f" ({_percent(scalars['learning_accuracy'])} right after each)"
    line += f"; forgetting (Chaudhry) {_percent(scalars['forgetting']['chaudhry'])}"
    return (
        line
        if lowest is None
        else f"{line}; at worst {_percent(lowest)} of a task left, every {results['rho']} updates"
    )


def write_trace(path: Path, trace: Sequence[Evaluation]) -> None:
    """Write a row for every evaluation; what was not measured is empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "trained", *(f"task_{task}" for task in range(len(trace[0].accuracies)))])
        for one in trace:
            writer.writerow([one.step, one.trained, *("" if math.isnan(value) else value for value in one.accuracies)])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _measured(trainer: Trainer) -> ContinualEval | None:
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, ContinualEval)), None)
