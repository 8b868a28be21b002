"""Random cases for the tests of the linear recurrence and the delta rule, and how to compare and differentiate them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.reference import delta_rule as delta_loop
from memzoo.layers.reference import linear_recurrence as linear_loop

Case = dict[str, Any]
Op = Callable[..., tuple[Tensor, Tensor]]
random_cases = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Rule:
    """An op, its loop, and the decay that makes it the rule of a paper: None, "head" or "channel"."""

    op: Op
    loop: Op
    decay: str | None

    @property
    def has_delta(self) -> bool:
        return self.op is delta_rule


RULES = {
    "linear_attention": Rule(linear_recurrence, linear_loop.linear_recurrence, None),
    "ssd": Rule(linear_recurrence, linear_loop.linear_recurrence, "head"),
    "gla": Rule(linear_recurrence, linear_loop.linear_recurrence, "channel"),
    "deltanet": Rule(delta_rule, delta_loop.delta_rule, None),
    "gated_deltanet": Rule(delta_rule, delta_loop.delta_rule, "head"),
    "kda": Rule(delta_rule, delta_loop.delta_rule, "channel"),
}


def make_case(
    rule: Rule,
    *,
    batch: int = 2,
    time: int = 11,
    heads: int = 2,
    group: int = 1,
    key_dim: int = 3,
    value_dim: int = 4,
    states: int | None = None,
    seed: int = 0,
) -> Case:
    """Random float64 arguments: keys of unit length, steps in (0, 1), decays mostly near 1, a full memory.

    Args:
        rule: Whose arguments.
        batch: Rows.
        time: Tokens of a row.
        heads: Query and key heads.
        group: Value heads for each of them.
        key_dim: K.
        value_dim: V.
        states: Sequences that begin with a memory; one a row by default.
        seed: Of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    value_heads = heads * group

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    case = {
        "q": normal(batch, time, heads, key_dim),
        "k": F.normalize(normal(batch, time, heads, key_dim), dim=-1),
        "v": normal(batch, time, value_heads, value_dim),
        "state": normal(batch if states is None else states, value_heads, key_dim, value_dim),
    }
    if rule.has_delta:
        case["beta"] = uniform(batch, time, value_heads)
    if rule.decay is not None:
        channels = (key_dim,) if rule.decay == "channel" else ()
        case["log_decay"] = -2 * uniform(batch, time, value_heads, *channels) ** 4  # most of them near 0
    return case


def without(case: Case, *names: str) -> Case:
    return {name: value for name, value in case.items() if name not in names}


def decay_of_channels(case: Case) -> Tensor:
    """The log decay of every key channel, (batch, time, value heads, K), whatever the rule."""
    shape = *case["v"].shape[:3], case["k"].shape[-1]
    a = case.get("log_decay", torch.zeros(shape, dtype=torch.float64))
    return a if a.dim() == 4 else a[..., None].expand(shape)


def tokens(case: Case, rows: Any = slice(None), times: Any = slice(None)) -> Case:
    """Cut rows and tokens out of everything but the state."""
    return {name: value[rows, times] for name, value in without(case, "state").items()}


def cast(case: Case, dtype: torch.dtype) -> Case:
    return {name: value.to(dtype) for name, value in case.items()}


def assert_close(actual: Any, expected: Any, tolerance: float = 5e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, 0)


def run(function: Op, case: Case, **options: Any) -> dict[str, Tensor]:
    """Outputs, the state after them, and the derivative of a random projection of both for every tensor of ``case``."""
    leaves = tree_map(lambda x: x.detach().clone().requires_grad_(), case)
    y, state = function(**leaves, **options)
    draw = torch.Generator().manual_seed(1)
    objective = sum((torch.randn(x.shape, generator=draw, dtype=torch.float64) * x).sum() for x in (y, state))
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach()} | named


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.nbytes = max([self.nbytes, *sizes])
        return result


def borders(lengths: list[int]) -> Tensor:
    """``cu_seqlens`` of segments of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
