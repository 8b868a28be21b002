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

import torch
from torch import Tensor

from memzoo.layers.ops.activations import ACTIVATIONS, Activation
from memzoo.layers.ops.memory_arguments import any_row
from memzoo.layers.ops.neural_memory_clip import clip_backward, clip_errors, clip_factor
from memzoo.layers.ops.neural_memory_norm import gradient, gradient_backward, normalise

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
        has_norm: A residual and a LayerNorm, whose gain and bias are given, surround the network.
        keeps_work: A backward pass may follow.
        backend: What scans the chunks, of ``neural_memory_fused.BACKENDS``: this module, or a kernel.
        group: Chunks between the states that a kernel keeps for the backward pass.
    """

    depth: int
    blocks: int
    activation: str
    loss_scale: float
    max_gradient_norm: float | None
    has_base: bool
    has_anchor: bool
    has_norm: bool
    keeps_work: bool
    backend: str = "torch"
    group: int = 1

    def split(self, states: Tensors) -> "ChunkStates":
        """Part (*carry, *base, *anchor, *norm), each there or not."""
        parts = [states[i : i + self.depth] for i in range(0, self.depth * self.num_groups, self.depth)]
        carry, rest = parts[: self.blocks], parts[self.blocks :]
        base = rest.pop(0) if self.has_base else ()
        anchor = rest.pop(0) if self.has_anchor else ()
        return ChunkStates.at(carry, base, anchor, states[self.depth * self.num_groups :])

    @property
    def num_groups(self) -> int:
        """Number of groups of ``depth`` matrices among the states."""
        return self.blocks + self.has_base + self.has_anchor


@dataclass(frozen=True)
class ChunkStates:
    """What a chunk starts from.

    Attributes:
        carry: carry[block][layer], (R, d_in, d_out).
        base: Weights at which gradients are taken, if not those carried, likewise; or ().
        anchor: Weights that forgetting decays towards, likewise; or ().
        norm: Gain and bias of the LayerNorm, (R, 1, d_L) each; or ().
        weights: The weights at which the chunk's gradients are taken.
    """

    carry: list[Tensors]
    base: Tensors
    anchor: Tensors
    norm: Tensors
    weights: Tensors

    @staticmethod
    def at(carry: list[Tensors], base: Tensors, anchor: Tensors, norm: Tensors) -> "ChunkStates":
        """Start from these; without a base of its own a chunk takes its gradients at what is carried."""
        return ChunkStates(carry, base, anchor, norm, base or base_weights(carry[0], anchor))


@dataclass
class ChunkWork:
    """What the backward pass of a chunk takes over from its forward pass, a list entry a memory layer.

    Results of matrix products, and little else: what follows from these one by one is faster to compute again than to
    fetch from memory.

    Attributes:
        z: Outputs of all layers but the last for the keys, (R, C, d_out).
        e: Errors at the activations behind them, likewise.
        d: Errors at the last layer's outputs, clipped if a limit is set, (R, C, d_L).
        out: Outputs of all layers but the last for the queries, (R, C, d_out).
        score: Their inputs times those for the keys, (R, C, C).
        product: Inputs for the queries times each carried block, of the layers that narrow, (R, C, d_out).
        clip: Factor of every token's gradient (R, C, 1), or no entry.
        norm: With a LayerNorm around the network: what it makes of the keys' outputs (R, C, d_L), their deviation
            (R, C, 1) and the error behind it (R, C, d_L).
    """

    z: list[Tensor] = field(default_factory=list)
    e: list[Tensor] = field(default_factory=list)
    d: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    score: list[Tensor] = field(default_factory=list)
    product: list[Tensor] = field(default_factory=list)
    clip: list[Tensor] = field(default_factory=list)
    norm: list[Tensor] = field(default_factory=list)

    def pack(self) -> tuple[list[int], list[Tensor]]:
        """Return the lengths of the lists and all tensors in one list, as autograd keeps them."""
        lists: list[list[Tensor]] = [getattr(self, f.name) for f in fields(self)]
        return [len(part) for part in lists], [t for part in lists for t in part]

    @staticmethod
    def unpack(lengths: list[int], tensors: Tensors) -> "ChunkWork":
        """Undo ``pack``."""
        rest = iter(tensors)
        return ChunkWork(*([next(rest) for _ in range(length)] for length in lengths))


@dataclass(frozen=True)
class ChunkInputs:
    """What a chunk reads besides its states, or the gradients of that.

    Attributes:
        q: Queries, (R, C, d_0).
        k: Keys, (R, K, d_0): the chunk's own, K = C, and with a window those of tokens before.
        v: Values, (R, K, d_L).
        mix: The table G of every read, (R, C, K).
        read: Coefficients of the carried blocks in every read, (k, R, C, 1).
        write: Coefficients of every token in the new blocks, (k, R, K, 1).
        transition: Coefficients of the old blocks (second axis) in the new ones, (k, k, R, 1, 1); nothing flows from a
            block to a later one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mix: Tensor
    read: Tensor
    write: Tensor
    transition: Tensor


