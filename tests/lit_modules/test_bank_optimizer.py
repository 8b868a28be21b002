"""BankAdamW: which blocks move, how far, and that a run goes on where it was."""

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import Node
from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.memory_bank import MemoryBank
from memzoo.lit_modules.bank_optimizer import BankAdamW
from tests.lit_modules.processes import run_two

ROWS, BRANCHING = (3, 2), 2
SIZES = {"vocab_size": 11, "dim": 8, "depth": 2, "num_heads": 1, "hidden_dim": 16}


def anchor(*, frozen: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("hier_memory_tiny", **SIZES).requires_grad_(not frozen)


def tree(seed: int = 0) -> ClusterTree:
    generator = torch.Generator().manual_seed(seed)
    return ClusterTree([torch.randn(BRANCHING**level, 4, generator=generator) for level in (1, 2)])


def bank(path=None, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> MemoryBank:
    layout = anchor().layout(ROWS, branching=BRANCHING, dtype=dtype)
    return MemoryBank.create(tree(), layout, path=path, seed=seed)


def blocks(of: MemoryBank) -> dict[Node, Tensor]:
    levels = [(level, of.layout.num_nodes(level)) for level in of.layout.levels]
    return {Node(level, node): of.block_of(level, node).clone() for level, last in levels for node in range(last + 1)}


def moved(before: dict[Node, Tensor], after: MemoryBank) -> set[Node]:
    return {node for node, block in blocks(after).items() if not torch.equal(block, before[node])}


def rows(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, 6), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, tokens: Tensor, memories: Fetched) -> Tensor:
    logits, _ = model(tokens[:, :-1], memories=memories)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: BankAdamW, leaves: list[int], *, seed: int = 0) -> None:
    """Make one step on a row for each leaf of the tree."""
    optimizer.zero_grad()
    loss_of(model, rows(len(leaves), seed), optimizer.fetch(to_leaves(leaves))).backward()
    optimizer.step()


def to_leaves(leaves: list[int]) -> Tensor:
    return torch.tensor([[leaf // BRANCHING, leaf] for leaf in leaves])


def gradients(memories: Fetched) -> dict[Node, Tensor]:
    return {node: block.grad for node, block in zip(memories.nodes, memories.blocks, strict=True)}


# What moves


def test_03_only_blocks_in_the_batch_have_gradients_and_move_though_there_is_weight_decay():
    model, own = anchor(frozen=True), bank()
    before, weights = blocks(own), {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.5)
    for step, leaf in enumerate([0, 3, 0]):
        train(model, optimizer, [leaf], seed=step)
    assert moved(before, own) == {Node(1, 0), Node(2, 0), Node(1, 1), Node(2, 3)} == set(optimizer.touched)
    kept = blocks(own)
    train(model, optimizer, [1])
    assert moved(kept, own) == {Node(1, 0), Node(2, 1)}
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_03_the_anchor_moves_with_the_blocks_if_it_is_given():
    model, own = anchor(), bank()
    before = model.embedding.weight.detach().clone()
    train(model, BankAdamW(model.parameters(), own, lr=0.1), [0])
    assert not torch.equal(model.embedding.weight, before)


def test_04_the_gradient_of_a_shared_block_is_the_sum_of_those_of_its_rows():
    model, own, tokens = anchor(), bank(), rows(2)
    own.put({node: torch.randn_like(block) for node, block in blocks(own).items()})
    optimizer = BankAdamW([], own)

    def alone(row: int) -> dict[Node, Tensor]:
        optimizer.zero_grad()
        memories = optimizer.fetch(to_leaves([row]))
        loss_of(model, tokens[row : row + 1], memories).backward()
        return {node: gradient.clone() for node, gradient in gradients(memories).items()}

    one, two = alone(0), alone(1)
    optimizer.zero_grad()
    memories = optimizer.fetch(to_leaves([0, 1]))
    (2 * loss_of(model, tokens, memories)).backward()
    both = gradients(memories)
    assert both.keys() == {Node(1, 0), Node(2, 0), Node(2, 1)}
    torch.testing.assert_close(both[Node(1, 0)], one[Node(1, 0)] + two[Node(1, 0)], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[Node(2, 0)], one[Node(2, 0)], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[Node(2, 1)], two[Node(2, 1)], rtol=0, atol=1e-6)


def test_a_block_that_no_gradient_reaches_is_not_touched():
    own, before = bank(), blocks(bank())
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.5)
    for leaf in (0, 3):
        optimizer.fetch(to_leaves([leaf])).blocks[0].sum().backward()
        optimizer.step()
    assert moved(before, own) == {Node(1, 0), Node(1, 1)} == set(optimizer.touched)


def test_a_step_without_gradients_changes_nothing_and_forgets_what_was_fetched():
    own, before = bank(), blocks(bank())
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.5)
    optimizer.fetch(to_leaves([0, 3]))
    optimizer.step()
    assert moved(before, own) == set()
    assert optimizer.param_groups[-1]["params"] == []


def test_blocked_and_deleted_blocks_are_neither_read_nor_moved():
    model, own = anchor(), bank()
    own.block(1, 0)
    own.delete(2, 3)
    optimizer = BankAdamW([], own, lr=0.1)
    assert optimizer.fetch(to_leaves([0, 3])).nodes == (Node(1, 1), Node(2, 0))
    train(model, optimizer, [0, 3])
    assert optimizer.touched == [Node(1, 1), Node(2, 0)]


def test_only_the_chosen_nodes_are_trained_and_all_are_read():
    model, own = anchor(), bank()
    own.put({node: torch.randn_like(block) for node, block in blocks(own).items()})
    before, paths = blocks(own), to_leaves([0, 3])
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.5, only=[(2, 0)])
    memories = optimizer.fetch(paths)
    assert memories.nodes == own.fetch(paths).nodes
    torch.testing.assert_close(loss_of(model, rows(2), memories), loss_of(model, rows(2), own.fetch(paths)))
    train(model, optimizer, [0, 3])
    assert moved(before, own) == {Node(2, 0)}


