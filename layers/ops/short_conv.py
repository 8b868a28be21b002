"""Short causal convolution over time, one filter a channel (depthwise), with its tail as state."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.mamba_kernels import choose_conv, conv_by_kernel
from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.segment_grid import check_ragged
from memzoo.layers.ops.short_conv_cpp import choose_cpp, filter_by_cpp
from memzoo.layers.ops.short_conv_plain import plain_gradients

BACKENDS = ("torch", "causal_conv1d", "cpp")
ACTIVATIONS = ("silu", None)
BLOCK = 2**18
"""Numbers that are convolved at a time on the CPU, 1 MiB of float32."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own causal filter: ``y_t = act(bias + sum_i weight_i x_{t - width + 1 + i})``.

    Computed in the wider dtype of ``x`` and ``weight``; outputs and state keep that of ``x``.

    Args:
        x: Inputs.
        weight: Filters; the last tap meets the current token.
        bias: Added before the activation.
        state: The ``width - 1`` inputs before ``x``; None (or zeros) at a start.
        activation: ``"silu"`` or None.
        lengths: Tokens that exist in each row; outputs to their right are arbitrary. None if all exist.
        cu_seqlens: Where each of N segments in the one row begins, and where the last one ends. None of them sees
            another; an empty one keeps its state. Not together with ``lengths``.
        backend: ``"torch"``, ``"causal_conv1d"``, or ``"auto"``, which takes causal-conv1d where it is installed and
            applies: on CUDA, widths of 2 to 4, channels in multiples of 8, no ``lengths`` and no ``cu_seqlens``; or
            ``"cpp"``, a kernel for CPUs that is compiled when it is first used. It computes in float32 at least; calls
            of fewer than 64 tokens or with ``cu_seqlens`` go to torch.

    Shape:
        x: (batch, time, channels). weight: (channels, width). bias: (channels,). lengths: (batch,).
        cu_seqlens: (N + 1,) integers, 0 = first <= ... <= last = time, for which batch must be 1.
        Returns y (batch, time, channels) and the state (batch, width - 1, channels), with ``cu_seqlens``
        (N, width - 1, channels).

    Raises:
        ValueError: A shape or the activation is wrong, ``cu_seqlens`` do not fit, or the backend is unknown, missing or
            does not apply.
    """
    check_backend(backend, BACKENDS)
    check_choice("activation", activation, ACTIVATIONS)
    _check_shapes(x, weight, bias)
    check_ragged("x", x, lengths, cu_seqlens)
    _check_state(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, weight)
    by_kernel = choose_conv(backend, x, weight, whole=lengths is None and cu_seqlens is None)
    if cu_seqlens is not None:
        return _convolve_segments(x, weight, bias, state, activation, cu_seqlens)

    batch, time, channels = x.shape
    width = weight.shape[1]
    if lengths is not None:  # a NaN to the right of a row's end would reach the weight's gradient as 0 * NaN
        x = x.masked_fill(torch.arange(time, device=x.device)[:, None] >= lengths[:, None, None], 0)
    tail = x.new_zeros(batch, width - 1, channels) if state is None else state.to(x.dtype)
    if choose_cpp(backend, x, tail, weight, bias):
        return filter_by_cpp(x, tail, weight, bias, activation), _last_inputs(x, tail, lengths)
    padded = torch.cat((tail, x), dim=1)
    if by_kernel:
        y = conv_by_kernel(padded, weight, bias, activation)
    else:
        y = _Filter.apply(padded, weight, bias, activation)
    return y.to(x.dtype), _last_inputs(x, tail, lengths)


def _last_inputs(x: Tensor, tail: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the tail after ``x``, in memory of its own, since a view would keep all of ``x``."""
    reach = tail.shape[1]
    if lengths is None:
        joined = torch.cat((tail, x[:, max(x.shape[1] - reach, 0) :]), dim=1)
        return joined[:, joined.shape[1] - reach :].clone(memory_format=torch.contiguous_format)
    place = lengths[:, None] - reach + torch.arange(reach, device=x.device)
    own = x.take_along_dim(place.clamp_min(0)[..., None], dim=1)
    old = tail.take_along_dim((place + reach).clamp_max(max(reach - 1, 0))[..., None], dim=1)
    return torch.where(place[..., None] >= 0, own, old)


