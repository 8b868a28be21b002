"""The recurrences by flash-linear-attention's Triton kernels (fla-core), on CUDA.

Argument names and order differ between its ops (``g`` before or after ``beta``, ``gk`` for a decay a channel); states are
asked for and given key first, queries are scaled by the kernel.
"""

from torch import Tensor


def choose_fla(
    backend: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None
) -> bool:
    return False


def recur_by_fla(*a):
    raise NotImplementedError
