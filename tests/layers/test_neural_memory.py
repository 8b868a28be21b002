"""The chunk form of the neural memory against the loop over tokens, numbered as in its specification."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers.ops import neural_memory as op
from memzoo.layers.ops.neural_memory import neural_memory, neural_memory_scan
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

# The reference itself, against arithmetic on full matrices.


def test_00_reference_is_the_recurrence_written_out_for_a_linear_memory():
    case = make_case(batch=1, heads=1, time=7, depth=1)
    q, k, v, theta, eta, alpha = (case[name][0, :, 0] for name in ("q", "k", "v", "theta", "eta", "alpha"))
    W, S, A, W_b = (case[name][0][0, 0] for name in ("weights", "momentum", "anchor", "base"))
    rows = []
    for t in range(7):
        W_b = W if t in (1, 4) else W_b  # position 2 of chunks of 3
        S = eta[t] * S - theta[t] * 2.0 * torch.outer(k[t], k[t] @ W_b - v[t])
        W = (1 - alpha[t]) * W + alpha[t] * A + S
        rows.append(q[t] @ W)
    y, weights, momentum, base = reference.neural_memory_scan(**case, chunk_size=3, loss_scale=2.0, position=2)
    assert_close(y[0, :, 0], torch.stack(rows))
    assert_close((weights[0][0, 0], momentum[0][0, 0], base[0][0, 0]), (W, S, W))


def test_00_reference_takes_the_backpropagated_gradient_of_a_deep_memory():
    case = make_case(batch=1, heads=1, time=1)
    k, v, theta = case["k"][0, 0, 0], case["v"][0, 0, 0], case["theta"][0, 0, 0]
    first, second = (w[0, 0] for w in case["base"])
    hidden = torch.tanh(k @ first / 2) / 2 + 0.5  # the logistic function
    slope = hidden * (1 + (k @ first) * (1 - hidden))
    error = ((k @ first) * hidden) @ second - v
    g = torch.outer(k, (second @ error) * slope), torch.outer((k @ first) * hidden, error)
    gates = {"eta": None, "momentum": None, "anchor": None, "alpha": torch.zeros_like(case["alpha"])}
    _, weights, _ = reference.neural_memory(**case | gates, chunk_size=5, position=1)
    for after, before, d in zip(weights, case["weights"], g, strict=True):
        assert_close(after[0, 0], before[0, 0] - theta * d)


@pytest.mark.parametrize("name", ["neural_memory", "neural_memory_scan"])
def test_00_op_and_reference_have_one_signature(name):
    ours, loop = (dict(inspect.signature(getattr(module, name)).parameters) for module in (op, reference))
    assert {key: ours[key] for key in ours if key not in ("backend", "checkpoint_chunks", "trace")} == loop


# 1-3. The chunk form equals the loop.


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Case]:
    """Any arguments the op accepts: shapes, depths, phases, ragged rows, and every option beside every other."""
    batch, length, chunk_size = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    sizes = {"heads": draw(st.integers(1, 2)), "depth": draw(st.integers(1, 3)), "hidden": draw(st.integers(1, 4))}
    sizes |= {"dim": draw(st.integers(1, 3)), "value_dim": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 99))}
    if draw(st.booleans()):
        sizes |= {"value_dim": None, "with_norm": True}
    window = draw(st.just(1) | st.integers(1, 6))
    case = make_case(batch=batch, time=length, window=window, **sizes)
    if window == 1 and draw(st.booleans()):
        case["gamma"] = torch.rand_like(case["theta"])
    droppable = ["eta", "momentum", "base", "anchor", *(["gamma", "recent"] if window > 1 else [])]
    dropped = draw(st.sets(st.sampled_from(droppable)))
    case |= dict.fromkeys(dropped | ({"momentum"} if "eta" in dropped else set()))
    integers = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    return case, {
        "chunk_size": chunk_size,
        "activation": draw(st.sampled_from(["silu", "gelu", "relu", "identity"])),
        "loss_scale": draw(st.sampled_from([1.0, 2.0])),
        "read": draw(st.sampled_from(["post", "pre"])),
        "position": draw(st.integers(0, 12) | integers.map(torch.tensor)),
        "max_gradient_norm": draw(st.sampled_from([None, 0.5])),
        "lengths": draw(st.none() | integers.map(torch.tensor)),
        "window": window,
    }


@random_cases
@given(cases())
def test_01_chunk_form_equals_the_reference_whatever_the_arguments(drawn):
    case, options = drawn
    assert_close(neural_memory_scan(**case, **options), reference.neural_memory_scan(**case, **options))


@random_cases
@given(cases())
@torch.no_grad()
def test_01_one_token_without_gradients_equals_the_reference_whatever_the_arguments(drawn):
    case, options = drawn
    norm, empty = case.pop("norm", None), [name for name, value in case.items() if value is None]
    case = take(without(case, *empty), times=slice(0, 1)) | dict.fromkeys(empty) | {"norm": norm}
    if options["lengths"] is not None:
        options["lengths"] = options["lengths"].clamp_max(1)
    assert_close(neural_memory_scan(**case, **options), reference.neural_memory_scan(**case, **options))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_01_chunk_form_equals_the_reference_over_many_chunks(depth):
    case = without(make_case(time=43, depth=depth, dim=4, hidden=8), "base", "anchor")
    case["theta"], case["alpha"] = case["theta"] / 8, case["alpha"] / 8
    assert_close(neural_memory(**case, chunk_size=8), reference.neural_memory(**case, chunk_size=8))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_02_one_token_chunks_equal_the_online_reference(depth):
    case = without(make_case(depth=depth), "base")
    assert_close(neural_memory(**case, chunk_size=1), reference.neural_memory(**case, chunk_size=1))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "identity"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_03_outer_gradients_equal_the_reference(depth, activation):
    case, options = make_case(depth=depth, time=7), {"chunk_size": 3, "activation": activation, "position": 2}
    expected = gradients(reference.neural_memory_scan, case, **options)
    assert_close(gradients(neural_memory_scan, case, **options), expected)


@pytest.mark.parametrize(
    ("dropped", "options"),
    [
        (("base", "anchor"), {"read": "pre"}),
        (("eta", "momentum"), {"loss_scale": 2.0}),
        ((), {"max_gradient_norm": 0.5}),
        ((), {"position": torch.tensor([3, 1]), "lengths": torch.tensor([2, 6])}),
        (("base",), {"with_norm": True, "loss_scale": 2.0, "lengths": torch.tensor([3, 5])}),
        (("base",), {"read": "pre", "max_gradient_norm": 0.5, "lengths": torch.tensor([0, 5])}),
        ((), {"window": 3, "position": 1}),
        (("eta", "momentum"), {"window": 6, "with_norm": True, "max_gradient_norm": 0.5, "read": "pre"}),
        (("recent",), {"window": 2, "position": torch.tensor([3, 0]), "lengths": torch.tensor([2, 6])}),
    ],
    ids=["pre", "no-momentum", "limited", "ragged-phases", "norm", "all", "window", "long-window", "ragged-window"],
)
def test_03_outer_gradients_equal_the_reference_with_every_option(dropped, options):
    options = dict(options)
    sizes = {"with_norm": options.pop("with_norm", False), "window": options.get("window", 1)}
    case = without(make_case(time=6, **sizes), *dropped)
    options = {"chunk_size": 4} | options | ({"eta": None} if "eta" in dropped else {})
    expected = gradients(reference.neural_memory_scan, case, **options)
    assert_close(gradients(neural_memory_scan, case, **options), expected)


@pytest.mark.parametrize("output", [0, 1, 2, 3], ids=["y", "weights", "momentum", "base"])
def test_03_every_output_alone_has_its_gradient(output):
    case, options = make_case(time=5), {"chunk_size": 4, "position": 1}
    actual = gradients(lambda **inputs: neural_memory_scan(**inputs)[output], case, **options)
    assert_close(actual, gradients(lambda **inputs: reference.neural_memory_scan(**inputs)[output], case, **options))


def test_03_every_input_alone_has_its_gradient():
    case, options = make_case(time=5), {"chunk_size": 4, "position": 1}
    together = gradients(neural_memory_scan, case, **options)
    alone = [gradients(neural_memory_scan, {name: x}, **without(case, name), **options) for name, x in case.items()]
    assert_close([g for one in alone for g in one], together)


@random_cases
@given(cases(), st.integers(1, 3))
def test_03_recomputed_groups_of_chunks_change_no_gradient(drawn, group):
    case, options = drawn
    expected = gradients(neural_memory_scan, case, **options)
    assert_close(gradients(neural_memory_scan, case, **options, checkpoint_chunks=group), expected)


def test_21_recomputed_groups_keep_one_state_a_group_for_the_backward_pass():
    def kept(time: int, group: int | None) -> int:
        case = tree_map(lambda x: x.requires_grad_(), without(make_case(time=time, dim=8, hidden=32), "base", "anchor"))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            outputs = neural_memory(**case, chunk_size=4, checkpoint_chunks=group)
        assert outputs[0].requires_grad
        return sum(event.self_cpu_memory_usage for event in events.key_averages())

    case = make_case(time=1, dim=8, hidden=32)
    state = sum(w.nbytes for w in (*case["weights"], *case["momentum"]))
    growth = {group: kept(128, group) - kept(64, group) for group in (None, 2, 8)}  # 16 chunks more
    assert growth[None] > 16 * state
    assert growth[2] - growth[8] == pytest.approx((8 - 2) * state, rel=0.1)
    assert growth[8] < growth[None] / 5


def test_03_gradcheck():
    case = make_case(batch=1, heads=1, time=6, hidden=2)
    leaves = [x.requires_grad_() for x in tree_leaves(case)]

    def function(*values: Tensor) -> list[Tensor]:
        rest = iter(values)
        return tree_leaves(neural_memory_scan(**tree_map(lambda _: next(rest), case), chunk_size=4, position=1))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


def test_03_a_gradient_of_zero_passes_the_norm_limit_without_nan():
    case = without(make_case(time=5), "base")
    case["weights"] = tuple(map(torch.zeros_like, case["weights"]))  # recalls v exactly: nothing to learn
    case["v"] = torch.zeros_like(case["v"])
    options = {"chunk_size": 3, "max_gradient_norm": 0.5}
    actual, expected = (gradients(f, case, **options) for f in (neural_memory_scan, reference.neural_memory_scan))
    assert all(g.isfinite().all() for g in actual)
    assert_close(actual, expected)


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("depth", [1, 2])
def test_03_a_token_whose_gradient_overflows_writes_nothing_and_spoils_no_gradient(depth, with_norm):
    case = without(make_case(time=5, depth=depth, with_norm=with_norm), "base")
    options = {"chunk_size": 3, "max_gradient_norm": 0.5}
    dropped = {(0, 2): 1e200, (1, 3): torch.inf, (1, 4): torch.nan}
    for (row, t), value in dropped.items():
        case["v"][row, t] = value
    assert_close(neural_memory(**case, **options), reference.neural_memory(**case, **options))
    # It is as if its step size were zero, in every gradient but its own.
    tame = tree_map(torch.clone, case)
    for row, t in dropped:
        tame["v"][row, t], tame["theta"][row, t] = 0, 0
    actual, expected = (gradients(neural_memory_scan, c, **options) for c in (case, tame))
    for name, a, b in zip(["q", "k", "v", "theta", "eta", "alpha", *["weights"] * 99], actual, expected, strict=False):
        assert a.isfinite().all(), name
        if name in ("q", "eta", "alpha", "weights"):
            assert_close(a, b)


@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "identity"])
@pytest.mark.parametrize("key", [1e308, torch.inf, torch.nan])
def test_03_a_token_whose_key_or_hidden_layer_overflows_leaves_nothing(key, activation, with_norm):
    case = without(make_case(time=8, depth=3, with_norm=with_norm), "base")
    options = {"chunk_size": 4, "max_gradient_norm": 0.5, "activation": activation}
    case["weights"] = (3 * case["weights"][0].abs(), *case["weights"][1:])
    for row, t in ((0, 2), (1, 5)):
        case["k"][row, t] = key
    assert_close(neural_memory(**case, **options), reference.neural_memory(**case, **options))
    tame = tree_map(torch.clone, case)
    for row, t in ((0, 2), (1, 5)):
        tame["k"][row, t], tame["theta"][row, t] = 0, 0
    actual, expected = (gradients(neural_memory, c, **options) for c in (case, tame))
    assert all(g.isfinite().all() for g in actual[2:])
    for k_and_theta in (actual, expected):  # those of the dropped token itself differ
        del k_and_theta[3], k_and_theta[1]
    assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("key", [1e308, torch.inf, torch.nan])
def test_03_one_token_whose_key_overflows_leaves_nothing(key, window):
    case = make_case(time=1, window=window)
    case["k"][1] = key
    options = {"chunk_size": 4, "max_gradient_norm": 0.5, "window": window, "position": torch.tensor([3, 1])}
    assert_close(neural_memory_scan(**case, **options), reference.neural_memory_scan(**case, **options))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("objective", [torch.sum, torch.norm])
def test_03_second_derivatives_are_refused_rather_than_wrong(depth, objective):
    case = tree_map(lambda x: x.requires_grad_(), make_case(depth=depth, time=5))
    y, _, _ = neural_memory(**case, chunk_size=3, activation="relu")
    (g,) = torch.autograd.grad(objective(y), case["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (g.square().sum() + y.sum()).backward()


@pytest.mark.parametrize("scale", [1e14, 1e30])
def test_03_an_infinite_error_at_a_unit_that_is_off_spoils_no_gradient(scale):
    case = tree_map(Tensor.float, without(make_case(batch=1, heads=1, time=3, dim=2, hidden=2), "base", "anchor"))
    first, second = case["weights"]
    first[0, 0] = torch.tensor([[0.5, -3.0], [0.2, -0.3]])
    second[0, 0, 1, 0] = 3e38 / scale
    case["k"][0, :, 0], case["v"][0, 0, 0, 0] = torch.tensor([1.0, 0.0]), scale * 1e4
    results = []
    for run in (neural_memory, reference.neural_memory):
        leaves = tree_map(lambda x: x.clone().requires_grad_(), case)
        _, weights, _ = run(**leaves, chunk_size=3, activation="relu", max_gradient_norm=1.0)
        results.append((weights[0], *torch.autograd.grad(weights[0].sum(), (leaves["k"], leaves["weights"][0]))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def test_04_no_output_depends_on_a_later_token():
    case = make_case(batch=1, time=7)
    tokens = [case[name].requires_grad_() for name in ("q", "k", "v", "theta", "eta", "alpha")]
    y, _, _ = neural_memory(**case, chunk_size=3)
    for t in range(7):
        for g in torch.autograd.grad(y[:, t].sum(), tokens, retain_graph=True):
            assert not g[:, t + 1 :].any()


# 20-21. Modes, precision, cost.


def test_20_it_learns_the_same_without_grad():
    case = make_case()
    with torch.no_grad():
        frozen = neural_memory_scan(**case, chunk_size=4)
    recorded = neural_memory_scan(**tree_map(lambda x: x.clone().requires_grad_(), case), chunk_size=4)
    assert_same_bits(frozen, tree_map(Tensor.detach, recorded))


def test_20_runs_repeat_bit_for_bit():
    case = make_case()
    assert_same_bits(neural_memory_scan(**case, chunk_size=4), neural_memory_scan(**case, chunk_size=4))
    assert_same_bits(gradients(neural_memory, case, chunk_size=4), gradients(neural_memory, case, chunk_size=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_20_low_precision_stays_near_float64_and_keeps_its_state_in_float32(dtype):
    case = without(make_case(time=64, dim=16, hidden=32), "base", "anchor")
    case["theta"], case["alpha"] = case["theta"] / 8, case["alpha"] / 8
    low = {name: x.to(dtype) if name in ("q", "k", "v") else tree_map(Tensor.float, x) for name, x in case.items()}
    y, *state = neural_memory(**low, chunk_size=16)
    expected, *expected_state = neural_memory(**case, chunk_size=16)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(tree_leaves((y, state)), tree_leaves((expected, expected_state)), strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()
    assert all(x.dtype == torch.float32 for x in tree_leaves(state))


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least of a few runs: the one other processes disturbed least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
def test_21_time_grows_linearly_and_leaves_the_loop_far_behind():
    short, long = (
        tree_map(Tensor.float, without(make_case(batch=1, heads=1, dim=8, hidden=16, time=n), "base", "anchor"))
        for n in (512, 1024)
    )
    gradients(neural_memory, short, chunk_size=64)  # warm-up
    assert seconds(lambda: gradients(neural_memory, long, chunk_size=64), 5) < 2.5 * seconds(
        lambda: gradients(neural_memory, short, chunk_size=64), 5
    )
    with torch.no_grad():
        ours = seconds(lambda: neural_memory(**long, chunk_size=64), 5)
        assert seconds(lambda: reference.neural_memory(**long, chunk_size=64), 1) > 10 * ours


def kept_for_the_backward_pass(time: int) -> int:
    """Numbers that the op keeps."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    case = tree_map(lambda x: x.requires_grad_(), without(make_case(time=time), "base", "anchor"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = neural_memory(**case, chunk_size=8)
    assert result[0].requires_grad
    return sum(storages.values())


