"""Maintenance of graph memories: slots that are dead or double start anew."""

import math

import pytest
import torch

from memzoo.layers.graph_memory_upkeep import maintain
from tests.layers.graph_memory_cases import (
    DIM,
    SLOTS,
    assert_close,
    buffers_of,
    build,
    randn,
    statistics_of,
)
from tests.layers.graph_memory_upkeep_cases import Stack, cell_at, generator, orthogonal, unit_rows

# Maintenance


def test_dead_slots_restart_at_tokens():
    cell = cell_at(orthogonal(), usage=[0.5, 9e-4, 1.1e-3, 0.0, 0.4])
    before, states = buffers_of(cell), randn(7, DIM, seed=8)
    assert cell.maintain(states, generator()) == {"reset": 2, "merged": 0}
    directions = states / states.norm(dim=-1, keepdim=True)
    for slot in (1, 3):
        assert (cell.centroids[slot] - directions).abs().amax(-1).min() < 1e-14
        assert (cell.usage[slot].item(), cell.age[slot].item()) == (pytest.approx(0.2), 0)
    for slot in (0, 2, 4):
        for name, value in buffers_of(cell).items():
            assert torch.equal(value[slot], before[name][slot])


def test_more_than_half_dead_restart_anywhere():
    """Three of five are more than half, two of four are not."""
    states = torch.eye(DIM, dtype=torch.float64)[:1]
    many = cell_at(orthogonal(), usage=[0.5, 0.0, 0.0, 0.0, 0.5])
    assert many.maintain(states, generator())["reset"] == 3
    new = many.centroids[1:4]
    assert_close(new.norm(dim=-1), torch.ones(3, dtype=torch.float64), 1e-6)
    assert (new @ new.T - torch.eye(3)).abs().amax() < 0.95
    assert (new @ states.T).abs().amax() < 0.999
    assert many.age.tolist() == [200, 0, 0, 0, 200]
    half = cell_at(orthogonal()[:4], usage=[0.5, 0.0, 0.0, 0.5])
    assert half.maintain(states, generator())["reset"] == 2
    assert_close(half.centroids[1:3], states.expand(2, DIM), 1e-14)


def test_random_directions_are_gaussian():
    cell = cell_at(unit_rows(400), usage=[0.0] * 400)
    assert cell.maintain(randn(1, DIM), generator())["reset"] == 400
    assert cell.centroids.mean(0).abs().max() < 5 * (DIM * 400) ** -0.5
    assert_close(cell.centroids.square().mean(0), torch.full((DIM,), 1 / DIM, dtype=torch.float64), 0.05)


def near(row, cosine):
    """A unit row at that cosine from ``row``."""
    other = orthogonal()[4]
    return cosine * row + math.sqrt(1 - cosine**2) * (other - (other @ row) * row)


@pytest.mark.parametrize("less_used", [0, 2])
def test_of_two_close_slots_the_less_used_one_restarts(less_used):
    rows, usage = orthogonal(), [0.3, 0.2, 0.3, 0.2, 0.2]
    rows[2], usage[less_used] = near(rows[0], 0.96), 0.1
    cell, states = cell_at(rows, usage), randn(7, DIM, seed=8)
    before = buffers_of(cell)
    assert cell.maintain(states, generator()) == {"reset": 0, "merged": 1}
    directions = states / states.norm(dim=-1, keepdim=True)
    assert (cell.centroids[less_used] - directions).abs().amax(-1).min() < 1e-14
    assert (cell.usage[less_used].item(), cell.age[less_used].item()) == (pytest.approx(0.2), 0)
    for slot in {*range(SLOTS)} - {less_used}:
        for name, value in buffers_of(cell).items():
            assert torch.equal(value[slot], before[name][slot])


@pytest.mark.parametrize(("cosine", "ages", "merged"), [(0.96, (100, 100), 1), (0.94, (100, 100), 0)])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_only_directions_close_enough_are_merged(cosine, ages, merged, scale):
    rows = orthogonal()
    rows[1] = scale * near(rows[0], cosine)
    cell = cell_at(rows, age=[*ages, 200, 200, 200])
    assert cell.maintain(randn(7, DIM, seed=8), generator())["merged"] == merged


