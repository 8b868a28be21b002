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

from memzoo.layers.ops.neural_memory_tables_cpp import CppCoefficients
from memzoo.layers.ops.once_differentiable import once_differentiable


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
        theta, eta, keep, apply = _skip(theta, eta, keep, real)
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


def chunk_coefficients(
    theta: Tensor, eta: Tensor | None, alpha: Tensor, real: Tensor | None, read: str, backend: str = "torch"
) -> tuple[Tensor, ...]:
    """Compute what a chunk with one (no momentum) or two carried blocks needs of its tables.

    Args:
        theta: Step sizes.
        eta: Momentum gates; None without momentum.
        alpha: Forgetting gates.
        real: True at tokens that exist; None if all do.
        read: "post" reads after the token is written, "pre" before.
        backend: "cpp" for C++, on the CPU.

    Shape:
        theta, eta, alpha, real: (n, R, C). Returns the fields of ``ChunkInputs`` after q, k, v with n in front: mix
        (n, R, C, C), read and write (n, k, R, C, 1), transition (n, k, k, R, 1, 1).
    """
    keep = 1 - alpha
    kept = torch.zeros_like(theta) if eta is None else eta
    apply = None
    if real is not None:
        theta, kept, keep, apply = _skip(theta, kept, keep, real)
    blocks, shift = 1 if eta is None else 2, 1 if read == "post" else 0
    coefficients: tuple[Tensor, ...]
    if backend == "cpp":
        coefficients = CppCoefficients.apply(theta, kept, keep, apply, blocks, shift)
    else:
        rows = (None if gate is None else gate.flatten(0, 1).T for gate in (theta, kept, keep, apply))
        coefficients = _Coefficients.apply(*rows, theta.shape[0], blocks, shift)
    return coefficients


