"""What ``selective_scan`` and ``state_space_dual`` have in common: each against its loop over tokens.

Numbered as in the specification, C7; float64 unless a test says otherwise.
"""

import inspect
import time as clock
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers.ops import selective_scan_blocks
from tests.layers.recurrence_cases import (
    LargestTensor,
    assert_close,
    assert_same_bits,
    borders,
    cast,
    random_cases,
    run,
    without,
)
from tests.layers.state_space_cases import OF_TOKENS, SPACES, Case, Space, each_op, make_case, tokens


@each_op
def test_00_op_and_loop_have_one_signature(space):
    assert inspect.signature(space.op) == inspect.signature(space.loop)


# 1, 2. Every form equals the loop, whatever the chunks.


@cache
def looped(name: str, time: int, left_out: tuple[str, ...]) -> tuple[Case, dict[str, Tensor]]:
    """A case, and what the loop makes of it."""
    case = without(make_case(SPACES[name], time=time), *left_out)
    return case, run(SPACES[name].loop, case)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
@pytest.mark.parametrize("time", [1, 2, 16, 70])
@pytest.mark.parametrize("left_out", [(), ("D",), ("state",), ("D", "state")], ids=lambda names: "-".join(names))
@pytest.mark.parametrize("name", SPACES)
def test_01_outputs_state_and_all_gradients_equal_the_loop(name, left_out, time, chunk_size):
    case, expected = looped(name, time, left_out)
    assert_close(run(SPACES[name].op, case, chunk_size=chunk_size), expected)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Space, Case, dict[str, object], int]:
    """Any arguments the ops accept: shapes, ragged rows, segments, what may be left out; and the size of a block."""
    space = draw(st.sampled_from(list(SPACES.values())))
    layout = draw(st.sampled_from(["dense", "lengths", "cu_seqlens"]))
    options: dict[str, object] = {"chunk_size": draw(st.sampled_from([1, 2, 3, 4, 8, 64]))}
    batch, time, states = draw(st.integers(1, 3)), draw(st.integers(1, 20)), None
    if layout == "lengths":
        options["lengths"] = torch.tensor(draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch)))
    elif layout == "cu_seqlens":
        segments = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
        batch, time, states = 1, sum(segments), len(segments)
        options["cu_seqlens"] = borders(segments)
    sizes = {name: draw(st.integers(1, 3)) for name in ("width", "state_dim", "groups", "share")}
    case = make_case(space, batch=batch, time=time, states=states, seed=draw(st.integers(0, 99)), **sizes)
    left_out = [name for name in ("D", "state") if draw(st.booleans())]
    return space, without(case, *left_out), options, draw(st.sampled_from([1, 20, 100, 2**18]))


@random_cases
@given(cases())
def test_01_it_equals_the_loop_whatever_the_arguments(drawn):
    space, case, options, block = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selective_scan_blocks.BLOCK, "cpu", block)
        assert_close(run(space.op, case, **options), run(space.loop, case, **options))


@each_op
@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_01_every_output_alone_has_its_gradients(space, output):
    case, parts = make_case(space, time=9), []
    for function in (space.op, space.loop):
        leaves = {name: x.clone().requires_grad_() for name, x in case.items()}
        total = (function(**leaves, chunk_size=4)[output] ** 3).sum()
        parts.append(torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True))
    assert_close(*parts)


@each_op
@pytest.mark.parametrize("layout", ["rows", "segments", "token"])
def test_01_frozen_inputs_change_no_gradient_of_the_others(space, layout):
    case, options = laid_out(space, layout)
    together = run(space.op, case, **options)
    for frozen in [*combinations(case, 1), *combinations(case, 2), *combinations(case, 6)]:
        rest = run(lambda frozen=frozen, **x: space.op(**case | x, **options), without(case, *frozen))
        assert_close(rest, without(together, *(f"gradient of {name}" for name in frozen)), 1e-13)


