"""Small layers of memory as context, and their inputs."""

from typing import Any

import torch
from torch import Tensor

from memzoo.layers.memory_as_context import MemoryAsContext

OPTIONS: list[dict[str, Any]] = [
    {"memory": {"chunk_size": 2}},
    {"memory": {"chunk_size": 4}},
    {"memory": {"chunk_size": 3}, "num_persistent_tokens": 0, "residual": True},
    {
        "retrieved_positions": False,
        "qk_norm": True,
        "gate": "convex",
        "residual": True,
        "memory": {"chunk_size": 6},
    },
    {"shared_query": False, "num_heads": 3, "head_dim": 4, "memory": {"read": "pre", "decay_to_init": True}},
    {"memory": {"chunk_size": 3, "objective_window": 3}},
    {
        "num_persistent_tokens": 0,
        "rotary_base": None,
        "shared_query": False,
        "memory": {"conv_width": None, "memory_depth": 1, "momentum": False, "num_heads": 1},
    },
]


def build(**options: Any) -> MemoryAsContext:
    torch.manual_seed(0)
    small = {"segment_size": 4, "num_persistent_tokens": 2, "num_heads": 2, "memory": {"chunk_size": 3}}
    layer = MemoryAsContext(8, **small | options).double()
    for w in layer.memory.initial_weights:  # a matrix starts at zero
        w.data += 0.1 * torch.randn_like(w)
    return layer


def tokens(batch: int = 2, time: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
