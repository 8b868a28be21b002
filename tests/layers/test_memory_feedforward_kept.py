"""MemoryFeedForward in evaluation, "concat": what is kept from call to call, and when it is made anew."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import MemoryFeedForward
from memzoo.layers.banks.fetched import LayerMemories
from memzoo.layers.reference import memory_blocks as loop
from tests.layers.memory_feedforward_cases import EXACT, HIDDEN, MIXED, fetch, layer, tokens


def kept_layer() -> tuple[MemoryFeedForward, Tensor, LayerMemories]:
    module, x, memories = layer(mode="concat").eval(), tokens(), fetch().layers()[0]
    with torch.no_grad():
        module(x, memories)
    assert module._kept is not None
    return module, x, memories


@torch.no_grad()
def test_changes_of_weights_and_blocks_are_seen():
    module, x, memories = kept_layer()

    def check(memories: LayerMemories) -> None:
        expected = module.ffn(x) + loop.memory_feed_forward(x, memories)
        torch.testing.assert_close(module(x, memories), expected, **EXACT)

    for weight in module.ffn.parameters():
        weight.mul_(1.5)
        check(memories)
    module.ffn.up.weight = nn.Parameter(torch.randn_like(module.ffn.up.weight))
    check(memories)
    for group in memories.groups:
        group.slabs[-1].add_(1.0)
        check(memories)
    check(fetch(seed=1).layers()[0])
    check(fetch(seed=2, rows=(9, 0, 4)).layers()[0])
    check(memories)


@pytest.mark.parametrize("read", ["shared", "mixed", "none"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_step_which_raises_no_version_is_seen_in_evaluation_too(read, optimizer):
    module, x, memories = kept_layer()
    blocks = fetch().blocks  # other tensors, of equal numbers
    given = {"shared": memories, "mixed": fetch(MIXED).layers()[0], "none": None}[read]
    module(x, given).square().sum().backward()
    optimizer(module.parameters(), lr=1e-3, fused=True).step()
    with torch.no_grad():
        expected = module.ffn(x) + loop.memory_feed_forward(x, memories)
        torch.testing.assert_close(module(x, memories), expected, **EXACT)
    trained = replace(fetch(), blocks=tuple(block.clone().requires_grad_() for block in blocks)).layers()[0]
    with torch.no_grad():
        module(x, trained)
    module(x, trained).square().sum().backward()
    leaves = [group.slabs[0]._base for group in trained.groups]
    optimizer(leaves, lr=1e-3, fused=True).step()
    with torch.no_grad():
        expected = module.ffn(x) + loop.memory_feed_forward(x, trained)
        torch.testing.assert_close(module(x, trained), expected, **EXACT)


@torch.no_grad()
def test_a_changed_level_is_copied_alone():
    module, x, memories = kept_layer()
    kept = module._kept
    kept.wide[0].fill_(torch.nan)  # what is not copied again stays so
    other = fetch(seed=3).layers()[0]
    module(x, replace(memories, groups=(*memories.groups[:2], other.groups[2])))
    assert module._kept is kept
    written = kept.wide[0].isfinite().all(1)
    assert written.tolist() == [False] * (HIDDEN + 5) + [True]


@torch.no_grad()
def test_what_is_kept_keeps_no_block_alive():
    module, x, memories = kept_layer()
    fetched = fetch(seed=4)
    module(x, fetched.layers()[0])
    alive = [weakref.ref(block) for block in fetched.blocks]
    del fetched
    gc.collect()
    assert [block() for block in alive] == [None] * 3
    expected = module.ffn(x) + loop.memory_feed_forward(x, memories)
    torch.testing.assert_close(module(x, memories), expected, **EXACT)


def test_it_is_no_part_of_checkpoints_and_copies_and_is_dropped_by_moves_and_modes():
    module, x, memories = kept_layer()
    assert module.state_dict().keys() == {f"ffn.{name}" for name in module.ffn.state_dict()}
    with torch.no_grad():
        for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert same._kept is None
            assert torch.equal(same(x, memories), module(x, memories))
    for drop in (module.train, module.eval, module.float, lambda: module.double()(x, memories)):
        module.eval().double()
        with torch.no_grad():
            module(x, memories)
        assert module._kept is not None
        drop()
        assert module._kept is None


def test_inference_mode_and_no_grad_may_take_turns():
    module, x, memories = kept_layer()
    other = fetch(seed=1).layers()[0]
    with torch.inference_mode():
        module._kept = None
        first = module(x, memories)
        inside = fetch(seed=2).layers()[0]  # blocks that do not count their changes
        expected = module.ffn(x) + loop.memory_feed_forward(x, inside)
        torch.testing.assert_close(module(x, inside), expected, **EXACT)
        module(x, memories)
    with torch.no_grad():
        module(x, other)
        assert torch.equal(module(x, memories), first)
