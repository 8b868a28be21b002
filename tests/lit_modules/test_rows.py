import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memzoo.lit_modules.data.rows import PackedRows, ResumableLoader, RowSampler, Span, all_spans, split_documents
from memzoo.lit_modules.data.shards import Document


def documents(*lengths: int, bytes_per_token: int = 1) -> list[Document]:
    starts = np.cumsum([0, *lengths]).tolist()
    return [
        Document(f"{i}.txt", hashlib.sha256(bytes([i])).hexdigest(), bytes_per_token * length, starts[i], length)
        for i, length in enumerate(lengths)
    ]


class Counting:
    """A cache whose token at position p is p."""

    def __init__(self, *lengths: int) -> None:
        self.documents = documents(*lengths)

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        return np.arange(start, stop, dtype=np.uint32)


def rows_of(*lengths: int, sequence_length: int = 4) -> PackedRows:
    cache = Counting(*lengths)
    return PackedRows(cache, all_spans(cache.documents), sequence_length)


def test_rows_are_consecutive_and_overlap_by_one():
    rows = rows_of(3, 1, 9, 5)
    assert [row["tokens"].tolist() for row in rows] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
        [*range(12, 17)],
    ]
    assert [row["doc_ids"].tolist() for row in rows] == [[0, 0, 0, 1, 2], [2] * 5, [2] * 5, [2, 3, 3, 3, 3]]
    assert rows[0]["tokens"].dtype == rows[0]["doc_ids"].dtype == torch.int64


@pytest.mark.parametrize("total", [5, 8, 9, 12, 13])
def test_what_is_left_out_is_a_tail_shorter_than_a_row(total: int):
    rows = rows_of(2, total - 2)
    targets = torch.cat([row["tokens"][1:] for row in rows])
    assert targets.tolist() == list(range(1, 1 + len(targets)))
    assert total - 1 - len(targets) in range(4)


def test_rows_follow_the_order_of_the_spans():
    rows = PackedRows(Counting(4, 10, 4), [Span(2, 1, 4), Span(0, 0, 4), Span(1, 5, 7)], 3)
    assert torch.cat([row["tokens"][1:] for row in rows]).tolist() == [16, 17, 0, 1, 2, 3]
    assert rows[1]["doc_ids"].tolist() == [0] * 4
    with pytest.raises(IndexError):
        rows[2]


def test_doc_ids_can_be_left_out():
    cache = Counting(9)
    assert set(PackedRows(cache, all_spans(cache.documents), 4, with_documents=False)[0]) == {"tokens"}


def test_bytes_per_token_weighs_documents_by_their_part():
    cache = Counting(10, 10)
    cache.documents = [documents(10, bytes_per_token=2)[0], documents(10, 10, bytes_per_token=5)[1]]
    assert PackedRows(cache, [Span(0, 0, 10), Span(1, 4, 6)], 4).bytes_per_token == pytest.approx((20 + 10) / 12)


def held_out(split: tuple[list[Span], list[Span]]) -> set[int]:
    return {span.document for span in split[1]}


def test_split_holds_out_whole_documents_near_the_fraction():
    corpus = documents(*[100] * 200)
    training, validation = split_documents(corpus, 0.1, least=100)
    assert sorted([*training, *validation], key=lambda span: span.document) == all_spans(corpus)
    assert 10 <= len(validation) <= 30


def test_adding_and_removing_documents_moves_no_other():
    corpus = documents(*[100] * 200)
    before = held_out(split_documents(corpus, 0.1, least=100))
    assert held_out(split_documents(corpus[:150], 0.1, least=100)) == {i for i in before if i < 150}
    longer = documents(*[100] * 250)
    assert {i for i in held_out(split_documents(longer, 0.1, least=100)) if i < 200} == before


def test_copies_of_a_document_stay_together():
    corpus = documents(*[100] * 200)
    twice = [*corpus, *(Document(f"copy of {d.name}", d.sha256, d.bytes, 20_000 + d.start, d.tokens) for d in corpus)]
    chosen = held_out(split_documents(twice, 0.1, least=100))
    assert chosen
    assert {i + 200 for i in chosen if i < 200} == {i for i in chosen if i >= 200}


