"""The equations of WISE against numbers worked out by hand, and against plain matrix products."""

import math

import pytest
import torch
from torch import Tensor

from memzoo.layers.reference import wise
from memzoo.layers.reference.wise import Side, SiteEdit

MARGINS = (5.0, 20.0, 10.0)


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every(a: Tensor) -> Tensor:
    return torch.ones(a.shape[:2], dtype=torch.bool)


# How much a memory has to say


def test_07_the_indicator_is_the_length_of_what_the_memory_adds():
    assert wise.token_indicator(tensor(1.0, 2.0), tensor([3.0, 0.0], [0.0, 2.0])).item() == 5
    a, weight, delta = random(6, 8), random(5, 8, seed=1), random(5, 8, seed=2)
    for token in a:
        two_products = (weight + delta) @ token - weight @ token
        torch.testing.assert_close(wise.token_indicator(token, delta), two_products.norm())
        torch.testing.assert_close(wise.token_indicator(token, 3 * delta), 3 * wise.token_indicator(token, delta))


def test_07_the_activated_indicator_compares_activated_outputs():
    """W a + b = (0, 1), W' a + b = (3, -3): through a ReLU (0, 1) and (3, 0)."""
    weight, delta, bias = tensor([1.0, 0.0], [0.0, 1.0]), tensor([3.0, 0.0], [-4.0, 0.0]), tensor(-1.0, 0.0)
    found = wise.activated_indicator(tensor(1.0, 1.0), delta, weight, torch.relu, bias)
    assert found.item() == pytest.approx(math.sqrt(10), abs=1e-12)
    plain = wise.activated_indicator(tensor(1.0, 1.0), delta, weight, lambda y: y, bias)
    assert plain.item() == wise.token_indicator(tensor(1.0, 1.0), delta).item() == 5


def test_15_only_counted_tokens_are_reduced():
    said, counted = tensor(9.0, 1.0, 2.0, 6.0, 9.0), torch.tensor([False, True, True, True, False])
    found = {kind: wise.reduce_tokens(said, counted, kind).item() for kind in ("mean", "max", "last", "easyedit")}
    assert found == {"mean": 3, "max": 6, "last": 6, "easyedit": 3}
    assert wise.reduce_tokens(said.flip(0), counted, "last").item() == 1
    long = tensor(*[1.0] * 99, 101.0)
    assert wise.reduce_tokens(long, long > 0, "easyedit").item() == 2
    longer = tensor(*[1.0] * 100, 101.0)
    assert wise.reduce_tokens(longer, longer > 0, "easyedit").item() == 101


def test_the_indicator_of_a_batch_is_that_of_its_samples():
    a, delta = random(2, 3, 4), random(5, 4, seed=1)
    counted = torch.tensor([[True, True, False], [True, True, True]])
    lengths = (a @ delta.T).norm(dim=-1)
    expected = torch.stack([lengths[0, :2].mean(), lengths[1].mean()])
    torch.testing.assert_close(wise.indicator(a, counted, delta), expected)


# Who answers


@pytest.mark.parametrize(
    ("said", "thresholds", "chosen"),
    [
        ([], [], None),
        ([5.0], [math.inf], None),  # nothing was learnt
        ([5.0], [5.0], 0),  # an edit on its own threshold
        ([4.9], [5.0], None),
        ([6.0, 7.0], [5.0, 5.0], 1),
        ([7.0, 7.0], [5.0, 5.0], 0),
        ([6.0, 7.0], [5.0, 8.0], None),  # the one with the most to say decides
        ([4.0, 3.0], [5.0, 5.0], None),
    ],
)
def test_11_the_memory_with_the_most_to_say_answers_if_that_is_enough(said, thresholds, chosen):
    assert wise.route(said, thresholds) == chosen


def test_11_the_ratio_lowers_the_threshold():
    assert wise.route([4.5], [5.0]) is None
    assert wise.route([4.5], [5.0], ratio=0.88) == 0


