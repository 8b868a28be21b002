"""RMSNorm: rescale every token to root-mean-square one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_divisible, check_number
from memzoo.layers.ops.elementwise import rms_norm
from memzoo.layers.ops.precision import wider


class RMSNorm(nn.Module):
    """Root-mean-square normalisation: ``y = weight * x / sqrt(mean(x^2) + eps)``, in at least float32.

    The output has the dtype of ``x``, whatever that of the weight.

    Args:
        dim: Width of the last axis.
        eps: Added to the mean square.
        groups: Neighbouring parts of the last axis, of equal width, each with a mean of its own.

    Shape:
        x: (..., dim). Returns the same.

    Raises:
        ValueError: A number is not a whole number >= 1, ``groups`` does not divide ``dim``, or ``eps`` is negative.

    Reference:
        Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, groups: int = 1) -> None:
        super().__init__()
        check_divisible("dim", dim, "groups", groups)
        check_number("eps", eps, zero=True)
        self.eps = eps
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = wider(x)
        weight = self.weight.to(wide.dtype)
        if self.groups > 1:
            parts = wide.unflatten(-1, (self.groups, -1))
            return rms_norm(parts, weight.view(self.groups, -1), self.eps).flatten(-2).to(x.dtype)
        if x.is_cuda:  # a kernel; elsewhere F.rms_norm is a composite
            return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)
        return rms_norm(wide, weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Width, eps and groups."""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.weight.shape[0]}, eps={self.eps}{groups}"
