"""What changes graph memories besides the gradient: commits and maintenance; numbers are the spec's, section 16."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memzoo.layers.graph_memory_upkeep import commit, join, maintain, set_temperature
from memzoo.layers.trace import Trace
from tests.layers.graph_memory_cases import (
    DIM,
    SLOTS,
    assert_close,
    buffers_of,
    build,
    few_cases,
    randn,
    run,
    statistics_of,
    written,
)
from tests.layers.graph_memory_upkeep_cases import Stack, cell_at, generator, orthogonal, unit_rows

# Commits


@given(seed=st.integers(0, 1000), momentum=st.sampled_from([-2.0, 1.0, 4.6]))
@few_cases
def test_13_a_commit_is_the_closed_form(seed, momentum):
    cell, x, stream = build(write_back="deferred"), randn(2, 7, DIM, seed=seed), randn(2, 7, DIM, seed=seed + 1)
    with torch.no_grad():
        cell.momentum.fill_(momentum)
    y, trace = run(cell, x, stream)
    expected = written(cell, stream + y, cell.route(x).source)
    cell.commit(trace.statistics)
    assert_close(buffers_of(cell), expected, 1e-12)
    assert_close(cell.centroids.norm(dim=-1), torch.ones(SLOTS, dtype=torch.float64), 1e-14)


def test_13_directions_are_written_where_they_are_asked_for():
    """As tokens are compared with centroids: whatever the block makes of them, however long they are."""
    cell, x = build(write_back="deferred", written="direction"), randn(2, 7, DIM)
    source = cell.route(x).source
    expected = written(cell, x / x.norm(dim=-1, keepdim=True), source)
    lengths = torch.rand(2, 7, 1, dtype=torch.float64) + 0.5
    cell.commit(statistics_of(cell, x * lengths))
    assert_close(buffers_of(cell), expected, 1e-12)


def test_13_without_a_stream_the_input_stands_in_for_it():
    cell, x = build(write_back="deferred"), randn(2, 7, DIM)
    y, trace = run(cell, x)
    expected = written(cell, x + y, cell.route(x).source)
    cell.commit(trace.statistics)
    assert_close(buffers_of(cell), expected, 1e-12)


def test_13_slots_without_tokens_keep_their_direction():
    cell = cell_at(orthogonal(), write_back="deferred", temperature=0.01)
    towards = cell.centroid_norm(cell.centroids).detach()[[0, 3]]
    before = cell.centroids.detach().clone()
    cell.commit(run(cell, towards.expand(4, 2, DIM))[1].statistics)
    moved = (cell.centroids - before).abs().amax(-1) > 1e-3
    assert moved.tolist() == [True, False, False, True, False]
    assert_close(cell.centroids[~moved], before[~moved], 1e-14)


def test_13_a_momentum_of_one_only_normalises():
    cell = build(write_back="deferred")
    with torch.no_grad():
        cell.momentum.fill_(math.inf)
    expected = cell.centroids / cell.centroids.norm(dim=-1, keepdim=True)
    cell.commit(run(cell, randn(2, 7, DIM))[1].statistics)
    assert_close(cell.centroids, expected, 1e-14)


def test_13_a_commit_uses_the_momentum_and_centroids_of_after_the_step():
    cell, x = build(write_back="deferred"), randn(2, 7, DIM)
    y, trace = run(cell, x)
    source = cell.route(x).source
    with torch.no_grad():
        cell.momentum.sub_(1)
        cell.centroids.mul_(2)
    expected = written(cell, x + y, source)
    cell.commit(trace.statistics)
    assert_close(buffers_of(cell), expected, 1e-12)


def test_13_without_write_back_usage_and_ages_advance_alone():
    cell, x = build(), randn(2, 7, DIM)
    y, trace = run(cell, x)
    expected = written(cell, x + y, cell.route(x).source) | {"centroids": cell.centroids.detach().clone()}
    cell.commit(trace.statistics)
    assert_close(buffers_of(cell), expected, 1e-12)


def test_13_a_commit_of_what_was_written_at_once_changes_nothing():
    model, x = Stack(write_back="reference"), randn(2, 7, DIM)
    statistics = statistics_of(model, x)
    before = copy.deepcopy(model.state_dict())
    commit(model, statistics)
    assert_close(model.state_dict(), before, 0)


def test_a_model_commits_to_each_cell_its_own():
    model, x = Stack(write_back="deferred"), randn(2, 7, DIM)
    statistics, expected = statistics_of(model, x), []
    for cell in model.cells:
        y = cell(x).detach()
        expected.append(written(cell, x + y, cell.route(x).source))
        x = x + y
    commit(model, statistics)
    for cell, values in zip(model.cells, expected, strict=True):
        assert_close(buffers_of(cell), values, 1e-12)


def test_a_cell_alone_is_a_model_too():
    cell, other, x = build(write_back="deferred"), build(write_back="deferred"), randn(2, 7, DIM)
    commit(cell, run(cell, x)[1].statistics)
    other.commit(run(other, x)[1].statistics)
    assert_close(buffers_of(cell), buffers_of(other), 0)


@pytest.mark.parametrize("cuts", [(2,), (1, 4)])
def test_micro_batches_joined_are_one_batch(cuts):
    x = randn(5, 7, DIM)
    whole, parts = Stack(write_back="deferred"), Stack(write_back="deferred")
    commit(whole, statistics_of(whole, x))
    pieces = [statistics_of(parts, piece) for piece in x.tensor_split(cuts)]
    joined = join(pieces)
    commit(parts, joined)
    assert_close(parts.state_dict(), whole.state_dict(), 1e-12)
    assert_close(joined["cells.1.states"], pieces[-1]["cells.1.states"], 0)
    assert joined["cells.0.tokens"] == 35


def test_joining_leaves_its_parts_as_they_were():
    model = Stack(write_back="deferred")
    parts = [statistics_of(model, randn(1, 4, DIM, seed=seed)) for seed in (1, 2)]
    before = copy.deepcopy(parts)
    join(parts)
    for part, old in zip(parts, before, strict=True):
        assert_close(part, old, 0)
    assert_close(join(parts[:1]), parts[0], 0)


@pytest.mark.parametrize("path", ["cells.0", "cells.1"])
@pytest.mark.parametrize("name", ["source_mass", "tokens", "write_sums", "write_counts"])
def test_statistics_that_are_missing_or_of_another_shape_are_refused_by_name(path, name):
    model, wrong = Stack(write_back="deferred"), f"{path}.{name}"
    statistics, before = statistics_of(model, randn(1, 4, DIM)), copy.deepcopy(model.state_dict())
    missing = {path: value for path, value in statistics.items() if path != wrong}
    with pytest.raises(ValueError, match=wrong):
        commit(model, missing)
    with pytest.raises(ValueError, match=wrong):
        commit(model, statistics | {wrong: torch.zeros(3, 2)})
    assert_close(model.state_dict(), before, 0)


def test_a_wrapped_model_commits_what_it_reported():
    model, x = Stack(write_back="deferred"), randn(2, 4, DIM)
    statistics, parallel = statistics_of(model, x), nn.Module()
    parallel.module = torch.compile(model, backend="eager")
    parallel.module._orig_mod.cells[1].compile(backend="eager")
    commit(parallel, statistics)
    commit(torch.compile(parallel, backend="eager"), statistics)
    assert all((cell.age == 2).all() for cell in model.cells)
    bare = nn.Module()
    bare.module = build(write_back="deferred")
    commit(bare, statistics_of(bare.module, x))
    assert (bare.module.age == 1).all()
    assert maintain(parallel, statistics, generator()) == {"reset": 0, "merged": 0}


def test_13_without_momentum_slots_without_tokens_and_with_infinite_ones_keep_their_direction():
    cell, x = build(write_back="deferred", momentum_init=-math.inf), randn(1, 1, DIM)
    statistics = statistics_of(cell, x)
    before = nn.functional.normalize(cell.centroids.detach(), dim=-1)
    taken = int(statistics["write_counts"].argmax())
    with torch.no_grad():
        cell.momentum.fill_(-math.inf)
    cell.commit(statistics)
    left = torch.arange(SLOTS) != taken
    assert_close(cell.centroids[left], before[left], 1e-12)
    cell.commit(statistics | {"write_sums": statistics["write_sums"] / 0})
    assert cell.centroids.isfinite().all()


def test_tokens_without_a_direction_seed_nothing():
    cell, states = cell_at(orthogonal(), usage=[0.0, 0.25, 0.25, 0.25, 0.25]), randn(4, DIM)
    states[0], states[1], states[2] = 0, math.inf, math.nan
    assert cell.maintain(states, generator()) == {"reset": 1, "merged": 0}
    assert_close(cell.centroids[0], nn.functional.normalize(states[3], dim=0))


def test_slots_are_seeded_with_different_tokens_where_there_are_enough():
    cell = cell_at(unit_rows(8), usage=[0.0] * 4 + [0.25] * 4)
    cell.maintain(unit_rows(4, seed=9).repeat(3, 1), generator())
    assert len({tuple(row.tolist()) for row in cell.centroids[:4]}) == 4


def test_a_commit_leaves_no_gradient_and_training_goes_on():
    model = Stack(write_back="deferred")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in (1, 2):
        trace = Trace(signals=False)
        (model(randn(1, 4, DIM, seed=seed), trace=trace).square().mean() + sum(trace.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        commit(model, trace.statistics)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert model.cells[0].age.tolist() == [2] * SLOTS


def test_the_temperature_of_all_cells_is_set_at_once():
    model = Stack()
    set_temperature(model, 0.25)
    assert [cell.temperature.item() for cell in model.cells] == [0.25, 0.25]
    assert_close(model.cells[0](randn(1, 4, DIM)), build(temperature=0.25)(randn(1, 4, DIM)), 0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature="):
        set_temperature(Stack(), temperature)


def test_a_model_without_cells_is_refused():
    model = nn.Linear(2, 2)
    for call in (
        lambda: set_temperature(model, 1.0),
        lambda: commit(model, {}),
        lambda: maintain(model, {}, generator()),
    ):
        with pytest.raises(ValueError, match="GraphMemoryCell"):
            call()
