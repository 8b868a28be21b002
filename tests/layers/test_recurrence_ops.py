"""What the linear recurrence and the delta rule have in common: each of the six rules against its loop over tokens.

Numbered as in the specification; float64 unless a test says otherwise.
"""

import inspect
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.layers.recurrence_cases import (
    RULES,
    Case,
    LargestTensor,
    Rule,
    assert_close,
    assert_same_bits,
    borders,
    cast,
    each_rule,
    make_case,
    random_cases,
    run,
    tokens,
    without,
)

with_decay = [name for name, rule in RULES.items() if rule.decay is not None]
each_decay = pytest.mark.parametrize("rule", [RULES[name] for name in with_decay], ids=with_decay)
NAMES = {"linear_recurrence": RULES["ssd"], "delta_rule": RULES["gated_deltanet"]}
each_op = pytest.mark.parametrize("rule", NAMES.values(), ids=NAMES)


@each_op
def test_00_op_and_reference_have_one_signature(rule):
    assert inspect.signature(rule.op) == inspect.signature(rule.loop)


# 4. The chunk form equals the loop.


@cache
def long_case(name: str, start: bool) -> tuple[Case, dict[str, Tensor]]:
    """A case of more than one chunk of 64, and what the loop makes of it."""
    rule = RULES[name]
    case = make_case(rule, time=70, group=2)
    case = case if start else without(case, "state")
    return case, run(rule.loop, case)


@pytest.mark.parametrize("chunk_size", [1, 16, 32, 64])
@pytest.mark.parametrize("start", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("name", RULES)
def test_04_outputs_state_and_all_gradients_equal_the_loop(name, start, chunk_size):
    case, expected = long_case(name, start)
    assert_close(run(RULES[name].op, case, chunk_size=chunk_size), expected)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rule, Case, dict[str, object]]:
    """Any arguments the ops accept: shapes, ragged rows, segments, and every option beside every other."""
    rule = draw(st.sampled_from(list(RULES.values())))
    layout = draw(st.sampled_from(["dense", "lengths", "cu_seqlens"]))
    options: dict[str, object] = {
        "chunk_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16, 64])),
        "scale": draw(st.sampled_from([None, 1.0, -0.3])),
    }
    batch, time, states = draw(st.integers(1, 3)), draw(st.integers(1, 20)), None
    if layout == "lengths":
        lengths = st.lists(st.integers(0, time), min_size=batch, max_size=batch).filter(any)
        options["lengths"] = torch.tensor(draw(lengths))
    elif layout == "cu_seqlens":
        segments = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
        batch, time, states = 1, sum(segments), len(segments)
        options["cu_seqlens"] = borders(segments)
    sizes = {name: draw(st.integers(1, 3)) for name in ("heads", "group", "key_dim", "value_dim")}
    case = make_case(rule, batch=batch, time=time, states=states, seed=draw(st.integers(0, 99)), **sizes)
    return rule, case if draw(st.booleans()) else without(case, "state"), options


@random_cases
@given(cases())
def test_04_it_equals_the_loop_whatever_the_arguments(drawn):
    rule, case, options = drawn
    assert_close(run(rule.op, case, **options), run(rule.loop, case, **options))


@each_rule
@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_04_every_output_alone_has_its_gradients(rule, output):
    case, parts = make_case(rule, time=9), []
    for function in (rule.op, rule.loop):
        leaves = {name: x.clone().requires_grad_() for name, x in case.items()}
        total = (function(**leaves, chunk_size=4)[output] ** 3).sum()
        parts.append(torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True))
    assert_close(*parts)


@each_rule
def test_04_every_input_alone_has_its_gradient(rule):
    case = make_case(rule, time=9)
    together = run(rule.op, case, chunk_size=4)
    for name in case:
        alone = run(lambda x, name=name: rule.op(**case | {name: x}, chunk_size=4), {"x": case[name]})
        assert_same_bits(alone["gradient of x"], together[f"gradient of {name}"])


@each_rule
@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_04_frozen_inputs_change_no_gradient_of_the_others(rule, layout):
    case, options = laid_out(rule, layout)
    together = run(rule.op, case, **options)
    for frozen in [*combinations(case, 1), *combinations(case, 2)]:
        rest = run(lambda frozen=frozen, **x: rule.op(**case | x, **options), without(case, *frozen))
        assert_same_bits(rest, without(together, *(f"gradient of {name}" for name in frozen)))


