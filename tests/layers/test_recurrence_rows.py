"""Recurrences on rows of given lengths, on segments of one row and on separate calls (checks 16 and 17)."""

import pytest
import torch

from tests.layers.recurrence_cases import (
    assert_close,
    assert_same_bits,
    borders,
    each_rule,
    make_case,
    run,
    tokens,
    without,
)

# 16. Rows of given lengths, segments of one row, separate calls.

LENGTHS = {
    "uneven": [1, 40, 2],
    "empty": [0, 5, 0, 0, 17, 3, 0],
    "one": [23],
    "equal": [16, 16],
    "single_tokens": [1, 1, 1],
}


@each_rule
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_16_packed_padded_and_separate_sequences_give_the_same(rule, lengths):
    packed = make_case(rule, batch=1, time=sum(lengths), states=len(lengths), group=2)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def pad_and_run(state, **inputs):
        # What lies behind a row may be anything.
        rows = {name: x.new_full((*real.shape, *x.shape[2:]), torch.nan) for name, x in inputs.items()}
        rows = {name: x.index_put((real,), inputs[name][0]) for name, x in rows.items()}
        y, state = rule.op(**rows, state=state, lengths=torch.tensor(lengths), chunk_size=8)
        assert not y[~real].any()
        return y[real][None], state

    def run_separately(state, **inputs):
        outputs, ends, start = [], [], 0
        for row, length in enumerate(lengths):
            y, end = inputs["v"][:, :0], state[row : row + 1]
            if length:
                y, end = rule.op(**tokens(inputs, times=slice(start, start + length)), state=end, chunk_size=8)
            outputs.append(y)
            ends.append(end)
            start += length
        return torch.cat(outputs, 1), torch.cat(ends)

    expected = run(rule.loop, packed, cu_seqlens=borders(lengths))
    assert_close(run(rule.op, packed, cu_seqlens=borders(lengths), chunk_size=8), expected)
    assert_close(run(pad_and_run, packed), expected)
    assert_close(run(run_separately, packed), expected)


@each_rule
@pytest.mark.parametrize("chunk_size", [4, 64])
def test_16_nan_behind_a_row_reaches_no_output_state_or_gradient(rule, chunk_size):
    case, lengths = make_case(rule, batch=3, time=9), torch.tensor([4, 9, 0])
    behind = torch.arange(9) >= lengths[:, None]
    poisoned = {name: x if name == "state" else x.clone() for name, x in case.items()}
    for name in without(case, "state"):
        poisoned[name][behind] = torch.nan
    expected = run(rule.loop, case, lengths=lengths)
    actual = run(rule.op, poisoned, lengths=lengths, chunk_size=chunk_size)
    assert_close(actual, expected)
    assert not actual["y"][behind].any()


@each_rule
def test_16_no_token_changes_another_segment_or_an_earlier_output(rule):
    case, cu_seqlens = make_case(rule, batch=1, time=30, states=3), torch.tensor([0, 11, 11, 30])
    y, state = rule.op(**case, cu_seqlens=cu_seqlens, chunk_size=8)
    other = make_case(rule, batch=1, time=30, states=3, seed=1)
    changed = {name: torch.cat((x[:, :20], other[name][:, 20:]), 1) for name, x in tokens(case).items()}
    y_changed, state_changed = rule.op(**changed, state=case["state"], cu_seqlens=cu_seqlens, chunk_size=8)
    assert_same_bits((y_changed[:, :20], state_changed[:2]), (y[:, :20], state[:2]))
    assert not torch.equal(y_changed[:, 20], y[:, 20])
    assert not torch.equal(state_changed[2], state[2])


@each_rule
def test_16_an_empty_row_or_segment_keeps_its_state_to_the_last_bit(rule):
    case = make_case(rule, batch=2, time=5)
    _, state = rule.op(**case, lengths=torch.tensor([0, 5]))
    assert_same_bits(state[0], case["state"][0])
    y, state = rule.op(**case, lengths=torch.tensor([0, 0]))
    assert_same_bits((y, state), (torch.zeros_like(y), case["state"]))
    case = make_case(rule, batch=1, time=5, states=3)
    _, state = rule.op(**case, cu_seqlens=torch.tensor([0, 0, 5, 5]))
    assert_same_bits(state[[0, 2]], case["state"][[0, 2]])
    _, fresh = rule.op(**without(case, "state"), cu_seqlens=torch.tensor([0, 0, 5, 5]))
    assert not fresh[[0, 2]].any()


# 17. Short segments.


@each_rule
def test_17_gradcheck_on_segments_of_length_0_1_2_3(rule):
    case = make_case(rule, batch=1, time=6, states=4, heads=1, group=2, key_dim=2, value_dim=2)
    cu_seqlens = borders([0, 1, 2, 3])

    def function(*values):
        return rule.op(**dict(zip(case, values, strict=True)), cu_seqlens=cu_seqlens, chunk_size=2)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in case.values()], fast_mode=False)
