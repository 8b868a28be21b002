"""The memory of single tokens cut into calls, and behind the end of rows (checks 5 and 19)."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from memzoo.layers.ops.neural_memory_online import neural_memory_online
from tests.layers.neural_memory_cases import (
    Case,
    assert_close,
    assert_same_bits,
    gradients,
    random_cases,
    take,
    without,
)
from tests.layers.neural_memory_online_cases import linear_case

# 5. Streaming.


def stream(case: Case, cuts: list[int], **options: Any) -> Any:
    """Run the pieces between cuts one after the other, handing on the weights and the momentum."""
    weights, momentum, pieces = case["weights"], case["momentum"], []
    for start, end in zip([0, *cuts], [*cuts, case["q"].shape[1]], strict=True):
        piece = take(without(case, "weights", "momentum"), times=slice(start, end))
        y, weights, momentum = neural_memory_online(**piece, weights=weights, momentum=momentum, **options)
        pieces.append(y)
    return torch.cat(pieces, 1), weights, momentum


@random_cases
@given(cuts=st.lists(st.integers(1, 10), unique=True).map(sorted), chunk_size=st.integers(1, 6))
def test_05_any_cut_into_calls_equals_one_call(cuts, chunk_size):
    case = linear_case(time=11)
    assert_close(stream(case, cuts, chunk_size=chunk_size), neural_memory_online(**case, chunk_size=4))


def test_05_gradients_flow_through_the_cuts():
    case = linear_case(time=7)
    steps = gradients(lambda **inputs: stream(inputs, list(range(1, 7))), case)
    assert_close(steps, gradients(neural_memory_online, case, chunk_size=4))


def test_05_rows_may_be_cut_at_different_tokens():
    case, first = linear_case(time=8), torch.tensor([2, 7])
    y1, weights, momentum = neural_memory_online(**case, chunk_size=3, lengths=first)
    shifted = {name: torch.stack([case[name][i].roll(-n, 0) for i, n in enumerate(first)]) for name in list(case)[:6]}
    state = {"weights": weights, "momentum": momentum, "anchor": case["anchor"]}
    y2, *state = neural_memory_online(**shifted, **state, chunk_size=3, lengths=8 - first)
    y = torch.stack([torch.cat([y1[i, :n], y2[i, : 8 - n]]) for i, n in enumerate(first)])
    assert_close((y, *state), neural_memory_online(**case))


def test_05_the_state_holds_no_more_memory_than_its_own():
    _, weights, momentum = neural_memory_online(**linear_case(), chunk_size=2)
    for part in (*weights, *momentum):
        assert part.untyped_storage().nbytes() == part.nbytes


# 19. Tokens that do not exist.


def test_19_what_lies_behind_a_row_changes_nothing():
    case, lengths = linear_case(time=9), torch.tensor([0, 5])
    padded = {name: x.clone() for name, x in case.items() if isinstance(x, Tensor)}
    for row, length in enumerate(lengths):
        for x in padded.values():
            x[row, length:] = torch.nan
    before, after = (neural_memory_online(**c, chunk_size=4, lengths=lengths) for c in (case, case | padded))
    assert_same_bits(after, before)
    assert not after[0][0].any()
    assert not after[0][1, 5:].any()
    assert all(g.isfinite().all() for g in gradients(neural_memory_online, case | padded, lengths=lengths))


def test_19_tokens_behind_a_row_leave_the_state_bit_for_bit():
    case = linear_case(time=8)
    _, *after = neural_memory_online(**case, chunk_size=4, lengths=torch.tensor([0, 4]))
    assert_same_bits(
        tree_map(lambda x: x[0], after), [tree_map(lambda x: x[0], case[n]) for n in ("weights", "momentum")]
    )
    _, *shorter = neural_memory_online(**take(case, times=slice(4)), chunk_size=4)
    assert_same_bits(tree_map(lambda x: x[1], after), tree_map(lambda x: x[1], shorter))