def chunk_forward(
    settings: ChunkSettings, inputs: ChunkInputs, states: ChunkStates, y: Tensor
) -> tuple[list[Tensor], Tensor, ChunkWork]:
    """Read into ``y`` (R, C, d_L) and write.

    ``y`` is what the network gives; a residual and a norm around it are the caller's to add.

    Returns:
        The new carry, the norm of each token's error (R, C), and what the backward pass needs.
    """
    carry, weights, anchor = states.carry, states.weights, states.anchor
    fn = ACTIVATIONS[settings.activation]
    last = settings.depth - 1
    work = ChunkWork()

    # Keys forward, errors backward, both at the chunk's base.
    x = [inputs.k]
    for i in range(last):
        work.z.append(torch.bmm(x[i], weights[i]))
        x.append(fn.value(work.z[i]))
    if states.norm:
        gain, bias = states.norm
        normal, deviation = normalise(torch.bmm(x[last], weights[last]))
        error = torch.addcmul(bias, normal, gain) + inputs.k - inputs.v
        work.norm = [normal, deviation, error]
        d = [gradient(normal, deviation, error, gain).neg_()]
    else:
        error = torch.baddbmm(inputs.v, x[last], weights[last], alpha=-1)  # its negative
        d = [error]
    error_norm = torch.linalg.vector_norm(error, dim=-1)
    if settings.loss_scale != 1:
        d[0].mul_(settings.loss_scale)
    for i in range(last, 0, -1):
        work.e.insert(0, torch.bmm(d[0], weights[i].mT))
        d.insert(0, fn.pull(work.e[0], work.z[i - 1]))
    if settings.max_gradient_norm is not None:
        work.clip.append(clip_factor(x, d, settings.max_gradient_norm))
        d = [clip_errors(d_i, work.clip[0]) for d_i in d]
        written = work.clip[0] > 0
        if any_row(~written):  # of a token that is dropped nothing may be left: any of it can be infinite
            x, work.z, work.e = ([torch.where(written, t, 0) for t in part] for part in (x, work.z, work.e))
            work.norm = [torch.where(written, part, 0 if i != 1 else 1) for i, part in enumerate(work.norm)]
    work.d.append(d[last])

    # Queries forward through the weights after each token, which exist only as coefficients.
    a = inputs.q
    for i in range(settings.depth):
        work.score.append(torch.bmm(a, x[i].mT))
        mixed = work.score[i] * inputs.mix
        out = torch.bmm(mixed, d[i], out=y) if i == last else torch.bmm(mixed, d[i])
        for block, coefficient in zip(carry, inputs.read, strict=True):
            if _widens(block[i]):
                out.baddbmm_(a * coefficient, block[i])
            else:
                work.product.append(torch.bmm(a, block[i]))
                out.addcmul_(work.product[-1], coefficient)
        if anchor:
            out.baddbmm_(a, anchor[i])
        if i < last:
            work.out.append(out)
            a = fn.value(out)

    new = []
    for b, (coefficient, transition) in enumerate(zip(inputs.write, inputs.transition, strict=True)):
        own, *others = transition.unbind()[b:]
        for i in range(settings.depth):
            m = carry[b][i] * own
            for later, share in enumerate(others, b + 1):
                m.addcmul_(carry[later][i], share)
            x_i, d_i = (x[i] * coefficient, d[i]) if _widens(m) else (x[i], d[i] * coefficient)
            new.append(m.baddbmm_(x_i.mT, d_i))
    return new, error_norm, work


