"""The scan over chunks behind ``linear_recurrence`` and ``delta_rule``: a matrix memory, written and read in parallel.

Inside a chunk, with b the running sum of the log decays, the memory after step i is

    S_i = exp(b_i) S_0 + sum_{j<=i} exp(b_i - b_j) k_j^T u_j,

so with the decayed products of ``chunk_decay``

    Y   = scores(Q, K) U + from_start(Q) S_0
    S_C = through S_0 + to_end(K)^T U

Linear attention writes U = V. A delta rule writes U = beta E, with the errors E of what was recalled before each write.
They depend on one another, by a unit triangular system (the UT transform, arXiv 2406.06484):

    (1 + A beta) E = V - from_start(K) S_0,    A = scores(K, K), strictly below the diagonal.

Its inverse is formed for all chunks at once, before any memory is known. What is left to do chunk after chunk is two
products for the errors and one for the memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.layers.ops.chunk_decay import ChunkDecay
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.segment_grid import slices
from memzoo.layers.ops.unit_triangular import inverse_of_unit_lower


class RecurrenceScan(torch.autograd.Function):
    """``y, state = RecurrenceScan.apply(active, q, k, v, beta, log_decay, state)``, all chunks of all sequences.

    Kept for the backward pass are the inputs, the memory at the start of every chunk, the errors and the inverses of
    the triangular systems; all products of queries and keys are formed again. The backward pass is written out: the
    forward one transposed and in reverse, with one more simplification. The gradient of the triangular system is that
    of its right-hand side times the errors, so the system is never differentiated as a solve.

    Shape:
        q, k: (chunks, heads, size, K). v, y: (chunks, heads, size, V). beta: (chunks, heads, size, 1), or None for
        linear attention. log_decay: (chunks, heads, size, 1 or K), or None. state: (sequences, heads, K, V), in the
        order of a ``SegmentGrid``, whose ``active`` it is. Slots without a token have k = 0, beta = 0, log_decay = 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        active: tuple[int, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        log_decay: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        decay = ChunkDecay.of(log_decay)
        if beta is None:
            kept, inverse = v, None
            written = v
            starts, final = _accumulate(active, decay.through, decay.to_end(k).mT @ v, state)
        else:
            inverse = inverse_of_unit_lower(decay.scores(k, k).mul_(beta.mT))
            write, read = decay.to_end(k) * beta, decay.from_start(k)
            starts, final, kept = _correct(active, decay.through, inverse, v, write, read, state)
            written = beta * kept
        y = decay.scores(q, k) @ written
        y += decay.from_start(q) @ starts
        ctx.active = active
        ctx.save_for_backward(q, k, kept, beta, log_decay, starts, inverse)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(d_y.device):  # the caller's may be on
            return (None, *_backward(ctx, d_y.contiguous(), d_final))


def _accumulate(active: tuple[int, ...], through: Tensor | None, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan S <- through S + added; return every S before its chunk, and those after the last one."""
    starts, carried = torch.empty_like(added), state.clone()
    for chunk in slices(active):
        memory = carried[: chunk.stop - chunk.start]
        starts[chunk].copy_(memory)
        if through is not None:
            memory.mul_(through[chunk])
        memory.add_(added[chunk])
    return starts, carried


def _correct(
    active: tuple[int, ...],
    through: Tensor | None,
    inverse: Tensor,
    v: Tensor,
    write: Tensor,
    read: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan E = inverse (v - read S), S <- through S + write^T E.

    Returns:
        Every S before its chunk, those after the last one, and E.
    """
    starts, carried = state.new_empty(len(v), *state.shape[1:]), state.clone()
    error = torch.empty_like(v)
    for chunk in slices(active):
        memory = carried[: chunk.stop - chunk.start]
        starts[chunk].copy_(memory)
        flat, own = memory.flatten(0, 1), error[chunk].flatten(0, 1)
        rest = torch.baddbmm(v[chunk].flatten(0, 1), read[chunk].flatten(0, 1), flat, alpha=-1)
        torch.bmm(inverse[chunk].flatten(0, 1), rest, out=own)
        if through is not None:
            memory.mul_(through[chunk])
        flat.baddbmm_(write[chunk].flatten(0, 1).mT, own)
    return starts, carried, error


def _backward(ctx: Any, d_y: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, beta, log_decay and state."""
    q, k, kept, beta, log_decay, starts, inverse = ctx.saved_tensors
    decay = ChunkDecay.of(log_decay)
    written = kept if beta is None else beta * kept
    write = decay.to_end(k)
    d_written = decay.scores(q, k).mT @ d_y
    d_starts = decay.from_start(q).mT @ d_y

    # The scan, last chunk first. d_after: of the memory after each; d_rest: of the triangular system's right side.
    d_after, d_state, d_rest = torch.empty_like(starts), d_final.clone(), None
    if beta is not None:
        d_rest = torch.empty_like(d_written)
        read = decay.from_start(k)
    for chunk in reversed(slices(ctx.active)):
        after, before, d_memory = d_after[chunk], d_starts[chunk], d_state[: chunk.stop - chunk.start]
        after.copy_(d_memory)
        if d_rest is not None:
            d_write = d_written[chunk].flatten(0, 1).baddbmm_(write[chunk].flatten(0, 1), after.flatten(0, 1))
            own = d_rest[chunk].flatten(0, 1)
            torch.bmm(inverse[chunk].flatten(0, 1).mT, d_write * beta[chunk].flatten(0, 1), out=own)
            before.flatten(0, 1).baddbmm_(read[chunk].flatten(0, 1).mT, own, alpha=-1)
        if decay.through is None:
            torch.add(before, after, out=d_memory)
        else:
            torch.addcmul(before, decay.through[chunk], after, out=d_memory)
    if d_rest is None:
        d_written += write @ d_after

    # What reads the memory, and what writes into it: for the decays they are kept apart.
    d_q, d_writer = decay.scores_backward((d_y @ written.mT).tril_(), q, k)
    d_q += decay.from_start_(d_y @ starts.mT)
    d_end = decay.to_end_(written @ d_after.mT)
    d_writer += d_end
    if d_rest is None:
        d_reader, d_beta = None, None
    else:
        d_system = (d_rest @ kept.mT).neg_().tril_(-1)
        d_beta = (d_written * kept).sum(-1, keepdim=True)
        d_beta += decay.scores(k, k).mul_(d_system).sum(-2)[..., None]
        d_reader, d_more = decay.scores_backward(d_system.mul_(beta.mT), k, k)
        d_reader -= decay.from_start_(d_rest @ starts.mT)
        d_writer += d_more
    d_decay = None
    if log_decay is not None:
        assert decay.through is not None
        held = decay.through * d_after.mul_(starts).sum(-1, keepdim=True)
        d_decay = _decay_gradient(q, k, d_q, d_reader, d_writer, d_end, held.mT, log_decay)
    d_k = d_writer if d_reader is None else d_writer.add_(d_reader)
    return d_q, d_k, d_written if d_rest is None else d_rest, d_beta, d_decay, d_state


def _decay_gradient(
    q: Tensor,
    k: Tensor,
    d_q: Tensor,
    d_reader: Tensor | None,
    d_writer: Tensor,
    d_end: Tensor,
    held: Tensor,
    log_decay: Tensor,
) -> Tensor:
    """Return the gradient of log_decay from that of the running sum b: readers add, writers take away.

    ``held`` and ``d_end``, which is overwritten, are what b_C gets from the memory that the chunk hands on: its old
    part and its new writes.
    """
    d_sum = (q * d_q).addcmul_(k, d_writer, value=-1)
    if d_reader is not None:
        d_sum.addcmul_(k, d_reader)
    d_sum[..., -1:, :] += held + d_end.mul_(k).sum(-2, keepdim=True)
    if log_decay.shape[-1] == 1:
        d_sum = d_sum.sum(-1, keepdim=True)
    return d_sum.flip(-2).cumsum(-2).flip(-2)