class _Filter(torch.autograd.Function):
    """A sum of shifted products, one block of time after another: a block stays in cache for all its taps.

    (batch, width - 1 + time, channels) -> (batch, time, channels). The backward pass makes what went into the
    activation again, block by block, which is faster than to fetch it.

    Forward and backward of (8, 1024, 768) in float32 on one core, width 4, without activation: 19 ms, whole rows at
    once 35 ms, the same by autograd, which fills a tensor with zeros for every tap, 79 ms. F.conv1d, which wants
    channels first, is slower yet.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(padded, weight, bias)
        ctx.activation = activation
        taps = weight.mT.contiguous()
        batch, slots, channels = padded.shape
        dtype = torch.promote_types(padded.dtype, weight.dtype)
        dtype = dtype if bias is None else torch.promote_types(dtype, bias.dtype)
        y = padded.new_empty(batch, slots - len(taps) + 1, channels, dtype=dtype)
        for start, stop in _blocks(y):
            own = y[:, start:stop]
            _add_taps(own, padded[:, start : stop + len(taps) - 1].to(dtype), taps, bias)
            if activation == "silu":
                F.silu(own, inplace=True)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # to differentiate once more
            return *plain_gradients(padded, weight, bias, ctx.activation, d_y), None
        taps = weight.mT.contiguous()
        reach, total = len(taps) - 1, torch.promote_types(d_y.dtype, torch.float32)
        d_padded, d_taps = padded.new_empty(padded.shape, dtype=d_y.dtype), taps.new_zeros(taps.shape, dtype=total)
        d_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=total)
        d_padded[:, :reach] = 0
        for start, stop in _blocks(d_y):
            here = slice(start, stop + reach)
            own, given = d_y[:, start:stop], padded[:, here].to(d_y.dtype)
            if ctx.activation == "silu":
                z = torch.empty_like(own)
                _add_taps(z, given, taps, bias)
                own = torch.ops.aten.silu_backward(own, z)
            if d_bias is not None:
                d_bias += own.sum((0, 1), dtype=total)
            d_padded[:, start + reach : stop + reach] = 0
            _add_taps_backward(own, given, taps, d_padded[:, here], d_taps)
        d_bias = None if bias is None or d_bias is None else d_bias.to(bias.dtype)
        return d_padded.to(padded.dtype), d_taps.mT.to(weight.dtype), d_bias, None


def _add_taps(y: Tensor, padded: Tensor, taps: Tensor, bias: Tensor | None = None) -> None:
    """Fill ``y`` (batch, time, channels) with the sum over taps (width, channels) of shifted products."""
    time = y.shape[1]
    torch.mul(padded[:, :time], taps[0], out=y)
    for i in range(1, len(taps)):
        y.addcmul_(padded[:, i : i + time], taps[i])
    if bias is not None:
        y += bias


def _add_taps_backward(d_y: Tensor, padded: Tensor, taps: Tensor, d_padded: Tensor, d_taps: Tensor) -> None:
    """Add the gradients of ``padded`` and ``taps``."""
    time = d_y.shape[1]
    for i in range(len(taps)):
        d_padded[:, i : i + time].addcmul_(d_y, taps[i])
        d_taps[i] += (d_y * padded[:, i : i + time]).sum((0, 1), dtype=d_taps.dtype)


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    """Cut the time of x (batch, time, channels) into blocks that fit a core's cache."""
    batch, time, channels = x.shape
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return [(0, time)]
    size = max(BLOCK // max(batch * channels, 1), 16)
    return [(start, min(start + size, time)) for start in range(0, time, size)]


def _convolve_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Convolve segments that lie end to end; the sizes of all steps follow from shapes, nothing waits for a device."""
    borders, reach = cu_seqlens.to(x.device, torch.long), weight.shape[1] - 1
    begin, length = borders[:-1, None], borders.diff()[:, None]
    tail = x.new_zeros(len(begin), reach, x.shape[2]) if state is None else state.to(x.dtype)
    y = _FilterSegments.apply(x[0], tail, weight, begin, length)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)

    place = length - reach + torch.arange(reach, device=x.device)  # of the last inputs, from the segment's first token
    own = x[0].index_select(0, (begin + place).clamp(0, x.shape[1] - 1).flatten()).view_as(tail)
    old = tail.take_along_dim((place + reach).clamp_max(max(reach - 1, 0))[..., None], dim=1)
    return y[None].to(x.dtype), torch.where(place[..., None] >= 0, own, old)


class _FilterSegments(torch.autograd.Function):
    """``y = apply(x, tail, weight, begin, length)``: the filter over segments that lie end to end.

    All tokens are convolved as if they were one row, and the first ``width - 1`` outputs of every segment, which saw
    its neighbour, are then replaced by those of a small row of its own: its tail and its first tokens.

    Shape:
        x, y: (tokens, channels). tail: (N, width - 1, channels). weight: (channels, width). begin, length: (N, 1).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, begin: Tensor, length: Tensor) -> Tensor:
        taps, tokens = weight.mT.contiguous(), len(x)
        reach = len(taps) - 1
        dtype = torch.promote_types(x.dtype, weight.dtype)
        y = x.new_empty(tokens + 1, x.shape[1], dtype=dtype)  # the last row takes what belongs nowhere
        for start, stop in _blocks(y[None, :tokens]):
            own = y[start:stop]
            torch.mul(x[start:stop], taps[-1], out=own)
            for shift in range(1, min(reach, stop - 1) + 1):
                first = max(start, shift)
                own[first - start :].addcmul_(x[first - shift : stop - shift].to(dtype), taps[reach - shift])
        early = torch.arange(reach, device=x.device)
        real = early < length
        head = torch.where(real, begin + early, tokens)
        row = torch.cat((tail, x.index_select(0, head.clamp_max(tokens - 1).flatten()).view_as(tail)), 1).to(dtype)
        fixed = torch.empty_like(row[:, :reach])
        _add_taps(fixed, row, taps)
        y.index_copy_(0, head.flatten(), fixed.flatten(0, 1))
        ctx.save_for_backward(x, row, weight, head, real)
        return y[:tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, row, weight, head, real = ctx.saved_tensors
        taps, tokens = weight.mT.contiguous(), len(x)
        reach = len(taps) - 1
        inner = d_y.new_ones(tokens + 1, 1).index_fill_(0, head.flatten(), 0)  # outputs that were not replaced
        total = torch.promote_types(d_y.dtype, torch.float32)
        d_x, d_taps = d_y.new_zeros(tokens + 1, x.shape[1]), taps.new_zeros(taps.shape, dtype=total)
        for start, stop in _blocks(d_y[None]):
            own = d_y[start:stop] * inner[start:stop]
            for shift in range(min(reach, stop - 1) + 1):
                first = max(start, shift)
                part, here = own[first - start :], slice(first - shift, stop - shift)
                d_x[here].addcmul_(part, taps[reach - shift])
                d_taps[reach - shift] += (part * x[here]).sum(0, dtype=total)
        d_fixed = d_y.index_select(0, head.clamp_max(tokens - 1).flatten()).unflatten(0, real.shape)
        d_row = torch.zeros_like(row)
        _add_taps_backward(d_fixed * real[..., None], row, taps, d_row, d_taps)
        d_x.index_add_(0, head.flatten(), d_row[:, reach:].flatten(0, 1))
        return d_x[:tokens].to(x.dtype), d_row[:, :reach].to(x.dtype), d_taps.mT.to(weight.dtype), None, None


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, time, channels) with time >= 1")
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (channels, width) = ({channels}, >= 1)")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (channels,) = ({channels},)")


def _check_state(state: Tensor | None, rows: int, weight: Tensor) -> None:
    channels, width = weight.shape
    expected = (rows, width - 1, channels)
    if state is not None and state.shape != expected:
        raise ValueError(
            f"state has shape {tuple(state.shape)}; it must be (batch or segments, width - 1, channels) = {expected}: "
            f"pass what the previous call returned, or None to start afresh"
        )
