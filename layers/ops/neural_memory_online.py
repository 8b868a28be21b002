"""A linear neural memory that takes every gradient at its newest weights, in parallel all the same.

Titans (arXiv 2501.00663) with one memory layer and a gradient base that moves with every token:

    S_t = eta_t S_{t-1} - theta_t c k_t^T (k_t W_{t-1} - v_t),    W_t = (1 - alpha_t) W_{t-1} + S_t,    y_t = q_t W_t

For ``neural_memory`` that is ``chunk_size=1``, a loop over tokens. But ``W_{t-1}`` is linear in the errors before t,
so the errors of a chunk solve a triangular system. With the tables G, f, beta of ``neural_memory_tables`` (c goes
into theta) and ``d_t = v_t - k_t W_{t-1}``,

    W_t = beta_t W_0 + f_t S_0 + sum_{i<=t} G_{t,i} k_i^T d_i
    d_t + sum_{i<t} G_{t-1,i} (k_t . k_i) d_i = v_t - beta_{t-1} k_t W_0 - f_{t-1} k_t S_0

The right-hand side is linear in ``W_0`` and ``S_0``, so it is solved for all chunks at once before either is known:
``d = own - start [W_0; S_0]``. What is left to do chunk after chunk is two matrix products. Without momentum this is
the UT transform of the delta rule.
"""

from typing import Any

import torch
from torch import Tensor

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ops.chunk_grid import ChunkGrid
from memzoo.layers.ops.memory_arguments import (
    Weights,
    blank_behind,
    check_memory_arguments,
    to_rows,
    working_dtype,
)
from memzoo.layers.ops.neural_memory_tables import GateTables, gate_tables
from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.trace import Trace


def neural_memory_online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int = 32,
    loss_scale: float = 1.0,
    read: str = "post",
    anchor: Weights | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Weights, Weights]:
    """Write every token into a matrix memory, each step taken where the last one ended, and read it after each.

    Equals ``neural_memory(..., chunk_size=1)`` for a memory of one layer. A sequence may be cut into calls anywhere;
    the weights and the momentum are all there is to hand on.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        theta: Step size of each token's gradient.
        eta: Share of past surprise kept; None for a memory without momentum.
        alpha: Share of the memory forgotten.
        weights: The memory before the first token, one matrix. Not changed.
        momentum: Past surprise before the first token; zeros by default, ignored without ``eta``.
        chunk_size: Tokens computed in parallel. Speed, and rounding: the system it solves for keys that repeat under
            long momentum is ill-conditioned, in float32 to 2e-4 at 32 tokens and an eta of 0.99, four times that at 64.
        loss_scale: c of the gradient ``c (k W - v)``; the paper's main text has 2, its appendix 1.
        read: "post" reads after the token is written, "pre" before.
        anchor: Weights that forgetting decays towards; zeros by default.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        backend: "torch" or "auto", which is the same.

    Shape:
        q, k: (batch, time, heads, d). v: (batch, time, heads, d_v). theta, eta, alpha: (batch, time, heads).
        weights, momentum, anchor: one (batch, heads, d, d_v) each. lengths: (batch,).
        Returns y (batch, time, heads, d_v), the weights and the momentum after the last token; ``()`` without eta.

    Raises:
        ValueError: A shape does not fit, the memory has several layers, or an option is unknown.

    Reference:
        arXiv 2501.00663, sections 3.1 and 3.2; for the triangular system arXiv 2406.06484, the delta rule's. Loop
        twin: ``memzoo.layers.reference.neural_memory`` with ``chunk_size=1``.

    Note:
        The delta-rule family is this memory with ``eta=None``, ``loss_scale=1`` and other gates:

        - DeltaNet, step b: ``theta = b``, ``alpha = 0``.
        - Gated DeltaNet, ``W = a (W - b k^T k W) + b k^T v``: ``theta = a b``, ``alpha = 1 - a``, value ``v / a``, for
          a > 0. The other way round ``a = 1 - alpha``, ``b = theta / (1 - alpha)``, value ``(1 - alpha) v``. The paper
          calls the two equivalent; they are after this change of gates and values.
        - Longhorn with one step size a token, an implicit step: ``theta / (1 + theta |k|^2)``, ``alpha = 0``.

        One key seen over and over stays stable for c theta < (2 - alpha) (1 + eta) if it has unit length.
    """
    return neural_memory_online_scan(
        q, k, v, theta, eta, alpha, weights, momentum,
        chunk_size=chunk_size, loss_scale=loss_scale, read=read, anchor=anchor, lengths=lengths, backend=backend,
    )  # fmt: skip


