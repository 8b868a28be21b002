"""What a model says with a bank behind it: spec section 16, checks 9 and 11, in logits."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.arch import HierarchicalMemoryLM
from memzoo.layers import MemoryBank, Node
from tests.layers.banks import bank_cases as cases

ROWS = 6


def small() -> HierarchicalMemoryLM:
    torch.manual_seed(0)
    return HierarchicalMemoryLM(32, 8, 2, num_heads=2, hidden_dim=12).eval()


def tokens() -> Tensor:
    return torch.randint(32, (ROWS, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(bank: MemoryBank, paths: Tensor) -> Tensor:
    return small()(tokens(), memories=bank.fetch(paths))[0]


@pytest.fixture(params=["ram", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryBank]:
    with cases.filled(tmp_path / "bank" if request.param == "disk" else None) as bank:
        yield bank


def _read(path: Path, results: Any) -> None:
    with MemoryBank.open(path, read_only=True) as bank:
        results.put(logits(bank, bank.route(cases.embeddings(ROWS))).numpy())


def test_09_logits_with_a_bank_on_disk_are_those_with_one_in_memory(tmp_path: Path) -> None:
    """Whatever had to leave the cache, with prefetching, and in another process."""
    memory = cases.filled()
    with cases.filled(tmp_path / "bank", cache_bytes=800) as disk:
        for seed in range(4):
            paths = memory.route(cases.embeddings(ROWS, seed))
            disk.prefetch(paths)
            assert torch.equal(logits(disk, paths), logits(memory, paths))
        assert disk.statistics is not None
        assert sum(disk.statistics.evictions.values()) > 0
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_read, args=(tmp_path / "bank", results))
    process.start()
    elsewhere = torch.from_numpy(results.get(timeout=120))
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(elsewhere, logits(memory, memory.route(cases.embeddings(ROWS))))


@pytest.mark.parametrize("change", ["block", "delete"])
def test_11_closing_a_node_is_seen_by_the_contexts_through_it_alone(bank: MemoryBank, change: str) -> None:
    paths = bank.route(cases.embeddings(ROWS))
    before = logits(bank, paths)
    node = Node(2, int(paths[0, 1]))
    through = paths[:, 1] == node.node
    assert 0 < through.sum() < ROWS
    with torch.no_grad():
        fetched = bank.fetch(paths)
        whole = {own: block for own, block in zip(fetched.nodes, fetched.blocks, strict=True) if own != node}
        missing = small()(tokens(), memories=type(fetched).of(bank.layout, paths, whole.get))[0]
    getattr(bank, change)(*node)
    after = logits(bank, paths)
    assert torch.equal(after[~through], before[~through])
    assert torch.equal(after[through], missing[through])
    assert not torch.equal(after[through], before[through])
    if change == "block":
        bank.unblock(*node)
        assert torch.equal(logits(bank, paths), before)
