"""The C++ kernels of the short convolution: what the torch backend and the loop say."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers import ShortConv
from memzoo.layers.ops import cpp_library, short_conv_cpp
from memzoo.layers.ops.short_conv import short_conv
from memzoo.layers.reference import short_conv as loop
from tests.layers.neural_memory_cases import random_cases

pytestmark = pytest.mark.skipif(cpp_library.obstacle() is not None, reason=f"{cpp_library.obstacle()}")


def draw(batch: int, time: int, channels: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 arguments that require gradients."""
    torch.manual_seed(seed)
    shapes = {
        "x": (batch, time, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "state": (batch, width - 1, channels),
    }
    return {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


def outcome(function: Any, arguments: dict[str, Tensor], real: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Return outputs, tail and all gradients of a sum of their squares."""
    y, tail = function(**arguments, **options)
    y = y if real is None else y * real[..., None]
    inputs = [t for t in arguments.values() if t.numel()]
    total = y.square().sum() + tail.square().sum()
    return [y, tail, *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)]


@random_cases
@given(
    batch=st.integers(1, 3),
    time=st.integers(64, 200),
    channels=st.sampled_from([1, 5, 16, 37, 64]),
    width=st.sampled_from([1, 2, 4, 9]),
    activation=st.sampled_from(["silu", None]),
    without=st.sampled_from(["bias", "state", ""]),
    seed=st.integers(0, 100),
)
def test_values_tail_and_all_gradients_are_those_of_torch(
    batch: int, time: int, channels: int, width: int, activation: str | None, without: str, seed: int
) -> None:
    given = {name: t for name, t in draw(batch, time, channels, width, seed).items() if name != without}
    results = [outcome(short_conv, given, activation=activation, backend=backend) for backend in ("cpp", "torch")]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_ragged_rows_are_the_loop_s() -> None:
    lengths = torch.tensor([70, 0, 2, 66])
    given, real = draw(4, 70, 5, 4), torch.arange(70) < lengths[:, None]
    found = outcome(short_conv, given, real, activation="silu", lengths=lengths, backend="cpp")
    expected = outcome(loop.short_conv, given, real, activation="silu", lengths=lengths)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_what_does_not_lie_dense_is_taken_as_it_is() -> None:
    given = draw(2, 80, 12, 4)
    x = given["x"].detach().mT.contiguous().mT.requires_grad_()
    weight = given["weight"].detach().repeat(1, 2)[:, ::2].requires_grad_()
    apart = {"x": x, "weight": weight, "bias": given["bias"].detach()[:1].expand(12).requires_grad_()}
    results = [outcome(short_conv, apart, backend=backend, activation="silu") for backend in ("cpp", "torch")]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    y, _ = short_conv(given["x"], given["weight"], backend="cpp")
    (found,) = torch.autograd.grad(y.sum(), given["x"])  # an incoming gradient of one number
    (expected,) = torch.autograd.grad(short_conv(given["x"], given["weight"])[0].sum(), given["x"])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["silu", None])
def test_it_can_be_differentiated_twice(activation: str | None) -> None:
    given = draw(1, 64, 3, 4)
    results = []
    for backend in ("cpp", "torch"):
        for dense in (True, False):
            parts = given if dense else {name: t.mT.contiguous().mT for name, t in given.items() if name != "bias"}
            y, _ = short_conv(**parts, activation=activation, backend=backend)
            inputs = [given[name] for name in parts]
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            total = sum(g.square().sum() for g in first)
            results.append(torch.autograd.grad(total, inputs))
    results = [results[:2], results[2:]]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    given = {name: t.detach().to(dtype) for name, t in draw(2, 100, 16, 4).items()}
    wide = {name: t.float() for name, t in given.items()}
    y, tail = short_conv(**given, activation="silu", backend="cpp")
    expected, _ = short_conv(**wide, activation="silu")
    assert y.dtype == tail.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_with_any_number_of_threads_every_bit_is_the_same() -> None:
    given, number = draw(3, 300, 20, 4), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(short_conv, given, activation="silu", backend="cpp"))
    finally:
        torch.set_num_threads(number)
    assert all(torch.equal(x, y) for others in results[1:] for x, y in zip(others, results[0], strict=True))


def test_a_compiler_takes_it_whole() -> None:
    given = draw(2, 80, 16, 4)
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, given, activation="silu", backend="cpp")
    torch.testing.assert_close(found, outcome(short_conv, given, activation="silu", backend="cpp"))


def test_short_calls_and_segments_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_conv_cpp, "load", lambda name: pytest.fail("the kernel was asked for"))
    conv = ShortConv(8, backend="cpp")
    conv(torch.randn(2, 63, 8))
    conv(torch.randn(1, 80, 8), cu_seqlens=torch.tensor([0, 30, 80]))
    weight = torch.randn(8, 4)
    assert short_conv(torch.randn(1, 80, 8).to(torch.complex64), weight, backend="cpp")[0].is_complex()
    with pytest.raises((RuntimeError, NotImplementedError)):
        short_conv(torch.randn(1, 80, 8), weight.to("meta"), backend="cpp")
    assert conv.to("meta")(torch.randn(2, 80, 8, device="meta"))[0].is_meta


def test_another_device_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        device, is_meta, shape = torch.device("cuda"), False, (1, 64, 8)

    with pytest.raises(ValueError, match="backend='cpp' does not apply: x is on cuda; move the input to the CPU, or"):
        short_conv_cpp.choose_cpp("cpp", OnDevice())
    monkeypatch.setattr(cpp_library.shutil, "which", lambda name: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found"):
        ShortConv(8, backend="cpp")
