"""What the broken parts share: the list of them, each with a check that must notice."""

from collections.abc import Callable
from typing import Any

from torch import nn

from memzoo.arch import CausalLM, FrozenClassifier
from memzoo.layers import DiscreteKeyValueBottleneck, GatedMemoryUnit
from memzoo.layers.side_memory import SideMemory
from tests.contract.checks import Part
from tests.contract.checks.core import DIM
from tests.contract.example import ExponentialAverage

VOCAB_SIZE = 23
KINDS: dict[type[nn.Module], str] = {
    ExponentialAverage: "mixer",
    GatedMemoryUnit: "reader",
    DiscreteKeyValueBottleneck: "bottleneck",
    FrozenClassifier: "classifier",
}
BROKEN: list[tuple[Part, str]] = []


def fails(*checks: str, **attributes: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """List the class below as a part that fails these checks."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        if issubclass(cls, CausalLM):
            part = Part(cls.__name__, "model", cls, vocab_size=VOCAB_SIZE, **attributes)
        elif issubclass(cls, SideMemory):
            part = Part(cls.__name__, "side", cls.attach, **attributes)
        else:
            kind = next((kind for base, kind in KINDS.items() if issubclass(cls, base)), "channel")
            part = Part(cls.__name__, kind, lambda: cls(DIM), **attributes)
        BROKEN.extend((part, name) for name in checks)
        return cls

    return register
