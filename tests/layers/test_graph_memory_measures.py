"""Measures of slots: every one on a case that is worked out by hand."""

import math

import torch

from memzoo.layers.graph_memory_measures import (
    coverage,
    effective_number,
    gini,
    mean_of_real,
    move_counts,
    mutual_information,
    off_diagonal_cosines,
    row_entropy,
    slot_tokens,
    soft_moves,
)


def close(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_entropy_is_of_the_last_axis_and_finite_where_probabilities_are_zero():
    rows = torch.stack((numbers(1, 0, 0, 0), numbers(0.5, 0.5, 0, 0), numbers(0.25, 0.25, 0.25, 0.25)))
    close(row_entropy(rows), [0, math.log(2), math.log(4)])


def test_the_effective_number_counts_equally_used_slots_whatever_the_scale():
    close(effective_number(numbers(3, 3, 0, 0)), 2)
    close(effective_number(torch.stack((numbers(1, 0, 0), numbers(1, 1, 1)))), [1, 3])
    # H = ln 4 - 3/4 ln 3, so exp(H) = 4 / 3**0.75
    close(effective_number(numbers(1, 3)), 4 / 3**0.75)


def test_gini_is_zero_for_equal_counts_and_most_where_one_slot_holds_all():
    close(gini(numbers(5, 5, 5, 5)), 0)
    close(gini(numbers(0, 0, 8, 0)), 3 / 4)
    # Mean absolute difference of (1, 3) is 1 over all four pairs, over twice the mean: 1 / 4.
    close(gini(torch.stack((numbers(1, 3), numbers(3, 1)))), [0.25, 0.25])


def test_off_diagonal_cosines_leave_the_diagonal_out_and_ignore_lengths():
    rows = torch.stack((numbers(2, 0), numbers(0, 5), numbers(-1, 0)))
    close(off_diagonal_cosines(rows), [[0, -1], [0, 0], [-1, 0]])


def test_coverage_is_the_mean_distance_to_the_nearest_other_centroid():
    root = math.sqrt(0.5)
    rows = torch.stack((numbers(1, 0), numbers(0, 3), numbers(1, 1)))  # each end is at 45 degrees from the third
    close(coverage(rows), 1 - root)


def test_moves_count_tokens_by_their_likeliest_source_and_target():
    source = torch.eye(3)[torch.tensor([[0, 0, 2], [2, 1, 0]])]
    target = torch.eye(3)[torch.tensor([[1, 1, 2], [0, 0, 0]])]
    assert move_counts(source, target).tolist() == [[1, 2, 0], [1, 0, 0], [1, 0, 1]]


def test_soft_moves_are_the_mean_product_of_source_and_target():
    source = torch.stack((numbers(0.5, 0.5, 0), numbers(0, 0, 1)))[None]
    target = torch.stack((numbers(0, 0.4, 0.6), numbers(0.2, 0, 0.8)))[None]
    close(soft_moves(source, target), [[0, 0.1, 0.15], [0, 0.1, 0.15], [0.1, 0, 0.4]])


def test_slots_say_all_of_tokens_that_are_at_one_each_and_nothing_of_tokens_that_are_all_alike():
    close(mutual_information(torch.eye(4, dtype=torch.float64)[None]), math.log(4))
    close(mutual_information(numbers(0.7, 0.2, 0.1).expand(2, 5, 3)), 0)
    # Tokens at (1, 0) and (1/2, 1/2): H of the mean (3/4, 1/4) less half of ln 2.
    mixed = torch.stack((numbers(1, 0), numbers(0.5, 0.5)))[None]
    close(mutual_information(mixed), math.log(4) - 0.75 * math.log(3) - math.log(2) / 2)


def test_masked_tokens_do_not_count():
    draw = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    real = [values[mask][None] for values in (source, target)]
    for function in (move_counts, soft_moves):
        torch.testing.assert_close(function(source, target, mask), function(*real))
        assert not torch.equal(function(source, target), function(*real))
    torch.testing.assert_close(mutual_information(source, mask), mutual_information(real[0]))
    torch.testing.assert_close(mean_of_real(source, mask), real[0][0].mean(0))
    assert move_counts(source, target, ~mask).sum() == 3
    assert mean_of_real(source[..., 0], torch.zeros_like(mask)).isnan()


def test_every_slot_names_the_tokens_that_choose_it_most():
    assignments = torch.tensor([[2, 0, 0, 2, 0, 0, 0]])
    tokens = torch.tensor([[7, 9, 4, 7, 4, 9, 5]])
    assert slot_tokens(assignments, tokens, 4, top=2) == [[(4, 2), (9, 2)], [], [(7, 2)], []]


def test_the_measures_that_are_losses_too_have_gradients():
    rows = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for function in (row_entropy, effective_number):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x.softmax(-1)), rows)
    assert torch.autograd.gradcheck(off_diagonal_cosines, rows)