@pytest.mark.parametrize(("ages", "merged"), [((100, 100), 1), ((99, 100), 0), ((100, 99), 0), ((0, 0), 0)])
def test_young_slots_are_not_merged(ages, merged):
    rows = orthogonal()
    rows[1] = near(rows[0], 0.99)
    cell = cell_at(rows, age=[*ages, 200, 200, 200])
    assert cell.maintain(randn(7, DIM, seed=8), generator())["merged"] == merged


def test_a_pair_is_looked_at_again_after_each_merge():
    """Three equal slots: 0 restarts for 1, which leaves nothing to be done for 0 and 2; then 1 restarts for 2."""
    rows, state = orthogonal(), orthogonal()[4:]
    rows[1], rows[2], rows[4] = rows[0], rows[0], near(rows[3], 0.5)
    cell = cell_at(rows, usage=[0.1, 0.2, 0.3, 0.2, 0.2])
    assert cell.maintain(state, generator())["merged"] == 2
    assert_close(cell.centroids[:2], state.expand(2, DIM), 1e-14)
    assert_close(cell.centroids[2], rows[2], 0)
    assert cell.age.tolist() == [0, 0, 200, 200, 200]


def test_slots_just_reset_are_too_young_to_merge():
    cell = cell_at(orthogonal(), usage=[0.5, 0.0, 0.0, 0.2, 0.2])
    assert cell.maintain(randn(1, DIM, seed=8), generator()) == {"reset": 2, "merged": 0}
    assert_close(cell.centroids[1], cell.centroids[2], 0)


def worn(dead):
    rows = orthogonal()
    rows[1] = near(rows[0], 0.99)
    return cell_at(rows, usage=[0.3, 0.2, 0.3, 0.3, 0.3][: SLOTS - dead] + [0.0] * dead)


@pytest.mark.parametrize("dead", [2, 3])
def test_maintenance_is_its_own_generators_affair(dead):
    """With tokens for the dead ones, and with random directions."""
    states, results = randn(50, DIM, seed=8), []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        cell = worn(dead)
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        assert cell.maintain(states, generator(seed)) == {"reset": dead, "merged": 1}
        assert torch.equal(torch.random.get_rng_state(), state)
        results.append(cell.centroids.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_there_may_be_nothing_to_do():
    cell = cell_at(orthogonal())
    before = buffers_of(cell)
    assert cell.maintain(randn(7, DIM), generator()) == {"reset": 0, "merged": 0}
    assert_close(buffers_of(cell), before, 0)


@pytest.mark.parametrize("states", [torch.zeros(3, DIM + 1), torch.zeros(0, DIM), torch.zeros(2, 3, DIM)])
def test_states_that_are_none_are_refused(states):
    with pytest.raises(ValueError, match="states has shape"):
        build().maintain(states, generator())


@pytest.mark.parametrize("states", ["last", "own"])
def test_a_model_restarts_slots_at_the_last_cells_tokens_or_at_each_cells_own(states):
    model = Stack(3)
    statistics = statistics_of(model, randn(2, 7, DIM))
    for cell in model.cells:
        cell.usage[1] = 0
    assert maintain(model, statistics, generator(), states=states) == {"reset": 3, "merged": 0}
    for number, cell in enumerate(model.cells):
        rows = statistics[f"cells.{2 if states == 'last' else number}.states"]
        directions = rows / rows.norm(dim=-1, keepdim=True)
        assert (cell.centroids[1] - directions).abs().amax(-1).min() < 1e-14


def test_a_model_is_not_maintained_without_states_or_by_a_word_that_means_nothing():
    model = Stack()
    statistics = statistics_of(model, randn(2, 7, DIM))
    with pytest.raises(ValueError, match=r"cells\.1\.states"):
        maintain(model, {name: s for name, s in statistics.items() if name != "cells.1.states"}, generator())
    with pytest.raises(ValueError, match="states='first'"):
        maintain(model, statistics, generator(), states="first")
