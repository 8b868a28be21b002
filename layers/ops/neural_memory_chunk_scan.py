"""Chunks of a neural memory one after another, with the backward pass through all of them.

One function of all chunks, because autograd, given one function a chunk, would gather every gradient from pieces and
fill with zeros what the pieces do not cover.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.neural_memory_chunk import (
    ChunkInputs,
    ChunkSettings,
    ChunkStates,
    ChunkWork,
    Tensors,
    chunk_backward,
    chunk_forward,
)
from memzoo.layers.ops.once_differentiable import once_differentiable
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
        states: What the first chunk starts from, as ``ChunkSettings.split`` parts it.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, reached: Tensor | None, *tensors: Tensor) -> Tensors:
        stacked = ChunkInputs(*tensors[:NUM_INPUTS])
        states = settings.split(tensors[NUM_INPUTS:])
        base, count = states.weights, settings.depth * settings.blocks
        y = stacked.v.new_empty(*stacked.q.shape[:-1], stacked.v.shape[-1])
        errors: list[Tensor] = []
        new: list[Tensor] = []
        kept: list[Tensor] = []
        lengths: list[int] = []
        for j, (inputs, y_j) in enumerate(zip(_chunks(stacked), y.unbind(), strict=True)):
            if j:
                states = _next(settings, states, new)
                base = states.weights if reached is None else where(reached[j], states.weights, base)
            new, error, work = chunk_forward(settings, inputs, states, y_j)
            errors.append(error)
            if settings.keeps_work:
                lengths, packed = work.pack()
                kept += [*new, *packed]
        error = torch.stack(errors)
        ctx.save_for_backward(reached, *tensors, *kept)
        ctx.settings, ctx.num_given, ctx.strides = settings, len(tensors), (count, count + sum(lengths))
        ctx.lengths = lengths
        ctx.mark_non_differentiable(error)
        return (y, error, *new, *(base if len(y) > 1 else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        settings: ChunkSettings = ctx.settings
        count, stride = ctx.strides
        reached, *saved = ctx.saved_tensors
        tensors = tuple(saved[: ctx.num_given])
        kept = [saved[i : i + stride] for i in range(ctx.num_given, len(saved), stride)]  # a list a chunk
        stacked, first = ChunkInputs(*tensors[:NUM_INPUTS]), settings.split(tensors[NUM_INPUTS:])
        grads = ChunkInputs(*(torch.empty_like(t) for t in tensors[:NUM_INPUTS]))
        d_y, d_new, d_base = outer[0].contiguous().unbind(), list(outer[2 : 2 + count]), list(outer[2 + count :])
        inputs, d_inputs = _chunks(stacked), _chunks(grads)
        d_shared = [torch.zeros_like(t) for t in (*first.anchor, *first.norm)]
        d_own_base: list[Tensor] = []
        with no_autocast(outer[0].device):  # the caller's may be on
            for j in reversed(range(len(d_y))):
                states = _next(settings, first, kept[j - 1][:count]) if j else first
                work = ChunkWork.unpack(ctx.lengths, tuple(kept[j][count:]))
                d_states = chunk_backward(settings, inputs[j], states, work, d_y[j], d_new, d_inputs[j])
                d_new, d_rest = d_states[:count], d_states[count:]
                d_own_base, d_rest = d_rest[: len(states.base)], d_rest[len(states.base) :]
                _add(d_shared, d_rest)
                # Rows whose last chunk this is have their gradient base at its start; so do all at the first.
                if not d_base:
                    continue
                ours, d_base = _part(d_base, reached, j)
                _add(d_own_base or d_new[: settings.depth], ours)
                if not d_own_base and first.anchor:
                    _add(d_shared[: settings.depth], ours)
        d_tensors = (getattr(grads, f.name) for f in fields(grads))
        return (None, None, *d_tensors, *d_new, *d_own_base, *d_shared)


def _next(settings: ChunkSettings, states: ChunkStates, new: list[Tensor]) -> ChunkStates:
    """Return what the chunk after one that carries ``new`` starts from."""
    carry = [tuple(new[i : i + settings.depth]) for i in range(0, len(new), settings.depth)]
    return ChunkStates.at(carry, (), states.anchor, states.norm)


def _part(d_base: list[Tensor], reached: Tensor | None, j: int) -> tuple[list[Tensor], list[Tensor]]:
    """Part gradients of the last bases into those of rows that reach chunk ``j`` and those left to earlier chunks."""
    if reached is None or j == 0:
        return d_base, []
    return [torch.where(reached[j], g, 0) for g in d_base], [torch.where(reached[j], 0, g) for g in d_base]


def where(condition: Tensor, yes: Tensors, no: Tensors) -> Tensors:
    """Choose row by row in every tensor."""
    return tuple(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True))


def _chunks(stacked: ChunkInputs) -> list[ChunkInputs]:
    """View the inputs of every chunk."""
    parts = zip(*(getattr(stacked, f.name).unbind() for f in fields(stacked)), strict=True)
    return [ChunkInputs(*part) for part in parts]


def _add(totals: list[Tensor], parts: list[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part