def chunk_backward(
    settings: ChunkSettings,
    inputs: ChunkInputs,
    states: ChunkStates,
    work: ChunkWork,
    d_y: Tensor,
    d_new: list[Tensor],
    grads: ChunkInputs,
) -> list[Tensor]:
    """Fill ``grads`` with the gradients of ``inputs`` and return those of ``states``, as a flat list."""
    carry, weights, base, anchor = states.carry, states.weights, states.base, states.anchor
    fn = ACTIVATIONS[settings.activation]
    last = settings.depth - 1
    is_dropped = work.clip and any_row(work.clip[0] == 0)
    k = torch.where(work.clip[0] > 0, inputs.k, 0) if is_dropped else inputs.k
    x, first, second = _keys_again(k, fn, work.z)
    d = [fn.pull(e, z) for e, z in zip(work.e, work.z, strict=True)]
    d = [*(clip_errors(d_i, work.clip[0]) for d_i in d), *work.d] if work.clip else d + work.d

    # The new carry: transition carry + x^T diag(write) d.
    d_blocks = [d_new[i : i + settings.depth] for i in range(0, len(d_new), settings.depth)]
    d_carry = _transition_backward(inputs.transition, carry, d_blocks, grads.transition)
    d_x = [grads.k, *(torch.empty_like(x_i) for x_i in x[1:])]
    d_d = [*(torch.empty_like(d_i) for d_i in d[:-1]), grads.v]
    for b, coefficient in enumerate(inputs.write):
        dots = []
        for i, d_m in enumerate(d_blocks[b]):
            if _widens(d_m):
                narrow, wide, d_narrow, d_wide, m = x[i], d[i], d_x[i], d_d[i], d_m
            else:
                narrow, wide, d_narrow, d_wide, m = d[i], x[i], d_d[i], d_x[i], d_m.mT
            product = torch.bmm(wide, m.mT)
            dots.append(_row_dot(product, narrow))
            if b == 0:
                torch.mul(product, coefficient, out=d_narrow)
                torch.bmm(narrow * coefficient, m, out=d_wide)
            else:
                d_narrow.addcmul_(product, coefficient)
                d_wide.baddbmm_(narrow * coefficient, m)
        _sum(dots, grads.write[b])

    # The reads, last layer first: out = diag(read) a carry + mixed d + a anchor.
    d_read: list[list[Tensor]] = [[] for _ in carry]
    d_anchor = [torch.zeros_like(m) for m in anchor]
    d_out = d_y
    products = list(work.product)
    for i in range(last, -1, -1):
        a = fn.value(work.out[i - 1]) if i else inputs.q
        d_d[i].baddbmm_((work.score[i] * inputs.mix).mT, d_out)
        d_mixed = torch.bmm(d_out, d[i].mT)
        if i == last:
            torch.mul(d_mixed, work.score[i], out=grads.mix)
        else:
            grads.mix.addcmul_(d_mixed, work.score[i])
        d_score = d_mixed.mul_(inputs.mix)
        d_a = torch.bmm(d_score, x[i]) if i else torch.bmm(d_score, x[i], out=grads.q)
        d_x[i].baddbmm_(d_score.mT, a)
        for b in range(settings.blocks - 1, -1, -1):
            m, d_m = carry[b][i], d_carry[b][i]
            if _widens(m):
                product = torch.bmm(d_out, m.mT)
                d_read[b].append(_row_dot(product, a))
                d_a.addcmul_(product, inputs.read[b])
                d_m.baddbmm_((a * inputs.read[b]).mT, d_out)
            else:
                d_read[b].append(_row_dot(products.pop(), d_out))
                scaled = d_out * inputs.read[b]
                d_a.baddbmm_(scaled, m.mT)
                d_m.baddbmm_(a.mT, scaled)
        if anchor:
            d_a.baddbmm_(d_out, anchor[i].mT)
            d_anchor[i].baddbmm_(a.mT, d_out)
        d_out = fn.pull(d_a, work.out[i - 1]) if i else d_a
    for dots, into in zip(d_read, grads.read, strict=True):
        _sum(dots, into)

    if work.clip:
        d = clip_backward(x, d, work.clip[0], d_x, d_d)

    # The errors, first layer first: e = d_next w_next^T, d = e * act'. Carried weights take their gradients at once.
    d_weights = [torch.zeros_like(w) for w in weights] if base or anchor else d_carry[0]
    d_z = []
    for i in range(last):
        d_e = d_d[i] * first[i]
        curve = second[i]  # at an infinite error there may be none
        d_z.append(d_d[i].zero_() if curve is None else d_d[i].mul_(work.e[i]).mul_(curve))
        d_d[i + 1].baddbmm_(d_e, weights[i + 1])
        d_weights[i + 1].baddbmm_(d_e.mT, d[i + 1])
    if settings.loss_scale != 1:
        d_d[last].mul_(settings.loss_scale)
    d_z.append(d_d[last].neg())
    d_norm = _norm_backward(states.norm[0], work.norm, d_z, grads) if states.norm else []

    # The keys, last layer first: z = x w, x_next = act(z).
    for i in range(last, -1, -1):
        d_x[i].baddbmm_(d_z[i], weights[i].mT)
        d_weights[i].baddbmm_(x[i].mT, d_z[i])
        if i:
            d_z[i - 1].addcmul_(d_x[i], first[i - 1])

    if anchor and not base:  # the weights were the first carried block plus the anchor
        for d_m, d_u, d_w in zip(d_anchor, d_carry[0], d_weights, strict=True):
            d_m += d_w
            d_u += d_w
    return [t for block in d_carry for t in block] + (d_weights if base else []) + d_anchor + d_norm


