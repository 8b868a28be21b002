"""Read a text once and keep what the layers report on the way: every signal in numbers, graph memory cells in full."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from memzoo.layers.graph_memory_measures import (
    effective_number,
    gini,
    move_counts,
    mutual_information,
    slot_tokens,
    soft_moves,
)
from memzoo.layers.trace import Trace

PIECE = 256  # tokens a call, where a model's context sets no limit: all signals of a call are in memory at once
OF_CELL = ("slots", "edges", "usage")
OF_TOKENS = ("source", "target", "source_entropy", "target_entropy", "source_centre", "target_centre")


@dataclass(frozen=True)
class Moments:
    """Mean, variance and extremes of numbers."""

    count: int
    mean: float
    variance: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Measure a tensor, not empty."""
        values = values.double()
        variance, mean = torch.var_mean(values, correction=0)
        return cls(values.numel(), mean.item(), variance.item(), values.min().item(), values.max().item())

    @classmethod
    def join(cls, parts: "Sequence[Moments]") -> Self:
        """Return those of all the numbers that were measured."""
        count = sum(part.count for part in parts)
        mean = sum(part.count * part.mean for part in parts) / count
        variance = sum(part.count * (part.variance + (part.mean - mean) ** 2) for part in parts) / count
        return cls(count, mean, variance, min(part.least for part in parts), max(part.most for part in parts))

    @property
    def sd(self) -> float:
        """Standard deviation, of these numbers and not of a population behind them."""
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Signal:
    """A signal over a text.

    Attributes:
        name: Path of the layer and name.
        shape: Of all the text if the signal is of tokens, else of what the last call reported.
        moments: Of all its numbers, those of every call.
        along: (time,), its mean over all other axes for every token; None if it is not of tokens. One is taken to be
            if it is (1, time, ...) in every call.
    """

    name: str
    shape: tuple[int, ...]
    moments: Moments
    along: Tensor | None

    @property
    def kind(self) -> str:
        """The name without the numbers of blocks: ``blocks.*.mixer.surprise``."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.name)

    @property
    def block(self) -> str:
        """The numbers of blocks in the name: ``"3"``."""
        return block_of(self.name)


@dataclass(frozen=True)
class GraphCell:
    """What a graph memory cell did with a text.

    Attributes:
        path: Of the layer.
        source: Probabilities of the slots that every token is at, (time, S).
        target: Of those that it moves to.
        source_entropy: Of ``source`` in nats, (time,).
        target_entropy: Of ``target``.
        source_centre: Mean of the slots by ``source``, (time, d).
        target_centre: By ``target``.
        slots: (S, d).
        edges: What the transitions along the edges are, Ebar, (S, S).
        usage: Running mean of the sources in training, (S,).
        scalars: Mean of every signal that is one number.
    """

    path: str
    source: Tensor
    target: Tensor
    source_entropy: Tensor
    target_entropy: Tensor
    source_centre: Tensor
    target_centre: Tensor
    slots: Tensor
    edges: Tensor
    usage: Tensor
    scalars: Mapping[str, float]

    @property
    def block(self) -> str:
        """Number of the block, or the path if it has none."""
        return block_of(f"{self.path}.") or self.path

    @property
    def num_slots(self) -> int:
        """S."""
        return len(self.slots)

    @property
    def moves(self) -> Tensor:
        """Number of tokens by likeliest source and target, (S, S)."""
        return move_counts(self.source[None], self.target[None])

    @property
    def soft_moves(self) -> Tensor:
        """Mean of source times target, (S, S): what part of all movement goes from one to the other."""
        return soft_moves(self.source[None], self.target[None])

    @property
    def likeliest(self) -> Tensor:
        """Share of the tokens whose likeliest source each slot is, (S,)."""
        return self.moves.sum(1).to(self.source) / len(self.source)

    @property
    def effective(self) -> float:
        """How many sources the text uses."""
        return effective_number(self.source.mean(0)).item()

    @property
    def likeliest_effective(self) -> float:
        """How many it uses as likeliest ones."""
        return effective_number(self.likeliest).item()

    @property
    def likeliest_gini(self) -> float:
        """How unevenly: 0 if equally, 1 - 1/S if all tokens have one."""
        return gini(self.likeliest).item()

    @property
    def information(self) -> float:
        """Nats that the source says about its token."""
        return mutual_information(self.source[None]).item()

    @property
    def stays(self) -> float:
        """Share of tokens whose likeliest target is their likeliest source."""
        return self.moves.diagonal().sum().item() / len(self.source)


@dataclass(frozen=True)
class Reading:
    """A text as a model read it.

    Attributes:
        tokens: Their ids, (time,).
        signals: In the order in which they were reported.
        cells: Graph memory cells, in their order.
    """

    tokens: Tensor
    signals: list[Signal]
    cells: list[GraphCell]

    def kinds(self) -> dict[str, list[Signal]]:
        """Return the signals by their kind: those of all blocks together."""
        kinds: dict[str, list[Signal]] = {}
        for signal in self.signals:
            kinds.setdefault(signal.kind, []).append(signal)
        return kinds

    def along_text(self, most: int) -> tuple[dict[str, list[Signal]], int]:
        """Return the kinds that say something token by token, and how many more there are.

        Of those with further axes the mean over them is shown, unless it is constant, as that of probabilities is, or
        of a graph memory cell, whose further axes are slots and channels.

        Args:
            most: So many are returned: those of one number a token first.
        """
        cells = {cell.path for cell in self.cells}
        shown = {
            kind: signals
            for kind, signals in self.kinds().items()
            if all(signal.along is not None for signal in signals)
            and any(_varies(signal) for signal in signals)
            and not any(len(signal.shape) > 2 and signal.name.rpartition(".")[0] in cells for signal in signals)
        }
        order = sorted(shown, key=lambda kind: len(shown[kind][0].shape) > 2)
        return {kind: shown[kind] for kind in order[:most]}, max(len(order) - most, 0)


def read_text(model: Any, tokens: Tensor, piece: int = PIECE) -> Reading:
    """Let a model read tokens once, in eval mode and without gradients.

    Args:
        model: With the interface of ``memzoo.arch.CausalLM``; its mode is as before afterwards.
        tokens: (time,), not more than the model's ``context`` if it has one.
        piece: Tokens a call; the state is carried from one to the next. A model with a ``context`` reads all in one.
    """
    piece = len(tokens) if context_of(model) else piece
    collected, state, training = _Collected(), None, model.training
    model.eval()
    try:
        with torch.no_grad():
            for part in tokens.split(piece):
                trace = Trace()
                _, state = model(part[None].to(next(model.parameters()).device), state, trace=trace)
                collected.add(trace.signals, len(part))
    finally:
        model.train(training)
    return Reading(tokens.cpu(), collected.signals(), collected.cells())


def context_of(model: Any) -> int | None:
    """Return the number of tokens that a model can read at most, None if there is no limit."""
    context: int | None = getattr(model, "context", None)
    return context


def block_of(name: str) -> str:
    """Return the numbers in a path, joined by dots: ``"3"`` of ``blocks.3.mixer.surprise``."""
    return ".".join(re.findall(r"(?<=\.)\d+(?=\.)", name))


def slot_rows(reading: Reading, decode: Callable[[list[int]], str], top: int = 8) -> list[dict[str, Any]]:
    """Return what every slot of every cell stands for: its share of the text and the tokens that choose it most.

    Args:
        reading: Of the text.
        decode: Text of a list of token ids.
        top: Tokens a slot.

    Returns:
        A dict a slot with ``block, slot, usage, tokens, target_usage, target_tokens``: usage is the mean probability,
        tokens are those whose likeliest source (target) it is, as ``'text' (id) count``.
    """
    rows: list[dict[str, Any]] = []
    for cell in reading.cells:
        columns = []
        for weights in (cell.source, cell.target):
            columns.append([f"{share:.6g}" for share in weights.mean(0).tolist()])
            table = slot_tokens(weights.argmax(-1), reading.tokens, cell.num_slots, top)
            words = [[f"{decode([token])!r} ({token}) {count}" for token, count in row] for row in table]
            columns.append(["; ".join(row) for row in words])
        for slot, (usage, chosen, target_usage, target_chosen) in enumerate(zip(*columns, strict=True)):
            rows.append(
                {
                    "block": cell.block,
                    "slot": slot,
                    "usage": usage,
                    "tokens": chosen,
                    "target_usage": target_usage,
                    "target_tokens": target_chosen,
                }
            )
    return rows


@dataclass(frozen=True)
class Plane:
    """The plane in which points spread most: their first two principal components.

    Attributes:
        centre: Mean of the points, (d,).
        axes: Directions, (2, d), each with its largest entry positive.
        shares: Part of the points' variance along each.
    """

    centre: Tensor
    axes: Tensor
    shares: tuple[float, float]

    @classmethod
    def of(cls, points: Tensor) -> Self:
        """Fit the plane to points (N, d), N and d at least 2."""
        points = points.double()
        centre = points.mean(0)
        _, spread, axes = torch.linalg.svd(points - centre, full_matrices=False)
        axes = axes[:2]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        variance = spread.square()
        first, second = (variance[:2] / variance.sum().clamp_min(1e-300)).tolist()
        return cls(centre, axes * largest.sign(), (first, second))

    def project(self, points: Tensor) -> Tensor:
        """Return where points (..., d) are in the plane, (..., 2)."""
        return (points.double() - self.centre) @ self.axes.mT


def spectral_order(weights: Tensor) -> Tensor:
    """Return an order of nodes in which those that are linked strongly are near one another.

    It is that of the second eigenvector of the normalised Laplacian, of links in either direction; a small weight
    between all nodes keeps those with hardly any from the ends.

    Args:
        weights: Of the links, (S, S), not negative; the diagonal plays no part.

    Returns:
        The nodes in their order, (S,).
    """
    links = (weights + weights.mT).double().fill_diagonal_(0)
    links = links + 0.01 * links.mean().clamp_min(1e-300)
    scale = links.sum(1).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * links * scale).eigenvectors
    place: Tensor = vectors[:, -2] * scale
    return (place * place[place.abs().argmax()].sign()).argsort()


class _Collected:
    """The signals of one call after the other, reduced to what a reading keeps."""

    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}
        self._moments: dict[str, list[Moments]] = {}
        self._along: dict[str, list[Tensor | None]] = {}
        self._kept: dict[str, list[Tensor]] = {}

    def add(self, signals: Mapping[str, Tensor], time: int) -> None:
        cells = set(_cell_paths(signals))
        for name, values in signals.items():
            values = values.cpu()
            self._shapes.setdefault(name, []).append(tuple(values.shape))
            self._moments.setdefault(name, []).append(Moments.of(values))
            of_tokens = values.shape[:2] == (1, time)
            along = values[0].double().reshape(time, -1).mean(1) if of_tokens else None
            self._along.setdefault(name, []).append(along)
            path, _, leaf = name.rpartition(".")
            if path in cells and leaf in (*OF_TOKENS, *OF_CELL):
                self._kept.setdefault(name, []).append(values)

    def signals(self) -> list[Signal]:
        return [self._signal(name) for name in self._shapes]

    def _signal(self, name: str) -> Signal:
        shape, along = self._shapes[name][-1], self._along[name]
        parts = [part for part in along if part is not None]
        moments = Moments.join(self._moments[name])
        if len(parts) < len(along):
            return Signal(name, shape, moments, None)
        text = torch.cat(parts)
        return Signal(name, (1, len(text), *shape[2:]), moments, text)

    def cells(self) -> list[GraphCell]:
        return [self._cell(path) for path in _cell_paths(self._shapes)]

    def _cell(self, path: str) -> GraphCell:
        parts = {part: torch.cat([piece[0] for piece in self._kept[f"{path}.{part}"]]) for part in OF_TOKENS}
        parts |= {part: self._kept[f"{path}.{part}"][-1] for part in OF_CELL}
        scalars = {
            name.rpartition(".")[2]: Moments.join(self._moments[name]).mean
            for name, shapes in self._shapes.items()
            if name.rpartition(".")[0] == path and shapes[-1] == ()
        }
        return GraphCell(path, scalars=scalars, **parts)


def _cell_paths(names: Collection[str]) -> list[str]:
    """Return the paths of the layers that report what a graph memory cell does."""
    paths = [name.removesuffix(".moves") for name in names if name.endswith(".moves")]
    return [path for path in paths if f"{path}.source_centre" in names]


def _varies(signal: Signal) -> bool:
    values = signal.along
    return values is not None and bool((values.amax() - values.amin()) > 1e-6 * values.abs().amax())
