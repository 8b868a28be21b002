"""Short causal convolution, token by token."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution, one token at a time. Slow, and the definition of what is right.

    y_t = act(bias + sum_{i=0}^{width-1} weight_i * x_{t-width+1+i}), with the state in the place of x_{-width+1..-1}.
    Outputs past a row's length are zero. With ``cu_seqlens`` every segment of the one row is a sequence of its own.
    """
    if cu_seqlens is not None:
        results = []
        for n, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            start = None if state is None else state[n : n + 1]
            results.append(short_conv(x[:, begin:end], weight, bias, start, activation=activation))
        return torch.cat([y for y, _ in results], dim=1), torch.cat([tail for _, tail in results])
    batch, time, channels = x.shape
    width = weight.shape[1]
    rows, tails = [], []
    for b in range(batch):
        length = time if lengths is None else int(lengths[b])
        seen = list(x.new_zeros(width - 1, channels) if state is None else state[b])
        outputs = []
        for t in range(length):
            seen.append(x[b, t])
            z = sum(weight[:, i] * seen[t + i] for i in range(width)) + (0 if bias is None else bias)
            outputs.append(F.silu(z) if activation == "silu" else z)
        outputs += [x.new_zeros(channels)] * (time - length)
        rows.append(torch.stack(outputs) if time else x[b])
        tails.append(torch.stack(seen[length:]) if width > 1 else x.new_zeros(0, channels))
    return torch.stack(rows), torch.stack(tails)
