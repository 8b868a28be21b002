"""Figures of graph memory cells: how tokens move between slots; functions that return ``(figure, axes)``.

Colours are those of Okabe and Ito, and cividis: told apart with any colour vision, and in print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log, log10, sqrt
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

Array = NDArray[np.floating]
Line = Literal["", "-", "--", ":"]

SOURCE, TARGET, EDGES, TRAINED = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
QUIET = "0.55"
MOST_PANELS = 16
MOST_ARROWS = 24  # of a graph of moves
MOST_MOVES = 40  # tokens whose movement is drawn
MOST_MEANS = 5  # slots whose mean movement is drawn
WIDEST = 4.0  # points


@dataclass(frozen=True)
class SlotGraph:
    """Slots, the edges between them and how the tokens of a text move along.

    Attributes:
        title: Of the panel.
        order: The slots in the order in which they are drawn, (S,).
        usage: (S,), soft parts of the text.
        moves: (S, S), what part of all movement goes from one slot to another.
        counts: (S, S), tokens by likeliest source and target.
        edges: (S, S), transition probabilities.
    """

    title: str
    order: NDArray[np.integer]
    usage: Array
    moves: Array
    counts: NDArray[np.integer]
    edges: Array


@dataclass(frozen=True)
class Movement:
    """Where every token is and where it goes, in a plane.

    Attributes:
        title: Of the panel.
        source: Centres, (time, 2).
        target: Likewise.
        likeliest: Every token's likeliest source, (time,).
        shares: Part of the variance along each axis.
    """

    title: str
    source: Array
    target: Array
    likeliest: NDArray[np.integer]
    shares: tuple[float, float]


@dataclass(frozen=True)
class Usage:
    """How much of a text each slot holds, all (S,).

    Attributes:
        title: Of the panel.
        soft: Mean source.
        likeliest: Share of tokens whose likeliest source it is.
        target: Mean target.
        trained: Running mean of the sources in training.
    """

    title: str
    soft: Array
    likeliest: Array
    target: Array
    trained: Array


@dataclass(frozen=True)
class Entropies:
    """Entropies of one block in nats: of every token's ``source`` and ``target`` (time,), and the mean of its edges."""

    block: str
    source: Array
    target: Array
    edges: float
    num_slots: int


def transition_figure(graphs: Sequence[SlotGraph]) -> tuple[Figure, list[Axes]]:
    """Draw slots on a circle, larger where more is used, and the moves that carry most of the tokens as arrows.

    A slot's place is its rank in ``order``, clockwise from a gap at the top, and says no more than that.
    """
    side = 4.6 if len(graphs) <= 4 else 3.4
    figure, axes = _panels(len(graphs), width=side, height=side + 0.5)
    figure.set_layout_engine("constrained", h_pad=0.12)
    most = max(float(graph.moves.max()) for graph in graphs)
    for ax, graph in zip(axes, graphs, strict=True):
        _draw_graph(ax, graph, most)
    figure.suptitle("Soft moves of tokens between slots")
    handles = [
        Line2D([], [], color=TARGET, linewidth=_width(share, most), label=f"{100 * share:.3g} % of all moves")
        for share in (most, most / 2, most / 8)
    ]
    caption = (
        f"arrows: the {MOST_ARROWS} widest moves of each block; rings: those to the same slot\n"
        "dots: slots in spectral order of the moves, clockwise from the gap; size by soft usage"
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, title=caption, title_fontsize=9, fontsize=9
    )
    return figure, axes


