"""Mamba: a diagonal state space in which every token chooses its own step, what it writes and what it reads.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_number, check_positive
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.elementwise import silu_product
from memzoo.layers.ops.precision import wider
from memzoo.layers.ops.selective_scan import BACKENDS, selective_scan
from memzoo.layers.registry import register_layer
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.step_size import STEP_RANGE, check_range, inverse_softplus, random_steps
from memzoo.layers.trace import Trace


@dataclass(frozen=True)
class MambaState(MixerState):
    """The memory after the tokens read so far; its size does not depend on their number.

    Attributes:
        memory: h, (batch, inner_dim, state_dim), at least float32.
        conv: Tail of the short convolution.
    """

    memory: Tensor
    conv: ShortConvState


class Mamba(SequenceMixer):
    """The selective state space: every channel has N numbers, which fade, are written and are read as the token says.

    With x a token and u_t a channel after the convolution:

        [u | z] = W_in x,   u = silu(conv(u)),   [r | B | C] = W_p u
        dt      = softplus(W_dt r + b_dt)
        h_t     = exp(dt A) h_{t-1} + dt u_t B_t,   A = -exp(A_log)
        m_t     = C_t . h_t + D u_t
        y       = W_out (m * silu(z))

    Args:
        dim: Width of ``x`` and ``y``.
        state_dim: N, numbers a channel remembers.
        conv_width: Taps of the convolution, the current token's among them.
        expansion: Channels for each of ``dim``, unless ``inner_dim`` says how many.
        inner_dim: Channels; ``expansion * dim`` by default.
        step_rank: Width of r; ``dim / 16``, rounded up, by default.
        step_range: Between which the first steps are drawn, log-uniformly.
        step_floor: What they are raised to if they are below.
        step_scale: Factor of the first W_dt: drawn uniformly in ``+-step_scale / sqrt(step_rank)``.
        projection_norm: RMS-normalise r, B and C, as Jamba does (arXiv 2403.19887).
        chunk_size: Tokens between two states that the scan keeps; changes its speed only.
        backend: Of the scan: ``"auto"``, ``"torch"`` or ``"mamba_ssm"``. ``"torch"`` holds for the convolution too.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``MambaState``; ``return_memory`` gives m.

    Raises:
        ValueError: A size is not a whole number >= 1, a range is none, or the backend is unknown or missing.

    Reference:
        arXiv 2312.00752, algorithm 2 and section 3.4; B by Euler's rule, as in the official code.

    Note:
        ``in_projection`` makes [u | z], ``parameter_projection`` [r | B | C]; ``decay_log`` is A_log and ``skip`` D.
        Signals: ``step`` (batch, time, inner_dim), ``decay`` with ``state_dim`` as a last axis, and ``memory_norm``
        (batch, inner_dim) after the call.
    """

    state_class = MambaState
    native_segments = True
    no_weight_decay = ("decay_log", "skip", "step_projection.bias")

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 16,
        conv_width: int = 4,
        expansion: int = 2,
        inner_dim: int | None = None,
        step_rank: int | None = None,
        step_range: Sequence[float] = STEP_RANGE,
        step_floor: float = 1e-4,
        step_scale: float = 1.0,
        projection_norm: bool = False,
        chunk_size: int = 32,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive("dim", dim)
        check_positive("state_dim", state_dim)
        check_positive("expansion", expansion, "pass inner_dim for a fraction of dim")
        inner_dim = expansion * dim if inner_dim is None else inner_dim
        step_rank = -(-dim // 16) if step_rank is None else step_rank
        check_positive("inner_dim", inner_dim)
        check_positive("step_rank", step_rank)
        check_range("step_range", step_range)
        check_number("step_floor", step_floor)
        check_number("step_scale", step_scale)
        check_positive("conv_width", conv_width, "it counts the current token")
        check_positive("chunk_size", chunk_size)
        check_backend(backend, BACKENDS)
        self.memory_dim = inner_dim
        self.widths = (step_rank, state_dim, state_dim)
        self.step_range, self.step_floor, self.step_scale = step_range, step_floor, step_scale
        self.chunk_size, self.backend = chunk_size, backend
        self.in_projection = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.conv = ShortConv(inner_dim, width=conv_width, bias=True, backend=conv_backend(backend))
        self.parameter_projection = nn.Linear(inner_dim, sum(self.widths), bias=False)
        self.parameter_norms = nn.ModuleList(map(RMSNorm, self.widths)) if projection_norm else None
        self.step_projection = nn.Linear(step_rank, inner_dim)
        self.decay_log = nn.Parameter(torch.empty(inner_dim, state_dim))
        self.skip = nn.Parameter(torch.empty(inner_dim))
        self.out = nn.Linear(inner_dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw steps in their range, set A to -1, -2, ..., -N in every channel and D to one."""
        bound = self.step_scale * self.widths[0] ** -0.5
        self.step_projection.weight.uniform_(-bound, bound)
        steps = random_steps(self.skip, self.step_range).clamp_min(self.step_floor)
        self.step_projection.bias.copy_(inverse_softplus(steps))
        rates = torch.arange(1, self.widths[1] + 1, dtype=self.decay_log.dtype, device=self.decay_log.device)
        self.decay_log.copy_(rates.log())
        self.skip.fill_(1)
        reset_conv(self.conv)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Return the state of ``batch_size`` fresh rows: empty memories."""
        like = self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        counter = torch.zeros(batch_size, dtype=torch.long, device=device)
        kept = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, *self.decay_log.shape, dtype=kept, device=device)
        conv = self.conv.initial_state(batch_size, device=device, dtype=dtype)
        return MambaState(counter, counter.clone(), memory, conv)

    def report_state(self, state: MambaState, trace: Trace) -> None:
        """Report how much every channel holds."""
        trace.signal("memory_norm", state.memory.norm(dim=-1))

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
    ) -> tuple[Any, MambaState]:
        """Write and read the memory; see ``SequenceMixer.mix``."""
        own = cast(MambaState | None, state)
        _, after, document = counters(state, x, lengths, cu_seqlens)
        u, z = self.in_projection(x).chunk(2, dim=-1)
        u, tail = self.conv(u, None if own is None else own.conv, lengths=lengths, cu_seqlens=cu_seqlens)
        dt, B, C = self._selected(u)
        A = -wider(self.decay_log).exp()
        read, memory = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            self.skip,
            None if own is None else own.memory,
            chunk_size=self.chunk_size,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        if trace is not None and trace.wants_signals:
            trace.signal("step", dt)
            trace.signal("decay", (dt.detach()[..., None] * A.detach()).exp())
        y = self.out(silu_product(z, read))
        return (y, read) if return_memory else y, MambaState(after, document, memory, tail)

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the steps, in at least float32, and what is written and read."""
        parts = self.parameter_projection(u).split(self.widths, dim=-1)
        if self.parameter_norms is not None:
            parts = [norm(part) for norm, part in zip(self.parameter_norms, parts, strict=True)]
        r, B, C = parts
        step = self.step_projection  # its bias is added in full precision: first steps of 0.001 are all in the bias
        return F.softplus(wider(F.linear(r, step.weight)) + wider(step.bias)), B, C

    def extra_repr(self) -> str:
        """Widths."""
        return f"{self.dim}, inner_dim={self.memory_dim}, state_dim={self.widths[1]}"


def conv_backend(backend: str) -> str:
    """Return the convolution's backend for that of a recurrence: no other library where none is wanted."""
    return "torch" if backend == "torch" else "auto"


def reset_conv(conv: ShortConv) -> None:
    """Draw a convolution's bias as its filters are drawn, which is what torch's convolutions and so Mamba's do."""
    conv.reset_parameters()
    bound = conv.weight.shape[1] ** -0.5
    if conv.bias is not None:
        nn.init.uniform_(conv.bias, -bound, bound)


@register_layer("mamba", "mixer")
def _mamba(dim: int, **overrides: Any) -> Mamba:
    return Mamba(dim, **dict(state_dim=4, chunk_size=4) | overrides)
