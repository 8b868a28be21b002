"""Hashed n-grams: the same everywhere, of length 1, near where texts share words."""

import math

import pytest
import torch

from memzoo.layers import HashedNgrams

TOPICS = {
    "sea": ["harbour", "anchor", "sailor", "tide", "vessel", "compass", "whale", "lagoon", "reef", "current"],
    "kitchen": ["flour", "butter", "oven", "skillet", "pepper", "simmer", "dough", "whisk", "garlic", "broth"],
    "law": [
        "plaintiff",
        "verdict",
        "statute",
        "tribunal",
        "appeal",
        "counsel",
        "testimony",
        "clause",
        "felony",
        "jury",
    ],
}


def documents(words: list[str]) -> list[str]:
    generator = torch.Generator().manual_seed(len(words[0]))
    return [" ".join(words[i] for i in torch.randint(len(words), (30,), generator=generator)) for _ in range(8)]


def test_topics_without_a_common_word_are_apart() -> None:
    embedded = torch.stack([HashedNgrams().embed(documents(words)) for words in TOPICS.values()])
    similarity = torch.einsum("aic,bjc->abij", embedded, embedded)
    same = torch.eye(len(TOPICS), dtype=torch.bool)
    assert similarity[same].min() > similarity[~same].max() + 0.3


def test_a_vector_is_the_sum_of_signed_one_hot_ngrams_each_weighed_by_its_count() -> None:
    embedder = HashedNgrams(64, (1, 1))
    space, a, b = (embedder._row(text) for text in ("", "a", "b"))
    assert space == [0.0] * 64
    # " a ": one n-gram "a" once, " " twice; "aaab" holds "a" three times.
    weights = sorted((abs(value) for value in a if value), reverse=True)
    assert weights == pytest.approx([1 + math.log(2), 1.0])
    place, other = a.index(next(v for v in a if abs(v) == 1)), b.index(next(v for v in b if abs(v) == 1))
    row = embedder._row("aaab")
    assert row[place] == pytest.approx(a[place] * (1 + math.log(3)))
    assert row[other] == b[other]


def test_rows_have_length_one_and_an_empty_text_is_zero() -> None:
    rows = HashedNgrams(32).embed(["some words", "  \n ", "ß"])
    assert rows.shape == (3, 32)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.tensor([1.0, 0.0, 1.0]))
    assert HashedNgrams(32).embed([]).shape == (0, 32)


def test_case_and_white_space_do_not_matter_and_order_does() -> None:
    one, same, other = HashedNgrams().embed(["The  Tide\nturns", "the tide turns", "turns the tide"])
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_hash_is_one_for_all_processes() -> None:
    rows = HashedNgrams(8, (1, 1)).embed(["a", "ü", "潮"])  # Python's own hash differs from process to process
    assert rows.ne(0).nonzero().tolist() == [[0, 0], [0, 2], [1, 2], [2, 2], [2, 6]]
    assert rows.sign().sum(-1).tolist() == [-2, -1, -2]


def test_a_row_does_not_depend_on_its_batch_and_odd_characters_are_fine() -> None:
    texts = ["tide", "\ud800 alone", "潮汐"]
    rows = HashedNgrams(16).embed(texts)
    assert torch.equal(rows, torch.cat([HashedNgrams(16).embed([text]) for text in texts]))


@pytest.mark.parametrize("ngram", [(0, 2), (3, 2), (3,)])
def test_a_range_that_is_none_is_refused(ngram: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^ngram=.* use \(least, greatest\)"):
        HashedNgrams(ngram=ngram)


def test_one_string_and_no_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^texts='tide' is one string; pass a list"):
        HashedNgrams().embed("tide")
    with pytest.raises(ValueError, match=r"^dim=0 is not a whole number >= 1"):
        HashedNgrams(0)
