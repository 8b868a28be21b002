"""The equations of Locas and TempLoRA against numbers worked out by hand, and against plain matrix products."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.reference import locas

EXACT = {"rtol": 0, "atol": 1e-12}


def tensor(*rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)


def test_06_tau_is_the_mean_column_norm_over_the_rank():
    down = tensor([3.0, 0.0, 5.0], [4.0, 2.0, 12.0])  # columns of norm 5, 2 and 13
    assert locas.slot_scale(down, 4).item() == pytest.approx(5 / 3, abs=1e-12)


def test_07_a_long_vector_is_clipped_to_its_unit_vector_and_a_short_one_is_left():
    assert_close(locas.clip(tensor(1.8, 2.4)), tensor(0.6, 0.8))
    for short in (tensor(0.3, 0.4), tensor(0.0, 0.0)):
        assert torch.equal(locas.clip(short), short)
    once = locas.clip(random(5))
    assert_close(locas.clip(once), once)


def test_a_two_layer_memory_answers_where_its_keys_fire():
    """Tokens (1, 2) and (-2, 1) on keys e_1 and e_2: activations (1, 2) and (0, 1)."""
    x = tensor([[1.0, 2.0], [-2.0, 1.0]])
    key, value = tensor([1.0, 0.0], [0.0, 1.0]), tensor([0.5, 0.0], [0.25, -0.5])
    y = locas.side_feed_forward(x, None, key, value, torch.relu, 2.0)
    assert_close(y, tensor([[2.0, -2.0], [0.5, -1.0]]))
    biased = locas.side_feed_forward(x, None, key, value, torch.relu, 2.0, key_bias=tensor(3.0, -1.0))
    assert_close(biased, tensor([[4.5, -1.0], [1.0, 0.0]]))  # activations (4, 1) and (1, 0)


def test_the_activation_is_that_of_the_gate():
    """act(z) = z + 1: the gate 0.5 * 2 becomes 2, the key gives 0.5 * 1."""
    memory = tensor([0.0, 0.5]), tensor([0.5, 0.0]), tensor([0.0, 0.4])
    y = locas.side_feed_forward(tensor([[1.0, 2.0]]), *memory, lambda z: z + 1, 0.5)
    assert_close(y, tensor([[0.0, 0.2]]))
    biases = {"gate_bias": tensor(2.0), "key_bias": tensor(0.5)}  # (2 + 2) * 1
    biased = locas.side_feed_forward(tensor([[1.0, 2.0]]), *memory, lambda z: z + 1, 0.5, **biases)
    assert_close(biased, tensor([[0.0, 0.8]]))


@pytest.mark.parametrize("long", ["gate", "key", "value"])
def test_07_every_vector_of_a_slot_is_clipped_in_the_forward_pass(long):
    """All vectors (0.3, 0.4), one of them times 10: it acts as (0.6, 0.8), twice the short one."""
    short = {name: tensor([0.3, 0.4]) for name in ("gate", "key", "value")}
    x = tensor([[1.0, 1.0]])
    y = locas.side_feed_forward(x, **short | {long: tensor([3.0, 4.0])}, activation=torch.relu, tau=1.0)
    assert_close(y, 2 * 0.7 * 0.7 * tensor([[0.3, 0.4]]))


def test_13_every_sequence_reads_its_own_memory():
    """The second sequence has the keys (0, 1), value (0, 0.5) and bias 1."""
    x = tensor([[1.0, 2.0]], [[1.0, 2.0]])
    key, value = tensor([[1.0, 0.0]], [[0.0, 1.0]]), tensor([[1.0, 0.0]], [[0.0, 0.5]])
    y = locas.side_feed_forward(x, None, key, value, torch.relu, 1.0, key_bias=tensor([0.0], [1.0]))
    assert_close(y, tensor([[1.0, 0.0]], [[0.0, 1.5]]))
    gated = locas.side_feed_forward(x, value, key, key, torch.relu, 1.0)
    assert_close(gated, tensor([[1.0, 0.0]], [[0.0, 2.0]]))


def test_04_with_values_of_zero_only_they_have_a_gradient():
    """It is tau M_j for every channel: 2 * relu(0.5) * 1."""
    gate, key, value = (part.requires_grad_() for part in (tensor([0.5, 0.0]), tensor([0.0, 0.5]), tensor([0.0, 0.0])))
    y = locas.side_feed_forward(tensor([[1.0, 2.0]]), gate, key, value, torch.relu, 2.0)
    assert not y.any()
    expected = tensor([0.0, 0.0]), tensor([0.0, 0.0]), tensor([1.0, 1.0])
    assert_close(torch.autograd.grad(y.sum(), (gate, key, value)), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_a_feed_forward_is_a_lookup_of_its_slots(gated):
    x, up, gate, down = random(3, 5), random(7, 5, seed=1), random(7, 5, seed=2), random(5, 7, seed=3)
    b, c = random(7, seed=4), random(7, seed=5)
    slots = F.silu(F.linear(x, gate, c)) * F.linear(x, up, b) if gated else F.gelu(F.linear(x, up, b))
    act, options = (F.silu, {"gate_bias": c}) if gated else (F.gelu, {})
    y = locas.feed_forward(x, gate if gated else None, up, down.T, act, b, **options)
    assert_close(y, F.linear(slots, down))
    assert_close(locas.hidden(x[1], gate if gated else None, up, act, b, **options), slots[1])


def test_05_importance_is_the_mean_activity_of_real_tokens():
    hidden = tensor([[1.0, -2.0], [3.0, 0.0]], [[-5.0, 1.0], [9.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert_close(locas.importance(hidden, mask), tensor(3.0, 1.0))
    assert_close(locas.importance(hidden), tensor(4.5, 3.0))
    assert_close(locas.importance(hidden[0], mask[0]), tensor(2.0, 1.0))


def test_05_of_equally_important_slots_the_lowest_index_is_chosen():
    alpha = tensor(1.0, 3.0, 4.0, 0.0, 3.0, 3.0)
    assert locas.choose(alpha, 3, "topk").tolist() == [2, 1, 4]
    assert locas.choose(tensor(0.5, 0.0, 0.0, 2.0), 3, "bottomk").tolist() == [1, 2, 0]


def test_contribution_weighs_importance_by_what_the_slot_writes():
    down = tensor([3.0, 0.0, 0.0], [4.0, 2.0, 1.0])  # columns of norm 5, 2 and 1; contributions 5, 6 and 4
    assert locas.choose(tensor(1.0, 3.0, 4.0), 3, "topk_contribution", down).tolist() == [1, 0, 2]


def test_05_clones_have_unit_length_and_their_bias_shrinks_with_them():
    keys, bias = locas.clone(tensor([3.0, 4.0], [0.0, 0.5], [0.0, 0.0]), tensor(10.0, -1.0, 2.0))
    assert_close(keys, tensor([0.6, 0.8], [0.0, 1.0], [0.0, 0.0]))
    assert bias is not None
    assert_close(bias, tensor(2.0, -2.0, 2.0))
    assert locas.clone(tensor([3.0, 4.0]))[1] is None


def test_14_a_written_value_is_scaled_by_the_gradients_of_all_layers_together():
    """Token 0 has gradients (3, 0) and (0, 4): joint norm 5. Token 1 has none: it writes zeros."""
    x = [tensor([0.0, 2.0], [3.0, 4.0]), tensor([1.0, 0.0], [0.0, 0.0])]
    gradients = [tensor([3.0, 0.0], [0.0, 0.0]), tensor([0.0, 4.0], [0.0, 0.0])]
    keys, values = locas.write(x, gradients, 10.0)
    assert_close(keys, [tensor([0.0, 1.0], [0.6, 0.8]), tensor([1.0, 0.0], [0.0, 0.0])])
    assert_close(values, [tensor([6.0, 0.0], [0.0, 0.0]), tensor([0.0, 8.0], [0.0, 0.0])])


def test_14_a_written_slot_moves_along_the_gradient_and_raises_the_likelihood():
    a, readout, target = random(6), random(9, 6, seed=1), 4
    h = random(6, seed=2).requires_grad_()
    (ascent,) = torch.autograd.grad((readout @ h).log_softmax(0)[target], h)
    (key,), (value,) = locas.write([a[None]], [ascent[None]], 1e-3)
    delta = locas.feed_forward(a[None], None, key, value, torch.relu)[0]
    assert F.cosine_similarity(delta, ascent, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert delta.norm().item() == pytest.approx(1e-3 * a.norm().item(), rel=1e-12)
    before, after = ((readout @ state).log_softmax(0)[target] for state in (h, h + delta))
    assert after - before > 0.9 * delta.norm() * ascent.norm()


def test_09_merged_matrices_have_the_clipped_slots_behind_the_hosts():
    up, down = tensor([1.0, 2.0], [3.0, 4.0]), tensor([5.0, 6.0], [7.0, 8.0])
    key, value, gate = tensor([3.0, 4.0]), tensor([0.0, 10.0]), tensor([0.5, 0.0])
    weights = locas.merged(up, down, key, value, 0.5, gate=-up, memory_gate=gate)
    assert_close(weights[0], tensor([1.0, 2.0], [3.0, 4.0], [0.6, 0.8]))
    assert_close(weights[1], tensor([5.0, 6.0, 0.0], [7.0, 8.0, 0.5]))
    assert_close(weights[2], tensor([-1.0, -2.0], [-3.0, -4.0], [0.5, 0.0]))
    assert locas.merged(up, down, key, value, 0.5)[2] is None


@pytest.mark.parametrize("gated", [True, False])
def test_09_a_merged_host_is_the_host_and_its_memory(gated):
    x, up, gate, down = random(4, 5), random(7, 5, seed=1), random(7, 5, seed=2), random(5, 7, seed=3)
    g, k, v = 0.5 * random(3, 5, seed=4), random(3, 5, seed=5), 3 * random(3, 5, seed=6)
    b, bias, tau = random(7, seed=7), random(3, seed=8), locas.slot_scale(down, 3)
    assert (v.norm(dim=1) > 1).all()
    gates = {"gate": gate, "memory_gate": g} if gated else {}
    up_merged, down_merged, gate_merged = locas.merged(up, down, k, v, tau, **gates)
    y = locas.feed_forward(x, gate_merged, up_merged, down_merged.T, F.silu, torch.cat([b, bias]))
    host = locas.feed_forward(x, gate if gated else None, up, down.T, F.silu, b)
    side = locas.side_feed_forward(x[None], g if gated else None, k, v, F.silu, tau, bias)[0]
    torch.testing.assert_close(y, host + side, rtol=1e-10, atol=1e-12)


def test_15_probes_of_keys_on_the_axes_are_the_axes_weighted_by_both_lengths():
    """|k_j| |v_j| = 6, 1 and 4: eigenvalues 36 of e_1, 16 of e_3 and 1 of e_2; the first key points backwards."""
    keys = tensor([-2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5])
    values = tensor([0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 8.0])
    probes, answers = locas.nonlinear_svd(keys, values, 3, threshold=0.0)
    assert_close(probes, tensor([-1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]))
    assert_close(answers, tensor([0.0, 6.0, 0.0], [0.0, 0.0, 4.0], [1.0, 0.0, 0.0]))
    assert_close(locas.nonlinear_svd(keys, values, 2, threshold=0.0)[0], probes[:2])
    assert_close(locas.nonlinear_svd(keys, values, 3, threshold=0.1)[0], probes[:2])
    both = locas.nonlinear_svd(keys, values, 1, threshold=0.0, both_signs=True)
    assert_close(both, (tensor([-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]), tensor([0.0, 6.0, 0.0], [0.0, 0.0, 0.0])))


def test_15_slots_that_answer_nothing_have_no_probes():
    keys, values = random(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    assert [tuple(part.shape) for part in locas.nonlinear_svd(keys, values, 2, threshold=0.0)] == [(0, 4), (0, 4)]


def test_a_low_rank_patch_is_scaled_by_alpha_over_its_rank():
    """A x = (2, 3) and B A x = (5, 2), of rank 2 with alpha 4; W x = (1, 2)."""
    W, A, B = tensor([1.0, 0.0], [0.0, 1.0]), tensor([2.0, 0.0], [1.0, 1.0]), tensor([1.0, 1.0], [1.0, 0.0])
    assert_close(locas.low_rank(tensor(1.0, 2.0), W, B, A, 4.0), tensor(11.0, 6.0))
    x = random(2, 3, 2)
    assert_close(locas.low_rank(x, W, B, A, 4.0), x @ (W + 2 * B @ A).T)


def score(memory: list[Tensor] | None, chunk: float) -> Tensor:
    """Squared distance to the memory, or to 0."""
    return (tensor(chunk) - (memory[0] if memory else 0)).square().sum()


def descend(rate: float):
    return lambda memory, gradients: [m.detach() - rate * g for m, g in zip(memory, gradients, strict=True)]


@pytest.mark.parametrize(("steps", "last"), [(1, 6.25), (2, 5.0625)])
def test_16_a_chunk_is_scored_before_the_memory_learns_from_it(steps, last):
    """From 1, a quarter of the gradient towards 2 is 1.5, and again 1.75; then comes 4."""
    losses = locas.stream(score, descend(0.25), [1.0, 2.0, 4.0], lambda chunk: [tensor(chunk)], steps=steps)
    assert [loss.item() for loss in losses] == [1.0, 1.0, last]


def test_16_without_steps_the_scores_are_those_without_a_memory():
    chunks = [1.0, -2.0, math.pi]
    losses = locas.stream(score, descend(0.0), chunks, lambda chunk: [tensor(0.0)])
    assert losses == [score(None, chunk) for chunk in chunks]
