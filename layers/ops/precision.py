"""Precision: recurrent state is computed as it is kept, whatever autocast would like."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; on the meta device, which has none, one that does nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
