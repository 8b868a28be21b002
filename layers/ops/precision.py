"""Precision: recurrent state is computed as it is kept, whatever autocast would like."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; on devices that have none (meta), one that does nothing."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
