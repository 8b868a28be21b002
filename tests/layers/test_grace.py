"""GRACE: the checks of its specification, and the equations."""

import warnings
from typing import Any

import pytest
import torch

from memzoo.arch import create_model
from memzoo.layers import Grace
from memzoo.layers.codebook import Codebook
from memzoo.layers.reference import grace as reference
from tests.layers.grace_cases import attach, edit_of, same, site_call, tables
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

EVERYWHERE = pytest.mark.parametrize("name", HOSTS)
LATER = ("codebook.next_edit",)  # what deletion does not bring back: numbers are given once


# The numbered checks


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_01_an_empty_codebook_changes_nothing(name: str, dtype: torch.dtype) -> None:
    host, x = make_host(name, dtype), make_inputs(name, dtype=dtype)
    before = read(host, x)
    grace = attach(name, host)
    assert torch.equal(read(host, x), before)
    assert not len(grace.codebook)
    assert grace.codebook.keys.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in host.parameters())


@EVERYWHERE
def test_02_what_is_outside_of_all_radii_is_what_it_was(name: str) -> None:
    host, x = make_host(name), make_inputs(name, batch=3)
    before = read(host, x)
    grace = attach(name, host)
    grace.edit([edit_of(x[1:2], 3)])
    after = read(host, x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_03_a_question_gets_its_value_at_the_token_that_asks_alone(name: str, dtype: torch.dtype) -> None:
    host, x = make_host(name, dtype), make_inputs(name, dtype=dtype)[:1]
    grace = attach(name, host, radius=1.0)
    before = site_call(grace, x)[1]
    report = grace.edit([edit_of(x, 3)])
    key, after = site_call(grace, x)
    token = 0 if HOSTS[name].images else -1
    assert torch.equal(after[0, token], grace.codebook.values[0].to(dtype))
    assert torch.equal(grace.codebook.keys[0], key[0, token].float())
    others = torch.arange(after.shape[1]) != token % after.shape[1]
    assert torch.equal(after[:, others], before[:, others])
    assert report.steps == 8
    assert int(read(host, x).flatten(0, -2)[-1].argmax()) == 3


def test_04_a_conflict_splits_the_space_between_the_two() -> None:
    book = Codebook(2, 1, 5.0, like=torch.zeros(1, dtype=torch.float64))
    for key, label in (([0.0, 0.0], "a"), ([3.0, 4.0], "b")):
        book.enter(torch.tensor(key, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), label)
    assert book.radii.tolist() == [2.5 - 1e-5, 2.5]
    assert float(book.radii.sum()) == pytest.approx(5.0 - 1e-5, abs=1e-12)
    queries = torch.tensor([[0.0, 0.0], [1.5, 2.0], [1.4, 1.9], [3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    assert book.find(queries).tolist() == [0, 1, 0, 1, -1]  # the border belongs to the new one


def test_04_another_answer_at_the_very_same_place_is_the_one_that_is_read() -> None:
    book = Codebook(2, 1, 1.0, like=torch.zeros(1))
    places = [book.enter(torch.ones(2), torch.tensor([float(n)]), label) for n, label in enumerate("aba")]
    assert places == [0, 0, 0]
    assert book.find(torch.tensor([[1.0, 1.0], [1.0, 1.5], [1.0, 2.5]])).tolist() == [0, 0, -1]
    assert (book.values.tolist(), book.num_edits) == ([[2.0]], 3)
    for number, value in ((1, 2.0), (2, 0.0)):
        book.delete(number)
        assert book.values.tolist() == [[value]]
    assert book.enter(torch.ones(2), torch.ones(1), "a") == 0
    assert book.values.tolist() == [[0.0]]  # the first answer again, so its value is trained on


def test_04_labels_go_with_values_when_an_edit_between_is_deleted() -> None:
    """Number 1 relabels an entry, number 2 trains that answer on: without number 1 it still gives that answer."""
    book = Codebook(2, 1, 1.0, like=torch.zeros(1))
    for number, label in enumerate("abb"):
        place = book.enter(torch.ones(2), torch.tensor([float(number)]), label)
        with torch.no_grad():
            book.values[place] = number
    book.delete(1)
    assert (book.values.tolist(), torch.equal(book.labels[0], book._code("b"))) == ([[2.0]], True)
    book.delete(2)
    assert (book.values.tolist(), torch.equal(book.labels[0], book._code("a"))) == ([[0.0]], True)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="fp32", marks=pytest.mark.slow), pytest.param(torch.bfloat16, id="bf16")]
)
def test_04_questions_edited_again_are_answered_anew_in_any_batch(dtype: torch.dtype) -> None:
    """Alone, beside others and padded, where each computes the same key otherwise."""
    torch.manual_seed(0)
    host = create_model("transformer_tiny").eval().to(dtype)
    grace = Grace.attach(host, replace="all", steps=15, radius=1e-3 if dtype == torch.float32 else 1e-2)
    questions = torch.randint(5, 250, (16, 7))
    padded = torch.cat([questions, torch.zeros(16, 9, dtype=torch.long)], 1)
    mask = (torch.arange(16) < 7).expand(16, 16)
    for answer in (9, 10):
        grace.edit([edit_of(question[None], answer) for question in questions])
        alone = [int(grace.answer(question[None])[0, -1].argmax()) for question in questions]
        assert alone == [answer] * 16
        assert grace.answer(questions)[:, -1].argmax(1).tolist() == alone
        assert grace.answer(padded, mask)[:, 6].argmax(1).tolist() == alone
    assert (len(grace.codebook), int(grace.num_edits)) == (16, 32)
    for number in range(16, 32):
        grace.delete(number)
    assert grace.answer(padded, mask)[:, 6].argmax(1).tolist() == [9] * 16


@pytest.mark.parametrize(
    ("dtype", "units"), [(torch.float64, 4), (torch.float32, 4), (torch.bfloat16, 3), (torch.float16, 3)]
)
def test_rounding_is_of_the_dtype_that_a_query_was_computed_in(dtype: torch.dtype, units: int) -> None:
    book, query = Codebook(16, 1, 1e-15, like=torch.zeros(1, dtype=torch.float64)), torch.full((16,), 3.0)
    with pytest.warns(UserWarning, match=f"radius=1e-15 is less than rounding in {dtype} may move a key of length 12"):
        book.enter(query.to(dtype), torch.zeros(1), "a")
    assert float(book.radii) == pytest.approx(3 * 4 * units * torch.finfo(dtype).eps)  # |q|, and log2(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        book.enter(-query.to(dtype), torch.zeros(1), "b")


def test_another_question_of_a_wide_layer_in_bfloat16_has_an_entry_of_its_own() -> None:
    """Of the width and the length that keys have in a model of 7 billion parameters."""
    query = torch.randn(11008, generator=torch.Generator().manual_seed(0)).mul(50 / 11008**0.5).bfloat16()
    other = (query.float() + torch.full((11008,), 4.0 / 11008**0.5)).bfloat16()
    distance = float((other.float() - query.float()).norm())
    assert distance == pytest.approx(4, rel=0.05)
    for radius in (0.5, 2.0, 3.0):
        book = Codebook(11008, 8, radius, like=query)
        for number, key in enumerate((query, other)):
            assert book.enter(key, torch.zeros(8), number) == number
        assert book.radii.tolist() == pytest.approx(
            [max(radius, 1.17)] * 2 if radius < 2 else [distance / 2] * 2, rel=0.02
        )


def test_04_a_question_that_takes_an_entry_over_is_found_wherever_rounding_moves_it() -> None:
    """It lies further from the key than the entry answered, and would be lost if that did not answer further now."""
    book, way = Codebook(64, 1, 2.0, like=torch.zeros(1)), torch.eye(64)[1]
    query = 64 * torch.eye(64)[0].bfloat16()
    assert book.enter(query, torch.zeros(1), "a") == 0
    least = 3 * 64 * 2**-7
    with torch.no_grad():
        book.radii.fill_(least)  # as a conflict might have left it
    assert book.enter((query + 2 * way).bfloat16(), torch.ones(1), "b") == 0  # nearer than twice that
    assert float(book.radii) == pytest.approx(2 + least, abs=1e-2)
    moved = [query + reach * way for reach in (0, 2, 1.98 + least, 2.02 + least)]
    assert book.find(torch.stack(moved)).tolist() == [0, 0, 0, -1]
    book.delete(1)
    assert (float(book.radii), float(book.values)) == (least, 0)


def test_05_there_are_as_many_entries_as_edits_that_added_one() -> None:
    book = Codebook(1, 1, 1.0, like=torch.zeros(1))
    queries = [0.0, 1.5, 10.0, 10.5, 10.25, 30.0]
    labels = ["a", "a", "b", "c", "c", "a"]
    places = [book.enter(torch.tensor([q]), torch.zeros(1), label) for q, label in zip(queries, labels, strict=True)]
    assert places == [0, 0, 1, 2, 2, 3]  # 1.5 <= 1 + 1 widens the first; 10.25 lies at the border of 10.5
    assert book.edits.tolist() == [0, 2, 3, 5]
    assert book.radii.tolist() == pytest.approx([1.5, 0.25 - 1e-5, 0.25, 1.0], abs=2e-6)
    assert (book.num_edits, len(book)) == (6, 4)


def test_05_keys_and_answers_stay_aligned() -> None:
    """Each of several questions gets its own answer, after the last edit and not just behind its own."""
    x = make_inputs("ours", batch=5)
    grace = attach("ours", steps=40)
    answers = [3, 8, 13, 3, 21]
    for row, answer in zip(x, answers, strict=True):
        grace.edit([edit_of(row[None], answer)])
    assert read(grace.host, x)[:, -1].argmax(1).tolist() == answers
    assert (int(grace.num_edits), len(grace.codebook)) == (5, 5)
    codes = grace.codebook.labels
    assert [bool(torch.equal(code, codes[0])) for code in codes] == [True, False, False, True, False]


@pytest.mark.parametrize("radius", [1e-3, 1e3], ids=["apart", "conflict"])
@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "vit"])
def test_06_a_deleted_edit_leaves_the_outputs_from_before(name: str, radius: float) -> None:
    x = make_inputs(name, batch=3)
    grace = attach(name, radius=radius, steps=2)
    grace.edit([edit_of(x[:1], 3)])
    before, said = tables(grace), read(grace.host, x)
    grace.edit([edit_of(x[1:2], 4)])
    assert not torch.equal(read(grace.host, x), said)
    grace.delete(1)
    assert torch.equal(read(grace.host, x), said)
    assert same(tables(grace), before, *LATER)
    grace.delete(0)
    assert int(grace.num_edits) == 0
    with pytest.raises(ValueError, match="edit=0 is not in the codebook, which has had 2"):
        grace.delete(0)


