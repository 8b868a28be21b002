"""Figure of the signals of any model along a text; a function that returns ``(figure, axes)``."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from memzoo.lit_modules.graph_figures import evenly

MOST_ROWS = 24  # with a label


@dataclass(frozen=True)
class TokenSignal:
    """A signal of several blocks along a text: ``values`` (blocks, time), the ``blocks``' labels, and its unit."""

    title: str
    blocks: Sequence[str]
    values: NDArray[np.floating]
    unit: str


def token_figure(signals: Sequence[TokenSignal], tokens: Sequence[tuple[str, int]]) -> tuple[Figure, list[Axes]]:
    """Draw signals along a text: a panel a signal, a row a block, a column a token.

    Every row has a scale of its own, from its 1 % to its 99 % quantile, so that neither another block nor one outlier
    hides what it does; the row's label has its mean and that range.

    Args:
        signals: At least one, all of the same number of tokens.
        tokens: Text and id of every token, shown where there is room for them.
    """
    heights = [0.6 + 0.15 * min(max(len(signal.blocks), 3), MOST_ROWS) for signal in signals]
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    axes = list(figure.subplots(len(signals), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for ax, signal in zip(axes, signals, strict=True):
        ranges = [_range(row) for row in signal.values]
        shown = [
            (row - low) / max(high - low, 1e-12) for row, (_, low, high) in zip(signal.values, ranges, strict=True)
        ]
        image = ax.imshow(shown, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1)
        rows = evenly(len(ranges), MOST_ROWS)
        ax.set_yticks(rows, [signal.blocks[row] for row in rows])
        beside = ax.secondary_yaxis("right")
        beside.set_yticks(rows, [_numbers(*ranges[row]) for row in rows])
        for axis in (ax, beside):
            axis.tick_params(axis="y", labelsize=7, length=0)
        ax.set_title(f"{signal.title} ({signal.unit})" if signal.unit else signal.title, fontsize=9)
        ax.set_ylabel("block", fontsize=8)
    last = axes[-1]
    if len(tokens) <= 64:
        labels = [f"{_printable(text)} {number}" for text, number in tokens]
        last.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False, fontsize=7)
    last.set_xlabel("token")
    colors = figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.3, aspect=30, pad=0.01, extend="both", ticks=[0, 1]
    )
    colors.ax.set_xticklabels(["1 % of the row", "99 %"], fontsize=8)
    figure.suptitle("Signals along the text; right: mean of the row (range of its colours)", fontsize=10)
    return figure, axes


def _range(row: NDArray[np.floating]) -> tuple[float, float, float]:
    """Return the mean of a row and the ends of its scale."""
    finite = row[np.isfinite(row)]
    if not finite.size:
        return float("nan"), 0.0, 1.0
    low, high = np.quantile(finite, (0.01, 0.99)).tolist()
    return float(finite.mean()), low, high


def _numbers(mean: float, low: float, high: float) -> str:
    """Return mean and range with as many digits as tell the ends of the range apart."""
    steps = max(abs(low), abs(high)) / max(high - low, 1e-300)
    digits = min(max(3, 3 + floor(log10(max(steps, 1.0)))), 7)
    return f"{mean:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def _printable(word: str) -> str:
    """Return a token's text with its white space visible, rare letters as escapes, and parts of letters as ¿."""
    shown = repr(word)[1:-1].replace(" ", "\u00b7").replace("\ufffd", "\u00bf")
    return shown.encode("latin-1", "backslashreplace").decode("latin-1")
