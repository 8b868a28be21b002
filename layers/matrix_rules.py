"""The rules of six papers: linear attention, RetNet, GLA, DeltaNet, Gated DeltaNet and Kimi Delta Attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.matrix_rule import MatrixRule, unit
from memzoo.layers.ops.precision import wider
from memzoo.layers.rotary import Rotary
from memzoo.layers.step_size import inverse_softplus, random_steps

FEATURE_MAPS = ("elu", "relu", "identity")
NORMALIZER_EPS = 1e-10


class LinearAttentionRule(MatrixRule):
    """``S <- S + phi(k)^T v``, ``y = phi(q) S / (phi(q) . sum phi(k))`` (arXiv 2006.16236, equations 9 to 12).

    The sum of the keys is a column more of the memory, written with a value of one.

    Args:
        feature_map: phi: ``"elu"`` for elu + 1, ``"relu"`` or ``"identity"``.
        normalize: Divide by the sum of the weights. It must not vanish, so not with ``"identity"``.
        options: Those of ``MatrixRule``.

    Raises:
        ValueError: The feature map is unknown or cannot be normalised, or as in ``MatrixRule``.
    """

    def __init__(self, *, feature_map: str = "elu", normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        if normalize and feature_map == "identity":
            raise ValueError(
                "normalize=True divides by a sum of products that feature_map='identity' lets be zero; use "
                "normalize=False, or feature_map='elu'"
            )
        if normalize and self.backend == "fla":
            raise ValueError(
                "normalize=True is computed in float32, which backend='fla' does not take; use normalize=False, or "
                "backend='auto'"
            )
        self.feature_map = feature_map
        self.normalize = normalize

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(HV, K, V), with one column more for the normaliser."""
        return self.num_value_heads, self.key_dim, self.value_dim + self.normalize

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the feature map."""
        if self.feature_map == "elu":
            return F.elu(q) + 1, F.elu(k) + 1
        if self.feature_map == "relu":
            return F.relu(q), F.relu(k)
        return q, k

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_residual: bool = False,
    ) -> tuple[Tensor, ...]:
        """Write and read; see ``MatrixRule``."""
        options: dict[str, Any] = {"lengths": lengths, "cu_seqlens": cu_seqlens, "return_residual": return_residual}
        if not self.normalize:
            return super().forward(q, k, v, gates, state, **options)
        q, k, wide = wider(q), wider(k), wider(v)  # so that the quotient is rounded once
        weighed = F.pad(wide, (0, 1), value=1.0)
        y, state = super().forward(q, k, weighed, gates, state, **options)
        return (y[..., :-1] / (y[..., -1:] + NORMALIZER_EPS)).to(v.dtype), state

    def extra_repr(self) -> str:
        """Heads, widths and feature map."""
        return f"{super().extra_repr()}, feature_map={self.feature_map!r}, normalize={self.normalize}"


class RetNetRule(MatrixRule):
    """``S <- gamma_h S + k^T v`` with ``gamma_h = 1 - 2^(-5 - h)`` and rotated q, k (arXiv 2307.08621, equation 6).

    Args:
        rotary_base: Base of the rotary position embedding.
        options: Those of ``MatrixRule``; ``key_dim`` is even.

    Raises:
        ValueError: ``key_dim`` is odd, or as in ``MatrixRule``.
    """

    def __init__(self, *, rotary_base: float = 10000.0, **options: Any) -> None:
        super().__init__(**options)
        self.rotary = Rotary(self.key_dim, base=rotary_base)

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate to the positions."""
        angles = self.rotary.angles(positions)
        return self.rotary(q, angles), self.rotary(k, angles)

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the constant decay of every head."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        head = torch.arange(self.num_value_heads, dtype=dtype, device=v.device)
        return None, torch.log1p(-torch.exp2(-5 - head)).expand(v.shape[:3])


