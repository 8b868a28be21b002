"""Figures: functions of plain numbers that return ``(figure, axes)``, drawn without a display."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


@dataclass(frozen=True)
class Curve:
    """A metric against the tokens seen in training.

    Attributes:
        tokens: Tokens seen, ascending.
        values: The metric there.
    """

    tokens: Sequence[float]
    values: Sequence[float]

    @classmethod
    def read(cls, path: str | Path, metric: str, tokens: str = "train/tokens") -> Self:
        """Read a metric from the ``metrics.csv`` of a ``CSVLogger``; empty if it was never logged.

        Rows that lack the number of tokens (a validation's) take it from the rows around them, by their step.
        """
        with Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        seen = {int(row["step"]): float(row[tokens]) for row in rows if row.get(tokens)}
        points = {int(row["step"]): float(row[metric]) for row in rows if row.get(metric)}
        if not seen or not points:
            return cls([], [])
        return cls(np.interp(list(points), list(seen), list(seen.values())).tolist(), list(points.values()))


def loss_figure(
    train: Curve, validation: Curve, *, levels: Mapping[str, float] | None = None, title: str = ""
) -> tuple[Figure, Axes]:
    """Draw bits per byte against tokens, with horizontal lines to compare with.

    Args:
        train: Of the batches.
        validation: Of the held-out text.
        levels: Label -> height of a line: a baseline, an entropy.
        title: Above the axes.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(train.tokens, train.values, color="C0", alpha=0.45, linewidth=1, label="training batches")
    axes.plot(validation.tokens, validation.values, color="C0", marker="o", markersize=4, label="validation")
    for index, (label, height) in enumerate((levels or {}).items()):
        axes.axhline(height, color=f"C{index + 1}", linestyle="--", linewidth=1.2, label=f"{label}: {height:.3f}")
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("bits per byte")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure, axes
