"""What the tests of the discrete key-value bottleneck share."""

from typing import Any

import torch
from torch import Tensor

from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck

SIZES: dict[str, Any] = {"num_codebooks": 6, "num_pairs": 11, "dim_key": 3, "dim_value": 5}
DIM = 18


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(dtype: torch.dtype = torch.float64, *, frozen: bool = True, **options: Any) -> DiscreteKeyValueBottleneck:
    """The same numbers each time; its keys are random and frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bottleneck = DiscreteKeyValueBottleneck(DIM, **SIZES | options).to(dtype)
    if frozen and bottleneck.scale is not None:
        bottleneck.scale.fill_(1.25)
    if frozen:
        bottleneck.freeze_keys()
    return bottleneck


def frozen_tensors(bottleneck: DiscreteKeyValueBottleneck) -> dict[str, Tensor]:
    """Copies of all that training leaves alone."""
    return {name: buffer.clone() for name, buffer in bottleneck.named_buffers() if name != "usage"}


def same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
