"""The scan over chunks behind ``linear_recurrence`` and ``delta_rule``: a matrix memory, written and read in parallel.

Inside a chunk, with b the running sum of the log decays, the memory after step i is

    S_i = exp(b_i) S_0 + sum_{j<=i} exp(b_i - b_j) k_j^T u_j,

so with the decayed products of ``chunk_decay``

    Y   = scores(Q, K) U + from_start(Q) S_0
    S_C = through S_0 + to_end(K)^T U

Linear attention writes U = V. A delta rule writes U = beta E, with the errors E of what was recalled before each write.
They depend on one another, by a unit triangular system (the UT transform, arXiv 2406.06484):

    (1 + A beta) E = V - from_start(K) S_0,    A = scores(K, K), strictly below the diagonal.

Its inverse is formed before any memory is known. What is left to do chunk after chunk is two products for the errors
and one for the memory. All else is done for a stretch of chunks at once: on the CPU as many as fit its cache, so that
what a stretch needs for itself is never written to memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.chunk_decay import ChunkDecay
from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.segment_grid import slices
from memzoo.layers.ops.unit_triangular import inverse_of_unit_lower

STRETCH = 2**17
"""Numbers of a tensor that are computed at a time on the CPU, 512 KiB of float32."""


class RecurrenceScan(torch.autograd.Function):
    """``y, state = RecurrenceScan.apply(active, scale, trains, wants_errors, q, k, v, beta, log_decay, state)``.

    For all chunks. A delta rule that ``wants_errors`` returns them too, a third tensor that takes no gradient.

    Kept for the backward pass, if one ``trains``, are the inputs, the memory at the start of every chunk, the errors
    and the inverses of the triangular systems; all products of queries and keys are formed again. The backward pass is
    written out: the forward one transposed and in reverse, with one more simplification. The gradient of the triangular
    system is that of its right-hand side times the errors, so the system is never differentiated as a solve.

    Shape:
        q, k: (chunks, heads, size, K). v, y, errors: (chunks, heads, size, V). beta: (chunks, heads, size, 1), or None
        for linear attention. log_decay: (chunks, heads, size, 1 or K), or None. state: (sequences, heads, K, V), in the
        order of a ``SegmentGrid``, whose ``active`` it is. Slots without a token have k = 0, beta = 0, log_decay = 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        active: tuple[int, ...],
        scale: float,
        trains: bool,
        wants_errors: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor, ...]:
        memory = state.clone(memory_format=torch.contiguous_format)
        stretches = _stretches(active, k)
        room = len(q) if trains else max(stretch.chunks.stop - stretch.chunks.start for stretch in stretches)
        starts = state.new_empty(room, *state.shape[1:])
        y = torch.empty_like(v)
        inverse = None if beta is None else k.new_empty(room, *k.shape[1:-1], k.shape[-2])
        kept = v if beta is None else v.new_empty(len(v) if wants_errors else room, *v.shape[1:])
        for stretch in stretches:
            here = stretch.chunks
            there = here if trains else slice(0, here.stop - here.start)
            decay = ChunkDecay.of(None if log_decay is None else log_decay[here])
            if beta is None or inverse is None:
                written = v[here]
                _accumulate(stretch, decay, k[here], written, memory, starts[there])
            else:
                inverse[there] = inverse_of_unit_lower(decay.scores(k[here], k[here]).mul_(beta[here].mT))
                error = kept[here if wants_errors else there]
                _correct(stretch, decay, k[here], v[here], beta[here], inverse[there], memory, starts[there], error)
                written = beta[here] * error
            inside = decay.scores(q[here], k[here]) @ written
            inside += decay.from_start(q[here]) @ starts[there]
            torch.mul(inside, scale, out=y[here])
        ctx.active, ctx.scale = active, scale
        ctx.save_for_backward(q, k, kept, beta, log_decay, starts, inverse)
        if not wants_errors:
            return y, memory
        ctx.mark_non_differentiable(kept)
        return y, memory, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_final: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, kept, beta, log_decay, starts, inverse = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(kept)
        d_beta = None if beta is None else torch.empty_like(beta)
        d_decay = torch.empty_like(log_decay) if ctx.needs_input_grad[8] else None
        d_memory = d_final.clone(memory_format=torch.contiguous_format)
        with no_autocast(d_y.device):  # the caller's may be on
            for stretch in reversed(_stretches(ctx.active, k)):
                here = stretch.chunks
                _backward(
                    stretch,
                    q[here],
                    k[here],
                    kept[here],
                    None if beta is None else beta[here],
                    None if log_decay is None else log_decay[here],
                    None if inverse is None else inverse[here],
                    starts[here],
                    d_y[here] * ctx.scale,
                    d_memory,
                    d_q[here],
                    d_k[here],
                    d_v[here],
                    None if d_beta is None else d_beta[here],
                    None if d_decay is None else d_decay[here],
                )
        return None, None, None, None, d_q, d_k, d_v, d_beta, d_decay, d_memory


