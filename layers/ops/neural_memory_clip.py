"""A limit on the norm of each token's gradient, over all layers of a memory, and its backward pass.

The gradient of layer l is the outer product of its input ``x`` and its error ``d``, so its squared norm is
``|x|^2 |d|^2`` and scaling the errors scales it.
"""

import torch
from torch import Tensor


def clip_factor(x: list[Tensor], d: list[Tensor], limit: float) -> Tensor:
    """Factor that brings each token's gradient to a norm of at most ``limit``. (R, C, 1).

    Exactly 1 below it, and 0 where the square of the norm is not finite.
    """
    squared = _squared_norms(x, d)
    factor = torch.where(squared > limit * limit, limit * squared.clamp_min(limit * limit).rsqrt(), 1)
    return torch.where(squared.isfinite(), factor, 0)


def clip_errors(d: Tensor, factor: Tensor) -> Tensor:
    """Scale; a factor of 0 drops what is infinite or not a number too."""
    return torch.where(factor > 0, d * factor, 0)


def clip_backward(x: list[Tensor], d: list[Tensor], clip: Tensor, d_x: list[Tensor], d_d: list[Tensor]) -> list[Tensor]:
    """Turn gradients of the clipped errors ``d`` into those of the raw ones, in place; add those of ``x``.

    With raw errors u = d / clip and n^2 their squared norm, clip = limit / n where it acts, so
    d clip / d n^2 = -clip / (2 n^2), and n^2 is quadratic in u and in x. Dropped errors get no gradient.

    Returns:
        The raw errors; zeros where they were dropped.
    """
    written = clip > 0
    raw = [torch.where(written, d_i / clip, 0) for d_i in d]
    d_clip = torch.stack([(g * u).sum(-1, keepdim=True) for g, u in zip(d_d, raw, strict=True)]).sum(0)
    acts = written & (clip < 1)
    d_squared = d_clip * clip / (-2 * _squared_norms(x, raw))
    for i, u in enumerate(raw):
        of_x, of_u = (t.square().sum(-1, keepdim=True) for t in (x[i], u))  # infinite, perhaps, of a dropped token
        d_d[i].mul_(clip).addcmul_(u, torch.where(acts, 2 * d_squared * of_x, 0))
        d_x[i].addcmul_(x[i], torch.where(acts, 2 * d_squared * of_u, 0))
    return raw


def _squared_norms(x: list[Tensor], d: list[Tensor]) -> Tensor:
    """Squared norm of each token's gradient, all layers together: the sum of |x|^2 |d|^2. (R, C, 1)."""
    layers = [
        x_i.square().sum(-1, keepdim=True) * d_i.square().sum(-1, keepdim=True) for x_i, d_i in zip(x, d, strict=True)
    ]
    return torch.stack(layers).sum(0)