@pytest.mark.parametrize("lengths", [(1000,), (500, 500), (10, 990), (990, 10), (5,) * 200, (1,) * 10 + (990,)])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.95])
def test_both_sides_have_their_least_and_together_everything(lengths: tuple[int, ...], fraction: float):
    corpus = documents(*(min(length, 1000) for length in lengths))
    training, validation = split_documents(corpus, fraction, least=40)
    positions = [
        p
        for span in [*training, *validation]
        for p in range(corpus[span.document].start + span.start, corpus[span.document].start + span.stop)
    ]
    assert sorted(positions) == list(range(1000))
    sizes = [sum(span.stop - span.start for span in side) for side in (training, validation)]
    assert min(sizes) >= 40


def test_one_document_is_cut_at_its_end():
    assert split_documents(documents(1000), 0.1, least=40) == ([Span(0, 0, 900)], [Span(0, 900, 1000)])
    assert split_documents(documents(1000), 0.01, least=40) == ([Span(0, 0, 960)], [Span(0, 960, 1000)])


def test_a_document_that_outweighs_the_rest_is_not_held_out_whole():
    for big in range(20):  # whichever the hash would choose
        lengths = [10] * 20
        lengths[big] = 10_000
        _, validation = split_documents(documents(*lengths), 0.1, least=40)
        assert 40 <= sum(span.stop - span.start for span in validation) <= 0.4 * sum(lengths)


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    sampler = RowSampler(rows_of(81), 3, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(20))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    again = RowSampler(rows_of(81), 3, seed=1)
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert list(RowSampler(rows_of(81), 3, seed=2)) != orders[0]


def test_devices_share_the_rows():
    shares = [list(RowSampler(rows_of(81), 3, num_replicas=2, rank=rank)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(20))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_contiguous_rows_continue_the_batch_before(num_replicas: int):
    rows = rows_of(30, 60, 23)  # 28 rows
    seen = []
    for rank in range(num_replicas):
        sampler = RowSampler(rows, 3, num_replicas=num_replicas, rank=rank, contiguous=True)
        batches = list(ResumableLoader(rows, sampler.batch_size, sampler=sampler))
        assert [len(batch["tokens"]) for batch in batches] == [3] * (28 // (3 * num_replicas))
        for before, after in pairwise(batches):
            assert torch.equal(before["tokens"][:, -1], after["tokens"][:, 0])
        seen += [position for batch in batches for position in batch["tokens"][:, 1:].flatten().tolist()]
    assert len(set(seen)) == len(seen) == 4 * (28 - 28 % (3 * num_replicas))


def test_contiguous_makes_do_with_fewer_rows_than_places():
    sampler = RowSampler(rows_of(21), 8, num_replicas=2, rank=1, contiguous=True)
    assert (sampler.batch_size, list(sampler)) == (2, [2, 3])
    with pytest.raises(ValueError, match=r"contiguous=True.*1 rows meet 2 devices"):
        RowSampler(rows_of(8), 8, num_replicas=2, contiguous=True)


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_loader_goes_on_where_its_state_was_taken(contiguous: bool):
    def loader() -> ResumableLoader:
        sampler = RowSampler(rows_of(81), 3, contiguous=contiguous)
        return ResumableLoader(sampler.dataset, sampler.batch_size, sampler=sampler)

    def epoch(loader: ResumableLoader, number: int) -> list[list[int]]:
        loader.sampler.set_epoch(number)
        return [batch["tokens"][:, 0].tolist() for batch in loader]

    whole = [epoch(loader(), number) for number in range(3)]
    for taken in range(1, len(whole[1]) + 1):
        first = loader()
        first.sampler.set_epoch(1)
        batches = iter(first)
        for _ in range(taken):
            next(batches)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == (first.state_dict() if taken < len(whole[1]) else {"epoch": 2, "batches": 0})
        if taken < len(whole[1]):
            assert epoch(second, 1) == whole[1][taken:]
        assert epoch(second, 2) == whole[2]
