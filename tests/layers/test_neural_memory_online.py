"""The online linear memory, parallel in chunks, against the loop over tokens; numbered as in its specification."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.ops.neural_memory_online import neural_memory_online, neural_memory_online_scan
from memzoo.layers.reference import neural_memory as reference
from memzoo.layers.trace import Trace
from tests.layers.neural_memory_cases import (
    Case,
    assert_close,
    assert_same_bits,
    gradients,
    make_case,
    random_cases,
    take,
    without,
)
from tests.layers.neural_memory_online_cases import linear_case


def plain_case(**sizes: Any) -> Case:
    """No momentum, no forgetting, no anchor."""
    case = without(linear_case(**sizes), "anchor", "momentum")
    return case | {"eta": None, "alpha": torch.zeros_like(case["alpha"])}


def loop(**arguments: Any) -> Any:
    return reference.neural_memory(**arguments | {"chunk_size": 1})


def test_00_its_arguments_are_those_of_the_general_op():
    ours, general = (inspect.signature(op).parameters for op in (neural_memory_online, neural_memory))
    assert list(ours) == [name for name in general if name in ours]
    assert all(ours[name] == general[name] for name in ours if name != "chunk_size")


# 2-4. The parallel form equals the loop.


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Case]:
    """Any arguments the op accepts: shapes, ragged rows, and every option beside every other."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    sizes = {"heads": draw(st.integers(1, 2)), "dim": draw(st.integers(1, 3)), "value_dim": draw(st.integers(1, 3))}
    case = linear_case(batch=batch, time=length, **sizes, seed=draw(st.integers(0, 99)))
    dropped = draw(st.sets(st.sampled_from(["eta", "momentum", "anchor"])))
    lengths = st.lists(st.integers(0, length), min_size=batch, max_size=batch).map(torch.tensor)
    return case | dict.fromkeys(dropped), {
        "chunk_size": draw(st.integers(1, 10)),
        "loss_scale": draw(st.sampled_from([1.0, 2.0])),
        "read": draw(st.sampled_from(["post", "pre"])),
        "lengths": draw(st.none() | lengths),
    }


@random_cases
@given(cases())
def test_02_it_equals_the_loop_whatever_the_arguments(drawn):
    case, options = drawn
    assert_close(neural_memory_online(**case, **options), loop(**case, **options))


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 37])
def test_02_it_equals_the_loop_over_many_tokens_for_any_chunk(chunk_size):
    case = linear_case(time=37, dim=5)
    case["alpha"] = case["alpha"] / 8
    assert_close(neural_memory_online(**case, chunk_size=chunk_size), loop(**case))


@pytest.mark.parametrize(
    ("dropped", "options"),
    [
        (("anchor",), {}),
        (("anchor", "momentum"), {"read": "pre"}),
        (("eta", "momentum"), {"loss_scale": 2.0}),
        (("eta", "momentum", "anchor"), {"read": "pre", "lengths": torch.tensor([6, 3])}),
        ((), {"read": "pre", "loss_scale": 2.0, "lengths": torch.tensor([0, 5])}),
    ],
    ids=["momentum", "pre", "no-momentum", "plain", "all"],
)
def test_03_outer_gradients_equal_the_loop(dropped, options):
    case = without(linear_case(time=6), *dropped)
    options = options | ({"eta": None} if "eta" in dropped else {})
    expected = gradients(loop, case, **options)
    for chunk_size in (1, 4, 6):
        assert_close(gradients(neural_memory_online, case, chunk_size=chunk_size, **options), expected)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["y", "weights", "momentum"])
def test_03_every_output_alone_has_its_gradient(output):
    case = linear_case(time=5)
    actual = gradients(lambda **inputs: neural_memory_online(**inputs, chunk_size=2)[output], case)
    assert_close(actual, gradients(lambda **inputs: loop(**inputs)[output], case))


def test_03_every_input_alone_has_its_gradient():
    case = linear_case(time=5)
    together = gradients(neural_memory_online, case, chunk_size=2)
    alone = [
        gradients(neural_memory_online, {name: x}, **without(case, name), chunk_size=2) for name, x in case.items()
    ]
    assert_close([g for one in alone for g in one], together)


