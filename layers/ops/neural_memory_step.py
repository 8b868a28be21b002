"""One token through a neural memory, as the recurrence says it; what generation runs.

A chunk of one token is right too, but spends its time on tables of one entry.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.memory_arguments import Weights, any_row, to_rows, working_dtype
from memzoo.layers.ops.neural_memory_clip import clip_errors, clip_factor
from memzoo.layers.ops.neural_memory_norm import gradient, normalise
from memzoo.layers.ops.neural_memory_window import Recent, with_recent
from memzoo.layers.ops.precision import no_autocast


def neural_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None,
    *,
    chunk_size: int,
    activation: str,
    loss_scale: float,
    read: str,
    position: int | Tensor,
    base: Weights | None,
    anchor: Weights | None,
    max_gradient_norm: float | None,
    norm: tuple[Tensor, Tensor] | None,
    window: int,
    gamma: Tensor | None,
    recent: Recent | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Weights, Weights, Weights]:
    """Write one token a row and read; arguments and shapes are those of ``neural_memory`` with a time of 1.

    Returns:
        y (batch, 1, heads, d_L), the norm of the error (batch, 1, heads), weights, momentum and base.
    """
    batch, _, heads, _ = q.shape
    dtype = working_dtype(q, theta, alpha, weights[0])
    count = torch.as_tensor(position, device=q.device).expand(batch).repeat_interleave(heads)[:, None, None]
    real = None if lengths is None else (lengths > 0).repeat_interleave(heads)[:, None, None]
    with no_autocast(q.device):
        q, k, v, step, alpha = (x.to(dtype) for x in (q, k, v, theta, alpha))
        if window > 1 or gamma is not None:
            k, v, shares = with_recent(k, v, gamma, recent, window)
            step = step * shares
        rows = _Rows(*(x.transpose(1, 2).reshape(batch * heads, x.shape[1], -1) for x in (q, k, v, step, alpha)))
        kept = None if eta is None else eta.to(dtype).reshape(-1, 1, 1)
        w, past, given, towards = (to_rows(part, dtype) for part in (weights, momentum, base, anchor))
        if eta is not None and not past:
            past = tuple(torch.zeros_like(m) for m in w)
        inner = () if norm is None else tuple(t.to(dtype).repeat(batch, 1)[:, None] for t in norm)
        start = _choose(count % chunk_size == 0, w, given or w)
        error, d, x = _errors(rows, start, inner, activation, loss_scale)
        if max_gradient_norm is not None:
            factor = clip_factor(x, d, max_gradient_norm)
            d = [clip_errors(d_i, factor) for d_i in d]
            if any_row(factor == 0):  # of a token that is dropped nothing may be left
                x = [torch.where(factor > 0, x_i, 0) for x_i in x]
        new, surprise = _write(rows, kept, x, d, w, past, towards)
        if real is not None:
            new, surprise = _choose(real, new, w), _choose(real, surprise, past)
        y = _read(rows.q, new if read == "post" else w, inner, activation)
        error = torch.linalg.vector_norm(error[:, -1:], dim=-1, keepdim=True)
        if real is not None:
            y, error = y.masked_fill(~real, 0), error.masked_fill(~real, 0)
        count = count + (1 if real is None else real)
        end = _choose(count % chunk_size == 0, new, start)
    new, surprise, end = (tuple(t.unflatten(0, (batch, heads)) for t in part) for part in (new, surprise, end))
    return y.view(batch, 1, heads, -1), error.view(batch, 1, heads), new, surprise, end


class _Rows(NamedTuple):
    """One token of every row (batch times heads), (R, 1, d) or (R, 1, 1).

    Its step is on the losses of w tokens, itself the last, of which ``k`` and ``v`` are (R, w, d), ``step`` (R, w, 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    step: Tensor
    alpha: Tensor


def _errors(
    rows: _Rows, base: Weights, norm: Weights, activation: str, loss_scale: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the error at the memory's output, those at every layer's, and every layer's input."""
    fn = ACTIVATIONS[activation]
    x, hidden = [rows.k], []
    for w in base[:-1]:
        hidden.append(torch.bmm(x[-1], w))
        x.append(fn.value(hidden[-1]))
    y = torch.bmm(x[-1], base[-1])
    if norm:
        gain, bias = norm
        normal, deviation = normalise(y)
        error = torch.addcmul(bias, normal, gain) + rows.k - rows.v
        d = [gradient(normal, deviation, error, gain)]
    else:
        error = y - rows.v
        d = [error]
    if loss_scale != 1:
        d[0] = d[0] * loss_scale
    for w, z in zip(base[:0:-1], hidden[::-1], strict=True):
        d.insert(0, fn.pull(torch.bmm(d[0], w.mT), z))
    return error, d, x


def _write(
    rows: _Rows,
    eta: Tensor | None,
    x: list[Tensor],
    d: list[Tensor],
    weights: Weights,
    momentum: Weights,
    anchor: Weights,
) -> tuple[Weights, Weights]:
    """Return the new W and S; S is () without ``eta``."""
    keep = 1 - rows.alpha
    new, surprise = [], []
    for i, w in enumerate(weights):
        stepped = (x[i] * -rows.step).mT
        if x[i].shape[1] > 1:
            s = stepped @ d[i] if eta is None else torch.baddbmm(momentum[i] * eta, stepped, d[i])
        else:  # faster than a product of matrices
            s = stepped * d[i] if eta is None else torch.addcmul(momentum[i] * eta, stepped, d[i])
        kept = torch.addcmul(s, w, keep)
        new.append(torch.addcmul(kept, anchor[i], rows.alpha) if anchor else kept)
        surprise.append(s)
    return tuple(new), () if eta is None else tuple(surprise)


def _read(q: Tensor, weights: Weights, norm: Weights, activation: str) -> Tensor:
    value = ACTIVATIONS[activation].value
    y = q
    for i, w in enumerate(weights):
        y = torch.bmm(value(y) if i else y, w)
    if norm:
        gain, bias = norm
        normal, _ = normalise(y)
        y = torch.addcmul(q + bias, normal, gain)
    return y


def _choose(rows: Tensor, yes: Weights, no: Weights) -> Weights:
    """Take ``yes`` in the marked rows; copies nothing where none is."""
    if not any_row(rows):
        return no
    return tuple(torch.where(rows, a, b) for a, b in zip(yes, no, strict=True))
