"""Gradients of a short convolution that have gradients themselves."""

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_gradients(
    padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, d_y: Tensor
) -> list[Tensor | None]:
    """Return the filter's gradients by operators that have gradients themselves, of what requires one."""
    time = d_y.shape[1]
    shifted = [padded[:, i : i + time].to(d_y.dtype) for i in range(weight.shape[1])]
    y = (torch.stack(shifted, -1) * weight).sum(-1)
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    given = [padded, weight, bias]
    wanted = [t for t in given if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, d_y, create_graph=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in given]
