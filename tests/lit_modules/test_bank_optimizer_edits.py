"""BankAdamW beside others that write to its bank, steps that fail, and what it is given or asked to be."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memzoo.layers.banks.layout import Node
from memzoo.layers.memory_bank import MemoryBank
from memzoo.lit_modules.bank_optimizer import BankAdamW
from tests.lit_modules.test_bank_optimizer import anchor, bank, blocks, loss_of, moved, pull, rows, to_leaves, train


def stored(optimizer: BankAdamW) -> dict:
    return optimizer.state_dict()["memory"]["blocks"]


def kept(optimizer: BankAdamW) -> dict[Node, torch.Tensor]:
    """Return the masters, in the dtype of the bank."""
    found = {Node(*map(int, name.split("."))): own["master"] for name, own in stored(optimizer).items()}
    return {node: master.to(optimizer.bank.layout.dtype) for node, master in found.items()}


@pytest.fixture(params=["memory", "disk"])
def own(request, tmp_path):
    with bank(None if request.param == "memory" else tmp_path / "bank", dtype=torch.bfloat16) as made:
        yield made


# Blocks that others change


def test_a_deleted_block_does_not_come_back(own):
    model, optimizer = anchor(), BankAdamW([], own, lr=0.1)
    train(model, optimizer, [0, 3])
    own.delete(1, 0, subtree=True)
    assert optimizer.touched == [Node(1, 1), Node(2, 3)] == sorted(kept(optimizer))
    child = own.add_child(0, 0, torch.full((4,), 0.5))
    assert child == Node(1, 0)
    memories = optimizer.fetch(to_leaves([0]))
    for node, block in zip(memories.nodes, memories.blocks, strict=True):
        assert torch.equal(block.detach(), own.layout.initial_block(node, 0).to(torch.bfloat16).float())
    train(model, optimizer, [0])
    assert all(int(stored(optimizer)[name]["step"]) == 1 for name in ("1.0", "2.0"))


def test_a_place_that_was_deleted_and_opened_again_unseen_begins_anew(own):
    model, optimizer = anchor(), BankAdamW([], own, lr=0.1)
    for step in range(2):
        train(model, optimizer, [0], seed=step)
    own.delete(1, 0, subtree=True)
    own.add_child(0, 0, torch.full((4,), 0.5))
    train(model, optimizer, [0])
    alone = bank(dtype=torch.bfloat16)
    train(anchor(), BankAdamW([], alone, lr=0.1), [0])
    torch.testing.assert_close(blocks(own), blocks(alone), rtol=0, atol=0)


def test_what_others_put_is_the_new_master_and_its_moments_start_afresh(own):
    model, optimizer = anchor(), BankAdamW([], own, lr=0.1)
    for step in range(2):
        train(model, optimizer, [0], seed=step)
    given = torch.randn(own.layout.block_shape(1), generator=torch.Generator().manual_seed(1))
    own.put({Node(1, 0): given})
    assert torch.equal(kept(optimizer)[Node(1, 0)], given.bfloat16())
    pull(optimizer.fetch(to_leaves([0])).blocks[0], seed=3)
    optimizer.step()
    parameter = nn.Parameter(given.bfloat16().float())
    pull(parameter, seed=3)
    torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95)).step()
    assert torch.equal(stored(optimizer)["1.0"]["master"], parameter.detach())
    assert int(stored(optimizer)["2.0"]["step"]) == 2


@pytest.mark.parametrize("change", ["commit", "own commit", "block", "put the same"])
def test_masters_and_moments_go_on_where_the_contents_are_the_same(change, own):
    def run(own: MemoryBank, *, changes: bool) -> BankAdamW:
        model, optimizer = anchor(), BankAdamW([], own, lr=1e-3)
        for step in range(3):
            train(model, optimizer, [0, 3], seed=step)
            if changes and change == "block":
                own.block(1, 0)
                own.unblock(1, 0)
            elif changes and change == "put the same":
                own.put({node: own.block_of(*node).clone() for node in own.written()})
            elif changes:
                {"commit": own.commit, "own commit": optimizer.commit}[change]()
        return optimizer

    torch.testing.assert_close(
        stored(run(own, changes=True)), stored(run(bank(dtype=torch.bfloat16), changes=False)), rtol=0, atol=0
    )


def test_committed_by_the_optimiser_its_blocks_are_not_read_again(tmp_path):
    own = bank(tmp_path / "bank")
    optimizer = BankAdamW([], own, lr=0.1)
    train(anchor(), optimizer, [0])
    optimizer.commit()
    own.close()  # so that nothing can be read
    assert sorted(stored(optimizer)) == ["1.0", "2.0"]


@pytest.mark.parametrize("change", ["delete", "put"])
def test_a_gradient_of_what_a_block_was_before_is_dropped(change, own):
    model, optimizer = anchor(), BankAdamW([], own, lr=0.1)
    for trained in (0, 1):  # a fresh block, then one that was trained
        if trained:
            train(model, optimizer, [2])
        memories = optimizer.fetch(to_leaves([0, 2]))
        loss_of(model, rows(2), memories).backward()
        target = Node(1, trained)
        if change == "delete":
            own.delete(*target)
        else:
            own.put({target: torch.ones(own.layout.block_shape(1))})
        before = None if change == "delete" else own.block_of(*target).clone()
        optimizer.step()
        assert before is None or torch.equal(own.block_of(*target), before)
        assert all(torch.equal(master, own.block_of(*node)) for node, master in kept(optimizer).items())
        assert {Node(2, 0), Node(2, 2)} <= set(optimizer.touched)
        assert change == "put" or target not in optimizer.touched


def test_a_state_goes_on_without_the_nodes_that_were_deleted(own):
    model, optimizer = anchor(), BankAdamW([], own, lr=0.1)
    train(model, optimizer, [0, 3])
    state = copy.deepcopy(optimizer.state_dict())
    own.delete(1, 0)
    resumed = BankAdamW([], own, lr=0.1)
    resumed.load_state_dict(state)
    assert resumed.touched == [Node(1, 1), Node(2, 0), Node(2, 3)]
    for each in (optimizer, resumed):
        train(anchor(), each, [0])
    own.delete(1, 0, subtree=True)
    own.add_child(0, 0, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"with tree=.*before any add_child"):
        resumed.load_state_dict(state)


# Steps that are not made


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    model, own = anchor(), bank()
    optimizer = BankAdamW(model.parameters(), own, lr=0.1)
    train(model, optimizer, [0, 3])
    before, weights, state = blocks(own), copy.deepcopy(model.state_dict()), copy.deepcopy(stored(optimizer))
    memories = optimizer.fetch(to_leaves([0, 3]))
    loss_of(model, rows(2, 1), memories).backward()
    memories.blocks[-1].grad.view(-1)[0] = value
    with pytest.raises(ValueError, match=r"gradient of the block of \(2, 3\) is not finite; skip the step"):
        optimizer.step()
    assert moved(before, own) == set()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    optimizer.zero_grad()
    torch.testing.assert_close(stored(optimizer), state, rtol=0, atol=0)
    train(model, optimizer, [0, 3], seed=1)
    assert len(moved(before, own)) == 4


def test_blocks_that_the_bank_refuses_leave_the_optimiser_as_it_was():
    own = bank(dtype=torch.float16)
    optimizer = BankAdamW([], own, lr=0.1)
    train(anchor(), optimizer, [0, 3])
    before, state = blocks(own), copy.deepcopy(stored(optimizer))
    optimizer.param_groups[0]["lr"] = 1e6
    optimizer.fetch(to_leaves([0])).blocks[0].sum().backward()
    with pytest.raises(ValueError, match=r"blocks\[\(1, 0\)\] is not finite in torch.float16"):
        optimizer.step()
    assert moved(before, own) == set()
    torch.testing.assert_close(stored(optimizer), state, rtol=0, atol=0)
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_that_is_skipped_moves_no_block_by_momentum(set_to_none):
    own = bank()
    optimizer = BankAdamW([], own, lr=0.1)
    train(anchor(), optimizer, [0])
    before = blocks(own)
    pull(optimizer.fetch(to_leaves([0])).blocks[0], seed=0)
    optimizer.zero_grad(set_to_none)
    pull(optimizer.fetch(to_leaves([3])).blocks[0], seed=1)
    optimizer.step()
    assert moved(before, own) == {Node(1, 1)}


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_fetch_is_the_bank_s_and_stages_nothing(without):
    model, own = anchor(), bank(dtype=torch.bfloat16)
    optimizer = BankAdamW(model.parameters(), own, lr=0.1)
    train(model, optimizer, [0])
    with without():
        memories = optimizer.fetch(to_leaves([0, 3]))
    expected = own.fetch(to_leaves([0, 3]), dtype=torch.float32)
    assert memories.nodes == expected.nodes
    torch.testing.assert_close(memories.blocks, expected.blocks, rtol=0, atol=0)
    assert optimizer.param_groups[-1]["params"] == []
    train(model, optimizer, [0, 3])
    assert len(own.written()) == 4


def test_leaves_of_a_fetch_in_inference_mode_with_gradients_train():
    own = bank()
    optimizer = BankAdamW([], own, lr=0.1)
    with torch.inference_mode(), torch.enable_grad():
        optimizer.fetch(to_leaves([0]))
    train(anchor(), optimizer, [0])
    assert own.written() == [Node(1, 0), Node(2, 0)]


# As an optimiser of torch


def test_hooks_of_a_step_run_once():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # from then on, the step of its class runs hooks
    optimizer, seen = BankAdamW([], bank()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("behind"))
    train(anchor(), optimizer, [0])
    assert seen == ["before", "behind"]


def test_parameters_with_names_are_taken():
    (model, named), (other, plain) = (
        (own := anchor(), BankAdamW(own.named_parameters() if names else own.parameters(), bank(), lr=0.1))
        for names in (True, False)
    )
    for step in range(2):
        train(model, named, [0], seed=step)
        train(other, plain, [0], seed=step)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    named.load_state_dict(named.state_dict())


def test_a_group_of_the_model_is_not_named_memory():
    model = anchor()
    with pytest.raises(ValueError, match=r"name='memory', which is that of the bank's blocks; use another name"):
        BankAdamW([{"params": list(model.parameters()), "name": "memory"}], bank())
    optimizer = BankAdamW([model.embedding.weight], bank())
    with pytest.raises(ValueError, match="use another name"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "name": "memory"})
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.zeros(1))]})
    extra.sum().backward()
    train(model, optimizer, [0])
    assert optimizer.bank.written() == [Node(1, 0), Node(2, 0)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_an_optimiser_is_not_copied(duplicate):
    with pytest.raises(ValueError, match=r"BankAdamW cannot be copied or pickled.*load_state_dict"):
        duplicate(BankAdamW([], bank()))