def edge_figure(graphs: Sequence[SlotGraph]) -> tuple[Figure, list[Axes]]:
    """Draw where the edges of every block lead beside where its tokens go, as a pair of maps with the same order."""
    columns = min(3, ceil(sqrt(len(graphs))))
    rows = ceil(len(graphs) / columns)
    figure = Figure(figsize=(max(5.6 * columns, 7.0), 2.75 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for pair, graph in zip(panels, graphs, strict=False):
        _draw_map(pair[0], graph, graph.edges, f"{graph.title}: edges (% of a source)")
        _draw_map(pair[1], graph, graph.moves, f"{graph.title}: soft moves (% of all)")
    axes = list(panels[: len(graphs)].flat)
    for spare in panels[len(graphs) :].flat:
        spare.remove()
    figure.suptitle("Where edges lead, and where tokens go; a scale a map, slots in the spectral order of the moves")
    return figure, axes


def movement_figure(movements: Sequence[Movement]) -> tuple[Figure, list[Axes]]:
    """Draw every token's source and target centre, arrows for some tokens, and mean arrows of the most used slots."""
    figure, axes = _panels(len(movements))
    for ax, movement in zip(axes, movements, strict=True):
        for points, color in ((movement.target, TARGET), (movement.source, SOURCE)):
            ax.scatter(points[:, 0], points[:, 1], s=7, color=color, alpha=0.3, linewidths=0, zorder=1)
        for token in evenly(len(movement.source), MOST_MOVES):
            ax.add_patch(_step(movement.source[token], movement.target[token], 0.7, "0.35", zorder=2))
        _draw_means(ax, movement)
        _label_plane(ax, movement.title, movement.shares)
        ax.margins(0.08)
    figure.suptitle("Movement of the text's tokens")
    _legend(
        figure,
        [
            ("source centre", SOURCE, "o", "", 1),
            ("target centre", TARGET, "o", "", 1),
            (f"up to {MOST_MOVES} tokens", "0.35", "", "-", 0.7),
            ("mean of a slot's tokens", "black", "", "-", 2.4),
        ],
    )
    return figure, axes


def usage_figure(usages: Sequence[Usage]) -> tuple[Figure, list[Axes]]:
    """Draw how the slots share the text, all in one order: from the most used as a soft source to the least.

    The scale is logarithmic; slots that are the likeliest of no token have no dot.
    """
    figure, axes = _panels(len(usages), height=2.5)
    shares = np.concatenate([(one.soft, one.likeliest, one.target, one.trained) for one in usages], axis=None)
    limits = 80 * max(shares[shares > 0].min(), 1e-5), 130 * shares.max()
    for ax, usage in zip(axes, usages, strict=True):
        order = np.argsort(-usage.soft, kind="stable")
        rank = np.arange(1, len(order) + 1)
        ax.plot(rank, 100 * usage.soft[order], color=SOURCE, linewidth=2, zorder=3)
        ax.plot(rank, 100 * usage.likeliest[order], color="black", linestyle="", marker=".", markersize=4, zorder=4)
        ax.plot(rank, 100 * usage.target[order], color=TARGET, linewidth=0.8, zorder=2)
        ax.plot(rank, 100 * usage.trained[order], color=TRAINED, linewidth=0.8, zorder=2)
        ax.axhline(100 / len(rank), color=QUIET, linestyle=":", linewidth=1.2)
        ax.set(yscale="log", ylim=limits)
        ax.set_title(usage.title, fontsize=9)
        ax.set_xlabel("slot, by soft usage", fontsize=8)
        ax.set_ylabel("tokens (%)", fontsize=8)
        ax.yaxis.set_major_locator(FixedLocator(_log_ticks(*limits)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
    figure.suptitle("Usage of the slots")
    _legend(
        figure,
        [
            ("soft source", SOURCE, "", "-", 2),
            ("likeliest source", "black", ".", "", 1),
            ("soft target", TARGET, "", "-", 0.8),
            ("running mean in training", TRAINED, "", "-", 0.8),
            ("equal usage", QUIET, "", ":", 1.2),
        ],
    )
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
    shown = evenly(len(blocks), 24)
    ax.set_xticks(shown, [blocks[i].block for i in shown])
    ax.set(xlabel="block", ylabel="entropy (nats)", title="How widely tokens and edges spread over the slots")
    ax.set_ylim(0, 1.06 * max(most))
    ax.grid(alpha=0.25, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure, ax


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


# A graph on a circle


def _draw_graph(ax: Axes, graph: SlotGraph, most: float) -> None:
    num_slots = len(graph.usage)
    angle = np.pi / 2 - 2 * np.pi * (np.argsort(graph.order) + 1) / (num_slots + 1)
    places = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    size = 3 + min(60.0, (700 / num_slots) ** 2) * graph.usage / graph.usage.max()  # about as far as they are apart
    ax.scatter(places[:, 0], places[:, 1], s=size, color=SOURCE, linewidths=0, zorder=3)
    widest = np.argsort(-graph.moves, axis=None, kind="stable")[:MOST_ARROWS]
    pairs = [divmod(int(move), num_slots) for move in widest if graph.moves.flat[move] > 0]
    for source, target in reversed(pairs):  # the widest on top
        width = _width(graph.moves[source, target], most)
        if source == target:
            x, y = places[source]
            ax.scatter(x, y, s=110, facecolors="none", edgecolors=TARGET, linewidths=width, zorder=2)
        else:
            ax.add_patch(_chord(places[source], places[target], width))
    _label_slots(ax, angle, [slot for pair in pairs for slot in pair])
    source, target = pairs[0]
    covered, share = 100 * sum(graph.moves[pair] for pair in pairs), 100 * graph.moves[source, target]
    ax.set_title(
        f"{graph.title}\ndrawn: {covered:.3g} % of all moves; widest: {source} to {target}, {share:.3g} %,\n"
        f"the likeliest of {graph.counts[source, target]} of {graph.counts.sum()} tokens",
        fontsize=8,
    )
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.set_axis_off()


def _width(share: float, most: float) -> float:
    return max(WIDEST * share / most, 0.25)


def _chord(start: Array, end: Array, width: float) -> FancyArrowPatch:
    """Return an arrow through the circle, from beside one dot to beside another; there and back are two."""
    control = 0.25 * (start + end) + 0.12 * np.array((start[1] - end[1], end[0] - start[0]))
    path = Path([0.93 * start, control, 0.93 * end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    return FancyArrowPatch(
        path=path,
        arrowstyle="-|>,head_length=0.4,head_width=0.2",
        mutation_scale=7 + 1.5 * width,
        linewidth=width,
        color=TARGET,
        alpha=0.65,
        zorder=4,
    )


def _label_slots(ax: Axes, angle: Array, slots: Sequence[int]) -> None:
    """Number the slots at the ends of arrows outside the circle, the widest first, where no other number is near."""
    placed: list[Array] = []
    for slot in dict.fromkeys(slots):
        at = 1.17 * np.array((np.cos(angle[slot]), np.sin(angle[slot])))
        if all(abs(at - other)[0] > 0.2 or abs(at - other)[1] > 0.11 for other in placed):
            placed.append(at)
            ax.text(at[0], at[1], str(slot), fontsize=7, ha="center", va="center")


# Maps


def _draw_map(ax: Axes, graph: SlotGraph, values: Array, title: str) -> None:
    values = 100 * values[np.ix_(graph.order, graph.order)]
    scale = PowerNorm(0.5, vmin=0, vmax=values.max())  # a root, so that one large entry does not hide the rest
    image = ax.imshow(values, cmap="cividis", interpolation="nearest", norm=scale)
    colors = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02)
    colors.locator = MaxNLocator(4)
    colors.ax.tick_params(labelsize=7)
    shown = evenly(len(values), 12)
    labels = [str(graph.order[i]) for i in shown]
    ax.set_xticks(shown, labels, rotation=90)
    ax.set_yticks(shown, labels)
    ax.tick_params(labelsize=6)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("to slot", fontsize=8)
    ax.set_ylabel("from slot", fontsize=8)


# Planes


def _step(start: Array, end: Array, width: float, color: str, zorder: float) -> FancyArrowPatch:
    return FancyArrowPatch(
        (start[0], start[1]),
        (end[0], end[1]),
        arrowstyle="-|>,head_length=0.4,head_width=0.2",
        mutation_scale=7 + 2.5 * width,
        shrinkA=0,
        shrinkB=2,
        linewidth=width,
        color=color,
        zorder=zorder,
    )


def _draw_means(ax: Axes, movement: Movement) -> None:
    """Draw the mean arrows of the tokens of the most used slots, numbered where no other number is near."""
    extent = np.ptp(np.concatenate((movement.source, movement.target)), axis=0).clip(1e-12)
    slots, sizes = np.unique(movement.likeliest, return_counts=True)
    placed: list[Array] = []
    for slot in slots[np.argsort(-sizes, kind="stable")[:MOST_MEANS]]:
        own = movement.likeliest == slot
        start, end = movement.source[own].mean(0), movement.target[own].mean(0)
        ax.add_patch(_step(start, end, 2.4, "black", zorder=3))
        if all((abs(end - other) > (0.08, 0.05) * extent).any() for other in placed):
            placed.append(end)
            _label_head(ax, str(slot), start, end)


def _label_head(ax: Axes, words: str, start: Array, end: Array) -> None:
    """Write beyond the head of an arrow."""
    ahead = (end - start) / max(float(np.linalg.norm(end - start)), 1e-12)
    halo = [withStroke(linewidth=2, foreground="white")]
    ax.annotate(
        words, (end[0], end[1]), (8 * ahead[0], 8 * ahead[1]), textcoords="offset points", fontsize=8,
        fontweight="bold", ha="center", va="center", zorder=5, path_effects=halo,
    )  # fmt: skip


def _label_plane(ax: Axes, title: str, shares: tuple[float, float]) -> None:
    first, second = (f"component {i} ({100 * share:.1f} % of variance)" for i, share in enumerate(shares, 1))
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(first, fontsize=8)
    ax.set_ylabel(second, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.locator_params(nbins=5)


# Scales and legends


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, at most about five of them."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        finer = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in finer if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, len(ticks) // 4)]


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str, Line, float]]) -> None:
    """Add a legend of entries (label, colour, marker, line, width)."""
    handles = [
        Line2D([], [], color=color, marker=mark, linestyle=line, linewidth=width, label=name)
        for name, color, mark, line, width in entries
    ]
    columns = len(handles) if figure.get_figwidth() > 9 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
