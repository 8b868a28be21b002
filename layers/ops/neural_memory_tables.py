"""Gate tables: how much of every token's gradient is in the memory after every token of a chunk.

With momentum, forgetting and per-token gates, the state after ``t`` tokens of a chunk is linear in what the chunk
started with and in its tokens' gradients ``g_i`` (Titans, arXiv 2501.00663, section 3.2; all of it scalar per head):

    S_t = eta_t S_{t-1} - theta_t g_t          =  m_t S_0             - sum_i n_{t,i} g_i
    W_t = (1 - alpha_t) W_{t-1} + S_t          =  beta_t W_0 + f_t S_0 - sum_i G_{t,i} g_i

The coefficients obey the recurrence itself, so they are computed by it: no division, no logarithm, exact at
``eta = 0`` and ``alpha = 1``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class GateTables:
    """Coefficients of the memory after t = 0..C tokens. Leading axes are those of the gates.

    Attributes:
        write: G, (..., C + 1, C). Weight of token i's negative gradient in W_t.
        carry_momentum: f, (..., C + 1). Weight of S_0 in W_t.
        carry_weights: beta, (..., C + 1). Weight of W_0 in W_t.
        momentum_write: n_C, (..., C). Weight of token i's negative gradient in S_C.
        momentum_carry: m_C, (...). Weight of S_0 in S_C.
    """

    write: Tensor
    carry_momentum: Tensor
    carry_weights: Tensor
    momentum_write: Tensor
    momentum_carry: Tensor


def gate_tables(theta: Tensor, eta: Tensor, alpha: Tensor, real: Tensor | None = None) -> GateTables:
    """Compute the tables of a chunk of C tokens.

    Args:
        theta: Step sizes.
        eta: Momentum gates.
        alpha: Forgetting gates.
        real: True at tokens that exist; the others change nothing. None if all exist.

    Shape:
        theta, eta, alpha, real: (..., C).
    """
    keep = 1 - alpha
    apply = None
    if real is not None:
        # A token that does not exist: S_t = S_{t-1}, W_t = W_{t-1}. No setting of the gates alone says that.
        theta, eta, keep = theta * real, torch.where(real, eta, 1), torch.where(real, keep, 1)
        apply = real.to(theta.dtype)
    shape = theta.shape
    columns = [None if gate is None else gate.reshape(-1, shape[-1]).T for gate in (theta, eta, keep, apply)]
    weights, momentum = _TableRecurrence.apply(*columns)
    size = shape[-1]
    weights = weights.transpose(0, 1).reshape(*shape[:-1], size + 1, size + 2)
    momentum = momentum.reshape(*shape[:-1], size + 2)
    return GateTables(
        write=weights[..., :size],
        carry_momentum=weights[..., size],
        carry_weights=weights[..., size + 1],
        momentum_write=momentum[..., :size],
        momentum_carry=momentum[..., size],
    )


class _TableRecurrence(torch.autograd.Function):
    """n_t = eta_t n_{t-1} + theta_t e_t and G_t = keep_t G_{t-1} + apply_t n_t, over rows of C + 2 columns.

    Columns are the C tokens, then S_0 and W_0; n_0 and G_0 are their unit vectors. Time is the first axis, so every
    step is one pass over contiguous memory. Written out, with its reverse, because autograd would keep and replay C
    small steps.
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, eta: Tensor, keep: Tensor, apply: Tensor | None) -> tuple[Tensor, Tensor]:
        size, rows = theta.shape
        momentum = theta.new_zeros(size + 1, rows, size + 2)
        weights = theta.new_zeros(size + 1, rows, size + 2)
        momentum[0, :, size] = 1
        weights[0, :, size + 1] = 1
        torch.diagonal(momentum[1:, :, :size], dim1=0, dim2=2).copy_(theta.T)
        for t in range(1, size + 1):
            momentum[t].addcmul_(momentum[t - 1], eta[t - 1, :, None])
        torch.mul(momentum[1:], 1 if apply is None else apply[:, :, None], out=weights[1:])
        for t in range(1, size + 1):
            weights[t].addcmul_(weights[t - 1], keep[t - 1, :, None])
        ctx.save_for_backward(eta, keep, apply, momentum, weights)
        return weights, momentum[size].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eta, keep, apply, momentum, weights = ctx.saved_tensors
        size = eta.shape[0]
        d_weights = grads[0].clone(memory_format=torch.contiguous_format)
        for t in range(size, 0, -1):
            d_weights[t - 1].addcmul_(d_weights[t], keep[t - 1, :, None])
        d_momentum = d_weights[1:] * (1 if apply is None else apply[:, :, None])
        d_momentum[-1] += grads[1]
        for t in range(size - 1, 0, -1):
            d_momentum[t - 1].addcmul_(d_momentum[t], eta[t, :, None])
        d_theta = torch.diagonal(d_momentum[:, :, :size], dim1=0, dim2=2).T
        d_eta = (d_momentum * momentum[:-1]).sum(-1)
        d_keep = (d_weights[1:] * weights[:-1]).sum(-1)
        return d_theta, d_eta, d_keep, None
