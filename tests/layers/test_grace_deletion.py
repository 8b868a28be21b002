"""GRACE: a deleted edit leaves nothing, in whatever order edits go."""

import pytest
import torch

from memzoo.layers.codebook import Codebook

# Deletion, entry by entry


def entered(*edits: tuple[float, str], without: int | None = None) -> Codebook:
    """A codebook of one axis whose edit number n sets the value n."""
    book = Codebook(1, 1, 1.0, like=torch.zeros(1, dtype=torch.float64))
    for number, (query, label) in enumerate(edits):
        if number == without:
            book.next_edit += 1
            continue
        place = book.enter(book.keys.new_tensor([query]), book.keys.new_zeros(1), label)
        with torch.no_grad():
            book.values[place] = number
    return book


EDITS = (0.0, "a"), (1.5, "a"), (-1.2, "a"), (5.0, "b"), (6.0, "c"), (20.0, "d")


@pytest.mark.parametrize("number", [1, 2, 4, 5], ids=["widened", "last_value", "split", "alone"])
def test_deleting_an_edit_is_as_if_it_had_never_been(number: int) -> None:
    book, never = entered(*EDITS), entered(*EDITS, without=number)
    book.delete(number)
    assert book.num_edits == len(EDITS) - 1
    if number == 1:  # edit 2 found the radius of edit 1 and widened it no more, without it it would have
        never.radii[0] = 1.0
    for name in ("keys", "values", "radii", "labels", "edits"):
        assert torch.equal(getattr(book, name), getattr(never, name)), name


def test_edits_deleted_in_any_order_leave_nothing() -> None:
    for order in ([0, 3, 4, 5], [2, 1, 0, 5, 4, 3], [1, 2, 0, 3, 5, 4], [5, 4, 3, 2, 1, 0]):
        book = entered(*EDITS)
        for number in order:
            book.delete(number)
        assert book.num_edits == 0
        sizes = {name: len(table) for name, table in book.state_dict().items() if table.dim()}
        assert set(sizes.values()) == {0}


def test_what_a_later_edit_set_again_stays_until_that_is_deleted() -> None:
    book = entered((0.0, "a"), (1.0, "b"), (0.4, "a"))
    assert (book.radii[0], book.values[0].item()) == (0.5 - 1e-5, 2)
    book.delete(1)  # narrowed the first
    assert (book.radii.tolist(), book.values[0].item()) == ([1.0], 2)
    book = entered((0.0, "a"), (0.1, "a"), (0.2, "a"))
    book.delete(1)
    assert book.values[0].item() == 2
    book.delete(2)
    assert book.values[0].item() == 0


def test_an_entry_goes_with_the_edits_that_used_it() -> None:
    book = entered(*EDITS)
    book.delete(0)
    assert (book.num_edits, book.edits.tolist()) == (3, [3, 4, 5])
