"""Precision: what accumulates, and what is divided by small differences, is computed in at least float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; on the meta device, which has none, one that does nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def wide_layer_norm(norm: nn.LayerNorm, x: Tensor, gain: Tensor | None = None) -> Tensor:
    """Apply a LayerNorm, times ``gain``, in at least float32."""
    wide = wider(x)
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    if gain is not None:  # of d numbers, not of all tokens
        weight, bias = gain * weight, gain * bias
    return F.layer_norm(wide, norm.normalized_shape, weight, bias, norm.eps)


def kept_wide(before: Tensor, after: Tensor) -> Tensor:
    """Return a buffer as a module's move to another device or dtype leaves it, without having rounded it to half."""
    wide = wider(after)
    return wide if wide.dtype == after.dtype or before.is_meta else before.to(wide)


def wider(x: Tensor) -> Tensor:
    """Cast to at least float32. Autocast leaves what is no matrix product in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