@dataclass(frozen=True)
class _Stretch:
    """Steps of a scan that follow one another.

    Attributes:
        chunks: All of their chunks.
        steps: The chunks of each, counted from the first of the stretch.
    """

    chunks: slice
    steps: list[slice]

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """(chunks of the stretch, heads, ...) -> the (chunks of a step * heads, ...) of every step, views."""
        heads = x.shape[1]
        parts: Sequence[Tensor] = x.flatten(0, 1).split([(step.stop - step.start) * heads for step in self.steps])
        return parts

    def cut_or_not(self, x: Tensor | None) -> Sequence[Tensor | None]:
        """``cut``, or as many None."""
        return [None] * len(self.steps) if x is None else self.cut(x)


def _stretches(active: tuple[int, ...], k: Tensor) -> list[_Stretch]:
    """Cut a scan into stretches, by what (chunks, heads, size, K) keys and scores take on the CPU; elsewhere not."""
    _, heads, size, width = k.shape
    most = STRETCH // (heads * size * max(size, width))
    cut = k.device.type == "cpu" and not torch.compiler.is_compiling()
    found: list[_Stretch] = []
    for step in slices(active):
        last = found[-1] if found else None
        if last is not None and not (cut and step.stop - last.chunks.start > most):
            first = last.chunks.start
            steps = [*last.steps, slice(step.start - first, step.stop - first)]
            found[-1] = _Stretch(slice(first, step.stop), steps)
        else:
            found.append(_Stretch(step, [slice(0, step.stop - step.start)]))
    return found


def _accumulate(stretch: _Stretch, decay: ChunkDecay, k: Tensor, v: Tensor, memory: Tensor, starts: Tensor) -> None:
    """Scan S <- through S + to_end(k)^T v over ``memory``; fill ``starts`` with every S before its chunk."""
    flat, added = memory.flatten(0, 1), decay.to_end(k).mT @ v
    for through, start, new in zip(
        stretch.cut_or_not(decay.through), stretch.cut(starts), stretch.cut(added), strict=True
    ):
        own = flat[: len(start)]
        start.copy_(own)
        if through is not None:
            own.mul_(through)
        own.add_(new)


def _correct(
    stretch: _Stretch,
    decay: ChunkDecay,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    memory: Tensor,
    starts: Tensor,
    error: Tensor,
) -> None:
    """Scan E = inverse (v - from_start(k) S), S <- through S + to_end(k)^T beta E; fill ``starts`` and ``error``."""
    flat, write = memory.flatten(0, 1), (decay.to_end(k) * beta).mT
    steps = [stretch.cut(part) for part in (starts, v, decay.from_start(k), inverse, error, write)]
    for through, start, value, read, solve, own_error, writes in zip(
        stretch.cut_or_not(decay.through), *steps, strict=True
    ):
        own = flat[: len(start)]
        start.copy_(own)
        torch.bmm(solve, torch.baddbmm(value, read, own, alpha=-1), out=own_error)
        if through is not None:
            own.mul_(through)
        own.baddbmm_(writes, own_error)


