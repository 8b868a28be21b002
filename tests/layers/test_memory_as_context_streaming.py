"""Memory as context cut into calls (check 5)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

from tests.layers.memory_as_context_cases import OPTIONS, build, tokens
from tests.layers.neural_memory_cases import assert_close, assert_same_bits, random_cases

# 5. Streaming.


@settings(random_cases, max_examples=12)
@given(st.lists(st.integers(1, 13), unique=True).map(sorted), st.integers(1, 6))
@torch.no_grad()
def test_05_any_cut_into_calls_equals_one_call(cuts, chunk_size):
    layer, x = build(memory={"chunk_size": chunk_size}), tokens(time=14)
    whole, end = layer(x)
    state, pieces = None, []
    for piece in x.tensor_split(cuts, 1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(tree_leaves(state), tree_leaves(end))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_05_steps_after_a_prefill_equal_one_call(options):
    layer, x = build(**options), tokens()
    y, state = layer(x[:, :3])
    steps = [y]
    for t in range(3, 10):
        y, state = layer(x[:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), layer(x)[0])


@pytest.mark.parametrize("lengths", [None, [6, 4]])
def test_05_rows_at_different_places_of_their_segments_go_on_together(lengths):
    layer, x = build(), tokens(time=11)
    _, early = layer(x[:1, :2])
    _, late = layer(x[1:, :5])
    state = tree_map(lambda a, b: torch.cat([a, b]), early, late)
    ends = [8, 11] if lengths is None else [2 + lengths[0], 5 + lengths[1]]
    counts = None if lengths is None else torch.tensor(lengths)
    y, end = layer.mix(torch.stack([x[0, 2:8], x[1, 5:11]]), state, lengths=counts, trace=None, donate=False)
    for row, (start, stop) in enumerate(zip((2, 5), ends, strict=True)):
        alone, alone_end = layer(x[row : row + 1, :stop])
        assert_close(y[row, : stop - start], alone[0, start:])
        assert_close(tree_leaves(end.reorder([row])), tree_leaves(alone_end))


def test_05_the_literal_form_goes_on_at_the_border_of_a_segment():
    layer, x = build(literal=True), tokens(time=14)
    whole, end = layer(x)
    state, pieces = None, []
    for piece in x.tensor_split([4, 12], 1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(tree_leaves(state), tree_leaves(end))


@pytest.mark.parametrize("literal", [False, True])
def test_05_the_state_has_one_size(literal):
    layer = build(literal=literal)
    sizes = {layer(tokens(time=n))[1].nbytes for n in (1, 3, 4, 20)}
    assert sizes == {layer.initial_state(2).nbytes}


def test_05_a_state_does_not_share_the_learned_memory():
    layer, x = build(), tokens(time=3)
    _, state = layer(x)
    kept = tree_map(torch.clone, state.frozen)
    with torch.no_grad():
        for w in layer.memory.initial_weights:
            w.add_(1)
    assert_same_bits(state.frozen, kept)
