"""A neural memory's scan as one Triton kernel forward and one backward, on GPUs of NVIDIA and AMD.

The torch backend launches some sixty kernels a chunk and twice as many backward, of which each is short: with chunks of
64 tokens a GPU waits for its host. Here a row, a head of a sequence, is one program that goes through its chunks. It
covers what models are trained with: a memory of two layers, calls of whole chunks; ``check_triton`` says what it does
not.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.layers.ops.neural_memory_chunk import ChunkInputs, ChunkSettings, Tensors

NUM_INPUTS = len(fields(ChunkInputs))
BACKENDS = ("torch", "triton")
SIZES = (16, 32, 64)
"""Of heads and chunks: powers of two, of which a program holds several squares."""
PARTS = (32, 16)
"""Hidden units that a program works on at a time: the first that divides their number."""


def check_triton(
    *,
    memory_depth: int,
    residual_norm: bool,
    checkpoint_chunks: int | None,
    head_dim: int,
    hidden_width: int,
    chunk_size: int,
) -> None:
    """Require a memory that the kernels take.

    Raises:
        ValueError: There is an obstacle.
    """
    if memory_depth != 2:
        _refuse(f"memory_depth={memory_depth}; use 2")
    if residual_norm:
        _refuse("residual_norm=True; use False")
    if checkpoint_chunks is not None:
        _refuse(f"checkpoint_chunks={checkpoint_chunks}, and the kernels keep states alone as it is; use None")
    for name, size in {"head_dim": head_dim, "chunk_size": chunk_size}.items():
        if size not in SIZES:
            _refuse(f"{name}={size}; use one of {', '.join(map(str, SIZES))}")
    if hidden_width % min(PARTS):
        _refuse(
            f"memory_expansion gives a head {hidden_width} hidden units; use one with which {min(PARTS)} divides them"
        )


def choose_triton(
    backend: str, settings: ChunkSettings, group: int | None, chunk_size: int, q: Tensor, v: Tensor, hidden_width: int
) -> bool:
    """Return whether the kernels are to be used for rows q, v (n, R, C, d).

    Only if asked for: "auto" takes torch, until they have been timed on a GPU. So do calls of fewer tokens than a
    chunk, those whose first token is not known to begin one (rows that go on from a state are anywhere), and those on
    the meta device.

    Args:
        backend: What the caller asked for.
        settings: Of the chunks.
        group: ``checkpoint_chunks``.
        chunk_size: Of the model; C is the number of tokens if there are fewer.
        q: Queries.
        v: Values.
        hidden_width: Of the memory.

    Raises:
        ValueError: They were asked for, and memory, device or dtype are none of theirs.
    """
    if backend != "triton":
        return False
    check_triton(
        memory_depth=settings.depth,
        residual_norm=settings.has_norm,
        checkpoint_chunks=group,
        head_dim=q.shape[-1],
        hidden_width=hidden_width,
        chunk_size=chunk_size,
    )
    if v.shape[-1] != q.shape[-1]:
        _refuse(f"v has width {v.shape[-1]}, q has {q.shape[-1]}; use equal widths")
    if settings.has_base or q.shape[2] < chunk_size or q.is_meta:
        return False
    _check_place(q)
    return True


def _check_place(q: Tensor) -> None:
    if q.device.type != "cuda":
        _refuse(f"q is on {q.device}; move the inputs to CUDA")
    if q.dtype != torch.float32:
        _refuse(f"the memory computes in {q.dtype}; use float32 or less")


def _refuse(obstacle: str) -> None:
    raise ValueError(f"backend='triton' does not apply: {obstacle}, or use backend='auto'")


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


class FusedScan(torch.autograd.Function):
    """``ChunkScan`` by the kernels: the same arguments and results.

    Keeps its inputs and the carried blocks at the start of every chunk for the backward pass, no work of the chunks.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, reached: Tensor | None, *tensors: Tensor) -> Tensors:
        from memzoo.layers.ops.kernels.neural_memory import scan_forward

        inputs = tuple(t.contiguous() for t in tensors[:NUM_INPUTS])
        given = settings.split(tensors[NUM_INPUTS:])
        q, v = inputs[0], inputs[2]
        num_chunks, num_rows, size, width = q.shape
        hidden, blocks = given.carry[0][0].shape[-1], settings.blocks
        start = _pack([t for block in given.carry for t in block])
        states = start.new_empty(num_chunks + 1 if settings.keeps_work else 1, *start.shape)
        states[0] = start
        anchor = _pack(given.anchor) if given.anchor else start
        if reached is None:
            last = torch.full((num_rows,), num_chunks - 1, dtype=torch.int32, device=q.device)
        else:
            chunk = torch.arange(num_chunks, dtype=torch.int32, device=q.device)[:, None]
            last = (reached[..., 0, 0] * chunk).amax(0).int()
        y, error_norm = torch.empty_like(v), v.new_empty(v.shape[:-1])
        base = start.new_empty(num_rows, start.shape[1] // blocks)
        work = start.new_empty(num_rows, size, width + size)
        ctx.options = dict(
            C=size, D=width, H=hidden, B=part_of(hidden),
            HAS_MOMENTUM=blocks == 2, HAS_ANCHOR=bool(given.anchor), HAS_LIMIT=settings.max_gradient_norm is not None,
            ACTIVATION=settings.activation, PRECISION=precision(), num_warps=8, num_stages=1,
        )  # fmt: skip
        ctx.scales = float(settings.loss_scale), float(settings.max_gradient_norm or 0)
        stride = states.stride(0) if settings.keeps_work else 0
        with torch.cuda.device_of(q):
            scan_forward[(num_rows,)](
                *inputs, anchor, last, states, y, error_norm, base, work,
                num_chunks, num_rows, stride, *ctx.scales, **ctx.options,
            )  # fmt: skip
        ctx.save_for_backward(*inputs, anchor, last, states)
        ctx.mark_non_differentiable(error_norm)
        layers = [(width, hidden), (hidden, width)]
        weights = _unpack(base + anchor if given.anchor else base, layers)
        return (y, error_norm, *_unpack(states[-1], layers * blocks), *(weights if num_chunks > 1 else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        from memzoo.layers.ops.kernels.neural_memory_backward import scan_backward

        *saved, last, states = ctx.saved_tensors
        inputs, anchor = saved[:NUM_INPUTS], saved[NUM_INPUTS]
        num_chunks, num_rows = inputs[0].shape[:2]
        width, hidden, has_anchor = ctx.options["D"], ctx.options["H"], ctx.options["HAS_ANCHOR"]
        blocks = 2 if ctx.options["HAS_MOMENTUM"] else 1
        count = 2 * blocks
        d_states = _pack(outer[2 : 2 + count])
        numbers = d_states.shape[1] // blocks
        d_base = _pack(outer[2 + count :]) if num_chunks > 1 else d_states.new_zeros(num_rows, numbers)
        d_anchor = d_states.new_zeros(num_rows, numbers) if has_anchor else d_base
        grads = [torch.empty_like(t) for t in inputs]
        size = ctx.options["C"]
        work = d_states.new_empty(num_rows, size, 4 * hidden + width + 2 * size)
        with torch.cuda.device_of(d_states):
            scan_backward[(num_rows,)](
                *inputs, anchor, last, states[num_chunks - 1],
                outer[0].contiguous(), d_base, *grads, d_anchor, d_states, work,
                num_chunks, num_rows, states.stride(0), *ctx.scales, **ctx.options,
            )  # fmt: skip
        layers = [(width, hidden), (hidden, width)]
        shared = _unpack(d_anchor, layers) if has_anchor else ()
        return (None, None, *grads, *_unpack(d_states, layers * blocks), *shared)


def _pack(parts: Tensors | list[Tensor]) -> Tensor:
    """Lay the matrices (R, ...) of a row one after the other: (R, numbers)."""
    return torch.cat([t.flatten(1) for t in parts], 1)


def _unpack(packed: Tensor, shapes: list[tuple[int, int]]) -> Tensors:
    """Undo ``_pack``, with memory of their own for each."""
    parts = packed.split([rows * columns for rows, columns in shapes], 1)
    return tuple(t.clone().view(-1, *shape) for t, shape in zip(parts, shapes, strict=True))