# The equations


def test_the_codebook_is_that_of_the_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    book, entries = Codebook(2, 1, 0.6, like=torch.zeros(1, dtype=torch.float64)), []
    for number in range(60):
        query, value = 3 * torch.rand(2, generator=generator, dtype=torch.float64), torch.tensor([float(number)])
        label = int(torch.randint(3, (), generator=generator))
        entries, expected = reference.write(query, value.double(), label, entries, 0.6)
        assert book.enter(query, value.double(), label) == expected
    assert book.radii.tolist() == pytest.approx([entry.radius for entry in entries], abs=1e-12)
    assert 5 < len(book) < 55
    queries = 4 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
    found = [reference.look_up(query, entries) for query in queries]
    assert book.find(queries).tolist() == [-1 if place is None else place for place in found]
    assert None in found


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_reading_is_that_of_the_equations(replace: Any) -> None:
    grace = attach("ours", make_host("ours", torch.float64), replace=replace, radius=2.0)
    book, x = grace.codebook, torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0)).double()
    entries: list[reference.Entry] = []
    positions = [4, 2, 3, 0]
    for number, row in enumerate((0, 2, 3)):
        query, value = x[row, positions[row]], torch.full((16,), float(number)).double()
        entries, _ = reference.write(query, value, number, entries, 2.0)
        book.enter(query, value, number)
    y = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1)).double()
    with grace.reading(torch.arange(5) <= torch.tensor(positions)[:, None]):
        assert torch.equal(grace.beside(0, x, y), reference.read(x, y, positions, entries, replace))
