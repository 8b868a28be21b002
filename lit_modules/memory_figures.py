"""MemoryFigure: what fetched memories are worth, beside generic ones and none."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memzoo.lit_modules.callbacks import say, write_figure
from memzoo.lit_modules.memory_bank import ANCHOR, GENERIC, MemoryBankModule

READINGS = {"": "fetched blocks", GENERIC: "generic blocks", ANCHOR: "no memory"}
Table = dict[str, dict[str, float]]


def read_accuracies(metrics: Mapping[str, Any], stage: str = "val") -> Table:
    """Return the accuracy of every named loader, or of "all" data where none has a name, by what was read.

    Args:
        metrics: As a ``MemoryBankModule`` that compares logs them.
        stage: Beginning of their names.
    """
    ends = f"{GENERIC}accuracy"
    names = [name.removesuffix(ends) for name in metrics if name.startswith(f"{stage}/") and name.endswith(ends)]
    named = [name for name in names if name != f"{stage}/"] or names
    return {
        name.removeprefix(f"{stage}/").rstrip("/") or "all": {
            label: float(metrics[f"{name}{reading}accuracy"]) for reading, label in READINGS.items()
        }
        for name in named
    }


def accuracy_figure(table: Table, *, title: str = "") -> tuple[Figure, Axes]:
    """Draw a group of bars for every loader, one for each reading."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(READINGS)
    for index, label in enumerate(READINGS.values()):
        places = [group + (index - 1) * width for group in range(len(table))]
        bars = axes.bar(places, [row[label] for row in table.values()], width, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(table)), list(table))
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("accuracy")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.25)
    axes.legend()
    return figure, axes


class MemoryFigure(Callback):
    """Say at the end of a fit what the last validation knew with fetched blocks, with generic ones and without any.

    One line for every loader of the data module, and ``memories.png`` in the run's folder and to TensorBoard. For a
    ``MemoryBankModule`` that compares.

    Raises:
        ValueError: The module is another, or does not compare.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be something to compare."""
        if not isinstance(pl_module, MemoryBankModule) or not pl_module.hparams["compare"]:
            raise ValueError(
                f"MemoryFigure compares readings of a memory bank, which {type(pl_module).__name__} does not measure; "
                f"use MemoryBankModule(compare=True), or leave the callback out"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and draw."""
        table = read_accuracies(trainer.callback_metrics)
        if not table or not trainer.is_global_zero:
            return
        for name, row in table.items():
            say(trainer, f"{name}: right with " + ", ".join(f"{label} {share:.1%}" for label, share in row.items()))
        figure, _ = accuracy_figure(table, title="right answers of the last validation")
        write_figure(trainer, "memories", figure)
