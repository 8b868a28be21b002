"""Editing a bank, with the guarantees of spec section 11: checks 11 and 13; copies with room for more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memzoo.layers.banks.layout import Node
from memzoo.layers.banks.storage import Mark
from memzoo.layers.memory_bank import MemoryBank
from tests.layers.banks import bank_cases as cases


@pytest.fixture(params=["ram", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MemoryBank]:
    with cases.filled(tmp_path / "bank" if request.param == "disk" else None) as bank:
        yield bank


def read(bank: MemoryBank) -> dict[Node, torch.Tensor]:
    """Everything that can be fetched."""
    leaves = torch.arange(27)
    paths = torch.stack([leaves // 9, leaves // 3, leaves], -1)
    fetched = bank.fetch(torch.cat([paths, bank.generic_paths(1)]))
    return {node: block.clone() for node, block in zip(fetched.nodes, fetched.blocks, strict=True)}


def differing(before: dict[Node, torch.Tensor], after: dict[Node, torch.Tensor]) -> set[Node]:
    return {
        node
        for node in before | after
        if node not in before or node not in after or not torch.equal(before[node], after[node])
    }


def test_11_a_blocked_node_is_left_out_and_comes_back_as_it_was(bank: MemoryBank) -> None:
    before = read(bank)
    bank.block(2, 4)
    assert differing(before, read(bank)) == {Node(2, 4)}
    assert not bank.is_readable(Node(2, 4))
    assert torch.equal(bank.block_of(2, 4), before[Node(2, 4)])
    bank.unblock(2, 4)
    assert not differing(before, read(bank))


def test_11_a_subtree_is_blocked_as_a_whole(bank: MemoryBank) -> None:
    before = read(bank)
    bank.block(1, 1, subtree=True)
    assert differing(before, read(bank)) == {Node(1, 1), Node(2, 3), Node(2, 4), Node(2, 5)}
    bank.unblock(1, 1, subtree=True)
    assert not differing(before, read(bank))


def test_11_a_generic_block_can_be_blocked(bank: MemoryBank) -> None:
    before = read(bank)
    bank.block(1, 3)
    assert differing(before, read(bank)) == {Node(1, 3)}


def test_a_deleted_node_is_gone_for_good(bank: MemoryBank) -> None:
    before = read(bank)
    bank.block(2, 4)
    bank.delete(2, 4)
    bank.unblock(2, 4)
    assert differing(before, read(bank)) == {Node(2, 4)}
    with pytest.raises(ValueError, match="node=4 of level 2 was deleted"):
        bank.block_of(2, 4)
    if bank.path is not None:
        stride = 4096
        data = (bank.path / "level_2.blocks").read_bytes()
        assert not any(data[4 * stride : 5 * stride])
        assert before[Node(2, 4)].numpy().tobytes() not in b"".join(
            file.read_bytes() for file in bank.path.rglob("*") if file.is_file()
        )


def test_deleting_drops_what_was_not_committed(bank: MemoryBank) -> None:
    bank.put({Node(2, 4): torch.ones(bank.layout.block_shape(2))})
    bank.delete(2, 4)
    bank.commit()
    assert Node(2, 4) not in read(bank)


def test_blocking_holds_for_what_is_not_committed_yet(bank: MemoryBank) -> None:
    bank.put({Node(2, 4): torch.ones(bank.layout.block_shape(2))})
    bank.block(2, 4)
    assert Node(2, 4) not in read(bank)
    bank.commit()
    assert Node(2, 4) not in read(bank)
    bank.unblock(2, 4)
    assert read(bank)[Node(2, 4)].eq(1).all()


# Adding children


def test_a_child_takes_the_place_of_one_that_was_deleted(bank: MemoryBank) -> None:
    x = cases.embeddings(200)
    before, paths = read(bank), bank.route(x)
    bank.delete(2, 4, subtree=True)
    centroid = x[paths[:, 0] == 1][0] / x[paths[:, 0] == 1][0].norm()
    assert bank.add_child(1, 1, centroid) == Node(2, 4)
    assert differing(before, read(bank)) == {Node(2, 4)}, "it adds nothing yet"
    after = bank.route(x, reroute=True)
    elsewhere = paths[:, 0] != 1
    assert torch.equal(after[elsewhere], paths[elsewhere])
    kept = (paths[:, 0] == 1) & (paths[:, 1] != 4) & (after[:, 1] != 4)  # neither to the new nor from the old
    assert kept.any()
    assert torch.equal(after[kept], paths[kept])
    found = bank.route(centroid[None])
    assert found.tolist() == [[1, 4, 12]]
    bank.put({Node(2, 4): torch.ones(bank.layout.block_shape(2))})
    assert bank.fetch(found).nodes == (Node(1, 1), Node(2, 4))
    if bank.path is not None:
        bank.commit()
        routed = bank.route(x)
        bank.close()
        with MemoryBank.open(bank.path) as again:
            assert torch.equal(again.route(x), routed)
            assert again.tree.fingerprint == bank.tree.fingerprint


def test_a_child_needs_a_place_without_blocks_below(bank: MemoryBank) -> None:
    centroid = torch.ones(cases.WIDTH)
    bank.delete(1, 2)
    with pytest.raises(ValueError, match=r"bank.delete\(1, 2, subtree=True\)"):
        bank.add_child(0, 0, centroid)
    bank.delete(1, 2, subtree=True)
    assert bank.add_child(0, 0, centroid) == Node(1, 2)
    with pytest.raises(ValueError, match="no place"):
        bank.add_child(0, 0, 2 * centroid)


def test_a_child_s_centroid_is_its_own(bank: MemoryBank) -> None:
    bank.delete(1, 0, subtree=True)
    with pytest.raises(ValueError, match="centroid is that of node 1 of level 1"):
        bank.add_child(0, 0, bank.tree.centroids[0][1])


def test_levels_without_memory_can_be_closed_too(tmp_path: Path) -> None:
    for path in (None, tmp_path / "deep"):
        with cases.filled(path, rows=(0, 0, 2)) as bank:
            x = cases.embeddings(60)
            paths = bank.route(x)
            bank.block(1, 0, subtree=True)
            fetched = bank.fetch(paths)
            assert all(node.node // 9 != 0 for node in fetched.nodes)
            assert not (bank.route(x, reroute=True)[:, 0] == 0).any()
            bank.delete(1, 1, subtree=True)
            assert bank.add_child(0, 0, torch.ones(cases.WIDTH)) == Node(1, 1)


def test_a_node_all_of_whose_children_are_closed_is_passed_over(bank: MemoryBank) -> None:
    x = cases.embeddings(60)
    for node in (3, 4, 5):
        bank.block(2, node)
    assert not (bank.route(x, reroute=True)[:, 0] == 1).any()
    for node in range(3):
        bank.block(1, node)
    with pytest.raises(ValueError, match="reroute=True finds no way"):
        bank.route(x, reroute=True)


def test_12_places_without_a_cluster_are_no_way_around_a_blocked_node(bank: MemoryBank) -> None:
    """A bank with room reroutes as it did without, and what is below a new child is not mistaken for clusters."""
    x = cases.embeddings(60)
    wide = bank.copy_to(branching=5)
    bank.block(1, 0)
    wide.block(1, 0)
    rerouted = bank.route(x, reroute=True)
    assert torch.equal(wide.route(x, reroute=True)[:, 0], rerouted[:, 0])
    assert (rerouted[:, 0] != bank.route(x)[:, 0]).any()
    child = wide.add_child(0, 0, x[0] / x[0].norm())
    assert wide.route(x[:1], reroute=True)[0, 0] == child.node
    wide.block(2, 5 * child.node)  # the first of its children, which all have its centroid
    assert wide.route(x[:1], reroute=True)[0, 0] != child.node


def test_a_full_node_has_no_place_for_a_child(bank: MemoryBank) -> None:
    for level, node in ((0, 0), (1, 2)):
        with pytest.raises(ValueError, match=f"node={node} of level {level} has no place"):
            bank.add_child(level, node, torch.ones(cases.WIDTH))
    with pytest.raises(ValueError, match="level=3, node=0 is no node that has children"):
        bank.add_child(3, 0, torch.ones(cases.WIDTH))
    bank.delete(1, 2, subtree=True)
    for bad in (torch.ones(4), torch.full((cases.WIDTH,), torch.nan), torch.ones(cases.WIDTH, dtype=torch.int64)):
        with pytest.raises(ValueError, match="centroid"):
            bank.add_child(0, 0, bad)


def test_a_copy_with_more_children_reads_the_same_and_has_room(bank: MemoryBank, tmp_path: Path) -> None:
    bank.block(2, 3)
    bank.delete(2, 8)
    x = cases.embeddings(60)
    paths = bank.route(x)
    for path in (None, tmp_path / "wider"):
        with bank.copy_to(path, branching=5) as wide:
            routed = wide.route(x)
            assert torch.equal(routed[:, 0], paths[:, 0])
            assert torch.equal(routed[:, 1], paths[:, 1] // 3 * 5 + paths[:, 1] % 3)
            for row, theirs in zip(paths, routed, strict=True):
                ours, copies = bank.fetch(row[None]), wide.fetch(theirs[None])
                assert len(ours.blocks) == len(copies.blocks)
                assert all(torch.equal(a, b) for a, b in zip(ours.blocks, copies.blocks, strict=True))
            generic = [b.fetch(b.generic_paths(1)).blocks for b in (bank, wide)]
            assert all(torch.equal(a, b) for a, b in zip(*generic, strict=True))
            assert wide.mark(Node(2, 5)) == Mark.BLOCKED | Mark.WRITTEN
            assert wide.mark(Node(2, 12)) == Mark.DELETED
            assert wide.add_child(0, 0, x[0] / x[0].norm()) == Node(1, 3)
    with pytest.raises(ValueError, match="branching=2 is less than the tree's 3"):
        bank.copy_to(branching=2)
    with pytest.raises(ValueError, match="exists"):
        bank.copy_to(tmp_path / "wider")


# Merging


def test_13_each_part_gives_its_subtrees(bank: MemoryBank) -> None:
    parts = {subtree: bank.copy_to() for subtree in (0, 1, 3)}
    changed = {0: [Node(1, 0), Node(2, 1)], 1: [Node(2, 3), Node(2, 5)], 3: [Node(1, 3), Node(2, 9)]}
    for number, part in parts.items():
        everything = cases.every_node(part.layout)  # also what is not taken over
        part.put({node: cases.random_block(part.layout, node, 7 + number) for node in everything})
    parts[1].delete(2, 4)
    parts[0].block(2, 2)
    bank.put({Node(2, 7): torch.ones(bank.layout.block_shape(2)), Node(2, 1): torch.ones(bank.layout.block_shape(2))})
    before = read(bank)
    bank.merge(parts)
    after = read(bank)
    taken = {node: number for number in parts for node in before if _subtree(node) == number}
    assert set(after) == set(before) - {Node(2, 4), Node(2, 2)}
    for node, block in after.items():
        source = parts[taken[node]].block_of(*node) if node in taken else before[node]
        assert torch.equal(block, source)
    assert {node for nodes in changed.values() for node in nodes} <= differing(before, after)
    assert bank.mark(Node(2, 4)) == Mark.DELETED
    assert bank.mark(Node(2, 2)) == Mark.WRITTEN | Mark.BLOCKED
    bank.commit()
    assert not differing(after, read(bank))


def _subtree(node: Node) -> int:
    return node.node // 3 ** (node.level - 1)


def test_13_strangers_are_not_merged_and_nothing_is_taken_over(bank: MemoryBank) -> None:
    before, good = read(bank), bank.copy_to()
    good.put({Node(1, 0): torch.ones(bank.layout.block_shape(1))})
    stranger = MemoryBank.create(cases.tree(seed=9), bank.layout)
    for parts, words in (
        ({0: good, 1: cases.filled(rows=(2, 2, 0))}, r"parts\[1\] has layout"),
        ({0: good, 1: MemoryBank.create(bank.tree, bank.layout, seed=5)}, r"parts\[1\] has seed=5"),
        ({0: good, 1: stranger}, r"parts\[1\] has another tree"),
        ({0: good, 4: good}, "subtree=4"),
    ):
        with pytest.raises(ValueError, match=words):
            bank.merge(parts)
        assert not differing(before, read(bank))
