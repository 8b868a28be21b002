"""Parts of the NeuralMemory layer: its state, and how it shapes what it stores."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.memory_arguments import Weights
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


def part_columns(weights: Weights, groups: int) -> Weights:
    """Part the columns of every head's matrix: (batch, heads, d, width) -> (batch, heads * groups, d, ...)."""
    return tuple(w.unflatten(3, (groups, -1)).transpose(2, 3).flatten(1, 2) for w in weights)


def join_columns(weights: Weights, groups: int) -> Weights:
    """Undo ``part_columns``."""
    return tuple(w.unflatten(1, (-1, groups)).transpose(2, 3).flatten(3) for w in weights)


def delay(k: Tensor, last: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each token's predecessor's key, zeros before the first, and the key that the next call begins with."""
    first = torch.zeros_like(k[:, 0]) if last is None else last.to(k.dtype)
    keys = torch.cat([first[:, None], k], 1)
    if lengths is None:
        return keys[:, :-1], keys[:, -1]
    return keys[:, :-1], keys[torch.arange(len(k), device=k.device), lengths]


def unit(x: Tensor) -> Tensor:
    """Scale to unit length. Below 1e-4, a norm that float16 still holds, shrink: zeros have a tame gradient."""
    return F.normalize(x, dim=-1, eps=1e-4)
