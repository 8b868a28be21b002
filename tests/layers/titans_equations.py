"""What Titans' layers compute, literally: rows [P || x] laid out whole, one mask, one softmax, the loop over tokens."""

import torch
from torch import Tensor

from memzoo.layers import Attention, NeuralMemory, RMSNorm
from memzoo.layers.persistent_memory import PersistentMemory
from tests.layers.test_neural_memory_layer import by_the_equations

DIM = 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(batch: int = 2, time: int = 8, seed: int = 0) -> Tensor:
    return randn(batch, time, DIM, seed=seed)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, every parameter moved off its initial value."""
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def prefixed(persistent: PersistentMemory | None, x: Tensor) -> Tensor:
    """[P || x], row by row."""
    return x if persistent is None else torch.stack([torch.cat([persistent.tokens, row]) for row in x])


def read(memory: NeuralMemory, rows: Tensor) -> Tensor:
    """The memory's outputs over whole rows."""
    return by_the_equations(memory, rows)[0]


def attend(layer: Attention, rows: Tensor, num_prefix: int, window: int | None = None) -> Tensor:
    """Prefix sliding-window attention over rows [P || x], outputs at P included."""
    batch, time, _ = rows.shape
    position = torch.arange(time) - num_prefix

    def heads(weight: Tensor, norm: torch.nn.Module | None = None, *, turn: bool = False) -> Tensor:
        y = (rows @ weight.T).unflatten(-1, (-1, layer.head_dim))
        if isinstance(norm, RMSNorm):
            y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        if turn and layer.rotary is not None:
            half = layer.head_dim // 2
            speed = layer.rotary.base ** (-torch.arange(half, dtype=torch.float64) / half)
            angle = position.clamp_min(0)[:, None, None] * speed
            turned = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angle), angle)
            y = torch.cat([turned.real, turned.imag], -1)
        return y.repeat_interleave(layer.num_heads // y.shape[2], 2)

    q = heads(layer.query.weight, layer.query_norm, turn=True)
    k = heads(layer.key.weight, layer.key_norm, turn=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * layer.head_dim**-0.5
    distance = position[:, None] - position
    visible = (distance >= 0) & ((distance < (window or time)) | (position < 0))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, heads(layer.value.weight))
    return y.reshape(batch, time, -1) @ layer.out.weight.T
