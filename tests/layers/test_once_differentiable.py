"""Backward passes that refuse a second derivative, whatever the objective."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.ops.neural_memory_online import neural_memory_online
from memzoo.layers.ops.once_differentiable import once_differentiable
from memzoo.layers.ops.selective_scan import selective_scan
from memzoo.layers.ops.short_conv import short_conv


class Square(torch.autograd.Function):
    """The square of x, times a number that has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * grad * x, None


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def square(x: Tensor) -> Tensor:
    y: Tensor = Square.apply(x, 3.0)
    return y


def recurrence(x: Tensor) -> Tensor:
    return linear_recurrence(x, draw(2, 5, 2, 3), draw(2, 5, 2, 3))[0]


def online(x: Tensor) -> Tensor:
    gates = [torch.full((2, 5, 2), 0.1, dtype=torch.float64)] * 3
    return neural_memory_online(x, draw(2, 5, 2, 3), draw(2, 5, 2, 3), *gates, (draw(2, 2, 3, 3),))[0]


def scan(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    step = torch.full((2, 5, 6), 0.1, dtype=torch.float64)
    return selective_scan(rows, step, -draw(6, 4).abs(), draw(2, 5, 4), draw(2, 5, 4))[0]


def segments(x: Tensor) -> Tensor:
    return short_conv(x.reshape(1, 10, 6), draw(6, 3), cu_seqlens=torch.tensor([0, 4, 10]))[0]


all_functions = pytest.mark.parametrize("function", [square, recurrence, online, scan, segments])


@all_functions
@pytest.mark.parametrize("objective", [torch.sum, torch.norm])
def test_a_second_derivative_is_refused(
    function: Callable[[Tensor], Tensor], objective: Callable[[Tensor], Tensor]
) -> None:
    x = draw(2, 5, 2, 3).requires_grad_()
    y = function(x)
    (g,) = torch.autograd.grad(objective(y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (g.square().sum() + y.sum()).backward()


@all_functions
def test_a_first_derivative_is_the_same_with_a_graph(function: Callable[[Tensor], Tensor]) -> None:
    x = draw(2, 5, 2, 3).requires_grad_()
    plain, graphed = (torch.autograd.grad(function(x).sum(), x, create_graph=graph)[0] for graph in (False, True))
    assert torch.equal(plain, graphed)
    assert graphed.requires_grad
    assert not plain.requires_grad