def _skip(theta: Tensor, eta: Tensor, keep: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates with which a token that does not exist leaves S and W alone; no setting of theta, eta, alpha says that."""
    return torch.where(real, theta, 0), torch.where(real, eta, 1), torch.where(real, keep, 1), real.to(theta.dtype)


class _Coefficients(torch.autograd.Function):
    """The tables cut into a chunk's coefficients; apart from ``_TableRecurrence`` so that cutting costs no zeros."""

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eta: Tensor, keep: Tensor, apply: Tensor | None, num_chunks: int, blocks: int, row: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = len(theta)
        momentum, weights = _run(theta, eta, keep, apply)
        ctx.save_for_backward(eta, keep, apply, momentum, weights)
        ctx.num_chunks, ctx.blocks, ctx.row = num_chunks, blocks, row
        by_row = weights.unflatten(1, (num_chunks, -1)).permute(1, 2, 0, 3)  # (n, R, C + 1, C + 2)
        last = momentum[size].unflatten(0, (num_chunks, -1))  # (n, R, C + 2)
        reads = by_row[:, :, row : row + size]
        mix = reads[..., :size].contiguous()
        transition = weights.new_zeros(num_chunks, blocks, blocks, *last.shape[1:2], 1, 1)
        transition[:, 0, 0, :, 0, 0] = by_row[:, :, -1, size + 1]
        if blocks == 1:
            read, write = reads[:, None, ..., size + 1], by_row[:, None, :, -1, :size]
        else:
            read = torch.stack([reads[..., size + 1], reads[..., size]], 1)
            write = torch.stack([by_row[:, :, -1, :size], last[..., :size]], 1)
            transition[:, 0, 1, :, 0, 0] = by_row[:, :, -1, size]
            transition[:, 1, 1, :, 0, 0] = last[..., size]
        return mix, read[..., None].contiguous(), write[..., None].contiguous(), transition

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eta, keep, apply, momentum, weights = ctx.saved_tensors
        d_mix, (d_read, d_write), d_transition = grads[0], (g[..., 0] for g in grads[1:3]), grads[3][..., 0, 0]
        size = len(eta)
        d_weights, d_last = torch.zeros_like(weights), torch.zeros_like(momentum[size])
        by_row = d_weights.unflatten(1, (ctx.num_chunks, -1)).permute(1, 2, 0, 3)
        last = d_last.unflatten(0, (ctx.num_chunks, -1))
        reads = by_row[:, :, ctx.row : ctx.row + size]
        reads[..., :size] = d_mix
        reads[..., size + 1] = d_read[:, 0]
        by_row[:, :, -1, :size] += d_write[:, 0]
        by_row[:, :, -1, size + 1] += d_transition[:, 0, 0]
        if ctx.blocks == 2:
            reads[..., size] = d_read[:, 1]
            last[..., :size] = d_write[:, 1]
            by_row[:, :, -1, size] += d_transition[:, 0, 1]
            last[..., size] = d_transition[:, 1, 1]
        return *_run_backward(eta, keep, apply, momentum, weights, d_weights, d_last), None, None, None


class _TableRecurrence(torch.autograd.Function):
    """The tables themselves: weights (C + 1, rows, C + 2) and the last row of momentum (rows, C + 2)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, eta: Tensor, keep: Tensor, apply: Tensor | None) -> tuple[Tensor, Tensor]:
        momentum, weights = _run(theta, eta, keep, apply)
        ctx.save_for_backward(eta, keep, apply, momentum, weights)
        return weights, momentum[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        eta, keep, apply, momentum, weights = ctx.saved_tensors
        d_weights = grads[0].clone(memory_format=torch.contiguous_format)
        return _run_backward(eta, keep, apply, momentum, weights, d_weights, grads[1])


def _run(theta: Tensor, eta: Tensor, keep: Tensor, apply: Tensor | None) -> tuple[Tensor, Tensor]:
    """n_t = eta_t n_{t-1} + theta_t e_t and G_t = keep_t G_{t-1} + apply_t n_t, over rows of C + 2 columns.

    Columns are the C tokens, then S_0 and W_0; n_0 and G_0 are their unit vectors. Time is the first axis, so every
    step is one pass over contiguous memory. Written out, with its reverse, because autograd would keep and replay all
    the small steps.
    """
    size, rows = theta.shape
    momentum = theta.new_zeros(size + 1, rows, size + 2)
    weights = theta.new_zeros(size + 1, rows, size + 2)
    momentum[0, :, size] = 1
    weights[0, :, size + 1] = 1
    torch.diagonal(momentum[1:, :, :size], dim1=0, dim2=2).copy_(theta.T)
    momentum[1].addcmul_(momentum[0], eta[0, :, None])
    _accumulate(momentum[1:], eta)
    torch.mul(momentum[1:], 1 if apply is None else apply[:, :, None], out=weights[1:])
    weights[1].addcmul_(weights[0], keep[0, :, None])
    _accumulate(weights[1:], keep)
    return momentum, weights


def _run_backward(
    eta: Tensor,
    keep: Tensor,
    apply: Tensor | None,
    momentum: Tensor,
    weights: Tensor,
    d_weights: Tensor,
    d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return the gradients of ``_run``'s arguments; ``d_weights`` is used up."""
    size = eta.shape[0]
    _accumulate_back(d_weights[1:], keep)
    d_weights[0].addcmul_(d_weights[1], keep[0, :, None])
    d_keep = (d_weights[1:] * weights[:-1]).sum(-1)
    d_momentum = d_weights[1:] if apply is None else d_weights[1:] * apply[:, :, None]
    d_momentum[-1] += d_last
    _accumulate_back(d_momentum, eta)
    d_theta = torch.diagonal(d_momentum[:, :, :size], dim1=0, dim2=2).T
    d_eta = (d_momentum * momentum[:-1]).sum(-1)
    return d_theta, d_eta, d_keep, None


def _block_of(size: int) -> int:
    """Return the root, rounded down; by steps that a compiler follows where the size is a symbol to it."""
    block = 1
    while (block + 1) ** 2 <= size:
        block += 1
    return block


def _accumulate(x: Tensor, gate: Tensor) -> None:
    """``x_t += gate_t x_{t-1}`` in place, t = 1 .. T - 1: x (T, rows, columns), gate (T, rows).

    In blocks of about sqrt(T) steps: all blocks at once as if nothing came before them, then one after the other what
    did. That is 2 sqrt(T) passes over many rows in place of T over few, whose dispatch would cost more than they do.
    """
    size, block = len(x), _block_of(len(x))
    number = size // block
    blocks, gates = (part[: number * block].unflatten(0, (number, block)) for part in (x, gate[..., None]))
    reach = gates.clone()  # of what came before a block, at each of its steps
    for i in range(1, block):
        blocks[:, i].addcmul_(blocks[:, i - 1], gates[:, i])
        reach[:, i].mul_(reach[:, i - 1])
    for j in range(1, number):
        blocks[j].addcmul_(blocks[j - 1, -1], reach[j])
    for t in range(number * block, size):
        x[t].addcmul_(x[t - 1], gate[t, :, None])


def _accumulate_back(x: Tensor, gate: Tensor) -> None:
    """``x_{t-1} += gate_t x_t`` in place, t = T - 1 .. 1: the reverse of ``_accumulate``, likewise in blocks."""
    size, block = len(x), _block_of(len(x))
    number = size // block
    blocks, gates = (part[: number * block].unflatten(0, (number, block)) for part in (x, gate[..., None]))
    for t in range(size - 1, number * block - 1, -1):
        x[t - 1].addcmul_(x[t], gate[t, :, None])
    reach = torch.empty_like(gates[1:])  # of what comes behind a block, at each of its steps
    reach[:, -1] = gates[1:, 0]
    for i in range(block - 1, 0, -1):
        blocks[:, i - 1].addcmul_(blocks[:, i], gates[:, i])
        reach[:, i - 1] = reach[:, i] * gates[:-1, i]
    for j in range(number - 2, -1, -1):
        blocks[j].addcmul_(blocks[j + 1, 0], reach[j])