def neural_memory_online_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int = 32,
    loss_scale: float = 1.0,
    read: str = "post",
    anchor: Weights | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
    trace: Trace | None = None,
) -> tuple[Tensor, Weights, Weights]:
    """``neural_memory_online`` for layers: also reports to a trace.

    Arguments, shapes and errors are those of ``neural_memory_online``. ``trace`` is told the ``surprise`` of every
    token and head, the norm of ``k_t W_{t-1} - v_t``, (batch, time, heads).
    """
    others = {"momentum": momentum, "anchor": anchor}
    check_memory_arguments(q, k, v, theta, eta, alpha, weights, others, lengths, 0, loss_scale=loss_scale)
    if len(weights) != 1:
        raise ValueError(
            f"weights has {len(weights)} layers; the online form exists for one alone, the linear memory: "
            f"use neural_memory(..., chunk_size=1) for a deeper one"
        )
    check_positive("chunk_size", chunk_size)
    check_choice("read", read, ("post", "pre"))
    check_choice("backend", backend, ("auto", "torch"))

    batch, time, heads, _ = q.shape
    dtype = working_dtype(q, theta, alpha, weights[0])
    q, k, v, theta = blank_behind(lengths, q, k, v, theta)  # the tables take no other gate from there
    grid = ChunkGrid.lay_out(batch, time, heads, chunk_size, 0, lengths, q.device)
    with no_autocast(q.device):
        q, k, v, theta, alpha = (grid.cut(t.to(dtype)) for t in (q, k, v, theta, alpha))
        kept = torch.zeros_like(theta) if eta is None else grid.cut(eta.to(dtype))
        tables = gate_tables(loss_scale * theta, kept, alpha, grid.real)
        start, past, towards = (to_rows(part, dtype) for part in (weights, momentum, anchor))
        if eta is None:
            past = ()
        elif not past:
            past = (torch.zeros_like(start[0]),)
        coefficients = _coefficients(tables, has_momentum=len(past) > 0, has_anchor=len(towards) > 0)
        first = 1 if read == "post" else 0
        y, error, *blocks = OnlineScan.apply(first, q, k, v, *coefficients, *start, *past, *towards)
        if trace is not None and trace.wants_signals:
            norm = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
            trace.signal("surprise", grid.join(norm)[..., 0])
    new_weights, *rest = (block.unflatten(0, (batch, heads)) for block in blocks)
    return grid.join(y), (new_weights,), tuple(rest[: len(past)])


