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


def check_fused(backend: str, **sizes: Any) -> None:
    """Require a memory that the kernels of ``backend`` take; "auto" and "torch" take all.

    Args:
        backend: What was asked for.
        sizes: What their ``check_sizes`` takes.

    Raises:
        ValueError: There is an obstacle.
    """
    if backend not in KERNELS:
        return
    KERNELS[backend].check_sizes(**sizes)


def choose_fused(
    backend: str,
    tokens: Tensors,
    weights: Tensors,
    *,
    chunk_size: int,
    residual_norm: bool,
    window: int,
    gamma: Tensor | None,
    checkpoint_chunks: int | None,
) -> str:
    """Return the backend that q, k, v (batch, time, heads, d) are scanned by, one of ``BACKENDS``.

    Kernels only if asked for: "auto" takes torch. So do calls on the meta device.

    Args:
        backend: What the caller asked for.
        tokens: Queries, keys and values, cast to the memory's dtype.
        weights: Of the memory.
        chunk_size: Of the model, as are the rest.
        window: Tokens whose losses a step is on.
        gamma: Their shares.

    Raises:
        ValueError: They were asked for, and memory, device or dtype are none of theirs.
    """
    if backend not in KERNELS:
        return "torch"
    q, k, v = tokens
    check_fused(
        backend,
        memory_depth=len(weights),
        residual_norm=residual_norm,
        checkpoint_chunks=checkpoint_chunks,
        head_dim=q.shape[-1],
        hidden_widths=[w.shape[-1] for w in weights[:-1]],
        chunk_size=chunk_size,
    )
    if window > 1:
        refuse(backend, f"window={window}; use 1")
    if gamma is not None:
        refuse(backend, "gamma is given; use None")
    if v.shape[-1] != q.shape[-1]:
        refuse(backend, f"v has width {v.shape[-1]}, q has {q.shape[-1]}; use equal widths")
    if q.is_meta:
        return "torch"
    KERNELS[backend].check_place(q)
    elsewhere = any(t.device != q.device for t in (k, v, *weights))
    return "torch" if elsewhere else backend  # torch says what is where


