"""Trace: how a layer reports auxiliary losses and quantities worth looking at, without leaving anything on a module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]
Combine = Callable[..., Tensor]
Value = TypeVar("Value")


@dataclass
class _Pool:
    """One loss that many layers make together: how, and the parts of each, by the layer's path."""

    combine: Combine
    parts: dict[str, Parts] = field(default_factory=dict)

    def value(self) -> Tensor:
        return self.combine(*(torch.stack(part) for part in zip(*self.parts.values(), strict=True)))


class Trace:
    """Collects what layers report during one forward pass.

    ``losses`` keeps the graph (add them to the objective); ``signals``, to look at, and ``statistics``, for the layer
    itself after the optimiser's step, are detached. Names are prefixed with the layer's path:
    ``blocks.3.mixer.surprise``. With ``trace=None`` layers compute nothing for it.

    Args:
        prefix: Put before every name.
        signals: Whether signals are wanted; if not, layers that would have to compute them leave them out.

    Example:
        >>> import torch
        >>> trace = Trace()
        >>> trace.scope("blocks.0").signal("gate", torch.ones(2))
        >>> list(trace.signals)
        ['blocks.0.gate']
        >>> for layer in ("blocks.0", "blocks.1"):
        ...     trace.scope(layer).pool("balance", (torch.tensor(2.0),), torch.mean)
        >>> trace.losses
        {'balance': tensor(2.)}
    """

    def __init__(self, prefix: str = "", *, signals: bool = True) -> None:
        self.prefix = prefix
        self.wants_signals = signals
        self.signals: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}
        self._pools: dict[str, _Pool] = {}

    @property
    def losses(self) -> dict[str, Tensor]:
        """Every auxiliary loss by its name, those that layers made together under the name alone."""
        losses = dict(self._losses)
        for name, pool in self._pools.items():
            _put(losses, name, pool.value())
        return losses

    def scope(self, name: str) -> Self:
        """Return a view that writes into the same dicts with ``name.`` put before every name."""
        child = type(self)(f"{self.prefix}{name}.", signals=self.wants_signals)
        child.signals, child.statistics = self.signals, self.statistics
        child._losses, child._pools = self._losses, self._pools
        return child

    def loss(self, name: str, value: Tensor) -> None:
        """Record an auxiliary loss, a scalar already multiplied by its weight.

        Raises:
            ValueError: ``value`` is not a scalar, or the name was used before.
        """
        path = self.prefix + name
        if value.dim():
            raise ValueError(f"loss {path!r} has shape {tuple(value.shape)}; reduce it to a scalar")
        _put(self._losses, path, value)

    def pool(self, name: str, value: Parts, combine: Combine) -> None:
        """Record this layer's part of a loss that is defined over all layers, such as their mean.

        What is recorded under ``name`` in any scope makes one entry of ``losses``, called ``name`` without a prefix.

        Args:
            name: Of the loss.
            value: This layer's part: tensors with their graph, of shapes common to all layers.
            combine: Makes the loss, a scalar already multiplied by its weight, of the tensors of ``value``, each
                stacked over the layers along a new first axis. The same function in all layers.

        Raises:
            ValueError: The name was used before, here or as a loss, or another layer pools other shapes under it or
                with another function.
        """
        self._pool(name, self.prefix + name, value, combine)

    def signal(self, name: str, value: Tensor) -> None:
        """Record a tensor to look at, detached, if signals are wanted.

        Raises:
            ValueError: The name was used before.
        """
        if self.wants_signals:
            _put(self.signals, self.prefix + name, value.detach())

    def statistic(self, name: str, value: Tensor) -> None:
        """Record what the layer wants back after the optimiser's step, detached: such as sums for a running mean.

        It is the caller who hands it back: a forward pass changes no module, so that one which is computed again for
        the backward pass counts once, and those of several micro-batches or devices can be added up.

        Raises:
            ValueError: The name was used before.
        """
        _put(self.statistics, self.prefix + name, value.detach())

    def merge(self, other: Self, transform: Callable[[Tensor], Tensor] = lambda signal: signal) -> None:
        """Hand on everything that ``other`` collected, as if it had been recorded here.

        Args:
            other: A trace without prefix that the layer was given in place of this one.
            transform: Applied to every signal on its way.

        Raises:
            ValueError: As ``loss``, ``pool``, ``signal`` and ``statistic``.
        """
        for path, loss in other._losses.items():
            self.loss(path, loss)
        for name, pool in other._pools.items():
            for path, value in pool.parts.items():
                self._pool(name, self.prefix + path, value, pool.combine)
        for path, signal in other.signals.items():
            self.signal(path, transform(signal))
        for path, statistic in other.statistics.items():
            self.statistic(path, statistic)

    def _pool(self, name: str, path: str, value: Parts, combine: Combine) -> None:
        pool = self._pools.setdefault(name, _Pool(combine))
        other, parts = next(iter(pool.parts.items()), (path, value))
        if pool.combine != combine or [part.shape for part in parts] != [part.shape for part in value]:
            raise ValueError(
                f"{path!r} and {other!r} are pooled in different ways; give all layers of the model equal options, or "
                f"their losses different names"
            )
        _put(pool.parts, path, value)


def _put(where: dict[str, Value], path: str, value: Value) -> None:
    if path in where:
        raise ValueError(f"{path!r} was recorded twice; give each layer its own trace.scope(name)")
    where[path] = value
