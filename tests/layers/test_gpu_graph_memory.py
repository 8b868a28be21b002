"""GraphMemoryCell on CUDA: as on the CPU, routed in float32 under autocast, kept up in place.

Checks run on the CPU as well, so that where there is no GPU they are at least known to be checks that pass.
"""

import copy

import pytest
import torch

from memzoo.layers import GraphMemoryCell, Trace
from memzoo.layers.graph_memory_upkeep import commit, maintain


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def cells(request):
    """Two equal cells of the base model's size, on the CPU and on a device."""
    torch.manual_seed(0)
    cell = GraphMemoryCell(768, write_back="deferred", temperature=0.1)
    return cell, copy.deepcopy(cell).to(request.param)


def run(cell, x):
    x = x.to(cell.centroids.device).requires_grad_()
    trace = Trace(signals=False)
    y = cell(x, trace=trace)
    loss = y.square().sum() + sum(trace.losses.values())
    gradients = torch.autograd.grad(loss, [x, *cell.parameters()])
    return [y, *trace.losses.values(), *gradients], trace.statistics


def test_outputs_losses_gradients_and_statistics_are_those_of_the_cpu(cells):
    x = torch.randn(2, 100, 768)
    (here, statistics), (there, statistics_there) = (run(cell, x) for cell in cells)
    for own, theirs in zip([*here, *statistics.values()], [*there, *statistics_there.values()], strict=True):
        torch.testing.assert_close(theirs.cpu(), own, rtol=1e-3, atol=1e-3 * own.abs().max().item())


def test_autocast_leaves_the_routing_in_float32(cells):
    _, cell = cells
    device = cell.centroids.device.type
    x = torch.randn(2, 100, 768, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        under = cell.route(x)
    torch.testing.assert_close(under.source, cell.route(x).source, rtol=0, atol=1e-6)
    assert under.target.dtype == torch.float32


def test_commits_and_maintenance_are_those_of_the_cpu(cells):
    x = torch.randn(2, 100, 768)
    for cell in cells:
        _, statistics = run(cell, x)
        cell.usage[:20] = 0
        commit(cell, statistics)
        assert maintain(cell, statistics, torch.Generator().manual_seed(0))["reset"] == 20
    torch.testing.assert_close(cells[1].centroids.cpu(), cells[0].centroids, rtol=0, atol=1e-4)
    torch.testing.assert_close(cells[1].usage.cpu(), cells[0].usage)


@pytest.mark.gpu
def test_a_forward_never_waits_for_the_device():
    cell = GraphMemoryCell(768, write_back="deferred").cuda()
    x, mask = torch.randn(2, 100, 768, device="cuda"), torch.ones(2, 100, dtype=torch.bool, device="cuda")
    cell(x, mask=mask, trace=Trace())
    torch.cuda.set_sync_debug_mode("error")
    try:
        cell(x, mask=mask, trace=Trace())
    finally:
        torch.cuda.set_sync_debug_mode("default")
