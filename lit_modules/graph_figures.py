"""Figures of an inspection: signals along a text, and graphs of slots; functions that return ``(figure, axes)``.

Colours are those of Okabe and Ito, and cividis: told apart with any colour vision, and in print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.floating]
LegendEntry = tuple[str, str, str, Literal["", "-", "--", ":"]]  # label, colour, marker, line

SOURCE, TARGET, EDGES = "#0072B2", "#D55E00", "#009E73"
QUIET = "0.55"
MOST_PANELS = 16
MOST_ARROWS = 24  # of a transition graph
MOST_MOVES = 120  # tokens whose movement is drawn


@dataclass(frozen=True)
class SlotGraph:
    """Slots in a plane and how many tokens move from one to another.

    Attributes:
        title: Of the panel.
        positions: (S, 2).
        shares: Part of the variance along each axis.
        usage: (S,), parts of the text.
        counts: (S, S), tokens by source and target.
    """

    title: str
    positions: Array
    shares: tuple[float, float]
    usage: Array
    counts: NDArray[np.integer]


@dataclass(frozen=True)
class Movement:
    """Where every token is and where it goes, in a plane: ``source`` and ``target`` (time, 2)."""

    title: str
    source: Array
    target: Array
    shares: tuple[float, float]


@dataclass(frozen=True)
class Usage:
    """How much of a text each slot holds, softly and by the likeliest slot of each token, both (S,)."""

    title: str
    soft: Array
    likeliest: Array


@dataclass(frozen=True)
class Entropies:
    """Entropies of one block in nats: of every token's ``source`` and ``target`` (time,), and the mean of its edges."""

    block: str
    source: Array
    target: Array
    edges: float
    num_slots: int


@dataclass(frozen=True)
class TokenSignal:
    """A signal of several blocks along a text: ``values`` (blocks, time), the ``blocks``' labels, and its unit."""

    title: str
    blocks: Sequence[str]
    values: Array
    unit: str


def transition_figure(graphs: Sequence[SlotGraph]) -> tuple[Figure, list[Axes]]:
    """Draw slots as dots, larger where more is used, and the most frequent moves between them as arrows."""
    figure, axes = _panels(len(graphs))
    for ax, graph in zip(axes, graphs, strict=True):
        _draw_graph(ax, graph)
    figure.suptitle("Moves of tokens between slots")
    figure.supxlabel(
        f"arrows: the {MOST_ARROWS} most frequent moves of a block, width by number; dots: slots, size by usage; "
        "rings: where tokens stay",
        fontsize=_small(figure),
        color="0.3",
    )
    return figure, axes


def movement_figure(movements: Sequence[Movement]) -> tuple[Figure, list[Axes]]:
    """Draw every token's source and target centre, and for some tokens, evenly spaced, the arrow between them."""
    figure, axes = _panels(len(movements))
    for ax, movement in zip(axes, movements, strict=True):
        time = len(movement.source)
        some = np.unique(np.linspace(0, time - 1, min(time, MOST_MOVES)).round().astype(int))
        start, step = movement.source[some], (movement.target - movement.source)[some]
        ax.quiver(
            *start.T, *step.T, angles="xy", scale_units="xy", scale=1, color=QUIET, alpha=0.5, width=0.0035, zorder=1
        )
        for points, color in ((movement.target, TARGET), (movement.source, SOURCE)):
            ax.scatter(points[:, 0], points[:, 1], s=9, color=color, alpha=0.6, linewidths=0, zorder=2)
        _label_plane(ax, movement.title, movement.shares)
    figure.suptitle(f"Movement of the text's tokens; arrows of at most {MOST_MOVES} of them")
    _legend(figure, [("source centre", SOURCE, "o", ""), ("target centre", TARGET, "o", "")])
    return figure, axes


