"""BMojo in pieces: causality, streaming, the size of its state, documents; checks numbered as in the specification."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from memzoo.layers.reference.bmojo import bmojo as reference
from memzoo.layers.state import State
from memzoo.layers.stores import HostStore
from tests.layers.bmojo_cases import (
    CASES,
    DELTA,
    DIM,
    WINDOW,
    assert_close,
    assert_same_bits,
    build,
    few_cases,
    kept_positions,
    run_by,
    tokens,
)

TIME = 5 * WINDOW + 3
EIDETIC: list[dict[str, Any]] = [options for options in CASES if "num_eidetic" in options]


def size(state: State) -> int:
    """Numbers that a state holds."""
    return sum(tensor.numel() for tensor in state.named_tensors().values())


# 9. Causality.


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_09_what_comes_later_changes_no_bit_of_what_came_before(options):
    layer, x = build(**options), tokens(time=TIME)
    y, _ = layer(x)
    for t in range(1, TIME):
        other = x.clone()
        other[:, t:] = 9.0 * tokens(time=TIME, seed=t)[:, t:]
        assert_same_bits(layer(other)[0][:, :t], y[:, :t])


@pytest.mark.parametrize("options", EIDETIC, ids=str)
@torch.no_grad()
def test_09_a_token_joins_the_choice_when_its_block_ends(options):
    layer, x = build(**options), tokens(time=TIME)
    for t in range(TIME):
        other, end = x.clone(), t // layer.window * layer.window + layer.window
        other[:, t] *= 50.0
        for stop in range(t + 1, min(end, TIME + 1)):
            before, after = (kept_positions(layer(z[:, :stop])[1]) for z in (x, other))
            assert before == after
            assert all(s < end - layer.window for kept in after for s in kept)


# 10. Streaming.


@few_cases
@given(st.sampled_from(CASES), st.lists(st.integers(1, TIME - 1), unique=True, max_size=6).map(sorted))
@torch.no_grad()
def test_10_any_cut_into_calls_equals_one_call(options, cuts):
    layer, x = build(**options), tokens(time=TIME)
    whole, end = layer(x)
    y, state = run_by(layer, x, cuts)
    assert_close(y, whole)
    assert_close(state, end)


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_10_steps_after_a_prefill_equal_the_loop(options):
    layer, x = build(**options), tokens(time=TIME)
    expected, rows = reference(layer, x)
    y, state = layer(x[:, :2])
    outputs = [y]
    for t in range(2, TIME):
        y, state = layer(x[:, t : t + 1], state, donate=True)
        outputs.append(y)
        if layer.num_eidetic:
            assert kept_positions(state) == [row.kept[(t + 1) // layer.window] for row in rows]
    assert_close(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("lengths", [None, [9, 4], [0, 9]])
@pytest.mark.parametrize("options", EIDETIC[:4], ids=str)
def test_10_rows_at_different_places_of_their_blocks_go_on_together(options, lengths):
    layer, x = build(**options), tokens(time=TIME)
    starts = 4, 9
    states = [layer(x[row : row + 1, :start])[1] for row, start in enumerate(starts)]
    state = tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *states)
    piece = torch.stack([x[row, start : start + 9] for row, start in enumerate(starts)])
    counts = None if lengths is None else torch.tensor(lengths)
    y, end = layer.mix(piece, state, lengths=counts, trace=None, donate=False)
    for row, (start, count) in enumerate(zip(starts, lengths or [9, 9], strict=True)):
        alone, alone_end = layer(x[row : row + 1, : start + count])
        assert_close(y[row, :count], alone[0, start:])
        assert_close(end.reorder([row]), alone_end)


@pytest.mark.parametrize("options", [{}, {"num_eidetic": 4}], ids=str)
def test_10_gradients_cross_the_border_of_calls(options):
    layer, x = build(**options), tokens(time=TIME)
    leaves, probe = [*layer.parameters()], tokens(time=TIME, seed=2)
    whole = torch.autograd.grad(layer(x)[0], leaves, probe)
    assert_close(torch.autograd.grad(run_by(layer, x, [4, 8, 14])[0], leaves, probe), whole)


# 11. The size of the state.


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_11_the_state_has_one_size(options):
    layer = build(**options)
    sizes = {size(layer(tokens(time=n))[1]) for n in (1, 10, 10 * WINDOW)}
    assert sizes == {size(layer.initial_state(2))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_eidetic": 4, "num_kv_heads": 1},
        {"num_eidetic": 4, "fading_span": 0, "target": "input"},
        {"num_eidetic": 4, "fading_stride": WINDOW, "fading_span": 9},
        {"num_eidetic": 4, "score": "residual"} | DELTA,
        {"num_eidetic": 4, "num_kv_heads": 1, "store": "host"},
    ],
    ids=str,
)
def test_11_the_state_holds_what_the_formula_says(options):
    layer = build(**options | ({"store": HostStore()} if "store" in options else {}))
    state = layer.initial_state(1)
    pair, k = 2 * layer.num_kv_heads * layer.head_dim, layer.num_eidetic
    expected = 2 + layer.window * pair  # two counters, the window
    if (fading := layer.fading).span:
        expected += math.ceil((fading.lag + fading.span) / fading.stride) * pair
    if k:
        expected += k * (pair + 2) + 1 + layer.window  # 1: how many slots are taken
        if not layer.by_residual:
            expected += layer.eidetic.taps * DIM
        if layer.store is not None:
            expected += layer.num_kv_heads * layer.head_dim + 1
    assert size(state) - (0 if state.ssm is None else size(state.ssm)) == expected


# 18. Documents.


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_18_packed_documents_are_sequences_of_their_own(options):
    layer, x = build(**options), tokens(batch=1, time=20)
    ids = torch.tensor([[7] * 8 + [8] + [9] * 11])
    y, end = layer(x, doc_ids=ids)
    results = [layer(x[:, a:b]) for a, b in pairwise([0, 8, 9, 20])]
    assert_close(y, torch.cat([y for y, _ in results], 1))
    assert_close(replace(end, document=torch.zeros(1).long()), results[-1][1])
    more, _ = layer(x, end, doc_ids=torch.full_like(ids, 9))
    assert_close(more, layer(torch.cat([x[:, 9:], x], 1))[0][:, 11:])


@pytest.mark.parametrize("options", CASES, ids=str)
def test_18_masked_tokens_are_neither_seen_nor_kept(options):
    layer, x = build(**options), tokens(batch=2, time=20)
    mask = torch.tensor([[1, 0, 1, 1, 0] * 4, [0] * 6 + [1] * 14]).bool()
    spoiled = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y, state = layer(spoiled, mask=mask)
    assert not y[~mask].any()
    for row in range(2):
        alone, end = layer(x[row : row + 1, mask[row]])
        assert_close(y[row, mask[row]], alone[0])
        assert_close(state.reorder([row]), end)
    for g in torch.autograd.grad(y.sum(), [spoiled, *layer.parameters()], materialize_grads=True):
        assert g.isfinite().all()
