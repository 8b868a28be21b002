"""PersistentMemory: rows that begin as if the tokens had been read before them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers import NeuralMemory, SequenceMixer, SlidingWindowAttention
from memzoo.layers.persistent_memory import PersistentMemory
from memzoo.lit_modules.optim import parameter_groups
from tests.layers.neural_memory_cases import assert_close, assert_same_bits
from tests.layers.titans_equations import DIM, prefixed, shaken, tokens

MIXERS = {
    "memory": lambda: NeuralMemory(DIM, num_heads=2, chunk_size=4),
    "memory without conv and momentum": lambda: NeuralMemory(
        DIM, num_heads=2, chunk_size=3, conv_width=None, momentum=False
    ),
    "attention": lambda: SlidingWindowAttention(DIM, window=4, num_heads=2),
}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> SequenceMixer:
    return shaken(MIXERS[request.param]())


@pytest.fixture
def persistent() -> PersistentMemory:
    return shaken(PersistentMemory(DIM, 3))


def rows(state: Any, index: list[int]) -> list[torch.Tensor]:
    return tree_leaves(tree_map(lambda t: t if t is None else t[index], state))


def test_all_rows_are_primed_from_nothing(mixer, persistent):
    state, outputs = persistent.prime(mixer, None, 2)
    expected, end = mixer(persistent.tokens[None])
    assert_same_bits(outputs, expected)
    for row in range(2):
        assert_same_bits(rows(state, [row]), tree_leaves(end))


def test_a_primed_row_goes_on_like_one_that_has_read_the_tokens(mixer, persistent):
    x = tokens()
    state, _ = persistent.prime(mixer, None, 2)
    y, end = mixer(x, state)
    whole, expected = mixer(prefixed(persistent, x))
    assert_close(y, whole[:, 3:])
    assert_close(tree_leaves(end), tree_leaves(expected))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_fresh_rows_are_primed_and_the_others_stay_as_they_are_to_the_bit(mixer, persistent, with_gradients):
    with torch.set_grad_enabled(with_gradients):
        _, before = mixer(tokens(batch=3))
        before = before.reset([1])
        kept = before.clone()
        state, outputs = persistent.prime(mixer, before, 3)
        primed, expected = persistent.prime(mixer, None, 1)
    assert_same_bits(outputs, expected)
    assert_same_bits(rows(state, [1]), tree_leaves(primed))
    assert_same_bits(rows(state, [0, 2]), rows(before, [0, 2]))
    assert_same_bits(tree_leaves(before), tree_leaves(kept))


def test_without_gradients_nothing_is_read_where_no_row_is_fresh(mixer, persistent, monkeypatch):
    _, before = mixer(tokens())
    monkeypatch.setattr(mixer, "mix", None)
    with torch.no_grad():
        state, outputs = persistent.prime(mixer, before, 2)
    assert state is before
    assert outputs is None


def test_every_parameter_takes_part_in_the_backward_pass_of_a_continued_row(mixer, persistent):
    """Otherwise distributed training of a carried state would wait for gradients that never come."""
    _, before = mixer(tokens())
    state, _ = persistent.prime(mixer, before.detach(), 2)
    y, _ = mixer(tokens(), state)
    (gradient,) = torch.autograd.grad(y.sum(), persistent.tokens)
    assert not gradient.any()


def test_the_tokens_pass_through_the_norm_they_are_given(mixer, persistent):
    state, outputs = persistent.prime(mixer, None, 1, norm=lambda tokens: 2 * tokens)
    with torch.no_grad():
        persistent.tokens *= 2
    assert_close(tree_leaves((state, outputs)), tree_leaves(persistent.prime(mixer, None, 1)))


def test_a_state_on_the_meta_device_can_be_primed():
    with torch.device("meta"), torch.no_grad():
        mixer = NeuralMemory(DIM, num_heads=2)
        state, outputs = PersistentMemory(DIM, 3).prime(mixer, mixer.initial_state(2), 2)
    assert (outputs.shape, state.weights[0].shape) == ((1, 3, DIM), (2, 2, 4, 8))


def test_tokens_are_drawn_as_large_as_normalised_tokens_also_after_meta():
    with torch.device("meta"):
        persistent = PersistentMemory(64, 100)
    persistent = persistent.to_empty(device="cpu")
    persistent.reset_parameters()
    assert abs(persistent.tokens.std() - 1) < 0.05


def test_tokens_are_not_decayed():
    model = nn.Sequential(PersistentMemory(DIM, 3), nn.Linear(DIM, DIM, bias=False))
    decayed, others = parameter_groups(model, 0.1)
    assert decayed["params"] == [model[1].weight]
    assert others["params"] == [model[0].tokens]


def test_a_memory_of_nothing_is_refused():
    with pytest.raises(ValueError, match="num_tokens=0"):
        PersistentMemory(DIM, 0)
    with pytest.raises(ValueError, match="dim=0"):
        PersistentMemory(0, 3)
