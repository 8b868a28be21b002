"""The linear recurrence alone: its reference in closed form, and how its rules contain one another."""

import pytest
import torch

from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.reference import linear_recurrence as reference
from tests.layers.recurrence_cases import RULES, assert_close, decay_of_channels, make_case, run, without


@pytest.mark.parametrize("name", ["linear_attention", "ssd", "gla"])
def test_00_reference_is_causal_attention_weighted_by_decay(name):
    case = make_case(RULES[name], time=7, group=2)
    q, k = (case[key].repeat_interleave(2, dim=2) for key in ("q", "k"))
    v, state = case["v"], case["state"]
    total = decay_of_channels(case).cumsum(1)
    kept = (total[:, :, None] - total[:, None]).exp() * torch.ones(7, 7).tril()[..., None, None]  # of write i at step t
    y = torch.einsum("bthc,btihc,bihc,bihv->bthv", q, kept, k, v)
    y += torch.einsum("bthc,bthc,bhcv->bthv", q, total.exp(), state)
    end = torch.einsum("bihc,bihc,bihv->bhcv", kept[:, -1], k, v) + total[:, -1, :, :, None].exp() * state
    assert_close(reference.linear_recurrence(**case), (y * 3**-0.5, end))


def test_18_gla_with_equal_channels_is_ssd():
    case = make_case(RULES["ssd"], time=20)
    channels = case | {"log_decay": decay_of_channels(case)}
    actual, expected = run(linear_recurrence, channels, chunk_size=8), run(linear_recurrence, case, chunk_size=8)
    actual["gradient of log_decay"] = actual["gradient of log_decay"].sum(-1)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["ssd", "gla"])
def test_18_without_decay_it_is_linear_attention(name):
    case = make_case(RULES[name], time=20)
    case["log_decay"] = torch.zeros_like(case["log_decay"])
    actual = run(linear_recurrence, case, chunk_size=8)
    del actual["gradient of log_decay"]
    assert_close(actual, run(linear_recurrence, without(case, "log_decay"), chunk_size=8))


def test_18_ssd_with_a_constant_decay_is_retention():
    """y_t = scale sum_i gamma^(t - i) (q_t . k_i) v_i, the parallel form of RetNet, one gamma a head."""
    case = without(make_case(RULES["linear_attention"], time=20), "state")
    gamma = 1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    weights = (gamma[:, None, None] ** distance).tril()

    def retention(q, k, v):
        scores = torch.einsum("bthc,bihc->bhti", q, k) * weights * 3**-0.5
        state = torch.einsum("hi,bihc,bihv->bhcv", weights[:, -1], k, v)
        return torch.einsum("bhti,bihv->bthv", scores, v), state

    def ours(q, k, v):
        return linear_recurrence(q, k, v, gamma.log().expand(2, 20, 2), chunk_size=8)

    assert_close(run(ours, case), run(retention, case))


def test_19_values_under_one_key_add_up():
    key = torch.tensor([0.6, 0.8], dtype=torch.float64).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float64).view(1, 2, 1, 2)
    y, state = linear_recurrence(key, key, values, scale=1.0)
    assert_close(y[0, :, 0].tolist(), [[1.0, 2.0], [11.0, 22.0]], 1e-14)
    assert_close((key[0, 0] @ state[0, 0])[0].tolist(), [11.0, 22.0], 1e-14)
