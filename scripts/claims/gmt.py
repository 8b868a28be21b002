"""What the Graph Memory Transformer claims (arXiv 2604.23862), in miniature, and whether its graph is used."""

import math
import time
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from statistics import mean, median
from typing import Any, cast

import torch
from recall_training import fit
from torch import Tensor

from claims import Check, Claim, ClaimSet, Metrics, Results, Settings, at_least, at_most
from memzoo.arch import GPT, GraphMemoryTransformer
from memzoo.layers import FeedForward, GraphMemoryCell, Trace
from memzoo.layers.graph_memory_upkeep import commit, graph_memory_cells, maintain, set_temperature
from memzoo.layers.ops.graph_memory import GraphRouting, GraphTables
from memzoo.lit_modules.data import TextData
from memzoo.lit_modules.graph_memory import routing_temperature
from memzoo.lit_modules.objective import NextTokens

SLOTS = 32
MAINTAIN_EVERY = 110
Batches = Iterable[Mapping[str, Tensor]]


class BlindSource(GraphMemoryCell):
    """A cell that learns nothing through where its tokens are: no gradient passes the source's softmax."""

    def _route(self, x: Tensor, tables: GraphTables) -> GraphRouting:
        routing = super()._route(x, tables)
        source = routing.source.detach()
        prior = source @ tables.transitions
        return replace(routing, source=source, prior=prior, target=(prior + routing.scores).softmax(-1))


def measure(settings: Settings, seed: int) -> Metrics:
    """Train a model on text and test it, or time a channel layer."""
    torch.manual_seed(seed)
    return speed(settings) if "tokens" in settings else read(build(settings), settings, seed)


def build(settings: Settings) -> GPT:
    """Build the model of a run: with graph memory cells, or with feed-forwards of some width, 0 for none."""
    if "cell" not in settings:
        return GPT(**settings["sizes"], hidden_dim=settings["hidden_dim"])
    options = dict(num_slots=SLOTS, navigation_dim=SLOTS)
    model = GraphMemoryTransformer(**settings["sizes"], **options, cell=settings["cell"])
    if settings["blind"]:
        for block in cast(Any, model.blocks):
            block.ffn = BlindSource(model.dim, **options, **settings["cell"])
    return model


