"""The benchmarks of the bottleneck: what is compared does the same job."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = dict(BATCH=5, DIM=12, CODEBOOKS=4, PAIRS=9, DIM_KEY=3, CACHED_SAMPLES=7)


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    module = import_module("benchmark_cases.bottleneck")
    for name, size in SMALL.items():
        monkeypatch.setattr(module, name, size)
    yield module
    sys.path.remove(str(SCRIPTS))


def test_every_variant_runs(case):
    for one in case.CASES:
        for variant in one.variants:
            if variant.missing is None:
                variant.build()()
        assert set(one.targets) | set(one.most_memory) <= {variant.name for variant in one.variants}


def test_both_lookups_find_the_same(case):
    torch.manual_seed(0)
    indices, _ = case.lookup()()
    torch.manual_seed(0)
    assert torch.equal(case.full_lookup()().T, indices[..., 0])


def test_a_cached_step_trains_the_values_and_nothing_else(case, monkeypatch):
    built = []
    monkeypatch.setattr(case, "bottleneck", lambda make=case.bottleneck: built.append(make()) or built[-1])
    work = case.learn(True)
    keys = built[0].keys.clone()
    work()
    assert torch.equal(built[0].keys, keys)
    assert built[0].values.any()


def test_the_peer_has_as_many_numbers(case):
    pytest.importorskip(case.PACKAGE)
    ours, theirs = case.bottleneck(), case.peer()
    assert theirs.values.shape == ours.values.shape
    assert theirs.vq._codebook.embed.shape == ours.keys.shape
    assert theirs.rand_proj.shape == ours.projection.shape
    assert not list(theirs.vq.project_in.parameters())


def test_without_its_option_the_peer_s_keys_are_as_wide_as_all_heads(case):
    from_peer = pytest.importorskip(case.PACKAGE)
    wide = from_peer.DiscreteKeyValueBottleneck(dim=3, dim_embed=12, num_memories=9, num_memory_codebooks=4)
    assert wide.vq._codebook.embed.shape == (4, 9, 12)
