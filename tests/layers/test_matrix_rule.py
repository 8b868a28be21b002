"""The rules: gates and queries as the papers write them, by hand; what one rule becomes where another begins."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import MATRIX_RULES, LinearAttention, MatrixRule
from memzoo.layers.matrix_rule import unit
from memzoo.layers.mixture_of_memories import MixtureOfMemories
from memzoo.layers.ops import backend
from memzoo.layers.reference.delta_rule import delta_rule
from memzoo.layers.reference.linear_recurrence import linear_recurrence

H, HV, K, V = 2, 4, 6, 3
BATCH, TIME, DIM = 2, 7, 10
NAMES = sorted(MATRIX_RULES)


def build(name: str, **options: object) -> MatrixRule:
    """A rule in float64, its parameters somewhere."""
    torch.manual_seed(0)
    sizes = {"num_heads": H, "num_value_heads": HV, "key_dim": K, "value_dim": V}
    return MATRIX_RULES[name](**sizes | options).double()


def tokens(rule: MatrixRule, time: int = TIME) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and raw gates."""
    torch.manual_seed(1)
    q, k = torch.randn(2, BATCH, time, rule.num_heads, K, dtype=torch.float64)
    v = torch.randn(BATCH, time, rule.num_value_heads, V, dtype=torch.float64)
    gates = torch.randn(BATCH, time, rule.gate_width, dtype=torch.float64) if rule.gate_width else None
    return q, k, v, gates


def run(rule: MatrixRule, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, gates = tokens(rule)
    q, k = rule.prepare(q, k, torch.arange(TIME))
    return rule(q, k, v, gates, state)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# --- the equations ---------------------------------------------------------------------------------------------------


def test_linear_attention_is_a_weighted_mean_of_the_values():
    rule = build("linear_attention")
    q, k, v, _ = tokens(rule)
    y, state = run(rule)
    phi_q, phi_k = (torch.where(t > 0, t + 1, t.exp()).repeat_interleave(HV // H, 2) for t in (q, k))
    weights = torch.einsum("bthk,bshk->bhts", phi_q, phi_k).tril() * K**-0.5
    close(y, torch.einsum("bhts,bshv->bthv", weights / (weights.sum(-1, keepdim=True) + 1e-10), v))
    close(state[..., :V], torch.einsum("bshk,bshv->bhkv", phi_k, v))
    close(state[..., V], phi_k.sum(1))
    assert state.shape[1:] == rule.state_shape == (HV, K, V + 1)


@pytest.mark.parametrize(("feature_map", "function"), [("relu", torch.relu), ("identity", lambda x: x)])
def test_linear_attention_without_its_normaliser_is_a_sum(feature_map, function):
    rule = build("linear_attention", feature_map=feature_map, normalize=False)
    q, k, v, _ = tokens(rule)
    y, state = run(rule)
    expected, expected_state = linear_recurrence(function(q), function(k), v)
    close(y, expected)
    close(state, expected_state)
    assert state.shape[1:] == rule.state_shape == (HV, K, V)


def test_normalised_linear_attention_goes_on_from_its_state_and_reads_nothing_as_zero():
    rule = build("linear_attention", feature_map="relu")
    q, k, v, _ = tokens(rule)
    q, k = rule.prepare(q, -k.abs(), torch.arange(TIME))
    assert not rule(q, k, v, None)[0].any()  # all weights are zero, and so is their sum
    q, k = rule.prepare(q, -k.abs() + 1, torch.arange(TIME))
    whole, _ = rule(q, k, v, None)
    first, state = rule(q[:, :3], k[:, :3], v[:, :3], None)
    second, _ = rule(q[:, 3:], k[:, 3:], v[:, 3:], None, state)
    close(torch.cat((first, second), 1), whole)


def test_retnet_forgets_at_the_rates_of_its_paper():
    rule = build("retnet")
    _, _, v, _ = tokens(rule)
    beta, log_decay = rule.gate_values(None, v)
    assert beta is None
    assert log_decay.shape == v.shape[:3]
    close(log_decay.exp()[0, 0], torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HV)], dtype=torch.float64))


