"""The equations of GRACE against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memzoo.layers.reference import grace
from memzoo.layers.reference.grace import GAP, Entry


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def entry(key: float, radius: float = 1.0, label: object = "a") -> Entry:
    """An entry on a line, whose value names its key."""
    return Entry(tensor(key, 0.0), tensor(key), radius, label)


def test_without_entries_the_layer_answers():
    y = torch.randn(2, 3, 1, dtype=torch.float64)
    assert grace.look_up(tensor(0.0, 0.0), []) is None
    assert torch.equal(grace.read(torch.zeros(2, 3, 2, dtype=torch.float64), y, [2, 2], []), y)


@pytest.mark.parametrize(
    ("query", "found"), [((0.0, 1.0), 0), ((0.0, 1.1), None), ((3.5, 0.0), 1), ((2.4, 0.0), None), ((4.0, 0.3), 1)]
)
def test_the_nearest_key_answers_within_its_radius(query, found):
    """Keys (0, 0) with radius 1 and (4, 0) with radius 1/2. At (2.4, 0) the first is not near, the second too far."""
    assert grace.look_up(tensor(*query), [entry(0.0), entry(4.0, radius=0.5)]) == found


def test_a_further_key_does_not_answer_for_the_nearest():
    """At (2, 0) the key (3, 0) is nearer but too far, though (0, 0) has the radius."""
    assert grace.look_up(tensor(2.0, 0.0), [entry(0.0, radius=5.0), entry(3.0, radius=0.5)]) is None


@pytest.mark.parametrize(("kind", "replaced"), [("last", [1]), ("prompt", [0]), ("all", [0, 1, 2])])
def test_a_value_takes_the_place_of_the_tokens_it_should(kind, replaced):
    x = tensor([[9.0, 9.0], [4.0, 0.0], [9.0, 9.0]], [[4.0, 0.0], [9.0, 9.0], [4.0, 0.0]])  # the query is token 1
    y = torch.randn(2, 3, 1, dtype=torch.float64)
    out = grace.read(x, y, [1, 1], [entry(4.0)], kind)
    expected = y.clone()
    expected[0, replaced] = 4.0
    assert torch.equal(out, expected)


def test_the_first_edit_and_one_far_from_all_add_an_entry():
    book, index = grace.write(tensor(1.0, 0.0), tensor(7.0), "a", [], 0.5)
    assert (index, book[0].radius, book[0].label) == (0, 0.5, "a")
    near = entry(0.0, radius=1.0)
    book, index = grace.write(tensor(1.6, 0.0), tensor(7.0), "b", [near], 0.5)
    assert index == 1
    assert book[0] is near
    assert (book[1].key.tolist(), book[1].value.tolist(), book[1].radius, book[1].label) == ([1.6, 0], [7], 0.5, "b")


@pytest.mark.parametrize(("distance", "radius"), [(1.25, 1.25), (0.25, 1.0)])
def test_an_edit_of_the_same_label_nearby_widens_the_entry_if_it_must(distance, radius):
    other = entry(9.0, label="b")
    book, index = grace.write(tensor(distance, 0.0), tensor(7.0), "a", [other, entry(0.0)], 0.5)
    assert index == 1
    assert book[0] is other
    assert book[1].radius == pytest.approx(radius, abs=1e-12)
    assert (book[1].key.tolist(), book[1].value.tolist()) == ([0, 0], [0])


@pytest.mark.parametrize("distance", [1.5, 0.5])
def test_a_conflict_splits_the_room_between_the_two(distance):
    book, index = grace.write(tensor(distance, 0.0), tensor(7.0), "b", [entry(0.0)], 0.5)
    assert (index, len(book)) == (1, 2)
    assert book[0].radius + book[1].radius == pytest.approx(distance - GAP, abs=1e-12)
    assert book[1].radius == distance / 2
    assert [part.label for part in book] == ["a", "b"]
    assert grace.look_up(tensor(0.0, 0.0), book) == 0
    assert grace.look_up(tensor(distance, 0.0), book) == 1


def test_an_edit_of_an_edited_query_takes_effect():
    """The two keys are one point; the entry becomes that of the later edit, which is read."""
    for distance in (0.0, 1e-6):
        book, index = grace.write(tensor(distance, 0.0), tensor(7.0), "b", [entry(0.0)], 0.5)
        assert (index, len(book), book[0].label, book[0].value.item()) == (0, 1, "b", 7)
        assert book[0].radius == 1.0


def test_keys_values_and_labels_stay_together_from_the_second_entry_on():
    """Labels that were put in front would give the key 0 the label "c"."""
    book: list[Entry] = []
    for key, label in ((0.0, "a"), (10.0, "b"), (20.0, "c")):
        book, _ = grace.write(tensor(key, 0.0), tensor(key), label, book, 1.0)
    assert [(part.key[0].item(), part.value.item(), part.label) for part in book] == [
        (0, 0, "a"),
        (10, 10, "b"),
        (20, 20, "c"),
    ]
    book, index = grace.write(tensor(0.5, 0.0), tensor(9.0), "a", book, 1.0)
    assert (index, len(book)) == (0, 3)


def test_the_first_step_of_adam_is_the_learning_rate_whatever_the_gradient():
    start = tensor(1.0, -1.0)
    found = grace.train(start, lambda value: (value * tensor(3.0, -0.01)).sum(), 1, 0.25)
    torch.testing.assert_close(found, tensor(0.75, -0.75), rtol=0, atol=1e-6)  # its eps is 1e-8
    assert start.tolist() == [1, -1]


def test_a_stream_answers_every_edit_at_its_query():
    def loss(target: float):
        return lambda value: (value - target).square().sum()

    queries = [tensor(0.0, 0.0), tensor(5.0, 0.0), tensor(5.5, 0.0), tensor(0.5, 0.0)]
    labels, targets = ["a", "b", "c", "a"], [1.0, 2.0, 3.0, 1.0]
    edits = [(q, label, loss(t)) for q, label, t in zip(queries, labels, targets, strict=True)]
    book = grace.stream(edits, lambda q: q[:1], radius=1.0, steps=400, lr=0.05)
    assert [part.label for part in book] == ["a", "b", "c"]  # the last widened nothing: it was within
    assert [part.radius for part in book] == pytest.approx([1.0, 0.25 - GAP, 0.25])
    for query, target in zip(queries, targets, strict=True):
        index = grace.look_up(query, book)
        assert index is not None
        torch.testing.assert_close(book[index].value, tensor(target), rtol=0, atol=1e-3)
    moved = [replace(part, key=part.key + 100) for part in book]
    assert all(grace.look_up(query, moved) is None for query in queries)
