"""What graph memory cells report: every signal on a case that is worked out by hand."""

import math
from dataclasses import fields, replace

import pytest
import torch

from memzoo.layers.graph_memory_signals import report_signals
from memzoo.layers.ops.graph_memory import GraphRouting, graph_memory, graph_tables
from memzoo.layers.trace import Trace

OF_THE_TEXT = {
    "moves",
    "soft_moves",
    "batch_effective",
    "mutual_information",
    "self_route",
    "argmax_effective",
    "argmax_gini",
}


def close(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def case():
    """Three slots on the axes of the plane and four tokens, all probabilities set by hand."""
    source = torch.stack((numbers(0.5, 0.5, 0), numbers(1, 0, 0), numbers(1, 0, 0), numbers(0, 0.2, 0.8)))[None]
    target = torch.stack((numbers(0, 1, 0), numbers(0, 1, 0), numbers(0.6, 0, 0.4), numbers(0, 0, 1)))[None]
    slots = torch.stack((numbers(1, 0), numbers(0, 1), numbers(-1, 0)))
    edges = torch.stack((numbers(0, 1, 0), numbers(0.5, 0, 0.5), numbers(0.5, 0.5, 0)))
    routing = GraphRouting(source / 3, source, source @ edges, source * 2, target)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    tables = replace(graph_tables(slots, edges, zero, zero), transitions=edges)
    return routing, tables, (target - source) @ slots


def report(case, **options) -> dict:
    routing, tables, movement = case
    trace = Trace()
    report_signals(
        trace.scope("cell"),
        routing=routing,
        tables=tables,
        centroids=4 * tables.centroids,
        usage=numbers(0.5, 0.4999, 0.0001),
        gate=numbers(0.7)[0],
        momentum=numbers(0.9)[0],
        temperature=numbers(0.1)[0],
        movement=movement,
        **options,
    )
    return {name.removeprefix("cell."): value for name, value in trace.signals.items()}


def test_what_is_of_every_token(case):
    signals, (routing, tables, movement) = report(case), case
    for name in ("similarity", "source", "prior", "target"):
        assert torch.equal(signals[name], getattr(routing, name))
    close(signals["source_centre"], [[[0.5, 0.5], [1, 0], [1, 0], [-0.8, 0.2]]])
    close(signals["target_centre"], [[[0, 1], [0, 1], [0.2, 0], [-1, 0]]])
    assert torch.equal(signals["movement"], movement)
    assert torch.equal(signals["slots"], tables.centroids)
    assert torch.equal(signals["edges"], tables.transitions)
    fifth = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    close(signals["source_entropy"], [[math.log(2), 0, 0, fifth]])
    close(signals["target_entropy"], [[0, 0, -0.6 * math.log(0.6) - 0.4 * math.log(0.4), 0]])


def test_what_is_of_the_text(case):
    signals = report(case)
    # Likeliest sources 0, 0, 0, 2 (the first of equals) and targets 1, 1, 0, 2.
    assert signals["moves"].tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    close(signals["self_route"], 2 / 4)
    close(signals["argmax_effective"], 4 / 3**0.75)
    close(signals["argmax_gini"], (0 * -2 + 1 * 0 + 3 * 2) / (3 * 4))
    soft = [2.5 / 4, 0.7 / 4, 0.8 / 4]
    entropy = -sum(p * math.log(p) for p in soft)
    close(signals["batch_effective"], math.exp(entropy))
    fifth = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    close(signals["mutual_information"], entropy - (math.log(2) + fifth) / 4)
    close(signals["soft_moves"], [[0.15, 0.375, 0.1], [0, 0.125, 0.05], [0, 0, 0.2]])


def test_what_is_of_the_text_is_of_its_real_tokens(case):
    routing, tables, movement = case
    mask = torch.tensor([[True, False, True, True]])
    real = GraphRouting(*(getattr(routing, field.name)[:, mask[0]] for field in fields(routing)))
    masked, alone = report(case, mask=mask), report((real, tables, movement[:, mask[0]]))
    for name in OF_THE_TEXT:
        torch.testing.assert_close(masked[name], alone[name])
    whole = report(case)
    assert all(torch.equal(masked[name], whole[name]) for name in whole.keys() - OF_THE_TEXT)
    assert masked["moves"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_of_a_text_without_a_real_token_nothing_is_said(case):
    signals = report(case, mask=torch.zeros(1, 4, dtype=torch.bool))
    assert signals["moves"].sum() == 0
    assert all(signals[name].isnan().all() for name in OF_THE_TEXT - {"moves"})


def test_what_is_of_the_cell(case):
    signals = report(case)
    usage = (0.5, 0.4999, 0.0001)
    close(signals["usage"], list(usage))
    close(signals["usage_effective"], math.exp(-sum(p * math.log(p) for p in usage)))
    assert (signals["dead"], report(case, dead_usage=0.4999)["dead"], report(case, dead_usage=0.5)["dead"]) == (1, 1, 2)
    close(signals["centroid_cosine"], -1 / 3)
    close(signals["coverage"], 1.0)  # the nearest of each is at a right angle
    close(signals["edge_entropy"], 2 / 3 * math.log(2))
    close(signals["edge_peak"], 2 / 3)
    ten, half = 1 / math.sqrt(2), 1 / 2  # rows (0,1,0), (.5,0,.5), (.5,.5,0): cosines 0, 1/sqrt 2, 1/2
    close(signals["edge_cosine"], (0 + ten + half) / 3)
    for name, value in (("gate", 0.7), ("momentum", 0.9), ("temperature", 0.1)):
        close(signals[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_the_routing_is_kept(dtype):
    draw = torch.Generator().manual_seed(0)
    x, centroids, edges, query, key = (
        torch.randn(*shape, generator=draw, dtype=dtype) for shape in ((2, 5, 6), (4, 6), (4, 4), (3, 6), (3, 6))
    )
    movement, routing = graph_memory(x, centroids, edges, query, key, 0.5)
    signals = report((routing, graph_tables(centroids, edges, query, key), movement))
    counted = {"moves", "dead"}
    handed = {"usage", "usage_effective", "gate", "momentum", "temperature"}
    assert {value.dtype for name, value in signals.items() if name not in counted | handed} == {dtype}
    torch.testing.assert_close(signals["target_centre"], routing.target @ centroids)
    assert signals["moves"].sum() == 10


def test_a_buffer_is_reported_as_it_was(case):
    usage, temperature, trace = numbers(0.5, 0.5, 0), numbers(0.1)[0], Trace()
    routing, tables, movement = case
    handed = dict(routing=routing, tables=tables, centroids=tables.centroids, movement=movement)
    report_signals(trace, **handed, usage=usage, temperature=temperature, gate=temperature, momentum=temperature)
    usage.zero_(), temperature.zero_()
    close(trace.signals["usage"], [0.5, 0.5, 0])
    close(trace.signals["temperature"], 0.1)
