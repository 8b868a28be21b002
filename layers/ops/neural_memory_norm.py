"""Errors of a memory with a residual and a LayerNorm around its network, and their derivatives.

The memory is ``M(k) = k + LN(z)`` with ``z`` the network's output (TTT, arXiv 2407.04620), so the gradient of
``1/2 |M(k) - v|^2`` at ``z`` goes back through the norm. With ``^z`` the normalised output, ``s`` its deviation and P
the projection that takes out the mean and the part along ``^z``:

    error = LN(z) + k - v,    LN(z) = gain * ^z + bias,    gradient = P(gain * error) / s
"""

from torch import Tensor

EPS = 1e-6


def normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``z`` normalised over its last axis and its deviation (..., 1)."""
    centred = z - z.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / deviation, deviation


def gradient(normal: Tensor, deviation: Tensor, error: Tensor, gain: Tensor) -> Tensor:
    """Return the gradient at ``z`` of half the squared ``error``."""
    return _project(gain * error, normal) / deviation


def gradient_backward(
    normal: Tensor, deviation: Tensor, error: Tensor, gain: Tensor, d_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``gradient`` in ``z``, in ``error - gain * ^z`` and in ``gain``, times ``d_gradient``."""
    u = gain * error
    d_u = _project(d_gradient, normal) / deviation
    d_error = gain * d_u
    d_gain = d_u * error + d_error * normal
    along_u, along_d = (u * normal).mean(-1, keepdim=True), (d_gradient * normal).mean(-1, keepdim=True)
    d_normal = gain * d_error - (along_d * u + along_u * d_gradient) / deviation
    of_deviation = (d_gradient * _project(u, normal)).mean(-1, keepdim=True) / deviation.square()
    return _project(d_normal, normal) / deviation - of_deviation * normal, d_error, d_gain


def _project(x: Tensor, normal: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) - normal * (x * normal).mean(-1, keepdim=True)
