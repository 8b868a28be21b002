"""Indices of a data set, kept in few bytes with the fingerprint of what computed them."""

from pathlib import Path

import pytest
import torch

from memzoo.layers import IndexCache
from memzoo.layers.index_cache import compact_dtype
from tests.layers.dkvb_cases import DIM, build, draw


@pytest.mark.parametrize(("num_pairs", "dtype"), [(128, torch.int8), (129, torch.int16), (32769, torch.int32)])
def test_it_holds_that_nothing_is_fetched(num_pairs: int, dtype: torch.dtype, tmp_path: Path) -> None:
    indices = torch.tensor([[0, -1], [num_pairs - 1, 0]])
    cache = IndexCache(indices, num_pairs, "")
    cache.save(tmp_path / "indices")
    for own in (cache, IndexCache.load(tmp_path / "indices", "")):
        assert own.indices.dtype == dtype
        assert torch.equal(own[:], indices)


@pytest.mark.parametrize(
    ("num_pairs", "dtype"),
    [
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
        (2**31, torch.int32),
        (2**31 + 1, torch.int64),
    ],
)
def test_an_index_takes_as_few_bytes_as_there_are_pairs(num_pairs: int, dtype: torch.dtype) -> None:
    assert compact_dtype(num_pairs) == dtype
    cache = IndexCache(torch.tensor([[0], [num_pairs - 1]]), num_pairs, "")
    assert cache.indices.dtype == dtype
    assert cache[:].tolist() == [[0], [num_pairs - 1]]


def test_it_gives_back_the_indices_of_samples_from_a_file_too(tmp_path: Path) -> None:
    bottleneck = build(num_pairs=300)
    indices = bottleneck.lookup(draw(20, 3, DIM))
    cache = IndexCache(indices, 300, bottleneck.fingerprint())
    cache.save(tmp_path / "indices")
    assert [path.name for path in tmp_path.iterdir()] == ["indices"]
    loaded = IndexCache.load(tmp_path / "indices", bottleneck.fingerprint())
    some = torch.tensor([7, 7, 0, 19])
    for own in (cache, loaded):
        assert (len(own), own.num_pairs, own.nbytes) == (20, 300, 20 * 6 * 3 * 2)
        assert own[some].dtype == torch.int64
        assert torch.equal(own[some], indices[some])
        assert torch.equal(bottleneck.vote(own[some]), bottleneck.vote(indices[some]))


def test_what_was_computed_with_other_keys_is_refused(tmp_path: Path) -> None:
    bottleneck = build()
    before = bottleneck.fingerprint()
    cache = IndexCache(bottleneck.lookup(draw(4, DIM)), 11, before)
    cache.save(tmp_path / "indices")
    cache.check(before)
    bottleneck.keys[0, 0, 0] += 1e-9
    for call in (
        lambda: cache.check(bottleneck.fingerprint()),
        lambda: IndexCache.load(tmp_path / "indices", bottleneck.fingerprint()),
    ):
        with pytest.raises(ValueError, match=f"is not that of the cached indices, '{before}': .*compute the indices"):
            call()


def test_what_are_no_indices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=f"{name}' is no file of cached indices"):
            IndexCache.load(tmp_path / name, "")
    for indices, words in (
        (torch.zeros(3, 2), "torch.float32"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.tensor([[5]]), r"holds 5 to 5, outside \[-1, 5\)"),
        (torch.tensor([[-2, 2]]), r"holds -2 to 2, outside \[-1, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            IndexCache(indices, 5, "")
    with pytest.raises(ValueError, match="num_pairs=0"):
        IndexCache(torch.zeros(0, 2, dtype=torch.int64), 0, "")
    assert len(IndexCache(torch.zeros(0, 2, dtype=torch.int64), 5, "")) == 0