def _backward(
    stretch: _Stretch,
    q: Tensor,
    k: Tensor,
    kept: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    inverse: Tensor | None,
    starts: Tensor,
    d_y: Tensor,
    d_memory: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_beta: Tensor | None,
    d_decay: Tensor | None,
) -> None:
    """Fill the gradients of q, k, v, beta and log_decay; ``d_memory`` goes from behind the stretch to before it.

    ``kept`` is the values, or of a delta rule the errors.
    """
    decay = ChunkDecay.of(log_decay)
    written = kept if beta is None else beta * kept
    write = decay.to_end(k)
    d_written = decay.scores(q, k).mT @ d_y
    d_starts = decay.from_start(q).mT @ d_y

    # The scan, last chunk first. d_after: of the memory after each; d_rest: of the triangular system's right side.
    d_after, d_rest = torch.empty_like(starts), None
    parts = [decay.through, d_starts, d_after]
    if beta is not None and inverse is not None:
        d_rest = d_v
        parts += [d_written, write, (inverse * beta).mT, d_rest, decay.from_start(k).mT]
    flat, steps = d_memory.flatten(0, 1), zip(*[stretch.cut_or_not(part) for part in parts], strict=True)
    for through, before, after, *rule in reversed(list(steps)):
        own = flat[: len(after)]
        after.copy_(own)
        if rule:
            d_write, writes, solve, rest, read = rule
            torch.bmm(solve, d_write.baddbmm_(writes, after), out=rest)
            before.baddbmm_(read, rest, alpha=-1)
        if through is None:
            torch.add(before, after, out=own)
        else:
            torch.addcmul(before, through, after, out=own)
    if d_rest is None:
        torch.add(d_written, write @ d_after, out=d_v)

    # What reads the memory, and what writes into it: for the decays they are kept apart.
    d_inside, d_writer = decay.scores_backward((d_y @ written.mT).tril_(), q, k)
    torch.add(d_inside, decay.from_start_(d_y @ starts.mT), out=d_q)
    d_end = decay.to_end_(written @ d_after.mT)
    d_writer += d_end
    d_reader = None
    if beta is not None and d_beta is not None and d_rest is not None:
        d_system = (d_rest @ kept.mT).neg_().tril_(-1)
        torch.sum(d_written.mul_(kept), -1, keepdim=True, out=d_beta)
        d_beta += decay.scores(k, k).mul_(d_system).sum(-2)[..., None]
        d_reader, d_more = decay.scores_backward(d_system.mul_(beta.mT), k, k)
        d_reader -= decay.from_start_(d_rest @ starts.mT)
        d_writer += d_more
    if d_decay is not None and decay.through is not None:
        held = decay.through * d_after.mul_(starts).sum(-1, keepdim=True)
        d_decay.copy_(_decay_gradient(q, k, d_q, d_reader, d_writer, d_end, held.mT, d_decay.shape[-1]))
    if d_reader is None:
        d_k.copy_(d_writer)
    else:
        torch.add(d_writer, d_reader, out=d_k)


def _decay_gradient(
    q: Tensor,
    k: Tensor,
    d_q: Tensor,
    d_reader: Tensor | None,
    d_writer: Tensor,
    d_end: Tensor,
    held: Tensor,
    width: int,
) -> Tensor:
    """Return the gradient of log_decay from that of the running sum b: readers add, writers take away.

    ``held`` and ``d_end``, which is overwritten, are what b_C gets from the memory that the chunk hands on: its old
    part and its new writes. ``width``: decays a token, 1 or K.
    """
    d_sum = (q * d_q).addcmul_(k, d_writer, value=-1)
    if d_reader is not None:
        d_sum.addcmul_(k, d_reader)
    d_sum[..., -1:, :] += held + d_end.mul_(k).sum(-2, keepdim=True)
    if width == 1:
        d_sum = d_sum.sum(-1, keepdim=True)
    return d_sum.flip(-2).cumsum(-2).flip(-2)
