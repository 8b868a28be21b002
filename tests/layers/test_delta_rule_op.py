"""The delta rule alone: its reference in closed form, how its rules contain one another, and what it recalls."""

import pytest
import torch
from torch.nn import functional as F

from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.reference import delta_rule as reference
from tests.layers.recurrence_cases import RULES, assert_close, cast, decay_of_channels, make_case, run, without

DELTA_RULES = ["deltanet", "gated_deltanet", "kda"]


@pytest.mark.parametrize("name", DELTA_RULES)
def test_00_reference_is_a_product_of_generalized_householder_matrices(name):
    """S_t = (1 - beta_t k_t^T k_t) diag(e^{a_t}) S_{t-1} + beta_t k_t^T v_t."""
    case = make_case(RULES[name], time=7, group=2)
    y, end, decay = torch.empty_like(case["v"]), torch.empty_like(case["state"]), decay_of_channels(case).exp()
    for row in range(2):
        for head in range(4):
            S = case["state"][row, head]
            for t in range(7):
                k, q, v = case["k"][row, t, head // 2], case["q"][row, t, head // 2], case["v"][row, t, head]
                beta = case["beta"][row, t, head]
                transition = (torch.eye(3) - beta * torch.outer(k, k)) @ torch.diag(decay[row, t, head])
                S = transition @ S + beta * torch.outer(k, v)
                y[row, t, head] = q @ S * 3**-0.5
            end[row, head] = S
    assert_close(reference.delta_rule(**case), (y, end))


def test_18_kda_with_equal_channels_is_gated_deltanet():
    case = make_case(RULES["gated_deltanet"], time=20)
    channels = case | {"log_decay": decay_of_channels(case)}
    actual, expected = run(delta_rule, channels, chunk_size=8), run(delta_rule, case, chunk_size=8)
    actual["gradient of log_decay"] = actual["gradient of log_decay"].sum(-1)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_18_without_decay_it_is_deltanet(name):
    case = make_case(RULES[name], time=20)
    case["log_decay"] = torch.zeros_like(case["log_decay"])
    actual = run(delta_rule, case, chunk_size=8)
    del actual["gradient of log_decay"]
    assert_close(actual, run(delta_rule, without(case, "log_decay"), chunk_size=8))


@pytest.mark.parametrize("name", DELTA_RULES)
def test_18_a_step_of_zero_only_forgets(name):
    case = make_case(RULES[name], time=20)
    case["beta"] = torch.zeros_like(case["beta"])
    _, state = delta_rule(**case, chunk_size=8)
    assert_close(state, decay_of_channels(case).sum(1).exp()[..., None] * case["state"])


def test_18_orthonormal_keys_recall_their_values_exactly():
    keys = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][None, :, None]
    values = torch.randn(1, 16, 1, 4, dtype=torch.float64)
    _, state = delta_rule(keys, keys, values, torch.ones(1, 16, 1, dtype=torch.float64), chunk_size=8)
    assert_close(keys[0, :, 0] @ state[0, 0], values[0, :, 0], 1e-12)


def test_19_a_value_replaces_what_its_key_held_before():
    key = torch.tensor([0.6, 0.8], dtype=torch.float64).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float64).view(1, 2, 1, 2)
    y, state = delta_rule(key, key, values, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0)
    assert_close(y[0, :, 0].tolist(), [[1.0, 2.0], [10.0, 20.0]], 1e-14)
    assert_close((key[0, 0] @ state[0, 0])[0].tolist(), [10.0, 20.0], 1e-14)


def test_19_a_step_of_two_reflects_and_twice_is_nothing():
    case = make_case(RULES["deltanet"], time=2)
    for name in ("k", "v"):
        case[name] = case[name][:, :1].expand_as(case[name])
    case["beta"] = torch.full_like(case["beta"], 2.0)
    assert_close(delta_rule(**case)[1], case["state"])


@pytest.mark.parametrize(("name", "bound"), [("deltanet", 1.5e-4), ("gated_deltanet", 7e-6), ("kda", 4e-6)])
def test_21_reflections_at_keys_that_almost_repeat_lose_little_in_float32(name, bound):
    """Steps of 2, at the edge of what is stable: nothing is damped unless the memory decays.

    Sums over a chunk then have terms of either sign that almost cancel, entries up to 2 of the inverse times beta = 2:
    64 * 4 * 2**-24 = 1.5e-5 of rounding a chunk, for three chunks. Over seeds and distances of the keys from 0 to 0.1
    at most 4.5e-5 were seen, and 2.3e-6 and 1.2e-6 with decays; the bounds are three times that.
    """
    case = make_case(RULES[name], batch=1, time=192, key_dim=16, value_dim=16)
    case["k"] = F.normalize(0.25 + 0.01 * case["k"], dim=-1)
    case["beta"] = torch.full_like(case["beta"], 2.0)
    assert_float32_within(bound, case)


@pytest.mark.parametrize("name", DELTA_RULES)
def test_21_repeated_keys_cost_no_precision_in_float32(name):
    case = make_case(RULES[name], batch=1, time=192, key_dim=16, value_dim=16)
    key = F.normalize(torch.ones(16, dtype=torch.float64) + 0.1 * case["k"][0, 0, 0], dim=-1)
    case["k"] = key.expand_as(case["k"])
    case["beta"] = torch.ones_like(case["beta"])
    assert_float32_within(1e-5, case)


def assert_float32_within(bound, case):
    """Compare the op in float32 with the loop in float64, by the largest of each result."""
    case = cast(case, torch.float32)
    actual, expected = run(delta_rule, case, chunk_size=64), run(reference.delta_rule, cast(case, torch.float64))
    for name, exact in expected.items():
        assert (actual[name] - exact).abs().max() < bound * exact.abs().max().clamp_min(1), name
