"""Registry of layers: what the contract suite builds and tests, and what `memzoo list` shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import nn

from memzoo.layers.errors import check_choice

Kind = Literal["mixer", "channel", "reader", "side", "bottleneck"]
StateSize = Literal["constant", "grows"]
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the catalog.

    Attributes:
        name: Unique, snake_case.
        kind: Which contract it keeps (docs/contract.md).
        build: ``build(dim, **overrides)``, a layer of width ``dim`` small enough to test in float64. That of a reader
            takes ``memory_dim`` too; that of a side memory takes its host in place of ``dim``.
        state_size: Whether its state is constant in the length of the context or grows with it.
        compiles: Whether ``torch.compile(fullgraph=True)`` is promised.
        routed: Whether the data decides the shape of its products. What does not depend on each other (the past on the
            future, a row on the others) is then equal to 1e-12 in float64 and not to the last bit: a product of another
            shape may add up in another order.
        skips: Contract tests it does not keep, each with the reason, which the model card repeats.
    """

    name: str
    kind: Kind
    build: Callable[..., nn.Module]
    state_size: StateSize = "constant"
    compiles: bool = True
    routed: bool = False
    skips: Mapping[str, str] = field(default_factory=dict)


_ENTRIES: dict[str, LayerEntry] = {}


def register_layer(
    name: str,
    kind: Kind,
    *,
    state_size: StateSize = "constant",
    compiles: bool = True,
    routed: bool = False,
    skips: Mapping[str, str] | None = None,
) -> Callable[[Factory], Factory]:
    """Register the factory below it, a function ``build(dim, **overrides)`` with small defaults.

    Raises:
        ValueError: The name is taken.
    """

    def register(build: Factory) -> Factory:
        if name in _ENTRIES:
            raise ValueError(f"layer name={name!r} is already registered; choose another name")
        _ENTRIES[name] = LayerEntry(name, kind, build, state_size, compiles, routed, dict(skips or {}))
        return build

    return register


def list_layers(kind: Kind | None = None) -> list[str]:
    """Return the sorted names of the registered layers, of one kind if given."""
    return sorted(name for name, entry in _ENTRIES.items() if kind in (None, entry.kind))


def layer_entry(name: str) -> LayerEntry:
    """Return the entry of a registered layer.

    Raises:
        ValueError: No such layer; the nearest name is suggested.
    """
    check_choice("name", name, sorted(_ENTRIES))
    return _ENTRIES[name]


def create_layer(name: str, dim: int, **overrides: Any) -> nn.Module:
    """Build a registered layer with its small defaults; a side memory is attached to a ``SwiGLU`` of that width.

    Raises:
        ValueError: No such layer, or an argument it refuses.
    """
    entry = layer_entry(name)
    if entry.kind == "side":
        from memzoo.layers.feedforward import SwiGLU  # which registers itself here

        return entry.build(SwiGLU(dim), **overrides)
    return entry.build(dim, **overrides)
