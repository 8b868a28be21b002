"""Parts of the NeuralMemory layer: its state, how it shapes what it stores, and checks of its options."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_divisible, check_positive
from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.cpp_library import require_compiler
from memzoo.layers.ops.elementwise import unit_norm
from memzoo.layers.ops.memory_arguments import Weights
from memzoo.layers.ops.neural_memory_fused import BACKENDS, check_fused
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.short_conv import ShortConvState
from memzoo.layers.state import MixerState

Gates = tuple[Tensor, Tensor | None, Tensor]  # theta, eta, alpha


@dataclass(frozen=True)
class NeuralMemoryState(MixerState):
    """The memory after the tokens read so far; its size does not depend on their number.

    Attributes:
        weights: W, one (batch, heads, d_in, d_out) a memory layer.
        momentum: S, past surprise, like ``weights``; () without momentum.
        base: W at the start of the running chunk, where gradients are taken, like ``weights``.
        conv: Tail of the short convolution; None without one.
        last_key: Key of the last token, (batch, heads, head_dim), which waits for its value; () unless the layer has
            ``lookahead_values``.
    """

    weights: Weights
    momentum: Weights
    base: Weights
    conv: ShortConvState | None
    last_key: tuple[Tensor, ...]

    def check(self, shapes: list[tuple[int, ...]], **options: bool) -> None:
        """Require memories of these shapes and parts for these options.

        Raises:
            ValueError: The state is of another layer.
        """
        own = [tuple(w.shape[1:]) for w in self.weights]
        parts = {"momentum": len(self.momentum), "convolution": self.conv is not None, "lookahead": len(self.last_key)}
        if own != shapes or any(bool(parts[name]) != wanted for name, wanted in options.items()):
            theirs = ", ".join(f"{name}={bool(part)}" for name, part in parts.items())
            ours = ", ".join(f"{name}={wanted}" for name, wanted in options.items())
            raise ValueError(
                f"state holds memories of {own}, {theirs}; this layer's are {shapes}, {ours}: pass what its previous "
                f"call returned, or None to start afresh"
            )


def is_online(chunk_size: int, memory_depth: int, max_gradient_norm: float | None, residual_norm: bool) -> bool:
    """Whether one triangular solve for many tokens does what the chunk form would do token by token."""
    return chunk_size == memory_depth == 1 and max_gradient_norm is None and not residual_norm


def hidden_width(head_dim: int, memory_expansion: float) -> int:
    """Return the width of the hidden layers of a head's memory.

    Raises:
        ValueError: No unit is left.
    """
    hidden = round(memory_expansion * head_dim)
    if hidden < 1:
        raise ValueError(f"memory_expansion={memory_expansion} leaves no hidden unit of a head of {head_dim}; use more")
    return hidden


def check_options(
    *,
    head_dim: int,
    memory_depth: int,
    memory_expansion: float,
    chunk_size: int,
    activation: str,
    conv_width: int | None,
    max_learning_rate: float | None,
    loss_scale: float,
    read: str,
    max_gradient_norm: float | None,
    residual_norm: bool,
    gate_groups: int,
    implicit_step: bool,
    checkpoint_chunks: int | None,
    backend: str,
) -> None:
    """Require options in their ranges that make sense together.

    Raises:
        ValueError: One does not.
    """
    check_positive("memory_depth", memory_depth)
    check_positive("chunk_size", chunk_size)
    if conv_width is not None:
        check_positive("conv_width", conv_width, "it counts the current token; use None for no convolution")
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("read", read, ("post", "pre"))
    check_backend(backend, BACKENDS)
    if backend == "cpp":
        require_compiler("neural_memory")
    for name, value in (
        ("max_learning_rate", max_learning_rate),
        ("loss_scale", loss_scale),
        ("max_gradient_norm", max_gradient_norm),
        ("memory_expansion", memory_expansion),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not positive and finite; use a finite value above 0")
    if checkpoint_chunks is not None:
        check_positive("checkpoint_chunks", checkpoint_chunks, "use None to keep everything")
    check_positive("gate_groups", gate_groups, "1 is one gate a head")
    check_divisible("head_dim", head_dim, "gate_groups", gate_groups)
    if gate_groups > 1 and (memory_depth > 1 or residual_norm):
        raise ValueError(
            f"gate_groups={gate_groups} needs a memory whose columns learn apart; use memory_depth=1 and "
            f"residual_norm=False"
        )
    if is_online(chunk_size, memory_depth, max_gradient_norm, residual_norm) and checkpoint_chunks is not None:
        raise ValueError(
            f"checkpoint_chunks={checkpoint_chunks} is for the chunk form; a linear memory with chunk_size=1 is "
            f"solved in blocks and keeps little as it is: use None"
        )
    check_fused(
        backend,
        memory_depth=memory_depth,
        residual_norm=residual_norm,
        checkpoint_chunks=checkpoint_chunks,
        head_dim=head_dim,
        hidden_widths=[hidden_width(head_dim, memory_expansion)] * (memory_depth - 1),
        chunk_size=chunk_size,
    )
    if implicit_step and (chunk_size, memory_depth, residual_norm) != (1, 1, False):
        raise ValueError(
            "implicit_step=True has a closed form for a linear memory written token by token only; use "
            "memory_depth=1, chunk_size=1 and residual_norm=False"
        )


def gate_values(linear: nn.Linear, x: Tensor, most: float, *, momentum: bool, forgetting: bool) -> Gates:
    """Return theta up to ``most``, eta or None, and alpha or zeros, each (batch, time, gates), in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device):
        gates = F.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))
    values = list(gates.sigmoid().chunk(1 + momentum + forgetting, dim=-1))
    theta = values.pop(0) * most
    eta = values.pop(0) if momentum else None
    return theta, eta, values.pop(0) if forgetting else torch.zeros_like(theta)


def implicit_rate(theta: Tensor, k: Tensor, loss_scale: float, groups: int) -> Tensor:
    """Return the rate of a gradient step that lands where solving a step's loss lands, groups of it a head."""
    squared = k.to(theta.dtype).square().sum(-1).repeat_interleave(groups, dim=-1)
    return theta / (1 + loss_scale * theta * squared)


def part_columns(weights: Weights, groups: int) -> Weights:
    """Part the columns of every head's matrix: (batch, heads, d, width) -> (batch, heads * groups, d, ...)."""
    return tuple(w.unflatten(3, (groups, -1)).transpose(2, 3).flatten(1, 2) for w in weights)


def join_columns(weights: Weights, groups: int) -> Weights:
    """Undo ``part_columns``."""
    return tuple(w.unflatten(1, (-1, groups)).transpose(2, 3).flatten(3) for w in weights)


def where_read(lengths: Tensor, new: Weights, old: Weights) -> Weights:
    """Return what a call made, in rows that have read any token, and what was there before in others."""
    moved = (lengths > 0).view(-1, 1, 1, 1)
    return tuple(torch.where(moved, a, b) for a, b in zip(new, old, strict=True))


def delay(k: Tensor, last: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each token's predecessor's key, zeros before the first, and the key that the next call begins with."""
    first = torch.zeros_like(k[:, 0]) if last is None else last.to(k.dtype)
    keys = torch.cat([first[:, None], k], 1)
    if lengths is None:
        return keys[:, :-1], keys[:, -1]
    return keys[:, :-1], keys[torch.arange(len(k), device=k.device), lengths]


def unit(x: Tensor) -> Tensor:
    """Scale to unit length. Below 1e-4, a norm that float16 still holds, shrink: zeros have a tame gradient."""
    return unit_norm(x, 1e-4)
