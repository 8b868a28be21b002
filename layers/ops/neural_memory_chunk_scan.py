"""Chunks of a neural memory one after another, with the backward pass through all of them.

One function of all chunks, because autograd, given one function a chunk, would gather every gradient from pieces and
fill with zeros what the pieces do not cover.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.layers.ops.neural_memory_chunk import (
    ChunkInputs,
    ChunkSettings,
    ChunkWork,
    Tensors,
    base_weights,
    chunk_backward,
    chunk_forward,
)
from memzoo.layers.ops.precision import no_autocast

NUM_INPUTS = len(fields(ChunkInputs))


class ChunkScan(torch.autograd.Function):
    """``y, norm, *carry, *base = ChunkScan.apply(settings, reached, *inputs, *states)``.

    Returns the reads (n, R, C, d_L), the norm of each token's error ``M(W_b; k) - v`` (n, R, C), through which no
    gradient flows, the carry after the last chunk, and, if there is more than one chunk, each row's last gradient
    base: the weights at the start of the last chunk it has a token in.

    Args:
        settings: Of the chunks; a base given apart is that of the first.
        reached: (n, R, 1, 1) bool, rows that have a token in each chunk; None if all do.
        inputs: The fields of ``ChunkInputs``, with the n chunks as first axis.
        states: The carried blocks, layer by layer, then the base and the anchor if there are; (R, d_in, d_out) each.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, reached: Tensor | None, *tensors: Tensor) -> Tensors:
        stacked, states = ChunkInputs(*tensors[:NUM_INPUTS]), tensors[NUM_INPUTS:]
        carry, own_base, anchor = settings.split(states)
        base = base_weights(carry[0], own_base, anchor)
        y = torch.empty_like(stacked.v)
        norms: list[Tensor] = []
        kept: list[Tensor] = []
        lengths: list[int] = []
        now, new = settings, list(states)
        for j in range(len(y)):
            if j:
                now, states = replace(settings, has_base=False), (*new, *anchor)
                start = base_weights(tuple(new[: settings.depth]), (), anchor)
                base = start if reached is None else where(reached[j], start, base)
            new, work = chunk_forward(now, _chunk(stacked, j), states, y[j])
            error = work.d[-1] / work.clip[0] if work.clip else work.d[-1]
            norms.append(torch.linalg.vector_norm(error, dim=-1))
            if settings.keeps_work:
                lengths, packed = work.pack()
                kept += [*new, *packed]
        norm = torch.stack(norms) / settings.loss_scale
        ctx.save_for_backward(reached, *tensors, *kept)
        ctx.settings, ctx.lengths, ctx.num_given = settings, lengths, len(tensors)
        ctx.mark_non_differentiable(norm)
        return (y, norm, *new, *(base if len(y) > 1 else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        settings: ChunkSettings = ctx.settings
        reached, *saved = ctx.saved_tensors
        tensors, kept = tuple(saved[: ctx.num_given]), saved[ctx.num_given :]
        stacked, states = ChunkInputs(*tensors[:NUM_INPUTS]), tensors[NUM_INPUTS:]
        anchor = settings.split(states)[2]
        depth, carried = settings.depth, settings.depth * settings.blocks
        stride = carried + sum(ctx.lengths)
        d_y, d_new, d_base = outer[0].contiguous(), list(outer[2 : 2 + carried]), list(outer[2 + carried :])
        d_anchor = [torch.zeros_like(m) for m in anchor]
        grads = ChunkInputs(*(torch.empty_like(t) for t in tensors[:NUM_INPUTS]))
        d_own_base: list[Tensor] = []
        with no_autocast(d_y.device):  # the caller's may be on
            for j in reversed(range(len(d_y))):
                here = kept[j * stride : (j + 1) * stride]
                work = ChunkWork.unpack(ctx.lengths, here[carried:])
                if j:
                    now, starts = (
                        replace(settings, has_base=False),
                        (*kept[(j - 1) * stride : (j - 1) * stride + carried], *anchor),
                    )
                else:
                    now, starts = settings, states
                d_states = chunk_backward(now, _chunk(stacked, j), starts, work, d_y[j], d_new, _chunk(grads, j))
                d_new = d_states[:carried]
                if now.has_base:
                    d_own_base = d_states[carried : carried + depth]
                _add(d_anchor, d_states[len(d_states) - len(anchor) :])
                if not d_base:
                    continue
                # Rows whose last chunk this is have their base at its start.
                ours = d_base
                if j and reached is not None:
                    ours, d_base = (
                        [torch.where(reached[j], g, 0) for g in d_base],
                        [torch.where(reached[j], 0, g) for g in d_base],
                    )
                elif j:
                    d_base = []
                _add(d_own_base if now.has_base else d_new[:depth], ours)
                if not now.has_base:
                    _add(d_anchor, ours)
        inputs = (getattr(grads, f.name) for f in fields(grads))
        return (None, None, *inputs, *d_new, *d_own_base, *d_anchor)


def where(condition: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    """Choose row by row in every tensor."""
    return tuple(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True))


def _chunk(stacked: ChunkInputs, j: int) -> ChunkInputs:
    return ChunkInputs(*(getattr(stacked, f.name)[j] for f in fields(stacked)))


def _add(to: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    for total, part in zip(to, parts, strict=False):
        total += part
