"""Rows of one leaf and batches of one node: spec section 16, check 14, and what check 13 asks of the loader."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from memzoo.arch import create_model
from memzoo.lit_modules.data.leaf_rows import (
    LeafRows,
    StoredRows,
    TreeBucketedSampler,
    bucketed_loader,
    pack_leaves,
    strip_leaf,
)
from memzoo.lit_modules.data.rows import ResumableLoader
from memzoo.lit_modules.objective import NextTokens

LENGTHS = [5, 3, 9, 1, 4, 6, 2, 7]
LEAVES = [40, 3, 40, 3, 63, 40, 63, 12]  # of 64: branching 4, depth 3
VOCAB = 32


def documents(lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    """Documents whose tokens are told apart: token j of document i is 1 + the tokens before it."""
    starts = np.cumsum([1, *lengths])
    return [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def pack(lengths: list[int] = LENGTHS, leaves: list[int] = LEAVES, length: int = 4, **options: Any) -> StoredRows:
    options = {"vocab_size": 1 + sum(lengths)} | options
    return pack_leaves(documents(lengths), np.array(lengths), np.array(leaves), length, **options)


def open_rows(stored: StoredRows, **options: Any) -> LeafRows:
    return LeafRows(stored, branching=4, depth=3, **options)


def rows_of(*counts: int, branching: int = 4, depth: int = 2) -> LeafRows:
    """One document a row, ``counts[leaf]`` rows of every leaf; the first token is the number of the row."""
    leaves = np.repeat(np.arange(len(counts)), counts)
    stored = np.concatenate([leaves[:, None], np.arange(len(leaves))[:, None], np.zeros((len(leaves), 2), int)], 1)
    return LeafRows(StoredRows(stored, np.ones((len(leaves), 3), int)), branching=branching, depth=depth)


def batch_of(rows: LeafRows) -> dict[str, Tensor]:
    return rows[list(range(len(rows)))]


# Check 14


def test_14_the_leaf_is_the_first_number_of_a_stored_row_and_only_the_path_of_a_loaded_one() -> None:
    stored, vocab = pack(), 1 + sum(LENGTHS)
    assert stored.tokens[:, 0].tolist() == [3, 12, 12, 40, 40, 40, 40, 40, 63, 63]
    rows = open_rows(stored)
    batch = batch_of(rows)
    assert torch.equal(batch["tokens"], torch.from_numpy(stored.tokens[:, 1:].astype(np.int64)))
    assert batch["paths"].tolist() == [[leaf // 16, leaf // 4, leaf] for leaf in stored.tokens[:, 0].tolist()]
    elsewhere = StoredRows(stored.tokens.copy(), stored.documents)
    elsewhere.tokens[:, 0] = 63  # no token at all
    given, same = NextTokens.of(batch), NextTokens.of(batch_of(open_rows(elsewhere)))
    for name in ("inputs", "targets", "counted", "mask", "doc_ids"):
        assert torch.equal(getattr(given, name), getattr(same, name))
    assert int(torch.cat([given.inputs, given.targets], 1).max()) < vocab


def test_14_a_row_holds_documents_of_one_leaf() -> None:
    leaf_of = dict(zip(np.concatenate(documents()).tolist(), np.repeat(LEAVES, LENGTHS).tolist(), strict=True))
    for row in map(open_rows(pack()).__getitem__, range(10)):
        assert {leaf_of[token] for token in row["tokens"][row["mask"]].tolist()} == {int(row["paths"][-1])}


def test_14_a_document_does_not_see_the_one_before_it_in_its_row() -> None:
    rows = open_rows(pack([6, 5, 4], [7, 7, 7], length=15))
    torch.manual_seed(0)
    model = create_model("transformer_tiny", vocab_size=VOCAB, dim=16, depth=2, num_heads=2).double().eval()
    batch = NextTokens.of(batch_of(rows))
    with torch.no_grad():
        logits = model(batch.inputs, mask=batch.mask, doc_ids=batch.doc_ids)[0]
        changed = batch.inputs.clone()
        changed[:, :6] = 0
        again = model(changed, mask=batch.mask, doc_ids=batch.doc_ids)[0]
        alone = model(batch.inputs[:, 6:11])[0]
    assert torch.equal(again[:, 6:], logits[:, 6:])
    assert not torch.allclose(again[:, :6], logits[:, :6])
    torch.testing.assert_close(logits[:, 6:11], alone, rtol=0, atol=1e-12)


# Packing


def scored(rows: LeafRows) -> list[int]:
    batch = NextTokens.of(batch_of(rows))
    return sorted(batch.targets[batch.counted].tolist())


@pytest.mark.parametrize("length", [1, 2, 4, 7, 50])
def test_every_token_that_follows_another_of_its_document_is_a_target_once(length: int) -> None:
    rows = open_rows(pack(length=length))
    assert scored(rows) == sorted(token for document in documents() for token in document[1:].tolist())
    assert rows.num_tokens == sum(LENGTHS) - len(set(LEAVES))


def test_tails_are_filled_up_or_left_out() -> None:
    padded = open_rows(pack(length=4))
    batch = batch_of(padded)
    assert batch["mask"].sum(1).tolist() == [4, 5, 3, 5, 5, 5, 5, 4, 5, 2]
    assert not batch["tokens"][~batch["mask"]].any()
    dropped = open_rows(pack(length=4, tails="drop"))
    assert dropped.leaves.tolist() == [12, 40, 40, 40, 40, 63]  # leaf 3 is lost
    assert "mask" not in dropped[0]
    assert set(scored(dropped)) < set(scored(padded))


def test_a_leaf_of_one_token_makes_no_row() -> None:
    assert open_rows(pack([1, 5], [0, 1])).leaves.tolist() == [1]


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence_length=99 and tails='drop' make no row of 8 documents in 4 leaves"):
        pack(length=99, tails="drop")
    with pytest.raises(ValueError, match=r"tails='dorp' is not one of 'pad', 'drop'; did you mean 'drop'"):
        pack(tails="dorp")


def test_an_end_of_text_is_predicted_behind_every_document() -> None:
    rows = open_rows(pack([3, 2], [5, 5], length=7, end_of_text=31, vocab_size=32))
    row = NextTokens.of(batch_of(rows))
    assert rows[0]["tokens"].tolist() == [1, 2, 3, 31, 4, 5, 31, 0]
    assert row.targets[row.counted].tolist() == [2, 3, 31, 5, 31]


def test_doc_ids_can_be_left_out() -> None:
    assert set(open_rows(pack(tails="drop"), with_documents=False)[0]) == {"tokens", "paths"}


def test_rows_are_kept_in_the_narrowest_type_that_holds_tokens_and_leaves() -> None:
    kept = [pack(vocab_size=256), pack(vocab_size=257), pack(leaves=[300] * 8), pack(vocab_size=50_432)]
    assert [str(stored.tokens.dtype) for stored in kept] == ["uint8", "uint16", "uint16", "uint16"]


def test_rows_on_disk_are_those_in_memory_and_travel_as_their_place(tmp_path: Path) -> None:
    memory, disk = pack(), pack(place=tmp_path / "training")
    opened = StoredRows.open(tmp_path / "training")
    for stored in (disk, opened, pickle.loads(pickle.dumps(opened))):
        np.testing.assert_array_equal(stored.tokens, memory.tokens)
        np.testing.assert_array_equal(stored.documents, memory.documents)
    big = pack([4000], [0], length=4, place=tmp_path / "big")
    assert len(pickle.dumps(StoredRows.open(tmp_path / "big"))) < 1000 < big.tokens.nbytes


def test_a_list_of_rows_is_a_batch() -> None:
    rows = open_rows(pack())
    batch = rows[[3, 0, 3]]
    for name, value in batch.items():
        assert value.dtype == (torch.bool if name == "mask" else torch.int64)
        assert torch.equal(value, torch.stack([rows[i][name] for i in (3, 0, 3)]))


def test_a_leaf_that_the_tree_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stored holds leaf 63; branching=2 and depth=5 make 32 leaves"):
        LeafRows(pack(), branching=2, depth=5)


def test_the_path_of_a_batch_of_any_shape() -> None:
    tokens, paths = strip_leaf(torch.tensor([[[27, 1, 2]]]), branching=3, depth=4)
    assert tokens.tolist() == [[[1, 2]]]
    assert paths.tolist() == [[[1, 3, 9, 27]]]


# The sampler

COUNTS = (5, 0, 2, 1, 7, 3, 0, 0, 1, 1, 1, 1, 9, 0, 0, 4)  # of 16 leaves: 8, 10, 4 and 13 rows in the nodes of level 1


def epoch(sampler: TreeBucketedSampler, number: int = 0) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_epoch_has_every_row_once_in_batches_of_one_node(level: int) -> None:
    rows = rows_of(*COUNTS)
    sampler = TreeBucketedSampler(rows, 3, level=level, seed=1)
    orders = [epoch(sampler, number) for number in range(2)]
    for batches in orders:
        assert sorted(row for batch in batches for row in batch) == list(range(35))
        assert len(batches) == len(sampler)
        for batch in batches:
            assert len({int(node) for node in rows.leaves[batch] // 4 ** (2 - level)}) == 1
            assert len(batch) <= 3
    assert orders[0] != orders[1]
    assert epoch(TreeBucketedSampler(rows, 3, level=level, seed=1), 1) == orders[1]
    assert epoch(TreeBucketedSampler(rows, 3, level=level, seed=2), 1) != orders[1]


def test_the_root_mixes_leaves_and_a_level_mixes_its_nodes() -> None:
    rows = rows_of(*[20] * 16)
    first, *_ = mixed = epoch(TreeBucketedSampler(rows, 32))
    assert [len(batch) for batch in mixed] == [32] * 10
    assert len(rows.leaves[first].unique()) > 8
    nodes = [int(rows.leaves[batch[0]]) // 4 for batch in epoch(TreeBucketedSampler(rows, 4, level=1))]
    assert sum(before != after for before, after in pairwise(nodes)) > 40  # of 79 borders; 3 if nodes were sorted


@pytest.mark.parametrize(("level", "within"), [(1, (1, 0)), (2, (1, 3)), (2, (2, 4)), (0, (1, 1))])
def test_13_a_job_within_a_subtree_visits_what_the_joint_job_takes_from_there(
    level: int, within: tuple[int, int]
) -> None:
    rows, (depth, node) = rows_of(*COUNTS), within
    joint = TreeBucketedSampler(rows, 2, level=max(level, depth), seed=5)
    alone = TreeBucketedSampler(rows, 2, level=level, within=within, seed=5)
    for number in range(3):
        inside = [batch for batch in epoch(joint, number) if int(rows.leaves[batch[0]]) // 4 ** (2 - depth) == node]
        assert epoch(alone, number) == inside
        assert inside


def test_overfitting_repeats_the_first_batches_of_the_node_and_level() -> None:
    rows, options = rows_of(*COUNTS), dict(level=2, within=(1, 3), seed=5)
    trainer = pl.Trainer(overfit_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    loader = bucketed_loader(rows, 3, trainer, {}, **options)
    expected = epoch(TreeBucketedSampler(rows, 3, **options))
    for _ in range(2):
        assert [batch["tokens"][:, 0].tolist() for batch in loader] == expected
    assert isinstance(loader.sampler, SequentialSampler)  # any other, Lightning replaces


@pytest.mark.parametrize("num_replicas", [2, 3, 50])
def test_devices_take_turns_and_all_have_as_many(num_replicas: int) -> None:
    rows = rows_of(*COUNTS)
    shares = [
        epoch(TreeBucketedSampler(rows, 3, level=1, num_replicas=num_replicas, rank=rank), 2)
        for rank in range(num_replicas)
    ]
    whole = epoch(TreeBucketedSampler(rows, 3, level=1), 2)
    taken = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert len({len(share) for share in shares}) == 1
    assert taken[: len(whole)] == whole
    assert taken[len(whole) :] == (whole * num_replicas)[: len(taken) - len(whole)]
    assert len(taken) - len(whole) < num_replicas


def test_a_loader_goes_on_where_its_state_was_taken() -> None:
    rows = rows_of(*COUNTS)

    def loader() -> ResumableLoader:
        return ResumableLoader(rows, batch_size=None, sampler=TreeBucketedSampler(rows, 3, level=1))

    def first_tokens(loader: ResumableLoader, number: int) -> list[list[int]]:
        loader.sampler.set_epoch(number)
        return [batch["tokens"][:, 0].tolist() for batch in loader]

    whole = [first_tokens(loader(), number) for number in range(3)]
    assert len(whole[1]) == len(loader()) == 14
    for taken in range(1, 15):
        first = loader()
        first.sampler.set_epoch(1)
        batches = iter(first)
        for _ in range(taken):
            next(batches)
        second = loader()
        second.load_state_dict(first.state_dict())
        if taken < 14:
            assert first_tokens(second, 1) == whole[1][taken:]
        assert first_tokens(second, 2) == whole[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 3}, r"level=3 is not in the tree; use 0 to mix all rows, or up to depth=2"),
        ({"within": (1, 4)}, r"within=\(1, 4\) is no node of the tree; use \(level, node\), 1 <= level <= 2"),
        ({"within": (0, 0)}, r"within=\(0, 0\) is no node"),
        ({"within": (2, 1)}, r"within=\(2, 1\) holds none of the 35 training rows"),
        ({"batch_size": 0}, r"batch_size=0 is not a whole number >= 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeBucketedSampler(rows_of(*COUNTS), **{"batch_size": 2} | options)