def laid_out(space: Space, layout: str) -> tuple[Case, dict[str, object]]:
    """A case of two states, of a row each or of a segment each."""
    if layout == "segments":
        return make_case(space, batch=1, time=12, states=2), {"chunk_size": 4, "cu_seqlens": borders([9, 3])}
    return make_case(space, time=1 if layout == "token" else 9), {"chunk_size": 4}


@each_op
@pytest.mark.parametrize("layout", ["rows", "segments", "token"])
def test_01_arguments_may_lie_in_memory_in_any_order(space, layout):
    case, options = laid_out(space, layout)
    expected = run(space.op, case, **options)
    for name, x in case.items():
        reversed_axes = tuple(reversed(range(x.dim())))
        strided = x.permute(reversed_axes).contiguous().permute(reversed_axes)
        assert_close(run(space.op, case | {name: strided}, **options), expected, 1e-12)


@each_op
def test_01_without_gradients_the_results_are_the_same_bits(space):
    case = make_case(space, time=20)
    expected = run(space.op, case, chunk_size=8)
    with torch.inference_mode():
        y, state = space.op(**case, chunk_size=8)
    assert_same_bits((y, state), (expected["y"], expected["state"]))


@each_op
def test_02_the_chunk_size_changes_nothing(space):
    case = make_case(space, time=45)
    expected = run(space.op, case, chunk_size=1)
    for chunk_size in (2, 5, 32, 45, 1000):
        assert_close(run(space.op, case, chunk_size=chunk_size), expected)


@each_op
def test_03_gradcheck_on_segments_of_length_0_1_2_3(space):
    case = make_case(space, batch=1, time=6, states=4, width=2, state_dim=2, groups=1)

    def function(*values):
        return space.op(**dict(zip(case, values, strict=True)), cu_seqlens=borders([0, 1, 2, 3]), chunk_size=2)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.values()], fast_mode=False)


# 5. Streaming.


