"""What a benchmark is made of: matrix products, variants, cases."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Work = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """``batch`` products of (m, k) and (k, n) matrices at once, ``count`` times in one call."""

    batch: int
    m: int
    k: int
    n: int
    count: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What decides how fast it is."""
        return self.batch, self.m, self.k, self.n

    @property
    def flops(self) -> float:
        """Floating-point operations of all of them."""
        return 2.0 * self.batch * self.m * self.k * self.n * self.count


@dataclass(frozen=True)
class Variant:
    """One implementation.

    Attributes:
        name: As it stands in the table.
        build: Makes the model and its input, returns the function to time.
        tokens: Tokens one call processes.
        products: Matrix products one call needs, counted on paper; () where nobody counted.
        missing: Why it cannot run here; None if it can.
    """

    name: str
    build: Callable[[], Work]
    tokens: int
    products: tuple[Product, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Case:
    """Variants that are compared with the first of them, or, with an ``axis``, with one another along it.

    Attributes:
        name: Unique; `--only` matches it.
        group: Several cases; `--only` knows it too.
        title: Heading of its table.
        variants: The first is what the others are compared with.
        note: What a reader of the numbers has to know, such as where a peer differs.
        axis: What grows from variant to variant: the sequence, the context before a step, or, by one a variant, the
            depth of the memory.
        targets: Least ratio of the first to a variant's tokens/s, by the variant's name.
        most_memory: Largest part of a variant's peak extra memory that the first may take, by the variant's name.
        least_share: Least share of the measured matmul rate for every variant with ``products``, or None.
        has_memory: Measure peak memory too.
        keeps_memory: Time it in a process that keeps what it frees, as the ``memzoo`` command does.
        device: "cpu" or "cuda".
    """

    name: str
    group: str
    title: str
    variants: list[Variant]
    note: str = ""
    axis: Literal["length", "context", "depth"] | None = None
    targets: dict[str, float] = field(default_factory=dict)
    most_memory: dict[str, float] = field(default_factory=dict)
    least_share: float | None = None
    has_memory: bool = True
    keeps_memory: bool = False
    device: str = "cpu"


def missing(package: str) -> str | None:
    """Say that a package is not installed, if it is not."""
    return None if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def train(layer: nn.Module, batch: int, time: int, dim: int) -> Work:
    """Forward and backward of a layer that returns (y, state)."""
    x = torch.randn(batch, time, dim, requires_grad=True)
    grad = torch.randn(batch, time, dim)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].backward(grad)

    return work


def train_function(function: Callable[..., Tensor], inputs: list[Tensor]) -> Work:
    """Forward and backward of a function of tensors, which all take gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def work() -> None:
        y = function(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return work


def mixer(name: str, build: Callable[[], nn.Module], time: int, *, dim: int = 128) -> Variant:
    """One row of a sequence mixer at one length, trained."""
    return Variant(f"{name}, {time} tokens", lambda: train(build(), 1, time, dim), time)
