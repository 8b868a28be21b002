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
from memzoo.layers.ops.chunk_grid import ChunkGrid
from memzoo.layers.ops.neural_memory_chunk import ChunkSettings, base_weights
from memzoo.layers.ops.neural_memory_chunk_scan import ChunkScan, where
from memzoo.layers.ops.neural_memory_norm import normalise
from memzoo.layers.ops.neural_memory_tables import chunk_coefficients
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.trace import Trace

Weights = tuple[Tensor, ...]


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
            a token whose squared norm is not finite writes nothing.
        norm: Gain and bias of a residual and a LayerNorm in the memory, M(x) = x + LN(MLP(x)), as in TTT; they are
            not trained inside. None for a plain MLP.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        checkpoint_chunks: Keep for the backward pass only the state before every so many chunks and compute the rest
            again, group by group: memory for one group's work instead of all. None keeps everything.
        backend: "torch" or "auto", which is the same.

    Shape:
        q, k: (batch, time, heads, d_0). v: (batch, time, heads, d_L). theta, eta, alpha: (batch, time, heads).
        weights, momentum, base, anchor: (batch, heads, d_{l-1}, d_l), l = 1..L. gain, bias: (heads, d_L).
        lengths: (batch,).
        Returns y (batch, time, heads, d_L), the weights and the momentum after the last token; ``()`` without eta.

    Raises:
        ValueError: A shape does not fit, or an option is unknown.

    Reference:
        arXiv 2501.00663, sections 3.1 and 3.2. Loop twin: ``memzoo.layers.reference.neural_memory``.

    Note:
        The paper's chunk index puts the last token of a chunk on its own weights; its worked example, which this
        follows, refreshes the base every ``chunk_size`` tokens before the token is written.
    """
    y, weights, momentum, _ = neural_memory_scan(
        q, k, v, theta, eta, alpha, weights, momentum,
        chunk_size=chunk_size, activation=activation, loss_scale=loss_scale, read=read, position=position, base=base,
        anchor=anchor, max_gradient_norm=max_gradient_norm, norm=norm, lengths=lengths,
        checkpoint_chunks=checkpoint_chunks, backend=backend,
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
    _check(
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
        norm,
    )
    check_positive("chunk_size", chunk_size)
    check_choice("read", read, ("post", "pre"))
    check_choice("backend", backend, ("auto", "torch"))
    check_choice("activation", activation, ACTIVATIONS)
    if not loss_scale > 0:
        raise ValueError(f"loss_scale={loss_scale} is not positive; use 1 for half the squared error, 2 for all of it")
    if max_gradient_norm is not None and not max_gradient_norm > 0:
        raise ValueError(f"max_gradient_norm={max_gradient_norm} is not positive; use None for no limit")

    if checkpoint_chunks is not None:
        check_positive("checkpoint_chunks", checkpoint_chunks, "use None to keep everything")
    batch, time, heads, _ = q.shape
    dtype = torch.float32
    for given in (q, theta, alpha, weights[0]):
        dtype = torch.promote_types(dtype, given.dtype)
    if lengths is not None:  # what lies behind a row may be NaN, and 0 * NaN would spread it
        behind = torch.arange(time, device=q.device) >= lengths[:, None]
        q, k, v = (x.masked_fill(behind[:, :, None, None], 0) for x in (q, k, v))
        theta, alpha = (gate.masked_fill(behind[:, :, None], 0) for gate in (theta, alpha))
        eta = None if eta is None else eta.masked_fill(behind[:, :, None], 0)
    grid = ChunkGrid.lay_out(batch, time, heads, chunk_size, position, lengths, q.device)
    with no_autocast(q.device):
        q, k, v, theta, alpha = (grid.cut(t.to(dtype)) for t in (q, k, v, theta, alpha))
        eta = None if eta is None else grid.cut(eta.to(dtype))
        start, past, given_base, anchor = (_to_rows(part, dtype) for part in (weights, momentum, base, anchor))
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
        )
        first = tuple(w - m for w, m in zip(start, anchor, strict=True)) if anchor else start
        norm_rows = () if norm is None else tuple(t.to(dtype).repeat(batch, 1)[:, None] for t in norm)
        reads, errors, carry, last_base = _scan(
            settings,
            read,
            checkpoint_chunks,
            grid,
            (q, k, v, theta, eta, alpha),
            (*first, *past),
            base,
            anchor,
            norm_rows,
        )
        depth = len(start)
        new_weights, new_momentum = base_weights(carry[:depth], anchor), carry[depth:]
        if anchor and grid.reached is not None:  # a row without tokens stays as it is, to the bit
            new_weights = where(grid.reached[0], new_weights, start)
        if isinstance(grid.ends_at_border, Tensor):
            last_base = where(grid.ends_at_border, new_weights, last_base)
        elif grid.ends_at_border:
            last_base = new_weights
        y = grid.join(reads)
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
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor],
    carry: Weights,
    base: Weights | None,
    anchor: Weights,
    norm: Weights,
) -> tuple[Tensor, Tensor, Weights, Weights]:
    """Scan all chunks, ``group`` of them at a time; return reads, errors, carry and last base."""
    num_chunks, depth = grid.chunks, settings.depth
    q, k, v, theta, eta, alpha = inputs
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
        gates = (theta[here], None if eta is None else eta[here], alpha[here])
        y, error, *ends = part(q[here], k[here], v[here], gates, *carry, *own_base, *anchor, *norm)
        carry = tuple(ends[: len(carry)])
        last_base = tuple(ends[len(carry) :]) or last_base
        reads.append(y)
        errors.append(error)
    if len(reads) == 1:
        return reads[0], errors[0], carry, last_base
    return torch.cat(reads), torch.cat(errors), carry, last_base


def _scan_group(
    settings: ChunkSettings,
    read: str,
    real: Tensor | None,
    reached: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor | None, Tensor],
    *states: Tensor,
) -> Weights:
    """Scan consecutive chunks: from gates to ``ChunkScan``."""
    coefficients = chunk_coefficients(*gates, real, read)
    scanned: Weights = ChunkScan.apply(settings, reached, q, k, v, *coefficients, *states)
    if not settings.has_norm:
        return scanned
    gain, bias = states[-2:]
    normal, _ = normalise(scanned[0])
    return (torch.addcmul(q + bias, normal, gain), *scanned[1:])


def _to_rows(part: Weights | None, dtype: torch.dtype) -> Weights:
    return tuple(t.to(dtype).flatten(0, 1) for t in part or ())


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    others: dict[str, Weights | None],
    lengths: Tensor | None,
    position: int | Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, time, heads, key width), time >= 1")
    batch, time, heads, width = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must match q, {tuple(q.shape)}")
    for name, gate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}; it must be (batch, time, heads) = {(batch, time, heads)}"
            )
    if not isinstance(weights, tuple | list) or not weights:
        given = "()" if not isinstance(weights, Tensor) else "Tensor"
        raise ValueError(
            f"weights={given} is no memory; pass a tuple with one (batch, heads, d_in, d_out) matrix a layer"
        )
    for i, w in enumerate(weights):
        if w.dim() != 4 or w.shape[:3] != (batch, heads, width):
            raise ValueError(
                f"weights[{i}] has shape {tuple(w.shape)}; it must be (batch, heads, d_in, d_out) = "
                f"({batch}, {heads}, {width}, d_out) to follow what comes before it"
            )
        width = w.shape[3]
    if v.shape != (batch, time, heads, width):
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be {(batch, time, heads, width)}: the memory's output")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating-point dtype")
    for name, part in others.items():
        if part and [t.shape for t in part] != [w.shape for w in weights]:
            shapes = [tuple(t.shape) for t in part]
            raise ValueError(
                f"{name} has shapes {shapes}; they must be those of weights, {[tuple(w.shape) for w in weights]}"
            )
    if norm is not None:
        if v.shape != q.shape:
            raise ValueError(f"norm adds M(x) to x, but v has width {v.shape[-1]} and q {q.shape[-1]}; make them equal")
        if [t.shape for t in norm] != [(heads, width)] * 2:
            shapes = [tuple(t.shape) for t in norm]
            raise ValueError(f"norm has shapes {shapes}; gain and bias must be (heads, width) = {(heads, width)} each")
    for name, numbers in (("lengths", lengths), ("position", position)):
        if isinstance(numbers, Tensor) and (numbers.shape != (batch,) or numbers.is_floating_point()):
            raise ValueError(
                f"{name} has shape {tuple(numbers.shape)} and dtype {numbers.dtype}; "
                f"it must be (batch,) = ({batch},) integers"
            )
