"""Keys: running means as in the published code and as they should be, revival, and the stages of a bottleneck."""

import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
from memzoo.layers.key_initialization import KeyStatistics, ema_update, find_keys, sample_heads
from memzoo.layers.reference.discrete_key_value_bottleneck import key_step
from tests.layers.dkvb_cases import DIM, SIZES, build, draw, same_tensors

LIKE = torch.zeros(3, 5, 2, dtype=torch.float64)
METHODS = ["ema", "ema_official", "sample", "kmeans", "random"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(pairs: int = 5, *, consistent: bool = True) -> KeyStatistics:
    keys = draw(3, pairs, 2, seed=5)
    counts = torch.ones_like(keys[..., 0]) if consistent else torch.zeros_like(keys[..., 0])
    return KeyStatistics(keys, counts, keys.clone())


def find(batches: list[Tensor], method: Any, like: Tensor = LIKE, **options: Any) -> Tensor:
    return find_keys(lambda: batches, like, method=method, **{"epochs": 2, "decay": 0.9, "seed": 0} | options)


@pytest.mark.parametrize("consistent", [True, False])
def test_06_one_update_is_the_formula(consistent: bool) -> None:
    """In one dimension, in NumPy."""
    keys, counts = np.array([0.0, 1.0, 10.0]), np.ones(3) if consistent else np.zeros(3)
    heads, decay, eps = np.array([0.2, -0.4, 0.9, 1.3, 0.8]), 0.95, 1e-5
    n, m = np.array([2.0, 3.0, 0.0]), np.array([0.2 - 0.4, 0.9 + 1.3 + 0.8, 0.0])
    N, M = decay * counts + (1 - decay) * n, decay * keys + (1 - decay) * m
    S = (N + eps) / (N.sum() + 3 * eps) * N.sum()
    column = torch.from_numpy(keys).view(1, 3, 1)
    state = KeyStatistics(column.clone(), torch.from_numpy(counts).view(1, 3).clone(), column.clone())
    rows = torch.from_numpy(heads).view(5, 1, 1)
    ema_update(state, rows, decay, seeded(), consistent=consistent, revival=0)
    np.testing.assert_allclose(state.counts[0], N, atol=1e-6)
    np.testing.assert_allclose(state.sums[0, :, 0], M, atol=1e-6)
    np.testing.assert_allclose(state.keys[0, :, 0], M / S, rtol=1e-6)
    assert (abs(state.keys[0, 2, 0]) > 1e4) == (not consistent)  # a key without a head


@pytest.mark.parametrize("consistent", [True, False])
def test_06_several_updates_are_the_loops(consistent: bool) -> None:
    state = start(consistent=consistent)
    expected, generator = (state.keys, state.counts, state.sums), seeded(3)
    for step in range(6):
        heads = draw(9, 3, 2, seed=step)
        dead: list[tuple[int, int]] = []
        key_step(*expected, heads, 0.8, consistent=consistent, draw=lambda c, j, dead=dead: dead.append((c, j)) or 0)
        rows = torch.randint(9, (len(dead),), generator=generator).tolist() if dead else []
        drawn = dict(zip(dead, rows, strict=True))
        expected = key_step(*expected, heads, 0.8, consistent=consistent, draw=lambda c, j, d=drawn: d[c, j])
        if step == 0:
            own, twin = state, KeyStatistics(state.keys.clone(), state.counts.clone(), state.sums.clone())
            state, random = twin, seeded(3)
            assert own is not twin
        ema_update(state, heads, 0.8, random, consistent=consistent)
        for actual, wanted in zip((state.keys, state.counts, state.sums), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


def test_06_without_memory_keys_are_means_of_the_batch() -> None:
    state, heads = start(consistent=False), draw(40, 3, 2)
    before = state.keys.clone()
    ema_update(state, heads, 0.0, seeded(), consistent=False, eps=1e-12, revival=0)
    nearest = (heads[:, :, None] - before).square().sum(-1).argmin(-1)
    for c in range(3):
        for j in nearest[:, c].unique():
            torch.testing.assert_close(state.keys[c, j], heads[nearest[:, c] == j, c].mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("consistent", [True, False])
def test_07_keys_without_heads_move_to_heads_and_others_do_not(consistent: bool) -> None:
    one, two = start(30, consistent=consistent), start(30, consistent=consistent)
    heads, revival = draw(20, 3, 2), 1.5
    ema_update(one, heads, 0.2, seeded(), consistent=consistent, revival=revival)
    ema_update(two, heads, 0.2, seeded(), consistent=consistent, revival=0)
    threshold = revival * 20 / 30
    dead = two.counts < threshold
    assert 0 < dead.sum() < 90
    assert torch.equal(one.keys[~dead], two.keys[~dead])
    for c, j in dead.nonzero().tolist():
        assert (heads[:, c] == one.keys[c, j]).all(1).any()
    if consistent:
        assert (one.counts[dead] == threshold).all()
        torch.testing.assert_close(one.sums[dead], threshold * one.keys[dead])
    else:
        assert torch.equal(one.counts, two.counts)
        assert torch.equal(one.sums, two.sums)


def test_07_by_default_a_key_is_revived_below_a_tenth_of_its_share() -> None:
    state = start(10)
    state.counts[:] = torch.tensor([0.09, 0.11]).repeat(5)
    ema_update(state, draw(10, 3, 2) + 1000, 1 - 1e-12, seeded())  # tau is 0.1
    assert torch.equal((state.keys > 900).any(-1), torch.tensor([True, False] * 5).expand(3, -1))


def test_a_sample_is_of_different_heads_and_of_all_batches_alike() -> None:
    batches = [draw(7, 3, 2, seed=seed) for seed in range(6)]
    every = torch.cat(batches)
    hits = torch.zeros(42)
    for seed in range(150):
        for c, own in enumerate(sample_heads(batches, LIKE, seeded(seed))):
            rows = [int((every[:, c] == key).all(1).nonzero()) for key in own]
            assert len(set(rows)) == 5
            hits[rows] += 1
    expected = 150 * 3 * 5 / 42
    assert (hits - expected).abs().max() < 5 * math.sqrt(expected)
    few = sample_heads([every[:2]], LIKE, seeded())
    for c in range(3):
        assert (few[c][:, None] == every[None, :2, c]).all(-1).any(0).all()
    with pytest.raises(ValueError, match="no vector"):
        sample_heads([], LIKE, seeded())


@pytest.mark.parametrize("method", ["ema", "kmeans"])
def test_clusters_get_a_key_each(method: str) -> None:
    if method == "kmeans":
        pytest.importorskip("sklearn")
    centres = torch.tensor([[0.0, 0], [40, 0], [0, 40], [40, 40], [80, 0]], dtype=torch.float64)
    labels = torch.arange(200) % 5
    heads = centres[labels][:, None].expand(-1, 3, -1) + 0.1 * draw(200, 3, 2)
    keys = find([heads[:100], heads[100:]], method, torch.zeros(3, 10, 2, dtype=torch.float64), epochs=20)
    assert (torch.cdist(centres.expand(3, -1, -1), keys).amin(2) < 1).all()
    if method == "kmeans":
        exact = find([heads], method, epochs=50)
        means = torch.stack([heads[labels == own].mean(0) for own in range(5)], 1)
        assert torch.cdist(exact, means).amin(2).max() < 1e-6
        with pytest.raises(ValueError, match="4 heads for num_pairs=5"):
            find([heads[:4]], method)


def test_statistics_that_agree_use_all_keys_sooner() -> None:
    """After one pass the published start has lost most keys: they were at M / eps, of which one is nearest to all."""
    batches, used = [draw(64, 3, 2, seed=seed) for seed in range(4)], {}
    like = torch.zeros(3, 32, 2, dtype=torch.float64)
    for method in ("ema", "ema_official"):
        keys = find(batches, method, like, epochs=1, decay=0.95)
        distance = torch.cdist(torch.cat(batches).transpose(0, 1), keys)
        used[method] = sum(len(own.unique()) for own in distance.argmin(2)) / 96
    assert used["ema"] > used["ema_official"] + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_13_stages_go_one_way(method: Any) -> None:
    if method == "kmeans":
        pytest.importorskip("sklearn")
    bottleneck, z = build(frozen=False), draw(30, 2, DIM)
    for call in (bottleneck, bottleneck.lookup):
        with pytest.raises(ValueError, match="stage=0: the keys are not initialised"):
            call(z)
    assert bottleneck.stage == 0
    stages = []

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            stages.append(bottleneck.stage)
            return iter([z[:20], z[20:, 0]])

    bottleneck.initialize_keys(Batches(), method=method, epochs=2)
    assert set(stages) <= {1}
    assert (bottleneck.stage, len(stages)) == (2, {"ema": 3, "ema_official": 2, "random": 0}.get(method, 1))
    assert bottleneck.lookup(z).shape == (30, 6, 1, 2)
    before, bottleneck.usage[0, 0] = bottleneck.keys.clone(), 7
    with pytest.raises(ValueError, match="force=False, and the keys are frozen"):
        bottleneck.initialize_keys([z], method=method)
    assert torch.equal(bottleneck.keys, before)
    bottleneck.initialize_keys([z], method=method, seed=1, force=True)
    assert not torch.equal(bottleneck.keys, before)
    assert not bottleneck.usage.any()


@pytest.mark.parametrize("method", METHODS)
def test_13_keys_depend_on_the_seed_alone_and_not_on_labels(method: Any) -> None:
    if method == "kmeans":
        pytest.importorskip("sklearn")
    z, found = draw(30, DIM), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        bottleneck = build(frozen=False)
        bottleneck.initialize_keys([z], method=method, epochs=3, seed=seed)
        found.append(bottleneck.keys)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match=r"batches holds a tuple; it must hold tensors .*without labels"):
        build(frozen=False).initialize_keys([(z, torch.arange(30))], method="sample")


def test_13_keys_may_be_taken_as_they_are() -> None:
    bottleneck, z = build(frozen=False, allow_random_keys=True), draw(4, DIM)
    random = bottleneck.lookup(z)
    assert bottleneck.stage == 0
    bottleneck.freeze_keys()
    assert bottleneck.stage == 2
    assert torch.equal(bottleneck.lookup(z), random)
    bottleneck.usage += 3
    bottleneck.freeze_keys()
    assert (bottleneck.usage == 3).all()
    bottleneck = build(frozen=False, standardize=True)
    with pytest.raises(ValueError, match=r"standardize=True, and shift and scale .* call initialize_keys"):
        bottleneck.freeze_keys()
    assert bottleneck.stage == 0
    bottleneck.get_buffer("scale").fill_(2)
    bottleneck.freeze_keys()
    assert bottleneck.stage == 2


def test_13_what_fails_leaves_the_bottleneck_as_it_was() -> None:
    bottleneck = build(frozen=False, standardize=True)
    before = {name: tensor.clone() for name, tensor in bottleneck.state_dict().items()}
    z = draw(30, DIM)
    for batches, options, words in (
        ([z, z[:, 1:]], {}, r"batches has shape \(30, 17\)"),
        ([z.long()], {}, "batches has dtype torch.int64"),
        (iter([z]), {}, "batches=list_iterator can be gone through once"),
        ([], {}, "batches hold no vector"),
        ([z], {"method": "means"}, "method='means'.*did you mean 'kmeans'"),
        ([z], {"epochs": 0}, "epochs=0"),
        ([z], {"decay": 1.0}, "decay=1.0 keeps keys"),
        ([z], {"decay": -0.1}, "decay=-0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            bottleneck.initialize_keys(batches, **options)
        assert same_tensors(dict(bottleneck.state_dict()), before)


def test_standardised_inputs_have_mean_zero_and_deviation_one() -> None:
    bottleneck, z = build(frozen=False, standardize=True), 5 + 3 * draw(100, 2, DIM)
    z[..., 4] = 2.0  # never changes
    bottleneck.initialize_keys([z[:70], z[70:]], epochs=2)
    rows = z.flatten(0, 1)
    torch.testing.assert_close(bottleneck.shift, rows.mean(0))
    scale = rows.std(0, correction=0)
    scale[4] = 1.0
    torch.testing.assert_close(bottleneck.scale, scale)
    plain = build(frozen=False)
    plain.initialize_keys([(z - bottleneck.shift) / bottleneck.scale], method="random")
    plain.keys.copy_(bottleneck.keys)
    assert torch.equal(plain.lookup((z - bottleneck.shift) / bottleneck.scale), bottleneck.lookup(z))


def revived(rank: int | None) -> KeyStatistics:
    """After an update of a rank with half of the data, or with all of it, that moves some keys."""
    state, heads = start(30), draw(20, 3, 2)
    ema_update(state, heads if rank is None else heads[rank::2], 0.2, seeded(), revival=1.5)
    return state


def _rank(rank: int, port: int, path: str) -> None:
    """One of two processes, with half of the data."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    bottleneck, z = build().train(), draw(7, 2, DIM)
    for _ in range(2):
        bottleneck(z[:3] if rank else z[3:], mask=torch.tensor([[True, False]]).expand(3 if rank else 4, -1))
    found["usage"] = bottleneck.usage
    state = start()
    for step in range(3):
        ema_update(state, draw(20, 3, 2, seed=step)[rank::2], 0.8, seeded(), revival=0)
    found["updates"], found["revived"] = state.keys, revived(rank).counts
    for method in ("ema", "ema_official", "sample", "random"):
        torch.manual_seed(rank)
        bottleneck = DiscreteKeyValueBottleneck(DIM, **SIZES, standardize=True).double()
        assert bottleneck.projection is not None
        bottleneck.projection.copy_(draw(6, DIM, 3))
        batches = [draw(40, DIM, seed=seed)[rank::2] for seed in range(3)]
        bottleneck.initialize_keys(batches, method=method, epochs=2)
        found[method], found["shift"] = bottleneck.keys, bottleneck.shift
    torch.save(found, f"{path}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo by fork")
def test_ranks_agree_on_keys_and_usage_and_their_updates_are_those_of_all_data(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert same_tensors(one, two)
    state = start()
    for step in range(3):
        ema_update(state, draw(20, 3, 2, seed=step), 0.8, seeded(), revival=0)
    torch.testing.assert_close(one["updates"], state.keys)
    bottleneck = build().train()
    for _ in range(2):
        bottleneck(draw(7, 2, DIM)[:, 0])
    assert torch.equal(one["usage"], bottleneck.usage)
    torch.testing.assert_close(one["revived"], revived(None).counts)
    every = torch.cat([draw(40, DIM, seed=seed) for seed in range(3)])
    torch.testing.assert_close(one["shift"], every.mean(0))
