"""Activations of a memory's inner network, with the two derivatives that training through its training needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """A pointwise function ``f`` and its derivatives, in as few passes over memory as PyTorch allows.

    Attributes:
        value: ``f(z)``, to the bit what the other two give.
        slope: ``(f(z), f'(z))``.
        jet: ``(f(z), f'(z), f''(z))``.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    jet: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _silu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, _ = _silu_parts(z)
    return value, slope


def _silu_jet(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # f'' = (1 - s) (2 f' - f).
    value, first, s = _silu_parts(z)
    second = torch.sub(first, value, alpha=0.5)
    return value, first, torch.addcmul(second, second, s, value=-1).mul_(2)


def _silu_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With s = sigmoid(z): f = z s, f' = s + f - f s, and s."""
    s = torch.sigmoid(z)
    value = z * s
    return value, torch.addcmul(value, value, s, value=-1).add_(s), s


def _gelu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    value, slope, _ = _gelu_jet(z)
    return value, slope


def _gelu_jet(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # With Phi, phi the standard normal distribution and density: f = z Phi, f' = Phi + z phi, f'' = (2 - z^2) phi.
    density = torch.exp(z.square() * -0.5) * (2 * torch.pi) ** -0.5
    distribution = torch.special.ndtr(z)
    return z * distribution, distribution + z * density, (2 - z.square()) * density


def _relu_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(z), (z > 0).to(z.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(lambda z: z * torch.sigmoid(z), _silu_slope, _silu_jet),
    "gelu": Activation(lambda z: z * torch.special.ndtr(z), _gelu_slope, _gelu_jet),
    "relu": Activation(F.relu, _relu_slope, lambda z: (*_relu_slope(z), torch.zeros_like(z))),
    "identity": Activation(
        lambda z: z,
        lambda z: (z, torch.ones_like(z)),
        lambda z: (z, torch.ones_like(z), torch.zeros_like(z)),
    ),
}