# How far


def pull(block: Tensor, seed: int) -> None:
    """Give a block the gradient that draws it to somewhere."""
    target = torch.randn(block.shape, dtype=block.dtype, generator=torch.Generator().manual_seed(seed))
    (block - target).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("between", [0, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_a_block_moves_as_a_parameter_in_the_steps_that_reach_it_and_no_others_count(dtype, between, offload):
    own = bank(dtype=dtype)
    options = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.3}
    optimizer = BankAdamW([], own, offload=offload, **options)
    parameter = nn.Parameter(own.block_of(1, 0).clone())
    dense = torch.optim.AdamW([parameter], **options)
    for step in range(5):
        pull(optimizer.fetch(to_leaves([0])).blocks[0], seed=step)
        optimizer.step()
        for _ in range(between):
            pull(optimizer.fetch(to_leaves([3])).blocks[0], seed=100)
            optimizer.step()
        dense.zero_grad()
        pull(parameter, seed=step)
        dense.step()
    torch.testing.assert_close(own.block_of(1, 0), parameter.detach(), rtol=0, atol=0)


def test_a_node_fetched_twice_before_a_step_is_one_leaf_whose_gradients_add_up():
    own = bank()
    optimizer = BankAdamW([], own)
    first, second = optimizer.fetch(to_leaves([0])), optimizer.fetch(to_leaves([1]))
    assert first.blocks[0] is second.blocks[0]
    (first.blocks[0].sum() + 2 * second.blocks[0].sum()).backward()
    assert torch.equal(first.blocks[0].grad, torch.full_like(first.blocks[0], 3.0))
    assert len(optimizer.param_groups[-1]["params"]) == 3


def test_a_closure_may_fetch():
    own, before = bank(), blocks(bank())
    optimizer = BankAdamW([], own, lr=0.1)

    def closure() -> float:
        loss = optimizer.fetch(to_leaves([0])).blocks[1].sum()
        optimizer.zero_grad()  # where Lightning has it
        loss.backward()
        return loss.item()

    assert isinstance(optimizer.step(closure), float)
    assert moved(before, own) == {Node(2, 0)}


def test_a_step_that_is_skipped_leaves_no_gradient_behind():
    """As gradient scaling skips those that overflow."""
    once, skipping = bank(), bank()
    for own, skips in ((once, 0), (skipping, 2)):
        optimizer = BankAdamW([], own, lr=0.1)
        for leaf in [3] * skips + [0]:
            block = optimizer.fetch(to_leaves([leaf])).blocks[0]
            optimizer.zero_grad()
            pull(block, seed=leaf)
        optimizer.step()
    torch.testing.assert_close(blocks(skipping), blocks(once), rtol=0, atol=0)
    assert skipping.written() == [Node(1, 0)]


def test_masters_go_on_below_the_resolution_of_the_bank():
    own = bank(dtype=torch.bfloat16)
    own.put({Node(1, 0): torch.ones(own.layout.block_shape(1))})
    optimizer = BankAdamW([], own, lr=1e-3, weight_decay=0.0)
    seen = []
    for _ in range(5):
        optimizer.fetch(to_leaves([0])).blocks[0].sum().backward()
        optimizer.step()
        seen.append(own.block_of(1, 0).mean().item())
    assert seen[0] == 1.0
    assert seen[-1] == pytest.approx(0.995, abs=2e-3) != 1.0


def test_memories_have_a_rate_and_a_decay_of_their_own():
    own = bank()
    groups = BankAdamW(anchor().parameters(), own, lr=0.1, memory_lr=0.2, memory_weight_decay=0.3).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.01), (0.2, 0.3)]


