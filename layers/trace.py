"""Trace: how a layer reports auxiliary losses and quantities worth looking at, without leaving anything on a module."""

from typing import Self

from torch import Tensor


class Trace:
    """Collects what layers report during one forward pass.

    ``losses`` keeps the graph (add them to the objective); ``signals`` are detached. Names are prefixed with the
    layer's path: ``blocks.3.mixer.surprise``. With ``trace=None`` layers compute nothing for it.

    Args:
        prefix: Put before every name.
        signals: Whether signals are wanted; if not, layers that would have to compute them leave them out.

    Example:
        >>> import torch
        >>> trace = Trace()
        >>> trace.scope("blocks.0").signal("gate", torch.ones(2))
        >>> list(trace.signals)
        ['blocks.0.gate']
    """

    def __init__(self, prefix: str = "", *, signals: bool = True) -> None:
        self.prefix = prefix
        self.wants_signals = signals
        self.losses: dict[str, Tensor] = {}
        self.signals: dict[str, Tensor] = {}

    def scope(self, name: str) -> Self:
        """Return a view that writes into the same dicts with ``name.`` put before every name."""
        child = type(self)(f"{self.prefix}{name}.", signals=self.wants_signals)
        child.losses, child.signals = self.losses, self.signals
        return child

    def loss(self, name: str, value: Tensor) -> None:
        """Record an auxiliary loss, a scalar already multiplied by its weight.

        Raises:
            ValueError: ``value`` is not a scalar, or the name was used before.
        """
        if value.dim():
            raise ValueError(f"loss {self.prefix + name!r} has shape {tuple(value.shape)}; reduce it to a scalar")
        self._put(self.losses, name, value)

    def signal(self, name: str, value: Tensor) -> None:
        """Record a tensor to look at, detached, if signals are wanted.

        Raises:
            ValueError: The name was used before.
        """
        if self.wants_signals:
            self._put(self.signals, name, value.detach())

    def _put(self, where: dict[str, Tensor], name: str, value: Tensor) -> None:
        path = self.prefix + name
        if path in where:
            raise ValueError(f"{path!r} was recorded twice; give each layer its own trace.scope(name)")
        where[path] = value
