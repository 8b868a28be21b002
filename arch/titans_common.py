"""What the four Titans share: the choices of their memory, and their sizes (arXiv 2501.00663)."""

from collections.abc import Mapping
from typing import Any

MEMORY_CHOICES = {
    "memory_depth": "2 layers; the paper tries 1 to 4",
    "memory_expansion": "hidden width of 2 head_dim; plain MLP, no bias, no norm, no residual",
    "activation": "SiLU between the memory's layers",
    "chunk_size": "64 tokens share the weights their gradients are taken at; part of the model",
    "conv_width": "causal depthwise convolution of width 4 after the q, k and v projections; None for none",
    "momentum": "eta = sigmoid of a token's linear gate, a scalar per head, bias 0; False is the paper's ablation",
    "forgetting": "alpha = sigmoid of a token's linear gate, a scalar per head, bias -4; False is the ablation",
    "max_learning_rate": "theta = max_learning_rate * sigmoid of a linear gate; None for chunk_size ** -0.5",
    "loss_scale": "1: gradients of ‖M(k) - v‖² / 2; 2 is the main text's loss",
    "read": "'post', after the token's own write; 'pre' reads before it",
    "output_norm": "RMSNorm over the read-outs of all heads",
    "output_gate": "the read-out is multiplied by SiLU of a linear gate, before the output projection",
    "initial weights": "learned per head, variance 1 / fan-in (zero at a depth of 1); initial momentum zero",
    "decay_to_init": "off: forgetting decays to zero, where a deep memory is dead; on in the tiny models",
    "max_gradient_norm": "off; 1.0 in the tiny models; bounds every step, and drops a token that overflows",
    "residual_norm": "off; on for TTT's memory x + LayerNorm(MLP(x))",
    "gate_groups": "1: a scalar gate per head; more gives groups of a linear memory's channels gates of their own",
    "lookahead_values": "off: a value is stored under its own token's key, not under the one before",
    "implicit_step": "off: explicit gradient steps; on for Longhorn's closed form",
    "objective_window": "1: every step on its token's own loss; more for the Omega rule, with a share for every token",
}
"""Options of ``NeuralMemory`` that the paper leaves open -> what is chosen."""

STABLE_MEMORY: dict[str, Any] = {"decay_to_init": True, "max_gradient_norm": 1.0}
"""Options that keep an untrained or far extrapolating memory from fading to nothing and from diverging."""

SIZES: dict[str, dict[str, int]] = {
    "170m": dict(vocab_size=32000, dim=768, depth=12),
    "340m": dict(vocab_size=32000, dim=1024, depth=24),
    "760m": dict(vocab_size=32000, dim=1536, depth=24),
}
"""Gated DeltaNet's shapes of the paper's three sizes; the paper gives none."""

IN_LAYERS = {
    "num_persistent_tokens": "16 in every block, drawn with variance 1, without positions; their outputs are dropped",
    "num_heads": "None: heads of head_dim, of the attention and of the memory",
    "head_dim": "64",
    "rotary_base": "rotary positions in the attention, base 10000; none in the memory",
    "qk_norm": "off",
    "hidden_dim": "SwiGLU of 8/3 dim, rounded up to a multiple of 64",
    "tie_embeddings": "on",
}
"""Further choices of the three that also attend."""


def memory_choices() -> dict[str, str]:
    """Return the memory's choices under the names they have in a model's ``memory`` option."""
    return {f"memory.{name}": choice for name, choice in MEMORY_CHOICES.items()}


def with_stable_memory(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``overrides`` with the stable memory's options under those given."""
    return {**overrides, "memory": STABLE_MEMORY | dict(overrides.get("memory") or {})}
