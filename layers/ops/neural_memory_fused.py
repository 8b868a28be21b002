"""A neural memory's scan as one kernel forward and one backward: Triton's on a GPU, C++ on a CPU.

The torch backend runs dozens of operations a chunk, over a hundred backward, each over all rows. Here a row, a head of
a sequence, goes through its chunks by itself, in registers and cache. ``neural_memory_triton`` and
``neural_memory_cpp`` say what their kernels take, and run them.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops import neural_memory_cpp, neural_memory_triton
from memzoo.layers.ops.backend import refuse
from memzoo.layers.ops.neural_memory_chunk import ChunkInputs, ChunkSettings, Tensors
from memzoo.layers.ops.once_differentiable import once_differentiable

NUM_INPUTS = len(fields(ChunkInputs))
NUM_ROWS = 3
"""Of these, queries, keys and values; the others are coefficients."""
KERNELS = {"triton": neural_memory_triton, "cpp": neural_memory_cpp}
BACKENDS = ("torch", *KERNELS)


def check_fused(
    backend: str, *, residual_norm: bool, checkpoint_chunks: int | None, memory_depth: int, **sizes: int
) -> None:
    """Require a memory that the kernels of ``backend`` take; "auto" and "torch" take all.

    Raises:
        ValueError: There is an obstacle.
    """
    if backend not in KERNELS:
        return
    KERNELS[backend].check_sizes(memory_depth=memory_depth, **sizes)
    if residual_norm:
        refuse(backend, "residual_norm=True; use False")
    if checkpoint_chunks is not None:
        remedy = "the kernels keep states alone as it is; use None"
        refuse(backend, f"checkpoint_chunks={checkpoint_chunks}, and {remedy}")


def choose_fused(
    backend: str, settings: ChunkSettings, group: int | None, chunk_size: int, q: Tensor, v: Tensor, hidden_width: int
) -> str:
    """Return the backend that q and v (batch, time, heads, d) are scanned by, one of ``BACKENDS``.

    Kernels only if asked for: "auto" takes torch. So do calls of fewer tokens than a chunk, those whose first token is
    not known to begin one (rows that go on from a state are anywhere), and those on the meta device.

    Args:
        backend: What the caller asked for.
        settings: Of the chunks.
        group: ``checkpoint_chunks``.
        chunk_size: Of the model.
        q: Queries.
        v: Values.
        hidden_width: Of the memory.

    Raises:
        ValueError: They were asked for, and memory, device or dtype are none of theirs.
    """
    if backend not in KERNELS:
        return "torch"
    check_fused(
        backend,
        memory_depth=settings.depth,
        residual_norm=settings.has_norm,
        checkpoint_chunks=group,
        head_dim=q.shape[-1],
        hidden_width=hidden_width,
        chunk_size=chunk_size,
    )
    if v.shape[-1] != q.shape[-1]:
        refuse(backend, f"v has width {v.shape[-1]}, q has {q.shape[-1]}; use equal widths")
    if settings.has_base or q.shape[1] < chunk_size or q.is_meta:
        return "torch"
    KERNELS[backend].check_place(q)
    return backend


class FusedScan(torch.autograd.Function):
    """``ChunkScan`` by the kernels of ``settings.backend``.

    The same arguments and results, but for queries, keys, values and reads, which are (batch, n C, heads, d), wherever
    their tokens lie. Keeps its inputs and the carried blocks at the start of every chunk for the backward pass, no work
    of the chunks.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, reached: Tensor | None, *tensors: Tensor) -> Tensors:
        rows, coefficients = tensors[:NUM_ROWS], tensors[NUM_ROWS:NUM_INPUTS]
        inputs = [*(t if t.stride(-1) == 1 else t.contiguous() for t in rows), *(t.contiguous() for t in coefficients)]
        given = settings.split(tensors[NUM_INPUTS:])
        num_chunks, num_rows = coefficients[0].shape[:2]
        widths = [inputs[0].shape[-1], *(m.shape[-1] for m in given.carry[0])]
        start = _pack([t for block in given.carry for t in block])
        anchor = _pack(given.anchor) if given.anchor else None
        if reached is None:
            last = start.new_full((num_rows,), num_chunks - 1, dtype=torch.int32)
        else:
            chunk = torch.arange(num_chunks, dtype=torch.int32, device=start.device)[:, None]
            last = (reached[..., 0, 0] * chunk).amax(0).int()
        limit = settings.max_gradient_norm
        ctx.options = (
            widths,
            settings.activation,
            float(settings.loss_scale),
            None if limit is None else float(limit),
            settings.backend,
        )
        y, error_norm, states, base = scan(inputs, start, anchor, last, settings.keeps_work, *ctx.options)
        ctx.save_for_backward(*inputs, last, states, *([] if anchor is None else [anchor]))
        ctx.mark_non_differentiable(error_norm)
        ctx.layers = [m.shape[1:] for m in given.carry[0]]
        weights = _unpack(base if anchor is None else base + anchor, ctx.layers) if num_chunks > 1 else ()
        return (y, error_norm, *_unpack(states[-1], ctx.layers * settings.blocks), *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # a checkpoint gives them once
        (*inputs, last, states), anchor = saved[: NUM_INPUTS + 2], next(iter(saved[NUM_INPUTS + 2 :]), None)
        blocks, depth = inputs[-1].shape[1], len(ctx.layers)
        ends, base = outer[2 : 2 + depth * blocks], outer[2 + depth * blocks :]
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
    widths: Sequence[int],
    activation: str,
    loss_scale: float,
    limit: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scan all chunks; one operation to a compiler.

    Args:
        inputs: Queries, keys and values (batch, n C, heads, d), of which rows are (batch, heads), then the other fields
            of ``ChunkInputs``, with the n chunks as first axis.
        start: The carried blocks before the first chunk, packed: (R, k numbers of a block).
        anchor: Weights that forgetting decays towards, packed, or None.
        last: (R,) int32, the chunk whose weights at its start are the row's last gradient base.
        keeps_states: Keep the blocks at the start of every chunk, not only after the last.
        widths: d_0 .. d_L of the memory's layers.
        activation: Between the memory's layers.
        loss_scale: Factor of the gradient.
        limit: Of a token's gradient, or None.
        backend: Whose kernel runs.

    Returns:
        Reads like the values, norms of errors (n, R, C), packed blocks (n + 1 or 1, R, ...), of which the last are
        those after the last chunk, and the first block at the start of the last chunk.
    """
    y, error_norm, states, base = _results(inputs, start, anchor, last, keeps_states)
    states[0] = start
    stride = states.stride(0) if keeps_states else 0
    KERNELS[backend].run_forward(
        inputs, anchor, last, states, stride, y, error_norm, base, widths, activation, loss_scale, limit
    )
    return y, error_norm, states, base


@scan.register_fake
def _results(
    inputs: Sequence[Tensor], start: Tensor, anchor: Tensor | None, last: Tensor, keeps_states: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v, mix, blocks = inputs[2], inputs[NUM_ROWS], inputs[-1].shape[1]
    states = start.new_empty(len(mix) + 1 if keeps_states else 1, *start.shape)
    base = start.new_empty(len(start), start.shape[1] // blocks)
    return v.new_empty(v.shape), v.new_empty(mix.shape[:-1]), states, base


@torch.library.custom_op("memzoo::neural_memory_scan_gradients", mutates_args=())
def scan_gradients(
    inputs: Sequence[Tensor],
    anchor: Tensor | None,
    last: Tensor,
    states: Tensor,
    d_y: Tensor,
    d_base: Tensor,
    d_end: Tensor,
    widths: Sequence[int],
    activation: str,
    loss_scale: float,
    limit: float | None,
    backend: str,
) -> list[Tensor]:
    """Take gradients of the results of ``scan`` back, given what it was given and gave, ``states`` kept.

    Returns:
        Gradients of the inputs, of ``start`` and of ``anchor``, zeros without one.
    """
    grads = [t.new_empty(t.shape) for t in inputs]
    d_states, d_anchor = d_end.clone(), torch.zeros_like(d_base)
    KERNELS[backend].run_backward(
        inputs, anchor, last, states, d_y, d_base, grads, d_states, d_anchor, widths, activation, loss_scale, limit
    )
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
    return [t.new_empty(t.shape) for t in (*inputs, d_end, d_base)]


def _pack(parts: Tensors | list[Tensor]) -> Tensor:
    """Lay the matrices (R, ...) of a row one after the other: (R, numbers)."""
    return torch.cat([t.flatten(1) for t in parts], 1)


def _unpack(packed: Tensor, shapes: list[torch.Size]) -> Tensors:
    """Undo ``_pack``, with memory of their own for each."""
    parts = packed.split([shape.numel() for shape in shapes], 1)
    return tuple(t.clone().view(-1, *shape) for t, shape in zip(parts, shapes, strict=True))