@random_cases
@given(st.sampled_from(list(SPACES.values())), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_05_any_cutting_gives_the_results_and_gradients_of_one_call(space, pieces):
    case = make_case(space, time=sum(pieces))

    def stream(state, **inputs):
        outputs, start = [], 0
        for length in pieces:
            y, state = space.op(**tokens(inputs, slice(start, start + length)), state=state, chunk_size=4)
            outputs.append(y)
            start += length
        return torch.cat(outputs, 1), state

    assert_close(run(stream, case), run(space.op, case, chunk_size=4))


# 8. Steps of nothing, and steps over everything.


@each_op
def test_08_a_step_of_zero_freezes_the_state_to_the_last_bit(space):
    case = make_case(space, time=20)
    case["dt"] = torch.zeros_like(case["dt"])
    y, state = space.op(**case, chunk_size=8)
    assert_same_bits(state, case["state"])
    frozen = {name: x[:, :1] if name in OF_TOKENS else x for name, x in case.items()}
    for t in range(20):
        now = frozen | {name: case[name][:, t : t + 1] for name in ("x", "C")}
        assert_close(y[:, t : t + 1], space.loop(**now)[0])


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", ["-1e4", "-inf"])
def test_08_a_large_step_forgets_all_but_its_own_token(space, decay, dtype):
    """Whether exp(dt A) underflows or dt A overflows: the state is dt x B of the last token, gradients are finite.

    That of A is zero; with heads it is a difference, so zero but for what rounding leaves of dt.
    """
    case = cast(make_case(space, time=20), dtype)
    size = {"-1e4": 1e2, "-inf": 1e2 * torch.finfo(dtype).max ** 0.5}[decay]
    case |= {"dt": torch.full_like(case["dt"], size), "A": torch.full_like(case["A"], -size), "x": case["x"] / size}
    actual = run(space.op, case, chunk_size=8)
    last = run(space.op, tokens(case, slice(-1, None)) | {"state": torch.zeros_like(case["state"])})
    assert_close(actual["state"], last["state"], 0)
    assert_close(actual["y"][:, -1:], last["y"], 1e-6)
    assert all(x.isfinite().all() for x in actual.values())
    assert not actual["gradient of state"].any()
    rounding = 1e3 * torch.finfo(dtype).eps * size if space.has_heads else 0
    assert actual["gradient of A"].abs().max() <= rounding


@each_op
def test_08_strong_decays_among_weak_ones_equal_the_loop(space):
    case = make_case(space, time=70)
    strengths = torch.tensor([1e3, 20.0, 1.0, 1e-3, 0.0], dtype=torch.float64)
    case["dt"] = strengths[torch.randint(5, case["dt"].shape, generator=torch.Generator().manual_seed(2))]
    size = case["dt"].clamp_min(1)
    case["x"] = case["x"] / (size[..., None] if space.has_heads else size)
    assert_close(run(space.op, case, chunk_size=16), run(space.loop, case), 1e-10)


# 12. Dtypes.


@each_op
@pytest.mark.parametrize("time", [1, 40])
def test_12_bfloat16_is_computed_and_carried_in_float32(space, time):
    case = cast(make_case(space, time=time), torch.bfloat16)
    y, state = space.op(**case, chunk_size=16)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    y_loop, state_loop = space.loop(**cast(case, torch.float64))
    assert_close(state.double(), state_loop, 2e-5)
    torch.testing.assert_close(y.double(), y_loop, rtol=2**-8, atol=2e-5)  # half a unit of the last of 8 bits


@each_op
def test_12_op_and_loop_return_the_same_dtypes_whatever_is_mixed(space):
    case = make_case(space)
    for name in case:
        for wide in (torch.float32, torch.float64):
            mixed = cast(case, torch.bfloat16) | {name: case[name].to(wide)}
            found, expected = (run(function, mixed) for function in (space.op, space.loop))
            assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in expected.items()}
            assert found["y"].dtype == mixed["x"].dtype
            assert found["state"].dtype == wide
            assert all(found[f"gradient of {key}"].dtype == x.dtype for key, x in mixed.items())


@each_op
def test_12_autocast_changes_no_bit(space):
    case = cast(make_case(space, time=20), torch.float32)

    def forward(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return space.op(**inputs)

    for inputs in (case, tokens(case, slice(1))):
        assert_same_bits(run(forward, inputs), run(space.op, inputs))
    for inputs in (case, tokens(case, slice(1))):
        expected = run(space.op, inputs)
        with torch.autocast("cpu", torch.bfloat16):  # over the backward pass as well
            assert_same_bits(run(space.op, inputs), expected)


@each_op
def test_12_float32_is_as_exact_as_its_digits(space):
    case = cast(make_case(space, time=200), torch.float32)
    actual, exact = run(space.op, case), run(space.loop, cast(case, torch.float64))
    for name, x in exact.items():
        assert (actual[name] - x).abs().max() < 1e-5 * x.abs().max(), name


# 13. Time, memory and the graph.


@each_op
def test_13_twice_the_tokens_take_less_than_three_times_as_long(space):
    """Quadratic in the tokens is what comes of taking tokens out of a large tensor one by one: four times as long."""
    cases = [cast(make_case(space, batch=1, time=length, width=16), torch.float32) for length in (4096, 8192)]
    taken: list[list[float]] = [[], []]
    run(space.op, cases[0])
    for _ in range(7):
        for case, times in zip(cases, taken, strict=True):
            start = clock.process_time()
            run(space.op, case)
            times.append(clock.process_time() - start)
    once, twice = map(min, taken)  # what else runs on the machine only adds
    assert twice < 3 * once


@each_op
def test_13_the_graph_does_not_grow_with_the_tokens(space):
    sizes = set()
    for time in (25, 201):
        leaves = {name: x.requires_grad_() for name, x in make_case(space, time=time).items()}
        y, state = space.op(**leaves, chunk_size=8)
        nodes, new = set(), {y.grad_fn, state.grad_fn}
        while new:
            nodes |= new
            new = {parent for node in new for parent, _ in node.next_functions if parent is not None} - nodes
        sizes.add(len(nodes))
    assert len(sizes) == 1


@each_op
@pytest.mark.parametrize("tracked", [False, True])
def test_13_without_gradients_no_state_of_every_chunk_is_kept(space, tracked):
    """They would take as much as all tokens' x times ``state_dim / chunk_size``."""
    sizes = dict(width=64, state_dim=64, groups=1, share=1)
    case = cast(make_case(space, batch=1, time=2**14, **sizes), torch.float32)
    case = {name: x.requires_grad_(tracked) for name, x in case.items()}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), LargestTensor() as largest:
        patch.setitem(selective_scan_blocks.BLOCK, "cpu", 2**16)
        space.op(**case, chunk_size=16)
    assert largest.nbytes <= case["x"].nbytes


