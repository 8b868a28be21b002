"""Random cases for the tests of ``selective_scan`` and ``state_space_dual``, and how to cut them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers.ops.selective_scan import selective_scan
from memzoo.layers.ops.state_space_dual import state_space_dual
from memzoo.layers.reference.selective_scan import selective_scan as scan_loop
from memzoo.layers.reference.state_space_dual import state_space_dual as dual_loop

Case = dict[str, Any]
Op = Callable[..., tuple[Tensor, Tensor]]
OF_TOKENS = ("x", "dt", "B", "C")
"""Arguments with a row for every token."""


@dataclass(frozen=True)
class Space:
    """An op, its loop, and whether it has heads."""

    op: Op
    loop: Op
    has_heads: bool


SPACES = {
    "selective_scan": Space(selective_scan, scan_loop, has_heads=False),
    "state_space_dual": Space(state_space_dual, dual_loop, has_heads=True),
}


def make_case(
    space: Space,
    *,
    batch: int = 2,
    time: int = 11,
    width: int = 3,
    state_dim: int = 4,
    groups: int = 2,
    share: int = 2,
    states: int | None = None,
    seed: int = 0,
) -> Case:
    """Random float64 arguments: steps mostly small, rates of different orders, a full state.

    Args:
        space: Whose arguments.
        batch: Rows.
        time: Tokens of a row.
        width: Channels, or P, those of a head.
        state_dim: N.
        groups: Of B and C, where there are heads.
        share: Heads of a group.
        states: Sequences that begin with a state; one a row by default.
        seed: Of the draw.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    lanes = groups * share if space.has_heads else width
    inner = (width,) if space.has_heads else ()
    group = (groups,) if space.has_heads else ()
    rates = (lanes,) if space.has_heads else (lanes, state_dim)
    memory = (lanes, state_dim, width) if space.has_heads else rates
    return {
        "x": normal(batch, time, lanes, *inner),
        "dt": (normal(batch, time, lanes) - 1).exp(),
        "A": -normal(*rates).exp(),
        "B": normal(batch, time, *group, state_dim),
        "C": normal(batch, time, *group, state_dim),
        "D": normal(lanes),
        "state": normal(batch if states is None else states, *memory),
    }


def tokens(case: Case, times: Any = slice(None), rows: Any = slice(None)) -> Case:
    """Cut the tokens; A, D and the state stay."""
    return {name: value[rows, times] if name in OF_TOKENS else value for name, value in case.items()}


each_op = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
