"""GraphMemoryCell: the cell of the Graph Memory Transformer; numbers are those of the spec, section 16."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memzoo.arch.block import Block
from memzoo.layers import Attention, create_layer
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.trace import Trace
from tests.layers.graph_memory_cases import (
    DIM,
    NAVIGATION,
    ROUTES,
    SLOTS,
    assert_close,
    build,
    few_cases,
    gradients_of,
    randn,
    route_by_loop,
    run,
    sequence,
)

PARAMETERS = {
    "centroids": (SLOTS, DIM),
    "edges": (SLOTS, SLOTS),
    "query.weight": (NAVIGATION, DIM),
    "key.weight": (NAVIGATION, DIM),
    "gate": (1,),
    "momentum": (1,),
    "centroid_norm.weight": (DIM,),
    "centroid_norm.bias": (DIM,),
    "movement_norm.weight": (DIM,),
    "movement_norm.bias": (DIM,),
}
BUFFERS = {"temperature": (), "usage": (SLOTS,), "age": (SLOTS,)}


@pytest.mark.parametrize(("edge_mode", "hops"), [("prob", 1), ("logprob", 1), ("prob", 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_it_is_the_equations_between_two_norms(edge_mode, hops, temperature):
    cell = build(edge_mode=edge_mode, hops=hops, temperature=temperature, distance_floor=0.03)
    x = sequence()
    y, routing = route_by_loop(cell, x, edge_mode=edge_mode, hops=hops, distance_floor=0.03)
    assert_close(cell(x), y)
    assert_close(cell.route(x), routing)
    value = randn(*y.shape)
    assert_close(gradients_of(cell, (cell(x) * value).sum()), gradients_of(cell, (y * value).sum()))
    assert_close(cell.eval()(x), y)


def test_a_gate_for_every_channel_is_an_option():
    cell = build(channel_gate=True)
    assert cell.gate.shape == (DIM,)
    assert_close(cell(sequence()), route_by_loop(cell, sequence())[0])


def test_it_starts_as_the_official_code():
    torch.manual_seed(0)
    cell = GraphMemoryCell(64, num_slots=100, navigation_dim=100)
    assert_close(cell.centroids.norm(dim=-1), torch.ones(100), 1e-6)
    assert abs(cell.edges.std() - 1) < 0.05
    assert abs(cell.edges.mean()) < 0.05
    for projection in (cell.query, cell.key):
        assert isinstance(projection, nn.Linear)
        assert abs(projection.weight.std() - 0.02) < 0.001
    assert (cell.gate.item(), cell.momentum.item()) == pytest.approx((1.0, 4.6))
    for norm in (cell.centroid_norm, cell.movement_norm):
        assert isinstance(norm, nn.LayerNorm)
        assert norm.eps == 1e-5
        assert torch.equal(norm.weight, torch.ones(64))
        assert torch.equal(norm.bias, torch.zeros(64))
    assert_close(cell.usage, torch.full((100,), 0.01), 1e-9)
    assert torch.equal(cell.age, torch.zeros(100))
    assert cell.temperature.item() == 1.0
    assert (cell.edge_entropy_floor, cell.usage_target) == pytest.approx((4.0 * math.log(99) / math.log(127), 25.0))


def test_it_is_registered():
    cell = create_layer("graph_memory_cell", DIM, num_slots=3, navigation_dim=2)
    assert isinstance(cell, GraphMemoryCell)
    assert cell.takes_residual


@pytest.mark.parametrize(
    ("dim", "slots", "navigation", "expected"), [(768, 128, 128, 314_370), (6, 5, 4, 129), (2, 2, 1, 22)]
)
def test_01_parameters_of_a_cell(dim, slots, navigation, expected):
    with torch.device("meta"):
        cell = GraphMemoryCell(dim, num_slots=slots, navigation_dim=navigation)
    count = sum(parameter.numel() for parameter in cell.parameters())
    assert count == expected == slots * dim + slots**2 + 2 * dim * navigation + 4 * dim + 2


def test_01_the_state_dict_is_parameters_and_three_buffers():
    cell = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in cell.state_dict().items()}
    assert shapes == PARAMETERS | BUFFERS
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == PARAMETERS


def test_02_a_closed_gate_leaves_a_block_its_attention():
    torch.manual_seed(0)
    block = Block(Attention(DIM, num_heads=1), build(gate_init=-math.inf, dtype=torch.float32))
    x = sequence(dtype=torch.float32)
    y, _ = block(x)
    assert torch.equal(y, x + block.mixer(block.mixer_norm(x))[0])
    assert not torch.equal(y, x)


def test_02_a_block_adds_the_cell_and_shows_it_the_stream():
    torch.manual_seed(0)
    block = Block(Attention(DIM, num_heads=1), build(write_back="deferred")).double()
    x, trace = sequence(), Trace()
    y, _ = block(x, trace=trace)
    h = x + block.mixer(block.mixer_norm(x))[0]
    assert_close(y, h + block.ffn(block.ffn_norm(h)))
    assert_close(trace.statistics["ffn.write_sums"].sum(0), y.sum((0, 1)))


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.1, 1.0]))
@few_cases
def test_03_distributions_are_distributions(seed, temperature):
    cell = build(dtype=torch.float32, temperature=temperature)
    routing, tables = cell.route(sequence(seed=seed, dtype=torch.float32)), cell.tables()
    for probabilities in (routing.source, routing.prior, routing.target, tables.transitions):
        assert (probabilities >= 0).all()
        assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]), 1e-6)
    assert torch.equal(tables.transitions.diagonal(), torch.zeros(SLOTS))


@given(order=st.permutations(range(SLOTS)))
@few_cases
def test_04_the_order_of_the_slots_has_no_meaning(order):
    cell, x = build(), sequence()
    other = copy.deepcopy(cell)
    with torch.no_grad():
        other.centroids.copy_(cell.centroids[order])
        other.edges.copy_(cell.edges[order][:, order])
    (y, trace), (z, other_trace) = run(cell, x), run(other, x)
    assert_close(z, y)
    routing, other_routing = cell.route(x), other.route(x)
    for name in ROUTES:
        assert_close(getattr(other_routing, name), getattr(routing, name)[..., order])
    assert_close(other_trace.losses, trace.losses)
    assert_close(other_trace.statistics["source_mass"], trace.statistics["source_mass"][order])


def test_04_centroids_without_their_edges_are_another_graph():
    cell, x = build(), sequence()
    y = cell(x)
    with torch.no_grad():
        cell.centroids.copy_(cell.centroids.roll(1, 0))
    assert (cell(x) - y).abs().max() > 1e-2


def test_05_the_source_knows_directions_and_the_target_lengths_too():
    cell, x = build(dtype=torch.float32), sequence(dtype=torch.float32)
    once, thrice = cell.route(x), cell.route(3 * x)
    assert_close(thrice.source, once.source, 1e-6)
    assert (thrice.target - once.target).abs().max() > 1e-2


def test_06_the_prior_moves_log_odds_by_at_most_one():
    cell = build(temperature=0.1)
    with torch.no_grad():
        cell.edges.mul_(30)
    routing = cell.route(sequence(time=50))
    change = routing.target.log() - routing.scores
    widest = (change.amax(-1) - change.amin(-1)).max()
    assert 0.5 < widest <= 1 + 1e-12


def test_07_a_hot_source_is_uniform():
    source = build(temperature=1e9).route(sequence()).source
    assert_close(source, torch.full_like(source, 1 / SLOTS), 1e-8)


def test_07_at_a_centroid_the_logit_is_one_over_floor_and_temperature():
    cell = build(temperature=2.0, distance_floor=0.1)
    centroids = cell.centroid_norm(cell.centroids).detach()
    routing = cell.route(5 * centroids[None, 3:4])
    logits = routing.source.log()[0, 0]
    others = 1 / (1 - routing.similarity[0, 0]) / 2
    assert routing.similarity[0, 0, 3].item() == pytest.approx(1.0)
    assert_close(logits[3] - logits[:3], 1 / (0.1 * 2) - others[:3])


def test_08_without_queries_and_edges_a_token_leaves_for_any_other_slot():
    cell = build()
    with torch.no_grad():
        cell.query.weight.zero_()
        cell.edges.zero_()
    routing = cell.route(sequence())
    assert_close(routing.prior, (1 - routing.source) / (SLOTS - 1), 1e-14)
    assert_close(routing.target, routing.prior.softmax(-1), 1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_09_a_token_changes_its_own_output_alone(training):
    cell, x = build(dtype=torch.float32).train(training), sequence(dtype=torch.float32)
    changed = x.clone()
    changed[1, 4] += 1
    different = (cell(x) != cell(changed)).any(-1)
    assert different.nonzero().tolist() == [[1, 4]]


def test_10_the_tables_give_what_the_separate_products_give():
    cell, x = build(dtype=torch.float32), sequence(dtype=torch.float32)
    routing, tables = cell.route(x), cell.tables()
    centroids = cell.centroid_norm(cell.centroids)
    assert_close(tables.centroids, centroids, 1e-6)
    scores = cell.query(x) @ cell.key(centroids).T / NAVIGATION**0.5
    assert_close(x @ tables.projection[:, SLOTS:], scores, 1e-4)
    assert_close(routing.scores, scores, 1e-4)
    movement = routing.target @ centroids - routing.source @ centroids
    assert_close((routing.target - routing.source) @ tables.centroids, movement, 1e-5)
    assert_close(cell(x), cell.gate.sigmoid() * cell.movement_norm(movement), 1e-3)


def test_11_equal_centroids_leave_nowhere_to_go():
    cell = build(dtype=torch.float32)
    with torch.no_grad():
        cell.centroids.copy_(cell.centroids[:1].expand(SLOTS, DIM))
    y = cell(sequence(dtype=torch.float32))
    assert_close(y, (cell.gate.sigmoid() * cell.movement_norm.bias).expand_as(y), 1e-2)


def test_bfloat16_autocast_is_routed_in_float32():
    """The norms and products around the routing may be narrow; what the tokens are compared with is not."""
    cell, x = build(dtype=torch.float32, temperature=0.1), sequence(dtype=torch.float32)
    expected = cell.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual, y = cell.route(x), cell(x)
        narrow = cell(x.bfloat16())
    assert_close(actual, expected, 1e-6)
    assert_close(y.float(), cell(x), 0.02)
    assert_close(narrow.float(), cell(x.bfloat16().float()), 0.02)


def test_losses_and_signals_do_not_depend_on_autocast():
    cell, x = build(dtype=torch.float32, edge_entropy_floor=1.3, usage_target=SLOTS), sequence(dtype=torch.float32)
    expected, actual = Trace(), Trace()
    cell(x, trace=expected)
    with torch.autocast("cpu", torch.bfloat16):
        cell(x, trace=actual)
    assert_close(actual.losses, expected.losses, 1e-5)
    assert_close(actual.signals, expected.signals, 1e-4)
    assert_close(actual.statistics, expected.statistics, 1e-4)


def test_it_runs_on_the_meta_device():
    with torch.device("meta"):
        y = GraphMemoryCell(DIM, num_slots=SLOTS, navigation_dim=NAVIGATION)(torch.empty(2, 3, DIM))
    assert (y.device.type, y.shape) == ("meta", (2, 3, DIM))


def test_short_tokens_have_a_direction_too():
    cell, x = build(), 1e-5 * sequence()
    assert_close(cell.route(x).source, cell.route(1e5 * x).source)


def test_a_bfloat16_cell_keeps_its_running_means_and_its_momentum_apart_from_one():
    """In bfloat16 sigmoid(6.5) is 1: nothing would be written or tracked."""
    cell = build(dtype=torch.float32, write_back="deferred", momentum_init=6.5)
    cell.usage.copy_(torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3]))
    cell.temperature.fill_(0.1)
    half = copy.deepcopy(cell).to(torch.bfloat16)
    assert_close([half.usage, half.temperature], [cell.usage, cell.temperature], 0)
    assert half.double().usage.dtype == torch.float64
    half = half.to(torch.bfloat16)
    losses = run(half, sequence(dtype=torch.bfloat16))[1].losses
    with torch.no_grad():
        half.momentum.fill_(6.5)
    assert run(half, sequence(dtype=torch.bfloat16))[1].losses["track"] > 0
    assert losses["track"] > 0


def test_a_bfloat16_cell_trains():
    cell = build(dtype=torch.bfloat16, write_back="deferred")
    y, trace = run(cell, sequence(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert all(tensor.dtype != torch.bfloat16 for name, tensor in trace.statistics.items() if name.startswith("write"))
    gradients = gradients_of(cell, y.float().square().sum() + sum(trace.losses.values()))
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 6.0}, "dim=6.0"),
        ({"num_slots": 1}, "num_slots=1"),
        ({"num_slots": 0}, "num_slots=0"),
        ({"navigation_dim": 0}, "navigation_dim=0"),
        ({"distance_floor": 0.0}, "distance_floor=0.0"),
        ({"distance_floor": -0.1}, "distance_floor=-0.1"),
        ({"distance_floor": math.nan}, "distance_floor=nan"),
        ({"edge_mode": "logits"}, "edge_mode='logits'"),
        ({"hops": 0}, "hops=0"),
        ({"hops": 1.5}, "hops=1.5"),
        ({"write_back": "on"}, "write_back='on'"),
        ({"write_back": True}, "write_back=True"),
        ({"write_back": "deferred", "written": "movement"}, "written='movement'"),
        ({"write_back": "off", "written": "direction"}, "written='direction'"),
        ({"write_back": "reference", "written": "direction"}, "written='direction'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"gate_init": math.nan}, "gate_init=nan"),
        ({"momentum_init": math.nan}, "momentum_init=nan"),
        ({"edge_entropy_floor": -1.0}, "edge_entropy_floor=-1.0"),
        ({"usage_target": -1.0}, "usage_target=-1.0"),
        ({"loss_weights": {"balance": 1.0}}, "balance"),
        ({"loss_weights": {"ortho": -1.0}}, "ortho"),
        ({"loss_weights": {"ortho": math.nan}}, "ortho"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    with pytest.raises(ValueError, match=words):
        GraphMemoryCell(**{"dim": DIM, "num_slots": SLOTS, "navigation_dim": NAVIGATION} | options)


@pytest.mark.parametrize(
    ("x", "residual", "words"),
    [
        (torch.zeros(2, 3, DIM + 1), None, "x has shape"),
        (torch.zeros(2, DIM), None, "x has shape"),
        (torch.zeros(2, 0, DIM), None, "no tokens"),
        (torch.zeros(2, 3, DIM, dtype=torch.long), None, "x has dtype torch.int64"),
        (torch.zeros(2, 3, DIM, dtype=torch.float64), None, "x has dtype torch.float64"),
        (torch.zeros(2, 3, DIM), torch.zeros(2, 4, DIM), "residual has shape"),
        (torch.zeros(2, 3, DIM), torch.zeros(1, 3, DIM), "residual has shape"),
        (torch.zeros(2, 3, DIM), torch.zeros(2, 3, 1), "residual has shape"),
    ],
)
def test_bad_inputs_are_refused(x, residual, words):
    with pytest.raises(ValueError, match=words):
        build(dtype=torch.float32)(x, residual=residual)


def test_a_bad_input_to_route_is_refused():
    with pytest.raises(ValueError, match="x has shape"):
        build(dtype=torch.float32).route(torch.zeros(2, 3, DIM + 1))
