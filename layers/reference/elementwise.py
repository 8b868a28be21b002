"""What every block does to single tokens, one token at a time. Slow, and the definition of what is right."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise every token, or every part of one, ``weight * x / sqrt(mean(x^2) + eps)``.

    Shape:
        x: (..., *weight.shape). Returns the same.
    """
    rows = []
    for token in x.reshape(-1, *weight.shape):
        mean_square = (token * token).sum(-1, keepdim=True) / x.shape[-1]
        rows.append(weight * token / (mean_square + eps).sqrt())
    return torch.stack(rows).reshape(x.shape)


def unit_norm(x: Tensor, least: float) -> Tensor:
    """Scale every vector to unit length, ``x / max(|x|, least)``.

    Shape:
        x: (..., width). Returns the same.
    """
    rows = []
    for vector in x.reshape(-1, x.shape[-1]):
        length = (vector * vector).sum().sqrt()
        rows.append(vector / torch.where(length > least, length, least))
    return torch.stack(rows).reshape(x.shape)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """Gate every token, ``gate / (1 + exp(-gate)) * x``.

    Shape:
        gate, x: broadcast to one another. Returns what they broadcast to.
    """
    gate, x = torch.broadcast_tensors(gate, x)
    rows = [g / (1 + torch.exp(-g)) * y for g, y in zip(gate.flatten(0, -2), x.flatten(0, -2), strict=True)]
    return torch.stack(rows).reshape(gate.shape)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply every pair ``(x_i, x_{i + width / 2})`` by the matrix of its rotation, ((cos, -sin), (sin, cos)).

    Shape:
        x: (..., width), the width even. cos, sin: broadcast to (..., width / 2). Returns the shape of x.
    """
    half = x.shape[-1] // 2
    angles = (part.expand(*x.shape[:-1], half).reshape(-1, half) for part in (cos, sin))
    rows = []
    for token, c, s in zip(x.reshape(-1, 2, half), *angles, strict=True):
        turned = [
            torch.stack((torch.stack((c[i], -s[i])), torch.stack((s[i], c[i])))) @ token[:, i] for i in range(half)
        ]
        rows.append(torch.stack(turned, dim=-1))
    return torch.stack(rows).reshape(x.shape)