def read(model: GPT, settings: Settings, seed: int) -> Metrics:
    """Train a model on rows of text as the official code does, and return what it needs of held-out text and how."""
    steps, has_cells = settings["steps"], "cell" in settings
    data = TextData(
        sequence_length=settings["sizes"]["context"], batch_size=settings["rows"], pack_documents=False, seed=seed
    )
    generator, norms = torch.Generator().manual_seed(seed), []

    def after(step: int, trace: Trace, norm: float) -> None:
        norms.append(norm)
        if not has_cells:
            return
        commit(model, trace.statistics)
        if settings["maintained"] and step % MAINTAIN_EVERY == 0:
            maintain(model, trace.statistics, generator)
        set_temperature(model, routing_temperature(step / steps, *settings["temperatures"]))

    if has_cells:
        set_temperature(model, settings["temperatures"][0])
    batches = map(NextTokens.of, islice(data.train_dataloader(), steps))
    fit(model, batches, steps=steps, learning_rate=settings["learning_rate"], after=after)
    model.eval()
    held_out = list(islice(cast(Batches, data.val_dataloader()), settings["test_batches"]))
    metrics = {"gradient": median(norms[-max(steps // 5, 1) :])}
    if has_cells and settings["cell"].get("write_back") == "reference":
        metrics["loss, written"] = held_out_loss(deepcopy(model), held_out)
        for cell in graph_memory_cells(model).values():
            cell.write_back = "off"
    metrics["loss"] = held_out_loss(model, held_out)
    return metrics | looks(model, held_out) if has_cells else metrics


@torch.no_grad()
def held_out_loss(model: GPT, batches: Batches) -> float:
    """Return the mean loss in nats a byte."""
    losses = [batch.mean(batch.losses(model(batch.inputs)[0])) for batch in map(NextTokens.of, batches)]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def looks(model: GPT, batches: Batches) -> Metrics:
    """Return how the cells are used, on average over blocks, and by how much the loss rises without learned edges."""
    trace = Trace()
    model(NextTokens.of(next(iter(batches))).inputs, trace=trace)

    def of_blocks(name: str) -> list[float]:
        return [value.mean().item() for path, value in trace.signals.items() if path.endswith(f".{name}")]

    metrics = {
        "slots in use": mean(of_blocks("batch_effective")),
        "slots a token": mean(math.exp(entropy) for entropy in of_blocks("source_entropy")),
        "nearest": trace.signals["blocks.0.ffn.similarity"].amax(-1).mean().item(),
    }
    learned = held_out_loss(model, batches)
    for cell in graph_memory_cells(model).values():
        cell.edges.zero_()
    return metrics | {"worth of edges": held_out_loss(model, batches) - learned}


def speed(settings: Settings) -> Metrics:
    """Return the tokens a second of a channel layer's forward and backward pass."""
    dim, tokens = settings["dim"], settings["tokens"]
    layer = GraphMemoryCell(dim) if settings["layer"] == "cell" else FeedForward(dim)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    seconds = []
    for _ in range(settings["rounds"] + 2):
        began = time.perf_counter()
        trace = Trace(signals=False)
        y = layer(x, trace=trace)
        (y.sum() + sum(trace.losses.values())).backward()
        seconds.append(time.perf_counter() - began)
    return {"tokens a second": tokens / median(seconds[2:])}


def shorten(settings: Settings) -> Settings:
    """Leave a run two steps."""
    if "tokens" in settings:
        return settings | {"tokens": 8, "rounds": 1}
    return settings | {"steps": 2, "test_batches": 1}


# Settings

SIZES = dict(vocab_size=256, dim=96, depth=4, num_heads=4, context=64)
TRAINING: Settings = dict(sizes=SIZES, steps=500, rows=16, learning_rate=1e-3, test_batches=64)
ANNEALED, COLD = [1.0, 0.1], [0.1, 0.1]


def dense(hidden_dim: int) -> Settings:
    """Return the settings of a Transformer with a feed-forward of a width."""
    return TRAINING | {"hidden_dim": hidden_dim}


def gmt(
    temperatures: list[float] = ANNEALED, *, maintained: bool = False, blind: bool = False, **cell: Any
) -> Settings:
    """Return the settings of a Graph Memory Transformer with some options of its cells."""
    return TRAINING | dict(temperatures=temperatures, maintained=maintained, blind=blind, cell=cell)


def needs_less(better: str, worse: str, by: float = 0.0) -> Check:
    """One variant needs fewer nats than another, by more than so many, seed by seed."""
    more = f" by more than {by:g}" if by else ""
    return Check(
        f"{better} needs fewer nats a byte than {worse}{more}",
        lambda results: results[worse]["loss"] - results[better]["loss"] - by,
    )


def no_worse(variant: str, other: str, within: float) -> Check:
    """A variant needs no more nats than another, but for so many."""
    return Check(
        f"{variant} needs at most {within:g} nats a byte more than {other}",
        lambda results: within + results[other]["loss"] - results[variant]["loss"],
    )


def ratio(results: Results) -> float:
    """Return by how much a cell is faster than a feed-forward, less 1."""
    cell, dense = (results[name]["tokens a second"] for name in (CELL, FOURFOLD))
    return cell / dense - 1


LOSS = {"loss": "loss, nats a byte"}
ORDER = Claim(
    statement="A graph memory cell can take the place of every feed-forward; it is better than nothing, and a larger "
    "dense model is better",
    test="Byte-level models of Python's standard library: four blocks of width 96 with four heads, 64 bytes of "
    "context, 500 steps of 16 rows at 1e-3. Cells of 32 slots without write-back, temperature annealed from 1 to 0.1; "
    "feed-forwards of as many parameters (54 wide) and of four times the width.",
    variants={
        "attention only": dense(0),
        "GMT": gmt(),
        "feed-forward, as many parameters": dense(54),
        "feed-forward, fourfold": dense(384),
    },
    columns=LOSS,
    checks=(
        needs_less("GMT", "attention only"),
        needs_less("feed-forward, as many parameters", "GMT"),
        needs_less("feed-forward, fourfold", "feed-forward, as many parameters"),
    ),
)

OFF, OFFICIAL = "no write-back", "official"
BLIND, DIRECTION = "official, blind source", "directions written"
LOOKS = LOSS | {
    "gradient": "norm of the gradient",
    "slots in use": "slots in use",
    "slots a token": "slots a token",
    "worth of edges": "worth of edges, nats",
}
STABILITY = Claim(
    statement="Centroids are trained by gradient and by a write-back, while the temperature falls",
    test="As above. The official write-back, alone and with maintenance every 110 steps; at a temperature that stays "
    "at 1; after the optimiser's step, so without its wrong gradients; with cells whose source softmax passes no "
    "gradient (blind); with a floor of the distance of 0.7 in place of 0.01. Then one that writes the directions "
    "x / |x| that centroids are compared with, in place of block outputs: by itself, blind, and 30 times slower "
    "(momentum 0.9997). "
    "The norm of the gradient is the median of the last fifth of the steps, before it is clipped to 1. Nearest: cosine "
    "of a token and its nearest centroid in the first block. Losses are measured without writing; the official code "
    "goes on writing in evaluation, which its own rows have beside it.",
    variants={
        OFF: gmt(),
        OFFICIAL: gmt(write_back="reference"),
        "official, maintained": gmt(write_back="reference", maintained=True),
        "official, temperature 1": gmt([1.0, 1.0], write_back="reference"),
        "official, deferred": gmt(write_back="deferred"),
        BLIND: gmt(write_back="deferred", blind=True),
        "official, floor 0.7": gmt(write_back="deferred", distance_floor=0.7),
        DIRECTION: gmt(write_back="deferred", written="direction"),
        "directions written, blind source": gmt(write_back="deferred", written="direction", blind=True),
        "directions written, slowly": gmt(write_back="deferred", written="direction", momentum_init=8.0),
    },
    columns=LOSS | {"loss, written": "the same, written in evaluation"} | LOOKS | {"nearest": "nearest"},
    checks=(
        needs_less(OFF, OFFICIAL, 0.3),
        needs_less("official, temperature 1", OFFICIAL),
        needs_less(OFF, "official, deferred", 0.3),
        needs_less(BLIND, "official, deferred", 0.3),
        at_most(BLIND, ("gradient",), 2.0),
        at_least("official, deferred", ("gradient",), 2.0),
        Check(
            "what the official write-back writes does not draw the first block's centroids to their tokens: they are "
            "less near than where directions are written, by more than 0.3",
            lambda results: results[DIRECTION]["nearest"] - results[OFFICIAL]["nearest"] - 0.3,
        ),
        needs_less("directions written, slowly", DIRECTION, 0.3),
    ),
)

QUIET = -3.0
GRAPH: dict[str, Any] = dict(edge_mode="logprob", gate_init=QUIET)
WRITES: dict[str, Any] = dict(write_back="deferred", written="direction", momentum_init=6.5)
USED, OFF_QUIET = "graph in use", "no write-back, quiet gate"
USE = Claim(
    statement="Routing over the graph can be looked into",
    test="As above, whether there is anything to look at. Slots in use: exp of the entropy of the mean source, of 32. "
    "Slots a token: exp of the mean entropy of a token's source. Worth of edges: by how much the loss rises when E is "
    'set to 0. "Graph in use" adds the logarithm of the prior, writes directions with a momentum of 0.9985, keeps the '
    "temperature at 0.1, and starts with a quiet gate of sigmoid(-3); then without one of these each. Its gate and "
    "momentum were chosen among eight pairs, by trial with these seeds.",
    variants={
        OFF: gmt(),
        OFF_QUIET: gmt(gate_init=QUIET),
        USED: gmt(COLD, **GRAPH, **WRITES),
        "its prior as a probability": gmt(COLD, gate_init=QUIET, **WRITES),
        "its gate from 1": gmt(COLD, edge_mode="logprob", **WRITES),
        "annealed": gmt(**GRAPH, **WRITES),
        "without its write-back": gmt(COLD, **GRAPH),
    },
    columns=LOOKS,
    checks=(
        at_most(USED, ("slots in use",), SLOTS / 2),
        no_worse(USED, OFF, 0.01),
        no_worse(USED, OFF_QUIET, 0.01),
        at_least(USED, ("worth of edges",), 0.01),
        at_most(OFF, ("worth of edges",), 0.01),
    ),
)

CELL, FOURFOLD = "cell, 128 slots", "feed-forward, fourfold"
TIMED: Settings = dict(dim=768, tokens=2048, rounds=9)
SPEED = Claim(
    statement="1/15 of the parameters and of the arithmetic of a fourfold feed-forward",
    test="Forward and backward pass of 2048 tokens of width 768 in float32 on one thread, the cell with its losses and "
    "statistics.",
    variants={CELL: TIMED | {"layer": "cell"}, FOURFOLD: TIMED | {"layer": "feed_forward"}},
    columns={"tokens a second": "tokens a second"},
    checks=(Check("a cell is not slower than the feed-forward (margin: ratio less 1)", ratio),),
    alone=True,
)

CLAIMS = ClaimSet(
    paper="Graph Memory Transformer, arXiv 2604.23862",
    measure=measure,
    shorten=shorten,
    claims={"order": ORDER, "stability": STABILITY, "use": USE, "speed": SPEED},
)
