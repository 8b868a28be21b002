"""The scan behind ``selective_scan``: a state with a decay of every channel and state dimension, a block at a time.

Sequences are cut into chunks, as a ``SegmentGrid`` has them. A block is what is computed at once: some channels of some
chunks, as many as fit a core's cache. With the states of a block before and after its tokens known, blocks of one
sequence follow one another; all chunks of a block take their steps side by side:

    a_t = exp(dt_t A),   h_t = a_t h_{t-1} + dt_t x_t B_t

A block of several chunks of one sequence does so from zero, then carries the states from chunk to chunk, and adds what
each chunk inherits (two levels). No exponent is positive, so nothing overflows, whatever A and dt.

States lie with the channel last, (N, channels): the innermost axis is long, and dt, x and y meet them uncopied.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.segment_grid import slices

BLOCK = {"cpu": 2**18}
"""Numbers of a block's states that are computed at a time, by device."""

LARGE_BLOCK = 2**24
LOG_2 = math.log(2)


class SelectiveScan(torch.autograd.Function):
    """``y, state = SelectiveScan.apply(active, trains, x, dt, rate, B, C, state)``, for all chunks.

    Kept for the backward pass, if one ``trains``, are the inputs and the state before every chunk; the states inside
    are computed again. ``rate`` is A / log(2), transposed: powers of two are computed faster than those of e.

    Shape:
        x, dt, y: (chunks, size, channels). rate: (N, channels). B, C: (chunks, size, N). state: (sequences, N,
        channels), in the order of a ``SegmentGrid``, whose ``active`` it is. Slots without a token have dt = 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        active: tuple[int, ...],
        trains: bool,
        x: Tensor,
        dt: Tensor,
        rate: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        memory, y = state.clone(memory_format=torch.contiguous_format), torch.empty_like(x)
        starts = x.new_empty(len(x), *rate.shape) if trains else None
        for block in _blocks(active, x, rate):
            decay, h = block.scratch(x, rate, 2)
            _decays_and_writes(block, x, dt, rate, B, decay, h)
            begin = _scan(block, decay, h, memory)
            read = torch.bmm(block.of(C).flatten(0, 1)[:, None], h.flatten(0, 1)).view(h.shape[0], h.shape[1], -1)
            y[block.chunks, :, block.channels] = read.transpose(0, 1)
            if starts is not None:
                starts[block.chunks, :, block.channels] = begin
        ctx.active = active
        ctx.save_for_backward(x, dt, rate, B, C, starts)
        return y, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, rate, B, C, starts = ctx.saved_tensors
        d_x, d_dt, d_rate, d_B, d_C = torch.empty_like(x), torch.empty_like(dt), *map(torch.zeros_like, (rate, B, C))
        d_memory = d_final.clone(memory_format=torch.contiguous_format)
        with no_autocast(d_y.device):  # the caller's may be on
            for block in reversed(list(_blocks(ctx.active, x, rate))):
                here, own = block.chunks, block.channels
                decay, h, d_h, product = block.scratch(x, rate, 4)
                start, inputs, steps = starts[here, :, own], block.of_channels(x), block.of_channels(dt)
                writes = _decays_and_writes(block, x, dt, rate, B, decay, h)
                _run(decay, h, start)
                slope = block.of_channels(d_y)
                torch.mul(slope[:, :, None], block.of(C)[..., None], out=d_h)
                torch.mul(h, slope[:, :, None], out=product)
                d_C[here] += product.sum(-1).transpose(0, 1)
                _scan_back(block, decay, d_h, d_memory, product)
                torch.mul(d_h, writes[:, :, None], out=product)
                d_B[here] += product.sum(-1).transpose(0, 1)
                d_writes = torch.bmm(block.of(B).flatten(0, 1)[:, None], d_h.flatten(0, 1)).view_as(writes)
                # Of the exponents dt A / log 2: a_t h_{t-1} d_h, times log 2.
                d_h.mul_(decay)
                d_h[0].mul_(start)
                d_h[1:].mul_(h[:-1])
                d_steps = torch.mul(d_h, rate[:, own], out=product).sum(-2).mul_(LOG_2).addcmul_(inputs, d_writes)
                d_rate[:, own] += torch.mul(d_h, steps[:, :, None], out=product).sum((0, 1)).mul_(LOG_2)
                d_x[here, :, own] = (steps * d_writes).transpose(0, 1)
                d_dt[here, :, own] = d_steps.transpose(0, 1)
        return None, None, d_x, d_dt, d_rate, d_B, d_C, d_memory


@dataclass(frozen=True)
class _Block:
    """What is computed at once.

    Attributes:
        sequences: Those that have these chunks, consecutive in the grid's order.
        chunks: All of them.
        steps: The chunks of each step of the scan over chunks, counted from the first of the block.
        channels: Some of the channels.
    """

    sequences: slice
    chunks: slice
    steps: list[slice]
    channels: slice

    def of(self, x: Tensor) -> Tensor:
        """(chunks, size, ...) -> (size, chunks of the block, ...)."""
        return x[self.chunks].transpose(0, 1)

    def of_channels(self, x: Tensor) -> Tensor:
        """(chunks, size, channels) -> (size, chunks of the block, its channels)."""
        return x[self.chunks, :, self.channels].transpose(0, 1)

    def scratch(self, x: Tensor, rate: Tensor, count: int) -> list[Tensor]:
        """Return so many empty (size, chunks of the block, N, its channels)."""
        shape = (x.shape[1], self.chunks.stop - self.chunks.start, len(rate), self.channels.stop - self.channels.start)
        return list(x.new_empty(count, *shape))


def _blocks(active: tuple[int, ...], x: Tensor, rate: Tensor) -> Iterator[_Block]:
    """Cut the scan into blocks; those of the same sequences and channels come one behind the other in time."""
    _, size, width = x.shape
    most = BLOCK.get(x.device.type, LARGE_BLOCK) // (size * len(rate))
    if torch.compiler.is_compiling():
        most = len(x) * width
    channels = min(width, max(most, 1))
    rows = max(most // channels, 1)
    per_block = 1 if rows < active[0] else rows // active[0]  # steps
    for first_channel in range(0, width, channels):
        own = slice(first_channel, min(first_channel + channels, width))
        for first in range(0, active[0], rows):
            steps = slices(active)
            for j in range(0, len(steps), per_block):
                taken = steps[j : j + per_block]
                begin = taken[0].start + first
                end = min(taken[-1].start + first + rows, taken[-1].stop)
                if begin >= end:
                    break  # shorter sequences have ended
                inside = [
                    slice(step.start + first - begin, min(step.stop, step.start + first + rows) - begin)
                    for step in taken
                ]
                sequences = slice(first, first + inside[0].stop)
                yield _Block(sequences, slice(begin, end), inside, own)


def _decays_and_writes(
    block: _Block, x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, decay: Tensor, h: Tensor
) -> Tensor:
    """Fill ``decay`` with a and ``h`` with what every token writes; return dt x, (size, chunks, channels)."""
    steps = block.of_channels(dt)
    torch.mul(steps[:, :, None], rate[:, block.channels], out=decay)
    decay.exp2_()
    writes = steps * block.of_channels(x)
    torch.mul(writes[:, :, None], block.of(B)[..., None], out=h)
    return writes


def _run(decay: Tensor, h: Tensor, start: Tensor) -> None:
    """Turn writes into states, step by step, each chunk from its own start."""
    states, decays = h.unbind(0), decay.unbind(0)
    states[0].addcmul_(decays[0], start)
    for before, own, kept in zip(states[:-1], states[1:], decays[1:], strict=True):
        own.addcmul_(kept, before)


def _scan(block: _Block, decay: Tensor, h: Tensor, memory: Tensor) -> Tensor:
    """Turn writes into states, from ``memory``, which is carried on; return the state before each chunk.

    With several steps ``decay`` becomes its running product.
    """
    own = memory[block.sequences, :, block.channels]
    if len(block.steps) == 1:
        start = own.clone()
        _run(decay, h, start)
        own.copy_(h[-1])
        return start
    states, decays = h.unbind(0), decay.unbind(0)
    for s in range(1, len(states)):
        states[s].addcmul_(decays[s], states[s - 1])
        decays[s].mul_(decays[s - 1])
    start = torch.empty_like(states[0])
    for step in block.steps:
        begin = own[: step.stop - step.start]
        start[step] = begin
        begin.mul_(decays[-1][step]).add_(states[-1][step])
    h.addcmul_(decay, start)
    return start


def _scan_back(block: _Block, decay: Tensor, d_h: Tensor, d_memory: Tensor, product: Tensor) -> None:
    """Turn gradients of what is read into those of states; ``d_memory`` goes from behind the block to before it."""
    own = d_memory[block.sequences, :, block.channels]
    slopes, decays, last = d_h.unbind(0), decay.unbind(0), len(d_h) - 1
    if len(block.steps) == 1:
        slopes[last].add_(own)
    for s in range(last, 0, -1):
        slopes[s - 1].addcmul_(decays[s], slopes[s])
    if len(block.steps) == 1:
        torch.mul(decays[0], slopes[0], out=own)
        return
    kept = product.unbind(0)  # of what every state is when its chunk ends
    kept[last].fill_(1)
    for s in range(last, 0, -1):
        torch.mul(decays[s], kept[s], out=kept[s - 1])
    d_end = torch.empty_like(slopes[0])
    for step in reversed(block.steps):
        end = own[: step.stop - step.start]
        d_end[step] = end
        end.mul_(kept[0][step]).add_(slopes[0][step]).mul_(decays[0][step])
    d_h.addcmul_(product, d_end)
