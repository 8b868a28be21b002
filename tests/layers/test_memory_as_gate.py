"""MemoryAsGate (MAG): its equations, and the specification's checks under their numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memzoo.layers import NeuralMemory, SlidingWindowAttention, Trace
from memzoo.layers.memory_as_gate import MemoryAsGate
from memzoo.layers.memory_as_layer import MemoryAsLayer
from tests.layers.neural_memory_cases import assert_close, assert_same_bits, random_cases
from tests.layers.titans_equations import DIM, attend, prefixed, randn, read, shaken, tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_persistent_tokens": 0},
    {"num_persistent_tokens": 5, "window": 1, "num_kv_heads": 1},
    {"window": 64, "rotary_base": None, "gate": "convex"},
    {"qk_norm": True, "gate": "silu_memory", "memory": {"memory_depth": 1, "chunk_size": 3, "momentum": False}},
    {"gate": "sigmoid_both", "memory": {"conv_width": None, "num_heads": 1, "decay_to_init": True}},
]


def build(**options: Any) -> MemoryAsGate:
    small = dict(window=3, num_persistent_tokens=2, num_heads=2, memory={"chunk_size": 3})
    return shaken(MemoryAsGate(DIM, **small | options))


def by_the_equations(layer: MemoryAsGate, x: Tensor, window: int | None = None) -> Tensor:
    """Section 4.2 of the paper over whole rows [P || x], whose outputs at P are dropped at the very end."""
    rows = prefixed(layer.persistent_memory, x)
    num_prefix = rows.shape[1] - x.shape[1]
    y = attend(layer.attention, rows, num_prefix, window or layer.attention.window)
    return layer.out(layer.gate(y, read(layer.memory, rows)))[:, num_prefix:]


def table(y: Tensor, x: Tensor) -> Tensor:
    """(time, tokens) bool: whether any output at a time depends on a token at all."""
    return torch.stack([torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0][0].any(-1) for t in range(8)])


def silenced(layer: MemoryAsGate) -> MemoryAsGate:
    """The same with a memory that says nothing, whatever it has read."""
    layer.memory.out.weight.data.zero_()
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_01_it_is_attention_gated_by_the_memory_both_over_persistent_tokens_and_input(options):
    layer, x = build(**options), tokens()
    assert_close(layer(x)[0], by_the_equations(layer, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_03_gradients_of_the_input_and_every_parameter_equal_those_of_the_equations(options):
    layer, x = build(**options), tokens().requires_grad_()
    names, leaves = zip(*[("x", x), *layer.named_parameters()], strict=True)
    expected = torch.autograd.grad(by_the_equations(layer, x), leaves, tokens(seed=1))
    assert_close(torch.autograd.grad(layer(x)[0], leaves, tokens(seed=1)), expected)
    assert all(g.any() for g in expected)
    assert ("persistent_memory.tokens" in names) == (options.get("num_persistent_tokens") != 0)


@pytest.mark.parametrize("silent", ["attention", "memory"])
def test_03_persistent_tokens_learn_through_attention_and_through_memory(silent):
    layer = build(gate="convex")
    getattr(layer, silent).out.weight.data.zero_()
    (g,) = torch.autograd.grad(layer(tokens())[0], layer.persistent_memory.tokens, tokens(seed=1))
    assert g.any(-1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_04_no_output_depends_on_a_later_token(options):
    layer, x = build(**options), tokens(batch=1).requires_grad_()
    assert torch.equal(table(layer(x)[0], x), torch.ones(8, 8, dtype=torch.bool).tril())


# 5. Streaming.


@settings(random_cases, max_examples=12)
@given(st.lists(st.integers(1, 9), unique=True).map(sorted), st.sampled_from(OPTIONS))
@torch.no_grad()
def test_05_any_cut_into_calls_equals_one_call(cuts, options):
    layer, x = build(**options), tokens(time=10)
    whole, end = layer(x)
    state, pieces = None, []
    for piece in x.tensor_split(cuts, 1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(tree_leaves(state), tree_leaves(end))


def test_05_gradients_of_steps_after_a_prefill_are_those_of_one_call():
    layer, x, probe = build(), tokens(), tokens(seed=1)
    y, state = layer(x[:, :4])
    pieces = [y]
    for t in range(4, 8):
        y, state = layer(x[:, t : t + 1], state)
        pieces.append(y)
    expected = torch.autograd.grad(layer(x)[0], list(layer.parameters()), probe)
    assert_close(torch.autograd.grad(torch.cat(pieces, 1), list(layer.parameters()), probe), expected)


def test_05_the_state_has_one_size_and_two_ways_of_counting():
    layer = build()
    states = [layer(tokens(time=n))[1] for n in (1, 2, 3, 20)]
    assert {state.nbytes for state in states} == {layer.initial_state(2).nbytes}
    assert [state.position.tolist() for state in states] == [[n, n] for n in (1, 2, 3, 20)]
    assert [state.attention.position.tolist() for state in states] == [[n, n] for n in (1, 2, 3, 20)]
    assert [state.memory.position.tolist() for state in states] == [[n + 2, n + 2] for n in (1, 2, 3, 20)]


def test_05_a_row_that_was_reset_reads_the_persistent_tokens_again():
    layer, x = build(), tokens()
    fresh, _ = layer(x)
    _, state = layer(tokens(seed=1))
    half, _ = layer(x, state.reset([1]))
    assert_close(half, torch.stack([layer(x, state)[0][0], fresh[1]]))


# 17. Masks.


@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_17_attention_sees_the_window_and_nothing_else(window):
    layer, x = silenced(build(window=window)), tokens(batch=1).requires_grad_()
    t, j = torch.arange(8)[:, None], torch.arange(8)
    assert torch.equal(table(layer(x)[0], x), (t - window < j) & (j <= t))


@pytest.mark.parametrize("window", [1, 3])
def test_17_every_persistent_token_is_visible_to_every_query(window):
    layer = silenced(build(window=window))
    y, _ = layer(tokens(batch=1))
    for t in range(8):
        (g,) = torch.autograd.grad(y[0, t], layer.persistent_memory.tokens, randn(DIM), retain_graph=True)
        assert g.any(-1).all()


@pytest.mark.parametrize("window", [8, 64])
def test_17_a_window_over_the_whole_row_is_full_attention_behind_the_prefix(window):
    layer, x = build(window=window), tokens()
    assert_close(layer(x)[0], by_the_equations(layer, x, window=1000))
    assert not torch.allclose(build(window=7)(x)[0], layer(x)[0])


# 18. Reductions.


def test_18_with_a_constant_memory_it_is_gated_sliding_window_attention(monkeypatch):
    layer, x, said = build(), tokens(), randn(DIM, seed=3)
    expected = SlidingWindowAttention(DIM, window=3, num_heads=2, num_prefix_tokens=2).double()
    expected.load_state_dict(layer.attention.state_dict() | {"prefix_tokens": layer.persistent_memory.tokens})

    def constant(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        y, state = NeuralMemory.mix(layer.memory, x, state, **options)
        return said.expand_as(y), state

    monkeypatch.setattr(layer.memory, "mix", constant)
    share = layer.gate.memory_norm(said).sigmoid()
    assert_close(layer(x)[0], layer.out(layer.gate.norm(expected(x)[0]) * share))


def test_18_without_persistent_tokens_there_is_nothing_of_them_to_the_bit():
    layer, x = build(num_persistent_tokens=0), tokens()
    y, state = layer(x)
    expected, attention = layer.attention(x)
    recalled, memory = layer.memory(x)
    assert_same_bits(y, layer.out(layer.gate(expected, recalled)))
    assert_same_bits(tree_leaves((state.attention, state.memory)), tree_leaves((attention, memory)))
    assert not [name for name in layer.state_dict() if "persistent" in name]


# What it reports, and refuses.


def test_the_memory_reports_under_its_name():
    layer, trace = build(), Trace()
    layer(tokens(), trace=trace)
    assert {name: signal.shape for name, signal in trace.signals.items()} == dict.fromkeys(
        ("memory.theta", "memory.eta", "memory.alpha", "memory.surprise"), (2, 8, 2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_persistent_tokens": -1}, "num_persistent_tokens=-1 .*use 0 for none"),
        ({"window": 0}, "window=0 keeps no keys"),
        ({"gate": "sigmoid"}, "gate='sigmoid' is not one of"),
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"memory": {"chunk": 4}}, "memory option='chunk' is not one of"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryAsGate(DIM, **dict(num_heads=2) | options)


def test_states_of_other_layers_are_refused():
    layer, x = build(), tokens()
    with pytest.raises(ValueError, match="state is a MemoryAsLayerState, MemoryAsGate carries MemoryAsGateState"):
        layer(x, MemoryAsLayer(DIM, num_heads=2).initial_state(2))
    with pytest.raises(ValueError, match="state keys have shape"):
        layer(x, build(window=4).initial_state(2))
    deeper = build(memory={"memory_depth": 3}).initial_state(2)
    with pytest.raises(ValueError, match=r"state holds base.1 of shape .*, the one of this NeuralMemory"):
        layer(x, deeper)
    with torch.no_grad(), pytest.raises(ValueError, match="state holds memories of"):
        layer(x, replace(deeper, memory=replace(deeper.memory, position=torch.ones(2, dtype=torch.long))))
