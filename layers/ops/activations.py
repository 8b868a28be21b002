"""Activations of a memory's inner network, with the two derivatives that training through its training needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FAR = 4096.0
"""A square so large that the normal density is zero there; an infinite one times zero would be no number."""


@dataclass(frozen=True)
class Activation:
    """A pointwise function ``f`` and its derivatives, in as few passes over memory as PyTorch allows.

    Attributes:
        value: ``f(z)``.
        pull: ``g f'(z)`` of ``(g, z)``: a gradient taken back through ``f``.
        jet: ``(f(z), f'(z), f''(z))``, the last None where it is zero everywhere.
    """

    value: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]
    jet: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _silu_jet(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # With s = sigmoid(z): f = z s, f' = s + f - f s, f'' = (1 - s) (2 f' - f).
    s = torch.sigmoid(z)
    value = z * s
    first = torch.addcmul(value, value, s, value=-1).add_(s)
    second = torch.sub(first, value, alpha=0.5)
    return value, first, torch.addcmul(second, second, s, value=-1).mul_(2)


def _gelu_jet(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # With Phi, phi the standard normal distribution and density: f = z Phi, f' = Phi + z phi, f'' = (2 - z^2) phi.
    square = z.square().clamp_max_(FAR)
    density = torch.exp(square * -0.5) * (2 * math.pi) ** -0.5
    distribution = torch.special.ndtr(z)
    return z * distribution, distribution + z * density, (2 - square) * density


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward, _silu_jet),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, _gelu_jet),
    "relu": Activation(
        F.relu,
        lambda g, z: torch.ops.aten.threshold_backward(g, z, 0),
        lambda z: (F.relu(z), (z > 0).to(z.dtype), None),
    ),
    "identity": Activation(
        lambda z: z,
        lambda g, _: g,
        lambda z: (z, torch.ones_like(z), None),
    ),
}
