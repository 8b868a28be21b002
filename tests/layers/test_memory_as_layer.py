"""MemoryAsLayer (MAL): its equations, and the specification's checks under their numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memzoo.arch import Block, CausalLM
from memzoo.layers import SlidingWindowAttention, SwiGLU, Trace
from memzoo.layers.memory_as_gate import MemoryAsGate
from memzoo.layers.memory_as_layer import MemoryAsLayer
from tests.layers.neural_memory_cases import assert_close, assert_same_bits, random_cases
from tests.layers.titans_equations import DIM, attend, prefixed, read, shaken, tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_persistent_tokens": 0},
    {"num_persistent_tokens": 5, "window": 1, "num_kv_heads": 1},
    {"window": 64, "rotary_base": None},
    {"qk_norm": True, "memory": {"memory_depth": 1, "chunk_size": 3, "momentum": False}},
    {"memory": {"conv_width": None, "num_heads": 1, "decay_to_init": True}},
]


def build(**options: Any) -> MemoryAsLayer:
    small = dict(window=3, num_persistent_tokens=2, num_heads=2, memory={"chunk_size": 3})
    return shaken(MemoryAsLayer(DIM, **small | options))


def by_the_equations(layer: MemoryAsLayer, x: Tensor) -> Tensor:
    """Section 4.3 of the paper over whole rows [P || x], in residual halves; outputs at P are dropped at the end."""
    rows = prefixed(layer.persistent_memory, x)
    num_prefix = rows.shape[1] - x.shape[1]
    m = read(layer.memory, layer.memory_norm(rows))
    a = attend(layer.attention, layer.attention_norm(rows + m), num_prefix, layer.attention.window)
    return (m + a)[:, num_prefix:]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_01_it_is_a_memory_and_attention_upon_it_both_over_persistent_tokens_and_input(options):
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_04_no_output_depends_on_a_later_token(options):
    layer, x = build(**options), tokens(batch=1).requires_grad_()
    y, _ = layer(x)
    for t in range(8):
        (g,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert g[0, : t + 1].any(-1).all()
        assert not g[0, t + 1 :].any()


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


def test_05_the_state_has_one_size_and_keeps_what_became_of_the_persistent_tokens():
    layer = build()
    states = [layer(tokens(time=n))[1] for n in (1, 2, 3, 20)]
    assert {state.nbytes for state in states} == {layer.initial_state(2).nbytes}
    assert [state.memory.position.tolist() for state in states] == [[n + 2, n + 2] for n in (1, 2, 3, 20)]
    rows = prefixed(layer.persistent_memory, tokens(time=1))
    expected = (rows + read(layer.memory, layer.memory_norm(rows)))[:, :2]
    for state in states:
        assert_close(state.persistent_tokens, expected)


def test_05_a_row_that_was_reset_reads_the_persistent_tokens_again():
    layer, x = build(), tokens()
    fresh, _ = layer(x)
    _, state = layer(tokens(seed=1))
    half, _ = layer(x, state.reset([1]))
    assert_close(half, torch.stack([layer(x, state)[0][0], fresh[1]]))


# 18. Reductions.


def with_an_identity_memory(**options: Any) -> MemoryAsLayer:
    """The memory neither learns nor forgets, maps each query to itself, and what projects queries is undone behind it.

    A token z becomes the query silu([z, -z]) of length one, which a memory of one identity matrix hands back, and since
    silu(z) - silu(-z) = z, the projection [1, -1] makes it a positive multiple of z. So the memory scales tokens, which
    the norm before the attention takes back exactly, its eps being 0 here.
    """
    memory = dict(num_heads=1, head_dim=2 * DIM, memory_depth=1, conv_width=None, momentum=False, forgetting=False)
    layer = build(memory=memory | dict(output_gate=False, output_norm=False), **options)
    identity = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        layer.memory.query_key_value.weight[: 2 * DIM] = torch.cat([identity, -identity])
        layer.memory.initial_weights[0][:] = torch.eye(2 * DIM)
        layer.memory.out.weight[:] = torch.cat([identity, -identity], 1)
        layer.memory.gates.weight.zero_()
        layer.memory.gates.bias.fill_(-torch.inf)  # theta = 0
        layer.memory_norm.weight.fill_(1)
    layer.memory_norm.eps = layer.attention_norm.eps = 0.0
    return layer


def test_18_with_an_identity_memory_it_is_a_sliding_window_attention_block():
    layer, x = with_an_identity_memory(), tokens()
    attention = SlidingWindowAttention(DIM, window=3, num_heads=2, num_prefix_tokens=2).double()
    prefix_tokens = layer.attention_norm(layer.persistent_memory.tokens)
    attention.load_state_dict(layer.attention.state_dict() | {"prefix_tokens": prefix_tokens})
    y, state = layer(x)
    m, _ = layer.memory(layer.memory_norm(x))
    assert (torch.nn.functional.cosine_similarity(m, x, dim=-1) > 1 - 1e-12).all()
    assert_close(y - m, attention(layer.attention_norm(x))[0])
    assert_same_bits(state.memory.weights[0], layer.memory.initial_weights[0].expand(2, -1, -1, -1))


def test_18_without_persistent_tokens_there_is_nothing_of_them_to_the_bit():
    layer, x = build(num_persistent_tokens=0), tokens()
    y, state = layer(x)
    m, memory = layer.memory(layer.memory_norm(x))
    a, attention = layer.attention(layer.attention_norm(x + m))
    assert_same_bits(y, m + a)
    assert_same_bits(tree_leaves((state.memory, state.attention)), tree_leaves((memory, attention)))
    assert state.persistent_tokens is None
    assert not [name for name in layer.state_dict() if "persistent" in name]


# In a block and in a model.


def test_a_block_gives_it_the_residual_stream_as_it_is():
    block, x = Block(build(), SwiGLU(DIM)).double(), tokens()
    middle = x + block.mixer(x)[0]
    assert_same_bits(block(x)[0], middle + block.ffn(block.ffn_norm(middle)))
    assert not [name for name, _ in block.named_parameters() if name.startswith("mixer_norm")]


def test_a_model_draws_both_of_its_outputs_as_writing_to_the_residual_stream():
    torch.manual_seed(0)
    mixers = [MemoryAsLayer(64, num_heads=2), MemoryAsGate(64, num_heads=2)]
    model = CausalLM(256, 64, [Block(mixer, SwiGLU(64)) for mixer in mixers])
    residual = {f"0.mixer.{half}.out" for half in ("memory", "attention")} | {"1.mixer.out", "0.ffn.down", "1.ffn.down"}
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            expected = 0.02 * (5**-0.5 if name in residual else 1)
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), name


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
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"memory": {"chunk": 4}}, "memory option='chunk' is not one of"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryAsLayer(DIM, **dict(num_heads=2) | options)


def test_states_of_other_layers_are_refused():
    layer, x = build(), tokens()
    with pytest.raises(ValueError, match="state is a MemoryAsGateState, MemoryAsLayer carries MemoryAsLayerState"):
        layer(x, MemoryAsGate(DIM, num_heads=2).initial_state(2))
    with pytest.raises(ValueError, match="state keys have shape"):
        layer(x, build(window=4).initial_state(2))
    deeper = build(memory={"memory_depth": 3}).initial_state(2)
    with pytest.raises(ValueError, match=r"state holds base.1 of shape .*, the one of this NeuralMemory"):
        layer(x, deeper)
    with torch.no_grad(), pytest.raises(ValueError, match="state holds memories of"):
        layer(x, replace(deeper, memory=replace(deeper.memory, position=torch.ones(2, dtype=torch.long))))
    for other in (0, 3):
        with pytest.raises(ValueError, match=r"state holds persistent tokens of shape .*, this layer's have \(2, 8\)"):
            layer(x, build(num_persistent_tokens=other).initial_state(2))


def test_an_empty_batch_is_one():
    layer = MemoryAsLayer(8, window=4, num_persistent_tokens=2, num_heads=2, memory={"chunk_size": 3})
    y, state = layer(torch.zeros(0, 5, 8))
    assert y.shape == (0, 5, 8)
    assert state.memory.weights[0].shape[0] == 0
