"""Test-time learners that are a neural memory with other settings: their rules, each a row of one table.

With ``e = M(k) - v`` and gradients at the chunk's base:

| layer | memory | write |
|---|---|---|
| ``ttt_linear`` | x + LN(x W) | W - theta grad |
| ``ttt_mlp`` | x + LN(gelu(x W_1) W_2) | W - theta grad |
| ``delta_memory`` | x W | W - theta k^T e, every token at its own base |
| ``longhorn`` | x W | the same with theta / (1 + theta abs(k)^2), one theta a value channel |
| ``omega_memory`` | act(x W_1) W_2 | (1 - alpha) W - theta times the sum of gamma grad over the last 16 tokens |

What surrounds the rule (projections, convolution, output norm and gate) is that of ``NeuralMemory``, not each paper's.
"""

import functools
from typing import Any

from memzoo.layers.heads import resolve_heads
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.registry import register_layer

PLAIN: dict[str, Any] = {"momentum": False, "forgetting": False}


def ttt_linear(dim: int, **options: Any) -> NeuralMemory:
    """Build TTT-Linear: gradient steps on a matrix behind a residual LayerNorm, 16 tokens at the same weights.

    Args:
        dim: Width of ``x`` and ``y``.
        options: Of ``NeuralMemory``; they take precedence over those that make the rule.

    Raises:
        ValueError: ``NeuralMemory`` refuses an option.

    Reference:
        Sun et al., arXiv 2407.04620, section 2. The paper's inner model has a bias; this one has none.
    """
    rule = {"memory_depth": 1, "residual_norm": True, "chunk_size": 16}
    return NeuralMemory(dim, **PLAIN | rule | options)


def ttt_mlp(dim: int, **options: Any) -> NeuralMemory:
    """Build TTT-MLP: as ``ttt_linear``, of two layers with GELU and a hidden width of four times the head's.

    Args:
        dim: Width of ``x`` and ``y``.
        options: Of ``NeuralMemory``; they take precedence over those that make the rule.

    Raises:
        ValueError: ``NeuralMemory`` refuses an option.

    Reference:
        Sun et al., arXiv 2407.04620, section 2.
    """
    rule = {"memory_depth": 2, "memory_expansion": 4.0, "activation": "gelu", "residual_norm": True, "chunk_size": 16}
    return NeuralMemory(dim, **PLAIN | rule | options)


def delta_memory(dim: int, **options: Any) -> NeuralMemory:
    """Build DeltaNet's rule: every token replaces what its key recalls, by a share theta.

    Args:
        dim: Width of ``x`` and ``y``.
        options: Of ``NeuralMemory``; they take precedence over those that make the rule.

    Raises:
        ValueError: ``NeuralMemory`` refuses an option.

    Reference:
        Yang et al., arXiv 2406.06484.
    """
    return NeuralMemory(dim, **PLAIN | {"memory_depth": 1, "chunk_size": 1} | options)


def longhorn(dim: int, **options: Any) -> NeuralMemory:
    """Build Longhorn's rule: every token solves its own loss, with a step size for every value channel.

    Args:
        dim: Width of ``x`` and ``y``.
        options: Of ``NeuralMemory``; they take precedence over those that make the rule.

    Raises:
        ValueError: ``NeuralMemory`` refuses an option.

    Reference:
        Liu et al., arXiv 2407.14207, section 3. The paper then drops the off-diagonal part of k^T k to run as a
        diagonal recurrence; this is the solution before that.
    """
    _, head_dim = resolve_heads(dim, options.get("num_heads"), options.get("head_dim"))
    rule = {"memory_depth": 1, "chunk_size": 1, "implicit_step": True, "gate_groups": head_dim}
    return NeuralMemory(dim, **PLAIN | rule | options)


def omega_memory(dim: int, **options: Any) -> NeuralMemory:
    """Build OmegaNet's rule: every step descends the losses of the last 16 tokens, each times its own share.

    Args:
        dim: Width of ``x`` and ``y``.
        options: Of ``NeuralMemory``; they take precedence over those that make the rule.

    Raises:
        ValueError: ``NeuralMemory`` refuses an option.

    Reference:
        Behrouz et al., arXiv 2505.23735, equations 9 and 10. The paper expands keys and queries in polynomials, which
        this does not; a share belongs to a token, not to a token and a step.
    """
    return NeuralMemory(dim, **{"momentum": False, "objective_window": 16} | options)


for _build in (ttt_linear, ttt_mlp, delta_memory, longhorn, omega_memory):
    register_layer(_build.__name__, "mixer")(functools.partial(_build, num_heads=2))
