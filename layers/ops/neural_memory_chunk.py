"""One chunk of a neural memory: every token's inner gradient, write and read as matrix products.

Inside a chunk all gradients are taken at the same weights ``W_b``, so token i's gradient of layer l is the outer
product of that layer's input ``x_i`` and of the error at its output. Neither these products nor the weights after
each token are ever formed: with ``d_i`` *minus* that error, a read after token t is

    a W_t = beta_t a W_0 + f_t a S_0 + sum_{i<=t} G_{t,i} (a . x_i) d_i

which is masked attention over the chunk's keys plus a product with what the chunk started from.

Notation: R rows (batch times heads), C tokens, L layers of widths ``d_0 .. d_L``, k carried blocks a layer (1: the
weights; 2: weights and momentum), stacked as ``carry`` (R, k * d_in, d_out). With an ``anchor`` the first block holds
the weights *minus* the anchor, which is what forgetting then acts on.

The backward pass is written out. It runs the products autograd would run, twice those of the forward pass, without
the copies of sliced and concatenated gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.activations import activation

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class ChunkSettings:
    """What a chunk needs besides tensors.

    Attributes:
        depth: L, the number of memory layers.
        activation: Name of the activation between them.
        loss_scale: c; the gradient at the output is ``c (M(k) - v)``.
        max_gradient_norm: Largest norm of one token's gradient over all layers, or None.
        has_base: Gradients are taken at weights given apart, not at those carried.
        has_anchor: Forgetting decays towards given weights, not towards zero.
        reports_error: Also return the norm of each token's error ``M(W_b; k) - v``, which carries no gradient.
    """

    depth: int
    activation: str
    loss_scale: float
    max_gradient_norm: float | None
    has_base: bool
    has_anchor: bool
    reports_error: bool = False

    def split(self, states: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Part (*carry, *base, *anchor); absent ones are empty."""
        base_end = self.depth * (1 + self.has_base)
        return states[: self.depth], states[self.depth : base_end], states[base_end:]


@dataclass
class ChunkWork:
    """What the forward pass of a chunk computes and its backward pass needs, a list entry a layer.

    Attributes:
        x: Inputs of the layers for the keys, (R, C, d_in).
        z: Their outputs before the activation, all layers but the last, (R, C, d_out).
        e: Errors at the activations' outputs, like ``z``.
        d: Errors at the layers' outputs, clipped if a limit is set, (R, C, d_out).
        a: Inputs of the layers for the queries, (R, C, d_in).
        r: Their outputs before the activation, all layers but the last.
        score: ``a x^T`` (R, C, C).
        clip: Factor of every token's gradient (R, C, 1), or None.
    """

    x: list[Tensor]
    z: list[Tensor]
    e: list[Tensor]
    d: list[Tensor]
    a: list[Tensor]
    r: list[Tensor]
    score: list[Tensor]
    clip: Tensor | None = None

    def pack(self) -> tuple[list[int], list[Tensor]]:
        """Return the lengths of the lists and all tensors in one list, as autograd keeps them."""
        lists = [self.x, self.z, self.e, self.d, self.a, self.r, self.score, [] if self.clip is None else [self.clip]]
        return [len(part) for part in lists], [t for part in lists for t in part]

    @staticmethod
    def unpack(lengths: list[int], tensors: Tensors) -> "ChunkWork":
        """Undo ``pack``."""
        parts, rest = [], list(tensors)
        for length in lengths:
            parts.append(rest[:length])
            rest = rest[length:]
        x, z, e, d, a, r, score, clip = parts
        return ChunkWork(x, z, e, d, a, r, score, clip[0] if clip else None)


