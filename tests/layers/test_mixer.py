"""What SequenceMixer does for every layer, on the smallest one: a running sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers import MixerState, SequenceMixer, Trace
from memzoo.layers.mixer import counters
from tests.layers.running_sum import RunningSum, RunningSumState


def rows_by_hand(x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[int, int, float]]]:
    """Sums that restart with every run of equal ids among real tokens; (position, document, total) of each row."""
    y, ends = torch.zeros_like(x), []
    for b in range(x.shape[0]):
        total, position, document = 0.0, 0, 0
        for t in range(x.shape[1]):
            if not mask[b, t]:
                continue
            if position and document != int(ids[b, t]):
                total, position = 0.0, 0
            total, position, document = total + float(x[b, t]), position + 1, int(ids[b, t])
            y[b, t] = total
        ends.append((position, document, total))
    return y, ends


def grids(draw):
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    ids = [[draw(st.integers(0, 2)) for _ in range(time)] for _ in range(batch)]
    mask = [[draw(st.booleans()) for _ in range(time)] for _ in range(batch)]
    return torch.tensor(ids), torch.tensor(mask), draw(st.integers(0, time - 1))


class NativeSum(RunningSum):
    """The running sum of segments that lie end to end: what was summed before a segment is taken off again."""

    native_segments = True

    def mix(self, x, state, *, lengths, trace, donate, cu_seqlens=None):
        if cu_seqlens is None:
            return super().mix(x, state, lengths=lengths, trace=trace, donate=donate)
        assert lengths is None
        assert x.shape[:2] == (1, cu_seqlens[-1])
        _, after, document = counters(state, x, None, cu_seqlens)
        total = torch.cat((x.new_zeros(1, self.dim), x[0].cumsum(0)))
        before = total[cu_seqlens[:-1]] - (0 if state is None else state.total)
        y = total[1:] - before.repeat_interleave(cu_seqlens.diff(), dim=0)
        if trace is not None:
            trace.signal("input", x)
            trace.loss("size", x.abs().sum())
        return y[None], RunningSumState(after, document, total[cu_seqlens[1:]] - before)


@pytest.mark.parametrize("mixer", [RunningSum(1), NativeSum(1)], ids=["padded", "native"])
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(grid=st.composite(grids)())
def test_documents_and_masks_equal_a_loop_however_the_call_is_cut(mixer, grid):
    ids, mask, cut = grid
    x = torch.randn(*ids.shape, 1, dtype=torch.float64)
    expected, ends = rows_by_hand(x, ids, mask)
    state, outputs = None, []
    for piece in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
        y, state = mixer(x[:, piece], state, doc_ids=ids[:, piece], mask=mask[:, piece])
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)
    for b, (position, document, total) in enumerate(ends):
        assert (int(state.position[b]), int(state.document[b])) == (position, document)
        assert abs(float(state.total[b]) - total) < 1e-12


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.composite(grids)())
def test_native_segments_report_and_carry_what_padded_rows_do(grid):
    ids, mask, _ = grid
    x = torch.randn(*ids.shape, 1, dtype=torch.float64)
    results = []
    for mixer in (NativeSum(1), RunningSum(1)):
        given_x, trace = x.clone().requires_grad_(), Trace()
        _, start = mixer(torch.ones(len(x), 2, 1, dtype=torch.float64), doc_ids=ids[:, :1].expand(-1, 2))
        y, state = mixer(given_x, start, doc_ids=ids, mask=mask, trace=trace)
        (slope,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), given_x)
        results.append({"y": y, "slope": slope, **state.named_tensors(), **trace.signals, **trace.losses})
    native, padded = results
    assert native.keys() == padded.keys()
    for name, tensor in padded.items():
        torch.testing.assert_close(native[name], tensor, rtol=0, atol=1e-12, msg=name)


def test_native_segments_are_for_documents_only():
    mixer, x, seen = NativeSum(1), torch.ones(2, 3, 1), []
    whole = mixer.mix
    mixer.mix = lambda x, *args, **options: seen.append((x.shape[0], sorted(options))) or whole(x, *args, **options)
    mixer(x)
    mixer(x, mask=torch.ones(2, 3, dtype=torch.bool))
    assert seen == [(2, ["donate", "lengths", "trace"])] * 2
    mixer(x, doc_ids=torch.zeros(2, 3, dtype=torch.long))
    assert seen[2:] == [(1, ["cu_seqlens", "donate", "lengths", "trace"])]


def test_a_document_goes_on_in_the_next_call_and_another_id_starts_afresh():
    mixer, x = RunningSum(1), torch.ones(2, 2, 1)
    _, state = mixer(x, doc_ids=torch.tensor([[4, 4], [4, 4]]))
    y, state = mixer(x, state, doc_ids=torch.tensor([[4, 4], [5, 5]]))
    assert y.squeeze(-1).tolist() == [[3, 4], [1, 2]]
    assert state.position.tolist() == [4, 2]
    assert state.document.tolist() == [4, 5]


def test_a_masked_token_does_not_exist():
    x = torch.tensor([[1.0, torch.nan, 10.0], [torch.nan, torch.nan, torch.nan]])[..., None]
    x.requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    start = RunningSum(1).initial_state(2)
    y, state = RunningSum(1)(x, start, mask=mask)
    assert y.squeeze(-1).tolist() == [[1, 0, 11], [0, 0, 0]]
    assert state.position.tolist() == [2, 0]
    assert state.total.tolist() == [[11], [0]]
    y.sum().backward()
    assert x.grad.squeeze(-1).tolist() == [[2, 0, 1], [0, 0, 0]]


def test_a_wholly_masked_row_keeps_its_document():
    mixer, x = RunningSum(1), torch.ones(1, 2, 1)
    _, state = mixer(x, doc_ids=torch.tensor([[7, 7]]))
    _, kept = mixer(x, state, doc_ids=torch.tensor([[3, 3]]), mask=torch.zeros(1, 2, dtype=torch.bool))
    assert kept.named_tensors().keys() == state.named_tensors().keys()
    for name, tensor in kept.named_tensors().items():
        assert torch.equal(tensor, state.named_tensors()[name]), name


def test_a_row_that_was_wholly_masked_first_is_not_taken_for_document_zero():
    mixer = RunningSum(1)
    _, state = mixer(torch.ones(1, 1, 1), doc_ids=torch.tensor([[0]]), mask=torch.tensor([[False]]))
    y, _ = mixer(torch.ones(1, 1, 1), state, doc_ids=torch.tensor([[0]]))
    assert y.item() == 1


def test_signals_of_single_tokens_come_back_in_their_places():
    trace = Trace()
    x = torch.tensor([[1.0, 2.0, 4.0]])[..., None]
    RunningSum(1)(x, doc_ids=torch.tensor([[0, 1, 1]]), mask=torch.tensor([[True, False, True]]), trace=trace)
    assert trace.signals["input"].squeeze(-1).tolist() == [[1, 0, 4]]
    assert trace.losses["size"] == 5


def test_a_document_may_be_donated_by_whoever_passes_whole_rows_only():
    seen = []

    class Spy(RunningSum):
        def mix(self, x, state, *, lengths, trace, donate):
            seen.append((lengths, donate))
            return super().mix(x, state, lengths=lengths, trace=trace, donate=donate)

    x = torch.ones(1, 2, 1)
    Spy(1)(x, donate=True)
    Spy(1)(x, donate=True, mask=torch.ones(1, 2, dtype=torch.bool))
    assert seen[0] == (None, True)
    assert seen[1][0].tolist() == [2]
    assert not seen[1][1]


def test_counters_advance_by_the_lengths():
    x, lengths = torch.zeros(2, 5, 1), torch.tensor([5, 0])
    assert [c.tolist() for c in counters(None, x, None)] == [[0, 0], [5, 5], [0, 0]]
    state = MixerState(torch.tensor([3, 1]), torch.tensor([8, 9]))
    assert [c.tolist() for c in counters(state, x, lengths)] == [[3, 1], [8, 1], [8, 9]]
    row, cu_seqlens = torch.zeros(1, 5, 1), torch.tensor([0, 4, 5])
    assert [c.tolist() for c in counters(state, row, None, cu_seqlens)] == [[3, 1], [7, 2], [8, 9]]
    assert [c.tolist() for c in counters(None, row, None, cu_seqlens)] == [[0, 0], [4, 1], [0, 0]]


def test_a_mixer_must_say_how_it_starts_and_mixes():
    with pytest.raises(TypeError, match=r"abstract methods '?initial_state'?, '?mix'?"):
        SequenceMixer(4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(2, 3)}, "three axes"),
        ({"x": torch.zeros(2, 3, 4)}, "its width is 4, the layer was built for 1"),
        ({"x": torch.zeros(2, 0, 1)}, "time >= 1"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            r"mask has shape \(2, 4\); it must be \(batch, time\) = \(2, 3\)",
        ),
        ({"mask": torch.ones(2, 3)}, r"mask has dtype torch.float32; it must be bool.*use mask != 0"),
        ({"doc_ids": torch.ones(2, 3)}, r"doc_ids has dtype torch.float32.*use doc_ids.long\(\)"),
        ({"doc_ids": torch.ones(2, 3, dtype=torch.bool)}, "doc_ids has dtype torch.bool"),
        ({"doc_ids": torch.ones(3, 2, dtype=torch.long)}, r"doc_ids has shape \(3, 2\)"),
        ({"state": RunningSum(1).initial_state(5)}, r"state has 5 rows, x has batch 2; use state.reorder"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        RunningSum(1)(**{"x": torch.zeros(2, 3, 1)} | arguments)
