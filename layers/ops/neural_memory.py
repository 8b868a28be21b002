"""Titans' neural memory (arXiv 2501.00663): a small network trained inside the forward pass, in chunks of matmuls.

    S_t = eta_t S_{t-1} - theta_t grad_t,    W_t = (1 - alpha_t) W_{t-1} + S_t,    y_t = M(W_t; q_t)

``grad_t`` is the gradient of ``loss_scale / 2 |M(W_b; k_t) - v_t|^2`` at ``W_b``, the weights at the start of the
token's chunk. So ``chunk_size`` is part of the model. Everything inside a chunk is parallel and exact
(``neural_memory_chunk``); chunks follow one another.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.neural_memory_chunk import Chunk, ChunkSettings
from memzoo.layers.ops.neural_memory_tables import GateTables, gate_tables
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
    lengths: Tensor | None = None,
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
        max_gradient_norm: Each token's gradient, all layers of a head's memory together, is scaled down to this norm.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        backend: "torch" or "auto", which is the same.

    Shape:
        q, k: (batch, time, heads, d_0). v: (batch, time, heads, d_L). theta, eta, alpha: (batch, time, heads).
        weights, momentum, base, anchor: (batch, heads, d_{l-1}, d_l), l = 1..L. lengths: (batch,).
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
        anchor=anchor, max_gradient_norm=max_gradient_norm, lengths=lengths, backend=backend,
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
    lengths: Tensor | None = None,
    backend: str = "auto",
    trace: Trace | None = None,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """``neural_memory`` for a sequence that comes in pieces: also returns the gradient base to go on from.

    Arguments, shapes and errors are those of ``neural_memory``. The returned base is the weights at the start of the
    chunk that the next token belongs to. ``trace`` is told the ``surprise`` of every token and head, the norm of
    ``M(W_b; k) - v``, (batch, time, heads).
    """
    _check(
        q, k, v, theta, eta, alpha, weights, {"momentum": momentum, "base": base, "anchor": anchor}, lengths, position
    )
    check_positive("chunk_size", chunk_size)
    check_choice("read", read, ("post", "pre"))
    check_choice("backend", backend, ("auto", "torch"))
    check_choice("activation", activation, ACTIVATIONS)
    if not loss_scale > 0:
        raise ValueError(f"loss_scale={loss_scale} is not positive; use 1 for half the squared error, 2 for all of it")
    if max_gradient_norm is not None and not max_gradient_norm > 0:
        raise ValueError(f"max_gradient_norm={max_gradient_norm} is not positive; use None for no limit")

    batch, time, heads, _ = q.shape
    depth = len(weights)
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
        kept = torch.zeros_like(theta) if eta is None else grid.cut(eta.to(dtype))
        tables = gate_tables(theta, kept, alpha, grid.real)
        inputs = (q, k, v, *_coefficients(tables, has_momentum=eta is not None, read=read))

        start, past, given_base, towards = (_to_rows(part, dtype) for part in (weights, momentum, base, anchor))
        if eta is None:
            past = ()
        elif not past:
            past = tuple(torch.zeros_like(w) for w in start)
        # Rows at a chunk border take their gradient base from the weights, others from the chunk that is running.
        first_base = () if grid.at_border is None else _where(grid.at_border, start, given_base or start)
        settings = ChunkSettings(
            depth=depth,
            blocks=2 if past else 1,
            activation=activation,
            loss_scale=loss_scale,
            max_gradient_norm=max_gradient_norm,
            has_base=grid.at_border is not None,
            has_anchor=len(towards) > 0,
            reports_error=trace is not None and trace.wants_signals,
        )
        first_block = tuple(w - m for w, m in zip(start, towards, strict=True)) if towards else start
        carry, last_base, reads, errors = (*first_block, *past), first_base or start, [], []
        for j, chunk_inputs in enumerate(zip(*(t.unbind(0) for t in inputs), strict=True)):
            if j:
                last_base = _where(grid.reached(j), _weights(carry[:depth], towards), last_base)
            own_base = first_base if j == 0 else ()
            settings = settings if j == 0 else replace(settings, has_base=False)
            y, *new = Chunk.apply(settings, *chunk_inputs, *carry, *own_base, *towards)
            carry = tuple(new[: len(carry)])
            reads.append(y)
            errors += new[len(carry) :]

        new_weights, new_momentum = _weights(carry[:depth], towards), carry[depth:]
        if towards and lengths is not None:  # a row without tokens stays as it is, to the bit
            new_weights = _where(grid.reached(0), new_weights, start)
        last_base = _where(grid.ends_at_border, new_weights, last_base)
        y = grid.join(torch.stack(reads))
        if trace is not None and errors:
            trace.signal("surprise", grid.join(torch.stack(errors)[..., None])[..., 0])
    new_weights, new_momentum, last_base = (
        tuple(t.unflatten(0, (batch, heads)) for t in part) for part in (new_weights, new_momentum, last_base)
    )
    return y, new_weights, new_momentum, last_base


@dataclass(frozen=True)
class ChunkGrid:
    """Where each token sits once a batch of sequences is cut into chunks of one width.

    Chunk borders are multiples of ``chunk_size`` in absolute position, so a row that continues in the middle of a
    chunk has a shorter first one. Every chunk is filled from the left. Shapes depend on shapes alone.

    Attributes:
        time: Tokens a row was given.
        heads: Heads; rows of the grid are (batch, heads).
        chunks: Number of chunks.
        width: Slots of each.
        source: (batch, chunks * width) token in every slot, or None: slot i holds token i.
        slot: (batch, time) slot of every token, likewise.
        real: (chunks, batch * heads, width) bool, slots that hold an existing token; None if all do.
        exists: (batch, time) bool, tokens that exist; None if all do.
        at_border: (batch * heads, 1, 1) bool, rows whose first token begins a chunk; None if all do.
        ends_at_border: The same of the token after the last one; a bool if one answer holds for all rows.
    """

    time: int
    heads: int
    chunks: int
    width: int
    source: Tensor | None
    slot: Tensor | None
    real: Tensor | None
    exists: Tensor | None
    at_border: Tensor | None
    ends_at_border: Tensor | bool

    @staticmethod
    def lay_out(
        batch: int,
        time: int,
        heads: int,
        chunk_size: int,
        position: int | Tensor,
        lengths: Tensor | None,
        device: torch.device,
    ) -> "ChunkGrid":
        """Lay out ``time`` tokens a row, the first at absolute ``position``."""
        width = min(chunk_size, time)
        tokens = torch.arange(time, device=device)
        exists = None if lengths is None else tokens < lengths[:, None]
        if isinstance(position, int) and position % chunk_size == 0:
            chunks = -(-time // width)
            real = None
            if lengths is not None or chunks * width != time:
                held = torch.arange(chunks * width, device=device) < (time if lengths is None else lengths[:, None])
                real = _rows_of_grid(held.expand(batch, -1), chunks, heads)
            ends = time % chunk_size == 0 if lengths is None else _per_row(lengths % chunk_size == 0, heads)
            return ChunkGrid(time, heads, chunks, width, None, None, real, exists, None, ends)

        phase = torch.as_tensor(position, device=device).expand(batch)[:, None] % chunk_size
        end = time if lengths is None else lengths[:, None]
        chunks = (time + chunk_size - 2) // chunk_size + 1
        chunk = torch.arange(chunks * width, device=device) // width
        within = torch.arange(chunks * width, device=device) % width
        first = (chunk * chunk_size - phase).clamp_min(0)  # first token of each slot's chunk
        source = first + within
        held = (source < (chunk + 1) * chunk_size - phase) & (source < end)
        own_chunk = (phase + tokens) // chunk_size
        slot = own_chunk * width + tokens - (own_chunk * chunk_size - phase).clamp_min(0)
        return ChunkGrid(
            time,
            heads,
            chunks,
            width,
            source.clamp_max(time - 1),
            slot,
            _rows_of_grid(held, chunks, heads),
            exists,
            _per_row(phase[:, 0] == 0, heads),
            _per_row(((phase + end) % chunk_size == 0)[:, 0], heads),
        )

    def cut(self, x: Tensor) -> Tensor:
        """(batch, time, heads, ...) -> (chunks, batch * heads, width, ...)."""
        if self.source is not None:
            index = self.source.view(*self.source.shape, *([1] * (x.dim() - 2)))
            x = x.gather(1, index.expand(-1, -1, *x.shape[2:]))
        elif (missing := self.chunks * self.width - self.time) > 0:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
        x = x.unflatten(1, (self.chunks, self.width)).movedim(3, 1).movedim(2, 0)
        return x.flatten(1, 2).contiguous()

    def join(self, y: Tensor) -> Tensor:
        """(chunks, batch * heads, width, d) -> (batch, time, heads, d), zeros at tokens that do not exist."""
        y = y.unflatten(1, (-1, self.heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        if self.slot is not None:
            y = y.gather(1, self.slot[:, :, None, None].expand(-1, -1, *y.shape[2:]))
        else:
            y = y[:, : self.time]
        return y if self.exists is None else y.masked_fill(~self.exists[:, :, None, None], 0)

    def reached(self, chunk: int) -> Tensor | bool:
        """Return which rows have a token in ``chunk``: (batch * heads, 1, 1), or one answer for all rows."""
        if self.exists is None and self.at_border is None:
            return True
        assert self.real is not None
        return self.real[chunk, :, :1, None]


def _rows_of_grid(held: Tensor, chunks: int, heads: int) -> Tensor:
    slots: Tensor = held.unflatten(1, (chunks, -1))
    return slots.transpose(0, 1).repeat_interleave(heads, dim=1)


def _per_row(flag: Tensor, heads: int) -> Tensor:
    return flag.repeat_interleave(heads)[:, None, None]


def _where(condition: Tensor | bool, yes: Weights, no: Weights) -> Weights:
    if isinstance(condition, bool):
        return yes if condition else no
    return tuple(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True))


def _to_rows(part: Weights | None, dtype: torch.dtype) -> Weights:
    return tuple(t.to(dtype).flatten(0, 1) for t in part or ())


def _weights(first_block: Weights, anchor: Weights) -> Weights:
    """Return the weights that the first carried block stands for."""
    return tuple(w + m for w, m in zip(first_block, anchor, strict=True)) if anchor else first_block


def _coefficients(tables: GateTables, *, has_momentum: bool, read: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn gate tables of (chunks, R, ...) into what ``Chunk`` takes: (mix, read, write, transition)."""
    rows = slice(1, None) if read == "post" else slice(0, -1)
    mix, beta, f = tables.write[..., rows, :], tables.carry_weights, tables.carry_momentum
    read_with, write_with, transition = [beta[..., rows]], [tables.write[..., -1, :]], [beta[..., -1]]
    if has_momentum:
        read_with.append(f[..., rows])
        write_with.append(tables.momentum_write)
        m = tables.momentum_carry
        transition += [f[..., -1], torch.zeros_like(m), m]
    blocks = len(read_with)
    return (
        mix,
        torch.stack(read_with, 1)[..., None],
        torch.stack(write_with, 1)[..., None],
        torch.stack(transition, 1).unflatten(1, (blocks, blocks))[..., None, None],
    )


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
    for name, numbers in (("lengths", lengths), ("position", position)):
        if isinstance(numbers, Tensor) and (numbers.shape != (batch,) or numbers.is_floating_point()):
            raise ValueError(
                f"{name} has shape {tuple(numbers.shape)} and dtype {numbers.dtype}; "
                f"it must be (batch,) = ({batch},) integers"
            )
