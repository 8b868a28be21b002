"""What ``linear_recurrence`` and ``delta_rule`` share: checks, layout, one-token steps, and the choice of a backend."""

from itertools import pairwise

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.memory_arguments import blank_behind, working_dtype
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.recurrence_fla import choose_fla, recur_by_fla
from memzoo.layers.ops.recurrence_scan import RecurrenceScan
from memzoo.layers.ops.segment_grid import SegmentGrid

BACKENDS = ("torch", "fla")


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    scale: float | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence on checked arguments; those of ``delta_rule``, ``beta`` None for ``linear_recurrence``."""
    batch, time, heads = v.shape[:3]
    given = [t for t in (q, k, v, beta, log_decay, state) if t is not None]
    dtype = working_dtype(*given)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lengths is not None:  # a token that does not exist writes nothing and lets nothing decay
        gates = [gate for gate in (beta, log_decay) if gate is not None]
        q, k, v, *gates = blank_behind(lengths, q, k, v, *gates)
        beta = None if beta is None else gates.pop(0)
        log_decay = None if log_decay is None else gates.pop(0)
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    if state is None:
        rows = batch if ends is None else len(ends) - 1
        state = q.new_zeros(rows, heads, q.shape[-1], v.shape[-1], dtype=dtype)
    if choose_fla(backend, q, k, v, beta, log_decay):
        return recur_by_fla(q, k, v, beta, log_decay, state.to(dtype), scale, cu_seqlens)

    if (groups := heads // q.shape[2]) > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    with no_autocast(q.device):
        q, k, wide = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
        beta = None if beta is None else beta.to(dtype)[..., None]
        if log_decay is not None:
            log_decay = log_decay.to(dtype).view(batch, time, heads, -1)
        state = state.to(dtype)
        if ends is None:
            run = _step if time == 1 else _run_rows
            y, state = run(q, k, wide, beta, log_decay, state, chunk_size)
        else:
            lengths_of_segments = [stop - start for start, stop in pairwise(ends)]
            y, state = _run_segments(q, k, wide, beta, log_decay, state, chunk_size, lengths_of_segments)
    if lengths is not None:
        y = blank_behind(lengths, y)[0]
    return y.to(v.dtype), state


def _run_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    grid = SegmentGrid.of_rows(q.shape[0], q.shape[1], _chunk(chunk_size, q.shape[1]), q.device)
    return _run_grid(grid, q, k, v, beta, log_decay, state)


def _run_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    chunk_size: int,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Run segments of the given lengths; those without a token keep their state."""
    taken = [i for i, length in enumerate(lengths) if length]
    some = len(taken) < len(lengths)
    index = torch.tensor(taken, device=state.device) if some else None
    own = state if index is None else state.index_select(0, index)
    lengths = [length for length in lengths if length]
    if max(lengths, default=0) == 1:
        parts = (None if t is None else t.transpose(0, 1) for t in (q, k, v, beta, log_decay))
        y, own = _step(*parts, own, chunk_size)
        y = y.transpose(0, 1)
    elif lengths:
        grid = SegmentGrid.of_segments(lengths, q.shape[2], _chunk(chunk_size, max(lengths)), q.device)
        y, own = _run_grid(grid, q, k, v, beta, log_decay, own.index_select(0, grid.order))
        own = own.index_select(0, grid.place)
    else:
        y = v
    return y, own if index is None else state.index_copy(0, index, own)


def _run_grid(
    grid: SegmentGrid,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, time = q.shape[:2]
    gates = (None if gate is None else grid.blank(grid.cut(gate)) for gate in (beta, log_decay))
    y, state = RecurrenceScan.apply(
        grid.active, grid.cut(q), grid.blank(grid.cut(k)), grid.cut(v), *gates, state
    )
    return grid.join(y, batch, time), state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    _: int,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one token a row: (rows, 1, heads, ...)."""
    q, k, v = (t[:, 0, :, None] for t in (q, k, v))  # (rows, heads, 1, ...)
    if log_decay is not None:
        state = state * log_decay[:, 0, :, :, None].exp()
    if beta is not None:
        v = beta[:, 0, :, None] * (v - k @ state)
    state = state + k.mT * v
    return (q @ state).transpose(1, 2), state


def _chunk(chunk_size: int, longest: int) -> int:
    """Return the tokens of a chunk: a power of two, no more than the longest sequence needs."""
    return 1 << (min(chunk_size, longest) - 1).bit_length()


def check_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> None:
    """Check the arguments of a recurrence.

    Raises:
        ValueError: One of them does not fit.
    """
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, time, heads, key width), time >= 1")
    batch, time, heads, width = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must match q, {tuple(q.shape)}")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % heads or not v.shape[2]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; it must be (batch, time, value heads, value width) = "
            f"({batch}, {time}, a multiple of {heads}, any)"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating-point dtype")
    if beta is not None and beta.shape != v.shape[:3]:
        raise ValueError(
            f"beta has shape {tuple(beta.shape)}; it must be (batch, time, value heads) = {tuple(v.shape[:3])}"
        )
    shapes = (tuple(v.shape[:3]), (*v.shape[:3], width))
    if log_decay is not None and tuple(log_decay.shape) not in shapes:
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}; it must be (batch, time, value heads) = {shapes[0]}, "
            f"or {shapes[1]} for a decay per key channel"
        )
    check_positive("chunk_size", chunk_size)
    check_backend(backend, BACKENDS)
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths and cu_seqlens are both given; pass lengths for padded rows, cu_seqlens for one row")
    if lengths is not None and (lengths.shape != (batch,) or lengths.is_floating_point()):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; it must be (batch,) = ({batch},) "
            f"integers"
        )
    rows = batch if cu_seqlens is None else _count_segments(cu_seqlens, batch, time)
    expected = (rows, v.shape[2], width, v.shape[3])
    if state is not None and (state.shape != expected or not state.is_floating_point()):
        raise ValueError(
            f"state has shape {tuple(state.shape)} and dtype {state.dtype}; it must be floating point, (rows, value "
            f"heads, key width, value width) = {expected}: pass what the previous call returned, or None"
        )


def _count_segments(cu_seqlens: Tensor, batch: int, time: int) -> int:
    if batch != 1:
        raise ValueError(f"cu_seqlens needs all segments in a single row, but batch is {batch}; flatten it to 1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be (segments + 1,) "
            f"integers"
        )
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != time or any(stop < start for start, stop in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens={ends if len(ends) < 10 else [*ends[:4], '...', *ends[-4:]]} does not run from 0 to "
            f"time={time} without a step back; pass cat([0, lengths.cumsum(0)])"
        )
    return len(ends) - 1
