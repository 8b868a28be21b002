"""Short convolution: the op against its loop, and the layer around it."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from memzoo.layers import ShortConv, ShortConvState
from memzoo.layers.ops import short_conv as op_module
from memzoo.layers.ops.short_conv import short_conv
from memzoo.layers.reference import short_conv as loop


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("lengths", [None, [5, 0, 2]], ids=["whole", "ragged"])
@pytest.mark.parametrize("start", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_outputs_tail_and_gradients_equal_the_loop(width, bias, activation, start, lengths):
    x, weight = randn(3, 5, 2), randn(2, width)
    b = randn(2) if bias else None
    state = randn(3, width - 1, 2) if start else None
    lengths = None if lengths is None else torch.tensor(lengths)
    real = torch.arange(5) < (torch.full((3,), 5) if lengths is None else lengths)[:, None]
    inputs = [t for t in (x, weight, b, state) if t is not None and t.numel()]
    results = []
    for op in (short_conv, loop.short_conv):
        y, tail = op(x, weight, b, state, activation=activation, lengths=lengths)
        y = y * real[..., None]
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        total = (y * probe).sum() + (tail**2).sum()
        results.append((y, tail, *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_any_cutting_gives_the_outputs_and_tail_of_one_call(width, pieces):
    conv = ShortConv(2, width=width).double()
    x = torch.randn(2, sum(pieces), 2, dtype=torch.float64)
    y, end = conv(x)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        out, state = conv(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=0, atol=1e-12)
    assert torch.equal(state.tail, end.tail)


# Segments: cu_seqlens.

BORDERS = {
    "one": [0, 7],
    "shorter_than_the_filter": [0, 1, 3, 6, 7],
    "empty": [0, 0, 2, 2, 2, 7, 7],
    "uneven": [0, 6, 7],
}


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("start", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_16_segments_equal_the_loop_over_separate_sequences(width, bias, start, borders):
    x, weight = randn(1, 7, 2), randn(2, width)
    b = randn(2) if bias else None
    state = randn(len(borders) - 1, width - 1, 2) if start else None
    inputs = [t for t in (x, weight, b, state) if t is not None and t.numel()]
    results = []
    for op in (short_conv, loop.short_conv):
        y, tail = op(x, weight, b, state, activation="silu", cu_seqlens=torch.tensor(borders))
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        total = (y * probe).sum() + (tail**3).sum()
        results.append((y, tail, *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_16_packed_padded_and_separate_segments_are_the_same():
    conv, lengths = ShortConv(3, bias=True).double(), [5, 0, 1, 3]
    x, state = torch.randn(1, 9, 3, dtype=torch.float64), ShortConvState(torch.randn(4, 3, 3, dtype=torch.float64))
    packed, end = conv(x, state, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    rows = x.new_full((4, 5, 3), torch.nan)
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    rows[real] = x[0]
    padded, padded_end = conv(rows, state, lengths=torch.tensor(lengths))
    separate = [conv(part, state.reorder([i])) for i, part in enumerate(x.split(lengths, 1)) if part.shape[1]]
    assert_close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    assert_close(padded[real], packed[0])
    assert_close(padded_end.tail, end.tail)
    assert_close(torch.cat([y for y, _ in separate], 1), packed)
    assert_close(torch.cat([one.tail for _, one in separate]), end.tail[[0, 2, 3]])


@pytest.mark.parametrize("width", [2, 4])
def test_17_gradcheck_on_segments_of_length_0_1_2_3(width):
    cu_seqlens = torch.tensor([0, 0, 1, 3, 6])

    def function(*inputs):
        return short_conv(*inputs, activation="silu", cu_seqlens=cu_seqlens)

    inputs = randn(1, 6, 2), randn(2, width), randn(2), randn(4, width - 1, 2)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


def test_nothing_crosses_the_border_of_a_segment():
    conv, x = ShortConv(2), torch.randn(1, 8, 2)
    state = ShortConvState(torch.randn(3, 3, 2))
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    y, end = conv(x, state, cu_seqlens=cu_seqlens)
    changed, other = x.clone(), state.clone()
    changed[:, :3] = 100.0
    other.tail[:2] = -100.0
    y_changed, end_changed = conv(changed, other, cu_seqlens=cu_seqlens)
    assert torch.equal(y_changed[:, 3:], y[:, 3:])
    assert torch.equal(end_changed.tail[2], end.tail[2])
    assert not torch.equal(y_changed[:, 2], y[:, 2])


def test_an_empty_segment_keeps_its_tail_to_the_last_bit_and_a_fresh_one_stays_zero():
    conv, x, cu_seqlens = ShortConv(2), torch.randn(1, 4, 2), torch.tensor([0, 0, 4, 4])
    state = ShortConvState(torch.randn(3, 3, 2))
    end, fresh = (conv(x, before, cu_seqlens=cu_seqlens)[1] for before in (state, None))
    assert torch.equal(end.tail[[0, 2]], state.tail[[0, 2]])
    assert not fresh.tail[[0, 2]].any()
    assert torch.equal(end.tail[1], x[0, 1:])


def test_the_work_on_segments_is_the_same_however_many_there_are():
    conv = ShortConv(2)

    def operations(borders):
        with profile(activities=[ProfilerActivity.CPU]) as events:
            conv(torch.zeros(1, 32, 2), cu_seqlens=torch.tensor(borders))
        return sum(event.count for event in events.key_averages())

    operations([0, 32])
    assert operations([0, 32]) == operations(list(range(33)))


def test_segments_on_a_device_are_convolved_without_a_look_at_their_borders():
    with torch.device("meta"):  # has no numbers to look at
        conv = ShortConv(3)
        y, end = conv(torch.zeros(1, 7, 3), conv.initial_state(2), cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert (y.shape, end.tail.shape, y.device.type) == ((1, 7, 3), (2, 3, 3), "meta")


def test_segments_compile_whole_and_for_any_borders():
    conv, x = ShortConv(3), torch.randn(1, 6, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for borders in ([0, 2, 6], [0, 0, 6]):
        cu_seqlens = torch.tensor(borders)
        ours, theirs = (f(x, conv.initial_state(2), cu_seqlens=cu_seqlens) for f in (compiled, conv))
        torch.testing.assert_close(ours[0], theirs[0])
        assert torch.equal(ours[1].tail, theirs[1].tail)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_blocks_of_time_equal_the_loop(bias, activation, monkeypatch):
    monkeypatch.setattr(op_module, "BLOCK", 1)  # the least there is, 16 tokens
    inputs = [randn(2, 37, 3), randn(3, 4), *([randn(3)] if bias else []), randn(2, 3, 3)]
    results = []
    for op in (short_conv, loop.short_conv):
        x, weight, *b, state = inputs
        y, tail = op(x, weight, b[0] if b else None, state, activation=activation)
        probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, tail, *torch.autograd.grad((y * probe).sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", None])
def test_it_can_be_differentiated_twice(activation):
    inputs = randn(2, 5, 2), randn(2, 3), randn(2), randn(2, 2, 2)
    assert torch.autograd.gradgradcheck(lambda *t: short_conv(*t, activation=activation)[0], inputs)
    x, weight, *_ = inputs
    y, _ = short_conv(x, weight, activation=activation)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    ours = torch.autograd.grad(g.square().sum(), weight)
    (g,) = torch.autograd.grad(loop.short_conv(x, weight, activation=activation)[0].sum(), x, create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(g.square().sum(), weight))


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_taps_and_bias_are_summed_in_float32(bias_dtype):
    drawn = [randn(4, 4096, 8), randn(8, 4), randn(8)]
    exact = [t.detach().bfloat16().double().requires_grad_() for t in drawn]
    ours = [t.detach().to(dtype) for t, dtype in zip(exact, (torch.bfloat16, torch.bfloat16, bias_dtype), strict=True)]
    grads = []
    for inputs in (exact, [t.requires_grad_() for t in ours]):
        y, _ = short_conv(*inputs)
        grads.append(torch.autograd.grad(y.sum(), inputs))
    for mine, expected in zip(*reversed(grads), strict=True):
        assert (mine.double() - expected).norm() < 0.01 * expected.norm()


def test_the_tail_is_the_last_inputs_with_zeros_before_the_first():
    x = torch.arange(1.0, 3.0).view(1, 2, 1)
    _, state = ShortConv(1, width=4)(x)
    assert state.tail.flatten().tolist() == [0, 1, 2]


def test_the_last_tap_meets_the_current_token():
    y, _ = short_conv(torch.tensor([[[1.0], [10.0], [100.0]]]), torch.tensor([[2.0, 3.0]]))
    assert y.flatten().tolist() == [3, 32, 320]


def test_a_later_token_changes_no_earlier_output():
    conv, x = ShortConv(3), torch.randn(2, 8, 3)
    changed = x.clone()
    changed[:, 5:] = 100.0
    assert torch.equal(conv(x)[0][:, :5], conv(changed)[0][:, :5])
    assert not torch.equal(conv(x)[0][:, 5], conv(changed)[0][:, 5])


def test_a_row_of_length_zero_keeps_its_tail_to_the_last_bit():
    conv = ShortConv(2)
    state = ShortConvState(torch.randn(2, 3, 2))
    _, end = conv(torch.randn(2, 4, 2), state, lengths=torch.tensor([0, 4]))
    assert torch.equal(end.tail[0], state.tail[0])
    assert not torch.equal(end.tail[1], state.tail[1])


def test_nan_past_the_end_of_a_row_reaches_no_output_tail_or_gradient():
    conv = ShortConv(2, bias=True)
    x = torch.randn(2, 5, 2)
    x[0, 2:] = torch.nan
    x.requires_grad_()
    y, end = conv(x, lengths=torch.tensor([2, 5]))
    (y[0, :2].sum() + y[1].sum() + end.tail.sum()).backward()
    for tensor in (y[0, :2], y[1], end.tail, x.grad, conv.weight.grad, conv.bias.grad):
        assert tensor.isfinite().all()


def test_a_passed_state_is_not_changed_and_the_returned_one_keeps_no_input_alive():
    conv, state = ShortConv(2), ShortConvState(torch.randn(1, 3, 2))
    before = copy.deepcopy(state)
    _, end = conv(torch.randn(1, 50, 2), state)
    assert torch.equal(state.tail, before.tail)
    assert end.tail.untyped_storage().nbytes() == end.nbytes


def test_a_fresh_state_and_none_are_the_same():
    conv, x = ShortConv(2), torch.randn(3, 4, 2)
    assert torch.equal(conv(x)[0], conv(x, conv.initial_state(3))[0])
    assert conv.initial_state(3, dtype=torch.float64).tail.dtype == torch.float64


def test_outputs_and_tail_keep_the_dtype_of_the_input():
    y, state = ShortConv(2)(torch.randn(1, 4, 2).bfloat16())
    assert y.dtype == state.tail.dtype == torch.bfloat16


def test_filters_are_drawn_as_those_of_a_depthwise_conv1d():
    conv = ShortConv(2000, width=4, bias=True)
    theirs = nn.Conv1d(2000, 2000, 4, groups=2000)
    assert conv.weight.abs().max() <= 0.5
    assert abs(conv.weight.std() - theirs.weight.std()) < 0.01
    assert not conv.bias.any()


def test_it_compiles_whole():
    conv, x = ShortConv(3), torch.randn(2, 6, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    y, state = compiled(x)
    assert torch.equal(y, conv(x)[0])
    assert torch.equal(compiled(x, state)[0], conv(x, state)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels=0"),
        ({"width": 0}, "width=0 .*4 is usual"),
        ({"activation": "relu"}, "activation='relu' is not one of 'silu', None"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ShortConv(**{"channels": 2} | options)


SEGMENTS = {"x": torch.zeros(1, 5, 3), "cu_seqlens": torch.tensor([0, 2, 5])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 4)}, r"x has shape \(2, 4\)"),
        ({"x": torch.zeros(2, 0, 3)}, "time >= 1"),
        ({"weight": torch.zeros(2, 4)}, r"weight has shape \(2, 4\).*\(3, >= 1\)"),
        ({"bias": torch.zeros(2)}, r"bias has shape \(2,\).*\(3,\)"),
        ({"state": torch.zeros(2, 4, 3)}, r"state has shape \(2, 4, 3\).*\(2, 3, 3\).*previous call"),
        ({"activation": "silo"}, "did you mean 'silu'"),
        ({"lengths": torch.zeros(3)}, r"lengths has shape \(3,\).*\(2,\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "x has batch 2; with cu_seqlens .*batch 1"),
        (SEGMENTS | {"lengths": torch.tensor([5])}, "lengths and cu_seqlens .*pass one of them"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([0])}, r"cu_seqlens has shape \(1,\).*segments >= 1"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens has shape \(1, 2\)"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([0.0, 5.0])}, "dtype torch.float32.*integers"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([1, 5])}, r"cu_seqlens=\[1, 5\] .*start with 0"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens=\[0, 4\] .*end with 5"),
        (SEGMENTS | {"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "never fall"),
        (SEGMENTS | {"state": torch.zeros(1, 3, 3)}, r"state has shape \(1, 3, 3\).*\(2, 3, 3\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, words):
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=words):
        short_conv(**arguments)


def test_an_input_of_another_width_is_refused_by_the_layer():
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 5\).*built for 3"):
        ShortConv(3)(torch.zeros(1, 2, 5))


def test_a_slice_of_the_channels_is_that_slice_of_the_whole() -> None:
    conv = ShortConv(6, width=3, bias=True).double()
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    whole, end = conv(x)
    part, part_end = conv(x[..., 2:4], channels=slice(2, 4))
    assert torch.equal(part, whole[..., 2:4])
    assert torch.equal(part_end.tail, end.tail[..., 2:4])