def test_03_gradcheck():
    case = linear_case(batch=1, heads=1, time=6, value_dim=2)
    leaves = [x.requires_grad_() for x in tree_leaves(case)]

    def function(*values: Tensor) -> list[Tensor]:
        rest = iter(values)
        return tree_leaves(neural_memory_online(**tree_map(lambda _: next(rest), case), chunk_size=4))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


def test_03_second_derivatives_are_refused_rather_than_wrong():
    case = tree_map(lambda x: x.requires_grad_(), linear_case(time=5))
    y, _, _ = neural_memory_online(**case)
    (g,) = torch.autograd.grad(y.square().sum(), case["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.square().sum().backward()


def test_04_no_output_depends_on_a_later_token():
    case = linear_case(batch=1, time=7)
    tokens = [case[name].requires_grad_() for name in ("q", "k", "v", "theta", "eta", "alpha")]
    y, _, _ = neural_memory_online(**case, chunk_size=4)
    for t in range(7):
        for g in torch.autograd.grad(y[:, t].sum(), tokens, retain_graph=True):
            assert not g[:, t + 1 :].any()


# 7-9. Gates at their extremes, and the delta-rule family.


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_07_gates_of_exactly_zero_and_one_make_no_nan(eta, alpha):
    case = linear_case(time=5)
    case["eta"].fill_(eta)
    case["alpha"].fill_(alpha)
    assert_close(neural_memory_online(**case, chunk_size=3), loop(**case))
    assert_close(gradients(neural_memory_online, case, chunk_size=3), gradients(loop, case))


def test_07_full_forgetting_without_past_surprise_keeps_the_last_step_alone():
    case = without(linear_case(time=6), "anchor")
    case["eta"][:, -1], case["alpha"][:, -1] = 0, 1
    _, (before,), _ = neural_memory_online(**take(case, times=slice(5)))
    k, v, theta = (case[name][:, -1, :, None] for name in ("k", "v", "theta"))
    step = -theta[..., None] * k.mT @ (k @ before - v)
    assert_close(neural_memory_online(**case)[1:], ((step,), (step,)))


def test_08_momentum_gate_of_zero_equals_no_momentum():
    case = linear_case()
    y, weights, _ = neural_memory_online(**case | {"eta": torch.zeros_like(case["eta"])}, chunk_size=4)
    plain = neural_memory_online(**case | {"eta": None, "momentum": None}, chunk_size=4)
    assert plain[2] == ()
    assert_close((y, weights), plain[:2])


def delta_rule(case: Case, beta: Tensor, decay: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet, a token at a time: W = a (1 - b k^T k) W + b k^T v, y = q W."""
    (W,), y, one = case["weights"], [], torch.eye(case["k"].shape[-1], dtype=torch.float64)
    for q_t, k_t, v_t, b, a in zip(*(x.unbind(1) for x in (case["q"], case["k"], v, beta, decay)), strict=True):
        a, b, key = a[..., None, None], b[..., None, None], k_t[..., None]
        W = a * (one - b * key * k_t[..., None, :]) @ W + b * key * v_t[..., None, :]
        y.append((q_t[..., None, :] @ W).squeeze(-2))
    return torch.stack(y, 1), W


def test_08_without_momentum_and_forgetting_it_is_deltanet():
    case = plain_case()
    y, (weights,), _ = neural_memory_online(**case, chunk_size=4)
    assert_close((y, weights), delta_rule(case, case["theta"], torch.ones_like(case["theta"]), case["v"]))


def test_08_a_full_step_on_a_unit_key_overwrites():
    case = plain_case()
    case |= {"theta": torch.ones_like(case["theta"]), "q": case["k"]}
    assert_close(neural_memory_online(**case, chunk_size=4)[0], case["v"], 1e-13)


def test_09_without_momentum_it_is_gated_deltanet_after_a_change_of_gates():
    case = plain_case()
    case["alpha"] = make_case(seed=1)["alpha"]
    y, (weights,), _ = neural_memory_online(**case, chunk_size=4)
    decay = 1 - case["alpha"]
    assert_close((y, weights), delta_rule(case, case["theta"] / decay, decay, decay[..., None] * case["v"]))


def test_09_gated_deltanet_is_this_memory_after_a_change_of_gates():
    case, decay = plain_case(), 0.1 + 0.9 * make_case(seed=1)["alpha"]
    ours = case | {"theta": decay * case["theta"], "alpha": 1 - decay, "v": case["v"] / decay[..., None]}
    y, (weights,), _ = neural_memory_online(**ours, chunk_size=4)
    assert_close((y, weights), delta_rule(case, case["theta"], decay, case["v"]))


def test_09_longhorn_is_this_memory_with_a_smaller_step():
    """Longhorn's implicit step: W_t minimises |W - W_{t-1}|^2 + theta |k W - v|^2."""
    case = plain_case()
    case |= {"theta": 4 * case["theta"], "k": 1.5 * case["k"]}
    step = case["theta"] / (1 + case["theta"] * case["k"].square().sum(-1))
    (W,), y, one = case["weights"], [], torch.eye(3, dtype=torch.float64)
    for t in range(case["q"].shape[1]):
        key, value, query = (case[name][:, t, :, None] for name in ("k", "v", "q"))
        theta = case["theta"][:, t, :, None, None]
        W = torch.linalg.solve(one + theta * key.mT @ key, W + theta * key.mT @ value)
        y.append((query @ W).squeeze(-2))
    ours, (weights,), _ = neural_memory_online(**case | {"theta": step}, chunk_size=4)
    assert_close((ours, weights), (torch.stack(y, 1), W))


# 11, 13, 14. Keys that are orthogonal, keys that repeat, and what must not matter.


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_11_orthonormal_keys_are_recalled_exactly(chunk_size):
    case = plain_case(batch=1, heads=1, dim=5, value_dim=5, time=5)
    keys = torch.linalg.qr(case["weights"][0][0, 0]).Q
    case |= {"k": keys[None, :, None], "q": keys[None, :, None], "theta": torch.ones_like(case["theta"])}
    y, (weights,), _ = neural_memory_online(**case, chunk_size=chunk_size)
    assert_close(y, case["v"])
    assert_close(keys @ weights[0, 0], case["v"][0, :, 0])


@pytest.mark.parametrize("loss_scale", [1.0, 2.0])
@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.0), (0.5, 0.1), (0.8, 0.3)])
@pytest.mark.parametrize(("factor", "diverges"), [(0.99, False), (1.01, True)])
def test_13_a_repeated_key_is_stable_up_to_the_bound_on_theta(eta, alpha, factor, diverges, loss_scale):
    case = without(linear_case(batch=1, heads=1, dim=2, time=800), "anchor", "momentum")
    case |= {name: case[name][:, :1].expand(case[name].shape) for name in ("k", "v")}
    gates = {"theta": factor * (2 - alpha) * (1 + eta) / loss_scale, "eta": eta, "alpha": alpha}
    case |= {name: torch.full_like(case[name], value) for name, value in gates.items()}
    y, _, _ = neural_memory_online(**case | {"q": case["k"]}, loss_scale=loss_scale)
    error = (y - case["v"]).norm(dim=-1).flatten()
    assert bool(error[-1] > 1e3 * error[0]) == diverges
    assert diverges or error.max() < 10 * case["v"].norm()