def test_retnet_sees_distances_only():
    rule = build("retnet")
    q, k, _, _ = tokens(rule)
    here, there = (rule.prepare(q, k, torch.arange(TIME) + offset) for offset in (0, 1000))
    scores, shifted = (torch.einsum("bthk,bshk->bhts", *pair) for pair in (here, there))
    torch.testing.assert_close(scores, shifted, rtol=0, atol=1e-10)
    assert (scores - torch.einsum("bthk,bshk->bhts", q, k)).abs().amax() > 0.1


def test_gla_takes_the_sixteenth_part_of_a_log_sigmoid():
    rule = build("gla")
    _, _, v, gates = tokens(rule)
    beta, log_decay = rule.gate_values(gates, v)
    assert beta is None
    close(log_decay, (torch.sigmoid(gates).log() / 16).view(BATCH, TIME, HV, K))
    _, faster = build("gla", gate_divisor=4.0).gate_values(gates, v)
    close(faster, 4 * log_decay)


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_delta_rules_write_as_much_as_a_sigmoid_says_or_twice(name):
    rule = build(name)
    _, _, v, gates = tokens(rule)
    beta, _ = rule.gate_values(gates, v)
    close(beta, torch.sigmoid(gates[..., -HV:]))
    twice, _ = build(name, negative_eigenvalues=True).gate_values(gates, v)
    close(twice, 2 * beta)


def test_gated_deltanet_decays_as_mamba_does():
    rule = build("gated_deltanet")
    _, _, v, gates = tokens(rule)
    _, log_decay = rule.gate_values(gates, v)
    step = torch.log1p(torch.exp(gates[..., :HV] + rule.step_bias))
    close(log_decay, -rule.decay_log.exp() * step)


def test_kimi_delta_attention_decays_every_key_channel():
    rule = build("kda")
    _, _, v, gates = tokens(rule)
    _, log_decay = rule.gate_values(gates, v)
    step = torch.log1p(torch.exp(gates[..., : HV * K] + rule.step_bias)).view(BATCH, TIME, HV, K)
    close(log_decay, -rule.decay_log.exp()[:, None] * step)


def test_a_bounded_decay_of_kimi_delta_attention_stays_above_its_bound():
    rule = build("kda", decay_lower_bound=-5.0)
    _, _, v, gates = tokens(rule)
    _, log_decay = rule.gate_values(gates, v)
    raw = (gates[..., : HV * K] + rule.step_bias).view(BATCH, TIME, HV, K)
    close(log_decay, -5 / (1 + torch.exp(-rule.decay_log.exp()[:, None] * raw)))
    _, extreme = rule.gate_values(gates + 1e6, v)
    assert (extreme == -5).all()


