"""Discrete key-value bottleneck: what is masked, and pairs that a codebook no longer has, are passed over."""

import pytest
import torch
from torch import Tensor

from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
from memzoo.layers.reference import discrete_key_value_bottleneck as reference
from tests.layers.dkvb_cases import DIM, build, draw

MASK = torch.tensor([[True, True, False, False], [True, False, True, True], [False] * 4])


def with_two_pairs_left() -> DiscreteKeyValueBottleneck:
    """In one codebook, of which three are asked for."""
    bottleneck = build(topk=3, value_init="normal")
    bottleneck.disabled[4, 2:] = True
    return bottleneck


def test_padding_is_read_as_zero_and_is_not_counted() -> None:
    bottleneck, z = build(topk=2, value_init="normal").train(), draw(3, 4, DIM)
    expected, seen = bottleneck(z, mask=MASK), bottleneck.usage.clone()
    assert seen.sum() == 6 * 2 * MASK.sum()
    masked, plain = bottleneck.lookup(z, mask=MASK), bottleneck.lookup(z)
    for indices, mask in ((masked, None), (masked, MASK), (plain, MASK)):
        bottleneck.usage.zero_()
        values = bottleneck.read(indices, mask=mask)
        assert torch.equal(values.sum(2), expected)
        assert torch.equal(bottleneck.usage, seen)
        assert not values.movedim(3, 1)[~MASK].any()
        for sparse in (False, True):
            bottleneck.usage.zero_()
            voted = bottleneck.vote(indices, mask=mask, sparse=sparse)
            torch.testing.assert_close(voted, reference.vote(bottleneck.values, plain, MASK))
            assert torch.equal(bottleneck.usage, seen)
    assert bottleneck(z, mask=MASK, return_info=True).distances.movedim(3, 1)[~MASK].isposinf().all()


def test_a_codebook_with_fewer_pairs_than_topk_fetches_each_once() -> None:
    bottleneck, z = with_two_pairs_left().train(), draw(3, 4, DIM)
    found = bottleneck(z, return_info=True)
    assert found.indices[:, 4, :2].sort(1)[0].movedim(1, 2).flatten(0, 1).tolist() == [[0, 1]] * 12
    assert (found.indices[:, 4, 2] == -1).all()
    assert found.distances[:, 4, 2].isposinf().all()
    assert (found.indices >= 0).sum() == 3 * 4 * (6 * 3 - 1)
    assert bottleneck.usage.sum() == 3 * 4 * (6 * 3 - 1)
    assert bottleneck.usage[4].tolist() == [12, 12] + [0] * 9
    values = bottleneck.read(found.indices)
    assert not values[:, 4, 2].any()
    assert torch.equal(found.values, values.sum(2))
    torch.testing.assert_close(found.values[:, 4], bottleneck.values[4, :2].sum(0).expand(3, 4, -1))
    for sparse in (False, True):
        voted = bottleneck.vote(found.indices, sparse=sparse)
        torch.testing.assert_close(voted, reference.vote(bottleneck.values, found.indices))
        torch.testing.assert_close(voted, found.values.mean((1, 2)))


def test_one_used_pair_says_its_value_once() -> None:
    bottleneck = build(num_codebooks=1, topk=3, mask_unused=True).eval()
    bottleneck.values.data.fill_(1.0)
    bottleneck.usage[0, 3] = 1
    indices = bottleneck.lookup(draw(1, DIM))
    assert indices.flatten().tolist() == [3, -1, -1]
    assert bottleneck.vote(indices).tolist() == [[1.0] * 5]
    assert bottleneck.overlap(indices, indices).item() == pytest.approx(1 / 9)


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_not_fetched_gets_no_gradient(sparse: bool) -> None:
    bottleneck, z = with_two_pairs_left(), draw(3, 4, DIM)
    indices = bottleneck.lookup(z, mask=MASK)

    def rows(gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return gradient.to_dense().ne(0).any(-1)

    expected = torch.zeros(6, 11, dtype=torch.bool)
    for c in range(6):
        expected[c, indices[:, c][indices[:, c] >= 0]] = True
    bottleneck.vote(indices, sparse=sparse).sum().backward()
    assert torch.equal(rows(bottleneck.values.grad), expected)
    assert bottleneck.values.grad is not None
    assert not sparse or bottleneck.values.grad._nnz() == (indices >= 0).sum()
    bottleneck.values.grad = None
    bottleneck.read(indices).sum().backward()
    assert torch.equal(rows(bottleneck.values.grad), expected)
