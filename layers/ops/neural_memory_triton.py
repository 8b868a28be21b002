"""What runs ``kernels.neural_memory`` on GPUs of NVIDIA and AMD, and what it takes.

The torch backend's operations are so short, with chunks of 64 tokens, that a GPU has to wait for its host. Here a row
is one program. It covers what models are trained with: a memory of two layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.backend import refuse

SIZES = (16, 32, 64)
"""Of heads and chunks: powers of two, of which a program holds several squares."""
PARTS = (32, 16)
"""Hidden units that a program works on at a time: the first that divides their number."""


def check_sizes(
    *,
    memory_depth: int,
    head_dim: int,
    hidden_widths: Sequence[int],
    chunk_size: int,
    residual_norm: bool,
    checkpoint_chunks: int | None,
) -> None:
    """Require a memory that the kernels take.

    Raises:
        ValueError: There is an obstacle.
    """
    if memory_depth != 2:
        refuse("triton", f"memory_depth={memory_depth}; use 2")
    for name, size in {"head_dim": head_dim, "chunk_size": chunk_size}.items():
        if size not in SIZES:
            refuse("triton", f"{name}={size}; use one of {', '.join(map(str, SIZES))}")
    if residual_norm:
        refuse("triton", "residual_norm=True; use False")
    if checkpoint_chunks is not None:
        remedy = "the kernels keep states alone as it is; use None"
        refuse("triton", f"checkpoint_chunks={checkpoint_chunks}, and {remedy}")
    [width] = hidden_widths
    if width % min(PARTS):
        obstacle = f"memory_expansion gives a head {width} hidden units"
        refuse("triton", f"{obstacle}; use one with which {min(PARTS)} divides them")


def fit(width: int) -> int:
    """Return the slots of a chunk that holds ``width`` tokens."""
    return next(size for size in SIZES if size >= width)


def check_place(q: Tensor) -> None:
    """Require float32 on a GPU.

    Raises:
        ValueError: The queries, cast to the memory's dtype, are elsewhere or of another.
    """
    if q.device.type != "cuda":
        refuse("triton", f"q is on {q.device}; move the inputs to CUDA")
    if q.dtype != torch.float32:
        refuse("triton", f"the memory computes in {q.dtype}; use float32 or less")


def part_of(hidden_width: int) -> int:
    """Return how many hidden units a program works on at a time."""
    return next(part for part in PARTS if hidden_width % part == 0)


def precision() -> str:
    """Return how the products are computed, as ``torch.backends.cuda.matmul.fp32_precision`` allows.

    "tf32x3", three products of TF32, is nearly as exact as float32; GPUs of AMD have neither.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def run_forward(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    last: Tensor,
    group: int,
    inner: Tensor,
    y: Tensor,
    error_norm: Tensor,
    ends: Sequence[Tensor],
    last_base: Sequence[Tensor],
    widths: Sequence[int],
    activation: str,
    loss_scale: float,
    limit: float | None,
) -> None:
    """Fill ``inner``, ``y``, ``error_norm``, ``ends`` and ``last_base``; see ``neural_memory_fused.scan``."""
    from memzoo.layers.ops.kernels.neural_memory import scan_forward

    num_chunks, num_rows, size, _ = inputs[3].shape
    keeps_states = len(inner) == num_chunks - 1
    rows, first = [_cut(t, num_chunks) for t in inputs[:3]], _pack(start)
    to_base = _pack(last_base)
    fixed, given = (_pack(part) if part else to_base for part in (anchor, base))
    states = first.new_empty(num_chunks + 1 if keeps_states else 1, *first.shape)
    states[0] = first
    read = torch.empty_like(rows[2])
    work = y.new_empty(num_rows, size, widths[0] + size)
    with torch.cuda.device_of(y):
        scan_forward[(num_rows,)](
            *rows, *inputs[3:], given, fixed, last, states, read, error_norm, to_base, work,
            num_chunks, num_rows, states.stride(0) if keeps_states else 0, loss_scale, limit or 0.0,
            **_options(inputs, widths, base, anchor, activation, limit),
        )  # fmt: skip
    if keeps_states:
        inner.copy_(states[1:-1])
    _join(read, y)
    _unpack(states[-1], ends)
    _unpack(to_base, last_base)


