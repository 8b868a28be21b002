"""Parts of the NeuralMemory layer: its state, how it shapes what it stores, and checks of its options."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_divisible, check_positive
from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.backend import check_backend, refuse
from memzoo.layers.ops.cpp_library import require_compiler
from memzoo.layers.ops.elementwise import unit_norm
from memzoo.layers.ops.memory_arguments import Weights
from memzoo.layers.ops.neural_memory_fused import BACKENDS, KERNELS, check_fused
from memzoo.layers.ops.neural_memory_window import Recent, latest, with_recent
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.short_conv import ShortConvState
from memzoo.layers.state import MixerState


class Gates(NamedTuple):
    """What a token's write is weighed with, (batch, time, gates) each; None where the memory has no such gate."""

    theta: Tensor
    eta: Tensor | None
    alpha: Tensor
    gamma: Tensor | None


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
        recent: Keys, values and shares of the last ``objective_window - 1`` tokens, (batch, tokens, heads, head_dim)
            and, of the shares, (batch, tokens, gates); () with a window of 1.
    """

    weights: Weights
    momentum: Weights
    base: Weights
    conv: ShortConvState | None
    last_key: tuple[Tensor, ...]
    recent: tuple[Tensor, ...] = ()

    @staticmethod
    def zeros(
        batch_size: int,
        shapes: Sequence[tuple[int, ...]],
        conv: ShortConvState | None,
        *,
        momentum: bool,
        lookahead: bool,
        past: int,
        num_gates: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> "NeuralMemoryState":
        """Return the state of fresh rows with memories of these shapes, of which a write sees ``past`` tokens more."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        weights, surprise, base = (tuple(zeros(*shape) for shape in shapes) for _ in range(3))
        num_heads, head_dim, *_ = shapes[0]
        token = num_heads, head_dim
        count = torch.zeros(batch_size, dtype=torch.long, device=device)
        return NeuralMemoryState(
            count,
            count.clone(),
            weights,
            surprise if momentum else (),
            base,
            conv,
            (zeros(*token),) if lookahead else (),
            (zeros(past, *token), zeros(past, *token), zeros(past, num_gates)) if past else (),
        )

    def check(self, shapes: Sequence[tuple[int, ...]], **options: int) -> None:
        """Require memories of these shapes and parts for these options: whether there are any, or how many.

        Raises:
            ValueError: The state is of another layer.
        """
        own = [tuple(w.shape[1:]) for w in self.weights]
        parts = {
            "momentum": len(self.momentum) > 0,
            "convolution": self.conv is not None,
            "lookahead": len(self.last_key) > 0,
            "objective_window": 1 + self.recent[0].shape[1] if self.recent else 1,
            "shares": self.recent[2].shape[2] if self.recent else 0,
        }
        if own != list(shapes) or any(parts[name] != wanted for name, wanted in options.items()):
            theirs = ", ".join(f"{name}={part}" for name, part in parts.items())
            ours = ", ".join(f"{name}={wanted}" for name, wanted in options.items())
            raise ValueError(
                f"state holds memories of {own}, {theirs}; this layer's are {shapes}, {ours}: pass what its previous "
                f"call returned, or None to start afresh"
            )


def is_online(
    chunk_size: int, memory_depth: int, max_gradient_norm: float | None, residual_norm: bool, window: int
) -> bool:
    """Whether one triangular solve for many tokens does what the chunk form would do token by token."""
    return chunk_size == memory_depth == 1 and max_gradient_norm is None and not residual_norm and window == 1


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
    objective_window: int,
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
    check_positive("objective_window", objective_window, "1 is a step on a token's own loss")
    if (
        is_online(chunk_size, memory_depth, max_gradient_norm, residual_norm, objective_window)
        and checkpoint_chunks is not None
    ):
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
    if objective_window > 1 and backend in KERNELS:
        refuse(backend, f"objective_window={objective_window}; use 1")
    if implicit_step and (chunk_size, memory_depth, residual_norm, objective_window) != (1, 1, False, 1):
        raise ValueError(
            "implicit_step=True has a closed form for a linear memory written token by token only; use "
            "memory_depth=1, chunk_size=1, residual_norm=False and objective_window=1"
        )


def used_gates(*, momentum: bool, forgetting: bool, window: int) -> list[str]:
    """Return the names of a memory's gates, in the order of their values."""
    used = {"theta": True, "eta": momentum, "alpha": forgetting, "gamma": window > 1}
    return [name for name, is_used in used.items() if is_used]


def gate_bias(name: str, window: int) -> float:
    """Return what a gate starts at, before its sigmoid."""
    if name == "alpha":  # sigmoid(0) = 0.5 would forget everything within a few tokens
        return -4.0
    return -math.log(window - 1) if name == "gamma" else 0.0  # steps as long as on one token's loss


def gate_values(linear: nn.Linear, x: Tensor, names: Sequence[str], most: float) -> Gates:
    """Return the gates of these ``names``, theta up to ``most``, in at least float32; alpha is zeros without one."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device):
        values = F.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype)).sigmoid()
    gates = dict(zip(names, values.chunk(len(names), dim=-1), strict=True))
    theta = gates["theta"] * most
    return Gates(theta, gates.get("eta"), gates.get("alpha", torch.zeros_like(theta)), gates.get("gamma"))


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


def part_tokens(groups: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Make every group of value channels (batch, time, heads, width) a head of its own, with its head's keys."""
    return k.repeat_interleave(groups, 2), v.unflatten(-1, (groups, -1)).flatten(2, 3)


def seen_before(state: NeuralMemoryState, groups: int) -> Recent | None:
    """Return ``state.recent``, every group of value channels a head of its own."""
    if not state.recent:
        return None
    k, v, gamma = state.recent
    return *part_tokens(groups, k, v), gamma


def still_seen(
    k: Tensor, v: Tensor, gamma: Tensor | None, state: NeuralMemoryState | None, lengths: Tensor | None, window: int
) -> tuple[Tensor, ...]:
    """Return what the next call's writes see of tokens up to here, ``NeuralMemoryState.recent``."""
    if gamma is None:  # a window of 1
        return ()
    first = max(0, k.shape[1] - window + 1) if lengths is None else 0  # of a long call the last are enough
    k, v, gamma = (t[:, first:].to(torch.promote_types(t.dtype, torch.float32)) for t in (k, v, gamma))
    before = None if state is None else cast(Recent, state.recent)
    return latest(with_recent(k, v, gamma, before, window), lengths, window)


def where_read(lengths: Tensor, new: Weights, old: Weights) -> Weights:
    """Return what a call made, in rows that have read any token, and what was there before in others."""
    moved = (lengths > 0).view(-1, 1, 1, 1)
    return tuple(torch.where(moved, a, b) for a, b in zip(new, old, strict=True))


def delay(k: Tensor, last: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each token's predecessor's key, zeros before the first, and the key that the next call begins with."""
    first = torch.zeros_like(k[:, 0]) if last is None else last.to(k.dtype)
    keys = torch.cat([first[:, None], k], 1)
    if lengths is None:  # a copy, since a view would keep all keys alive
        return keys[:, :-1], keys[:, -1].clone()
    return keys[:, :-1], keys[torch.arange(len(k), device=k.device), lengths]


def unit(x: Tensor) -> Tensor:
    """Scale to unit length. Below 1e-4, a norm that float16 still holds, shrink: zeros have a tame gradient."""
    return unit_norm(x, 1e-4)