def test_21_memory_kept_for_the_backward_pass_grows_linearly():
    sizes = [kept_for_the_backward_pass(n) for n in (64, 128, 256)]
    assert sizes[0] > 0
    assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0])


def test_21_a_chunk_keeps_its_inputs_its_states_and_results_of_products():
    rows, C, d, h = 4, 8, 3, 5
    inputs = C * (3 * d + C + 4) + 4  # q, k, v, the table, shares of the blocks, of the tokens in them, transition
    tables = 2 * (C + 1) * (C + 2) + 2 * C
    states = 2 * 2 * d * h
    products = C * (3 * h + d + 2 * C + 2 * d)  # hidden layers of keys, errors, queries; last errors; scores; reads
    a_chunk = (kept_for_the_backward_pass(128) - kept_for_the_backward_pass(64)) / 8
    assert a_chunk == rows * (inputs + tables + states + products)


# What it reports, and refuses.


@pytest.mark.parametrize("options", [{}, {"loss_scale": 2.0, "max_gradient_norm": 0.1}, {"window": 3}], ids=str)
def test_surprise_is_the_norm_of_the_error_at_the_base(options):
    case, trace = without(make_case(time=5), "base"), Trace()
    neural_memory_scan(**case, chunk_size=8, lengths=torch.tensor([5, 3]), trace=trace, **options)
    first, second = (w[:, None] for w in case["weights"])
    error = (F.silu(case["k"][..., None, :] @ first) @ second).squeeze(-2) - case["v"]
    surprise = trace.signals["surprise"]
    assert_close((surprise[0], surprise[1, :3]), (error[0].norm(dim=-1), error[1, :3].norm(dim=-1)))


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_surprise_of_one_token_is_its_own(window):
    case, traces = make_case(time=1, window=window), (Trace(), Trace())
    for position, trace in zip((2, torch.tensor([2, 2])), traces, strict=True):  # in a chunk, and by the recurrence
        neural_memory_scan(**case, chunk_size=8, window=window, position=position, trace=trace)
    assert_close(*(trace.signals["surprise"] for trace in traces))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": torch.zeros(2, 4, 3)}, r"q has shape \(2, 4, 3\)"),
        ({"k": torch.zeros(2, 4, 2, 2)}, r"k has shape \(2, 4, 2, 2\)"),
        ({"v": torch.zeros(2, 4, 2, 2)}, r"v has shape \(2, 4, 2, 2\)"),
        ({"theta": torch.zeros(2, 4)}, r"theta has shape \(2, 4\)"),
        ({"eta": torch.zeros(2, 4, 1)}, r"eta has shape \(2, 4, 1\)"),
        ({"alpha": torch.zeros(1, 4, 2)}, r"alpha has shape \(1, 4, 2\)"),
        ({"weights": ()}, r"weights=\(\)"),
        ({"weights": torch.zeros(2, 2, 4, 4)}, "weights=Tensor"),
        ({"q": torch.zeros(2, 4, 2, 3, dtype=torch.long)}, "q, k, v have dtypes torch.int64"),
        ({"weights": (torch.zeros(2, 2, 4, 3),)}, r"weights\[0\] has shape \(2, 2, 4, 3\)"),
        ({"momentum": (torch.zeros(2, 2, 3, 3),)}, "momentum has shapes"),
        ({"base": (torch.zeros(2, 2, 3, 3),)}, "base has shapes"),
        ({"anchor": (torch.zeros(2, 2, 3, 3),)}, "anchor has shapes"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \(1,\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"read": "mid"}, "read='mid'"),
        ({"backend": "triton"}, "backend='triton'"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm=0.0"),
        ({"window": 0}, "window=0 is .*; 1 is a step on a token's own loss"),
        ({"gamma": torch.zeros(2, 4)}, r"gamma has shape \(2, 4\)"),
        (
            {"recent": make_case(window=3)["recent"], "window": 2},
            r"recent has shapes \[\(2, 2, 2, 3\).*the 1 tokens before",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(bad, message):
    with pytest.raises(ValueError, match=message):
        neural_memory_scan(**make_case(time=4) | {"chunk_size": 3} | bad)