def laid_out(rule: Rule, layout: str) -> tuple[Case, dict[str, object]]:
    """A case of two states, of a row each or of a segment each."""
    if layout == "rows":
        return make_case(rule, time=9), {"chunk_size": 4}
    return make_case(rule, batch=1, time=12, states=2), {"chunk_size": 4, "cu_seqlens": borders([9, 3])}


@each_rule
@pytest.mark.parametrize("layout", ["rows", "segments", "token"])
def test_04_the_state_may_lie_in_memory_in_any_order(rule, layout):
    case, options = (make_case(rule, time=1), {}) if layout == "token" else laid_out(rule, layout)
    expected = run(rule.op, case, **options)
    for axes in [(0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)]:  # each its own inverse
        state = case["state"].permute(axes).contiguous().permute(axes)
        assert not state.is_contiguous()
        assert_close(run(rule.op, case | {"state": state}, **options), expected, 1e-12)


@each_rule
def test_04_without_gradients_the_results_are_the_same_bits(rule):
    case = make_case(rule, time=20)
    expected = run(rule.op, case, chunk_size=8)
    with torch.inference_mode():
        y, state = rule.op(**case, chunk_size=8)
    assert_same_bits((y, state), (expected["y"], expected["state"]))


@each_decay
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_04_strong_decays_among_weak_ones_equal_the_loop(rule, chunk_size):
    case = make_case(rule, time=70)
    strengths = torch.tensor([-200.0, -20.0, -1.0, -1e-3, 0.0], dtype=torch.float64)
    case["log_decay"] = strengths[torch.randint(5, case["log_decay"].shape, generator=torch.Generator().manual_seed(2))]
    expected = run(rule.loop, case)
    assert_close(run(rule.op, case, chunk_size=chunk_size), expected)
    single = run(rule.op, cast(case, torch.float32), chunk_size=chunk_size)
    assert_close({name: x.double() for name, x in single.items()}, expected, 1e-5)


@random_cases
@given(cases(), st.lists(st.sampled_from([-torch.inf, -5.0, -0.1, 0.0, 0.1]), min_size=1), st.integers(0, 99))
def test_04_decays_that_forget_all_or_let_the_memory_grow_equal_the_loop(drawn, decays, seed):
    """Where all is forgotten, the gradient of the decay is zero."""
    rule, case, options = drawn
    assume(rule.decay is not None)
    shape, draw = case["log_decay"].shape, torch.Generator().manual_seed(seed)
    values = torch.tensor(decays, dtype=torch.float64)
    case["log_decay"] = values[torch.randint(len(decays), shape, generator=draw)]
    assert_close(run(rule.op, case, **options), run(rule.loop, case, **options))


@each_decay
def test_04_decays_that_forget_all_lose_nothing_of_weak_ones_beside_them_in_float32(rule):
    case = make_case(rule, time=70)
    case["log_decay"][:, ::9] = -torch.inf
    expected = run(rule.loop, case)
    single = run(rule.op, cast(case, torch.float32))
    assert_close({name: x.double() for name, x in single.items()}, expected, 1e-5)


# 9. Streaming.


