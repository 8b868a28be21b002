"""The neural memory cut into calls, and behind the end of rows (checks 5 and 19)."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from memzoo.layers.ops.neural_memory import neural_memory_scan
from memzoo.layers.ops.neural_memory_window import latest, with_recent
from tests.layers.neural_memory_cases import (
    assert_close,
    assert_same_bits,
    gradients,
    make_case,
    random_cases,
    stream,
    take,
    without,
)

# 5. Streaming.


@random_cases
@given(
    cuts=st.lists(st.integers(1, 10), unique=True).map(sorted),
    chunk_size=st.integers(1, 6),
    phases=st.integers(0, 5) | st.lists(st.integers(0, 5), min_size=2, max_size=2).map(torch.tensor),
    window=st.integers(1, 7),
)
def test_05_any_cut_into_calls_equals_one_call(cuts, chunk_size, phases, window):
    case, options = make_case(time=11, window=window), {"chunk_size": chunk_size, "window": window}
    whole = neural_memory_scan(**case, position=phases, **options)
    assert_close(stream(case, cuts, phases, **options), whole)


@pytest.mark.parametrize("window", [1, 4])
def test_05_gradients_flow_through_the_cuts(window):
    case, options = make_case(time=9, window=window), {"chunk_size": 4, "window": window}

    def steps(**case: Any) -> Any:
        return stream(case, list(range(1, 9)), 2, **options)

    assert_close(gradients(steps, case), gradients(neural_memory_scan, case, position=2, **options))


@pytest.mark.parametrize("window", [1, 4])
def test_05_rows_may_be_cut_at_different_tokens(window):
    case, options = make_case(time=8, window=window), {"chunk_size": 3, "window": window}
    whole = neural_memory_scan(**case, position=1, **options)
    first = torch.tensor([2, 7])
    y1, weights, momentum, base = neural_memory_scan(**case, position=1, **options, lengths=first)
    names = ["q", "k", "v", "theta", "eta", "alpha", *["gamma"] * (window > 1)]
    shifted = {name: torch.stack([case[name][i].roll(-n, 0) for i, n in enumerate(first)]) for name in names}
    state = {"weights": weights, "momentum": momentum, "base": base, "anchor": case["anchor"]}
    tokens = with_recent(case["k"], case["v"], case.get("gamma"), case.get("recent"), window)
    state["recent"] = latest(tokens, first, window)
    y2, *state = neural_memory_scan(**shifted, **state, position=1 + first, **options, lengths=8 - first)
    y = torch.stack([torch.cat([y1[i, :n], y2[i, : 8 - n]]) for i, n in enumerate(first)])
    assert_close((y, *state), whole)


def test_05_a_step_costs_the_same_wherever_it_stands():
    case = without(make_case(time=1), "anchor")

    def cost(position: int) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            result = neural_memory_scan(**case, chunk_size=4, position=position)
        return counter.get_total_flops(), sum(x.nbytes for x in tree_leaves(result))

    assert cost(2) == cost(100_002)
    assert cost(3) == cost(100_003)


# 19. Tokens that do not exist.


@pytest.mark.parametrize("window", [1, 3])
def test_19_what_lies_behind_a_row_changes_nothing(window):
    case, lengths = make_case(time=9, window=window), torch.tensor([0, 5])
    options = {"chunk_size": 4, "window": window}
    padded = {name: x.clone() for name, x in case.items() if isinstance(x, Tensor)}
    for row, length in enumerate(lengths):
        for x in padded.values():
            x[row, length:] = torch.nan
    before, after = (neural_memory_scan(**c, **options, lengths=lengths) for c in (case, case | padded))
    assert_same_bits(after[1:], before[1:])
    assert_same_bits(after[0][1, :5], before[0][1, :5])
    alone = neural_memory_scan(**take(case, rows=[1], times=slice(5)), **options)
    assert_close((before[0][1:, :5], *tree_map(lambda x: x[1:], before[1:])), alone)


def test_19_a_row_without_tokens_keeps_its_state_bit_for_bit():
    case = make_case(time=6)
    _, *after = neural_memory_scan(**case, chunk_size=4, position=3, lengths=torch.tensor([0, 6]))
    before = [case["weights"], case["momentum"], case["base"]]
    assert_same_bits(tree_map(lambda x: x[0], after), tree_map(lambda x: x[0], before))