def test_the_blocks_are_cast_to_what_the_model_computes_in():
    optimizer = BankAdamW([], bank(dtype=torch.bfloat16))
    memories = optimizer.fetch(to_leaves([0]), dtype=torch.float64)
    assert {block.dtype for block in memories.blocks} == {torch.float64}
    memories.blocks[0].sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["memory"]["blocks"]["1.0"]["master"].dtype == torch.float32


def test_model_and_subtrees_are_clipped_apart():
    own, parameter = bank(), nn.Parameter(torch.zeros(2))
    optimizer = BankAdamW([parameter], own, lr=0.0, clip_per_subtree=1.0)
    memories = optimizer.fetch(torch.cat([to_leaves([0, 3]), own.generic_paths(1)]))
    scales = {Node(1, 0): 10.0, Node(2, 0): 10.0, Node(1, 1): 1e-3, Node(2, 3): 1e-3, Node(1, 2): 10.0, Node(2, 4): 0.0}
    pieces = zip(memories.nodes, memories.blocks, strict=True)
    (sum(scales[node] * block.sum() for node, block in pieces) + 100 * parameter.sum()).backward()
    held = gradients(memories)
    small = held[Node(1, 1)].clone()
    optimizer.step()
    assert torch.cat([held[Node(1, 0)].flatten(), held[Node(2, 0)].flatten()]).norm().item() == pytest.approx(1)
    assert held[Node(1, 2)].norm().item() == pytest.approx(1)
    assert parameter.grad.norm().item() == pytest.approx(1)
    assert torch.equal(held[Node(1, 1)], small)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_13_merged_subtrees_equal_one_training_that_visits_the_same_batches(clip, tmp_path):
    visits = [[0, 1], [2], [3, 2], [1], [0], [2, 3]]

    def run(own: MemoryBank, subtrees: set[int]) -> MemoryBank:
        model, counts = anchor(frozen=True), [0, 0]
        optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.1, clip_per_subtree=clip)
        for leaves in visits:
            subtree = leaves[0] // BRANCHING
            counts[subtree] += 1
            if subtree in subtrees:
                train(model, optimizer, leaves, seed=10 * subtree + counts[subtree])
        return own

    joint = run(bank(), {0, 1})
    merged = bank(tmp_path / "bank")
    merged.merge({subtree: run(bank(), {subtree}) for subtree in (0, 1)})
    merged.close()
    torch.testing.assert_close(blocks(MemoryBank.open(tmp_path / "bank")), blocks(joint), rtol=0, atol=0)
    assert len(moved(blocks(bank()), joint)) == 6


