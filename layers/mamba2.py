"""Mamba-2: heads of a state space with one decay each, which whole chunks of tokens compute as matrix products.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality" (arXiv 2405.21060).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_divisible, check_number, check_positive
from memzoo.layers.mamba import conv_backend, reset_conv
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.elementwise import silu_product
from memzoo.layers.ops.precision import wider
from memzoo.layers.ops.state_space_dual import BACKENDS, state_space_dual
from memzoo.layers.registry import register_layer
from memzoo.layers.short_conv import ShortConv, ShortConvState
from memzoo.layers.state import MixerState
from memzoo.layers.step_size import STEP_RANGE, check_range, inverse_softplus, random_steps
from memzoo.layers.trace import Trace

NO_LIMIT = (0.0, math.inf)


@dataclass(frozen=True)
class Mamba2State(MixerState):
    """The memory after the tokens read so far; its size does not depend on their number.

    Attributes:
        memory: h, (batch, num_heads, state_dim, head_dim), at least float32.
        conv: Tail of the short convolution, channels [u | B | C].
    """

    memory: Tensor
    conv: ShortConvState


class Mamba2(SequenceMixer):
    """A matrix memory a head, which fades by one factor, is written with B and read with C.

    With x a token, and for a head with its channels u:

        [z | u | B | C | dt] = W_in x,   [u | B | C] = silu(conv([u | B | C]))
        dt  = softplus(dt + dt_bias)
        h_t = exp(dt A) h_{t-1} + B_t^T dt u_t,   A = -exp(A_log)
        m_t = C_t h_t + D u_t
        y   = W_out RMSNorm(m * silu(z))

    Args:
        dim: Width of ``x`` and ``y``.
        num_heads: Heads; ``expansion * dim / head_dim`` by default.
        head_dim: Channels of a head, P.
        state_dim: N, width of B and C.
        num_groups: Groups of neighbouring heads, each of which shares its B and C, and is normalised by itself.
        conv_width: Taps of the convolution, the current token's among them.
        expansion: Channels for each of ``dim``, unless ``num_heads`` says how many.
        step_range: Between which the first steps are drawn, log-uniformly.
        step_floor: What they are raised to if they are below.
        step_limit: Between which all steps are kept.
        norm_eps: Of the norm.
        chunk_size: Tokens that are computed at once; changes the speed only.
        backend: Of the recurrence: ``"auto"``, ``"torch"``, ``"fla"`` or ``"mamba_ssm"``. ``"torch"`` holds for the
            convolution too.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim) and a ``Mamba2State``; ``return_memory`` gives m.

    Raises:
        ValueError: A size is not a whole number >= 1 or does not divide, a range is none, or the backend is unknown or
            missing.

    Reference:
        arXiv 2405.21060, section 7.

    Note:
        ``in_projection`` makes [z | u | B | C | dt]; ``decay_log`` is A_log, ``step_bias`` dt_bias and ``skip`` D.
        Signals: ``step`` and ``decay`` (batch, time, num_heads), and ``memory_norm`` (batch, num_heads) after the call.
    """

    state_class = Mamba2State
    native_segments = True
    no_weight_decay = ("decay_log", "step_bias", "skip")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 64,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_width: int = 4,
        expansion: int = 2,
        step_range: Sequence[float] = STEP_RANGE,
        step_floor: float = 1e-4,
        step_limit: Sequence[float] = NO_LIMIT,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive("dim", dim)
        if num_heads is None:
            check_positive("expansion", expansion, "pass num_heads for a fraction of dim")
            check_divisible("expansion * dim", expansion * dim, "head_dim", head_dim)
            num_heads = expansion * dim // head_dim
        check_positive("head_dim", head_dim)
        check_positive("state_dim", state_dim)
        check_divisible("num_heads", num_heads, "num_groups", num_groups)
        check_range("step_range", step_range)
        check_number("step_floor", step_floor)
        check_number("norm_eps", norm_eps, zero=True)
        check_positive("conv_width", conv_width, "it counts the current token")
        check_range("step_limit", step_limit, zero=True)
        check_positive("chunk_size", chunk_size)
        check_backend(backend, BACKENDS)
        inner_dim, shared = num_heads * head_dim, num_groups * state_dim
        self.memory_dim = inner_dim
        self.num_heads, self.head_dim, self.state_dim, self.num_groups = num_heads, head_dim, state_dim, num_groups
        self.widths = (inner_dim, shared, shared)
        self.step_range, self.step_floor, self.step_limit = step_range, step_floor, step_limit
        self.chunk_size, self.backend = chunk_size, backend
        self.in_projection = nn.Linear(dim, inner_dim + sum(self.widths) + num_heads, bias=False)
        self.conv = ShortConv(sum(self.widths), width=conv_width, bias=True, backend=conv_backend(backend))
        self.decay_log = nn.Parameter(torch.empty(num_heads))
        self.step_bias = nn.Parameter(torch.empty(num_heads))
        self.skip = nn.Parameter(torch.empty(num_heads))
        self.norm = RMSNorm(inner_dim, eps=norm_eps, groups=num_groups)
        self.out = nn.Linear(inner_dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw steps in their range and -A uniformly in [1, 16], and set D to one."""
        steps = random_steps(self.step_bias, self.step_range).clamp_min(self.step_floor)
        self.step_bias.copy_(inverse_softplus(steps))
        self.decay_log.uniform_(1, 16).log_()
        self.skip.fill_(1)
        reset_conv(self.conv)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """Return the state of ``batch_size`` fresh rows: empty memories."""
        like = self.out.weight
        device, dtype = device or like.device, dtype or like.dtype
        counter = torch.zeros(batch_size, dtype=torch.long, device=device)
        kept = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, self.num_heads, self.state_dim, self.head_dim)
        memory = torch.zeros(shape, dtype=kept, device=device)
        conv = self.conv.initial_state(batch_size, device=device, dtype=dtype)
        return Mamba2State(counter, counter.clone(), memory, conv)

    def report_state(self, state: Mamba2State, trace: Trace) -> None:
        """Report how much every head holds."""
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
    ) -> tuple[Any, Mamba2State]:
        """Write and read the memory; see ``SequenceMixer.mix``."""
        own = cast(Mamba2State | None, state)
        _, after, document = counters(state, x, lengths, cu_seqlens)
        z, mixed, raw = self.in_projection(x).split((self.widths[0], sum(self.widths), self.num_heads), dim=-1)
        mixed, tail = self.conv(mixed, None if own is None else own.conv, lengths=lengths, cu_seqlens=cu_seqlens)
        u, B, C = mixed.split(self.widths, dim=-1)
        B, C = (part.unflatten(-1, (self.num_groups, self.state_dim)) for part in (B, C))
        dt, A = self._steps(raw), -wider(self.decay_log).exp()
        read, memory = state_space_dual(
            u.unflatten(-1, (self.num_heads, self.head_dim)),
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
        read = read.flatten(2)
        if trace is not None and trace.wants_signals:
            trace.signal("step", dt)
            trace.signal("decay", (dt * A).detach().exp())
        y = self.out(self.norm(silu_product(z, read)))
        return (y, read) if return_memory else y, Mamba2State(after, document, memory, tail)

    def _steps(self, raw: Tensor) -> Tensor:
        """Return the steps, in at least float32."""
        steps = F.softplus(wider(raw) + wider(self.step_bias))
        return steps if tuple(self.step_limit) == NO_LIMIT else steps.clamp(*self.step_limit)

    def extra_repr(self) -> str:
        """Heads and widths."""
        return (
            f"{self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, state_dim={self.state_dim}, "
            f"num_groups={self.num_groups}"
        )


@register_layer("mamba2", "mixer")
def _mamba2(dim: int, **overrides: Any) -> Mamba2:
    return Mamba2(dim, **dict(num_heads=2, head_dim=8, state_dim=6, chunk_size=4) | overrides)
