"""What runs ``kernels/cpp/neural_memory.cpp`` on CPUs, and what it takes.

A row is one core's, which keeps what it works on in its cache; so batch times heads should be no fewer than the cores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memzoo.layers.ops.backend import refuse
from memzoo.layers.ops.cpp_library import load

STEP = 16
"""Divides all widths and the chunk, so that vectors and blocks of every processor do."""


def check_sizes(*, head_dim: int, hidden_widths: Sequence[int], chunk_size: int, **_: object) -> None:
    """Require a memory that the kernels take, of any depth and with every other option.

    Raises:
        ValueError: There is an obstacle.
    """
    for name, size in {"head_dim": head_dim, "chunk_size": chunk_size}.items():
        if size % STEP:
            refuse("cpp", f"{name}={size}; use a multiple of {STEP}")
    for width in hidden_widths:
        if width % STEP:
            refuse("cpp", f"memory_expansion gives a head {width} hidden units; use one with which {STEP} divides them")


def fit(width: int) -> int:
    """Return the slots of a chunk that holds ``width`` tokens."""
    return -(-width // STEP) * STEP


def check_place(q: Tensor) -> None:
    """Require the CPU.

    Raises:
        ValueError: The queries are elsewhere.
    """
    if q.device.type != "cpu":
        refuse("cpp", f"q is on {q.device}; move the inputs to the CPU")


def run_forward(inputs: Sequence[Tensor], *arguments: object) -> None:
    """Fill the results; see ``neural_memory_fused.scan``, which names the arguments."""
    load("neural_memory")
    torch.ops.memzoo_cpp.neural_memory_scan(inputs, *arguments)


def run_backward(inputs: Sequence[Tensor], *arguments: object) -> None:
    """Fill the gradients; see ``neural_memory_fused.scan_gradients``, which names the arguments."""
    load("neural_memory")
    torch.ops.memzoo_cpp.neural_memory_scan_gradients(inputs, *arguments)
