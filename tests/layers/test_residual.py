"""Check 19 of B'MOJO's specification: the errors that a delta rule returns, and the innovation that its layers do.

The loop over tokens is the truth, float64 unless a test says otherwise.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers import (
    MATRIX_RULES,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LinearAttention,
    MatrixMemory,
    RetNet,
)
from memzoo.layers.ops import backend, recurrence, recurrence_scan
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.reference.delta_rule import delta_rule as delta_loop
from tests.layers.recurrence_cases import (
    RULES,
    assert_close,
    assert_same_bits,
    borders,
    cast,
    decay_of_channels,
    make_case,
    random_cases,
    run,
    tokens,
)

TOLERANCE = 1e-10
DELTA_RULES = {name: rule for name, rule in RULES.items() if rule.has_delta}
each_rule = pytest.mark.parametrize("rule", DELTA_RULES.values(), ids=DELTA_RULES)
LAYOUTS = {
    "rows": ({"batch": 2, "time": 23}, {}),
    "lengths": ({"batch": 3, "time": 23}, {"lengths": torch.tensor([9, 0, 23])}),
    "segments": ({"batch": 1, "time": 27, "states": 6}, {"cu_seqlens": borders([1, 0, 11, 14, 0, 1])}),
    "step": ({"batch": 3, "time": 1}, {}),
    "step_of_lengths": ({"batch": 3, "time": 1}, {"lengths": torch.tensor([1, 0, 1])}),
    "step_of_segments": ({"batch": 1, "time": 3, "states": 4}, {"cu_seqlens": borders([1, 1, 0, 1])}),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
gradients_on_or_off = pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_gradients"])


def laid_out(rule, layout):
    sizes, options = LAYOUTS[layout]
    return make_case(rule, group=2, **sizes), options


def corrections(case, state):
    """``beta (v - k S)`` of the first token of every row, whose memories are ``state``: (batch, value heads, V)."""
    group = case["v"].shape[2] // case["k"].shape[2]
    key = case["k"][:, 0].repeat_interleave(group, 1)
    error = case["v"][:, 0] - torch.einsum("bhk,bhkv->bhv", key, decay_of_channels(case)[:, 0].exp()[..., None] * state)
    return case["beta"][:, 0, :, None] * error


# The op.


@each_rule
def test_19_the_loop_returns_what_its_state_before_every_token_gets_wrong(rule):
    case = make_case(rule, group=2)
    _, _, residual = delta_loop(**case, return_residual=True)
    state = case["state"]
    for t in range(11):
        token = tokens(case, times=slice(t, t + 1))
        assert_close(case["beta"][:, t, :, None] * residual[:, t], corrections(token, state), TOLERANCE)
        _, state = delta_loop(**token, state=state)


@each_rule
@each_layout
@gradients_on_or_off
@pytest.mark.parametrize("stretch", [1, recurrence_scan.STRETCH], ids=["chunk_by_chunk", "at_once"])
def test_19_residuals_equal_the_loop(monkeypatch, rule, layout, gradients, stretch):
    monkeypatch.setattr(recurrence_scan, "STRETCH", stretch)
    case, options = laid_out(rule, layout)
    expected = delta_loop(**case, **options, return_residual=True)
    leaves = {name: x.clone().requires_grad_() for name, x in case.items()}
    with torch.set_grad_enabled(gradients):
        actual = delta_rule(**leaves, **options, chunk_size=4, return_residual=True)
    assert actual[2].shape == case["v"].shape
    assert_close([x.detach() for x in actual], list(expected), TOLERANCE)


@random_cases
@given(
    st.sampled_from(list(DELTA_RULES.values())),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.booleans(),
)
def test_19_any_cutting_gives_the_residuals_of_one_call(rule, pieces, gradients):
    case = make_case(rule, time=sum(pieces))
    state, residuals, start = case["state"], [], 0
    with torch.set_grad_enabled(gradients):
        for length in pieces:
            piece = tokens(case, times=slice(start, start + length))
            _, state, residual = delta_rule(**piece, state=state, chunk_size=4, return_residual=True)
            residuals.append(residual)
            start += length
    assert_close(torch.cat(residuals, 1), delta_loop(**case, return_residual=True)[2], TOLERANCE)


@each_rule
@each_layout
def test_19_outputs_state_and_gradients_have_the_same_bits_with_residuals(rule, layout):
    case, options = laid_out(rule, layout)
    expected = run(delta_rule, case, **options, chunk_size=4)

    def without_residual(**arguments):
        return delta_rule(**arguments, chunk_size=4, return_residual=True)[:2]

    assert_same_bits(run(without_residual, case, **options), expected)
    with torch.no_grad():
        assert_same_bits(without_residual(**case, **options), delta_rule(**case, **options, chunk_size=4))


@each_rule
@pytest.mark.parametrize("function", [delta_rule, delta_loop], ids=["op", "loop"])
def test_19_no_gradient_flows_through_residuals(rule, function):
    case = {name: x.requires_grad_() for name, x in make_case(rule).items()}
    y, state, residual = function(**case, return_residual=True)
    assert y.requires_grad
    assert state.requires_grad
    assert not residual.requires_grad


@each_rule
def test_19_residuals_past_the_lengths_are_zero_whatever_lies_there(rule):
    case, lengths = make_case(rule, batch=3, time=9), torch.tensor([4, 9, 0])
    behind = torch.arange(9) >= lengths[:, None]
    expected = delta_loop(**case, lengths=lengths, return_residual=True)[2]
    for name in tokens(case):
        case[name][behind] = torch.nan
    case["state"][2] = torch.inf
    residual = delta_rule(**case, lengths=lengths, chunk_size=4, return_residual=True)[2]
    assert not residual[behind].any()
    assert_close(residual, expected, TOLERANCE)


@each_rule
def test_19_residuals_of_bfloat16_are_in_float32(rule):
    case = cast(make_case(rule, time=40), torch.bfloat16)
    exact = delta_loop(**cast(case, torch.float64), return_residual=True)[2]
    for function in (delta_rule, delta_loop):
        y, _, residual = function(**case, return_residual=True)
        assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
        assert_close(residual.double(), exact, 1e-5)


@pytest.mark.parametrize("rule", [RULES["kda"]], ids=["kda"])
def test_19_with_residuals_it_compiles_whole(rule):
    case = make_case(rule, time=3)  # a chunk and a part of one
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    leaves = {name: x.clone().requires_grad_() for name, x in case.items()}
    *_, residual = compiled(**leaves, chunk_size=2, return_residual=True)
    assert not residual.requires_grad
    assert_close(residual, delta_loop(**case, return_residual=True)[2], TOLERANCE)
    actual = run(lambda **x: compiled(**x, chunk_size=2, return_residual=True)[:2], case)
    assert_close(actual, run(delta_rule, case, chunk_size=2), 1e-12)


def test_19_kernels_without_residuals_are_passed_over_and_refused_by_name(monkeypatch):
    case = make_case(RULES["kda"])
    monkeypatch.setattr(recurrence, "check_backend", lambda *_: None)
    monkeypatch.setattr(recurrence, "choose_fla", lambda backend, *_: backend != "torch")
    _, _, residual = delta_rule(**case, return_residual=True)
    assert_close(residual, delta_loop(**case, return_residual=True)[2], TOLERANCE)
    with pytest.raises(ValueError, match=r"return_residual=True .*backend='fla'.*use backend='torch' or 'auto'"):
        delta_rule(**case, backend="fla", return_residual=True)


# The rules and the layers.

DIM = 10
DELTA_LAYERS = [DeltaNet, GatedDeltaNet, KimiDeltaAttention]
each_layer = pytest.mark.parametrize("cls", DELTA_LAYERS)


def build(cls: type[MatrixMemory], **options: object) -> MatrixMemory:
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "head_dim": 6, "num_value_heads": 4, "value_dim": 3, "chunk_size": 4}
    return cls(DIM, **sizes | options).double()


def inputs(time: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mix(layer, x, state=None, *, lengths=None, **options):
    return layer.mix(x, state, lengths=lengths, trace=None, donate=False, **options)


def by_the_loop(layer, x):
    """The innovation of every token, from what the layer gives to its rule and the loop's states between tokens."""
    calls = []
    hook = layer.rule.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    with torch.no_grad():
        mix(layer, x)
        hook.remove()
        q, k, v, gates, _ = calls[0]
        beta, log_decay = layer.rule.gate_values(gates, v)
    case = {"q": q, "k": k, "v": v, "beta": beta} | ({} if log_decay is None else {"log_decay": log_decay})
    case = {name: part.detach() for name, part in case.items()}
    state, found = torch.zeros(len(x), *layer.rule.state_shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        token = tokens(case, times=slice(t, t + 1))
        found.append(corrections(token, state).square().sum((1, 2)).sqrt())
        _, state = delta_loop(**token, state=state)
    return torch.stack(found, 1)


@each_layer
@gradients_on_or_off
def test_19_innovation_is_what_the_loop_writes_over_all_heads(cls, gradients):
    layer, x = build(cls), inputs()
    with torch.set_grad_enabled(gradients):
        (_, innovation), _ = mix(layer, x, return_innovation=True)
    assert not innovation.requires_grad
    assert_close(innovation, by_the_loop(layer, x), TOLERANCE)


@each_layer
def test_19_innovation_of_rows_and_segments_is_that_of_each_alone(cls):
    layer, x, lengths = build(cls), inputs(batch=3), [4, 9, 0]
    expected = by_the_loop(layer, x)
    (_, padded), _ = mix(layer, x, lengths=torch.tensor(lengths), return_innovation=True)
    row = torch.cat([x[i, :length] for i, length in enumerate(lengths)])[None]
    (_, packed), _ = mix(layer, row, cu_seqlens=borders(lengths), return_innovation=True)
    for i, length in enumerate(lengths):
        assert_close(padded[i, :length], expected[i, :length], TOLERANCE)
        assert not padded[i, length:].any()
    assert_close(packed, torch.cat([expected[0, :4], expected[1]])[None], TOLERANCE)


@each_layer
@pytest.mark.parametrize("pieces", [[1] * 9, [2, 1, 5, 1]], ids=["steps", "pieces"])
@gradients_on_or_off
def test_19_innovation_goes_on_from_call_to_call(cls, pieces, gradients):
    layer, x, state, found = build(cls), inputs(), None, []
    with torch.set_grad_enabled(gradients):
        for piece in x.split(pieces, 1):
            (_, innovation), state = mix(layer, piece, state, return_innovation=True)
            found.append(innovation)
    assert_close(torch.cat(found, 1), by_the_loop(layer, x), TOLERANCE)


@each_layer
def test_19_a_layer_changes_no_bit_when_asked_for_its_innovation(cls):
    memory, innovation, results = {"return_memory": True}, {"return_innovation": True}, []
    for options in ({}, memory, innovation, memory | innovation):
        layer, x = build(cls), inputs().requires_grad_()
        y, state = mix(layer, x, **options)
        y, *more = y if options else (y,)
        gradients = torch.autograd.grad(y.sum() + state.memory.square().sum(), [x, *layer.parameters()])
        results.append(([y.detach(), state.memory.detach(), *gradients], more))
    for alike, _ in results[1:]:
        assert_same_bits(alike, results[0][0])
    assert_same_bits(results[3][1], [results[1][1][0], results[2][1][0]])


@each_layer
def test_19_innovation_is_in_float32_at_least(cls):
    layer, x = build(cls), inputs()
    exact = by_the_loop(layer, x)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        (y, innovation), _ = mix(layer, x, return_innovation=True)
    assert (y.dtype, innovation.dtype) == (torch.bfloat16, torch.float32)
    assert_close(innovation.double(), exact, 2**-5)  # projections in bfloat16, 8 bits, each a sum of ten terms


@pytest.mark.parametrize("cls", [LinearAttention, RetNet, GatedLinearAttention, *DELTA_LAYERS])
def test_19_a_layer_gives_its_innovation_or_says_that_it_has_none(monkeypatch, cls):
    layer = build(cls)
    assert layer.gives_innovation == (cls in DELTA_LAYERS)
    monkeypatch.setattr(backend, "is_installed", lambda _: True)
    by_kernels = build(cls, backend="fla", **({"normalize": False} if cls is LinearAttention else {}))
    for other in [by_kernels] if layer.gives_innovation else [layer, by_kernels]:
        assert not other.gives_innovation
        words = f"return_innovation=True, but {cls.__name__} with backend={other.rule.backend!r} .*use a delta rule"
        with pytest.raises(ValueError, match=words):
            mix(other, inputs(), return_innovation=True)


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_19_a_rule_returns_its_residual_or_says_that_it_has_none(name):
    rule = MATRIX_RULES[name](num_heads=1, key_dim=2, value_dim=3).double()
    q, k, v = (torch.randn(2, 5, 1, width, dtype=torch.float64) for width in (2, 2, 3))
    gates = torch.randn(2, 5, rule.gate_width, dtype=torch.float64) if rule.gate_width else None
    if not rule.has_residual:
        with pytest.raises(ValueError, match=f"return_residual=True, but {type(rule).__name__}.*'gated_deltanet'"):
            rule(q, k, v, gates, return_residual=True)
        return
    beta, log_decay = rule.gate_values(gates, v)
    assert_close(
        rule(q, k, v, gates, return_residual=True)[2],
        delta_loop(q, k, v, beta, log_decay, None, return_residual=True)[2],
        TOLERANCE,
    )