def _keys_again(k: Tensor, fn: Activation, z: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Return the layers' inputs for the keys, and both derivatives of the activations between them."""
    jets = [fn.jet(z_i) for z_i in z]
    return [k, *(jet[0] for jet in jets)], [jet[1] for jet in jets], [jet[2] for jet in jets]


def _norm_backward(gain: Tensor, work: list[Tensor], d_z: list[Tensor], grads: ChunkInputs) -> list[Tensor]:
    """Turn ``d_z[-1]``, a gradient of the gradient at the LayerNorm's input, into that of the input itself.

    Returns:
        The gradients of gain and bias.
    """
    normal, deviation, error = work
    d_z[-1], d_error, d_gain = gradient_backward(normal, deviation, error, gain, d_z[-1])
    grads.k.add_(d_error)
    torch.neg(d_error, out=grads.v)
    return [d_gain.sum(1, keepdim=True), d_error.sum(1, keepdim=True)]


def _transition_backward(
    transition: Tensor, carry: list[Tensors], d_blocks: list[list[Tensor]], d_transition: Tensor
) -> list[list[Tensor]]:
    """Return the gradients of the carried blocks through ``transition``; fill in its own."""
    d_carry: list[list[Tensor]] = []
    d_transition.zero_()  # from a block to a later one nothing flows
    for old, (block, shares) in enumerate(zip(carry, transition.unbind(1), strict=True)):
        d_carry.append([d_m * shares[old] for d_m in d_blocks[old]])
        for new in range(old + 1):
            dots = [(g * m).sum((1, 2), keepdim=True) for g, m in zip(d_blocks[new], block, strict=True)]
            _sum(dots, d_transition[new, old])
            if new < old:
                for d_m, g in zip(d_carry[old], d_blocks[new], strict=True):
                    d_m.addcmul_(g, shares[new])
    return d_carry


def base_weights(carried: Tensors, anchor: Tensors) -> Tensors:
    """Return the weights that the first carried block stands for."""
    return tuple(w + m for w, m in zip(carried, anchor, strict=True)) if anchor else carried


def _widens(m: Tensor) -> bool:
    """Whether a layer's output is at least as wide as its input: rows are scaled on the narrow side."""
    return m.shape[1] <= m.shape[2]


def _row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(R, C, d) twice -> (R, C, 1)."""
    return (x * y).sum(-1, keepdim=True)


def _sum(parts: list[Tensor], into: Tensor) -> None:
    """Fill ``into`` with the sum of ``parts``, one a memory layer."""
    into.copy_(parts[0])
    for part in parts[1:]:
        into += part