def usage_figure(usages: Sequence[Usage]) -> tuple[Figure, list[Axes]]:
    """Draw how the slots share the text, from the most used to the least, softly and by each token's likeliest slot.

    The scale is logarithmic: the likeliest slots of few tokens are below the soft usage, those of none are not drawn.
    """
    figure, axes = _panels(len(usages), height=2.5)
    shares = np.concatenate([(usage.soft, usage.likeliest) for usage in usages], axis=None)
    limits = 80 * max(shares[shares > 0].min(), 1e-5), 130 * shares.max()
    for ax, usage in zip(axes, usages, strict=True):
        rank = np.arange(1, len(usage.soft) + 1)
        ax.plot(rank, 100 * np.sort(usage.soft)[::-1], color=SOURCE, linewidth=1.6)
        ax.plot(rank, 100 * np.sort(usage.likeliest)[::-1], color=TARGET, linewidth=1.2, linestyle="--", marker=".")
        ax.axhline(100 / len(rank), color=QUIET, linestyle=":", linewidth=1.2)
        ax.set(title=usage.title, xlabel="slot, by rank", ylabel="tokens (%)", yscale="log", ylim=limits)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        ax.grid(alpha=0.25)
    figure.suptitle("Usage of the slots as sources")
    lines: list[LegendEntry] = [
        ("soft", SOURCE, "", "-"),
        ("likeliest slot of a token", TARGET, ".", "--"),
        ("equal usage", QUIET, "", ":"),
    ]
    _legend(figure, lines)
    return figure, axes


