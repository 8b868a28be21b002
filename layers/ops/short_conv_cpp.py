"""``short_conv`` on the CPU in C++: one pass over memory forward and one backward."""

import functools
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.backend import refuse
from memzoo.layers.ops.cpp_library import load
from memzoo.layers.ops.short_conv_plain import plain_gradients

SLOTS = 64
"""Of a row that are worked on at a time, as in ``kernels/cpp/short_conv.cpp``."""


def choose_cpp(backend: str, x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernels are to be used: only if asked for, and for no fewer tokens than they take at a time.

    Complex numbers go to torch, and so do tensors on several devices, of which it tells.

    Raises:
        ValueError: They were asked for, and the input is not on the CPU.
    """
    if backend != "cpp" or x.is_meta or x.shape[1] < SLOTS:
        return False
    if x.device.type != "cpu":
        refuse(backend, f"x is on {x.device}; move the input to the CPU")
    given = [t for t in (x, *others) if t is not None]
    return all(t.device == x.device and not t.is_complex() for t in given)


def filter_by_cpp(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Convolve x (batch, time, channels), before which was tail (batch, width - 1, channels), in float32 at least."""
    dtypes = (t.dtype for t in (x, weight, bias) if t is not None)
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    wide = (None if t is None else t.to(dtype).contiguous() for t in (x, tail, weight, bias))
    y: Tensor = CppFilter.apply(*wide, activation)
    return y.to(x.dtype)


class CppFilter(torch.autograd.Function):
    """The filter by the kernels, of dense tensors of one dtype; a second derivative is PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, tail, weight, bias)
        ctx.activation = activation
        y: Tensor = convolve(x, tail, weight.mT.contiguous(), bias, activation == "silu")
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, tail, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # to differentiate once more
            padded = torch.cat((tail, x), 1)
            d_padded, *others = plain_gradients(padded, weight, bias, ctx.activation, d_y)
            parts = (None, None) if d_padded is None else (d_padded[:, tail.shape[1] :], d_padded[:, : tail.shape[1]])
            return *parts, *others, None
        taps = weight.mT.contiguous()
        d_x, d_tail, sums = convolve_gradients(x, tail, taps, bias, ctx.activation == "silu", d_y.contiguous())
        return d_x, d_tail, sums[:-1].mT, None if bias is None else sums[-1], None


@torch.library.custom_op("memzoo::short_conv", mutates_args=())
def convolve(x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor | None, has_silu: bool) -> Tensor:
    """Convolve with taps (width, channels); one operation to a compiler."""
    load("short_conv")
    y = torch.empty_like(x)
    torch.ops.memzoo_cpp.short_conv(x, tail, taps, bias, has_silu, y)
    return y


@convolve.register_fake
def _outputs(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("memzoo::short_conv_gradients", mutates_args=())
def convolve_gradients(
    x: Tensor, tail: Tensor, taps: Tensor, bias: Tensor | None, has_silu: bool, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of tail, and of the taps, behind which that of the bias: (width + 1, channels)."""
    load("short_conv")
    batch, time, channels = x.shape
    width = len(taps)
    d_x, d_tail = torch.empty_like(x), torch.empty_like(tail)
    parts = x.new_empty(batch, -(-(time + width - 1) // SLOTS), width + 1, channels)
    torch.ops.memzoo_cpp.short_conv_gradients(x, tail, taps, bias, has_silu, d_y, d_x, d_tail, parts)
    return d_x, d_tail, parts.sum((0, 1))


@convolve_gradients.register_fake
def _gradients(x: Tensor, tail: Tensor, taps: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(tail), taps.new_empty(taps.shape[0] + 1, taps.shape[1])