def chunk_width(backend: str, time: int, chunk_size: int) -> int:
    """Return the slots of a chunk with which ``backend`` scans ``time`` tokens: kernels have to fill theirs."""
    width = min(time, chunk_size)
    return KERNELS[backend].fit(width) if backend in KERNELS else width


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
        states = [t.contiguous() for t in tensors[NUM_INPUTS:]]
        parts = _split(settings, states)
        start = parts[0]
        num_chunks, num_rows = coefficients[0].shape[:2]
        if reached is None:
            last = torch.full((num_rows,), num_chunks - 1, dtype=torch.int32, device=start[0].device)
        else:
            chunk = torch.arange(num_chunks, dtype=torch.int32, device=start[0].device)[:, None]
            last = (reached[..., 0, 0] * chunk).amax(0).int()
        limit = settings.max_gradient_norm
        ctx.options = (
            settings.group,
            settings.activation,
            float(settings.loss_scale),
            None if limit is None else float(limit),
            settings.backend,
        )
        results = scan(inputs, *parts, last, settings.keeps_work, *ctx.options)
        (y, error_norm, inner), ends, last_base = results[:3], results[3 : 3 + len(start)], results[3 + len(start) :]
        ctx.save_for_backward(*inputs, last, inner, *states)
        ctx.settings = settings
        ctx.mark_non_differentiable(error_norm)
        return (y, error_norm, *ends, *(last_base if num_chunks > 1 else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # a checkpoint gives them once
        (*inputs, last, inner), states = saved[: NUM_INPUTS + 2], saved[NUM_INPUTS + 2 :]
        parts = _split(ctx.settings, states)
        count = len(parts[0])
        d_y, d_ends, d_last_base = outer[0], outer[2 : 2 + count], outer[2 + count :]
        grads = scan_gradients(
            inputs,
            *parts,
            last,
            inner,
            d_y if d_y.stride(-1) == 1 else d_y.contiguous(),
            [t.contiguous() for t in d_ends],
            [t.contiguous() for t in d_last_base],
            *ctx.options,
        )
        return (None, None, *grads)


@torch.library.custom_op("memzoo::neural_memory_scan", mutates_args=())
def scan(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    last: Tensor,
    keeps_states: bool,
    group: int,
    activation: str,
    loss_scale: float,
    limit: float | None,
    backend: str,
) -> list[Tensor]:
    """Scan all chunks; one operation to a compiler.

    Args:
        inputs: Queries, keys and values (batch, n C, heads, d), of which rows are (batch, heads), then the other fields
            of ``ChunkInputs``, with the n chunks as first axis.
        start: The carried blocks before the first chunk, a matrix (R, d_{l-1}, d_l) a layer, one block after the other.
        base: Weights at which the first chunk's gradients are taken, likewise; none for those at its start.
        anchor: Weights that forgetting decays towards, likewise; or none.
        norm: Gain and bias (R, 1, d_L) of a LayerNorm in the memory, which the errors go through; what is read is still
            the network's output. Or none.
        last: (R,) int32, the chunk whose weights at its start are the row's last gradient base.
        keeps_states: Keep blocks between chunks.
        group: Chunks between those that are kept.
        activation: Between the memory's layers.
        loss_scale: Factor of the gradient.
        limit: Of a token's gradient, or None.
        backend: Whose kernel runs.

    Returns:
        Reads like the values, norms of errors (n, R, C), the blocks before chunks ``group``, 2 ``group`` and so on,
        with the numbers of all matrices in a line, (number, R, ...), the blocks after the last chunk, like ``start``,
        and the weights at which gradients were taken in chunk ``last``.
    """
    y, error_norm, inner, *states = _results(inputs, start, base, anchor, norm, last, keeps_states, group)
    ends, last_base = states[: len(start)], states[len(start) :]
    KERNELS[backend].run_forward(
        inputs, start, base, anchor, norm, last, group, inner, y, error_norm, ends, last_base, _widths(last_base),
        activation, loss_scale, limit,
    )  # fmt: skip
    return [y, error_norm, inner, *states]


@scan.register_fake
def _results(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    last: Tensor,
    keeps_states: bool,
    group: int,
    *_: Any,
) -> list[Tensor]:
    v, mix, blocks = inputs[2], inputs[NUM_ROWS], inputs[-1].shape[1]
    kept = (mix.shape[0] - 1) // group if keeps_states else 0
    inner = v.new_empty(kept, mix.shape[1], sum(t.shape[1:].numel() for t in start))
    states = [t.new_empty(t.shape) for t in (*start, *start[: len(start) // blocks])]
    return [v.new_empty(v.shape), v.new_empty(mix.shape[:-1]), inner, *states]


@torch.library.custom_op("memzoo::neural_memory_scan_gradients", mutates_args=())
def scan_gradients(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    last: Tensor,
    inner: Tensor,
    d_y: Tensor,
    d_ends: Sequence[Tensor],
    d_last_base: Sequence[Tensor],
    group: int,
    activation: str,
    loss_scale: float,
    limit: float | None,
    backend: str,
) -> list[Tensor]:
    """Take gradients of the results of ``scan`` back, given what it was given and the blocks that it kept.

    Args:
        inputs: Those of ``scan``, as are ``start`` to ``last`` and what follows ``d_last_base``.
        inner: The blocks between chunks that it kept.
        d_y: Of the reads.
        d_ends: Of the blocks after the last chunk.
        d_last_base: Of the weights at which gradients were taken in chunk ``last``; none for zeros.

    Returns:
        Gradients of ``inputs``, ``start``, ``base``, ``anchor`` and ``norm``.
    """
    grads = [t.new_empty(t.shape) for t in inputs]
    d_start = [t.clone() for t in d_ends]
    d_base, d_anchor, d_norm = ([torch.zeros_like(t) for t in part] for part in (base, anchor, norm))
    widths = _widths(start[: len(start) // inputs[-1].shape[1]])
    KERNELS[backend].run_backward(
        inputs, start, base, anchor, norm, last, group, inner, d_y, d_last_base,
        grads, d_start, d_base, d_anchor, d_norm, widths, activation, loss_scale, limit,
    )  # fmt: skip
    return [*grads, *d_start, *d_base, *d_anchor, *d_norm]


@scan_gradients.register_fake
def _gradients(
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    base: Sequence[Tensor],
    anchor: Sequence[Tensor],
    norm: Sequence[Tensor],
    *_: Any,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*inputs, *start, *base, *anchor, *norm)]


def _split(settings: ChunkSettings, states: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Part states into the blocks carried, base, anchor and norm, each there or not."""
    count = settings.blocks * settings.depth
    own = count + settings.has_base * settings.depth
    fixed = own + settings.has_anchor * settings.depth
    return states[:count], states[count:own], states[own:fixed], states[fixed:]


def _widths(weights: Sequence[Tensor]) -> list[int]:
    """d_0 .. d_L of a memory with these weights."""
    return [weights[0].shape[1], *(t.shape[2] for t in weights)]
