"""Masks and documents become ragged rows, compared with rows cut by hand."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memzoo.layers.packing import left_align, split_documents


def expected_rows(ids: list[list[int]], mask: list[list[bool]]) -> list[tuple[int, int, list[int]]]:
    """(owner, document, flat positions) of every row, by a plain loop."""
    rows = []
    for b, (row_ids, row_mask) in enumerate(zip(ids, mask, strict=True)):
        mine = []
        for t, (i, real) in enumerate(zip(row_ids, row_mask, strict=True)):
            if real and mine and mine[-1][1] == i:
                mine[-1][2].append(b * len(row_ids) + t)
            elif real:
                mine.append((b, i, [b * len(row_ids) + t]))
        rows += mine or [(b, 0, [])]
    return rows


def grids(draw):
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    ids = [[draw(st.integers(-1, 2)) for _ in range(time)] for _ in range(batch)]
    mask = [[draw(st.booleans()) for _ in range(time)] for _ in range(batch)]
    return ids, mask


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.composite(grids)())
def test_documents_become_the_rows_a_loop_would_cut(grid):
    ids, mask = grid
    rows = split_documents(torch.tensor(ids), torch.tensor(mask))
    expected = expected_rows(ids, mask)
    assert rows.owner.tolist() == [owner for owner, _, _ in expected]
    assert rows.document.tolist() == [document for _, document, _ in expected]
    assert rows.lengths.tolist() == [len(positions) for _, _, positions in expected]
    for row, (_, _, positions) in zip(rows.index.tolist(), expected, strict=True):
        assert row[: len(positions)] == positions
    owners = rows.owner.tolist()
    assert rows.last.tolist() == [len(owners) - 1 - owners[::-1].index(b) for b in range(len(ids))]
    assert rows.first_document.tolist() == [b not in owners[:r] for r, b in enumerate(owners)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.composite(grids)())
def test_documents_laid_end_to_end_are_the_same_rows_without_padding(grid):
    ids, mask = grid
    rows = split_documents(torch.tensor(ids), torch.tensor(mask), end_to_end=True)
    expected = [positions for _, _, positions in expected_rows(ids, mask)]
    padded = split_documents(torch.tensor(ids), torch.tensor(mask))
    for name in ("lengths", "owner", "last", "first_document", "document"):
        assert torch.equal(getattr(rows, name), getattr(padded, name)), name
    if not any(expected):  # a layer cannot be called on no token: padded rows have one slot at least
        assert rows.cu_seqlens is None
        assert torch.equal(rows.index, padded.index)
        return
    assert rows.index.tolist() == [[token for row in expected for token in row]]
    borders = rows.cu_seqlens.tolist()
    assert [rows.index[0, a:b].tolist() for a, b in pairwise(borders)] == expected


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.composite(grids)())
def test_scatter_undoes_gather_and_leaves_zeros_at_masked_tokens(grid):
    ids, mask = torch.tensor(grid[0]), torch.tensor(grid[1])
    x = torch.arange(1.0, ids.numel() + 1).view(*ids.shape, 1)
    for rows in (left_align(mask), split_documents(ids, mask), split_documents(ids, mask, end_to_end=True)):
        assert torch.equal(rows.scatter(rows.gather(x)), x * mask[..., None])
    for rows in (split_documents(ids), split_documents(ids, end_to_end=True)):
        assert torch.equal(rows.scatter(rows.gather(x)), x)


def test_a_mask_aligns_the_real_tokens_to_the_left():
    mask = torch.tensor([[False, True, False, True], [False, False, False, False], [True, True, True, True]])
    rows = left_align(mask)
    assert rows.lengths.tolist() == [2, 0, 4]
    x = torch.arange(12.0).view(3, 4)
    assert rows.gather(x).tolist() == [[1, 3, 0, 0], [0, 0, 0, 0], [8, 9, 10, 11]]


def test_what_is_masked_is_replaced_by_zero_even_if_it_is_nan():
    mask = torch.tensor([[True, False]])
    for rows in (left_align(mask), split_documents(mask.long(), mask, end_to_end=True)):
        x = torch.tensor([[1.0, torch.nan]], requires_grad=True)
        y = rows.scatter(rows.gather(x) * 3)
        y.sum().backward()
        assert y.tolist() == [[3, 0]]
        assert x.grad.tolist() == [[3, 0]]


def test_masked_tokens_do_not_cut_a_document():
    rows = split_documents(torch.tensor([[5, 9, 5, 5]]), torch.tensor([[True, False, True, True]]))
    assert rows.lengths.tolist() == [3]
    assert rows.document.tolist() == [5]


def test_an_id_that_comes_back_is_a_new_document():
    assert split_documents(torch.tensor([[1, 2, 1]])).lengths.tolist() == [1, 1, 1]


def test_trailing_axes_travel_with_their_tokens():
    x = torch.randn(2, 3, 4, 5)
    rows = split_documents(torch.tensor([[0, 1, 1], [2, 2, 2]]))
    assert rows.gather(x).shape == (3, 3, 4, 5)
    assert torch.equal(rows.gather(x)[1, :2], x[0, 1:])