def run_backward(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    last: Tensor,
    group: int,
    inner: Tensor,
    d_y: Tensor,
    d_last_base: Sequence[Tensor],
    grads: Sequence[Tensor],
    d_start: Sequence[Tensor],
    d_base: Sequence[Tensor],
    d_anchor: Sequence[Tensor],
    d_norm: Sequence[Tensor],
    widths: Sequence[int],
    activation: str,
    loss_scale: float,
    limit: float | None,
) -> None:
    """Fill ``grads``, and in place the other gradients; see ``neural_memory_fused.scan_gradients``."""
    from memzoo.layers.ops.kernels.neural_memory_backward import scan_backward

    num_chunks, num_rows, size, _ = inputs[3].shape
    options = _options(inputs, widths, base, anchor, activation, limit)
    rows, d_read = [_cut(t, num_chunks) for t in inputs[:3]], _cut(d_y, num_chunks)
    d_rows = [torch.empty_like(t) for t in rows]
    states, d_states = torch.cat([_pack(start)[None], inner]), _pack(d_start)
    block = d_states.shape[1] // inputs[-1].shape[1]
    from_base = _pack(d_last_base) if d_last_base else d_states.new_zeros(num_rows, block)
    d_given, d_fixed = (d_states.new_zeros(num_rows, block) for _ in range(2))
    given, fixed = (_pack(part) if part else d_fixed for part in (base, anchor))
    work = d_y.new_empty(num_rows, size, 4 * widths[1] + widths[0] + 2 * size)
    with torch.cuda.device_of(d_y):
        scan_backward[(num_rows,)](
            *rows, *inputs[3:], given, fixed, last, states[-1],
            d_read, from_base, *d_rows, *grads[3:], d_given, d_fixed, d_states, work,
            num_chunks, num_rows, states.stride(0), loss_scale, limit or 0.0, **options,
        )  # fmt: skip
    for cut, grad in zip(d_rows, grads[:3], strict=True):
        _join(cut, grad)
    _unpack(d_states, d_start)
    _unpack(d_given, d_base)
    _unpack(d_fixed, d_anchor)


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """Lay the matrices (R, ...) of a row one after the other: (R, numbers)."""
    return torch.cat([t.flatten(1) for t in parts], 1)


def _unpack(packed: Tensor, into: Sequence[Tensor]) -> None:
    """Undo ``_pack``; of what is packed and has no place nothing is kept."""
    parts = packed.split([t.shape[1:].numel() for t in into], 1) if into else ()
    for part, to in zip(parts, into, strict=True):
        to.flatten(1).copy_(part)


def _cut(x: Tensor, num_chunks: int) -> Tensor:
    """(batch, n C, heads, d) -> (n, R, C, d)."""
    rows: Tensor = x.unflatten(1, (num_chunks, -1))
    return rows.movedim(3, 1).movedim(2, 0).flatten(1, 2).contiguous()


def _join(x: Tensor, into: Tensor) -> None:
    """Undo ``_cut``."""
    batch, _, heads, _ = into.shape
    into.unflatten(1, (len(x), -1)).copy_(x.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4))


def _options(
    inputs: Sequence[Tensor],
    widths: Sequence[int],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    activation: str,
    limit: float | None,
) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    return dict(
        C=inputs[3].shape[2], D=widths[0], H=widths[1], B=part_of(widths[1]),
        HAS_MOMENTUM=inputs[-1].shape[1] == 2, HAS_BASE=len(base) > 0, HAS_ANCHOR=len(anchor) > 0,
        HAS_LIMIT=limit is not None, ACTIVATION=activation, PRECISION=precision(), num_warps=8, num_stages=1,
    )  # fmt: skip
