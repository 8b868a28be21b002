"""The tree of clusters: spec section 16, checks 5-7, 12 and 15; fitting, saving and what is refused."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import ClusterTree, cluster_tree
from memzoo.layers.reference import cluster_tree as reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_tree(branching: int, depth: int, width: int, seed: int = 0) -> ClusterTree:
    return ClusterTree([draw(branching**level, width, seed=seed + level) for level in range(1, depth + 1)])


def dominated(seed: int) -> Tensor:
    """Nine tenths of the rows about one direction, the others about seven."""
    directions = torch.eye(8, 12).repeat_interleave(torch.tensor([540] + [8] * 7), dim=0)
    return directions + 0.1 * draw(*directions.shape, seed=seed)


@pytest.fixture(scope="module")
def tree() -> ClusterTree:
    return ClusterTree.fit(draw(400, 8), branching=4, depth=3, steps=4)


# Routing


@pytest.mark.parametrize(("branching", "depth"), [(2, 5), (4, 3), (7, 1)])
def test_05_route_is_the_nearest_child_level_by_level(branching: int, depth: int) -> None:
    tree, x = random_tree(branching, depth, 6), draw(50, 6, seed=9)
    assert torch.equal(tree.route(x), reference.route(x, tree.centroids))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), margin=st.sampled_from([0.0, 0.05, 0.3, 0.9]), closed=st.booleans())
def test_a_kept_path_is_left_where_another_child_is_nearer_by_the_margin(
    seed: int, margin: float, closed: bool
) -> None:
    tree, x = random_tree(3, 3, 4, seed), draw(12, 4, seed=seed + 50)
    keep = tree.route(x + 0.5 * draw(12, 4, seed=seed + 60))
    keep[0] = torch.tensor([3, 9, 27])  # the generic blocks: no nodes
    blocked = {2: torch.arange(9) % 3 == seed % 3} if closed else None
    paths = tree.route(x, keep=keep, margin=margin, blocked=blocked)
    assert torch.equal(paths, reference.route(x, tree.centroids, blocked, keep, margin))
    assert torch.equal(paths[0], tree.route(x, blocked=blocked)[0])
    if not margin:
        assert torch.equal(paths, tree.route(x, blocked=blocked))


def test_a_wide_margin_keeps_rows_that_a_narrow_one_lets_go() -> None:
    tree, x = ClusterTree([torch.tensor([[1.0, 0.0], [0.0, 1.0]])]), torch.tensor([[1.0, 1.2]])  # 0.95 and 0.72 away
    keep = torch.tensor([[0]])
    assert [tree.route(x, keep=keep, margin=margin).item() for margin in (0.0, 0.1, 0.3)] == [1, 1, 0]
    assert tree.route(x, keep=keep).item() == 1


@settings(max_examples=25, deadline=None)
@given(branching=st.integers(2, 6), depth=st.integers(1, 4), seed=st.integers(0, 1000))
def test_05_ids_are_nested(branching: int, depth: int, seed: int) -> None:
    paths = random_tree(branching, depth, 3, seed).route(draw(8, 3, seed=seed + 99))
    assert paths.dtype == torch.int64
    assert paths.min() >= 0
    for level in range(1, depth + 1):
        assert torch.equal(paths[:, level - 1], paths[:, -1] // branching ** (depth - level))
        assert (paths[:, level - 1] < branching**level).all()


def test_05_a_row_takes_depth_times_branching_distances(tree: ClusterTree) -> None:
    with patch.object(cluster_tree, "relative_distances", wraps=cluster_tree.relative_distances) as distances:
        tree.route(draw(10, 8))
    shapes = [call.args[1].shape for call in distances.call_args_list]
    assert shapes == [(10, tree.branching, 8)] * tree.depth


def test_06_the_greedy_leaf_is_taken_where_another_is_nearer() -> None:
    first = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    leaves = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0]])
    assert (leaves - x).norm(dim=-1).argmin() == 2
    assert ClusterTree([first, leaves]).route(x).tolist() == [[0, 0]]


@pytest.mark.parametrize("width", [3, 37, 384])
def test_07_ties_go_to_the_first_child(width: int) -> None:
    repeated = draw(1, width).expand(7, width)
    tree = ClusterTree([repeated, repeated.repeat(7, 1)])
    assert tree.route(draw(20, width, seed=1)).unique().tolist() == [0]


def test_07_a_row_does_not_depend_on_its_batch(tree: ClusterTree) -> None:
    x = draw(23, 8, seed=4)
    whole = tree.route(x)
    assert torch.equal(whole, torch.cat([tree.route(row) for row in x.split(1)]))
    with patch.object(cluster_tree, "_GATHERED", 5 * tree.branching * 8):  # five rows at a time
        assert torch.equal(whole, tree.route(x))


def test_rows_are_normalised_and_at_least_float32(tree: ClusterTree) -> None:
    x = draw(20, 8, seed=5)
    assert torch.equal(tree.route(x), tree.route(x * 64))
    assert torch.equal(tree.route(x.bfloat16()), tree.route(x.bfloat16().double()))
    assert tree.route(x[:0]).shape == (0, 3)


# Blocked nodes


def test_12_a_blocked_node_is_passed_over_for_the_next_nearest(tree: ClusterTree) -> None:
    x = draw(60, 8, seed=6)
    free = tree.route(x)
    blocked = {1: torch.zeros(4, dtype=torch.bool), 3: draw(64, seed=7) > 0.8}
    blocked[1][free[0, 0]] = True
    blocked[3].view(-1, 4)[:, 0] = False
    paths = tree.route(x, blocked=blocked)
    assert torch.equal(paths, reference.route(x, tree.centroids, blocked))
    for level, mask in blocked.items():
        assert mask[free[:, level - 1]].any()
        assert not mask[paths[:, level - 1]].any()


def test_12_nothing_blocked_changes_nothing(tree: ClusterTree) -> None:
    x = draw(20, 8)
    nothing = {level: torch.zeros(tree.num_nodes(level), dtype=torch.bool) for level in (1, 2, 3)}
    assert torch.equal(tree.route(x, blocked=nothing), tree.route(x))
    assert torch.equal(tree.route(x, blocked={}), tree.route(x))


def test_12_a_node_without_a_free_child_is_an_error_where_a_row_comes_there(tree: ClusterTree) -> None:
    x = draw(20, 8)
    node = int(tree.route(x)[3, 0])
    children = torch.zeros(16, dtype=torch.bool)
    children.view(4, 4)[node] = True
    with pytest.raises(ValueError, match=rf"^blocked\[2\] holds all children of node {node} of level 1, which row"):
        tree.route(x, blocked={2: children})
    parent = torch.arange(4) == node
    assert (tree.route(x, blocked={1: parent, 2: children})[:, 0] != node).all()
    with pytest.raises(ValueError, match=r"^blocked\[1\] holds all children of the root, .* free one of them$"):
        tree.route(x, blocked={1: torch.ones(4, dtype=torch.bool)})


# Fitting


def test_15_an_overfull_cluster_keeps_half_and_the_smallest_gets_the_other() -> None:
    assigned = torch.tensor([0] * 3 + [1] * 11 + [2] * 2 + [3] * 4)
    split = cluster_tree.balance(assigned, 4, 1.5 / 4, torch.Generator().manual_seed(0))
    assert split.bincount().tolist() == [3, 6, 7, 4]
    moved = split != assigned
    assert set(assigned[moved].tolist()) == {1}
    assert set(split[moved].tolist()) == {2}


def test_15_the_largest_is_split_first_with_the_smallest_of_that_moment() -> None:
    assigned = torch.tensor([0] * 8 + [1] * 10 + [2] * 1 + [3] * 0 + [4] * 1)
    split = cluster_tree.balance(assigned, 5, 1.5 / 5, torch.Generator().manual_seed(0))
    assert split.bincount().tolist() == [4, 5, 5, 5, 1]


def test_15_who_leaves_is_drawn() -> None:
    assigned = torch.zeros(1000, dtype=torch.int64)
    split = cluster_tree.balance(assigned, 2, 0.75, torch.Generator().manual_seed(0))
    assert 200 < int(split[:500].sum()) < 300  # half of a half, within 6 sigma


def test_15_a_cluster_at_the_bound_is_left_alone() -> None:
    assigned = torch.tensor([0] * 6 + [1] * 1 + [2] * 1)
    assert torch.equal(cluster_tree.balance(assigned, 3, 0.75, torch.Generator()), assigned)


@pytest.mark.parametrize("seed", range(3))
def test_15_one_blob_leaves_no_cluster_empty(seed: int) -> None:
    blob = torch.eye(1, 12) + 0.05 * draw(800, 12, seed=seed)
    sizes = ClusterTree.fit(blob, branching=8, depth=1, seed=seed).route(blob)[:, 0].bincount(minlength=8)
    assert 0 < sizes.min() <= sizes.max() <= 800 * 1.5 / 8


@pytest.mark.parametrize("seed", range(3))
def test_15_a_dominating_cluster_is_shared_out_up_to_the_bound(seed: int) -> None:
    x = dominated(seed)
    balanced, free = (
        ClusterTree.fit(x, branching=8, depth=1, max_share=share, seed=seed).route(x)[:, 0].bincount(minlength=8)
        for share in (None, 1.0)
    )
    assert balanced.max() <= len(x) * 1.5 / 8 < free.max()


def test_clusters_that_are_apart_are_found() -> None:
    topics = torch.eye(4, 8).repeat(25, 1) + 0.02 * draw(100, 8)
    paths = ClusterTree.fit(topics, branching=4, depth=1).route(topics).view(25, 4)
    assert (paths == paths[0]).all()
    assert paths[0].unique().numel() == 4


def test_a_centroid_is_the_mean_of_its_rows_and_not_normalised() -> None:
    x = F.normalize(torch.eye(2, 6).repeat(20, 1) + 0.1 * draw(40, 6), dim=-1)
    tree = ClusterTree.fit(7 * x, branching=2, depth=1)
    paths = tree.route(x)[:, 0]
    means = torch.stack([x[paths == node].mean(0) for node in (0, 1)])
    torch.testing.assert_close(tree.centroids[0], means)
    assert (tree.centroids[0].norm(dim=-1) < 0.999).all()


def test_a_step_sees_rows_that_the_steps_before_did_not() -> None:
    x = F.normalize(draw(40, 4), dim=-1)
    with (
        patch.object(cluster_tree, "balance", wraps=cluster_tree.balance) as balance,
        patch.object(torch, "addmm", wraps=torch.addmm) as product,
    ):
        ClusterTree.fit(x, branching=2, depth=1, steps=4, sample=10)
    assert [len(call.args[0]) for call in balance.call_args_list] == [10] * 4
    seen = torch.cat([call.args[1] for call in product.call_args_list])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, F.normalize(x, dim=-1).tolist()))


def test_a_node_with_few_rows_makes_them_centroids_and_routes_nothing_to_the_others() -> None:
    x = torch.eye(3, 5)
    tree = ClusterTree.fit(x, branching=4, depth=2)
    assert torch.equal(tree.centroids[0], x[[0, 1, 2, 0]])
    assert torch.equal(tree.centroids[1].view(4, 4, 5), tree.centroids[0].unsqueeze(1).expand(4, 4, 5))
    assert tree.route(x).tolist() == [[0, 0], [1, 4], [2, 8]]


def test_rows_that_are_all_the_same_are_fitted() -> None:
    tree = ClusterTree.fit(torch.ones(50, 4), branching=4, depth=2, steps=3)
    torch.testing.assert_close(tree.centroids[1], torch.full((16, 4), 0.5))


def test_the_seed_alone_decides_and_the_global_random_state_is_left_alone() -> None:
    x = draw(300, 6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ClusterTree.fit(x, branching=3, depth=2, sample=50)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert ClusterTree.fit(x, branching=3, depth=2, sample=50).fingerprint == one.fingerprint
    assert ClusterTree.fit(x, branching=3, depth=2, sample=50, seed=1).fingerprint != one.fingerprint
    with torch.autocast("cpu", torch.bfloat16):
        assert ClusterTree.fit(x, branching=3, depth=2, sample=50).fingerprint == one.fingerprint


def test_levels_are_counted_from_one(tree: ClusterTree) -> None:
    assert [tree.num_nodes(level) for level in (1, 2, 3)] == [4, 16, 64] == [len(c) for c in tree.centroids]
    for level in (0, 4):
        with pytest.raises(ValueError, match=rf"^level={level} is not in the tree; use 1 to depth=3"):
            tree.num_nodes(level)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_07_a_loaded_tree_is_the_same_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tree = ClusterTree.fit(draw(60, 5).to(dtype), branching=3, depth=2, steps=2)
    tree.save(tmp_path / "tree.safetensors")
    loaded = ClusterTree.load(tmp_path / "tree.safetensors")
    assert all(map(torch.equal, loaded.centroids, tree.centroids))
    assert loaded.centroids[0].dtype == dtype
    assert loaded.fingerprint == tree.fingerprint
    assert repr(loaded) == "ClusterTree(branching=3, depth=2, width=5)"
    assert torch.equal(loaded.route(draw(20, 5)), tree.route(draw(20, 5)))


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path: Path, tree: ClusterTree) -> None:
    path = tmp_path / "tree.safetensors"
    tree.save(path)

    def fail(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    with patch("safetensors.torch.save_file", fail), pytest.raises(OSError, match="disk full"):
        random_tree(2, 1, 3).save(path)
    assert ClusterTree.load(path).fingerprint == tree.fingerprint
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_tree_or_a_damaged_one_is_refused(tmp_path: Path, tree: ClusterTree) -> None:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is not a saved tree .* write it with tree\.save"):
        ClusterTree.load(path)
    save_file({"level_1": draw(2, 3)}, path)
    with pytest.raises(ValueError, match="holds no memzoo cluster tree, version 1"):
        ClusterTree.load(path)
    tree.save(path)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    assert len(load_file(path)) == 3
    with pytest.raises(ValueError, match="the file is damaged; copy it again"):
        ClusterTree.load(path)


def test_the_fingerprint_tells_values_shapes_and_dtypes_apart() -> None:
    level = draw(4, 2)
    trees = [[level], [level.double()], [level.view(2, 4)], [level + 1], [level[:2], level]]
    assert len({ClusterTree(levels).fingerprint for levels in trees}) == len(trees)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branching": 1}, "branching=1 makes a chain"),
        ({"depth": 0}, "depth=0 is not a whole number >= 1"),
        ({"steps": 0}, "steps=0 is not"),
        ({"sample": 3}, "sample=3 is too small to start branching=4"),
        ({"max_share": 0.2}, "max_share=0.2 is not within 1 / branching=0.25 and 1"),
        ({"max_share": 1.5}, "max_share=1.5 is not within"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ClusterTree.fit(draw(9, 3), **{"branching": 4, "depth": 1} | options)


def test_embeddings_that_do_not_fit_are_named(tree: ClusterTree) -> None:
    with pytest.raises(ValueError, match=r"^embeddings has shape \(2, 5\): its width is 5, the tree was fitted on 8"):
        tree.route(draw(2, 5))
    with pytest.raises(ValueError, match=r"^embeddings is not finite in row 1; leave"):
        tree.route(torch.tensor([[0.0], [torch.nan]]).expand(2, 8))
    with pytest.raises(ValueError, match=r"^embeddings has shape \(8,\) and dtype torch.float32; it must be"):
        tree.route(draw(8))
    with pytest.raises(ValueError, match=r"dtype torch.int64; it must be floating point"):
        ClusterTree.fit(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^embeddings has shape \(0, 3\): no rows"):
        ClusterTree.fit(draw(0, 3))
    with pytest.raises(ValueError, match=r"^blocked\[2\] has shape \(4,\) and dtype torch.bool; it must be \(16,\)"):
        tree.route(draw(2, 8), blocked={2: torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"^level=4 is not in the tree"):
        tree.route(draw(2, 8), blocked={4: torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"^keep has shape \(2, 2\); it must be \(batch, depth\), \(2, 3\)"):
        tree.route(draw(2, 8), keep=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^margin=1 is not in \[0, 1\)"):
        tree.route(draw(2, 8), margin=1)


def test_levels_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"^centroids=\(\) holds no level"):
        ClusterTree([])
    with pytest.raises(ValueError, match=r"^centroids\[0\] has 1 rows; the root needs at least two"):
        ClusterTree([draw(1, 3)])
    with pytest.raises(ValueError, match=r"^centroids\[1\] has shape \(5, 3\); .* level 2 must be \(4, 3\)"):
        ClusterTree([draw(2, 3), draw(5, 3)])


def test_repeated_centroids_are_those_of_an_earlier_sibling() -> None:
    level = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])
    below = draw(9, 2)
    below[5] = below[3]
    below[6] = below[3]  # of another parent
    tree = ClusterTree([level, below])
    assert [mask.nonzero().squeeze(-1).tolist() for mask in tree.repeated] == [[1], [5]]
