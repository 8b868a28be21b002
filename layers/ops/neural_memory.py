"""Titans' neural memory (arXiv 2501.00663): a small network trained inside the forward pass, in chunks of matmuls.

    S_t = eta_t S_{t-1} - theta_t grad_t,    W_t = (1 - alpha_t) W_{t-1} + S_t,    y_t = M(W_t; q_t)

``grad_t`` is the gradient of ``loss_scale / 2 |M(W_b; k_t) - v_t|^2`` at ``W_b``, the weights at the start of the
token's chunk. So ``chunk_size`` is part of the model. Everything inside a chunk is parallel and exact
(``neural_memory_chunk``); chunks follow one another.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.chunk_grid import ChunkGrid
from memzoo.layers.ops.memory_arguments import (
    Weights,
    blank_behind,
    check_memory_arguments,
    to_rows,
    working_dtype,
)
from memzoo.layers.ops.neural_memory_chunk import ChunkSettings, base_weights
from memzoo.layers.ops.neural_memory_chunk_scan import ChunkScan, where
from memzoo.layers.ops.neural_memory_fused import BACKENDS, FusedScan, choose_fused, chunk_width
from memzoo.layers.ops.neural_memory_norm import normalise
from memzoo.layers.ops.neural_memory_step import neural_memory_step
from memzoo.layers.ops.neural_memory_tables import chunk_coefficients
from memzoo.layers.ops.neural_memory_window import Recent, check_window, share_out, with_recent
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.trace import Trace


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int,
    activation: str = "silu",
    loss_scale: float = 1.0,
    read: str = "post",
    position: int | Tensor = 0,
    base: Weights | None = None,
    anchor: Weights | None = None,
    max_gradient_norm: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    window: int = 1,
    gamma: Tensor | None = None,
    recent: Recent | None = None,
    lengths: Tensor | None = None,
    checkpoint_chunks: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Weights, Weights]:
    """Write every token into a memory and read it after each.

    To go on from the middle of a chunk the gradient base is needed too: ``neural_memory_scan`` returns it.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        theta: Step size of each token's gradient.
        eta: Share of past surprise kept; None for a memory without momentum.
        alpha: Share of the memory forgotten.
        weights: The memory before the first token, a matrix a layer. Not changed.
        momentum: Past surprise before the first token; zeros by default, ignored without ``eta``.
        chunk_size: Tokens whose gradients share one base. Part of the model.
        activation: Between memory layers: "silu", "gelu", "relu", "identity".
        loss_scale: c of the gradient ``c (M(k) - v)``; the paper's main text has 2, its appendix 1.
        read: "post" reads after the token is written, "pre" before.
        position: Tokens absorbed before these, one number or one a row; its remainder by ``chunk_size`` counts.
        base: Weights at the start of the running chunk, where ``position`` is inside one; ``weights`` by default.
        anchor: Weights that forgetting decays towards; zeros by default.
        max_gradient_norm: Each token's gradient, all layers of a head's memory together, is scaled down to this norm;
            a token whose squared norm is not finite writes nothing. That is computed as the squares of inputs times
            those of errors, either of which may overflow by itself. With "triton" keys must be finite, and what the
            first layer makes of them.
        norm: Gain and bias of a residual and a LayerNorm in the memory, M(x) = x + LN(MLP(x)), as in TTT; they are
            not trained inside. None for a plain MLP.
        window: Tokens whose losses a step descends, its own the last: the Omega rule of ATLAS. The chunk's gradients
            are all taken at its base, those of tokens before it too. 1 is Titans.
        gamma: Share of each token's loss in the steps that see it; 1 by default.
        recent: Keys, values and shares of the ``window - 1`` tokens before the first; none by default.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        checkpoint_chunks: Keep for the backward pass only the state before every so many chunks and compute the rest
            again, group by group: memory for one group's work instead of all. None keeps everything.
        backend: "torch"; "auto", which is the same; "cpp" or "triton", one kernel forward and one backward, without
            ``window`` and ``gamma``: the first on a CPU, compiled when it is first used, of widths and chunks that 16
            divides; the second on a GPU, of a memory of two layers without ``norm`` and ``checkpoint_chunks``.

    Shape:
        q, k: (batch, time, heads, d_0). v: (batch, time, heads, d_L). theta, eta, alpha, gamma: (batch, time, heads).
        weights, momentum, base, anchor: (batch, heads, d_{l-1}, d_l), l = 1..L. gain, bias: (heads, d_L).
        recent: as k, v and gamma, of window - 1 tokens. lengths: (batch,).
        Returns y (batch, time, heads, d_L), the weights and the momentum after the last token; ``()`` without eta.

    Raises:
        ValueError: A shape does not fit, or an option is unknown.

    Reference:
        arXiv 2501.00663, sections 3.1 and 3.2; the window, arXiv 2505.23735, equation 9.
        Loop twin: ``memzoo.layers.reference.neural_memory``.

    Note:
        The paper's chunk index puts the last token of a chunk on its own weights; its worked example, which this
        follows, refreshes the base every ``chunk_size`` tokens before the token is written.
    """
    y, weights, momentum, _ = neural_memory_scan(
        q, k, v, theta, eta, alpha, weights, momentum,
        chunk_size=chunk_size, activation=activation, loss_scale=loss_scale, read=read, position=position, base=base,
        anchor=anchor, max_gradient_norm=max_gradient_norm, norm=norm, window=window, gamma=gamma, recent=recent,
        lengths=lengths, checkpoint_chunks=checkpoint_chunks, backend=backend,
    )  # fmt: skip
    return y, weights, momentum


def neural_memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int,
    activation: str = "silu",
    loss_scale: float = 1.0,
    read: str = "post",
    position: int | Tensor = 0,
    base: Weights | None = None,
    anchor: Weights | None = None,
    max_gradient_norm: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    window: int = 1,
    gamma: Tensor | None = None,
    recent: Recent | None = None,
    lengths: Tensor | None = None,
    checkpoint_chunks: int | None = None,
    backend: str = "auto",
    trace: Trace | None = None,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """``neural_memory`` for a sequence that comes in pieces: also returns the gradient base to go on from.

    Arguments, shapes and errors are those of ``neural_memory``. The returned base is the weights at the start of the
    chunk that the next token belongs to. ``trace`` is told the ``surprise`` of every token and head, the norm of
    ``M(W_b; k) - v``, (batch, time, heads).
    """
    check_memory_arguments(
        q,
        k,
        v,
        theta,
        eta,
        alpha,
        weights,
        {"momentum": momentum, "base": base, "anchor": anchor},
        lengths,
        position,
        loss_scale=loss_scale,
        norm=norm,
    )
    check_positive("chunk_size", chunk_size)
    check_positive("window", window, "1 is a step on a token's own loss")
    check_window(window, gamma, recent, k, v)
    check_choice("read", read, ("post", "pre"))
    check_backend(backend, BACKENDS)
    check_choice("activation", activation, ACTIVATIONS)
    if max_gradient_norm is not None and not max_gradient_norm > 0:
        raise ValueError(f"max_gradient_norm={max_gradient_norm} is not positive; use None for no limit")

    if checkpoint_chunks is not None:
        check_positive("checkpoint_chunks", checkpoint_chunks, "use None to keep everything")
    batch, time, heads, _ = q.shape
    dtype = working_dtype(q, theta, alpha, weights[0])
    q, k, v, theta = blank_behind(lengths, q, k, v, theta)  # the tables take no other gate from there
    is_windowed = window > 1 or gamma is not None
    gamma = None if gamma is None else blank_behind(lengths, gamma.to(dtype))[0]
    if time == 1 and isinstance(position, Tensor) and not torch.is_grad_enabled():  # generation
        y, error, new_weights, new_momentum, last_base = neural_memory_step(
            q, k, v, theta, eta, alpha, weights, momentum,
            chunk_size=chunk_size, activation=activation, loss_scale=loss_scale, read=read, position=position,
            base=base, anchor=anchor, max_gradient_norm=max_gradient_norm, norm=norm, window=window, gamma=gamma,
            recent=recent, lengths=lengths,
        )  # fmt: skip
        if trace is not None and trace.wants_signals:
            trace.signal("surprise", error)
        return y, new_weights, new_momentum, last_base

    with no_autocast(q.device):
        q, k, v = (t.to(dtype) for t in (q, k, v))
        backend = choose_fused(
            backend, (q, k, v), weights,
            chunk_size=chunk_size, residual_norm=norm is not None, window=window, gamma=gamma,
            checkpoint_chunks=checkpoint_chunks,
        )  # fmt: skip
        width = chunk_width(backend, time, chunk_size)
        grid = ChunkGrid.lay_out(batch, time, heads, chunk_size, position, lengths, q.device, width)
        theta, alpha = (grid.cut(t.to(dtype)) for t in (theta, alpha))
        eta = None if eta is None else grid.cut(eta.to(dtype))
        start, past, given_base, anchor = (to_rows(part, dtype) for part in (weights, momentum, base, anchor))
        if eta is None:
            past = ()
        elif not past:
            past = tuple(torch.zeros_like(w) for w in start)
        # Rows at a chunk border take their gradient base from the weights, others from the chunk that is running.
        base = None if grid.at_border is None else where(grid.at_border, start, given_base or start)
        settings = ChunkSettings(
            depth=len(weights),
            blocks=2 if past else 1,
            activation=activation,
            loss_scale=loss_scale,
            max_gradient_norm=max_gradient_norm,
            has_base=base is not None,
            has_anchor=len(anchor) > 0,
            has_norm=norm is not None,
            keeps_work=torch.is_grad_enabled(),
            backend=backend,
            group=checkpoint_chunks or 1,
        )
        first = tuple(w - m for w, m in zip(start, anchor, strict=True)) if anchor else start
        norm_rows = () if norm is None else tuple(t.to(dtype).repeat(batch, 1)[:, None] for t in norm)
        carry = (*first, *past)
        if backend == "torch":
            shares = None
            if is_windowed:
                k, v, shares = with_recent(k, v, gamma, recent, window)
                shares = grid.cut(shares, window - 1)
            inputs = (grid.cut(q), grid.cut(k, window - 1), grid.cut(v, window - 1), theta, eta, alpha, shares)
            y, errors, carry, last_base = _scan(
                settings, read, checkpoint_chunks, grid, inputs, carry, base, anchor, norm_rows
            )
            errors = errors[..., window - 1 :]
        else:
            y, errors, carry, last_base = _scan_fused(
                settings, read, grid, (q, k, v), (theta, eta, alpha), carry, base, anchor, norm_rows
            )
        depth = len(start)
        new_weights, new_momentum = base_weights(carry[:depth], anchor), carry[depth:]
        if anchor and grid.reached is not None:  # a row without tokens stays as it is, to the bit
            new_weights = where(grid.reached[0], new_weights, start)
        if isinstance(grid.ends_at_border, Tensor):
            last_base = where(grid.ends_at_border, new_weights, last_base)
        elif grid.ends_at_border:
            last_base = new_weights
        if trace is not None and trace.wants_signals:
            trace.signal("surprise", grid.join(errors[..., None])[..., 0])
    new_weights, new_momentum, last_base = (
        tuple(t.unflatten(0, (batch, heads)) for t in part) for part in (new_weights, new_momentum, last_base)
    )
    return y, new_weights, new_momentum, last_base


def _scan(
    settings: ChunkSettings,
    read: str,
    group: int | None,
    grid: ChunkGrid,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    carry: Weights,
    base: Weights | None,
    anchor: Weights,
    norm: Weights,
) -> tuple[Tensor, Tensor, Weights, Weights]:
    """Scan all chunks, ``group`` of them at a time; return what was read, errors, carry and last base."""
    num_chunks, depth = grid.chunks, settings.depth
    q, k, v, theta, eta, alpha, shares = inputs
    reads, errors = [], []
    last_base = base or base_weights(carry[:depth], anchor)
    for begin in range(0, num_chunks, group or num_chunks):
        here = slice(begin, begin + (group or num_chunks))
        real, reached = (None if t is None else t[here] for t in (grid.real, grid.reached))
        if begin:
            start = base_weights(carry[:depth], anchor)
            last_base = start if reached is None else where(reached[0], start, last_base)
            settings = replace(settings, has_base=reached is not None)
        own_base = last_base if settings.has_base else ()
        part = functools.partial(_scan_group, settings, read, real, reached)
        if group is not None and settings.keeps_work:
            part = functools.partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        gates = theta[here], None if eta is None else eta[here], alpha[here], None if shares is None else shares[here]
        y, error, *ends = part(q[here], k[here], v[here], gates, *carry, *own_base, *anchor, *norm)
        carry = tuple(ends[: len(carry)])
        last_base = tuple(ends[len(carry) :]) or last_base
        reads.append(y)
        errors.append(error)
    if len(reads) == 1:
        return grid.join(reads[0]), errors[0], carry, last_base
    return grid.join(torch.cat(reads)), torch.cat(errors), carry, last_base


def _scan_fused(
    settings: ChunkSettings,
    read: str,
    grid: ChunkGrid,
    tokens: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Tensor, Tensor | None, Tensor],
    carry: Weights,
    base: Weights | None,
    anchor: Weights,
    norm: Weights,
) -> tuple[Tensor, Tensor, Weights, Weights]:
    """Scan all chunks by a kernel, which takes q, k, v as they lie; return what ``_scan`` does."""
    coefficients = chunk_coefficients(*gates, grid.real, read, settings.backend)
    rows = [grid.fill(t) for t in tokens]
    y, errors, *ends = FusedScan.apply(
        settings, grid.reached, *rows, *coefficients, *carry, *(base or ()), *anchor, *norm
    )
    if norm:
        gain, bias = (t.unflatten(0, (-1, grid.heads)).transpose(1, 2) for t in norm)
        normal, _ = normalise(y)
        y = torch.addcmul(rows[0] + bias, normal, gain)
    last_base = tuple(ends[len(carry) :]) or base or base_weights(carry[: settings.depth], anchor)
    return grid.drain(y), errors, tuple(ends[: len(carry)]), last_base


def _scan_group(
    settings: ChunkSettings,
    read: str,
    real: Tensor | None,
    reached: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    *states: Tensor,
) -> Weights:
    """Scan consecutive chunks."""
    theta, eta, alpha, shares = gates
    coefficients = chunk_coefficients(theta, eta, alpha, real, read)
    if shares is not None:
        coefficients = share_out(coefficients, shares)
    scanned: Weights = ChunkScan.apply(settings, reached, q, k, v, *coefficients, *states)
    if not settings.has_norm:
        return scanned
    gain, bias = states[-2:]
    normal, _ = normalise(scanned[0])
    return (torch.addcmul(q + bias, normal, gain), *scanned[1:])
