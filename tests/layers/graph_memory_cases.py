"""Inputs, cells and the equations of their surroundings, for the tests of GraphMemoryCell and its op."""

from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.ops.graph_memory import GraphRouting
from memzoo.layers.reference.graph_memory import graph_memory as loop
from memzoo.layers.trace import Trace

DIM, SLOTS, NAVIGATION = 6, 5, 4
LOSSES = {"track": 1.0, "ortho": 0.05, "cluster": 0.3, "edge": 0.1, "contrast": 0.5}
ROUTES = ("similarity", "source", "prior", "scores", "target")
few_cases = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sequence(*, time: int = 7, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(2, time, DIM, seed=seed, dtype=dtype)


def make_case(batch: int = 2, time: int = 3, slots: int = SLOTS, seed: int = 0) -> dict[str, Tensor]:
    """What the op is given: random tensors in float64."""
    shapes = {
        "x": (batch, time, DIM),
        "centroids": (slots, DIM),
        "edges": (slots, slots),
        "query": (NAVIGATION, DIM),
        "key": (NAVIGATION, DIM),
    }
    return {name: randn(*shape, seed=10 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def build(seed: int = 0, *, dtype: torch.dtype = torch.float64, **options: Any) -> GraphMemoryCell:
    """A small cell whose every parameter is random: rows of unequal length, norms that scale and shift."""
    torch.manual_seed(seed)
    cell = GraphMemoryCell(
        DIM, **dict(num_slots=SLOTS, navigation_dim=NAVIGATION, momentum_init=1.0) | options
    ).double()
    with torch.no_grad():
        for number, parameter in enumerate(cell.parameters()):
            parameter += 0.3 * randn(*parameter.shape, seed=100 * seed + number)
    return cell.to(dtype)


def route_by_loop(cell: GraphMemoryCell, x: Tensor, **options: Any) -> tuple[Tensor, GraphRouting]:
    """What the equations make of the cell's parameters: y and the routing."""
    centroids = F.layer_norm(cell.centroids, (cell.centroids.shape[1],), *cell.centroid_norm.parameters())
    weights = (centroids, cell.edges, cell.query.weight, cell.key.weight)
    movement, routing = loop(x, *weights, float(cell.temperature), **options)
    return cell.gate.sigmoid() * F.layer_norm(movement, x.shape[-1:], *cell.movement_norm.parameters()), routing


def run(cell: GraphMemoryCell, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Trace]:
    trace = Trace(signals=False)
    return cell(x, residual=residual, trace=trace), trace


def statistics_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    trace = Trace(signals=False)
    model(x, trace=trace)
    return trace.statistics


def buffers_of(cell: GraphMemoryCell) -> dict[str, Tensor]:
    """What write-back, maintenance and commits change."""
    return {name: getattr(cell, name).detach().clone() for name in ("centroids", "usage", "age")}


def gradients_of(cell: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, zeros for those that ``value`` does not depend on; the graph is kept."""
    names, parameters = zip(*cell.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


def written(cell: GraphMemoryCell, out: Tensor, source: Tensor) -> dict[str, Tensor]:
    """Centroids, usage and ages after one write of the block's output ``out`` (batch, time, dim), in plain loops."""
    m, old = cell.momentum.sigmoid().item(), cell.centroids.detach()
    states, weights = out.detach().reshape(-1, old.shape[1]), source.detach().reshape(-1, len(old))
    members: list[list[Tensor]] = [[] for _ in old]
    for state, weight in zip(states, weights, strict=True):
        members[max(range(len(old)), key=lambda k, w=weight: float(w[k]))].append(state)
    rows = []
    for row, own in zip(old, members, strict=True):
        mean = sum(own) / len(own) if own else torch.zeros_like(row)
        row = m * row + (1 - m) * mean
        rows.append(row / row.norm())
    usage = 0.99 * cell.usage + 0.01 * sum(weights) / len(weights)
    return {"centroids": torch.stack(rows), "usage": usage, "age": cell.age + 1}


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compare tensors, or all of two dicts or routings, absolutely."""
    if isinstance(actual, GraphRouting):
        actual, expected = ({name: getattr(routing, name) for name in ROUTES} for routing in (actual, expected))
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
