"""Precision: what accumulates, and what is divided by small differences, is computed in at least float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; on the meta device, which has none, one that does nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def wider(x: Tensor) -> Tensor:
    """Cast to at least float32. Autocast leaves what is no matrix product in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
