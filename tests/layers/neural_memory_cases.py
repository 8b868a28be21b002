"""Random cases for the tests of the neural memory, and how to cut, compare and differentiate them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from memzoo.layers.ops.neural_memory import neural_memory_scan
from memzoo.layers.ops.neural_memory_window import latest, with_recent

Case = dict[str, Any]
random_cases = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def make_case(
    *,
    batch: int = 2,
    time: int = 11,
    heads: int = 2,
    dim: int = 3,
    hidden: int = 5,
    depth: int = 2,
    value_dim: int | None = None,
    with_norm: bool = False,
    window: int = 1,
    seed: int = 0,
) -> Case:
    """Random float64 arguments of the op: unit keys and queries, gates over all of (0, 1), a memory in mid-course."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def gate() -> Tensor:
        return torch.rand(batch, time, heads, generator=draw, dtype=torch.float64)

    widths = [dim, *[hidden] * (depth - 1), value_dim or dim]

    def layers(scale: float) -> tuple[Tensor, ...]:
        return tuple(scale * normal(batch, heads, a, b) / a**0.5 for a, b in pairwise(widths))

    return (
        {
            "q": F.normalize(normal(batch, time, heads, dim), dim=-1),
            "k": F.normalize(normal(batch, time, heads, dim), dim=-1),
            "v": 0.5 * normal(batch, time, heads, widths[-1]),
            "theta": 0.25 * gate(),
            "eta": gate(),
            "alpha": gate(),
            "weights": layers(0.6),
            "momentum": layers(0.3),
            "base": layers(0.6),
            "anchor": layers(0.6),
        }
        | ({"norm": (1 + 0.3 * normal(heads, dim), 0.3 * normal(heads, dim))} if with_norm else {})
        | (
            {}
            if window == 1
            else {
                "gamma": gate(),
                "recent": (
                    F.normalize(normal(batch, window - 1, heads, dim), dim=-1),
                    0.5 * normal(batch, window - 1, heads, widths[-1]),
                    torch.rand(batch, window - 1, heads, generator=draw, dtype=torch.float64),
                ),
            }
        )
    )


def take(case: Case, rows: Any = slice(None), times: Any = slice(None), heads: Any = slice(None)) -> Case:
    """Cut rows, tokens and heads out of a case."""
    tokens = ("q", "k", "v", "theta", "eta", "alpha", "gamma")
    return {
        name: value[rows][:, times][:, :, heads]
        if name in tokens
        else tuple(w[rows][:, :, heads] if name == "recent" else w[rows][:, heads] for w in value)
        for name, value in case.items()
    }


def without(case: Case, *names: str) -> Case:
    return {name: value for name, value in case.items() if name not in names}


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert tree_structure(actual) == tree_structure(expected)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=tolerance, atol=tolerance)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0)


def gradients(function: Callable[..., Any], case: Case, **options: Any) -> list[Tensor]:
    """Derivatives of a random projection of everything ``function`` returns, one a tensor of ``case``, in its order."""
    case = tree_map(lambda x: None if x is None else x.clone().requires_grad_(), case)
    draw = torch.Generator().manual_seed(1)
    outputs = tree_leaves(function(**case, **options))
    objective = sum((torch.randn(y.shape, generator=draw, dtype=y.dtype) * y).sum() for y in outputs)
    leaves = [x for x in tree_leaves(case) if x is not None]
    return list(torch.autograd.grad(objective, leaves, materialize_grads=True))


def stream(case: Case, cuts: list[int], position: Any, **options: Any) -> Any:
    """Run the pieces between cuts one after the other, handing the state on."""
    state = {name: case.get(name) for name in ("weights", "momentum", "base")}
    recent, window = case.get("recent"), options.get("window", 1)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, case["q"].shape[1]], strict=True):
        piece = take(without(case, "weights", "momentum", "base", "recent"), times=slice(start, end))
        y, *after = neural_memory_scan(**piece, **state, recent=recent, position=position + start, **options)
        state = dict(zip(state, after, strict=True))
        if window > 1:
            tokens = with_recent(piece["k"], piece["v"], piece.get("gamma"), recent, window)
            recent = latest(tokens, None, window)
        pieces.append(y)
    return torch.cat(pieces, 1), *state.values()
