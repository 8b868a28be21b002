"""write_back="reference": what the official code does, with its two faults (the spec, 11.3 and 11.4)."""

import pytest
import torch

from memzoo.arch.block import Block
from memzoo.layers import Attention
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.trace import Trace
from tests.layers.graph_memory_cases import (
    DIM,
    SLOTS,
    assert_close,
    buffers_of,
    build,
    gradients_of,
    run,
    sequence,
    written,
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("with_stream", [True, False])
def test_reference_writes_in_every_forward(training, traced, with_stream):
    cell, x = build(write_back="reference").train(training), sequence()
    stream = sequence(seed=2) if with_stream else None
    source, y = cell.route(x).source, build()(x)
    expected = written(cell, y + (x if stream is None else stream), source)
    actual = cell(x, residual=stream, trace=Trace() if traced else None)
    assert_close(actual, y)
    assert_close(buffers_of(cell), expected)
    for name in ("centroids", "usage", "age"):
        assert (expected[name] - buffers_of(build())[name]).abs().max() > 1e-4


@pytest.mark.parametrize("grad", [True, False])
def test_reference_evaluation_drifts(grad):
    """The official fault: each batch is evaluated with what those before it have written."""
    cell, x = build(write_back="reference").eval(), sequence()
    with torch.set_grad_enabled(grad):
        first = cell(x)
        y, source = cell_without_writes(cell)(x), cell.route(x).source
        expected = written(cell, x + y, source)
        second = cell(x)
    assert (second - first).abs().max() > 1e-3
    assert_close(second, y)
    assert_close(buffers_of(cell), expected)
    assert cell.age.tolist() == [2] * SLOTS


def cell_without_writes(cell: GraphMemoryCell) -> GraphMemoryCell:
    other = build()
    other.load_state_dict(cell.state_dict())
    return other


def test_reference_gradients_of_the_centroids_and_their_norm_are_wrong_and_no_others():
    """The official fault: centroids change between the forward and the backward pass that reads them again."""
    x = sequence()
    right, wrong = (gradients_of(cell, cell(x).square().sum()) for cell in (build(), build(write_back="reference")))
    different = {name for name in right if not torch.equal(right[name], wrong[name])}
    assert different == {"centroids", "centroid_norm.weight"}
    for name in different:
        assert (wrong[name] - right[name]).norm() > 1e-3 * right[name].norm()


def test_reference_losses_are_of_the_centroids_that_were_written():
    """The official code adds its losses up after all blocks have written; tracks are of the centroids before."""
    cell, x = build(write_back="reference"), sequence()
    before = run(build(), x)[1].losses
    _, trace = run(cell, x)
    after = run(cell_without_writes(cell), x)[1].losses
    assert (after["ortho"] - before["ortho"]).abs() > 1e-5
    assert_close(trace.losses, before | {"ortho": after["ortho"]})
    gradient = gradients_of(cell, trace.losses["ortho"])["centroids"]
    other = cell_without_writes(cell)
    assert_close(gradient, gradients_of(other, run(other, x)[1].losses["ortho"])["centroids"])


def test_reference_writes_can_be_backpropagated_through_a_block():
    block = Block(Attention(DIM, num_heads=1), build(write_back="reference", dtype=torch.float32))
    y, _ = block(sequence(dtype=torch.float32), trace=Trace())
    y.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in block.named_parameters() if "momentum" not in name
    )