def _coefficients(tables: GateTables, *, has_momentum: bool, has_anchor: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn gate tables into what ``OnlineScan`` takes: (table, carried, written, transition).

    The anchor is a block of its own that nothing changes: W_t has 1 - beta_t of it, as much as of W_0 is forgotten.
    """
    beta = tables.carry_weights
    carried, diagonal, written = [beta], [beta[..., -1]], [tables.write[..., -1, :]]
    if has_momentum:
        carried.append(tables.carry_momentum)
        diagonal.append(tables.momentum_carry)
        written.append(tables.momentum_write)
    if has_anchor:
        carried.append(1 - beta)
        diagonal.append(torch.ones_like(diagonal[0]))
        written.append(torch.zeros_like(written[0]))
    shares = torch.stack(carried, -1)
    others = torch.diag_embed(torch.stack(diagonal, -1))[..., 1:, :]
    return tables.write, shares, torch.stack(written, -1), torch.cat([shares[..., -1:, :], others], -2)


class OnlineScan(torch.autograd.Function):
    """``y, error, *carry = OnlineScan.apply(first, q, k, v, table, carried, written, transition, *carry)``.

    ``first``: tokens written before the first read, 1 or 0. ``error`` is v_t - k_t W_{t-1} and carries no gradient.
    Notation: J chunks, R rows (batch times heads), C tokens, b carried blocks, the first of which is W. The blocks lie
    under one another as one (b d, d_v) matrix, the ``state``; keys and queries are repeated and scaled to match.

    The inverse of the triangular system is formed: fewer columns to substitute than its right-hand side has, and none
    in the backward pass. That pass is written out, the forward one transposed and in reverse. It keeps the state at
    the start of every chunk and computes the products ``k k^T`` and ``q k^T`` again.

    Shape:
        q, k: (J, R, C, d). v, y, error: (J, R, C, d_v). table: (J, R, C + 1, C), G after t = 0..C tokens. carried:
        (J, R, C + 1, b), shares of the blocks in W then. written: (J, R, C, b), share of every token in the blocks
        after the chunk. transition: (J, R, b, b), shares of the old blocks (last axis) in them. carry: (R, d, d_v).
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        carried: Tensor,
        written: Tensor,
        transition: Tensor,
        *carry: Tensor,
    ) -> tuple[Tensor, ...]:
        chunks, _, size, _ = q.shape
        before, read = slice(0, size), slice(first, first + size)
        system = (k @ k.mT).mul_(table[:, :, before])  # strictly lower triangular, as G_{t-1} is
        one = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
        start, own = inverse @ _spread(k, carried[:, :, before]), inverse @ v

        blocks = q.new_empty(chunks + 1, *transition.shape[1:3], *carry[0].shape[1:])
        torch.stack(carry, 1, out=blocks[0])
        state, flat = blocks.flatten(2, 3), blocks.flatten(3)
        error, keys = torch.empty_like(v), _spread(k, written)
        for j in range(chunks):
            torch.baddbmm(own[j], start[j], state[j], alpha=-1, out=error[j])
            torch.bmm(transition[j], flat[j], out=flat[j + 1])
            state[j + 1].baddbmm_(keys[j].mT, error[j])

        y = _spread(q, carried[:, :, read]) @ state[:-1]
        y += (q @ k.mT).mul_(table[:, :, read]) @ error
        ctx.first = first
        ctx.save_for_backward(q, k, table, carried, written, transition, inverse, start, own, blocks, error)
        ctx.mark_non_differentiable(error)
        return (y, error, *(block.clone() for block in blocks[-1].unbind(1)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor, *d_carry: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(d_y.device):  # the caller's may be on
            return (None, *_backward(ctx, d_y, d_carry))


def _backward(ctx: Any, d_y: Tensor, d_carry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs of ``OnlineScan`` after ``first``, in their order."""
    q, k, table, carried, written, transition, inverse, start, own, blocks, error = ctx.saved_tensors
    chunks, _, size, _ = error.shape
    before, read = slice(0, size), slice(ctx.first, ctx.first + size)
    state, flat = blocks.flatten(2, 3), blocks.flatten(3)
    d_table, d_carried, d_blocks = torch.zeros_like(table), torch.zeros_like(carried), torch.empty_like(blocks)
    d_state, d_flat = d_blocks.flatten(2, 3), d_blocks.flatten(3)

    # The reads: y = spread(q) state + (table * q k^T) error.
    score = q @ k.mT
    d_error = (score * table[:, :, read]).mT @ d_y
    d_score = d_y @ error.mT
    d_table[:, :, read] = score.mul_(d_score)
    d_score.mul_(table[:, :, read])
    torch.matmul(_spread(q, carried[:, :, read]).mT, d_y, out=d_state[:-1])
    d_q, d_carried[:, :, read] = _spread_backward(d_y @ state[:-1].mT, q, carried[:, :, read])
    d_q += d_score @ k
    d_k = d_score.mT @ q

    # The chunks, last one first: error = own - start state, new state = transition state + spread(k)^T error.
    torch.stack(d_carry, 1, out=d_blocks[-1])
    keys = _spread(k, written)
    for j in range(chunks - 1, -1, -1):
        d_error[j].baddbmm_(keys[j], d_state[j + 1])
        d_flat[j].baddbmm_(transition[j].mT, d_flat[j + 1])
        d_state[j].baddbmm_(start[j].mT, d_error[j], alpha=-1)
    d_transition = d_flat[1:] @ flat[:-1].mT
    d_key, d_written = _spread_backward(error @ d_state[1:].mT, k, written)
    d_k += d_key

    # The triangular system: (1 + system) [start | own] = [spread(k) | v].
    d_start = (d_error @ state[:-1].mT).neg_()
    d_v, d_key = inverse.mT @ d_error, inverse.mT @ d_start
    d_system = (d_v @ own.mT).add_(d_key @ start.mT).neg_()
    d_table[:, :, before] += d_system * (k @ k.mT)
    d_score = d_system.mul_(table[:, :, before])
    d_k += (d_score + d_score.mT) @ k
    d_key, d_share = _spread_backward(d_key, k, carried[:, :, before])
    d_k += d_key
    d_carried[:, :, before] += d_share
    return d_q, d_k, d_v, d_table, d_carried, d_written, d_transition, *d_blocks[0].unbind(1)


def _spread(x: Tensor, shares: Tensor) -> Tensor:
    """Set copies of ``x`` (..., d) side by side, scaled by ``shares`` (..., b): (..., b d)."""
    return (shares[..., None] * x[..., None, :]).flatten(-2)


def _spread_backward(d_spread: Tensor, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``shares`` through ``_spread``."""
    d_spread = d_spread.unflatten(-1, (shares.shape[-1], x.shape[-1]))
    return (d_spread * shares[..., None]).sum(-2), (d_spread * x[..., None, :]).sum(-1)