def entropy_figure(blocks: Sequence[Entropies]) -> tuple[Figure, Axes]:
    """Draw median and 10-90 % range over tokens of the source's and target's entropy, block by block."""
    figure = Figure(figsize=(max(5.5, min(1.8 + 0.5 * len(blocks), 14)), 4.2), layout="constrained")
    ax = figure.add_subplot()
    x = np.arange(len(blocks))
    for name, shift, color, marker in (("source", -0.13, SOURCE, "o"), ("target", 0.13, TARGET, "s")):
        low, middle, high = np.array([np.quantile(getattr(block, name), (0.1, 0.5, 0.9)) for block in blocks]).T
        span = np.stack((middle - low, high - middle))
        label = f"{name} of a token: median, 10-90 %"
        ax.errorbar(x + shift, middle, span, color=color, marker=marker, markersize=5, linestyle="", label=label)
    edges = [block.edges for block in blocks]
    ax.plot(x, edges, color=EDGES, marker="D", markersize=5, linestyle="", label="row of edges: mean")
    most = [log(block.num_slots) for block in blocks]
    ends = np.append(x - 0.5, len(x) - 0.5)
    ax.stairs(most, ends, baseline=None, color="0.2", linestyle="--", label=f"most: ln S = {max(most):.2f}")
    _block_ticks(ax.xaxis, [block.block for block in blocks], most=24)
    ax.set(xlabel="block", ylabel="entropy (nats)", title="How widely tokens and edges spread over the slots")
    ax.set_ylim(0, 1.06 * max(most))
    ax.grid(alpha=0.25, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure, ax


def token_figure(signals: Sequence[TokenSignal], words: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Draw signals along a text: a panel a signal, a row a block, a column a token.

    Colours span the middle 98 % of the numbers, so that one outlier does not hide the rest.

    Args:
        signals: At least one, all of the same number of tokens.
        words: The text of every token, shown where there is room for it.
    """
    heights = [0.75 + min(0.14 * max(len(signal.blocks), 3), 1.7) for signal in signals]
    figure = Figure(figsize=(10, sum(heights) + 0.9), layout="constrained")
    axes = list(figure.subplots(len(signals), sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for ax, signal in zip(axes, signals, strict=True):
        finite = signal.values[np.isfinite(signal.values)]
        low, high = np.quantile(finite, (0.01, 0.99)) if finite.size else (0.0, 1.0)
        image = ax.imshow(
            signal.values, aspect="auto", interpolation="nearest", cmap="cividis", vmin=low, vmax=max(high, low + 1e-12)
        )
        colors = figure.colorbar(image, ax=ax, label=signal.unit, pad=0.01, extend="both", format="{x:.7g}")
        colors.locator = MaxNLocator(4)
        _block_ticks(ax.yaxis, signal.blocks, most=8)
        ax.set(title=signal.title, ylabel="block")
    last = axes[-1]
    if len(words) <= 64:
        last.set_xticks(range(len(words)), [_printable(word) for word in words], rotation=90, parse_math=False)
    last.set_xlabel("token")
    return figure, axes


def evenly(number: int, most: int = MOST_PANELS) -> list[int]:
    """Return which of ``number`` things to show where there is room for ``most``: evenly spaced, with both ends."""
    return [] if not number else sorted({round(i) for i in np.linspace(0, number - 1, min(number, most)).tolist()})


def _panels(number: int, *, width: float = 3.4, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    columns = min(4, ceil(sqrt(number)))
    rows = ceil(number / columns)
    figure = Figure(figsize=(max(width * columns, 7.0), height * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[number:]:
        spare.remove()
    return figure, axes[:number]


def _draw_graph(ax: Axes, graph: SlotGraph) -> None:
    size = 8 + 110 * graph.usage / graph.usage.max()
    stays = graph.counts.diagonal()
    moves = graph.counts - np.diag(stays)
    most = max(int(moves.max()), 1)
    x, y = graph.positions.T
    ax.scatter(x, y, s=size, color=SOURCE, alpha=0.5, linewidths=0, zorder=2)
    rings = stays > 0
    ax.scatter(x[rings], y[rings], s=size[rings] + 45, facecolors="none", edgecolors=EDGES, zorder=3)
    strongest = np.argsort(-moves, axis=None, kind="stable")[:MOST_ARROWS]
    pairs = [divmod(int(move), len(moves)) for move in strongest]
    pairs = [(source, target) for source, target in pairs if moves[source, target]]
    for source, target in reversed(pairs):  # the strongest on top
        arrow = FancyArrowPatch(
            *map(tuple, graph.positions[[source, target]]),
            arrowstyle="-|>",
            connectionstyle="arc3,rad=0.18",  # there and back are two arrows
            mutation_scale=9,
            shrinkA=sqrt(size[source]) / 2,
            shrinkB=sqrt(size[target]) / 2,
            linewidth=0.5 + 2.5 * moves[source, target] / most,
            color=TARGET,
            alpha=0.7,
            zorder=4,
        )
        ax.add_patch(arrow)
    _label_slots(ax, graph, [slot for pair in pairs for slot in pair])
    total = int(graph.counts.sum())
    note = f"widest: {int(moves.max())} of {total} tokens; {int(stays.sum())} stay"
    _label_plane(ax, f"{graph.title}\n{note}", graph.shares)
    ax.margins(0.08)


def _label_slots(ax: Axes, graph: SlotGraph, slots: Sequence[int]) -> None:
    """Number the slots at the ends of arrows, the strongest first, where no other number is near."""
    extent = np.ptp(graph.positions, axis=0).clip(1e-12)
    placed: list[Array] = []
    for slot in dict.fromkeys(slots):
        at = graph.positions[slot] / extent
        if all(abs(at - other)[0] > 0.12 or abs(at - other)[1] > 0.07 for other in placed):
            placed.append(at)
            ax.annotate(
                str(slot), graph.positions[slot], fontsize=7, fontweight="bold", ha="center", va="center", zorder=5,
                bbox=dict(boxstyle="round,pad=0.12", facecolor="white", edgecolor="none", alpha=0.75),
            )  # fmt: skip


def _label_plane(ax: Axes, title: str, shares: tuple[float, float]) -> None:
    first, second = (f"component {i} ({100 * share:.0f} % of variance)" for i, share in enumerate(shares, 1))
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(first, fontsize=8)
    ax.set_ylabel(second, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.locator_params(nbins=5)


def _small(figure: Figure) -> float:
    """Return a size of letters in which a line of 130 fits the figure."""
    return min(9.0, 0.95 * figure.get_figwidth())


def _legend(figure: Figure, entries: Sequence[LegendEntry]) -> None:
    handles = [
        Line2D([], [], color=color, marker=mark, linestyle=line, label=name) for name, color, mark, line in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _block_ticks(axis: object, labels: Sequence[str], *, most: int) -> None:
    shown = evenly(len(labels), most)
    axis.set_ticks(shown, [labels[i] for i in shown])  # type: ignore[attr-defined]


def _printable(word: str) -> str:
    """Return a token's text with its white space visible, rare letters as escapes, and parts of letters as ¿."""
    shown = repr(word)[1:-1].replace(" ", "\u00b7").replace("\ufffd", "\u00bf")
    return shown.encode("latin-1", "backslashreplace").decode("latin-1")
