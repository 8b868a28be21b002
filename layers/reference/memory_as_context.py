"""Titans' memory as context, one row, segment and token at a time. Slow, and the definition of what is right.

arXiv 2501.00663, section 4.1. With M the memory as segment s finds it, for every segment S, P being learned tokens:

    h = M(q(S))                          retrieved, not written
    y = Attention([P || h || S])         all rows, under a mask
    M is written with y, row by row
    o = W_o gate(y, M(q(y)))             rows of S

Printed, the mask is plainly causal, all rows are written, and M is read once they are. In the causal form a token sees
h and S up to itself, the rows of S alone are written, and each reads M as soon as it is written.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.memory_as_context import MemoryAsContext
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.norm import RMSNorm
from memzoo.layers.reference.neural_memory import Memory, Weights


def memory_as_context(layer: MemoryAsContext, x: Tensor) -> tuple[Tensor, Weights, Weights]:
    """What ``layer`` computes for fresh rows, from its parameters: o (batch, time, dim), and the memory's W and S."""
    outputs, memories = [], []
    for tokens in x:
        memory = _Memory(layer.memory)
        past: list[Tensor] = []  # of the retrieval's convolution
        o: list[Tensor] = []
        for segment in tokens.split(layer.segment_size):
            h = [memory.retrieve(q, x_i) for q, x_i in zip(_asked(layer, segment, past), segment, strict=True)]
            o += _segment(layer, memory, segment, torch.stack(h))
        outputs.append(torch.stack(o))
        memories.append(memory.heads)

    def join(part: Callable[[Memory], Weights]) -> Weights:
        rows = [[torch.stack(w) for w in zip(*map(part, heads), strict=True)] for heads in memories]
        return tuple(torch.stack(w) for w in zip(*rows, strict=True))

    return torch.stack(outputs), join(lambda memory: memory.W), join(lambda memory: memory.S)


def sees(row: tuple[str, int], column: tuple[str, int]) -> bool:
    """Whether, in the causal form, a row of [P || h || S] sees a column; each is named by its part and index in it."""
    (part, i), (seen, j) = row, column
    if seen == "P":
        return True
    return j <= i and (part == "S" or (part == "h" and seen == "h"))


def _segment(layer: MemoryAsContext, memory: "_Memory", tokens: Tensor, h: Tensor) -> list[Tensor]:
    """Attend, write and read; return the outputs of one segment."""
    num_persistent, time = layer.num_persistent_tokens, len(tokens)
    names = (
        [("P", i) for i in range(num_persistent)] + [("h", i) for i in range(time)] + [("S", i) for i in range(time)]
    )
    persistent = [] if layer.persistent_memory is None else [layer.persistent_memory.tokens]
    positions = torch.tensor(
        [i if part == "S" or (part == "h" and layer.retrieved_positions) else 0 for part, i in names]
    )
    if layer.literal:
        mask = torch.tensor([[j <= i for j in range(len(names))] for i in range(len(names))])
    else:
        mask = torch.tensor([[sees(row, column) for column in names] for row in names])
    y = _attention(layer, torch.cat([*persistent, h, tokens]), positions, mask)
    if layer.literal:
        queries = [memory.write(y_i)[1] for y_i in y][-time:]
        y = y[-time:]
        answers = [memory.retrieve(q, y_i) for q, y_i in zip(queries, y, strict=True)]
    else:
        y = y[-time:]
        answers = [memory.write(y_i)[0] for y_i in y]
    return [*layer.out(layer.gate(y[None], torch.stack(answers)[None]))[0]]


