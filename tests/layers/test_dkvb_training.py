"""Discrete key-value bottleneck: what a step of training changes, and what it leaves alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
from memzoo.layers.reference import discrete_key_value_bottleneck as reference
from tests.layers.dkvb_cases import DIM, build, draw

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LOCAL: dict[str, tuple[Optimizers, bool]] = {
    "sgd": (lambda parameters: torch.optim.SGD(parameters, lr=0.5), False),
    "sparse_sgd": (lambda parameters: torch.optim.SGD(parameters, lr=0.5), True),
    "sparse_adam": (lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01), True),
}


def fetched(bottleneck: DiscreteKeyValueBottleneck, indices: Tensor) -> Tensor:
    """Which pairs are among the indices, (codebooks, pairs)."""
    table = torch.zeros(bottleneck.num_codebooks, bottleneck.num_pairs, dtype=torch.bool)
    for c, own in enumerate(indices.unbind(1)):
        table[c, own.flatten()] = True
    return table


def train(
    bottleneck: DiscreteKeyValueBottleneck,
    optimizer: torch.optim.Optimizer,
    indices: Tensor,
    labels: Tensor,
    *,
    sparse: bool = False,
    mask: Tensor | None = None,
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(bottleneck.vote(indices, mask=mask, sparse=sparse), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("masked", [False, True])
def test_03_a_step_leaves_what_was_not_fetched_as_it_is_to_the_bit(name: str, masked: bool) -> None:
    """Also later: the rows of the first classes stay through steps on others."""
    make, sparse = LOCAL[name]
    bottleneck = build(value_init="normal", num_pairs=40)
    optimizer = make(bottleneck.trainable_parameters())
    mask = torch.tensor([[True, False]]) if masked else None
    first, later = (bottleneck.lookup(draw(1, 2, DIM, seed=seed)) for seed in (1, 2))
    before = bottleneck.values.detach().clone()
    train(bottleneck, optimizer, first, torch.tensor([0]), sparse=sparse, mask=mask)
    own = fetched(bottleneck, first[..., :1] if masked else first)
    changed = (bottleneck.values != before).any(-1)
    assert torch.equal(changed, own)
    kept = bottleneck.values.detach().clone()
    for label in (2, 3, 4):
        train(bottleneck, optimizer, later, torch.tensor([label]), sparse=sparse, mask=mask)
    others = fetched(bottleneck, later[..., :1] if masked else later)
    assert (own & ~others).any()
    assert torch.equal(bottleneck.values[~others], kept[~others])


def test_03_a_masked_token_is_not_in_a_sparse_gradient() -> None:
    """A gradient of zero would let SparseAdam move it on."""
    bottleneck, z = build(value_init="normal"), draw(2, 2, DIM)
    optimizer = torch.optim.SparseAdam(bottleneck.trainable_parameters(), lr=0.01)
    indices = bottleneck.lookup(z)
    train(bottleneck, optimizer, indices, torch.tensor([0, 1]), sparse=True)
    kept = bottleneck.values.detach().clone()
    mask = torch.tensor([[True, False], [False, False]])
    train(bottleneck, optimizer, indices, torch.tensor([0, 1]), sparse=True, mask=mask)
    own = fetched(bottleneck, indices[:1, ..., :1])
    assert torch.equal((bottleneck.values != kept).any(-1), own)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
    ],
    ids=["adamw", "adam", "momentum", "weight_decay"],
)
def test_03_other_optimisers_do_move_what_was_not_fetched(make: Optimizers) -> None:
    bottleneck = build(value_init="normal", num_pairs=40)
    optimizer = make(bottleneck.trainable_parameters())
    first, later = (bottleneck.lookup(draw(1, DIM, seed=seed)) for seed in (1, 2))
    train(bottleneck, optimizer, first, torch.tensor([0]))
    old = fetched(bottleneck, first) & ~fetched(bottleneck, later)
    kept = bottleneck.values.detach().clone()
    train(bottleneck, optimizer, later, torch.tensor([1]))
    assert (bottleneck.values[old] != kept[old]).any(-1).all()


def test_05_the_encoder_gets_no_gradient() -> None:
    """Neither from what is fetched nor from distances."""
    encoder, bottleneck = nn.Sequential(nn.Linear(7, DIM), nn.BatchNorm1d(DIM)).double().eval(), build()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([*encoder.parameters(), *bottleneck.parameters()], lr=1.0)
    found = bottleneck(encoder(draw(5, 7)), return_info=True)
    assert not found.distances.requires_grad
    F.cross_entropy(found.values.mean((1, 2)), torch.arange(5)).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert bottleneck.values.detach().any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("through", ["vote", "forward"])
def test_09_a_step_moves_logits_by_the_overlap_of_codes(smoothing: float, through: str) -> None:
    bottleneck, rate = build(value_init="normal"), 0.7
    x, others = draw(1, DIM, seed=1), draw(1, DIM, seed=1) + draw(64, DIM, seed=2) * torch.linspace(0, 2, 64)[:, None]
    own, theirs = bottleneck.lookup(x), bottleneck.lookup(others)
    logits, before = bottleneck.vote(own).detach()[0], bottleneck.vote(theirs).detach()
    target = F.one_hot(torch.tensor(3), 5).double() * (1 - smoothing) + smoothing / 5
    optimizer = torch.optim.SGD(bottleneck.parameters(), lr=rate)
    voted = bottleneck.vote(own) if through == "vote" else bottleneck(x).mean((1, 2))
    F.cross_entropy(voted, torch.tensor([3]), label_smoothing=smoothing).backward()
    optimizer.step()
    after = bottleneck.vote(theirs).detach()
    overlap = bottleneck.overlap(theirs, own)[:, 0]
    shares = (theirs == own).double().mean((1, 2, 3))
    assert torch.equal(overlap, shares)
    assert {0.0, 1.0} < set(shares.tolist())
    for row in range(64):
        said = reference.logits_after_step(
            before[row], theirs[row, :, 0, 0], own[0, :, 0, 0], logits.softmax(0), target, rate
        )
        torch.testing.assert_close(after[row], said, rtol=0, atol=1e-12)
    moved = before - rate / 6 * overlap[:, None] * (logits.softmax(0) - target)
    torch.testing.assert_close(after, moved, rtol=0, atol=1e-12)
    assert torch.equal(after[shares == 0], before[shares == 0])


def test_09_the_overlap_of_more_tokens_is_the_inner_product_of_what_is_fetched() -> None:
    bottleneck = build(topk=2)
    a, b = bottleneck.lookup(draw(3, 4, DIM)), bottleneck.lookup(draw(2, 5, DIM, seed=1))
    bottleneck.values.data.normal_()

    def shares(indices: Tensor) -> Tensor:
        table = torch.zeros(len(indices), 6, 11, dtype=torch.float64)
        ones = torch.ones(indices.flatten(2).shape, dtype=torch.float64) / indices[0, 0].numel()
        return table.scatter_add(2, indices.flatten(2), ones)

    torch.testing.assert_close(bottleneck.overlap(a, b), torch.einsum("ick,jck->ij", shares(a), shares(b)) / 6)
    before, (gradient,) = bottleneck.vote(b).detach(), torch.autograd.grad(bottleneck.vote(a)[0, 1], bottleneck.values)
    bottleneck.values.data -= 0.3 * gradient
    moved = 0.3 * 4 * bottleneck.overlap(a, b)[0] / 6
    torch.testing.assert_close((before - bottleneck.vote(b).detach())[:, 1], moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 8_000_000])
def test_09_the_overlap_is_of_real_tokens_as_the_step_is(chunk_bytes: int) -> None:
    """Masked in the lookup or after it, and with pairs that are missing."""
    bottleneck, z, other = build(topk=3, chunk_bytes=chunk_bytes), draw(3, 4, DIM), draw(4, 5, DIM, seed=1)
    bottleneck.disabled[2, 2:] = True
    mask_a = torch.tensor([[True, False, True, True], [False] * 4, [True, False, False, False]])
    mask_b = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    plain = bottleneck.lookup(z), bottleneck.lookup(other)
    masked = bottleneck.lookup(z, mask=mask_a), bottleneck.lookup(other, mask=mask_b)
    assert (plain[0][:, 2, 2] == -1).all()
    expected = reference.overlap(*plain, mask_a, mask_b)
    assert expected[0].any()
    assert not expected[1].any()
    assert torch.equal(bottleneck.overlap(*plain, mask_a=mask_a, mask_b=mask_b), expected)
    assert torch.equal(bottleneck.overlap(*masked), expected)
    assert torch.equal(bottleneck.overlap(*plain), reference.overlap(*plain))
    assert bottleneck.overlap(masked[0][:0], masked[1]).shape == (0, 4)
    (gradient,) = torch.autograd.grad(bottleneck.vote(plain[0], mask=mask_a)[0, 1], bottleneck.values)
    before = bottleneck.vote(masked[1]).detach()
    bottleneck.values.data -= 0.3 * gradient
    moved = 0.3 * 9 * expected[0] / 6
    torch.testing.assert_close((before - bottleneck.vote(masked[1]).detach())[:, 1], moved, rtol=0, atol=1e-12)


def test_11_new_classes_leave_old_values_and_far_predictions_alone() -> None:
    bottleneck = build(num_pairs=60, dim_value=10)
    optimizer = torch.optim.SGD(bottleneck.parameters(), lr=1.0)
    old, new = bottleneck.lookup(draw(12, DIM, seed=1)), bottleneck.lookup(3 + draw(4, DIM, seed=2))
    for _ in range(5):
        train(bottleneck, optimizer, old, torch.arange(12) % 8)
    before, said = bottleneck.values.detach().clone(), bottleneck.vote(old).detach()
    far = bottleneck.overlap(old, new).sum(1) == 0
    assert far.any()
    assert not far.all()
    for _ in range(5):
        train(bottleneck, optimizer, new, torch.tensor([8, 9, 8, 9]))
    others = fetched(bottleneck, new)
    assert torch.equal(bottleneck.values[~others], before[~others])
    assert (bottleneck.values[others] != before[others]).any(-1).all()
    assert torch.equal(bottleneck.vote(old)[far], said[far])


def test_11_classes_that_are_added_leave_the_logits_of_others() -> None:
    bottleneck, z = build(value_init="normal"), draw(7, DIM)
    indices = bottleneck.lookup(z)
    before = bottleneck.vote(indices).detach()
    bottleneck.grow_classes(3)
    after = bottleneck.vote(indices)
    assert torch.equal(after[:, :5], before)
    assert not after[:, 5:].any()
    assert after.requires_grad
    assert (bottleneck.dim_value, bottleneck.values.shape) == (8, (6, 11, 8))
    other = build()
    other.load_state_dict(bottleneck.state_dict())  # of more classes than it has
    assert torch.equal(other.vote(indices), after)


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_sparse_gradients_are_clipped_as_dense_ones_are(max_norm: float) -> None:
    """Rows that are in it several times count as their sum."""
    results = []
    for sparse in (False, True):
        bottleneck, head = build(value_init="normal"), nn.Linear(5, 5).double()
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        indices = bottleneck.lookup(draw(9, 3, DIM))
        F.cross_entropy(head(bottleneck.vote(indices, sparse=sparse)), torch.arange(9) % 5).backward()
        parameters = [bottleneck.values, *head.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert [gradient.is_sparse for gradient in found] == [sparse, False, False]
        results.append([norm.detach(), *(gradient.to_dense() for gradient in found)])
    torch.testing.assert_close(results[1], results[0])
