"""Activations of a memory's inner network, with the two derivatives that training through its training needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A pointwise function ``f`` and its derivatives, each one fused kernel where PyTorch has it.

    Attributes:
        value: ``f(z)``.
        times_first: ``g * f'(z)`` of (g, z).
        times_second: ``g * f''(z)`` of (g, z).
    """

    value: Callable[[Tensor], Tensor]
    times_first: Callable[[Tensor, Tensor], Tensor]
    times_second: Callable[[Tensor, Tensor], Tensor]


def _silu_second(g: Tensor, z: Tensor) -> Tensor:
    # f'' = s (1 - s) (2 + z (1 - 2 s)), with s = sigmoid(z)
    s = torch.sigmoid(z)
    factor = torch.rsub(s, 1, alpha=2).mul_(z).add_(2).mul_(g)
    return _aten.sigmoid_backward(factor, s)  # type: ignore[no-any-return]


def _gelu_second(g: Tensor, z: Tensor) -> Tensor:
    # f'' = phi(z) (2 - z^2), with phi the standard normal density
    square = z * z
    density = torch.exp(square * -0.5).mul_((2 * torch.pi) ** -0.5)
    return density.mul_(2 - square).mul_(g)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, lambda g, z: _aten.silu_backward(g, z), _silu_second),
    "gelu": Activation(F.gelu, lambda g, z: _aten.gelu_backward(g, z), _gelu_second),
    "relu": Activation(F.relu, lambda g, z: _aten.threshold_backward(g, z, 0), lambda g, z: torch.zeros_like(g)),
    "identity": Activation(lambda z: z, lambda g, z: g, lambda g, z: torch.zeros_like(g)),
}


def activation(name: str) -> Activation:
    """Return an activation by name: "silu", "gelu" (exact, by the error function), "relu" or "identity".

    Raises:
        ValueError: No such activation.
    """
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
