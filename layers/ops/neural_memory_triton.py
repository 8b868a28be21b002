"""A neural memory's scan as one Triton kernel forward and one backward, on GPUs of NVIDIA and AMD.

The torch backend runs dozens of operations a chunk, over a hundred backward, each of them short, so that with chunks of
64 tokens a GPU has to wait for its host. Here a row, a head of a sequence, is one program that goes through its chunks.
It covers what models are trained with: a memory of two layers, calls of whole chunks. ``check_triton`` says what it
does not.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.neural_memory_chunk import ChunkInputs, ChunkSettings, Tensors
from memzoo.layers.ops.once_differentiable import once_differentiable

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
        inputs = [t.contiguous() for t in tensors[:NUM_INPUTS]]
        given = settings.split(tensors[NUM_INPUTS:])
        num_chunks, num_rows, _, width = inputs[0].shape
        hidden_width = given.carry[0][0].shape[-1]
        start = _pack([t for block in given.carry for t in block])
        anchor = _pack(given.anchor) if given.anchor else None
        if reached is None:
            last = start.new_full((num_rows,), num_chunks - 1, dtype=torch.int32)
        else:
            chunk = torch.arange(num_chunks, dtype=torch.int32, device=start.device)[:, None]
            last = (reached[..., 0, 0] * chunk).amax(0).int()
        limit = settings.max_gradient_norm
        ctx.options = settings.activation, float(settings.loss_scale), None if limit is None else float(limit)
        y, error_norm, states, base = scan(inputs, start, anchor, last, settings.keeps_work, *ctx.options)
        ctx.save_for_backward(*inputs, last, states, *([] if anchor is None else [anchor]))
        ctx.mark_non_differentiable(error_norm)
        ctx.layers = [(width, hidden_width), (hidden_width, width)]
        weights = _unpack(base if anchor is None else base + anchor, ctx.layers) if num_chunks > 1 else ()
        return (y, error_norm, *_unpack(states[-1], ctx.layers * settings.blocks), *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, last, states = ctx.saved_tensors[: NUM_INPUTS + 2]
        anchor = next(iter(ctx.saved_tensors[NUM_INPUTS + 2 :]), None)
        blocks = inputs[-1].shape[1]
        ends, base = outer[2 : 2 + 2 * blocks], outer[2 + 2 * blocks :]
        d_base = _pack(base) if base else states.new_zeros(states.shape[1], states.shape[2] // blocks)
        *grads, d_states, d_anchor = scan_gradients(
            inputs, anchor, last, states, outer[0].contiguous(), d_base, _pack(ends), *ctx.options
        )
        shared = () if anchor is None else _unpack(d_anchor, ctx.layers)
        return (None, None, *grads, *_unpack(d_states, ctx.layers * blocks), *shared)


@torch.library.custom_op("memzoo::neural_memory_scan", mutates_args=())
def scan(
    inputs: Sequence[Tensor],
    start: Tensor,
    anchor: Tensor | None,
    last: Tensor,
    keeps_states: bool,
    activation: str,
    loss_scale: float,
    limit: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``scan_forward``; one operation to a compiler.

    Args:
        inputs: The fields of ``ChunkInputs``, with the n chunks as first axis.
        start: The carried blocks before the first chunk, packed: (R, k numbers of a block).
        anchor: Weights that forgetting decays towards, packed, or None.
        last: (R,) int32, the chunk whose weights at its start are the row's last gradient base.
        keeps_states: Keep the blocks at the start of every chunk, not only after the last.
        activation: Between the memory's layers.
        loss_scale: Factor of the gradient.
        limit: Of a token's gradient, or None.

    Returns:
        Reads (n, R, C, d), norms of errors (n, R, C), packed blocks (n + 1 or 1, R, ...), of which the last are those
        after the last chunk, and the first block at the start of the last chunk.
    """
    from memzoo.layers.ops.kernels.neural_memory import scan_forward

    y, error_norm, states, base = _results(inputs, start, anchor, last, keeps_states)
    num_chunks, num_rows, size, width = inputs[0].shape
    states[0] = start
    work = start.new_empty(num_rows, size, width + size)
    with torch.cuda.device_of(start):
        scan_forward[(num_rows,)](
            *inputs, start if anchor is None else anchor, last, states, y, error_norm, base, work,
            num_chunks, num_rows, states.stride(0) if keeps_states else 0, loss_scale, limit or 0.0,
            **_options(inputs, start, anchor, activation, limit),
        )  # fmt: skip
    return y, error_norm, states, base