def test_03_every_sample_of_a_batch_is_routed_by_itself():
    """The memories answer (1, 0) and (0, 1), the second loudly; the third sample is nobody's."""
    sides = [Side(tensor([1.0, 0.0]), 0.5), Side(tensor([0.0, 10.0]), 5.0)]
    a = tensor([[1.0, 0.0], [1.0, 0.1]], [[1.0, 1.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 0.1]])
    y = random(3, 2, 1)
    out = wise.read(a, every(a), y, sides)
    torch.testing.assert_close(out[0], y[0] + tensor([1.0], [1.0]))
    torch.testing.assert_close(out[1], y[1] + tensor([10.0], [10.0]))
    assert torch.equal(out[2], y[2])
    assert torch.equal(wise.read(a, every(a), y, []), y)
    counted = torch.tensor([[True, True], [False, True], [False, True]])
    assert torch.equal(wise.read(a, counted, y, [Side(tensor([1.0, 0.0]), 0.5)])[1:], y[1:])


# Editing


@pytest.mark.parametrize(
    ("unrelated", "edit", "loss"),
    [(3.0, 25.0, 0.0), (8.0, 12.0, 3 + 8 + 6), (5.0, 20.0, 0.0), (15.0, 21.0, 10 + 0 + 4)],
)
def test_06_routing_loss(unrelated, edit, loss):
    e, i = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (edit, unrelated))
    found = wise.routing_loss(e, i, MARGINS)
    assert found.item() == loss
    gradients = [grad.item() for grad in torch.autograd.grad(found, (e, i))]
    slopes = {(3.0, 25.0): [0, 0], (8.0, 12.0): [-2, 2], (5.0, 20.0): [0, 0], (15.0, 21.0): [-1, 2]}
    assert gradients == slopes[unrelated, edit]


def test_06_rows_count_in_pairs():
    """Pairs (25, 3) 0, (25, 8) 3, (12, 3) 8 + 1, (12, 8) 17."""
    assert wise.mean_routing_loss(tensor(25.0, 12.0), tensor(3.0, 8.0), MARGINS).item() == (0 + 3 + 9 + 17) / 4


def test_04_a_step_moves_what_the_mask_lets_and_nothing_beyond_the_limit():
    delta, gradient = tensor([1.0, 2.0], [3.0, 4.0]), tensor([2.0, -2.0], [10.0, -10.0])
    mask = torch.tensor([[True, False], [True, True]])
    assert wise.step(delta, gradient, mask, 0.5).tolist() == [[0, 2], [-2, 9]]
    assert wise.step(delta, gradient, mask, 0.5, limit=1.5).tolist() == [[0, 2], [-1.5, 1.5]]


def test_09_ties_by_hand():
    """Half of four entries is kept of each: (0, -4, 3, 0) and (2, 3, 0, 0)."""
    deltas = [tensor([1.0, -4.0], [3.0, 0.5]), tensor([2.0, 3.0], [1.0, 0.0])]
    assert wise.ties(deltas, [0.5, 0.5], 0.5).tolist() == [[2, -4], [3, 0]]
    assert wise.ties(deltas, [1.0, 2.0], 0.5).tolist() == [[2, 3], [3, 0]]
    assert wise.ties(deltas, [1.0, 3.0], 1.0).tolist() == [[1.75, 3], [1.5, 0.5]]


def edit(seed: int, weight: Tensor) -> SiteEdit:
    """Two rows to be sent to a target by the matrix, and one that must not be touched."""
    a, unrelated, target = random(2, 3, 4, seed=seed), random(1, 2, 4, seed=100 + seed), random(len(weight), seed=seed)
    counted = every(a)
    counted[1, 2] = False
    return SiteEdit(a, counted, unrelated, every(unrelated), lambda y: (y[:, -1] - target).square().mean())