@random_cases
@given(st.sampled_from(list(RULES.values())), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_09_any_cutting_gives_the_results_and_gradients_of_one_call(rule, pieces):
    case = make_case(rule, time=sum(pieces))

    def stream(state, **inputs):
        outputs, start = [], 0
        for length in pieces:
            y, state = rule.op(**tokens(inputs, times=slice(start, start + length)), state=state, chunk_size=4)
            outputs.append(y)
            start += length
        return torch.cat(outputs, 1), state

    assert_close(run(stream, case), run(rule.op, case, chunk_size=4))


# 22. Long and strongly decayed, in float32.


@each_decay
def test_22_fifty_thousand_steps_that_forget_all_are_finite_and_exact(rule):
    case = cast(make_case(rule, batch=1, time=50_000, heads=1, key_dim=4, value_dim=4), torch.float32)
    case["log_decay"].fill_(-200.0)

    def only_the_token_itself(q, k, v, state, log_decay, beta=None):
        u = v if beta is None else beta[..., None] * v
        return 0.5 * (q * k).sum(-1, keepdim=True) * u, k[:, -1, :, :, None] * u[:, -1, :, None, :]

    actual = run(rule.op, case)
    assert all(x.isfinite().all() for x in actual.values())
    assert_close(actual, run(only_the_token_itself, case), 1e-5)


@each_rule
@pytest.mark.parametrize("tracked", [False, True])
def test_22_without_gradients_no_memory_of_every_chunk_is_kept(rule, tracked):
    """They would take four times as much as the tokens; whatever else is made takes as much at most."""
    case = cast(make_case(rule, batch=1, time=2**14, heads=1, key_dim=64, value_dim=64), torch.float32)
    case = {name: x.requires_grad_(tracked) for name, x in case.items()}
    with torch.no_grad(), LargestTensor() as largest:
        rule.op(**case, chunk_size=16)
    assert largest.nbytes <= case["q"].nbytes


# Dtypes, states, compilers.


@each_rule
def test_bfloat16_is_computed_and_carried_in_float32(rule):
    case = cast(make_case(rule, time=40), torch.bfloat16)
    y, state = rule.op(**case, chunk_size=16)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y_loop, state_loop = rule.loop(**cast(case, torch.float64))
    assert_close(state.double(), state_loop, 1e-5)
    torch.testing.assert_close(y.double(), y_loop, rtol=2**-8, atol=1e-5)  # half a unit of the last of 8 bits


@each_rule
def test_the_widest_dtype_decides_and_outputs_have_that_of_the_values(rule):
    case = cast(make_case(rule), torch.float32)
    y, state = rule.op(**case | {"state": case["state"].double()})
    assert (y.dtype, state.dtype) == (torch.float32, torch.float64)


@each_rule
def test_gradients_have_the_dtypes_of_their_inputs(rule):
    case = cast(make_case(rule), torch.bfloat16) | {"state": make_case(rule)["state"].float()}
    results = run(rule.op, case)
    assert {name: results[f"gradient of {name}"].dtype for name in case} == {name: x.dtype for name, x in case.items()}


@each_rule
def test_autocast_changes_no_bit(rule):
    for time in (20, 1):
        case = cast(make_case(rule, time=time), torch.float32)
        expected = run(rule.op, case)
        with torch.autocast("cpu", torch.bfloat16):  # over the backward pass as well
            assert_same_bits(run(rule.op, case), expected)


@each_rule
@pytest.mark.parametrize("layout", ["dense", "lengths", "cu_seqlens"])
def test_no_argument_is_changed_and_the_returned_state_shares_no_memory(rule, layout):
    case = make_case(rule, batch=1, time=20)
    options = {"lengths": {"lengths": torch.tensor([20])}, "cu_seqlens": {"cu_seqlens": borders([20])}}.get(layout, {})
    before = {name: x.clone() for name, x in case.items()}
    leaves = {name: x.requires_grad_() for name, x in case.items()}
    y, state = rule.op(**leaves, **options, chunk_size=8)
    (y.sum() + state.sum()).backward()
    assert_same_bits({name: x.detach() for name, x in case.items()}, before)
    state.detach().zero_()
    assert_same_bits(case["state"].detach(), before["state"])


# `make test` compiles the layers of both (tests/contract/test_layers.py), and kda with residuals (test_residual.py).
@pytest.mark.slow
@pytest.mark.parametrize("rule", [RULES["gla"], RULES["kda"]], ids=["gla", "kda"])
def test_it_compiles_whole_with_its_gradients(rule):
    case = make_case(rule, time=20)
    compiled = torch.compile(rule.op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, case, chunk_size=8), run(rule.op, case, chunk_size=8), 1e-12)


@each_rule
def test_shapes_can_be_traced_on_the_meta_device(rule):
    y, state = rule.op(**{name: x.to("meta") for name, x in make_case(rule, group=2).items()})
    assert (y.shape, state.shape, y.device.type) == ((2, 11, 4, 4), (2, 4, 3, 4), "meta")


# Arguments that do not fit.