# Going on


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_state_and_the_bank_it_began_with_go_on_exactly(place, tmp_path):
    def begin(name: str) -> tuple[nn.Module, BankAdamW]:
        model = anchor()
        own = bank(None if place == "memory" else tmp_path / name, dtype=torch.bfloat16)
        return model, BankAdamW(model.parameters(), own, lr=0.1, weight_decay=0.1)

    model, straight = begin("straight")
    for step, leaf in enumerate([0, 3, 1]):
        train(model, straight, [leaf], seed=step)
    straight.fetch(to_leaves([2])).blocks[0].sum().backward()  # in mid-accumulation
    torch.save({"model": model.state_dict(), "optimizer": straight.state_dict()}, tmp_path / "state.pt")
    straight.zero_grad()
    train(model, straight, [0, 2], seed=3)

    other, resumed = begin("resumed")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(stored["model"])
    resumed.fetch(to_leaves([0]))
    resumed.load_state_dict(stored["optimizer"])
    assert resumed.touched == [Node(1, 0), Node(1, 1), Node(2, 0), Node(2, 1), Node(2, 3)]
    train(other, resumed, [0, 2], seed=3)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(blocks(resumed.bank), blocks(straight.bank), rtol=0, atol=0)
    kept = [optimizer.state_dict()["memory"]["blocks"] for optimizer in (resumed, straight)]
    torch.testing.assert_close(*kept, rtol=0, atol=0)


def test_a_loaded_state_is_a_copy():
    one, two = BankAdamW([], bank(), lr=0.1), BankAdamW([], bank(), lr=0.1)
    train(anchor(), one, [0])
    two.load_state_dict(one.state_dict())
    before = blocks(one.bank)
    train(anchor(), two, [0])
    train(anchor(), one, [0])
    assert moved(before, one.bank) == {Node(1, 0), Node(2, 0)}
    torch.testing.assert_close(blocks(one.bank), blocks(two.bank), rtol=0, atol=0)


@pytest.mark.parametrize("differs", ["layout", "tree", "seed"])
def test_a_state_of_another_bank_is_refused(differs):
    state = BankAdamW([], bank()).state_dict()
    other = bank(seed=1) if differs == "seed" else bank(dtype=torch.float64)
    if differs == "tree":
        other = MemoryBank.create(tree(seed=1), bank().layout)
    with pytest.raises(ValueError, match=f"state_dict is of a bank with {differs}=.*its training began with"):
        BankAdamW([], other).load_state_dict(state)


# Refusals


@pytest.mark.parametrize("paths", [torch.tensor([[0]]), torch.tensor([0, 1]), torch.tensor([[0, 9]])])
def test_paths_that_do_not_fit_are_refused(paths):
    with pytest.raises(ValueError, match=r"paths has shape|node=9 is not in level 2"):
        BankAdamW([], bank()).fetch(paths)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="clip_per_subtree"):
        BankAdamW([], bank(), clip_per_subtree=0.0)
    with pytest.raises(ValueError, match="node=7 is not in level 1"):
        BankAdamW([], bank(), only=[(1, 7)])
    bank(tmp_path / "bank").close()
    with pytest.raises(ValueError, match="read-only"):
        BankAdamW([], MemoryBank.open(tmp_path / "bank", read_only=True))


# Several devices


def part(folder: str) -> None:
    """Be one of two replicas that train on rows of their own."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, own = anchor(frozen=True), bank()
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.1)
    for step, leaves in enumerate([[0, 1], [0, 3], [2, 2]]):
        optimizer.zero_grad()
        memories = optimizer.fetch(to_leaves(leaves[rank : rank + 1]))
        loss_of(model, rows(2, step)[rank : rank + 1], memories).backward()
        optimizer.share_gradients()
        optimizer.step()
    torch.save([*blocks(own).values()], f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match=r"is on disk.*and 2 train.*merge the copies"):
        BankAdamW([], bank(f"{folder}/bank{rank}"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_replicas_stay_equal_and_equal_one_that_reads_the_rows_of_both(tmp_path):
    run_two(part, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    model, own = anchor(frozen=True), bank()
    optimizer = BankAdamW([], own, lr=0.1, weight_decay=0.1)
    for step, leaves in enumerate([[0, 1], [0, 3], [2, 2]]):
        train(model, optimizer, leaves, seed=step)
    torch.testing.assert_close(one, [*blocks(own).values()], rtol=1e-4, atol=1e-5)
