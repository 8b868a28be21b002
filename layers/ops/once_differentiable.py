"""Backward passes that cannot be differentiated again, and say so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Mark a backward pass as one that a second derivative cannot go through: it raises ``RuntimeError`` there.

    PyTorch's decorator of this name refuses only where the incoming gradients depend on something. The gradients of a
    plain sum do not, and what is then made of the result would silently count as constant.
    """
    refusing = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Gradients:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        gradients: Gradients = refusing(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        marked = iter(_Refused.apply(torch.empty(0, requires_grad=True), *(g for g in gradients if g is not None)))
        return tuple(None if g is None else next(marked) for g in gradients)

    return wrapper


class _Refused(torch.autograd.Function):
    """Hands gradients on; ``anchor`` makes them part of a graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("trying to differentiate twice a function whose backward pass is differentiable once")
