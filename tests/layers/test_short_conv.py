"""Short convolution: the op against its loop, and the layer around it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memzoo.layers import ShortConv, ShortConvState
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