@scan.register_fake
def _results(
    inputs: Sequence[Tensor], start: Tensor, anchor: Tensor | None, last: Tensor, keeps_states: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, blocks = inputs[2], inputs[-1].shape[1]
    states = start.new_empty(len(v) + 1 if keeps_states else 1, *start.shape)
    return torch.empty_like(v), v.new_empty(v.shape[:-1]), states, start.new_empty(len(start), start.shape[1] // blocks)


@torch.library.custom_op("memzoo::neural_memory_scan_gradients", mutates_args=())
def scan_gradients(
    inputs: Sequence[Tensor],
    anchor: Tensor | None,
    last: Tensor,
    states: Tensor,
    d_y: Tensor,
    d_base: Tensor,
    d_end: Tensor,
    activation: str,
    loss_scale: float,
    limit: float | None,
) -> list[Tensor]:
    """Run ``scan_backward`` on what ``scan`` was given and gave, ``states`` kept, and on gradients of its results.

    Returns:
        Gradients of the inputs, of ``start`` and of ``anchor``, zeros without one.
    """
    from memzoo.layers.ops.kernels.neural_memory_backward import scan_backward

    num_chunks, num_rows, size, width = inputs[0].shape
    options = _options(inputs, d_end, anchor, activation, limit)
    grads = [torch.empty_like(t) for t in inputs]
    d_states, d_anchor = d_end.clone(), torch.zeros_like(d_base)
    work = d_end.new_empty(num_rows, size, 4 * options["H"] + width + 2 * size)
    with torch.cuda.device_of(d_end):
        scan_backward[(num_rows,)](
            *inputs, d_base if anchor is None else anchor, last, states[num_chunks - 1],
            d_y, d_base, *grads, d_anchor, d_states, work,
            num_chunks, num_rows, states.stride(0), loss_scale, limit or 0.0, **options,
        )  # fmt: skip
    return [*grads, d_states, d_anchor]


@scan_gradients.register_fake
def _gradients(
    inputs: Sequence[Tensor],
    anchor: Tensor | None,
    last: Tensor,
    states: Tensor,
    d_y: Tensor,
    d_base: Tensor,
    d_end: Tensor,
    *_: Any,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*inputs, d_end, d_base)]


def _options(
    inputs: Sequence[Tensor], start: Tensor, anchor: Tensor | None, activation: str, limit: float | None
) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    size, width = inputs[0].shape[2:]
    blocks = inputs[-1].shape[1]
    hidden_width = start.shape[1] // (2 * blocks * width)
    return dict(
        C=size, D=width, H=hidden_width, B=part_of(hidden_width),
        HAS_MOMENTUM=blocks == 2, HAS_ANCHOR=anchor is not None, HAS_LIMIT=limit is not None,
        ACTIVATION=activation, PRECISION=precision(), num_warps=8, num_stages=1,
    )  # fmt: skip


def _pack(parts: Tensors | list[Tensor]) -> Tensor:
    """Lay the matrices (R, ...) of a row one after the other: (R, numbers)."""
    return torch.cat([t.flatten(1) for t in parts], 1)


def _unpack(packed: Tensor, shapes: list[tuple[int, int]]) -> Tensors:
    """Undo ``_pack``, with memory of their own for each."""
    parts = packed.split([rows * columns for rows, columns in shapes], 1)
    return tuple(t.clone().view(-1, *shape) for t, shape in zip(parts, shapes, strict=True))