class GatedLinearAttentionRule(MatrixRule):
    """``S <- diag(exp(a)) S + k^T v`` with ``a = logsigmoid(W_2 W_1 x + b) / 16`` (arXiv 2312.06635).

    Args:
        gate_rank: Rank of the gate's projection.
        gate_divisor: Divides the log decay, so that a channel forgets slowly to begin with.
        options: Those of ``MatrixRule``.

    Raises:
        ValueError: The rank or the divisor is not positive, or as in ``MatrixRule``.
    """

    def __init__(self, *, gate_rank: int = 16, gate_divisor: float = 16.0, **options: Any) -> None:
        super().__init__(**options)
        check_positive("gate_rank", gate_rank)
        if not 0 < gate_divisor < math.inf:
            raise ValueError(f"gate_divisor={gate_divisor} is not positive and finite; 16.0 is the paper's")
        self.gate_rank = gate_rank
        self.gate_divisor = gate_divisor

    @property
    def gate_width(self) -> int:
        """One a key channel."""
        return self.num_value_heads * self.key_dim

    def gate_projection(self, dim: int) -> nn.Module:
        """Build the low-rank projection, with a bias."""
        return nn.Sequential(nn.Linear(dim, self.gate_rank, bias=False), nn.Linear(self.gate_rank, self.gate_width))

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the decay of every key channel."""
        raw = wider(given(gates)).unflatten(-1, (self.num_value_heads, self.key_dim))
        return None, F.logsigmoid(raw) / self.gate_divisor


class DeltaNetRule(MatrixRule):
    """``S <- S + k^T beta (v - k S)`` with ``beta = sigmoid(W_b x)`` and q, k of unit length (arXiv 2406.06484).

    Args:
        negative_eigenvalues: Double beta: writing may then turn a direction of the memory around (arXiv 2411.12537).
        options: Those of ``MatrixRule``.

    Raises:
        ValueError: As in ``MatrixRule``.
    """

    uses_conv = True
    has_residual = True

    def __init__(self, *, negative_eigenvalues: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.negative_eigenvalues = negative_eigenvalues

    @property
    def gate_width(self) -> int:
        """One a value head: beta."""
        return self.num_value_heads

    def gate_projection(self, dim: int) -> nn.Module:
        """Build the projection to all raw gates."""
        return nn.Linear(dim, self.gate_width, bias=False)

    def prepare(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Scale to unit length."""
        return unit(q), unit(k)

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return beta."""
        return self.write_strength(wider(given(gates))), None

    def write_strength(self, raw: Tensor) -> Tensor:
        """Return beta, in (0, 1), or in (0, 2) with ``negative_eigenvalues``."""
        return raw.sigmoid() * 2 if self.negative_eigenvalues else raw.sigmoid()


class GatedDeltaNetRule(DeltaNetRule):
    """``S <- exp(a) S``, then the delta rule; ``a = -exp(decay_log) softplus(W_a x + step_bias)`` (arXiv 2412.06464).

    ``decay_log`` and ``step_bias``, (num_value_heads,), are A_log and dt_bias of Mamba-2. Raw gates are [a | beta].

    Args:
        options: Those of ``DeltaNetRule`` and ``MatrixRule``.

    Raises:
        ValueError: As in ``MatrixRule``.
    """

    no_weight_decay = ("decay_log", "step_bias")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.decay_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.step_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.reset_parameters()

    @property
    def gate_width(self) -> int:
        """Two a value head."""
        return 2 * self.num_value_heads

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw exp(decay_log) uniformly in (0, 16], and steps log-uniformly in [0.001, 0.1], as Mamba-2 does."""
        self.decay_log.copy_(torch.log(16 * (1 - torch.rand_like(self.decay_log))))
        self.step_bias.copy_(inverse_softplus(random_steps(self.step_bias)))

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return beta and the decay of every value head."""
        step, write = wider(given(gates)).chunk(2, dim=-1)
        rate = self.decay_log.to(step.dtype).exp()
        return self.write_strength(write), -rate * F.softplus(step + self.step_bias.to(step.dtype))


class KimiDeltaAttentionRule(DeltaNetRule):
    """Gated DeltaNet with a decay of every key channel: ``S <- diag(exp(a)) S``, then the delta rule (2510.26692).

    ``a = -exp(decay_log) softplus(f + step_bias)``, f a low-rank projection of x, or, bounded from below by l < 0,
    ``a = l sigmoid(exp(decay_log) (f + step_bias))``. ``decay_log`` is (num_value_heads,), ``step_bias``
    (num_value_heads * key_dim,). Raw gates are [f | beta].

    Args:
        decay_lower_bound: l: no token forgets more than exp(l). None for no bound; -5.0 is usual.
        options: Those of ``DeltaNetRule`` and ``MatrixRule``.

    Raises:
        ValueError: The bound is not below zero, or as in ``MatrixRule``.
    """

    no_weight_decay = ("decay_log", "step_bias")

    def __init__(self, *, decay_lower_bound: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if decay_lower_bound is not None and not -math.inf < decay_lower_bound < 0:
            raise ValueError(
                f"decay_lower_bound={decay_lower_bound} is not below zero and finite; use -5.0, or None for no bound"
            )
        self.decay_lower_bound = decay_lower_bound
        self.decay_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.step_bias = nn.Parameter(torch.empty(self.num_value_heads * self.key_dim))
        self.reset_parameters()

    @property
    def gate_width(self) -> int:
        """One a key channel of every value head, and beta."""
        return self.num_value_heads * (self.key_dim + 1)

    def gate_projection(self, dim: int) -> nn.Module:
        """Build the decay's projection of rank V, and beta's."""
        return KimiGates(dim, self.value_dim, self.num_value_heads * self.key_dim, self.num_value_heads)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw exp(decay_log) uniformly in [1, 16], steps as Gated DeltaNet does. A bound leaves the first decays."""
        self.decay_log.uniform_(1, 16)
        step = random_steps(self.step_bias)
        if self.decay_lower_bound is None:
            self.step_bias.copy_(inverse_softplus(step))
        else:
            rate = self.decay_log.repeat_interleave(self.key_dim)
            share = (rate * step / -self.decay_lower_bound).clamp_max(0.9)  # of the bound, that is forgotten
            self.step_bias.copy_(torch.logit(share) / rate)
        self.decay_log.log_()

    def gate_values(self, gates: Tensor | None, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return beta and the decay of every key channel."""
        heads = self.num_value_heads
        step, write = wider(given(gates)).split((heads * self.key_dim, heads), dim=-1)
        rate = self.decay_log.to(step.dtype).exp()[:, None]
        step = (step + self.step_bias.to(step.dtype)).unflatten(-1, (heads, self.key_dim))
        if self.decay_lower_bound is None:
            return self.write_strength(write), -rate * F.softplus(step)
        return self.write_strength(write), self.decay_lower_bound * torch.sigmoid(rate * step)


class KimiGates(nn.Module):
    """Raw gates of Kimi Delta Attention: a low-rank projection for the decays, a plain one for beta.

    Args:
        dim: Width of the input.
        rank: Rank of the decays' projection.
        num_decays: Decays a token.
        num_writes: Write strengths a token.

    Shape:
        x: (..., dim). Returns (..., num_decays + num_writes).
    """

    def __init__(self, dim: int, rank: int, num_decays: int, num_writes: int) -> None:
        super().__init__()
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, num_decays, bias=False))
        self.write = nn.Linear(dim, num_writes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project every token."""
        return torch.cat((self.decay(x), self.write(x)), dim=-1)


MATRIX_RULES: dict[str, type[MatrixRule]] = {
    "linear_attention": LinearAttentionRule,
    "retnet": RetNetRule,
    "gla": GatedLinearAttentionRule,
    "deltanet": DeltaNetRule,
    "gated_deltanet": GatedDeltaNetRule,
    "kda": KimiDeltaAttentionRule,
}


def given(gates: Tensor | None) -> Tensor:
    """Require raw gates.

    Raises:
        ValueError: There are none.
    """
    if gates is None:
        raise ValueError("gates=None, but the rule has gates; pass what its gate_projection makes of the tokens")
    return gates