def test_14_rows_and_heads_do_not_see_each_other():
    case, other = linear_case(heads=3), linear_case(heads=3, seed=1)
    mixed = tree_map(lambda a, b: torch.stack([a[0], b[1]]), case, other)
    before, after = (neural_memory_online(**c, chunk_size=4) for c in (case, mixed))
    assert_same_bits(tree_map(lambda x: x[0], after), tree_map(lambda x: x[0], before))
    alone = [neural_memory_online(**take(case, heads=[head]), chunk_size=4)[0] for head in range(3)]
    assert_close(before[0], torch.cat(alone, 2))


# 20-21. Modes, precision, cost.


def test_20_it_learns_the_same_without_grad_and_compiled():
    case = linear_case()
    with torch.no_grad():
        frozen = neural_memory_online(**case, chunk_size=4)
    recorded = neural_memory_online(**tree_map(lambda x: x.clone().requires_grad_(), case), chunk_size=4)
    compiled = torch.compile(neural_memory_online, fullgraph=True, backend="eager")
    assert_same_bits(frozen, tree_map(Tensor.detach, recorded))
    assert_same_bits(frozen, compiled(**case, chunk_size=4))
    assert_same_bits(gradients(compiled, case, chunk_size=4), gradients(neural_memory_online, case, chunk_size=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_20_low_precision_is_computed_and_kept_in_float32(dtype):
    case = without(linear_case(time=64, dim=16, value_dim=16), "anchor")
    case["alpha"] = case["alpha"] / 8
    low = {name: x.to(dtype) if name in ("q", "k", "v") else tree_map(Tensor.float, x) for name, x in case.items()}
    rounded = case | {name: low[name].double() for name in ("q", "k", "v")}
    outputs = neural_memory_online(**low, chunk_size=16)
    for a, b in zip(tree_leaves(outputs), tree_leaves(neural_memory_online(**rounded)), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_20_autocast_changes_neither_the_result_nor_its_gradients():
    case = tree_map(Tensor.float, linear_case(time=9))
    expected = neural_memory_online(**case), gradients(neural_memory_online, case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits((neural_memory_online(**case), gradients(neural_memory_online, case)), expected)


def test_21_work_grows_linearly_in_time():
    def flops(time: int) -> int:
        with FlopCounterMode(display=False) as counter:
            gradients(neural_memory_online, linear_case(time=time), chunk_size=8)
        return counter.get_total_flops()

    assert flops(64) > 0
    assert flops(128) == 2 * flops(64)


# What it reports, and refuses.


def test_surprise_is_the_norm_of_the_error_before_the_write():
    case, lengths, trace = linear_case(time=5), torch.tensor([5, 3]), Trace()
    result = neural_memory_online_scan(**case, loss_scale=2.0, chunk_size=3, lengths=lengths, trace=trace)
    assert_same_bits(result, neural_memory_online(**case, loss_scale=2.0, chunk_size=3, lengths=lengths))
    recalled = loop(**case | {"q": case["k"]}, loss_scale=2.0, read="pre", lengths=lengths)[0]
    expected = (recalled - case["v"]).norm(dim=-1)
    expected[1, 3:] = 0
    assert_close(trace.signals["surprise"], expected)


def test_a_trace_that_wants_no_signals_gets_none():
    trace = Trace(signals=False)
    neural_memory_online_scan(**linear_case(time=3), trace=trace)
    assert not trace.signals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"weights": make_case(time=4)["weights"], "v": torch.zeros(2, 4, 2, 3).double()}, r"use neural_memory\("),
        ({"weights": ()}, r"weights=\(\)"),
        ({"weights": (torch.zeros(2, 2, 4, 4),)}, r"weights\[0\] has shape \(2, 2, 4, 4\)"),
        ({"q": torch.zeros(2, 4, 3)}, r"q has shape \(2, 4, 3\)"),
        ({"k": torch.zeros(2, 4, 2, 2)}, r"k has shape \(2, 4, 2, 2\)"),
        ({"v": torch.zeros(2, 4, 2, 3)}, r"v has shape \(2, 4, 2, 3\)"),
        ({"eta": torch.zeros(2, 4, 1)}, r"eta has shape \(2, 4, 1\)"),
        ({"momentum": (torch.zeros(2, 2, 3, 3),)}, "momentum has shapes"),
        ({"anchor": (torch.zeros(2, 2, 3, 3),)}, "anchor has shapes"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \(1,\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"loss_scale": 0.0}, r"loss_scale=0.0 is not positive; use 1"),
        ({"read": "past"}, "did you mean 'post'"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        neural_memory_online(**linear_case(time=4) | {"anchor": None, "momentum": None} | bad)


def test_20_float32_stays_near_float64_where_keys_repeat_under_long_momentum() -> None:
    draw = torch.Generator().manual_seed(0)
    one, noise, v = (torch.randn(1, time, 1, 16, generator=draw) for time in (1, 256, 256))
    k = torch.nn.functional.normalize(one + 0.1 * noise, dim=-1)
    gate = torch.ones(1, 256, 1)
    arguments = (k, k, v, gate, 0.99 * gate, 0.01 * gate, (torch.zeros(1, 1, 16, 16),))
    y, _, _ = neural_memory_online(*arguments)
    exact, _, _ = neural_memory_online(*tree_map(lambda x: x.double(), arguments))
    assert (y - exact).norm() < 1e-3 * exact.norm()
