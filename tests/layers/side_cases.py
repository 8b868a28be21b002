"""The least side memory there is, and a host for it."""

from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import SwiGLU
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.sites import find_feed_forwards

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])


class Skip(SideMemory):
    """The least there is: ``y + gain * x``, a number for each site."""

    def __init__(self, host: nn.Module, sites: dict[str, nn.Module], *, gain: float = 1.0, wrap: bool = False) -> None:
        super().__init__(host, sites, wrap=wrap)
        self.gain = nn.Parameter(torch.full((len(sites),), gain))
        self.start = gain

    @classmethod
    def attach(cls, host: nn.Module, *names: str, **options: Any) -> Self:
        found = names or find_feed_forwards(host)
        return cls(host, {name: dict(host.named_modules())[name] for name in found}, **options)._install()

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        return y + self.gain[index].to(x.dtype) * x

    def reset(self) -> None:
        with torch.no_grad():
            self.gain.fill_(self.start)

    def _describe(self) -> dict[str, Any]:
        return {"sites": list(self.sites), "start": self.start}

    def _append(self) -> None:
        self._scale(2.0)

    def _remove(self) -> None:
        self._scale(0.5)

    def _scale(self, by: float) -> None:
        for parameter in self.host.parameters():
            parameter.data.mul_(by)


def stack(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(SwiGLU(8, hidden_dim=12) for _ in range(depth)))


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
