"""Discrete key-value bottleneck: lookups, votes and what never changes. Numbers are those of the specification."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import create_layer
from memzoo.layers.discrete_key_value_bottleneck import BottleneckOutput, DiscreteKeyValueBottleneck
from memzoo.layers.reference import discrete_key_value_bottleneck as reference
from tests.layers.dkvb_cases import DIM, SIZES, build, draw, frozen_tensors, same_tensors

MASK = torch.tensor([[True, True, False, False], [True, False, True, True], [False] * 4])


@pytest.mark.parametrize("splitter", ["random", "chunk", "learned"])
@pytest.mark.parametrize("topk", [1, 3])
def test_01_lookups_and_votes_are_those_of_the_loops(splitter: Any, topk: int) -> None:
    bottleneck = build(splitter=splitter, topk=topk, value_init="normal", chunk_bytes=2000).eval()
    z = draw(3, 4, DIM)
    indices = bottleneck.lookup(z)
    assert torch.equal(indices, reference.lookup(z, bottleneck.projection, bottleneck.keys, topk=topk))
    for mask in (None, MASK):
        expected = reference.vote(bottleneck.values, indices, mask)
        torch.testing.assert_close(bottleneck.vote(indices, mask=mask), expected)
        values = bottleneck(z, mask=mask)
        assert values.shape == (3, 6, 4, 5)
        real = torch.full((3,), 4) if mask is None else mask.sum(1).clamp(min=1)
        torch.testing.assert_close(values.sum((1, 2)) / (6 * real[:, None]), expected)


def test_01_what_is_returned_is_what_was_fetched() -> None:
    bottleneck, z = build(value_init="normal", topk=2).eval(), draw(3, 4, DIM)
    found = bottleneck(z, return_info=True)
    assert isinstance(found, BottleneckOutput)
    assert torch.equal(found.indices, bottleneck.lookup(z))
    heads = reference.heads(z, bottleneck.projection, 6)
    for c in range(6):
        keys = bottleneck.keys[c, found.indices[:, c]]  # (batch, topk, tokens, dim_key)
        exact = (heads[:, None, :, c] - keys).square().sum(-1)
        torch.testing.assert_close(found.distances[:, c], exact)
        values = bottleneck.values[c, found.indices[:, c]]
        assert torch.equal(bottleneck.read(found.indices)[:, c], values)
        assert torch.equal(found.values[:, c], values.sum(1))


def test_01_the_directions_of_the_random_projection_have_length_one() -> None:
    projection = build().projection
    assert projection is not None
    torch.testing.assert_close(projection.square().sum(1), torch.ones(6, 3, dtype=torch.float64), rtol=1e-6, atol=0)
    learned = build(splitter="learned").projection
    assert learned is not None
    assert 0.8 * DIM**-0.5 < learned.abs().max() <= DIM**-0.5


@pytest.mark.parametrize("sparse", [False, True])
def test_02_only_values_that_were_fetched_get_a_gradient(sparse: bool) -> None:
    bottleneck, z = build(), draw(2, DIM).requires_grad_()
    indices = bottleneck.lookup(z)
    F.cross_entropy(bottleneck.vote(indices, sparse=sparse), torch.tensor([1, 3])).backward()
    assert bottleneck.values.grad is not None
    fetched = torch.zeros(6, 11, dtype=torch.bool)
    for c in range(6):
        fetched[c, indices[:, c].flatten()] = True
    assert torch.equal(bottleneck.values.grad.to_dense().ne(0).any(-1), fetched)
    assert 6 <= fetched.sum() < 66
    assert z.grad is None
    assert [name for name, _ in bottleneck.named_parameters()] == ["values"]
    assert bottleneck.trainable_parameters() == [bottleneck.values]


def test_04_what_is_frozen_stays_to_the_bit() -> None:
    bottleneck, z = build(torch.float32, standardize=True, frozen=False), draw(40, DIM).float()
    bottleneck.initialize_keys([z], epochs=2)
    before, optimizer = frozen_tensors(bottleneck), torch.optim.SGD(bottleneck.parameters(), lr=1.0)
    indices = bottleneck.lookup(z)
    for step in range(10):
        bottleneck.train(step % 2 == 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step > 5):
            loss = F.cross_entropy(bottleneck.vote(bottleneck.lookup(z)), torch.arange(40) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same_tensors(frozen_tensors(bottleneck), before)
    other = build(torch.float32, standardize=True, frozen=False)
    other.load_state_dict(bottleneck.state_dict())
    assert other.stage == 2
    assert same_tensors(frozen_tensors(other), before)
    assert torch.equal(other.lookup(z), indices)
    assert bottleneck.bfloat16().values.dtype == torch.bfloat16
    assert same_tensors(frozen_tensors(bottleneck), before)


def test_08_the_order_of_pairs_and_codebooks_does_not_matter() -> None:
    one, two = (build(torch.float32, value_init="normal").eval() for _ in range(2))
    z, order = draw(9, DIM).float(), torch.randperm(11, generator=torch.Generator().manual_seed(1))
    for c in range(6):
        moved = order.roll(c)
        two.keys[c], two.usage[c] = one.keys[c, moved], one.usage[c, moved]
        two.values.data[c] = one.values.data[c, moved]
    assert torch.equal(two(z), one(z))
    assert torch.equal(two.vote(two.lookup(z)), one.vote(one.lookup(z)))
    codebooks = torch.tensor([3, 1, 5, 0, 2, 4])
    assert one.projection is not None
    assert two.projection is not None
    two.keys.copy_(one.keys[codebooks])
    two.projection.copy_(one.projection[codebooks])
    two.values.data.copy_(one.values.data[codebooks])
    assert torch.equal(two.lookup(z), one.lookup(z)[:, codebooks])
    torch.testing.assert_close(two.vote(two.lookup(z)), one.vote(one.lookup(z)), rtol=0, atol=1e-6)


def test_10_a_head_may_move_as_far_as_its_margin() -> None:
    """``min_b (|h - k_b|^2 - |h - k_a|^2) / (2 |k_b - k_a|)``, towards the key b for which it is least."""
    bottleneck = build(splitter="chunk").eval()
    z = draw(1, DIM)
    before = bottleneck.lookup(z)
    for c in range(6):
        head, keys = z[0, 3 * c : 3 * c + 3], bottleneck.keys[c]
        a = int(before[0, c, 0, 0])
        far = (head - keys).square().sum(1) - (head - keys[a]).square().sum()
        margins = far / (2 * (keys - keys[a]).norm(dim=1))
        margins[a] = torch.inf
        b = int(margins.argmin())
        direction = (keys[b] - keys[a]) / (keys[b] - keys[a]).norm()
        for share, index in ((0.999, a), (1.001, b)):
            moved = z.clone()
            moved[0, 3 * c : 3 * c + 3] += share * margins[b] * direction
            assert bottleneck.lookup(moved)[0, c, 0, 0] == index


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("topk", [1, 2])
def test_12_the_vote_and_its_gradient_are_those_of_the_gather_path(mask: Tensor | None, topk: int) -> None:
    bottleneck, z = build(torch.float32, value_init="normal", topk=topk), draw(3, 4, DIM).float()
    indices, weight = bottleneck.lookup(z), draw(3, 5, seed=1).float()
    real = torch.ones(3, 4) if mask is None else mask.float()
    gathered = (bottleneck.read(indices) * real[:, None, None, :, None]).sum((1, 2, 3))
    gathered = gathered / (6 * real.sum(1, keepdim=True).clamp(min=1))
    (expected,) = torch.autograd.grad((gathered * weight).sum(), bottleneck.values)
    for sparse in (False, True):
        for stored in (indices, indices.to(torch.uint8)):
            voted = bottleneck.vote(stored, mask=mask, sparse=sparse)
            torch.testing.assert_close(voted, gathered, rtol=0, atol=1e-6)
            (gradient,) = torch.autograd.grad((voted * weight).sum(), bottleneck.values)
            assert gradient.is_sparse == sparse
            torch.testing.assert_close(gradient.to_dense(), expected, rtol=0, atol=1e-6)


def test_14_with_the_mask_only_pairs_that_were_used_are_fetched() -> None:
    bottleneck = build(mask_unused=True, topk=2)
    z, other = draw(4, DIM), draw(200, DIM, seed=1)
    plain = build(topk=2).eval()
    assert torch.equal(bottleneck.eval().lookup(other), plain.lookup(other))  # nothing is used yet
    bottleneck.train()
    bottleneck(z)
    bottleneck.usage[2] = 0  # of this codebook nothing is used
    bottleneck.usage[3] = torch.eye(11, dtype=torch.int64)[7]  # and of this one a single pair
    usage = bottleneck.usage.clone()
    indices = bottleneck.eval().lookup(other)
    bottleneck.vote(indices)
    bottleneck.read(indices)
    bottleneck(other)
    assert torch.equal(bottleneck.usage, usage)
    for c in (0, 1, 3, 4, 5):
        own = indices[:, c].flatten()
        assert (usage[c, own[own >= 0]] > 0).all()
    assert (indices[:, 3, 0] == 7).all()
    assert (indices[:, 3, 1] == -1).all()
    assert torch.equal(indices[:, 2], plain.lookup(other)[:, 2])
    assert torch.equal(bottleneck.train().lookup(other), plain.lookup(other))


def test_14_one_sample_finds_what_it_finds_among_many() -> None:
    bottleneck = build(torch.float32).eval()
    z = draw(64, 3, DIM).float()
    together = bottleneck.lookup(z)
    assert torch.equal(torch.cat([bottleneck.lookup(row[None]) for row in z]), together)
    assert torch.equal(bottleneck.lookup(z[:, 1]), together[..., 1:2])


@pytest.mark.parametrize("call", ["forward", "read", "vote"])
def test_14_training_counts_what_it_fetches_once_keys_are_frozen(call: str) -> None:
    bottleneck, z = build(frozen=False, allow_random_keys=True), draw(3, 4, DIM)
    mask = MASK

    def fetch() -> None:
        if call == "forward":
            bottleneck(z, mask=mask)
        elif call == "read":
            bottleneck.read(bottleneck.lookup(z, mask=mask), mask=mask)
        else:
            bottleneck.vote(bottleneck.lookup(z, mask=mask), mask=mask)

    fetch()
    assert not bottleneck.usage.any()
    assert bottleneck.fraction_unused == 1
    bottleneck.freeze_keys()
    fetch()
    expected = torch.zeros(6, 11, dtype=torch.int64)
    for b, c, _, n in torch.cartesian_prod(*map(torch.arange, (3, 6, 1, 4))).tolist():
        if mask[b, n]:
            expected[c, bottleneck.lookup(z)[b, c, 0, n]] += 1
    assert torch.equal(bottleneck.usage, expected)
    assert bottleneck.fraction_unused == pytest.approx((expected == 0).sum().item() / 66)


def test_15_values_of_zero_vote_for_nothing() -> None:
    bottleneck, z = build(), draw(7, DIM)
    logits = bottleneck.vote(bottleneck.lookup(z))
    assert not logits.any()
    assert (logits.softmax(1) == 1 / 5).all()
    loss = F.cross_entropy(logits, torch.arange(7) % 5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)
    bottleneck = build(value_init="normal")
    torch.testing.assert_close(bottleneck.vote(bottleneck.lookup(z)), bottleneck(z).mean((1, 2)))


class Whole(nn.Module):
    def __init__(self, bottleneck: DiscreteKeyValueBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = self.bottleneck.lookup(z)
        return indices, self.bottleneck.read(indices), self.bottleneck.vote(indices)


@pytest.mark.parametrize("options", [{}, {"topk": 2, "mask_unused": True, "standardize": True}])
def test_16_exported_and_compiled_it_finds_the_same(options: dict[str, Any]) -> None:
    whole = Whole(build(torch.float32, value_init="normal", **options))
    z = draw(8, 3, DIM).float()
    whole(z)
    whole.eval()
    torch._dynamo.reset()
    program = torch.export.export(whole, (z,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    for inputs in (z, draw(5, 3, DIM, seed=1).float()):
        expected = whole(inputs)
        for found in (program.module()(inputs), compiled(inputs)):
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1:], expected[1:])
    torch._dynamo.reset()
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert all(torch.equal(a, b) for a, b in zip(twin(z), whole(z), strict=True))
        twin.bottleneck.values.data.add_(1)
        assert not torch.equal(twin(z)[1], whole(z)[1])


def test_masked_tokens_may_hold_anything() -> None:
    bottleneck, z = build(value_init="normal"), draw(3, 4, DIM)
    dirty = z.masked_fill(~MASK[..., None], torch.nan)
    for inputs in (z, dirty):
        assert torch.equal(bottleneck(inputs, mask=MASK), bottleneck(z, mask=MASK))
        indices = bottleneck.lookup(inputs, mask=MASK)
        assert (indices.movedim(3, 1)[~MASK] == -1).all()
        assert torch.equal(indices.movedim(3, 1)[MASK], bottleneck.lookup(z).movedim(3, 1)[MASK])
    assert not bottleneck(z, mask=MASK).movedim(2, 1)[~MASK].any()


def test_disabled_pairs_are_never_fetched_again() -> None:
    bottleneck, z = build(mask_unused=True), draw(50, DIM)
    before, fingerprint = bottleneck.lookup(z), bottleneck.fingerprint()
    taken = torch.zeros(6, 11, dtype=torch.bool)
    taken[torch.arange(6), before[0, :, 0, 0]] = True
    bottleneck(z)
    bottleneck.usage[taken] = 99
    bottleneck.disable_pairs(taken)
    for mode in (True, False):
        indices = bottleneck.train(mode).lookup(z)
        assert not taken[torch.arange(6)[:, None], indices[:, :, 0, 0].T].any()
    bottleneck.usage[:] = taken  # all that was used is disabled: the others answer
    after = bottleneck.lookup(z)
    assert not taken[torch.arange(6)[:, None], after[:, :, 0, 0].T].any()
    untouched = ~taken[torch.arange(6)[:, None], before[:, :, 0, 0].T].T
    assert torch.equal(after[:, :, 0, 0][untouched], before[:, :, 0, 0][untouched])
    assert bottleneck.fingerprint() != fingerprint
    bottleneck.disabled.zero_()
    assert bottleneck.fingerprint() == fingerprint
    assert torch.equal(bottleneck.train().lookup(z), before)


def test_the_fingerprint_is_that_of_what_lookups_depend_on() -> None:
    bottleneck = build(torch.float32, standardize=True)
    fingerprint = bottleneck.fingerprint()
    bottleneck.values.data.add_(1)
    bottleneck.usage.add_(1)
    assert bottleneck.fingerprint() == fingerprint == build(torch.float32, standardize=True).fingerprint()
    for name in ("keys", "projection", "shift", "scale"):
        changed = copy.deepcopy(bottleneck)
        changed.get_buffer(name).view(-1)[-1] += 1e-6
        assert changed.fingerprint() != fingerprint, name
    assert build(torch.float32, standardize=True, topk=2).fingerprint() != fingerprint


def test_arguments_that_do_not_fit_are_refused() -> None:
    for options, words in (
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"num_pairs": -1}, "num_pairs=-1"),
        ({"dim_key": 1.5}, "dim_key=1.5"),
        ({"dim_value": 0}, "dim_value=0"),
        ({"topk": 12}, "topk=12 is more than num_pairs=11"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"splitter": "chunks"}, "splitter='chunks'.*did you mean 'chunk'"),
        ({"splitter": "chunk", "dim_key": 4}, "dim=18 is not num_codebooks=6 times dim_key=4"),
        ({"value_init": "ones"}, "value_init='ones'"),
    ):
        with pytest.raises(ValueError, match=words):
            DiscreteKeyValueBottleneck(DIM, **SIZES | options)
    bottleneck, z = build(), draw(3, 4, DIM)
    indices = bottleneck.lookup(z)
    calls: list[tuple[Any, str]] = [
        (lambda: bottleneck(z[..., 1:]), r"z has shape \(3, 4, 17\)"),
        (lambda: bottleneck(z[:, :0]), r"z has shape \(3, 0, 18\)"),
        (lambda: bottleneck.lookup(z.long()), "z has dtype torch.int64"),
        (lambda: bottleneck(z, mask=MASK[:, 1:]), r"mask has shape \(3, 3\)"),
        (lambda: bottleneck.lookup(z, mask=MASK.long()), "mask .*torch.int64"),
        (lambda: bottleneck.vote(indices, mask=MASK[:1]), r"mask has shape \(1, 4\)"),
        (lambda: bottleneck.read(indices[:, 1:]), r"indices has shape \(3, 5, 1, 4\)"),
        (lambda: bottleneck.vote(indices.double()), "indices .*torch.float64"),
        (lambda: bottleneck.overlap(indices, indices[0]), r"indices has shape \(6, 1, 4\)"),
        (lambda: bottleneck.grow_classes(0), "number=0"),
        (lambda: bottleneck.disable_pairs(torch.ones(6, 10, dtype=torch.bool)), r"mask has shape \(6, 10\)"),
        (lambda: bottleneck.disable_pairs(torch.ones(6, 11)), "mask .*torch.float32"),
        (lambda: bottleneck.disable_pairs(torch.arange(6)[:, None] == torch.full((1, 11), 4)), "codebook 4 without"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_it_is_registered() -> None:
    layer = create_layer("discrete_key_value_bottleneck", DIM)
    assert isinstance(layer, DiscreteKeyValueBottleneck)
    assert "dim=18, num_codebooks=6" in repr(layer)