INTEGERS = {name: torch.zeros(2, 5, 2, width).long() for name, width in {"q": 3, "k": 3, "v": 4}.items()}
WRONG = {
    "axes": ({"q": torch.zeros(2, 5, 3)}, r"q has shape \(2, 5, 3\)"),
    "no_tokens": ({"q": torch.zeros(2, 0, 2, 3)}, r"q has shape \(2, 0, 2, 3\).*time >= 1"),
    "no_rows": ({"q": torch.zeros(0, 5, 2, 3)}, r"q has shape \(0, 5, 2, 3\)"),
    "no_heads": ({"q": torch.zeros(2, 5, 0, 3)}, r"q has shape \(2, 5, 0, 3\)"),
    "no_key_width": ({"q": torch.zeros(2, 5, 2, 0)}, r"q has shape \(2, 5, 2, 0\)"),
    "no_value_width": ({"v": torch.zeros(2, 5, 2, 0)}, r"v has shape \(2, 5, 2, 0\)"),
    "no_value_heads": ({"v": torch.zeros(2, 5, 0, 4)}, r"v has shape \(2, 5, 0, 4\)"),
    "k": ({"k": torch.zeros(2, 5, 2, 4)}, r"k has shape \(2, 5, 2, 4\).*\(2, 5, 2, 3\)"),
    "v_time": ({"v": torch.zeros(2, 4, 2, 4)}, r"v has shape \(2, 4, 2, 4\)"),
    "v_heads": ({"v": torch.zeros(2, 5, 3, 4)}, r"v has shape \(2, 5, 3, 4\).*multiple"),
    "log_decay": ({"log_decay": torch.zeros(2, 5, 2, 4)}, r"log_decay has shape \(2, 5, 2, 4\).*\(2, 5, 2, 3\)"),
    "state": ({"state": torch.zeros(2, 2, 4, 3)}, r"state has shape \(2, 2, 4, 3\).*\(2, 2, 3, 4\)"),
    "dtypes": ({"k": torch.zeros(2, 5, 2, 3)}, "k.* dtypes? .*float32"),
    "integers": (INTEGERS, "q.* dtypes? .*int64"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size=0"),
    "backend": ({"backend": "trch"}, "backend='trch'.*did you mean 'torch'"),
    "lengths": ({"lengths": torch.zeros(3).long()}, r"lengths has shape \(3,\).*\(2,\)"),
    "lengths_dtype": ({"lengths": torch.zeros(2)}, "lengths .*torch.float32"),
    "lengths_bool": ({"lengths": torch.ones(2).bool()}, "lengths .*torch.bool"),
    "batch": ({"cu_seqlens": borders([5])}, "batch.*cu_seqlens"),
}
WRONG_SEGMENTS = {
    "state_rows": ({"state": torch.zeros(1, 2, 3, 4)}, r"state has shape \(1, 2, 3, 4\).*\(2, 2, 3, 4\)"),
    "lengths": ({"lengths": torch.tensor([5])}, "lengths and cu_seqlens"),
    "none": ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens has shape \(1,\)"),
    "axes": ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens has shape \(1, 2\)"),
    "dtype": ({"cu_seqlens": torch.tensor([0.0, 2.0, 5.0])}, "cu_seqlens .*torch.float32"),
    "first": ({"cu_seqlens": torch.tensor([1, 2, 5])}, r"cu_seqlens=\[1, 2, 5\]"),
    "last": ({"cu_seqlens": torch.tensor([0, 2, 4])}, r"cu_seqlens=\[0, 2, 4\].*5"),
    "bool": ({"cu_seqlens": torch.tensor([False, True, True])}, "cu_seqlens"),
    "negative": ({"cu_seqlens": torch.tensor([0, -1, 5])}, r"cu_seqlens=\[0, -1, 5\]"),
    "falling": ({"cu_seqlens": torch.tensor([0, 6, 5])}, r"cu_seqlens=\[0, 6, 5\]"),
}
each_arity = pytest.mark.parametrize("rule", [RULES["gla"], RULES["kda"]], ids=["linear_recurrence", "delta_rule"])


@each_arity
@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(rule, change, words):
    with pytest.raises(ValueError, match=words):
        rule.op(**make_case(rule, time=5) | change)


@each_arity
@pytest.mark.parametrize(("change", "words"), WRONG_SEGMENTS.values(), ids=WRONG_SEGMENTS)
def test_segments_that_do_not_fit_are_named(rule, change, words):
    case = make_case(rule, batch=1, time=5, states=2)
    with pytest.raises(ValueError, match=words):
        rule.op(**case | {"cu_seqlens": torch.tensor([0, 2, 5])} | change)
