"""How many entries a mask has, which, and what two of them share."""

import math

import pytest
import torch

from memzoo.layers import edit_masks
from memzoo.layers.edit_masks import disjoint_masks, edit_mask


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.5, 1 / 3, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (200, 300)])
def test_05_exactly_a_share_of_the_entries_may_change(shape, ratio):
    for seed in range(3):
        mask = edit_mask(shape, ratio, seed=seed)
        assert mask.dtype == torch.bool
        assert mask.shape == shape
        assert int(mask.sum()) == round(ratio * math.prod(shape))


@pytest.mark.parametrize("kind", ["exact", "bernoulli"])
def test_05_the_seed_says_which_entries_whatever_was_drawn_before(kind):
    before = torch.get_rng_state()
    mask = edit_mask((50, 60), 0.2, seed=3, kind=kind)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(edit_mask((50, 60), 0.2, seed=3, kind=kind), mask)
    assert not torch.equal(edit_mask((50, 60), 0.2, seed=4, kind=kind), mask)


def test_05_a_bernoulli_mask_is_within_five_sigma():
    entries = 200 * 300
    counts = [int(edit_mask((200, 300), 0.2, seed=seed, kind="bernoulli").sum()) for seed in range(5)]
    assert all(abs(count - 0.2 * entries) < 5 * math.sqrt(entries * 0.2 * 0.8) for count in counts)
    assert len(set(counts)) > 1


def test_05_masks_overlap_in_the_square_of_their_share():
    """The overlap of two fixed-size sets is hypergeometric: mean 0.04 N, standard deviation 0.16 sqrt(N)."""
    entries = 300 * 400
    first, second, third = (edit_mask((300, 400), 0.2, seed=seed) for seed in range(3))
    for a, b in ((first, second), (first, third), (second, third)):
        assert abs(int((a & b).sum()) - 0.04 * entries) < 5 * 0.16 * math.sqrt(entries)


@pytest.mark.parametrize("chunk", [4, 100])
def test_every_set_of_entries_is_as_likely(chunk, monkeypatch):
    """Of 5 entries 2 can be drawn in 10 ways; chi squared of 9 degrees of freedom is above 30 once in 2000 times."""
    monkeypatch.setattr(edit_masks, "_CHUNK", chunk)
    draws = 2000
    found = torch.stack([edit_mask((5,), 0.4, seed=seed) for seed in range(draws)])
    counts = (found * 2 ** torch.arange(5)).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 30


def test_a_mask_of_many_chunks_is_exact_and_even(monkeypatch):
    monkeypatch.setattr(edit_masks, "_CHUNK", 1000)
    mask = edit_mask((100, 105), 0.2, seed=0)
    assert int(mask.sum()) == 2100
    shares = mask.view(-1, 2100).sum(1).float() / 2100
    assert ((shares - 0.2).abs() < 5 * math.sqrt(0.16 / 2100)).all()


def test_disjoint_masks_share_nothing_and_start_with_that_of_the_seed():
    masks = disjoint_masks((40, 50), 0.25, 4, seed=1)
    assert [int(mask.sum()) for mask in masks] == [500] * 4
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(40, 50, dtype=torch.int64))
    assert torch.equal(masks[0], edit_mask((40, 50), 0.25, seed=1))
    assert all(map(torch.equal, masks, disjoint_masks((40, 50), 0.25, 4, seed=1)))


def test_disjoint_masks_are_drawn_evenly_from_what_is_left():
    """Each of 6 entries is in the second mask of 2 in a third of all draws."""
    draws = 1500
    second = torch.stack([disjoint_masks((6,), 1 / 3, 3, seed=seed)[1] for seed in range(draws)])
    assert ((second.float().mean(0) - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / draws)).all()


def test_wrong_arguments_are_named():
    for ratio in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"ratio=.* is not a finite number > 0"):
            edit_mask((4, 4), ratio, seed=0)
    with pytest.raises(ValueError, match=r"ratio=1.5 is more than everything"):
        edit_mask((4, 4), 1.5, seed=0)
    with pytest.raises(ValueError, match=r"shape\[1\]=0"):
        edit_mask((4, 0), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"kind='bernouli'.*did you mean 'bernoulli'"):
        edit_mask((4, 4), 0.5, seed=0, kind="bernouli")
    with pytest.raises(ValueError, match="count=0"):
        disjoint_masks((4, 4), 0.5, 0, seed=0)
    with pytest.raises(ValueError, match=r"ratio=0.4 of 16 entries cannot be drawn count=3 times"):
        disjoint_masks((4, 4), 0.4, 3, seed=0)
