"""ROME and MEMIT in one layer, spelt out. Slow, and the definition of what is right.

ROME (arXiv 2202.05262, section 3.1). A matrix W, b gives v = W k + b for what it reads. With C = E[k k^T] over texts:

    k* = mean over the wordings of an edit of k at the key token
    d  = argmin  L(d) + w |d| / |W k* + b|^2,    |d| <= c |W k* + b|,    by Adam from 0
    v* = W k* + b + d
    W <- W + (v* - W k* - b) (C^-1 k*)^T / ((C^-1 k*)^T k*)

MEMIT (arXiv 2210.07229, equation 14) in one layer, the columns of K and of R = V - W K - b being edits:

    W <- W + R K^T (lambda C + K K^T)^-1
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def key_of(reads: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """Return the mean of what the matrix reads at one token of each wording, (width,).

    Args:
        reads: (time, width), of each wording.
        positions: Of the key token in each.
    """
    total = torch.zeros_like(reads[0][0])
    for read, position in zip(reads, positions, strict=True):
        total = total + read[position]
    return total / len(reads)


def covariance(keys: Tensor) -> Tensor:
    """Return ``E[k k^T]`` of keys (number, width), (width, width)."""
    total = torch.zeros(keys.shape[1], keys.shape[1], dtype=keys.dtype)
    for key in keys:
        total = total + torch.outer(key, key)
    return total / len(keys)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return ``KL(after || before)`` of logits (rows, answers), the mean over rows."""
    total = before.new_zeros(())
    for old, new in zip(before, after, strict=True):
        p, q = new.softmax(-1), old.softmax(-1)
        total = total + (p * (p.log() - q.log())).sum()
    return total / len(before)


def find_change(
    answer: Loss, other: Loss, said: Tensor, *, steps: int, lr: float, clamp: float, decay: float, stop: float
) -> Tensor:
    """Return ``d`` (dim,): Adam with its usual constants, each step cut to ``clamp |said|``.

    Args:
        answer: Loss of the answer, a function of ``d``.
        other: What else is to be small.
        said: ``W k* + b``.
        steps: At most.
        lr: Of Adam.
        clamp: How long ``d`` may be.
        decay: Weight of its length.
        stop: It ends where the loss of the answer is below this.
    """
    change, mean, square = torch.zeros_like(said), torch.zeros_like(said), torch.zeros_like(said)
    for step in range(1, steps + 1):
        leaf = change.clone().requires_grad_()
        loss = answer(leaf)
        if loss.item() < stop:
            break
        length = leaf.norm() if step > 1 else leaf.sum() * 0  # whose gradient at 0 is taken to be 0
        (gradient,) = torch.autograd.grad(loss + other(leaf) + decay * length / said.norm() ** 2, leaf)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        change = change - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        if change.norm() > clamp * said.norm():
            change = change * clamp * said.norm() / change.norm()
    return change


def rome(weight: Tensor, bias: Tensor, key: Tensor, value: Tensor, covariance: Tensor) -> Tensor:
    """Return the matrix that gives ``value`` at ``key``.

    Shape:
        weight: (dim, width). bias: (dim,). key: (width,). value: (dim,). covariance: (width, width).
    """
    whitened: Tensor = torch.linalg.inv(covariance) @ key
    return weight + torch.outer(value - weight @ key - bias, whitened) / (whitened @ key)


def memit(weight: Tensor, bias: Tensor, keys: Tensor, values: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """Return the matrix that nearly gives ``values`` at ``keys``; the columns of both are edits.

    Shape:
        weight: (dim, width). bias: (dim,). keys: (width, edits). values: (dim, edits). covariance: (width, width).
    """
    residual = values - weight @ keys - bias[:, None]
    inverse: Tensor = torch.linalg.inv(ridge * covariance + keys @ keys.T)
    return weight + residual @ keys.T @ inverse
