"""Small neural memory layers and their inputs."""

from typing import Any

import torch
from torch import Tensor

from memzoo.layers import NeuralMemory


def build(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    layer = NeuralMemory(8, **{"num_heads": 2, "chunk_size": 3} | options).double()
    for w in layer.initial_weights:  # a matrix starts at zero
        w.data += 0.1 * torch.randn_like(w)
    return layer


def tokens(batch: int = 2, time: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