def test_delta_rules_ask_with_unit_length():
    for name in ("deltanet", "gated_deltanet", "kda"):
        q, k, _, _ = tokens(build(name))
        for prepared, raw in zip(build(name).prepare(q, k, torch.arange(TIME)), (q, k), strict=True):
            close(prepared, raw / (raw.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert not unit(torch.zeros(1, 3)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_its_reference_loop_with_gates_applied(name):
    """From a state, in rows of unequal length, and in segments."""
    rule = build(name, chunk_size=4, **({"normalize": False} if name == "linear_attention" else {}))
    q, k, v, gates = tokens(rule)
    q, k = rule.prepare(q, k, torch.arange(TIME))
    beta, log_decay = rule.gate_values(gates, v)
    state = torch.randn(BATCH, *rule.state_shape, dtype=torch.float64)
    lengths = torch.tensor([TIME, 3])

    def reference(q, k, v, beta, log_decay, **layout):
        if beta is None:
            return linear_recurrence(q, k, v, log_decay, state, **layout)
        return delta_rule(q, k, v, beta, log_decay, state, **layout)

    y, end = rule(q, k, v, gates, state, lengths=lengths)
    expected, expected_end = reference(q, k, v, beta, log_decay, lengths=lengths)
    close(y, expected)
    close(end, expected_end)

    row = [None if t is None else t[:1] for t in (q, k, v, gates, beta, log_decay)]
    cu_seqlens = torch.tensor([0, 2, TIME])
    y, end = rule(*row[:4], state, cu_seqlens=cu_seqlens)
    expected, expected_end = reference(*row[:3], *row[4:], cu_seqlens=cu_seqlens)
    close(y, expected)
    close(end, expected_end)


# --- where one rule is another (spec, check 18) ----------------------------------------------------------------------


def test_18_gated_deltanet_that_forgets_nothing_is_deltanet():
    plain, gated = build("deltanet"), build("gated_deltanet")
    q, k, v, beta = tokens(plain)
    with torch.no_grad():
        gated.decay_log.fill_(-torch.inf)  # a rate of zero
    q, k = plain.prepare(q, k, torch.arange(TIME))
    gates = torch.cat((torch.randn_like(beta), beta), -1)
    for actual, expected in zip(gated(q, k, v, gates), plain(q, k, v, beta), strict=True):
        close(actual, expected)


def test_18_kimi_delta_attention_with_equal_channels_is_gated_deltanet():
    scalar, vector = build("gated_deltanet"), build("kda")
    q, k, v, gates = tokens(scalar)
    with torch.no_grad():
        vector.decay_log.copy_(scalar.decay_log)
        vector.step_bias.copy_(scalar.step_bias.repeat_interleave(K))
    q, k = scalar.prepare(q, k, torch.arange(TIME))
    spread = torch.cat((gates[..., :HV].repeat_interleave(K, -1), gates[..., HV:]), -1)
    for actual, expected in zip(vector(q, k, v, spread), scalar(q, k, v, gates), strict=True):
        close(actual, expected)


def test_18_gla_with_the_constant_gates_of_retnet_is_retnet():
    retnet, gla = build("retnet"), build("gla")
    q, k, v, _ = tokens(retnet)
    q, k = retnet.prepare(q, k, torch.arange(TIME))
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(HV)], dtype=torch.float64)
    gates = torch.logit(gamma**16).repeat_interleave(K).expand(BATCH, TIME, -1)
    for actual, expected in zip(gla(q, k, v, gates), retnet(q, k, v, None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_18_retnet_that_does_not_turn_and_forgets_little_nears_linear_attention():
    retnet = build("retnet", num_heads=1, num_value_heads=50)
    q, k, v, _ = tokens(retnet)
    y, _ = retnet(q, k, v, None)
    expected, _ = linear_recurrence(q, k, v)
    close(y[:, :, -1], expected[:, :, -1])  # gamma = 1 - 2^-54
    assert (y[:, -1, 0] - expected[:, -1, 0]).abs().amax() > 1e-3


# --- parameters ------------------------------------------------------------------------------------------------------


def test_gated_deltanet_starts_with_the_rates_and_steps_of_mamba():
    rule = build("gated_deltanet", num_heads=1, num_value_heads=4000)
    rate, step = rule.decay_log.exp(), nn.functional.softplus(rule.step_bias)
    assert 0 < rate.min() < 0.1
    assert 15.9 < rate.max() <= 16 * (1 + 1e-6)
    assert abs(rate.mean() - 8) < 0.3
    _is_log_uniform(step)


def test_kimi_delta_attention_starts_alike_and_with_a_bound_too():
    sizes = {"num_heads": 1, "num_value_heads": 2000, "key_dim": 2}
    plain, bounded = build("kda", **sizes), build("kda", decay_lower_bound=-5.0, **sizes)
    rate = plain.decay_log.exp()
    assert 1 <= rate.min() < 1.1
    assert 15.9 < rate.max() <= 16 * (1 + 1e-6)
    _is_log_uniform(nn.functional.softplus(plain.step_bias))
    v, gates = torch.zeros(1, 1, 2000, V), torch.zeros(1, 1, 2000 * 3, dtype=torch.float64)
    (_, first), (_, first_bounded) = plain.gate_values(gates, v), bounded.gate_values(gates, v)
    torch.testing.assert_close(first_bounded, first, rtol=1e-4, atol=0)  # drawn in float32 from one seed
    tight = build("kda", decay_lower_bound=-0.1, **sizes)
    assert tight.gate_values(gates, v)[1].min() > -0.1


def _is_log_uniform(step: Tensor) -> None:
    assert 1e-3 * (1 - 1e-4) <= step.min() < 1.1e-3
    assert 0.09 < step.max() <= 0.1 * (1 + 1e-4)
    assert abs(step.log().mean() - math.log(1e-2)) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_makes_as_many_gates_as_the_rule_reads(name):
    rule = build(name)
    projection = rule.gate_projection(DIM)
    if not rule.gate_width:
        assert projection is None
        assert not list(rule.parameters())
        return
    x = torch.randn(BATCH, TIME, DIM)
    assert projection(x).shape == (BATCH, TIME, rule.gate_width)
    assert projection(x[0, 0]).shape == (rule.gate_width,)
    _, _, v, _ = tokens(rule)
    with pytest.raises(ValueError, match="gates=None, but the rule has gates"):
        rule.gate_values(None, v)


def test_low_rank_projections_have_the_ranks_of_the_papers():
    gla = build("gla", gate_rank=5).gate_projection(DIM)
    assert [tuple(p.shape) for p in gla.parameters()] == [(5, DIM), (HV * K, 5), (HV * K,)]
    kda = build("kda").gate_projection(DIM)
    assert [tuple(p.shape) for p in kda.parameters()] == [(V, DIM), (HV * K, V), (HV, DIM)]
    gdn = build("gated_deltanet").gate_projection(DIM)
    assert [tuple(p.shape) for p in gdn.parameters()] == [(2 * HV, DIM)]


@pytest.mark.parametrize("name", NAMES)
def test_what_all_memories_share_is_not_decayed_by_the_optimiser(name):
    rule = build(name)
    assert {n for n, _ in rule.named_parameters()} == {*getattr(rule, "no_weight_decay", ())}


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gates_are_computed_in_float32_under_autocast(name):
    rule = build(name).float()
    q, k, v, gates = (None if t is None else t.bfloat16() for t in tokens(rule))
    exact = build(name).float().gate_values(None if gates is None else gates.float(), v.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = rule.gate_values(gates, v)
        q, k = rule.prepare(q, k, torch.arange(TIME))
        y, state = rule(q, k, v, gates)
    for value, expected in zip(values, exact, strict=True):
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected)
    assert (y.dtype, q.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("deltanet", {"num_value_heads": 3}, "num_value_heads=3 is not divisible by num_heads=2"),
        ("deltanet", {"key_dim": 0}, "key_dim=0 is not a whole number >= 1"),
        ("deltanet", {"value_dim": 0}, "value_dim=0 is not a whole number >= 1"),
        ("deltanet", {"chunk_size": 0}, "chunk_size=0 is not a whole number >= 1"),
        ("deltanet", {"backend": "cuda"}, "backend='cuda' is not one of"),
        ("retnet", {"key_dim": 5}, "head_dim=5 is not divisible"),
        ("linear_attention", {"feature_map": "exp"}, "feature_map='exp' is not one of"),
        ("linear_attention", {"feature_map": "identity"}, "normalize=True divides by a sum"),
        ("gla", {"gate_rank": 0}, "gate_rank=0"),
        ("gla", {"gate_divisor": 0.0}, "gate_divisor=0.0 is not positive"),
        ("kda", {"decay_lower_bound": 0.0}, "decay_lower_bound=0.0 is not below zero"),
        ("kda", {"decay_lower_bound": -math.inf}, "decay_lower_bound=-inf is not below zero and finite"),
    ],
)
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build(name, **options)


def test_what_divides_in_float32_is_refused_to_kernels_that_have_none(monkeypatch):
    monkeypatch.setattr(backend, "is_installed", lambda _: True)
    for layer in (LinearAttention, partial(MixtureOfMemories, rule="linear_attention")):
        with pytest.raises(ValueError, match=r"normalize=True .*backend='fla'.*normalize=False.*backend='auto'"):
            layer(DIM, num_heads=H, backend="fla")
    assert LinearAttention(DIM, num_heads=H, normalize=False, backend="fla").rule.backend == "fla"
