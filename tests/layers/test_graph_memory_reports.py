"""What a graph memory cell hands on in a forward pass: losses, statistics and states of the tokens that are real."""

import copy

import pytest
import torch
from torch import nn

from memzoo.arch.block import Block
from memzoo.layers import Attention
from memzoo.layers.trace import Trace
from tests.layers.graph_memory_cases import (
    DIM,
    SLOTS,
    assert_close,
    buffers_of,
    build,
    gradients_of,
    randn,
    run,
    sequence,
)


@pytest.mark.parametrize("write_back", ["off", "deferred"])
@pytest.mark.parametrize("training", [True, False])
def test_14_a_forward_changes_nothing(write_back, training):
    cell, x = build(write_back=write_back, dtype=torch.float32).train(training), sequence(dtype=torch.float32)
    before = copy.deepcopy(cell.state_dict())
    first, second = run(cell, x)[0], run(cell, x)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, cell(x))
    assert_close(cell.state_dict(), before, 0)


def test_14_deferred_gradients_are_those_without_write_back():
    gradients = {}
    for write_back in ("off", "deferred"):
        cell = build(write_back=write_back)
        y, trace = run(cell, sequence(), sequence(seed=2))
        gradients[write_back] = gradients_of(cell, y.square().sum() + sum(trace.losses.values()))
    assert_close(gradients["deferred"], gradients["off"], 0)


def test_14_what_a_cell_hands_on_in_training():
    cell, x, stream = build(write_back="deferred"), sequence(), sequence(seed=2)
    y, trace = run(cell, x, stream)
    statistics, source, out = trace.statistics, cell.route(x).source, (stream + y).flatten(0, 1)
    assert statistics.keys() == {"source_mass", "tokens", "states", "write_sums", "write_counts"}
    assert not any(tensor.requires_grad for tensor in statistics.values())
    assert_close(statistics["source_mass"], source.sum((0, 1)))
    assert statistics["tokens"].item() == 14
    chosen = source.flatten(0, 1).argmax(-1)
    for slot in range(SLOTS):
        assert_close(statistics["write_sums"][slot], out[chosen == slot].sum(0))
        assert statistics["write_counts"][slot].item() == (chosen == slot).sum()
    assert_close(statistics["states"], out[[0, 2, 3, 4, 6, 7, 9, 10, 11, 13]])


def test_14_states_are_spread_over_a_long_input_and_not_all_first_tokens():
    cell, x = build(num_slots=2), randn(4, 16, DIM)
    y, trace = run(cell, x)
    assert_close(trace.statistics["states"], (x + y)[:, 8])


@pytest.mark.parametrize(
    ("write_back", "written"), [(w, "output") for w in ("deferred", "reference")] + [("deferred", "direction")]
)
def test_padding_is_in_no_loss_statistic_or_write(write_back, written):
    """Rows with padding report what their tokens alone do, whatever the padding is."""
    x, stream, mask = randn(2, 7, DIM), randn(2, 7, DIM, seed=2), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3], mask[1, 5:] = False, False
    padded, alone = (build(write_back=write_back, written=written, edge_entropy_floor=1.3) for _ in range(2))
    results = []
    for cell, tokens, residual, real in (
        (padded, x.masked_fill(~mask[..., None], 1e3), stream, mask),
        (alone, x[mask][None], stream[mask][None], None),
    ):
        trace = Trace()
        cell(tokens, residual=residual, mask=real, trace=trace)
        text = ("batch_effective", "argmax_effective", "argmax_gini", "self_route", "moves")
        states = trace.statistics.pop("states")
        results.append((trace.losses, trace.statistics, {name: trace.signals[name] for name in text}, states))
        if write_back == "deferred":
            cell.commit(trace.statistics)
    for theirs, own in zip(*(result[:3] for result in results), strict=True):
        assert_close(theirs, own, 1e-12)
    assert_close(buffers_of(padded), buffers_of(alone), 1e-12)
    seeds, tokens = results[0][3], results[1][3]
    assert {tuple(seed.tolist()) for seed in seeds} <= {tuple(token.tolist()) for token in tokens}


def test_a_block_hands_the_mask_on():
    torch.manual_seed(0)
    block = Block(Attention(DIM, num_heads=1), build()).double()
    trace = Trace()
    block(sequence(), mask=torch.arange(7).expand(2, 7) < 4, trace=trace)
    assert trace.statistics["ffn.tokens"].item() == 8


@pytest.mark.parametrize("rows", [0, 2])
def test_no_tokens_change_nothing_but_ages(rows):
    cell = build(write_back="deferred")
    before, trace = buffers_of(cell), Trace(signals=False)
    cell(randn(rows, 3, DIM), mask=torch.zeros(rows, 3, dtype=torch.bool), trace=trace)
    sum(trace.losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in cell.parameters())
    cell.commit(trace.statistics)
    assert cell.maintain(trace.statistics["states"], torch.Generator()) == {"reset": 0, "merged": 0} if rows else True
    expected = before | {"centroids": nn.functional.normalize(before["centroids"], dim=-1), "age": before["age"] + 1}
    assert_close(buffers_of(cell), expected, 1e-12)


def test_the_report_counts_dead_slots_by_the_cells_own_threshold():
    cell, trace = build(dead_usage=0.15), Trace()
    cell.usage.copy_(torch.tensor([0.1, 0.14, 0.2, 0.26, 0.3]))
    cell(sequence(), trace=trace)
    assert trace.signals["dead"].item() == 2


def test_14_states_are_all_there_are_of_a_short_input():
    y, trace = run(build(), sequence(time=2))
    assert_close(trace.statistics["states"], (sequence(time=2) + y).flatten(0, 1))


def test_14_without_write_back_there_is_nothing_to_write_and_in_eval_nothing_to_hand_on():
    cell = build()
    assert run(cell, sequence())[1].statistics.keys() == {"source_mass", "tokens", "states"}
    assert not run(cell.eval(), sequence())[1].statistics
    assert not run(build(write_back="deferred").eval(), sequence())[1].statistics


def test_losses_are_reported_in_eval_and_nothing_without_a_trace():
    cell, x = build(), sequence()
    losses = run(cell, x)[1].losses
    assert_close(run(cell.eval(), x)[1].losses, losses)
    state = dict(vars(cell.train()))
    cell(x)
    assert vars(cell).keys() == state.keys()
