"""A matrix memory as a sequence mixer: what the layers of the linear-recurrence family have in common.

Projections to queries, keys, values and gates, a short convolution, the rule, a norm of every head, an output gate.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_positive
from memzoo.layers.heads import resolve_heads
from memzoo.layers.matrix_rule import MatrixRule
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.norm import RMSNorm
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class MatrixMemoryState(MixerState):
    """The memory after the tokens read so far; its size does not depend on their number.

    Attributes:
        memory: S, (batch, value_heads, K, V), at least float32. Linear attention with its normaliser has V + 1.
        conv: Tail of the short convolution, channels [q | k | v]; None without one.
    """

    memory: Tensor
    conv: ShortConvState | None


class MatrixMemoryOptions(TypedDict, total=False):
    """What all layers of the family take beside their own options; see ``MatrixMemory``."""

    num_heads: int | None
    head_dim: int | None
    value_dim: int | None
    num_value_heads: int | None
    norm_eps: float
    chunk_size: int
    backend: str


class MatrixMemory(SequenceMixer):
    """Base of the layers whose memory is one matrix a head: a subclass names its rule.

    With x a token, S the memory and ``rule`` its recurrence:

        q, k, v = conv([W_q | W_k | W_v] x),   gates = W_g x
        o, S = rule(q, k, v, gates, S)
        y = W_out (RMSNorm(o) * silu(W_o x))

    Args:
        dim: Width of ``x`` and ``y``.
        rule_options: Arguments of the rule that only it has.
        conv_width: Width of the convolution; None for none.
        output_gate: Gate the normalised output.
        num_heads: Heads of queries and keys; ``dim / head_dim`` by default.
        head_dim: Width of each, K; ``dim / num_heads`` if that is given, else 64.
        value_dim: Width of a value head, V; ``head_dim`` by default.
        num_value_heads: Memories, each group of ``num_value_heads / num_heads`` of which shares a query and key head;
            ``num_heads`` by default.
        norm_eps: Of the norm.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        backend: Of the recurrence: ``"auto"``, ``"torch"`` or ``"fla"``.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MatrixMemoryState``.

    Raises:
        ValueError: Widths or numbers of heads do not divide, or the rule refuses an option.

    Note:
        Signals: ``beta`` (batch, time, value_heads) and ``decay`` (batch, time, value_heads), or with K as a last axis,
        where the rule has them, and ``memory_norm`` (batch, value_heads) after the call.
    """

    state_class = MatrixMemoryState
    native_segments = True
    rule_class: ClassVar[type[MatrixRule]]

    def __init__(
        self,
        dim: int,
        rule_options: dict[str, Any],
        *,
        conv_width: int | None,
        output_gate: bool,
        num_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_value_heads: int | None = None,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        num_heads, head_dim = resolve_heads(dim, num_heads, head_dim)
        value_dim = head_dim if value_dim is None else value_dim
        if conv_width is not None:
            check_positive("conv_width", conv_width, "it counts the current token; use None for no convolution")
        self.rule = self.rule_class(
            num_heads=num_heads,
            key_dim=head_dim,
            value_dim=value_dim,
            num_value_heads=num_value_heads,
            chunk_size=chunk_size,
            backend=backend,
            **rule_options,
        )
        keys, values = num_heads * head_dim, self.rule.num_value_heads * value_dim
        self.memory_dim = values
        self.widths = (keys, keys, values)
        self.query_key_value = nn.Linear(dim, sum(self.widths), bias=False)
        self.gates = self.rule.gate_projection(dim)
        self.conv = None
        if conv_width is not None:
            self.conv = ShortConv(sum(self.widths), width=conv_width, activation=self.rule.conv_activation)
        self.norm = RMSNorm(value_dim, eps=norm_eps)
        self.output_gate = self.build_output_gate(values) if output_gate else None
        self.out = nn.Linear(values, dim, bias=False)

    @property
    def gives_innovation(self) -> bool:
        """Whether ``mix`` can ``return_innovation``: the rule corrects errors, and not in kernels that keep them."""
        return self.rule.has_residual and self.rule.backend != "fla"

    def build_output_gate(self, width: int) -> nn.Module:
        """Build the projection whose activation gates the output, (..., dim) -> (..., width)."""
        return nn.Linear(self.dim, width, bias=False)

    def gate_activation(self, gate: Tensor) -> Tensor:
        """Activate the output gate."""
        return F.silu(gate)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MatrixMemoryState:
        """Return the state of ``batch_size`` fresh rows: empty memories."""
        like = self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        counter = torch.zeros(batch_size, dtype=torch.long, device=device)
        kept = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, *self.rule.state_shape, dtype=kept, device=device)
        conv = None if self.conv is None else self.conv.initial_state(batch_size, device=device, dtype=dtype)
        return MatrixMemoryState(counter, counter.clone(), memory, conv)

    def report_state(self, state: MatrixMemoryState, trace: Trace) -> None:
        """Report how much every memory holds."""
        trace.signal("memory_norm", state.memory.norm(dim=(-2, -1)))

    def mix(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        lengths: Tensor | None,
        trace: Trace | None,
        donate: bool,
        cu_seqlens: Tensor | None = None,
        return_memory: bool = False,
        return_innovation: bool = False,
    ) -> tuple[Any, MatrixMemoryState]:
        """Write and read the memory; see ``SequenceMixer.mix``.

        A layer that ``gives_innovation`` takes one keyword more, ``return_innovation``. It then returns (outputs,
        innovation), or (outputs, memory, innovation), in place of the outputs. The innovation of a token is how much it
        changes the memories, ``beta |v - k S|``, one norm over the errors of all value heads, each times its own beta:
        (batch, time), zero at tokens past ``lengths``, detached, in at least float32.

        Raises:
            ValueError: An innovation is asked for that the layer does not give, or ``state`` is of another layer.
        """
        if return_innovation and not self.gives_innovation:
            raise ValueError(
                f"return_innovation=True, but {type(self).__name__} with backend={self.rule.backend!r} has no errors "
                f"to return; use a delta rule such as GatedDeltaNet, with backend='auto' or 'torch'"
            )
        own = cast(MatrixMemoryState | None, state)
        if own is not None:
            self._check_state(own)
        before, after, document = counters(state, x, lengths, cu_seqlens)
        projected = self.query_key_value(x)
        tail = None
        if self.conv is not None:
            tail = None if own is None else own.conv
            projected, tail = self.conv(projected, tail, lengths=lengths, cu_seqlens=cu_seqlens)
        elif self.rule.uses_conv:
            projected = F.silu(projected)
        rule = self.rule
        q, k, v = projected.split(self.widths, dim=-1)
        q, k = (part.unflatten(-1, (rule.num_heads, rule.key_dim)) for part in (q, k))
        v = v.unflatten(-1, (rule.num_value_heads, rule.value_dim))
        q, k = rule.prepare(q, k, positions(x, before, cu_seqlens))
        gates = None if self.gates is None else self.gates(x)
        o, memory, *residual = rule(
            q,
            k,
            v,
            gates,
            None if own is None else own.memory,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            return_residual=return_innovation,
        )
        more = [o.flatten(2)] if return_memory else []
        if return_innovation:
            more.append(self._innovation(gates, v, *residual))
        if trace is not None and trace.wants_signals:
            with torch.no_grad():
                beta, log_decay = rule.gate_values(gates, v)
            if beta is not None:
                trace.signal("beta", beta)
            if log_decay is not None:
                trace.signal("decay", log_decay.exp())
        y = self.output(o, x)
        return (y, *more) if more else y, MatrixMemoryState(after, document, memory, tail)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Turn what the heads read for the tokens ``x``, (batch, time, HV, V), into (batch, time, dim)."""
        y = self.norm(o).flatten(2)
        if self.output_gate is not None:
            y = y * self.gate_activation(self.output_gate(x))
        projected: Tensor = self.out(y)
        return projected

    def _innovation(self, gates: Tensor | None, v: Tensor, residual: Tensor) -> Tensor:
        """Return how much every token changes the memories, (batch, time); see ``mix``."""
        with torch.no_grad():
            beta, _ = self.rule.gate_values(gates, v)
            written = cast(Tensor, beta)[..., None] * residual
            innovation: Tensor = torch.linalg.vector_norm(written, dim=(-2, -1))
        return innovation

    def _check_state(self, state: MatrixMemoryState) -> None:
        memory, has_conv = tuple(state.memory.shape[1:]), state.conv is not None
        if memory != self.rule.state_shape or has_conv != (self.conv is not None):
            raise ValueError(
                f"state holds memories of {memory}, convolution={has_conv}; this layer's are {self.rule.state_shape}, "
                f"convolution={self.conv is not None}: pass what its previous call returned, or None to start afresh"
            )


def positions(x: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return how many tokens of its row were read before each token, (batch, time).

    Args:
        x: (batch, time, dim).
        before: (rows,) tokens read before the call.
        cu_seqlens: (rows + 1,) borders of rows that lie end to end; None if every row is one of ``x``.
    """
    slot = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return before[:, None] + slot
    offset = (before - cu_seqlens[:-1]).repeat_interleave(cu_seqlens.diff(), output_size=x.shape[1])
    return (offset + slot)[None]
