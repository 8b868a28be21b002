"""The five auxiliary losses of a graph memory cell: the spec's section 5, and check 15 of its section 16."""

import math

import pytest
import torch

from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.trace import Trace
from tests.layers.graph_memory_cases import (
    DIM,
    LOSSES,
    SLOTS,
    assert_close,
    build,
    gradients_of,
    randn,
    route_by_loop,
    run,
    sequence,
)


def test_15_the_losses_are_their_formulas():
    cell, x, stream = (
        build(loss_weights=dict.fromkeys(LOSSES, 1.0), edge_entropy_floor=1.3),
        sequence(),
        sequence(seed=2),
    )
    y, trace = run(cell, x, stream)
    _, routing = route_by_loop(cell, x)
    centroids, transitions = cell.centroid_norm(cell.centroids), cell.tables().transitions
    pairs = [(i, j) for i in range(SLOTS) for j in range(SLOTS) if i != j]

    def cosines(rows):
        return torch.stack([rows[i] @ rows[j] / rows[i].norm() / rows[j].norm() for i, j in pairs])

    def entropy(p):
        return -(p * (p + 1e-8).log()).sum(-1)

    usage = routing.source.mean((0, 1))
    error = (stream + y).detach() - routing.source @ centroids
    expected = {
        "track": (1 - cell.momentum.sigmoid()[0]) * error.square().mean(),
        "ortho": cosines(cell.centroids).square().mean(),
        "cluster": (SLOTS / 4 / entropy(usage / usage.sum()).exp().clamp(min=1) - 1).clamp(min=0),
        "edge": (1.3 - entropy(transitions)).clamp(min=0).mean(),
        "contrast": cosines(transitions).mean(),
    }
    assert_close(trace.losses, expected, 1e-7)
    assert expected["edge"] > 0.01
    for name, loss in expected.items():
        assert_close(gradients_of(cell, trace.losses[name]), gradients_of(cell, loss), 1e-7)


def test_15_every_loss_has_its_weight():
    cell, x = build(edge_entropy_floor=1.3, usage_target=SLOTS), sequence()
    plain = run(build(edge_entropy_floor=1.3, usage_target=SLOTS, loss_weights=dict.fromkeys(LOSSES, 1.0)), x)[1].losses
    assert_close(run(cell, x)[1].losses, {name: LOSSES[name] * loss for name, loss in plain.items()})
    one = build(edge_entropy_floor=1.3, usage_target=SLOTS, loss_weights={"ortho": 3.0})
    assert_close(run(one, x)[1].losses, {n: (LOSSES | {"ortho": 3.0})[n] * loss for n, loss in plain.items()})
    assert min(plain.values()) > 1e-3


def test_15_cluster_is_zero_at_uniform_usage_and_grows_as_slots_fall_idle():
    x = sequence()
    uniform = build(temperature=1e9, usage_target=SLOTS, loss_weights={"cluster": 1.0})
    assert run(uniform, x)[1].losses["cluster"].item() == pytest.approx(0.0, abs=1e-6)
    alone = build(temperature=0.01, usage_target=SLOTS, loss_weights={"cluster": 1.0})
    at_one = alone.centroid_norm(alone.centroids)[2].detach().expand(2, 3, DIM)
    assert run(alone, at_one)[1].losses["cluster"].item() == pytest.approx(SLOTS - 1, abs=1e-4)


@pytest.mark.parametrize("slots", [3, 5, 9])
def test_15_edge_and_contrast_of_even_edges(slots):
    for floor in (0.5, 4.0):
        cell = build(num_slots=slots, edge_entropy_floor=floor, loss_weights={"edge": 1.0, "contrast": 1.0})
        with torch.no_grad():
            cell.edges.zero_()
        losses = run(cell, sequence())[1].losses
        assert losses["edge"].item() == pytest.approx(max(0.0, floor - math.log(slots - 1)), abs=1e-6)
        assert losses["contrast"].item() == pytest.approx((slots - 2) / (slots - 1), abs=1e-12)


def test_15_ortho_of_orthonormal_centroids_is_zero_whatever_their_norm_makes_of_them():
    cell = build(loss_weights={"ortho": 1.0})
    with torch.no_grad():
        cell.centroids.copy_(torch.linalg.qr(randn(DIM, DIM))[0][:SLOTS])
    assert run(cell, sequence())[1].losses["ortho"].item() == pytest.approx(0.0, abs=1e-28)
    with torch.no_grad():
        cell.centroids.copy_(cell.centroids[:1].expand(SLOTS, DIM))
    assert run(cell, sequence())[1].losses["ortho"].item() == pytest.approx(1.0)


def test_15_track_does_not_move_the_stream_and_nothing_else_moves_the_momentum():
    cell, stream = build(edge_entropy_floor=1.3, usage_target=SLOTS), sequence(seed=2).requires_grad_()
    y, trace = run(cell, sequence(), stream)
    losses = trace.losses
    assert torch.autograd.grad(losses["track"], stream, allow_unused=True, retain_graph=True) == (None,)
    track = gradients_of(cell, losses["track"])
    assert track["momentum"].abs() > 1e-4
    for name in ("movement_norm.weight", "movement_norm.bias", "gate", "edges", "query.weight"):
        assert not track[name].any()
    for value in (y.square().sum(), *(loss for name, loss in losses.items() if name != "track")):
        assert gradients_of(cell, value)["momentum"] == 0


def test_15_the_losses_of_a_model_are_the_mean_over_its_cells():
    cells, x, trace = [build(seed=seed, edge_entropy_floor=1.3) for seed in (0, 1)], sequence(), Trace()
    for number, cell in enumerate(cells):
        cell(x, trace=trace.scope(f"blocks.{number}.ffn"))
    alone = [run(cell, x)[1].losses for cell in cells]
    assert_close(trace.losses, {name: (alone[0][name] + alone[1][name]) / 2 for name in LOSSES}, 1e-14)


def test_15_defaults_of_the_targets():
    with torch.device("meta"):
        official, small, two = (GraphMemoryCell(8, num_slots=slots, navigation_dim=2) for slots in (128, 32, 2))
    assert (official.edge_entropy_floor, official.usage_target) == (4.0, 32.0)
    assert small.edge_entropy_floor == pytest.approx(4.0 * math.log(31) / math.log(127))
    assert (small.usage_target, two.edge_entropy_floor) == (8.0, 0.0)
