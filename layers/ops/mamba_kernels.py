"""CUDA kernels of mamba-ssm and causal-conv1d behind the ops, imported when they are used.

The scan of mamba-ssm starts from zero and lets no gradient into the state it returns; if one comes, ours is computed in
its place. Its extension module is missing from installations that were not built with it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from memzoo.layers.ops.backend import is_installed, refuse
from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.segment_grid import chunk_length

SCAN_EXTENSION = "selective_scan_cuda"
LARGEST_SCAN = 256
CONV_WIDTHS = (2, 3, 4)
CONV_MULTIPLE = 8  # of channels
HALF = (torch.float16, torch.bfloat16)


class Scan(Protocol):
    """The scan in PyTorch, from zero."""

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and the state."""


def choose_scan(backend: str, x: Tensor, A: Tensor, *, fresh: bool, whole: bool) -> bool:
    """Return whether ``selective_scan`` is to run mamba-ssm's kernel.

    Args:
        backend: What was asked for.
        x: The inputs, in the dtype of the computation.
        A: (channels, N).
        fresh: There is no state to continue.
        whole: There are neither ``lengths`` nor ``cu_seqlens``.

    Raises:
        ValueError: It was asked for and cannot be.
    """
    if not _is_in_question(backend, "mamba_ssm", x):
        return False
    obstacles = {
        f"the extension {SCAN_EXTENSION} is missing; build mamba-ssm with it": not is_installed(SCAN_EXTENSION),
        f"A has N={A.shape[1]}; it takes up to {LARGEST_SCAN}": A.shape[1] > LARGEST_SCAN,
        "state is given; pass state=None": not fresh,
        "lengths or cu_seqlens are given; pass neither": not whole,
    }
    return _applies(backend, x, (torch.float32,), obstacles)


def choose_dual(backend: str, x: Tensor, *, whole: bool) -> bool:
    """Return whether ``state_space_dual`` is to run mamba-ssm's kernel; arguments as in ``choose_scan``.

    Unasked in half precision alone: of float32 its products may be TF32.

    Raises:
        ValueError: It was asked for and cannot be.
    """
    if not _is_in_question(backend, "mamba_ssm", x):
        return False
    obstacles = {"lengths or cu_seqlens are given; pass neither": not whole}
    return _applies(backend, x, HALF if backend == "auto" else (torch.float32, *HALF), obstacles)


def choose_conv(backend: str, x: Tensor, weight: Tensor, *, whole: bool) -> bool:
    """Return whether ``short_conv`` is to run causal-conv1d; arguments as in ``choose_scan``.

    Raises:
        ValueError: It was asked for and cannot be.
    """
    if not _is_in_question(backend, "causal_conv1d", x):
        return False
    channels, width = weight.shape
    obstacles = {
        f"weight has dtype {weight.dtype}; cast it to float32": weight.dtype not in (torch.float32, *HALF),
        f"weight has width {width}; it takes {', '.join(map(str, CONV_WIDTHS))}": width not in CONV_WIDTHS,
        f"x has {channels} channels; it takes multiples of {CONV_MULTIPLE}": channels % CONV_MULTIPLE != 0,
        "lengths or cu_seqlens are given; pass neither": not whole,
    }
    return _applies(backend, x, (torch.float32, *HALF), obstacles)


def _is_in_question(backend: str, library: str, x: Tensor) -> bool:
    """Return whether the library was asked for, or may be taken; compiled graphs have nobody to ask."""
    if backend == "auto":
        return x.is_cuda and not torch.compiler.is_compiling() and is_installed(library)
    return backend == library


def _applies(backend: str, x: Tensor, dtypes: tuple[torch.dtype, ...], obstacles: dict[str, bool]) -> bool:
    """Return whether nothing is in the way, device and dtype first.

    Raises:
        ValueError: Something is, of a backend that was asked for.
    """
    taken = ", ".join(str(dtype) for dtype in dtypes)
    general = {
        f"x is on {x.device.type}; move it to a CUDA device": not x.is_cuda,
        f"x has dtype {x.dtype}; cast it to {taken}": x.dtype not in dtypes,
    }
    obstacle = next((words for words, holds in {**general, **obstacles}.items() if holds), None)
    if obstacle is not None and backend != "auto":
        refuse(backend, obstacle)
    return obstacle is None


class KernelScan(torch.autograd.Function):
    """``y, state = KernelScan.apply(scan, x, dt, A, B, C)``: by mamba-ssm's kernel, from zero.

    Backward runs the kernel's own, unless a gradient reaches the state: then that of ``scan``, ours.

    Shape:
        As in ``selective_scan``.
    """

    @staticmethod
    def forward(ctx: Any, scan: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        ctx.set_materialize_grads(False)
        ctx.scan, ctx.needed = scan, [i for i, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        inputs = [
            (t if t is A else t.mT.contiguous()).detach().requires_grad_(i in ctx.needed)
            for i, t in enumerate((x, dt, A, B, C))
        ]
        with torch.enable_grad():
            y, state = selective_scan_fn(*inputs, return_last_state=True)
        ctx.save_for_backward(*inputs, y)
        return y.detach().mT, state.detach().contiguous()  # a view would keep what lies between alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, y = ctx.saved_tensors
        wanted, found = [inputs[i] for i in ctx.needed], [None] * len(inputs)
        if d_state is None:
            gradients = torch.autograd.grad(y, wanted, None if d_y is None else d_y.mT)
        else:
            x, dt, A, B, C = inputs
            with torch.enable_grad():
                y, state = ctx.scan(x.mT, dt.mT, A, B.mT, C.mT)
            given = [(out, slope) for out, slope in ((y, d_y), (state, d_state)) if slope is not None]
            outputs, slopes = zip(*given, strict=True)
            gradients = torch.autograd.grad(outputs, wanted, slopes, allow_unused=True)
        for i, gradient in zip(ctx.needed, gradients, strict=True):
            found[i] = gradient if gradient is None or i == 2 else gradient.mT
        return None, *found


def dual_by_kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Run mamba-ssm's chunked kernel; shapes are those of ``state_space_dual``, whose states it has transposed."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    initial = None if state is None else state.mT.contiguous()
    size = chunk_length(chunk_size, x.shape[1])
    y, end = mamba_chunk_scan_combined(
        x, dt, A, B.to(x.dtype), C.to(x.dtype), size, initial_states=initial, return_final_states=True
    )
    return y, end.mT.contiguous()


def conv_by_kernel(padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """(batch, width - 1 + time, channels) -> (batch, time, channels), activated, by causal-conv1d."""
    from causal_conv1d import causal_conv1d_fn

    bias = None if bias is None else bias.to(weight.dtype)
    y: Tensor = causal_conv1d_fn(padded.mT, weight, bias, activation=activation).mT
    return y[:, weight.shape[1] - 1 :]
