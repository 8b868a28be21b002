"""What ``linear_recurrence`` and ``delta_rule`` share: checks, layout, one-token steps, and the choice of a backend."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.memory_arguments import blank_behind, takes_gradients, working_dtype
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.recurrence_fla import choose_fla, recur_by_fla
from memzoo.layers.ops.recurrence_scan import RecurrenceScan
from memzoo.layers.ops.segment_grid import SegmentGrid, check_borders, check_ragged, chunk_length, run_segments

BACKENDS = ("torch", "fla")


class Tokens(NamedTuple):
    """What a recurrence reads of every token, in one dtype, with as many query and key as value heads.

    Attributes:
        q: (batch, time, heads, K).
        k: (batch, time, heads, K).
        v: (batch, time, heads, V).
        beta: (batch, time, heads, 1), or None.
        log_decay: (batch, time, heads, 1 or K), or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    log_decay: Tensor | None

    def as_rows(self) -> "Tokens":
        """Turn one row of many tokens into as many rows of one token."""
        beta, log_decay = (None if gate is None else gate.transpose(0, 1) for gate in (self.beta, self.log_decay))
        return Tokens(self.q.transpose(0, 1), self.k.transpose(0, 1), self.v.transpose(0, 1), beta, log_decay)


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
    errors: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence on checked arguments; those of ``delta_rule``, ``beta`` None for ``linear_recurrence``.

    ``errors`` collects those of a delta rule, (batch, time, value heads, V) without a gradient; not for backend "fla".
    """
    batch, time, heads = v.shape[:3]
    dtype = working_dtype(*(t for t in (q, k, v, beta, log_decay, state) if t is not None))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    by_fla = choose_fla(backend, q, v)
    if lengths is not None:  # a token that does not exist writes nothing and lets nothing decay
        q, k, v = blank_behind(lengths, q, k, v)
        beta = None if beta is None else blank_behind(lengths, beta)[0]
        log_decay = None if log_decay is None else blank_behind(lengths, log_decay)[0]
    if (groups := heads // q.shape[2]) > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    if state is None:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        state = q.new_zeros(rows, heads, q.shape[-1], v.shape[-1])
    state = state.to(dtype)
    if by_fla:
        y, state = _run_fla(q, k, v, beta, log_decay, state, scale, cu_seqlens)
    else:
        with no_autocast(q.device):
            tokens = Tokens(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                None if beta is None else beta.to(dtype)[..., None],
                None if log_decay is None else log_decay.to(dtype).view(batch, time, heads, -1),
            )
            if cu_seqlens is not None:
                ends = check_borders(cu_seqlens, time)
                y, state = run_segments(
                    lambda grid, own: _run_grid(grid, tokens, own, scale, errors),
                    lambda own: _step(tokens.as_rows(), own, scale, errors),
                    state,
                    [b - a for a, b in pairwise(ends)],
                    heads=heads,
                    chunk_size=chunk_size,
                )
            elif time == 1 and not torch.is_grad_enabled():
                y, state = _step(tokens, state, scale, errors)
            else:
                grid = SegmentGrid.of_rows(batch, time, chunk_length(chunk_size, time), q.device)
                y, state = _run_grid(grid, tokens, state, scale, errors)
    if lengths is not None:
        y = blank_behind(lengths, y)[0]
    if errors is not None:
        errors[:] = blank_behind(lengths, *(error.reshape(v.shape) for error in errors))
    return y.to(v.dtype), state


def _run_grid(
    grid: SegmentGrid, tokens: Tokens, state: Tensor, scale: float, errors: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    q, k, v, beta, log_decay = tokens
    gates = (None if gate is None else grid.blank(grid.cut(gate)) for gate in (beta, log_decay))
    y, state, *error = RecurrenceScan.apply(
        grid.active,
        scale,
        takes_gradients(*tokens, state),
        errors is not None,
        grid.cut(q),
        grid.blank(grid.cut(k)),
        grid.cut(v),
        *gates,
        state,
    )
    if errors is not None:
        errors.append(grid.join(*error, *q.shape[:2]))
    return grid.join(y, *q.shape[:2]), state


def _step(tokens: Tokens, state: Tensor, scale: float, errors: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """The recurrence itself, for one token a row and no gradients: a caller's autocast would round them."""
    q, k, v = (t.transpose(1, 2) for t in tokens[:3])  # (rows, heads, 1, ...)
    if tokens.log_decay is not None:
        state = state * tokens.log_decay[:, 0, :, :, None].exp()
    if tokens.beta is not None:
        error = v - k @ state
        v = tokens.beta.transpose(1, 2) * error
        if errors is not None:
            errors.append(error.transpose(1, 2))
    state = state + k.mT * v
    return (scale * q @ state).transpose(1, 2), state


def _run_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run fla's kernels, on segments that hold a token."""
    if cu_seqlens is None:
        return recur_by_fla(q, k, v, beta, log_decay, state, scale, None)
    held = cu_seqlens.diff().nonzero().squeeze(1)
    ends = torch.cat((cu_seqlens[:1], cu_seqlens[1:][held]))
    index = held.to(state.device)
    y, own = recur_by_fla(q, k, v, beta, log_decay, state.index_select(0, index), scale, ends)
    return y, state.index_copy(0, index, own)


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
    if q.dim() != 4 or not all(q.shape):
        raise ValueError(
            f"q has shape {tuple(q.shape)}; it must be (batch, time, heads, key width), time >= 1 and no axis empty"
        )
    batch, time, heads, width = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must match q, {tuple(q.shape)}")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % heads or not all(v.shape):
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
    check_ragged("q", q, lengths, cu_seqlens)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    expected = (rows, v.shape[2], width, v.shape[3])
    if state is not None and (state.shape != expected or not state.is_floating_point()):
        raise ValueError(
            f"state has shape {tuple(state.shape)} and dtype {state.dtype}; it must be floating point, (rows, value "
            f"heads, key width, value width) = {expected}: pass what the previous call returned, or None"
        )