def masks(count: int) -> list[Tensor]:
    return [torch.rand(3, 4, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(count)]


def test_an_edit_is_learnt_by_plain_gradient_descent():
    weight, mask = random(3, 4), masks(1)[0]
    one = edit(1, weight)
    delta = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4):
        leaf = delta.clone().requires_grad_()
        loss = one.loss(one.inputs @ (weight + leaf).T)
        lengths = (one.inputs @ leaf.T).norm(dim=-1)
        said = torch.stack([lengths[0].mean(), lengths[1, :2].mean()])
        other = (one.unrelated @ leaf.T).norm(dim=-1).mean()
        hinges = (other - 0.1).relu() + (0.4 - said).relu() + (0.2 - (said - other)).relu()
        (loss + hinges.mean()).backward()
        delta = delta - 0.3 * leaf.grad * mask
    options = {"steps": 4, "lr": 0.3, "margins": (0.1, 0.4, 0.2)}
    found = wise.learn(torch.zeros_like(delta), weight, one, mask, **options)
    torch.testing.assert_close(found, delta, rtol=0, atol=1e-12)
    assert not found[~mask].any()
    assert one.loss(one.inputs @ (weight + found).T) < one.loss(one.inputs @ weight.T)


def run(count: int, **options):
    weight = random(3, 4)
    edits = [edit(seed, weight) for seed in range(count)]
    fixed = {"shard_size": 2, "shards": 2, "steps": 3, "lr": 0.3, "margins": (0.1, 0.4, 0.2), "density": 0.6}
    return edits, wise.stream(weight, edits, masks(9), **fixed | options)


def test_10_the_threshold_is_the_least_any_edit_of_the_shard_had_to_say():
    found = []
    for count in (1, 2, 3):
        edits, memories = run(count, shard_size=5)
        last = wise.indicator(edits[-1].inputs, edits[-1].counted, memories.current.delta)
        found.append((float(last.min()), memories.current.threshold))
    least = [said for said, _ in found]
    assert [threshold for _, threshold in found] == [min(least[: n + 1]) for n in range(3)]


def test_12_a_full_shard_gives_way_to_an_empty_one_and_full_sets_of_them_are_merged():
    counts = {}
    for count in range(10):
        memories = run(count)[1]
        counts[count] = (len(memories.merged), len(memories.shards), bool(memories.current.delta.any()))
    assert counts == {
        0: (0, 0, False),
        1: (0, 0, True),
        2: (0, 1, False),
        3: (0, 1, True),
        4: (1, 0, False),
        5: (1, 0, True),
        6: (1, 1, False),
        7: (1, 1, True),
        8: (1, 0, False),
        9: (1, 0, True),
    }
    assert len(run(8, retrieve=True)[1].merged) == 2
    assert run(0)[1].current.threshold == math.inf


def test_12_shards_keep_to_their_masks():
    parts = run(8)[1].parts
    assert len(parts) == 4
    for part, mask in zip(parts, masks(4), strict=True):
        assert part.delta[mask].all()
        assert not part.delta[~mask].any()


def test_10_a_merge_takes_the_lowest_threshold_and_starts_from_the_shards():
    memories = run(8)[1]
    (merged,) = memories.merged
    assert merged.threshold == min(part.threshold for part in memories.parts)
    assert torch.equal(merged.delta, wise.ties([part.delta for part in memories.parts], [0.25] * 4, 0.6))
    first, second = run(8, retrieve=True)[1].merged
    assert torch.equal(first.delta, wise.ties([part.delta for part in memories.parts[:2]], [0.5, 0.5], 0.6))
    assert torch.equal(second.delta, wise.ties([part.delta for part in memories.parts[2:]], [0.5, 0.5], 0.6))
    assert second.threshold == min(part.threshold for part in memories.parts[2:])


def test_14_edits_of_every_stage_are_among_those_who_answer():
    memories = run(7)[1]
    assert len(memories.sides) == 3
    assert memories.sides == [*memories.merged, *memories.shards, memories.current]
