"""FeedForwardSite: a feed-forward, whoever made it, seen as matrices.

A feed-forward is a soft table of slots: ``FFN(x) = sum_j act(<x, gate_j>) <x, up_j> down_j``, or without a gate
``sum_j act(<x, up_j>) down_j``. Memories that are attached to a host read its slots and lay their own beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.side_wrapper import unwrap

WIDTHS = ("intermediate_size", "memory_dim")  # what hosts call the number of slots, on a feed-forward


@dataclass(frozen=True)
class Parts:
    """What a class of feed-forwards calls its parts.

    Attributes:
        up: Matrix that slots are found by.
        down: Matrix of what they return.
        activation: Between them, or of the gate.
        gate: Matrix of the gate. Where it is also ``up``, the two are one matrix, a half each.
        gate_first: Whether the gate is the first half of such a matrix.
    """

    up: str
    down: str
    activation: Callable[[Tensor], Tensor]
    gate: str | None = None
    gate_first: bool = True

    @property
    def fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up


@dataclass(frozen=True, eq=False)
class Resized:
    """A linear layer with matrices of another size, which it does not have yet.

    Attributes:
        layer: ``nn.Linear`` or ``Conv1D``.
        weight: As the layer keeps it.
        bias: None if it stays what it is.
    """

    layer: Any
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class FeedForwardSite:
    """A feed-forward of a host: ``down (act(gate x) * (up x))``, or ``down act(up x)``.

    Matrices are (out, in) as those of ``nn.Linear``, however the host keeps them, and views of its parameters.

    Attributes:
        name: Of the module in its host.
        module: The feed-forward.
        parts: How it is made up.
    """

    name: str
    module: nn.Module
    parts: Parts

    @property
    def dim(self) -> int:
        """What it reads and returns."""
        return self.down_weight.shape[0]

    @property
    def width(self) -> int:
        """Number of its slots."""
        return self.down_weight.shape[1]

    @property
    def gated(self) -> bool:
        """Whether its slots have a gate."""
        return self.parts.gate is not None

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Between its matrices, or of the gate."""
        return self.parts.activation

    @property
    def down(self) -> Any:
        """The layer that reads what the slots are multiplied with."""
        return self._layer(self.parts.down)

    @property
    def gate_weight(self) -> Tensor | None:
        """(width, dim); None without a gate."""
        return None if self.parts.gate is None else self._half(matrix_of(self._layer(self.parts.gate)), gate=True)

    @property
    def gate_bias(self) -> Tensor | None:
        """(width,), if it has one."""
        bias = None if self.parts.gate is None else self._layer(self.parts.gate).bias
        return None if bias is None else self._half(bias, gate=True)

    @property
    def up_weight(self) -> Tensor:
        """(width, dim)."""
        return self._half(matrix_of(self._layer(self.parts.up)), gate=False)

    @property
    def up_bias(self) -> Tensor | None:
        """(width,), if it has one."""
        bias = self._layer(self.parts.up).bias
        return None if bias is None else self._half(bias, gate=False)

    @property
    def down_weight(self) -> Tensor:
        """(dim, width): a slot is a column."""
        return matrix_of(self.down)

    def hidden(self, x: Tensor) -> Tensor:
        """Return what every slot is multiplied with, (..., dim) -> (..., width)."""
        up = F.linear(x, self.up_weight, self.up_bias)
        if self.gate_weight is None:
            return self.activation(up)
        return self.activation(F.linear(x, self.gate_weight, self.gate_bias)) * up

    @torch.no_grad()
    def append(
        self,
        up: Tensor,
        down: Tensor,
        *,
        gate: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> None:
        """Add slots behind the others; they take the host's dtype and device. Parameters stay the same objects.

        Shape:
            up, gate: (slots, dim). down: (dim, slots). up_bias, gate_bias: (slots,), zeros by default.
        """
        self.assign(self.appended(up, down, gate=gate, up_bias=up_bias, gate_bias=gate_bias))

    @torch.no_grad()
    def appended(
        self,
        up: Tensor,
        down: Tensor,
        *,
        gate: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
    ) -> list[Resized]:
        """Return what ``append`` assigns to the layers; nothing is changed."""
        sides = [(up, up_bias)]
        if gate is not None and self.parts.fused:
            sides = [(gate, gate_bias), (up, up_bias)] if self.parts.gate_first else [(up, up_bias), (gate, gate_bias)]
        wider = [_grown(self._layer(self.parts.up), sides)]
        if gate is not None and not self.parts.fused:
            wider.append(_grown(self._layer(str(self.parts.gate)), [(gate, gate_bias)]))
        read = torch.cat([self.down_weight, down.to(self.down_weight)], 1)
        return [*wider, _resized(self.down, read, None)]

    def remove(self, slots: int) -> None:
        """Take the last slots off again: what is left is what it was before ``append``, to the bit."""
        self.assign(self.removed(slots))

    @torch.no_grad()
    def removed(self, slots: int) -> list[Resized]:
        """Return what ``remove`` assigns to the layers; nothing is changed."""
        left, narrower = self.width - slots, []
        for name in dict.fromkeys(filter(None, (self.parts.gate, self.parts.up))):
            layer, pieces = self._layer(name), 2 if self.parts.fused else 1
            weight = torch.cat([piece[:left] for piece in matrix_of(layer).chunk(pieces)])
            bias = None if layer.bias is None else torch.cat([piece[:left] for piece in layer.bias.chunk(pieces)])
            narrower.append(_resized(layer, weight, bias))
        return [*narrower, _resized(self.down, self.down_weight[:, :left], None)]

    def assign(self, layers: Sequence[Resized]) -> None:
        """Give the layers other sizes. Gradients of the old ones are forgotten."""
        for resized in layers:
            _assign(resized)
        for name in WIDTHS:
            if isinstance(getattr(self.module, name, None), int):
                setattr(self.module, name, self.width)

    @property
    def layers(self) -> list[nn.Module]:
        """Its linear layers."""
        return [self._layer(n) for n in dict.fromkeys((self.parts.gate, self.parts.up, self.parts.down)) if n]

    def _layer(self, name: str) -> Any:
        return unwrap(getattr(self.module, name))

    def _half(self, tensor: Tensor, *, gate: bool) -> Tensor:
        if not self.parts.fused:
            return tensor
        return tensor.chunk(2)[0 if gate == self.parts.gate_first else 1]


# Matrices


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2, whose matrix is (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether it is ``nn.Linear`` or ``Conv1D`` itself, of a tensor of floating-point numbers and no subclass.

    Layers that are quantised, sharded or parametrised are not.
    """
    if not (type(layer) is nn.Linear or is_conv1d(layer)) or not isinstance(weight := layer.weight, nn.Parameter):
        return False
    return type(weight.data) is Tensor and weight.is_floating_point()


def matrix_of(layer: Any) -> Tensor:
    """Return the matrix of a linear layer as (out, in)."""
    weight: Tensor = layer.weight
    return weight.T if is_conv1d(layer) else weight


def _grown(layer: Any, sides: list[tuple[Tensor, Tensor | None]]) -> Resized:
    """Append rows to a matrix, or to each half of one."""
    weights, biases = [], []
    for old, (rows, _) in zip(matrix_of(layer).chunk(len(sides)), sides, strict=True):
        weights += [old, rows.to(old)]
    if layer.bias is not None:
        for old, (rows, bias) in zip(layer.bias.chunk(len(sides)), sides, strict=True):
            biases += [old, old.new_zeros(len(rows)) if bias is None else bias.to(old)]
    return _resized(layer, torch.cat(weights), torch.cat(biases) if biases else None)


def _resized(layer: Any, weight: Tensor, bias: Tensor | None) -> Resized:
    """Return what becomes of a layer, from a matrix (out, in)."""
    return Resized(layer, (weight.T if is_conv1d(layer) else weight).contiguous(), bias)


def _assign(resized: Resized) -> None:
    """Give a layer matrices of another size, in the parameters that it has."""
    layer = resized.layer
    layer.weight.data, layer.weight.grad = resized.weight, None
    if resized.bias is not None:
        layer.bias.data, layer.bias.grad = resized.bias, None
    names = ("nx", "nf") if is_conv1d(layer) else ("out_features", "in_features")
    for name, size in zip(names, resized.weight.shape, strict=True):
        if hasattr(layer, name):
            setattr(layer, name, size)
