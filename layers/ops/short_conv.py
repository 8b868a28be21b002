"""Short causal convolution over time, one filter a channel (depthwise), with its tail as state."""

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice
from memzoo.layers.ops.backend import check_backend

ACTIVATIONS = ("silu", None)


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
        backend: ``"torch"`` or ``"auto"``, which is the same.

    Shape:
        x: (batch, time, channels). weight: (channels, width). bias: (channels,). lengths: (batch,).
        cu_seqlens: (N + 1,) integers, 0 = first <= ... <= last = time, for which batch must be 1.
        Returns y (batch, time, channels) and the state (batch, width - 1, channels), with ``cu_seqlens``
        (N, width - 1, channels).

    Raises:
        ValueError: A shape or the activation is wrong, or ``cu_seqlens`` do not fit.
    """
    check_backend(backend, ("torch",))
    check_choice("activation", activation, ACTIVATIONS)
    _check_shapes(x, weight, bias)
    if cu_seqlens is not None:
        _check_segments(cu_seqlens, x, lengths)
    elif lengths is not None and lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be (batch,) = ({x.shape[0]},)")
    _check_state(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1, weight)
    if cu_seqlens is not None:
        return _convolve_segments(x, weight, bias, state, activation, cu_seqlens)

    batch, time, channels = x.shape
    width = weight.shape[1]
    if lengths is not None:  # a NaN to the right of a row's end would reach the weight's gradient as 0 * NaN
        x = x.masked_fill(torch.arange(time, device=x.device)[:, None] >= lengths[:, None, None], 0)
    tail = x.new_zeros(batch, width - 1, channels) if state is None else state.to(x.dtype)
    padded = torch.cat((tail, x), dim=1)
    y = _filter(padded, weight, bias)
    if activation == "silu":
        y = F.silu(y)

    if lengths is None:
        tail = padded[:, time:].clone()  # a view would keep the whole of `padded` alive
    else:
        last = lengths[:, None] + torch.arange(width - 1, device=x.device)
        tail = padded.take_along_dim(last[..., None], dim=1)
    return y.to(x.dtype), tail


def _filter(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, width - 1 + time, channels) -> (batch, time, channels).

    A sum of shifted products: forward and backward of (8, 1024, 768) in float32 on two cores, width 4, took 48 ms,
    F.conv1d 327 ms (it wants channels first) and F.conv2d with channels last 86 ms.
    """
    width = weight.shape[1]
    time = padded.shape[1] - width + 1
    y = padded[:, :time] * weight[:, 0] if bias is None else torch.addcmul(bias, padded[:, :time], weight[:, 0])
    for tap in range(1, width):
        y = torch.addcmul(y, padded[:, tap : tap + time], weight[:, tap])
    return y


def _convolve_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Put every segment's tail before it, convolve all as one row, and drop what comes out at the tails.

    How many slots that takes is known from the shapes, so nothing waits for a device.
    """
    (_, time, channels), width = x.shape, weight.shape[1]
    borders = cu_seqlens.long()
    begin, end = borders[:-1], borders[1:]
    segments = len(begin)
    taps = torch.arange(width - 1, device=x.device)
    token = torch.arange(time, device=x.device)
    # An empty segment ends where the next begins; `right` counts every segment that ends before or at a token.
    slot = token + (width - 1) * (1 + torch.searchsorted(end, token, right=True))
    tail_slot = begin[:, None] + (width - 1) * torch.arange(segments, device=x.device)[:, None] + taps

    tail = x.new_zeros(segments, width - 1, channels) if state is None else state.to(x.dtype)
    inputs = torch.cat((tail.flatten(0, 1), x[0]))
    padded = torch.empty_like(inputs).index_copy_(0, torch.cat((tail_slot.flatten(), slot)), inputs)
    y = _filter(padded[None], weight, bias)[0].index_select(0, slot - (width - 1))
    if activation == "silu":
        y = F.silu(y)
    last_slot = tail_slot + (end - begin)[:, None]
    return y[None].to(x.dtype), padded.index_select(0, last_slot.flatten()).view_as(tail)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, time, channels) with time >= 1")
    channels = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (channels, width) = ({channels}, >= 1)")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (channels,) = ({channels},)")


def _check_segments(cu_seqlens: Tensor, x: Tensor, lengths: Tensor | None) -> None:
    batch, time, _ = x.shape
    if lengths is not None:
        raise ValueError("lengths and cu_seqlens both say what exists; pass one of them")
    if batch != 1:
        raise ValueError(f"x has batch {batch}; with cu_seqlens all segments follow one another in one row: batch 1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; "
            f"it must be (segments + 1,) integers, with segments >= 1"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would wait for it
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != time or borders != sorted(borders):
            shown = borders if len(borders) < 10 else [*borders[:4], "...", *borders[-4:]]
            raise ValueError(
                f"cu_seqlens={shown} does not cut {time} tokens into segments; "
                f"it must start with 0, never fall, and end with {time}"
            )


def _check_state(state: Tensor | None, rows: int, weight: Tensor) -> None:
    channels, width = weight.shape
    expected = (rows, width - 1, channels)
    if state is not None and state.shape != expected:
        raise ValueError(
            f"state has shape {tuple(state.shape)}; it must be (batch or segments, width - 1, channels) = {expected}: "
            f"pass what the previous call returned, or None to start afresh"
        )
