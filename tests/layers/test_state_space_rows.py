"""State space ops on rows of given lengths, on segments of one row and on separate calls (check 11)."""

import pytest
import torch

from tests.layers.recurrence_cases import (
    assert_close,
    assert_same_bits,
    borders,
    run,
    without,
)
from tests.layers.state_space_cases import OF_TOKENS, each_op, make_case, tokens

# 11. Rows of given lengths, segments of one row, separate calls.

LENGTHS = {
    "uneven": [1, 40, 2],
    "empty": [0, 5, 0, 0, 17, 3, 0],
    "one": [23],
    "equal": [16, 16],
    "single_tokens": [1, 1, 1],
    "single_and_empty": [0, 1, 0, 1],
}


@each_op
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_11_packed_padded_and_separate_sequences_give_the_same(space, lengths):
    packed = make_case(space, batch=1, time=sum(lengths), states=len(lengths))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def pad_and_run(**inputs):
        # What lies behind a row may be anything.
        rows = {name: inputs[name].new_full((*real.shape, *inputs[name].shape[2:]), torch.nan) for name in OF_TOKENS}
        rows = {name: x.index_put((real,), inputs[name][0]) for name, x in rows.items()}
        y, state = space.op(**inputs | rows, lengths=torch.tensor(lengths), chunk_size=8)
        assert not y[~real].any()
        return y[real][None], state

    def run_separately(state, **inputs):
        outputs, ends, start = [], [], 0
        for row, length in enumerate(lengths):
            end = state[row : row + 1]
            if length:
                y, end = space.op(**tokens(inputs, slice(start, start + length)), state=end, chunk_size=8)
                outputs.append(y)
            ends.append(end)
            start += length
        return torch.cat(outputs, 1), torch.cat(ends)

    expected = run(space.loop, packed, cu_seqlens=borders(lengths))
    assert_close(run(space.op, packed, cu_seqlens=borders(lengths), chunk_size=8), expected)
    assert_close(run(pad_and_run, packed), expected)
    assert_close(run(run_separately, packed), expected)


@each_op
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_11_nan_behind_a_row_reaches_no_output_state_or_gradient(space, chunk_size):
    case, lengths = make_case(space, batch=3, time=9), torch.tensor([4, 9, 0])
    behind = torch.arange(9) >= lengths[:, None]
    poisoned = {name: x.clone() for name, x in case.items()}
    for name in OF_TOKENS:
        poisoned[name][behind] = torch.nan
    expected = run(space.loop, case, lengths=lengths)
    actual = run(space.op, poisoned, lengths=lengths, chunk_size=chunk_size)
    assert_close(actual, expected)
    assert not actual["y"][behind].any()


@each_op
def test_11_no_token_changes_another_segment_or_an_earlier_output(space):
    case, cu_seqlens = make_case(space, batch=1, time=30, states=3), torch.tensor([0, 11, 11, 30])
    y, state = space.op(**case, cu_seqlens=cu_seqlens, chunk_size=8)
    other = make_case(space, batch=1, time=30, states=3, seed=1)
    changed = case | {name: torch.cat((case[name][:, :20], other[name][:, 20:]), 1) for name in OF_TOKENS}
    y_changed, state_changed = space.op(**changed, cu_seqlens=cu_seqlens, chunk_size=8)
    assert_same_bits((y_changed[:, :20], state_changed[:2]), (y[:, :20], state[:2]))
    assert not torch.equal(y_changed[:, 20], y[:, 20])
    assert not torch.equal(state_changed[2], state[2])


@each_op
def test_11_an_empty_row_or_segment_keeps_its_state_to_the_last_bit(space):
    case = make_case(space, batch=2, time=5)
    _, state = space.op(**case, lengths=torch.tensor([0, 5]))
    assert_same_bits(state[0], case["state"][0])
    y, state = space.op(**case, lengths=torch.tensor([0, 0]))
    assert_same_bits((y, state), (torch.zeros_like(y), case["state"]))
    case = make_case(space, batch=1, time=5, states=3)
    _, state = space.op(**case, cu_seqlens=torch.tensor([0, 0, 5, 5]))
    assert_same_bits(state[[0, 2]], case["state"][[0, 2]])
    _, fresh = space.op(**without(case, "state"), cu_seqlens=torch.tensor([0, 0, 5, 5]))
    assert not fresh[[0, 2]].any()
