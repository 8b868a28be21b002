"""TIES against numbers worked out by hand, and against a loop over entries."""

import pytest
import torch
from torch import Tensor

from memzoo.layers.edit_masks import disjoint_masks, edit_mask
from memzoo.layers.reference import wise
from memzoo.layers.ties import ties


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 1.0]])
@pytest.mark.parametrize("ratio", [0.2, 0.47, 0.5])
def test_08_disjoint_changes_merge_to_their_union_bit_for_bit(ratio, weights):
    masks = disjoint_masks((40, 50), ratio, 2, seed=0)
    deltas = [random(40, 50, seed=i) * mask for i, mask in enumerate(masks)]
    assert torch.equal(ties(deltas, weights, density=ratio), deltas[0] + deltas[1])
    assert torch.equal(ties(deltas, weights, density=0.53), deltas[0] + deltas[1])


def test_08_disjoint_changes_of_any_weights_merge_to_their_union():
    masks = disjoint_masks((40, 50), 0.3, 3, seed=0)
    deltas = [random(40, 50, seed=i).double() * mask for i, mask in enumerate(masks)]
    torch.testing.assert_close(ties(deltas, [0.6, 0.3, 0.1], density=0.53), deltas[0] + deltas[1] + deltas[2])


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (1.0, 3.0, 1.5),  # (3 * 1 + 1 * 3) / 4
        (-1.0, -3.0, -1.5),
        (1.0, -2.0, 1.0),  # 3 against -2
        (1.0, -4.0, -4.0),  # 3 against -4
        (1.0, -3.0, 1.0),  # 3 against -3: a sum of zero counts as +
        (-1.0, 3.0, 3.0),
        (0.0, 2.0, 2.0),  # the first has no say
        (0.0, 0.0, 0.0),
    ],
)
def test_09_changes_that_agree_are_averaged_and_of_opposite_ones_the_heavier_is_left(first, second, merged):
    deltas = [torch.tensor([[first]]), torch.tensor([[second]])]
    assert ties(deltas, [3.0, 1.0], density=1.0).item() == merged
    assert ties(deltas[::-1], [1.0, 3.0], density=1.0).item() == merged


def test_09_a_density_below_the_share_that_changed_drops_the_smallest():
    delta = torch.tensor([0.0, -1.0, 2.0, 3.0, -4.0, 0.0, 0.0, 0.0])
    assert ties([delta], [1.0], density=0.5).tolist() == delta.tolist()
    assert ties([delta], [1.0], density=0.375).tolist() == [0, 0, 2, 3, -4, 0, 0, 0]
    assert ties([delta], [1.0], density=0.125).tolist() == [0, 0, 0, 0, -4, 0, 0, 0]
    assert ties([delta], [1.0], density=0.01).tolist() == [0, 0, 0, 0, -4, 0, 0, 0]


def test_entries_as_large_as_the_smallest_kept_one_are_kept():
    delta = torch.tensor([1.0, -2.0, 2.0, 0.5])
    assert ties([delta], [1.0], density=0.25).tolist() == [0, -2, 2, 0]


def test_each_can_be_trimmed_by_its_own_density():
    deltas = [torch.tensor([1.0, 9.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])]
    assert ties(deltas, [1.0, 1.0], density=[1.0, 0.5]).tolist() == [1.0, 9.0, 3.0, 4.0]
    assert ties(deltas, [1.0, 1.0], density=[0.25, 1.0]).tolist() == [1.0, 5.5, 3.0, 4.0]
    with pytest.raises(ValueError, match="density has length 1 for 2 deltas"):
        ties(deltas, [1.0, 1.0], density=[1.0])
    with pytest.raises(ValueError, match=r"density=2\.0 is more than everything"):
        ties(deltas, [1.0, 1.0], density=[1.0, 2.0])


def test_trimming_comes_before_the_election():
    """The first trims its -1, so its say there is none: 1 stands alone."""
    deltas = [torch.tensor([-1.0, 9.0]), torch.tensor([0.5, 0.25])]
    assert ties(deltas, [1.0, 1.0], density=0.5).tolist() == [0.5, 9.0]


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
def test_it_is_the_loop(density):
    deltas = [random(6, 7, seed=i).double() * edit_mask((6, 7), 0.5, seed=i) for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    expected = wise.ties(deltas, weights, density)
    torch.testing.assert_close(ties(deltas, weights, density=density), expected, rtol=0, atol=1e-14)


def test_it_keeps_the_dtype_and_its_inputs_and_sums_in_at_least_float32():
    deltas = [random(50, seed=i).bfloat16() for i in range(3)]
    before = [delta.clone() for delta in deltas]
    merged = ties(deltas, [1.0] * 3, density=0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, ties([delta.float() for delta in deltas], [1.0] * 3, density=0.5).bfloat16())
    assert all(map(torch.equal, deltas, before))
    assert not ties([deltas[0].requires_grad_()], [1.0], density=0.5).requires_grad


def test_wrong_arguments_are_named():
    delta = torch.ones(4)
    with pytest.raises(ValueError, match="deltas holds nothing to merge"):
        ties([], [], density=0.5)
    with pytest.raises(ValueError, match="weights has length 1 for 2 deltas"):
        ties([delta, delta], [1.0], density=0.5)
    with pytest.raises(ValueError, match=r"deltas\[1\] is torch.float32 of shape \(3,\)"):
        ties([delta, torch.ones(3)], [1.0, 1.0], density=0.5)
    with pytest.raises(ValueError, match=r"deltas\[0\] is torch.int64"):
        ties([delta.long()], [1.0], density=0.5)
    with pytest.raises(ValueError, match=r"weights\[1\]=0"):
        ties([delta, delta], [1.0, 0], density=0.5)
    with pytest.raises(ValueError, match=r"density=0 is not"):
        ties([delta], [1.0], density=0)
    with pytest.raises(ValueError, match=r"density=1.5 is more than everything"):
        ties([delta], [1.0], density=1.5)