def _attention(layer: MemoryAsContext, rows: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of all rows (rows, dim) under a mask (rows, rows), every one at its position."""
    heads, width = layer.num_heads, layer.head_dim
    q = layer.query(rows).view(-1, heads, width)
    k, v = layer.key_value(rows).view(-1, 2, heads, width).unbind(1)
    q, k = _norm(layer.query_norm, q), _norm(layer.key_norm, k)
    if layer.rotary is not None:
        angle = positions[:, None] * layer.rotary.base ** (-2 * torch.arange(width // 2, dtype=rows.dtype) / width)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.cat([(z := torch.complex(*t.chunk(2, -1)) * turn).real, z.imag], -1) for t in (q, k))
    scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    y: Tensor = layer.attention_out(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    return y + rows if layer.residual else y


def _asked(layer: MemoryAsContext, segment: Tensor, past: list[Tensor]) -> list[Tensor]:
    """Return the queries of a segment, each (heads, head_dim)."""
    lmm = layer.memory
    inner = lmm.num_heads * lmm.head_dim
    if layer.retrieval_query is None:
        project, taps = lmm.query_key_value.weight[:inner], None if lmm.conv is None else lmm.conv.weight[:inner]
    else:
        project, taps = layer.retrieval_query.weight, getattr(layer.retrieval_conv, "weight", None)
    return [_unit(_convolve(past, project @ x_i, taps).view(lmm.num_heads, -1)) for x_i in segment]


class _Memory:
    """The neural memories of one row, a head each, and what leads into and out of them."""

    def __init__(self, lmm: NeuralMemory) -> None:
        self.lmm = lmm
        self.past: list[Tensor] = []  # of the convolution of what is written
        self.heads = []
        for head in range(lmm.num_heads):
            W = tuple(w[head] for w in lmm.initial_weights)
            zeros = tuple(torch.zeros_like(w) for w in W)
            anchor = W if lmm.decay_to_init else zeros
            norm = None
            if lmm.norm_gain is not None and lmm.norm_bias is not None:
                norm = lmm.norm_gain[head], lmm.norm_bias[head]
            options = lmm.chunk_size, lmm.activation, lmm.loss_scale, lmm.read, lmm.max_gradient_norm, norm
            self.heads.append(Memory(W, zeros, W, anchor, 0, *options, window=lmm.objective_window))

    def retrieve(self, q: Tensor, x: Tensor) -> Tensor:
        """Read with the queries (heads, head_dim) of the token x, write nothing."""
        return self._output([memory.recall(memory.W, q_h) for memory, q_h in zip(self.heads, q, strict=True)], x)

    def write(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Absorb the token y; return what its queries read, and the queries."""
        lmm = self.lmm
        taps = None if lmm.conv is None else lmm.conv.weight
        q, k, v = _convolve(self.past, lmm.query_key_value.weight @ y, taps).view(3, lmm.num_heads, -1)
        q, k = _unit(q), _unit(k)
        gates = list(lmm.gates(y).sigmoid().split(lmm.num_heads))
        theta = lmm.max_learning_rate * gates.pop(0)
        eta = gates.pop(0) if lmm.momentum else 0 * theta
        alpha = gates.pop(0) if lmm.forgetting else 0 * theta
        gamma = gates.pop(0) if lmm.objective_window > 1 else torch.ones_like(theta)
        tokens = zip(self.heads, q, k, v, theta, eta, alpha, gamma, strict=True)
        reads = [memory.step(*inputs) for memory, *inputs in tokens]
        return self._output(reads, y), q

    def _output(self, reads: list[Tensor], x: Tensor) -> Tensor:
        y = torch.cat(reads)
        if self.lmm.output_norm is not None:
            y = _norm(self.lmm.output_norm, y)
        if self.lmm.output_gate is not None:
            y = y * F.silu(self.lmm.output_gate(x))
        projected: Tensor = self.lmm.out(y)
        return projected


def _convolve(past: list[Tensor], z: Tensor, taps: Tensor | None) -> Tensor:
    """Append z to its past and return ``silu(sum_i taps_i z_{t - width + 1 + i})``, or silu(z) without taps."""
    past.append(z)
    if taps is None:
        return F.silu(z)
    recent = past[-taps.shape[1] :]
    return F.silu(torch.stack([tap * z for tap, z in zip(taps.unbind(1)[-len(recent) :], recent, strict=True)]).sum(0))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square normalisation, where there is one."""
    if not isinstance(norm, RMSNorm):
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
