"""Rows of tokens cut at segment borders, against a loop over rows and tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memzoo.layers.segments import Segments
from tests.layers.neural_memory_cases import random_cases

SIZES = st.integers(1, 5)
TIMES = st.integers(1, 12)
ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=3)  # tokens before, tokens now


@random_cases
@given(SIZES, TIMES, ROWS, st.booleans(), st.booleans())
def test_every_token_meets_its_segment_and_slot(size, time, rows, starts_afresh, all_exist):
    x = torch.arange(len(rows) * time).view(len(rows), time, 1) + 1
    before = [0 if starts_afresh else before for before, _ in rows]
    lengths = [time if all_exist else min(length, time) for _, length in rows]
    segments = Segments.lay_out(
        x, size, None if starts_afresh else torch.tensor(before), None if all_exist else torch.tensor(lengths)
    )
    pieces, caches, cache = segments.cut(x), [], None
    for s, piece in enumerate(pieces):
        cache = segments.put(cache, piece, s)
        caches.append(cache)

    first = [b // size for b in before]  # the segment a row is in, counted from its very first one
    for row, (start, length) in enumerate(zip(before, lengths, strict=True)):
        slots = [0] * size
        for s, piece in enumerate(pieces):
            tokens = [t for t in range(length) if (start + t) // size - first[row] == s]
            for t in tokens:
                slots[(start + t) % size] = x[row, t].item()
            assert piece[row, : len(tokens), 0].tolist() == [x[row, t].item() for t in tokens]
            own = segments.slots[s].expand(len(rows), -1)
            assert own[row, : len(tokens)].tolist() == [(start + t) % size for t in tokens]
            assert caches[s][row, :, 0].tolist() == slots
            count, begins = segments.counts[s], segments.begins[s]
            assert (piece.shape[1] if count is None else count[row]) == len(tokens)
            assert (True if begins is None else begins[row]) == (bool(tokens) and (start + tokens[0]) % size == 0)
        assert torch.equal(segments.join([*pieces])[row, :length], x[row, :length])


@pytest.mark.parametrize("length", [None, 1, 0])
def test_a_step_is_one_segment_of_one_token(length):
    x = torch.zeros(2, 1, 3)
    lengths = None if length is None else torch.full((2,), length)
    segments = Segments.lay_out(x, 64, torch.tensor([63, 5]), lengths)
    (piece,) = segments.cut(x)
    assert piece is x or piece.data_ptr() == x.data_ptr()


def test_rows_that_begin_together_are_cut_without_a_copy():
    x = torch.zeros(2, 11, 3)
    pieces = Segments.lay_out(x, 4, None, None).cut(x)
    assert [piece.shape[1] for piece in pieces] == [4, 4, 3]
    assert all(piece.untyped_storage().data_ptr() == x.data_ptr() for piece in pieces)