# Arguments, states, compilers.


@each_op
@pytest.mark.parametrize("layout", ["dense", "lengths", "cu_seqlens", "token"])
def test_no_argument_is_changed_and_the_returned_state_shares_no_memory(space, layout):
    case = make_case(space, batch=1, time=1 if layout == "token" else 20)
    options = {"lengths": {"lengths": torch.tensor([20])}, "cu_seqlens": {"cu_seqlens": borders([20])}}.get(layout, {})
    before = {name: x.clone() for name, x in case.items()}
    leaves = {name: x.requires_grad_() for name, x in case.items()}
    y, state = space.op(**leaves, **options, chunk_size=8)
    (y.sum() + state.sum()).backward()
    assert_same_bits({name: x.detach() for name, x in case.items()}, before)
    state.detach().zero_()
    assert_same_bits(case["state"].detach(), before["state"])


@pytest.mark.slow  # `make test` compiles the layers of both (tests/contract/test_layers.py)
@each_op
def test_it_compiles_whole_with_its_gradients(space):
    case = make_case(space, time=20)
    compiled = torch.compile(space.op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, case, chunk_size=8), run(space.op, case, chunk_size=8), 1e-12)


@each_op
def test_shapes_can_be_traced_on_the_meta_device(space):
    case = make_case(space)
    y, state = space.op(**{name: x.to("meta") for name, x in case.items()})
    assert (y.shape, state.shape, y.device.type) == (case["x"].shape, case["state"].shape, "meta")


WRONG = {
    "chunk_size": ({"chunk_size": 0}, "chunk_size=0"),
    "backend": ({"backend": "trch"}, "backend='trch'.*did you mean 'torch'"),
    "lengths": ({"lengths": torch.zeros(3).long()}, r"lengths has shape \(3,\).*\(2,\)"),
    "lengths_dtype": ({"lengths": torch.zeros(2)}, "lengths .*torch.float32"),
    "lengths_bool": ({"lengths": torch.ones(2).bool()}, "lengths .*torch.bool"),
    "batch": ({"cu_seqlens": borders([5])}, "batch.*cu_seqlens"),
}
WRONG_SEGMENTS = {
    "state_rows": ({"cu_seqlens": torch.tensor([0, 1, 2, 5])}, r"state has shape \(2, .*\(3, "),
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


@each_op
@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_options_that_do_not_fit_are_named(space, change, words):
    with pytest.raises(ValueError, match=words):
        space.op(**make_case(space, time=5) | change)


@each_op
@pytest.mark.parametrize(("change", "words"), WRONG_SEGMENTS.values(), ids=WRONG_SEGMENTS)
def test_segments_that_do_not_fit_are_named(space, change, words):
    case = make_case(space, batch=1, time=5, states=2)
    with pytest.raises(ValueError, match=words):
        space.op(**case | {"cu_seqlens": torch.tensor([0, 2, 5])} | change)
