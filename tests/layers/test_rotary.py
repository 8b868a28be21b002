import cmath

import pytest
import torch

from memzoo.layers import Rotary


def test_each_pair_is_multiplied_by_a_unit_complex_number():
    x = torch.randn(2, 3, 1, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 5], [7, 2, 1000]])
    y = Rotary(6, base=100.0)(x, positions)
    for b in range(2):
        for t in range(3):
            for i in range(3):
                angle = positions[b, t].item() * 100.0 ** (-2 * i / 6)
                pair = complex(x[b, t, 0, i], x[b, t, 0, i + 3]) * cmath.exp(1j * angle)
                assert abs(pair - complex(y[b, t, 0, i], y[b, t, 0, i + 3])) < 1e-12


def test_position_zero_changes_nothing():
    x = torch.randn(1, 1, 2, 4)
    assert torch.equal(Rotary(4)(x, torch.zeros(1, dtype=torch.long)), x)


def test_a_product_depends_on_the_distance_alone_even_a_million_tokens_out():
    rotary = Rotary(8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()

    def product(i: int, j: int) -> torch.Tensor:
        return (rotary(q, torch.tensor([i])) * rotary(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(product(1_000_007, 1_000_000), product(7, 0), rtol=0, atol=1e-9)
    assert (product(7, 0) - product(8, 0)).abs() > 1e-3


def test_positions_of_all_rows_may_be_given_once():
    x = torch.randn(3, 5, 2, 4)
    positions = torch.arange(5) + 9
    assert torch.equal(Rotary(4)(x, positions), Rotary(4)(x, positions.expand(3, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_angles_are_exact_and_rounded_once_at_the_end(dtype):
    x = torch.randn(1, 1, 1, 64).to(dtype)
    far = torch.tensor([999_999])
    exact = Rotary(64)(x.double(), far)
    y = Rotary(64)(x, far)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_casting_the_module_does_not_round_the_angles():
    x, far = torch.randn(1, 1, 1, 64), torch.tensor([12345])
    assert torch.equal(Rotary(64).to(torch.bfloat16)(x, far), Rotary(64)(x, far))
    assert not Rotary(64).state_dict()


def test_an_odd_head_or_a_base_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"head_dim=5 is not divisible.*head_dim=4 or 6"):
        Rotary(5)
    with pytest.raises(ValueError, match=r"base=0.0 is not positive; use base > 0"):
        Rotary(4, base=0.0)


@pytest.mark.parametrize("positions", [torch.arange(7), torch.arange(14).view(2, 7)], ids=["shared", "of each row"])
def test_tensors_can_share_their_angles(positions):
    rotary, x = Rotary(8), torch.randn(2, 7, 3, 8)
    angles = rotary.angles(positions)
    assert angles.cos.shape == (*positions.shape, 1, 4)
    assert torch.equal(rotary(x, angles), rotary(x, positions))
