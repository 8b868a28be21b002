"""What graph memory cells report: every quantity on a case that is worked out by hand."""

import math

import pytest
import torch

from memzoo.layers.graph_memory_signals import (
    coverage,
    effective_number,
    gini,
    off_diagonal_cosines,
    report_signals,
    row_entropy,
    slot_tokens,
    transition_counts,
)
from memzoo.layers.ops.graph_memory import GraphRouting, GraphTables, graph_memory, graph_tables
from memzoo.layers.trace import Trace


def close(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_entropy_is_of_the_last_axis_and_finite_where_probabilities_are_zero():
    rows = torch.stack((numbers(1, 0, 0, 0), numbers(0.5, 0.5, 0, 0), numbers(0.25, 0.25, 0.25, 0.25)))
    close(row_entropy(rows), [0, math.log(2), math.log(4)])


def test_the_effective_number_counts_equally_used_slots_whatever_the_scale():
    close(effective_number(numbers(3, 3, 0, 0)), 2)
    close(effective_number(torch.stack((numbers(1, 0, 0), numbers(1, 1, 1)))), [1, 3])
    # H = ln 4 - 3/4 ln 3, so exp(H) = 4 / 3**0.75
    close(effective_number(numbers(1, 3)), 4 / 3**0.75)


def test_gini_is_zero_for_equal_counts_and_most_where_one_slot_holds_all():
    close(gini(numbers(5, 5, 5, 5)), 0)
    close(gini(numbers(0, 0, 8, 0)), 3 / 4)
    # Mean absolute difference of (1, 3) is 1 over all four pairs, over twice the mean: 1 / 4.
    close(gini(torch.stack((numbers(1, 3), numbers(3, 1)))), [0.25, 0.25])


def test_off_diagonal_cosines_leave_the_diagonal_out_and_ignore_lengths():
    rows = torch.stack((numbers(2, 0), numbers(0, 5), numbers(-1, 0)))
    close(off_diagonal_cosines(rows), [[0, -1], [0, 0], [-1, 0]])


def test_coverage_is_the_mean_distance_to_the_nearest_other_centroid():
    root = math.sqrt(0.5)
    rows = torch.stack((numbers(1, 0), numbers(0, 3), numbers(1, 1)))  # each end is at 45 degrees from the third
    close(coverage(rows), 1 - root)


def test_transitions_count_tokens_by_their_likeliest_source_and_target():
    source = torch.eye(3)[torch.tensor([[0, 0, 2], [2, 1, 0]])]
    target = torch.eye(3)[torch.tensor([[1, 1, 2], [0, 0, 0]])]
    assert transition_counts(source, target).tolist() == [[1, 2, 0], [1, 0, 0], [1, 0, 1]]


def test_every_slot_names_the_tokens_that_choose_it_most():
    assignments = torch.tensor([[2, 0, 0, 2, 0, 0, 0]])
    tokens = torch.tensor([[7, 9, 4, 7, 4, 9, 5]])
    assert slot_tokens(assignments, tokens, 4, top=2) == [[(4, 2), (9, 2)], [], [(7, 2)], []]


@pytest.fixture
def case():
    """Three slots on the axes of the plane and four tokens, all probabilities set by hand."""
    source = torch.stack((numbers(0.5, 0.5, 0), numbers(1, 0, 0), numbers(1, 0, 0), numbers(0, 0.2, 0.8)))[None]
    target = torch.stack((numbers(0, 1, 0), numbers(0, 1, 0), numbers(0.6, 0, 0.4), numbers(0, 0, 1)))[None]
    slots = torch.stack((numbers(1, 0), numbers(0, 1), numbers(-1, 0)))
    edges = torch.stack((numbers(0, 1, 0), numbers(0.5, 0, 0.5), numbers(0.5, 0.5, 0)))
    routing = GraphRouting(source / 3, source, source @ edges, source * 2, target)
    tables = GraphTables(slots, torch.zeros(2, 6, dtype=torch.float64), edges)
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
    fifth = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    close(signals["source_entropy"], [[math.log(2), 0, 0, fifth]])
    close(signals["target_entropy"], [[0, 0, -0.6 * math.log(0.6) - 0.4 * math.log(0.4), 0]])


def test_what_is_of_the_text(case):
    signals = report(case)
    # Likeliest sources 0, 0, 0, 2 (the first of equals) and targets 1, 1, 0, 2.
    assert signals["transitions"].tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    close(signals["self_route"], 2 / 4)
    close(signals["argmax_effective"], 4 / 3**0.75)
    close(signals["argmax_gini"], (0 * -2 + 1 * 0 + 3 * 2) / (3 * 4))
    soft = [2.5 / 4, 0.7 / 4, 0.8 / 4]
    close(signals["batch_effective"], math.exp(-sum(p * math.log(p) for p in soft)))


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
    counted = {"transitions", "dead"}
    handed = {"usage", "usage_effective", "gate", "momentum", "temperature"}
    assert {value.dtype for name, value in signals.items() if name not in counted | handed} == {dtype}
    torch.testing.assert_close(signals["target_centre"], routing.target @ centroids)
    assert signals["transitions"].sum() == 10


def test_the_measures_that_are_losses_too_have_gradients():
    rows = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for function in (row_entropy, effective_number):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x.softmax(-1)), rows)
    assert torch.autograd.gradcheck(off_diagonal_cosines, rows)


def test_a_buffer_is_reported_as_it_was(case):
    usage, temperature, trace = numbers(0.5, 0.5, 0), numbers(0.1)[0], Trace()
    routing, tables, movement = case
    handed = dict(routing=routing, tables=tables, centroids=tables.centroids, movement=movement)
    report_signals(trace, **handed, usage=usage, temperature=temperature, gate=temperature, momentum=temperature)
    usage.zero_(), temperature.zero_()
    close(trace.signals["usage"], [0.5, 0.5, 0])
    close(trace.signals["temperature"], 0.1)