class Chunk(torch.autograd.Function):
    """``y, *carry = Chunk.apply(settings, q, k, v, mix, read, write, transition, *carry, *base, *anchor)``.

    With ``reports_error`` the norms of the errors (R, C) come last.

    Shape:
        q, k: (R, C, d_0). v, y: (R, C, d_L). mix: (R, C, C), the table G of every read. read: (R, C, k), coefficients
        of the carried blocks in every read. write: (R, C, k), of every token in the new blocks. transition: (R, k, k),
        of the old blocks (second axis) in the new. carry: (R, k * d_in, d_out) a layer. base, anchor: (R, d_in, d_out)
        a layer.
    """

    @staticmethod
    def forward(ctx: Any, settings: ChunkSettings, *tensors: Tensor) -> Tensors:
        y, carry, work = chunk_forward(settings, *tensors)
        lengths, kept = work.pack()
        ctx.settings, ctx.lengths, ctx.given = settings, lengths, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        if not settings.reports_error:
            return (y, *carry)
        error = work.d[-1] if work.clip is None else work.d[-1] / work.clip
        norm = torch.linalg.vector_norm(error, dim=-1) / settings.loss_scale
        ctx.mark_non_differentiable(norm)
        return (y, *carry, norm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        work = ChunkWork.unpack(ctx.lengths, saved[ctx.given :])
        return (
            None,
            *chunk_backward(ctx.settings, saved[: ctx.given], work, grads[0], grads[1 : 1 + ctx.settings.depth]),
        )


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
    fn = activation(settings.activation)
    weights = _weights(carry, base, anchor, [k.shape[-1], *(u.shape[-1] for u in carry[:-1])])
    last = settings.depth - 1

    # Keys forward, errors backward, both at the chunk's base.
    x, z = [k], []
    for i in range(last):
        z.append(torch.bmm(x[i], weights[i]))
        x.append(fn.value(z[i]))
    d = [torch.bmm(x[last], weights[last]).neg_().add_(v).mul_(settings.loss_scale)]
    e: list[Tensor] = []
    for i in range(last, 0, -1):
        e.insert(0, torch.bmm(d[0], weights[i].mT))
        d.insert(0, fn.times_first(e[0], z[i - 1]))
    clip = None
    if settings.max_gradient_norm is not None:
        clip = _clip_factor(x, d, settings.max_gradient_norm)
        d = [d_i * clip for d_i in d]

    # Queries forward through the weights after each token, which exist only as coefficients.
    a, r, score = [q], [], []
    for i, u in enumerate(carry):
        score.append(torch.bmm(a[i], x[i].mT))
        out = torch.bmm(_spread(a[i], read), u).baddbmm_(score[i] * mix, d[i])
        if anchor:
            out.baddbmm_(a[i], anchor[i])
        if i < last:
            r.append(out)
            a.append(fn.value(out))

    new = [_blocks_matmul(transition, u).baddbmm_(_spread(x[i], write).mT, d[i]) for i, u in enumerate(carry)]
    return out, new, ChunkWork(x, z, e, d, a, r, score, clip)


def chunk_backward(
    settings: ChunkSettings, inputs: Tensors, work: ChunkWork, d_y: Tensor, d_new: Tensors
) -> list[Tensor]:
    """Return the gradients of all inputs of ``chunk_forward`` after ``settings``, in their order."""
    mix, read, write, transition, *states = inputs[3:]
    carry, base, anchor = settings.split(tuple(states))
    weights = _weights(carry, base, anchor, [x.shape[-1] for x in work.x])
    fn = activation(settings.activation)
    x, z, e, d, a, r = work.x, work.z, work.e, work.d, work.a, work.r
    last = settings.depth - 1

    # The new carry: transition carry + spread(x, write)^T d.
    d_write, d_transition = torch.zeros_like(write), torch.zeros_like(transition)
    d_carry, d_d, d_x = [], [], []
    for i, u in enumerate(carry):
        d_carry.append(_blocks_matmul(transition.mT, d_new[i]))
        d_transition.baddbmm_(_flat_blocks(d_new[i], transition), _flat_blocks(u, transition).mT)
        d_d.append(torch.bmm(_spread(x[i], write), d_new[i]))
        d_x.append(_spread_backward(torch.bmm(d[i], d_new[i].mT), x[i], write, d_write))

    # The reads, last layer first: out = spread(a, read) carry + (score * mix) d + a anchor.
    d_read, d_mix = torch.zeros_like(read), torch.zeros_like(mix)
    d_anchor = [torch.zeros_like(m) for m in anchor]
    d_out = d_y
    for i in range(last, -1, -1):
        d_carry[i].baddbmm_(_spread(a[i], read).mT, d_out)
        d_a = _spread_backward(torch.bmm(d_out, carry[i].mT), a[i], read, d_read)
        d_mixed = torch.bmm(d_out, d[i].mT)
        d_d[i].baddbmm_((work.score[i] * mix).mT, d_out)
        d_mix.addcmul_(d_mixed, work.score[i])
        d_score = d_mixed.mul_(mix)
        d_a.baddbmm_(d_score, x[i])
        d_x[i].baddbmm_(d_score.mT, a[i])
        if anchor:
            d_a.baddbmm_(d_out, anchor[i].mT)
            d_anchor[i].baddbmm_(a[i].mT, d_out)
        d_out = fn.times_first(d_a, r[i - 1]) if i else d_a
    d_q = d_out

    if work.clip is not None:
        _clip_backward(x, d, work.clip, d_x, d_d)
        d = [d_i / work.clip for d_i in d]

    # The errors, first layer first: e = d_next w_next^T, d = e * act'(z).
    apart = bool(base or anchor)
    d_base = [torch.zeros_like(w) if apart else u[:, : w.shape[1]] for u, w in zip(d_carry, weights, strict=True)]
    d_z = []
    for i in range(last):
        d_e = fn.times_first(d_d[i], z[i])
        d_z.append(fn.times_second(d_d[i] * e[i], z[i]))
        d_d[i + 1].baddbmm_(d_e, weights[i + 1])
        d_base[i + 1].baddbmm_(d_e.mT, d[i + 1])
    d_v = d_d[last].mul_(settings.loss_scale)
    d_z.append(d_v.neg())

    # The keys, last layer first: z = x w, x_next = act(z).
    for i in range(last, -1, -1):
        d_x[i].baddbmm_(d_z[i], weights[i].mT)
        d_base[i].baddbmm_(x[i].mT, d_z[i])
        if i:
            d_z[i - 1] += fn.times_first(d_x[i], z[i - 1])

    if anchor and not base:  # the weights were the first carried block plus the anchor
        for u, m, w in zip(d_carry, d_anchor, d_base, strict=True):
            u[:, : w.shape[1]] += w
            m += w
    return [d_q, d_x[0], d_v, d_mix, d_read, d_write, d_transition, *d_carry, *(d_base if base else ()), *d_anchor]


def _weights(carry: Tensors, base: Tensors, anchor: Tensors, widths: list[int]) -> list[Tensor]:
    """Return the weights at which the chunk's gradients are taken."""
    if base:
        return list(base)
    own = [u[:, :width] for u, width in zip(carry, widths, strict=True)]
    return [w + m for w, m in zip(own, anchor, strict=True)] if anchor else own


def _spread(x: Tensor, coefficients: Tensor) -> Tensor:
    """(R, C, d) times (R, C, k) -> (R, C, k * d): one copy of every row a carried block, each scaled."""
    scaled: Tensor = x.unsqueeze(2) * coefficients.unsqueeze(3)
    return scaled.flatten(2)


def _spread_backward(d_spread: Tensor, x: Tensor, coefficients: Tensor, d_coefficients: Tensor) -> Tensor:
    """Return the gradient of ``x``, having added that of the coefficients in place."""
    blocks: Tensor = d_spread.unflatten(2, (coefficients.shape[2], -1))
    d_coefficients += (blocks * x.unsqueeze(2)).sum(-1)
    return (blocks * coefficients.unsqueeze(3)).sum(2)


def _flat_blocks(u: Tensor, transition: Tensor) -> Tensor:
    """(R, k * d_in, d_out) -> (R, k, d_in * d_out)."""
    blocks: Tensor = u.unflatten(1, (transition.shape[1], -1))
    return blocks.flatten(2)


def _blocks_matmul(transition: Tensor, u: Tensor) -> Tensor:
    """Mix the blocks of ``u``: (R, k, k) on (R, k * d_in, d_out)."""
    return torch.bmm(transition, _flat_blocks(u, transition)).view_as(u)


def _squared_norms(x: list[Tensor], d: list[Tensor]) -> Tensor:
    """Squared norm of each token's gradient, all layers together: the sum of |x|^2 |d|^2. (R, C, 1)."""
    return torch.stack([x_i.square().sum(-1) * d_i.square().sum(-1) for x_i, d_i in zip(x, d, strict=True)]).sum(0)[
        ..., None
    ]


def _clip_factor(x: list[Tensor], d: list[Tensor], limit: float) -> Tensor:
    """Factor that brings each token's gradient to a norm of at most ``limit``; exactly 1 below it. (R, C, 1)."""
    squared = _squared_norms(x, d)
    return torch.where(squared > limit * limit, limit * squared.clamp_min(limit * limit).rsqrt(), 1)


def _clip_backward(x: list[Tensor], d: list[Tensor], clip: Tensor, d_x: list[Tensor], d_d: list[Tensor]) -> None:
    """Turn gradients of the clipped errors ``d`` into those of the raw ones, in place; add those of ``x``.

    With raw errors u = d / clip and n^2 their squared norm, clip = limit / n where it acts, so
    d clip / d n^2 = -clip / (2 n^2), and n^2 is quadratic in u and in x.
    """
    d_clip = torch.stack([(g * d_i).sum(-1, keepdim=True) for g, d_i in zip(d_d, d, strict=True)]).sum(0) / clip
    raw = [d_i / clip for d_i in d]
    squared = _squared_norms(x, raw)
    d_squared = torch.where(clip < 1, d_clip * clip / (-2 * squared), 0)
    for i, u in enumerate(raw):
        d_d[i].mul_(clip).addcmul_(u, 2 * d_squared * x[i].square().sum(-1, keepdim=True))
        d_x[i].addcmul_(x[i], 2 * d_squared * u.square().sum(-1, keepdim=True))
