"""The NeuralMemory layer: its equations, its contract, its errors; checks numbered as in the specification."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers import Attention, NeuralMemory
from memzoo.layers.reference import neural_memory as reference
from memzoo.layers.trace import Trace
from tests.layers.neural_memory_cases import assert_close, assert_same_bits, random_cases
from tests.layers.neural_memory_layer_cases import build, tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_heads": 1, "memory_expansion": 4.0},
    {"memory_depth": 1},
    {"memory_depth": 3, "activation": "gelu"},
    {"momentum": False, "max_learning_rate": 0.3},
    {"forgetting": False, "loss_scale": 2.0},
    {"conv_width": None, "read": "pre"},
    {"num_heads": 3, "head_dim": 5},
    {"output_gate": False, "decay_to_init": True},
    {"output_norm": False, "max_gradient_norm": 0.1, "activation": "relu"},
    {"residual_norm": True, "momentum": False, "forgetting": False},
    {"residual_norm": True, "memory_depth": 1, "decay_to_init": True, "max_gradient_norm": 0.2},
    {"memory_depth": 1, "gate_groups": 4, "decay_to_init": True},
    {"memory_depth": 1, "chunk_size": 1},
    {"memory_depth": 1, "chunk_size": 1, "gate_groups": 2, "implicit_step": True, "loss_scale": 2.0},
    {"lookahead_values": True, "checkpoint_chunks": 2},
    {"objective_window": 3},
    {"objective_window": 9, "momentum": False, "decay_to_init": True, "max_gradient_norm": 0.2, "checkpoint_chunks": 1},
    {"objective_window": 2, "memory_depth": 1, "chunk_size": 1, "gate_groups": 2, "lookahead_values": True},
]


def gate_names(layer: NeuralMemory) -> list[str]:
    own = layer.objective_window == 1
    return ["theta", *["eta"] * layer.momentum, *["alpha"] * layer.forgetting, *["gamma"] * (not own)]


def by_the_equations(layer: NeuralMemory, x: Tensor) -> tuple[Tensor, ...]:
    """Section 4.4 of the paper around the loop over tokens, from the layer's parameters alone."""
    qkv = []
    for channels, project in enumerate(layer.query_key_value.weight.chunk(3)):
        z = x @ project.T
        if layer.conv is not None:
            taps = layer.conv.weight.chunk(3)[channels]
            z = F.conv1d(F.pad(z.mT, (taps.shape[1] - 1, 0)), taps[:, None], groups=len(taps)).mT
        qkv.append(F.silu(z).unflatten(-1, (layer.num_heads, -1)))
    q, k, v = qkv
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    if layer.lookahead_values:
        k = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1)
    gates = dict(zip(gate_names(layer), layer.gates(x).sigmoid().split(layer.num_gates, -1), strict=True))
    theta = layer.max_learning_rate * gates["theta"]
    if layer.implicit_step:
        theta = theta / (1 + layer.loss_scale * theta)  # the keys have unit length
    initial = tuple(w.expand(len(x), *w.shape) for w in layer.initial_weights)
    norm = None if layer.norm_gain is None else (layer.norm_gain, layer.norm_bias)
    groups = []  # of value channels, with gates of their own
    for g in range(layer.gate_groups):
        columns = slice(g * v.shape[-1] // layer.gate_groups, (g + 1) * v.shape[-1] // layer.gate_groups)
        weights = (*initial[:-1], initial[-1][..., columns])
        groups.append(loop(layer, q, k, v[..., columns], theta, gates, weights, norm, g))
    y, *state = tree_map(lambda *parts: torch.cat(parts, -1), *groups) if len(groups) > 1 else groups[0]
    y = y.flatten(2)
    if layer.output_norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + layer.output_norm.eps).sqrt() * layer.output_norm.weight
    if layer.output_gate is not None:
        y = y * F.silu(layer.output_gate(x))
    return layer.out(y), *state


