"""Caches of blocks: what stays, what goes, whose memory it is."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from memzoo.layers.banks.cache import BlockCache, CopyCache
from memzoo.layers.banks.layout import BankLayout, Node

LAYOUT = BankLayout(2, 8, (2, 1), branching=4, dtype=torch.float32)
BLOCK = LAYOUT.block_bytes(1)


def fill(node: Node, block: Tensor) -> None:
    block.fill_(10 * node.level + node.node)


def cache(capacity: int, read: Callable[[Node, Tensor], None] = fill) -> BlockCache:
    return BlockCache(LAYOUT, read, {1: capacity * BLOCK + 5, 2: BLOCK})


def test_the_block_used_last_stays() -> None:
    blocks = cache(2)
    for node in (0, 1, 0, 2, 0):
        assert (blocks.get(Node(1, node)) == 10 + node).all()
    assert blocks.cached[1] == (2, 0)
    seen = blocks.statistics
    assert (seen.hits[1], seen.misses[1], seen.evictions[1]) == (2, 3, 1)
    assert seen.bytes_read == 3 * BLOCK
    assert blocks.nbytes == 2 * BLOCK


def test_levels_do_not_push_each_other_out() -> None:
    blocks = cache(2)
    blocks.get(Node(1, 0))
    for node in range(8):
        blocks.get(Node(2, node))
    assert blocks.cached[1] == (0,)
    assert len(blocks.cached[2]) == blocks.capacity[2] == 2


def test_a_block_in_use_is_not_overwritten_when_it_is_evicted() -> None:
    blocks = cache(1)
    held = blocks.get(Node(1, 0))
    views = [held[0].view(-1)[3:5]]
    for node in (1, 2, 3):
        blocks.get(Node(1, node))
    assert (held == 10).all()
    assert blocks.nbytes == 2 * BLOCK
    del held
    blocks.get(Node(1, 1))
    assert (views[0] == 10).all()
    views.clear()
    gc.collect()
    assert blocks.nbytes == BLOCK


def test_memory_stays_within_the_budget_however_many_blocks_are_read() -> None:
    blocks = cache(3)
    for node in list(range(4)) * 5:
        blocks.get(Node(1, node))
    assert blocks.nbytes <= 3 * BLOCK


def test_without_budget_nothing_is_kept() -> None:
    blocks = BlockCache(LAYOUT, fill, 0)
    assert (blocks.get(Node(1, 1)) == 11).all()
    assert blocks.cached == {1: (), 2: ()}
    assert blocks.nbytes == 0


def test_one_budget_is_shared_out_from_the_coarsest_level() -> None:
    whole = [LAYOUT.block_bytes(level) * (LAYOUT.num_nodes(level) + 1) for level in (1, 2)]
    assert BlockCache(LAYOUT, fill, 4 * sum(whole)).capacity[1] == 5
    assert BlockCache(LAYOUT, fill, sum(whole)).capacity == {1: 5, 2: 17}, "a budget as large as the bank holds it"
    assert BlockCache(LAYOUT, fill, 4 * BLOCK).capacity == {1: 2, 2: 4}


def test_a_block_that_several_threads_want_is_read_once() -> None:
    go, reads = threading.Event(), []

    def slowly(node: Node, block: Tensor) -> None:
        reads.append(node)
        assert go.wait(10)
        fill(node, block)

    blocks = cache(2, slowly)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(blocks.get, Node(1, 3)) for _ in range(4)]
        go.set()
        assert all((future.result() == 13).all() for future in found)
    assert reads == [Node(1, 3)]


def test_what_changes_while_it_is_read_is_not_kept() -> None:
    blocks: BlockCache

    def changing(node: Node, block: Tensor) -> None:
        fill(node, block)
        blocks.drop([node])

    blocks = cache(2, changing)
    blocks.get(Node(1, 0))
    assert blocks.cached[1] == ()


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    fails = [True]

    def read(node: Node, block: Tensor) -> None:
        if fails.pop():
            raise OSError("the disk is gone")
        fill(node, block)

    blocks = cache(2, read)
    with pytest.raises(OSError, match="the disk is gone"):
        blocks.get(Node(1, 0))
    fails.append(False)
    assert (blocks.get(Node(1, 0)) == 10).all()
    assert blocks.statistics.misses[1] == 1


def test_copies_stay_within_their_budget() -> None:
    block, made = torch.ones(4), []

    def read() -> Tensor:
        made.append(1)
        return block

    copies = CopyCache(3 * 32)
    cpu = torch.device("cpu")
    for node in (0, 1, 2, 0, 3, 0, 1):
        copy = copies.get(Node(1, node), read, cpu, torch.float64)
        assert copy.dtype == torch.float64
    assert copies.nbytes == 3 * 32
    assert len(made) == 5  # 1 had to go for 3
    assert copies.get(Node(1, 0), read, cpu, torch.float32) is block
    copies.drop([Node(1, 0), Node(1, 1)])
    assert copies.nbytes == 32
