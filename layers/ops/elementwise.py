"""What every block does to single tokens between its matrix products: normalise, gate, rotate.

Written with the operators of PyTorch each of these is four to eight passes over the tokens forward and twice as many
backward, and keeps two or three intermediate results. As functions with a backward pass of their own they keep only
what they were given. Where something else looks inside -- a compiler, which fuses the passes itself, ``torch.func`` or
forward-mode differentiation -- they are those operators.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rescale by the root of the mean square: ``weight * x / sqrt(mean(x^2) + eps)``, the mean over the last axis.

    Args:
        x: In the precision to compute in.
        weight: Of the same dtype.
        eps: Added to the mean square.

    Shape:
        x: (..., *weight.shape). Returns the same.

    Reference:
        Zhang and Sennrich, arXiv 1910.07467, equation 4. With ``r = 1 / sqrt(mean(x^2) + eps)`` and ``g`` the
        gradient of the output times the weight, that of x is ``r g - r^3 mean(g x) x``.
    """
    if _is_watched():
        return x * _inverse_root(x, eps) * weight
    return _apply(_RMSNorm, x, weight, eps)


def unit_norm(x: Tensor, least: float) -> Tensor:
    """Scale the last axis to unit length, ``x / max(|x|, least)``, as ``F.normalize`` does.

    Args:
        x: Vectors.
        least: Shorter ones are divided by this, not by their length.

    Shape:
        x: (..., width). Returns the same.
    """
    if _is_watched():
        return F.normalize(x, dim=-1, eps=least)
    return _apply(_UnitNorm, x, least)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """Return ``silu(gate) * x``; other shapes or dtypes than equal ones follow the rules of a product.

    Shape:
        gate, x: (...). Returns the same.
    """
    if _is_watched() or gate.shape != x.shape or gate.dtype != x.dtype:
        return F.silu(gate) * x
    return _apply(_SiluProduct, gate, x)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x_i, x_{i + width / 2})`` by the angles with these cosines and sines, which have no gradient.

    Shape:
        x: (..., width), the width even. cos, sin: broadcast to (..., width / 2). Returns the shape of x.
    """
    if _is_watched():
        return _plain_rotation(x, cos, sin)
    half = (*x.shape[:-1], x.shape[-1] // 2)
    if not (_broadcasts(cos, half) and _broadcasts(sin, half)):
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; they must broadcast to {half}, that "
            f"of half of x: use angles of as many rows and tokens as x has"
        )
    return _apply(_RotateHalves, x, cos, sin)


def _broadcasts(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``x`` broadcasts to ``shape``; ``torch.broadcast_shapes`` takes longer than a rotation of a token."""
    return x.dim() <= len(shape) and all(
        own in (1, size) for own, size in zip(x.shape[::-1], shape[::-1], strict=False)
    )


def _is_watched() -> bool:
    """Whether plain operators are wanted."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # inside forward_ad.dual_level()
    )


def _is_batched(grad: Tensor) -> bool:
    """Whether many gradients come at once (``is_grads_batched``), of which only plain operators know."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(grad))


class _NoBackward:
    """Stands for the context of a forward pass that no backward pass follows."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save nothing."""


def _apply(function: Any, *arguments: Any) -> Tensor:
    """Call a function; without gradients its forward pass alone, which in generation costs half as much."""
    y: Tensor = function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_NoBackward(), *arguments)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_root(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # to differentiate once more
            scale = _plain_inverse_root(x, ctx.eps)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad * x * scale
            if x.dim() > weight.dim():
                grad_weight = grad_weight.sum(tuple(range(x.dim() - weight.dim())))
        if ctx.needs_input_grad[0]:
            grad = grad * weight
            common = (grad * x).mean(-1, keepdim=True) * scale**3
            grad_x = torch.addcmul(grad * scale, x, common, value=-1)
        return grad_x, grad_weight, None


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)``; the norm takes one pass over x."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


def _plain_inverse_root(x: Tensor, eps: float) -> Tensor:
    """The same with all derivatives where x is zero, which a norm has not."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class _UnitNorm(torch.autograd.Function):
    """With ``l = max(|x|, least)``, ``y = x / l`` and its gradient ``g``, that of x is ``(g - (g . y) y) / l``.

    The second term is of vectors that are no shorter than ``least``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        ctx.save_for_backward(x, length)
        ctx.least = least
        y: Tensor = x / length.clamp_min(least)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # to differentiate once more
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        divisor = length.clamp_min(ctx.least)
        y = x / divisor
        along = torch.where(length >= ctx.least, (grad * y).sum(-1, keepdim=True), 0)
        return torch.addcmul(grad, y, along, value=-1) / divisor, None


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        return F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, x = ctx.saved_tensors
        grad_gate = grad_x = None
        if torch.is_grad_enabled() or _is_batched(grad):  # to differentiate once more, which the kernel cannot
            part = torch.sigmoid(gate)
            return grad * x * part * (1 + gate * (1 - part)), grad * gate * part
        if ctx.needs_input_grad[0]:
            grad_gate = grad * x
            torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        if ctx.needs_input_grad[1]:
            grad_x = F.silu(gate).mul_(grad)
        return grad_gate, grad_x


class _RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        y = torch.empty_like(x)
        torch.mul(first, cos, out=y[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=y[..., half:]).addcmul_(first, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = _plain_rotation(grad, cos, -sin) if _is_batched(grad) else rotate_halves(grad, cos, -sin)
        return turned, None, None


def _plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1)