def loop(
    layer: NeuralMemory, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, gates: Any, initial: Any, norm: Any, group: int
) -> tuple[Any, ...]:
    """The memory of one group of value channels, token by token."""
    theta, eta, alpha, gamma = (
        None if gate is None else gate[..., group :: layer.gate_groups]
        for gate in (theta, gates.get("eta"), gates.get("alpha", 0 * theta), gates.get("gamma"))
    )
    return reference.neural_memory_scan(
        q,
        k,
        v,
        theta,
        eta,
        alpha,
        initial,
        chunk_size=layer.chunk_size,
        activation=layer.activation,
        loss_scale=layer.loss_scale,
        read=layer.read,
        anchor=initial if layer.decay_to_init else None,
        max_gradient_norm=layer.max_gradient_norm,
        norm=norm,
        window=layer.objective_window,
        gamma=gamma,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_01_layer_equals_its_equations(options):
    layer, x = build(**options), tokens()
    y, state = layer(x)
    assert_close((y, state.weights, state.momentum, state.base), by_the_equations(layer, x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_03_outer_gradients_of_every_parameter_equal_those_of_the_equations(options):
    layer, x = build(**options), tokens().requires_grad_()
    leaves = [x, *layer.parameters()]
    probe = tokens(seed=1)
    expected = torch.autograd.grad(by_the_equations(layer, x)[0], leaves, probe)
    assert_close(torch.autograd.grad(layer(x)[0], leaves, probe), expected)
    assert all(g.any() for g in expected)


@pytest.mark.parametrize("options", [{}, {"read": "pre", "chunk_size": 64}], ids=str)
def test_04_no_output_depends_on_a_later_token(options):
    layer, x = build(**options), tokens().requires_grad_()
    y, _ = layer(x)
    for t in range(8):
        (g,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert g[:, t].any()
        assert not g[:, t + 1 :].any()


# 5. Streaming.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_05_what_is_seen_again_is_not_rounded_by_a_call_in_a_lower_precision(dtype):
    layer, x = build(objective_window=5).float(), tokens().float()
    _, state = layer(x)
    _, after = layer.to(dtype)(x[:, :1].to(dtype), state)
    for old, new in zip(state.recent, after.recent, strict=True):
        assert_same_bits(new[:, :-1], old[:, 1:])
    _, kept = layer(x[:, :1].to(dtype), state, mask=torch.zeros(len(x), 1, dtype=torch.bool))
    assert_same_bits(kept.recent, state.recent)


@pytest.mark.parametrize("position", [3, 6, 8])
def test_05_a_position_known_to_the_caller_changes_nothing(position):
    layer, x = build(), tokens(time=14)
    _, state = layer(x[:, :position])
    ended = layer(x[:, : position - 2])[1].reorder([0])  # a row that stopped elsewhere and gets no token
    mixed = tree_map(lambda a, b: torch.cat([a[:1], b]), state, ended)
    for start, lengths in ((state, None), (mixed, torch.tensor([14 - position, 0]))):
        same: dict[str, Any] = dict(lengths=lengths, trace=None)
        actual = layer.mix_heads(x[:, position:], start, **same, position=position)
        assert_close(tree_leaves(actual), tree_leaves(layer.mix_heads(x[:, position:], start, **same)))


def test_05_a_compiled_layer_goes_on_with_calls_of_other_lengths():
    torch.compiler.reset()
    layer = build(memory_depth=1, conv_width=None, chunk_size=5)  # a short graph
    compiled, state = torch.compile(layer, backend="eager", fullgraph=True), None
    for time in (4, 3):  # at the second the compiler takes the length for a symbol
        expected, actual = layer(tokens(time=time), state), compiled(tokens(time=time), state)
        assert_close(tree_leaves(actual), tree_leaves(expected))
        state = actual[1]


@settings(random_cases, max_examples=12)
@given(st.lists(st.integers(1, 9), unique=True).map(sorted), st.integers(1, 5))
@torch.no_grad()
def test_05_any_cut_into_calls_equals_one_call(cuts, chunk_size):
    layer, x = build(chunk_size=chunk_size), tokens(time=10)
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
    y, state = layer(x[:, :4])
    steps = [y]
    for t in range(4, 8):
        y, state = layer(x[:, t : t + 1], state)
        steps.append(y)
    assert_close(torch.cat(steps, 1), layer(x)[0])


def test_05_rows_in_different_phases_of_their_chunks_go_on_together():
    layer, x = build(), tokens(time=9)
    _, early = layer(x[:1, :2])
    _, late = layer(x[1:, :4])
    state = tree_map(lambda a, b: torch.cat([a, b]), early, late)
    y, end = layer(torch.stack([x[0, 2:7], x[1, 4:9]]), state)
    assert_close(y, torch.stack([layer(x)[0][0, 2:7], layer(x)[0][1, 4:9]]))
    assert end.position.tolist() == [7, 9]


def test_05_the_state_has_one_size():
    layer = build()
    sizes = {layer(tokens(time=n))[1].nbytes for n in (1, 2, 3, 20)}
    assert sizes == {layer.initial_state(2).nbytes}


def test_05_a_passed_state_is_not_changed():
    layer, x = build(), tokens()
    _, state = layer(x)
    before = copy.deepcopy(state.detach())
    layer(x, state)
    assert_same_bits(tree_leaves(state), tree_leaves(before))


# 20. Learning at test time.


def test_20_eval_and_no_grad_learn_like_training():
    layer, x = build(), tokens()
    trained, end = layer(x)
    assert not torch.equal(end.weights[0][0], layer.initial_weights[0])
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert_same_bits(tree_leaves(evaluated), tree_leaves((trained.detach(), end.detach())))


def test_20_reset_returns_to_the_initial_memory():
    layer, x = build(), tokens()
    fresh, _ = layer(x)
    _, state = layer(tokens(seed=1))
    assert_close(layer(x, state.reset())[0], fresh)
    continued, _ = layer(x, state)
    half, _ = layer(x, state.reset([1]))
    assert_close(half, torch.stack([continued[0], fresh[1]]))
    assert not torch.allclose(continued[1], fresh[1])


def test_20_runs_repeat_bit_for_bit():
    layer, x = build(), tokens()
    assert_same_bits(tree_leaves(layer(x)), tree_leaves(layer(x)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_20_autocast_stays_near_float64_and_keeps_the_memory_in_float32(options):
    layer, x = build(**options), tokens(time=24)
    tolerance = 4e-2 if layer.norm_gain is not None else 2e-2  # a norm of four values amplifies rounding
    exact, exact_state = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer.float()(x.float())
    for a, b in zip((y, *state.weights), (exact, *exact_state.weights), strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()
    assert all(w.dtype == torch.float32 for w in (*state.weights, *state.momentum, *state.base))


def test_20_a_token_of_zeros_has_a_tame_gradient():
    layer, x = build(output_gate=False), tokens()
    x[:, 3:] = 0  # keys and queries of length zero, once the convolution has forgotten the others
    x.requires_grad_()
    (g,) = torch.autograd.grad(layer(x)[0], x, tokens(seed=1))
    assert g.abs().max() < 1e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_20_a_token_of_zeros_makes_no_nan_in_half_precision(dtype):
    layer, x = build().to(dtype), tokens().to(dtype)
    x[:, 3:] = 0
    y, _ = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()


# What a layer reports, and refuses.


def test_a_new_memory_learns_at_half_its_rate_and_forgets_slowly():
    trace = Trace()
    NeuralMemory(8, num_heads=2, chunk_size=16)(torch.zeros(1, 1, 8), trace=trace)
    start = {name: trace.signals[name][0, 0] for name in ("theta", "eta", "alpha")}
    expected = {"theta": 0.5 * 16**-0.5, "eta": 0.5, "alpha": 1 / (1 + math.exp(4))}
    assert_close(start, {name: torch.full((2,), value) for name, value in expected.items()}, 1e-6)


@pytest.mark.parametrize("window", [1, 3])
def test_trace_shows_gates_and_surprise(window):
    layer, x, trace = build(chunk_size=64, objective_window=window), tokens(), Trace()
    y, _ = layer(x, trace=trace)
    assert_same_bits(y, layer(x)[0])
    names = ["theta", "eta", "alpha", *["gamma"] * (window > 1)]
    assert list(trace.signals) == ["surprise", *names]
    theta, *others = layer.gates(x).sigmoid().unflatten(-1, (len(names), -1)).unbind(2)
    assert_close([trace.signals[name] for name in names], [layer.max_learning_rate * theta, *others])
    assert trace.signals["surprise"].shape == (2, 8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"num_heads": None}, "dim=8 is not divisible by head_dim=64"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"memory_depth": 0}, "memory_depth=0"),
        ({"memory_expansion": 0.0}, "memory_expansion=0.0"),
        ({"memory_expansion": math.inf}, "memory_expansion=inf"),
        ({"memory_expansion": 0.1}, "memory_expansion=0.1"),
        ({"conv_width": 0}, "conv_width=0"),
        ({"read": "mid"}, "read='mid'"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"max_learning_rate": -1.0}, "max_learning_rate=-1.0"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm=0.0"),
        ({"loss_scale": float("nan")}, "loss_scale=nan"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"objective_window": 0}, "objective_window=0"),
        (
            {"objective_window": 2, "implicit_step": True, "memory_depth": 1, "chunk_size": 1},
            "residual_norm=False and objective_window=1",
        ),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(8, **{"num_heads": 2} | options)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(2, 8), {}, "x has shape"),
        (torch.zeros(2, 3, 7), {}, "width is 7"),
        (torch.zeros(2, 0, 8), {}, "no tokens"),
        (torch.zeros(2, 3, 8, dtype=torch.long), {}, "dtype torch.int64"),
        (torch.zeros(2, 3, 8), {"mask": torch.ones(2, 3)}, "mask has dtype"),
        (torch.zeros(2, 3, 8), {"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask has shape"),
        (torch.zeros(2, 3, 8), {"doc_ids": torch.ones(2, 3)}, "doc_ids has dtype"),
        (torch.zeros(2, 3, 8), {"state": NeuralMemory(8, num_heads=2).initial_state(3)}, "state has 3 rows"),
        (torch.zeros(2, 3, 8), {"state": Attention(8, num_heads=2).initial_state(2)}, "state is a AttentionState"),
        (torch.zeros(2, 3, 8), {"state": NeuralMemory(8, num_heads=1).initial_state(2)}, "state holds memories of"),
        (
            torch.zeros(2, 3, 8),
            {"state": NeuralMemory(8, num_heads=2, momentum=False).initial_state(2)},
            "momentum=False",
        ),
        (
            torch.zeros(2, 3, 8),
            {"state": NeuralMemory(8, num_heads=2, conv_width=None).initial_state(2)},
            "convolution=False",
        ),
        (
            torch.zeros(2, 3, 8),
            {"state": NeuralMemory(8, num_heads=2, objective_window=3).initial_state(2)},
            "objective_window=3, shares=2; this layer's .* objective_window=1, shares=0",
        ),
        (torch.zeros(2, 3, 8, dtype=torch.float64), {}, "x has dtype torch.float64, the parameters"),
    ],
)
def test_bad_inputs_are_refused_by_name(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(8, num_heads=2)(x, **arguments)


def test_shapes_can_be_traced_on_the_meta_device():
    with torch.device("meta"):
        y, state = NeuralMemory(8, num_heads=2, chunk_size=4)(torch.empty(2, 6, 8))
    assert (y.shape, y.device.type, state.weights[0].shape) == ((2, 6, 8), "meta", (2, 2, 4, 8))


@pytest.mark.parametrize("options", [{}, {"memory_depth": 1}, {"conv_width": None, "output_gate": False}])
def test_06_a_memory_that_is_only_read_is_one_whose_gates_are_shut(options: dict[str, Any]) -> None:
    layer, x = build(**options), tokens()
    torch.nn.init.zeros_(layer.gates.weight)
    torch.nn.init.constant_(layer.gates.bias, -math.inf)  # theta = eta = alpha = 0
    y, end = layer(x)
    weights = layer.current_weights(end, 2)
    head, tail = layer.queries(x[:, :3])
    rest, _ = layer.queries(x[:, 3:], tail)
    read = layer.output(layer.recall(torch.cat([head, rest], 1), weights), x)
    assert_close(read, y)
    assert_same_bits(weights, layer.current_weights(None, 2))


def test_current_weights_are_learned_ones_in_fresh_rows_only() -> None:
    layer = build()
    _, state = layer(tokens())
    state = state.reset([False, True])
    for now, written, learned in zip(
        layer.current_weights(state, 2), state.weights, layer.initial_weights, strict=True
    ):
        assert torch.equal(now[0], written[0])
        assert torch.equal(now[1], learned)
