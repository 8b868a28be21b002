"""One chunk of a neural memory: every token's inner gradient, write and read as matrix products.

Inside a chunk all gradients are taken at the same weights ``W_b``, so token i's gradient of layer l is the outer
product of that layer's input ``x_i`` and of the error at its output. Neither these products nor the weights after
each token are ever formed: with ``d_i`` *minus* that error, a read after token t is

    a W_t = beta_t a W_0 + f_t a S_0 + sum_{i<=t} G_{t,i} (a . x_i) d_i

which is masked attention over the chunk's keys plus a product with what the chunk started from.

Notation: R rows (batch times heads), C tokens, L layers of widths ``d_0 .. d_L``, k carried blocks of each layer's
shape (1: the weights; 2: the weights, then the momentum). With an ``anchor`` the first block holds the weights *minus*
the anchor, which is what forgetting then acts on.

The backward pass is written out. It runs the products autograd would run, twice those of the forward pass, without
the copies of sliced and concatenated gradients.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.precision import no_autocast

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class ChunkSettings:
    """What a chunk needs besides tensors.

    Attributes:
        depth: L, the number of memory layers.
        blocks: k, the number of carried blocks.
        activation: Name of the activation between the layers.
        loss_scale: c; the gradient at the output is ``c (M(k) - v)``.
        max_gradient_norm: Largest norm of one token's gradient over all layers, or None.
        has_base: Gradients are taken at weights given apart, not at those carried.
        has_anchor: Forgetting decays towards given weights, not towards zero.
        reports_error: Also return the norm of each token's error ``M(W_b; k) - v``, which carries no gradient.
    """

    depth: int
    blocks: int
    activation: str
    loss_scale: float
    max_gradient_norm: float | None
    has_base: bool
    has_anchor: bool
    reports_error: bool = False

    def split(self, states: Tensors) -> tuple[list[Tensors], Tensors, Tensors]:
        """Part (*carry, *base, *anchor) into carry[block][layer], base[layer], anchor[layer]; absent ones are empty."""
        parts = [states[i : i + self.depth] for i in range(0, len(states), self.depth)]
        carry, rest = parts[: self.blocks], parts[self.blocks :]
        base = rest.pop(0) if self.has_base else ()
        return carry, base, rest.pop(0) if self.has_anchor else ()


@dataclass
class ChunkWork:
    """What the forward pass of a chunk computes and its backward pass needs, a list entry a memory layer.

    Attributes:
        x: Inputs of the layers for the keys, (R, C, d_in).
        first: Slopes of the activation at their outputs, all layers but the last, (R, C, d_out).
        second: Second derivatives there, likewise.
        e: Errors at the activations' outputs, likewise.
        d: Errors at the layers' outputs, clipped if a limit is set, (R, C, d_out).
        a: Inputs of the layers for the queries, (R, C, d_in).
        r: Their outputs before the activation, all layers but the last.
        score: ``a x^T``, (R, C, C).
        mixed: ``score`` times the table.
        product: ``a`` times each carried block, of the layers that narrow, (R, C, d_out).
        clip: Factor of every token's gradient (R, C, 1), or no entry.
    """

    x: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    e: list[Tensor] = field(default_factory=list)
    d: list[Tensor] = field(default_factory=list)
    a: list[Tensor] = field(default_factory=list)
    r: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    product: list[Tensor] = field(default_factory=list)
    clip: list[Tensor] = field(default_factory=list)

    def pack(self) -> tuple[list[int], list[Tensor]]:
        """Return the lengths of the lists and all tensors in one list, as autograd keeps them."""
        lists: list[list[Tensor]] = [getattr(self, f.name) for f in fields(self)]
        return [len(part) for part in lists], [t for part in lists for t in part]

    @staticmethod
    def unpack(lengths: list[int], tensors: Tensors) -> "ChunkWork":
        """Undo ``pack``."""
        rest = iter(tensors)
        return ChunkWork(*([next(rest) for _ in range(length)] for length in lengths))


class Chunk(torch.autograd.Function):
    """``y, *carry = Chunk.apply(settings, q, k, v, mix, read, write, transition, *carry, *base, *anchor)``.

    With ``reports_error`` the norms of the errors (R, C) come last.

    Shape:
        q, k: (R, C, d_0). v, y: (R, C, d_L). mix: (R, C, C), the table G of every read. read: (k, R, C, 1),
        coefficients of the carried blocks in every read. write: (k, R, C, 1), of every token in the new blocks.
        transition: (k, k, R, 1, 1), of the old blocks (second axis) in the new ones; nothing flows from a block to a
        later one. carry, block by block, base and anchor: (R, d_in, d_out) a layer.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, *tensors: Tensor) -> Tensors:
        y, carry, work = chunk_forward(settings, *tensors)
        lengths, kept = work.pack()
        ctx.settings, ctx.lengths, ctx.given = settings, lengths, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        if not settings.reports_error:
            return (y, *carry)
        error = work.d[-1] / work.clip[0] if work.clip else work.d[-1]
        norm = torch.linalg.vector_norm(error, dim=-1) / settings.loss_scale
        ctx.mark_non_differentiable(norm)
        return (y, *carry, norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        settings: ChunkSettings = ctx.settings
        saved = ctx.saved_tensors
        work = ChunkWork.unpack(ctx.lengths, saved[ctx.given :])
        d_new = grads[1 : 1 + settings.blocks * settings.depth]
        with no_autocast(grads[0].device):  # the caller's may be on
            return (None, *chunk_backward(settings, saved[: ctx.given], work, grads[0], d_new))


def chunk_forward(
    settings: ChunkSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor,
    read: Tensor,
    write: Tensor,
    transition: Tensor,
    *states: Tensor,
) -> tuple[Tensor, list[Tensor], ChunkWork]:
    """Return the reads, the new carry and what the backward pass needs. Shapes as in ``Chunk``."""
    carry, base, anchor = settings.split(states)
    weights = _weights(carry[0], base, anchor)
    fn = ACTIVATIONS[settings.activation]
    last = settings.depth - 1
    work = ChunkWork(x=[k], a=[q])

    # Keys forward, errors backward, both at the chunk's base.
    for i in range(last):
        value, first, second = fn.jet(torch.bmm(work.x[i], weights[i]))
        work.x.append(value)
        work.first.append(first)
        work.second.append(second)
    d = [torch.baddbmm(v, work.x[last], weights[last], alpha=-1)]
    if settings.loss_scale != 1:
        d[0].mul_(settings.loss_scale)
    for i in range(last, 0, -1):
        work.e.insert(0, torch.bmm(d[0], weights[i].mT))
        d.insert(0, work.e[0] * work.first[i - 1])
    if settings.max_gradient_norm is not None:
        work.clip.append(_clip_factor(work.x, d, settings.max_gradient_norm))
        d = [d_i * work.clip[0] for d_i in d]
    work.d = d

    # Queries forward through the weights after each token, which exist only as coefficients.
    out = q
    for i in range(settings.depth):
        a = work.a[i]
        work.score.append(torch.bmm(a, work.x[i].mT))
        work.mixed.append(work.score[i] * mix)
        out = torch.bmm(work.mixed[i], d[i])
        for block, coefficient in zip(carry, read, strict=True):
            if _widens(block[i]):
                out.baddbmm_(a * coefficient, block[i])
            else:
                work.product.append(torch.bmm(a, block[i]))
                out.addcmul_(work.product[-1], coefficient)
        if anchor:
            out.baddbmm_(a, anchor[i])
        if i < last:
            work.r.append(out)
            work.a.append(fn.value(out))

    new = []
    for b, coefficient in enumerate(write):
        for i in range(settings.depth):
            m = carry[b][i] * transition[b, b]
            for later in range(b + 1, settings.blocks):
                m.addcmul_(carry[later][i], transition[b, later])
            x, d_i = (work.x[i] * coefficient, d[i]) if _widens(m) else (work.x[i], d[i] * coefficient)
            new.append(m.baddbmm_(x.mT, d_i))
    return out, new, work


def chunk_backward(
    settings: ChunkSettings, inputs: Tensors, work: ChunkWork, d_y: Tensor, d_new: Tensors
) -> list[Tensor]:
    """Return the gradients of all inputs of ``chunk_forward`` after ``settings``, in their order."""
    mix, read, write, transition = inputs[3:7]
    carry, base, anchor = settings.split(inputs[7:])
    weights = _weights(carry[0], base, anchor)
    fn = ACTIVATIONS[settings.activation]
    x, d = work.x, work.d
    last = settings.depth - 1

    # The new carry: transition carry + x^T diag(write) d.
    d_write, d_transition = torch.zeros_like(write), torch.zeros_like(transition)
    d_blocks = [d_new[i : i + settings.depth] for i in range(0, len(d_new), settings.depth)]
    d_carry = _transition_backward(transition, carry, d_blocks, d_transition)
    d_x = [torch.zeros_like(x_i) for x_i in x]
    d_d = [torch.zeros_like(d_i) for d_i in d]
    for d_block, coefficient, d_coefficient in zip(d_blocks, write, d_write, strict=True):
        for i, d_m in enumerate(d_block):
            if _widens(d_m):
                product = torch.bmm(d[i], d_m.mT)
                d_coefficient += _row_dot(product, x[i])
                d_x[i].addcmul_(product, coefficient)
                d_d[i].baddbmm_(x[i] * coefficient, d_m)
            else:
                product = torch.bmm(x[i], d_m)
                d_coefficient += _row_dot(product, d[i])
                d_d[i].addcmul_(product, coefficient)
                d_x[i].baddbmm_(d[i] * coefficient, d_m.mT)

    # The reads, last layer first: out = diag(read) a carry + mixed d + a anchor.
    d_read, d_mix = torch.zeros_like(read), torch.zeros_like(mix)
    d_anchor = [torch.zeros_like(m) for m in anchor]
    d_out = d_y
    products = list(work.product)
    for i in range(last, -1, -1):
        a = work.a[i]
        d_mixed = torch.bmm(d_out, d[i].mT)
        d_d[i].baddbmm_(work.mixed[i].mT, d_out)
        d_mix.addcmul_(d_mixed, work.score[i])
        d_score = d_mixed.mul_(mix)
        d_a = torch.bmm(d_score, x[i])
        d_x[i].baddbmm_(d_score.mT, a)
        for b in range(settings.blocks - 1, -1, -1):
            m, d_m = carry[b][i], d_carry[b][i]
            if _widens(m):
                product = torch.bmm(d_out, m.mT)
                d_read[b] += _row_dot(product, a)
                d_a.addcmul_(product, read[b])
                d_m.baddbmm_((a * read[b]).mT, d_out)
            else:
                d_read[b] += _row_dot(products.pop(), d_out)
                scaled = d_out * read[b]
                d_a.baddbmm_(scaled, m.mT)
                d_m.baddbmm_(a.mT, scaled)
        if anchor:
            d_a.baddbmm_(d_out, anchor[i].mT)
            d_anchor[i].baddbmm_(a.mT, d_out)
        d_out = fn.times_first(d_a, work.r[i - 1]) if i else d_a
    d_q = d_out

    if work.clip:
        d = _clip_backward(x, d, work.clip[0], d_x, d_d)

    # The errors, first layer first: e = d_next w_next^T, d = e * act'. Carried weights take their gradients at once.
    d_weights = [torch.zeros_like(w) for w in weights] if base or anchor else d_carry[0]
    d_z = []
    for i in range(last):
        d_e = d_d[i] * work.first[i]
        d_z.append(d_d[i].mul_(work.e[i]).mul_(work.second[i]))
        d_d[i + 1].baddbmm_(d_e, weights[i + 1])
        d_weights[i + 1].baddbmm_(d_e.mT, d[i + 1])
    d_v = d_d[last]
    if settings.loss_scale != 1:
        d_v.mul_(settings.loss_scale)
    d_z.append(d_v.neg())

    # The keys, last layer first: z = x w, x_next = act(z).
    for i in range(last, -1, -1):
        d_x[i].baddbmm_(d_z[i], weights[i].mT)
        d_weights[i].baddbmm_(x[i].mT, d_z[i])
        if i:
            d_z[i - 1].addcmul_(d_x[i], work.first[i - 1])

    if anchor and not base:  # the weights were the first carried block plus the anchor
        for d_m, d_u, d_w in zip(d_anchor, d_carry[0], d_weights, strict=True):
            d_m += d_w
            d_u += d_w
    d_states = [t for block in d_carry for t in block] + (d_weights if base else []) + d_anchor
    return [d_q, d_x[0], d_v, d_mix, d_read, d_write, d_transition, *d_states]


def _transition_backward(
    transition: Tensor, carry: list[Tensors], d_blocks: list[Tensors], d_transition: Tensor
) -> list[list[Tensor]]:
    """Return the gradients of the carried blocks through ``transition``; add its own in place."""
    d_carry: list[list[Tensor]] = []
    for old, block in enumerate(carry):
        d_carry.append([d_m * transition[old, old] for d_m in d_blocks[old]])
        for new in range(old + 1):
            for i, m in enumerate(block):
                d_transition[new, old] += (d_blocks[new][i] * m).sum((1, 2), keepdim=True)
                if new < old:
                    d_carry[old][i].addcmul_(d_blocks[new][i], transition[new, old])
    return d_carry


def _weights(carried: Tensors, base: Tensors, anchor: Tensors) -> Tensors:
    """Return the weights at which the chunk's gradients are taken."""
    if base:
        return base
    return tuple(w + m for w, m in zip(carried, anchor, strict=True)) if anchor else carried


def _widens(m: Tensor) -> bool:
    """Whether a layer's output is at least as wide as its input: rows are scaled on the narrow side."""
    return m.shape[1] <= m.shape[2]


def _row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(R, C, d) twice -> (R, C, 1)."""
    return (x * y).sum(-1, keepdim=True)


def _squared_norms(x: list[Tensor], d: list[Tensor]) -> Tensor:
    """Squared norm of each token's gradient, all layers together: the sum of |x|^2 |d|^2. (R, C, 1)."""
    layers = [
        x_i.square().sum(-1, keepdim=True) * d_i.square().sum(-1, keepdim=True) for x_i, d_i in zip(x, d, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _clip_factor(x: list[Tensor], d: list[Tensor], limit: float) -> Tensor:
    """Factor that brings each token's gradient to a norm of at most ``limit``; exactly 1 below it. (R, C, 1)."""
    squared = _squared_norms(x, d)
    return torch.where(squared > limit * limit, limit * squared.clamp_min(limit * limit).rsqrt(), 1)


def _clip_backward(
    x: list[Tensor], d: list[Tensor], clip: Tensor, d_x: list[Tensor], d_d: list[Tensor]
) -> list[Tensor]:
    """Turn gradients of the clipped errors ``d`` into those of the raw ones, in place; add those of ``x``.

    With raw errors u = d / clip and n^2 their squared norm, clip = limit / n where it acts, so
    d clip / d n^2 = -clip / (2 n^2), and n^2 is quadratic in u and in x.

    Returns:
        The raw errors.
    """
    raw = [d_i / clip for d_i in d]
    d_clip = torch.stack([(g * u).sum(-1, keepdim=True) for g, u in zip(d_d, raw, strict=True)]).sum(0)
    d_squared = torch.where(clip < 1, d_clip * clip / (-2 * _squared_norms(x, raw)), 0)
    for i, u in enumerate(raw):
        d_d[i].mul_(clip).addcmul_(u, 2 * d_squared * x[i].square().sum(-1, keepdim=True))
        d_x[i].addcmul_(x[i], 2 * d_squared * u.square().sum(-1, keepdim=True))
    return raw
