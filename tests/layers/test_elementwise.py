"""Normalising, gating and rotating with backward passes of their own: what the loop over tokens gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from memzoo.layers.ops.elementwise import rms_norm, rotate_halves, silu_product, unit_norm
from memzoo.layers.reference import elementwise as reference

EPS = 1e-6
LEAST = 1.7  # of the vectors drawn here some are shorter


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def rotation(x: Tensor, angle: Tensor) -> Tensor:
    return rotate_halves(x, angle.cos(), angle.sin())


def unit(x: Tensor, _: Tensor) -> Tensor:
    return unit_norm(x, LEAST)


def loop_unit(x: Tensor, _: Tensor) -> Tensor:
    return reference.unit_norm(x, LEAST)


def loop_norm(x: Tensor, weight: Tensor) -> Tensor:
    return reference.rms_norm(x, weight, EPS)


def loop_rotation(x: Tensor, angle: Tensor) -> Tensor:
    return reference.rotate_halves(x, angle.cos(), angle.sin())


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


Function = Callable[[Tensor, Tensor], Tensor]
CASES = {
    "norm": (norm, loop_norm, draw(2, 3, 4), draw(4)),
    "norm in groups": (norm, loop_norm, draw(2, 3, 2, 4), draw(2, 4)),
    "product": (silu_product, reference.silu_product, draw(2, 3, 4), draw(2, 3, 4).flip(0)),
    "product of other shapes": (silu_product, reference.silu_product, draw(2, 3, 4), draw(4)),
    "rotation": (rotation, loop_rotation, draw(2, 3, 2, 4), draw(3, 1, 2)),
    "rotation of rows": (rotation, loop_rotation, draw(2, 3, 2, 4), draw(2, 3, 1, 2)),
    "unit length": (unit, loop_unit, draw(2, 3, 4), draw(4)),
}
WITHOUT_GRADIENT = (rotation, unit)  # in what they are given second
all_cases = pytest.mark.parametrize(("function", "loop", "x", "other"), CASES.values(), ids=CASES)


def leaves(function: Function, x: Tensor, other: Tensor) -> list[Tensor]:
    """Copies to differentiate by."""
    return [x.clone().requires_grad_(), other.clone().requires_grad_(function not in WITHOUT_GRADIENT)]


@all_cases
def test_values_and_gradients_are_those_of_the_loop(
    function: Function, loop: Function, x: Tensor, other: Tensor
) -> None:
    ours, theirs = leaves(function, x, other), leaves(function, x, other)
    y, expected = function(*ours), loop(*theirs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(grad)
    expected.backward(grad)
    for mine, other_leaf in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other_leaf.grad, rtol=1e-12, atol=1e-12)


@all_cases
def test_they_can_be_differentiated_twice(function: Function, loop: Function, x: Tensor, other: Tensor) -> None:
    assert torch.autograd.gradgradcheck(function, leaves(function, x, other))


@all_cases
def test_many_gradients_can_come_at_once(function: Function, loop: Function, x: Tensor, other: Tensor) -> None:
    first, second = leaves(function, x, other)
    wanted = [leaf for leaf in (first, second) if leaf.requires_grad]
    y = function(first, second)
    grads = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    batched = torch.autograd.grad(y, wanted, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, wanted, grad, retain_graph=True) for grad in grads]
    for mine, theirs in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs), rtol=1e-12, atol=1e-12)


@all_cases
def test_values_have_the_same_bits_where_something_looks_inside(
    function: Function, loop: Function, x: Tensor, other: Tensor
) -> None:
    x, other = x.float(), other.float()
    expected = function(x, other)
    assert torch.equal(torch.compile(function, backend="eager", fullgraph=True)(x, other), expected)
    rows = torch.vmap(function, in_dims=(0, None if other.shape != x.shape else 0))
    if other.dim() < x.dim() or other.shape == x.shape:
        assert torch.equal(rows(x, other), expected)


@all_cases
def test_values_have_the_same_bits_without_gradients(
    function: Function, loop: Function, x: Tensor, other: Tensor
) -> None:
    expected = function(*leaves(function, x, other))
    with torch.no_grad():
        values = function(*leaves(function, x, other))
    assert torch.equal(values, expected)
    assert not values.requires_grad
    assert expected.requires_grad


@all_cases
def test_forward_mode_derivatives(function: Function, loop: Function, x: Tensor, other: Tensor) -> None:
    tangent = x.flip(-1)
    _, expected = torch.func.jvp(lambda x: loop(x, other), (x,), (tangent,))
    _, ours = torch.func.jvp(lambda x: function(x, other), (x,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent), other)).tangent
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(dual, expected)


@all_cases
def test_what_needs_no_gradient_gets_none(function: Function, loop: Function, x: Tensor, other: Tensor) -> None:
    first, second = leaves(function, x, other)
    (alone,) = torch.autograd.grad(function(first, other).sum(), first)
    torch.testing.assert_close(alone, torch.autograd.grad(loop(first, other).sum(), first)[0])
    if second.requires_grad:
        (alone,) = torch.autograd.grad(function(x, second).sum(), second)
        torch.testing.assert_close(alone, torch.autograd.grad(loop(x, second).sum(), second)[0])


@pytest.mark.parametrize("function", [norm, silu_product, rotation, unit])
def test_only_what_was_given_is_kept(function: Function) -> None:
    x = draw(2, 64, 32).requires_grad_()
    other = {norm: draw(32), silu_product: draw(2, 64, 32), rotation: draw(64, 16), unit: draw(1)}[function]
    other.requires_grad_(function not in WITHOUT_GRADIENT)
    given, more = {x.data_ptr(), other.data_ptr()}, 0

    def pack(kept: Tensor) -> Tensor:
        nonlocal more
        more += 0 if kept.data_ptr() in given else kept.numel()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        function(x, other)
    assert more <= {norm: 2 * 64, silu_product: 0, rotation: 2 * 64 * 16, unit: 2 * 64}[function]


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    rms_norm(x, torch.ones(4, dtype=torch.float64), EPS).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, EPS**-0.5))


def test_short_vectors_are_divided_by_the_least_length() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64)
    x[1, 0] = 1e-5
    x.requires_grad_()
    y = unit_norm(x, 1e-4)
    torch.testing.assert_close(y, x * 1e4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e4))
    assert torch.equal(y, F.normalize(x, dim=-1, eps=1e-4))


@pytest.mark.parametrize("length", [1e-3, 2e-2, 1.0, 4e2, 1e4])
def test_unit_vectors_have_gradients_in_float16(length: float) -> None:
    x = (F.normalize(draw(8, 16), dim=-1) * length).half().requires_grad_()
    exact = x.detach().double().requires_grad_()
    grad = draw(8, 16).flip(0).half()
    (ours,) = torch.autograd.grad(unit_norm(x, 1e-4), x, grad)
    (expected,) = torch.autograd.grad(unit_norm(exact, 1e-4), exact, grad.double())
    assert (ours.double() - expected).norm() < 0.01 * expected.norm()


def test_a_token_of_zeros_has_its_third_derivative() -> None:
    x, weight = torch.zeros(1, 3, dtype=torch.float64), draw(3)

    def third(function: Function) -> Tensor:
        y = x.clone().requires_grad_()
        first = torch.autograd.grad(function(y, weight).sum(), y, create_graph=True)[0]
        second = torch.autograd.grad((first * draw(3)).sum(), y, create_graph=True)[0]
        return torch.autograd.grad((second * draw(3)).sum(), y)[0]

    torch.testing.assert_close(third(norm), third(loop_norm))


@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (1, 1, 3, 1, 4), (1, 3, 1, 3)])
def test_angles_of_more_than_the_tokens_or_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cos and sin have shapes .*they must broadcast to \(1, 3, 2, 4\)"):
        rotation(draw(1, 3, 2, 8), draw(*shape))


@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 4), (4,), (1, 1, 2, 4)])
def test_angles_of_fewer_axes_or_of_every_head_are_taken(shape: tuple[int, ...]) -> None:
    x, angle = draw(1, 3, 2, 8), draw(*shape)
    torch.testing.assert_close(rotation(x, angle), rotation(x, angle.expand(1, 3, 2, 4)))


def test_a_token_without_rows_has_the_gradients_of_the_loop() -> None:
    ours, theirs = leaves(norm, draw(4), draw(4).flip(0)), leaves(norm, draw(4), draw(4).flip(0))
    grads = [torch.autograd.grad(f(*own).square().sum(), own) for f, own in ((norm, ours), (loop_norm, theirs))]
    torch.testing.assert_close(*grads)


def test_a_product_of_two_dtypes_has_the_wider_one() -> None:
    gate, x = draw(3, 4, dtype=torch.bfloat16), draw(3, 4, dtype=torch.float32)
    y = silu_product(gate, x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.silu(gate) * x)
