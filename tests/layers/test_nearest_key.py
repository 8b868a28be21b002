"""Nearest key against brute force, for every way of cutting it into blocks."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from memzoo.layers.ops.nearest_key import nearest_key
from memzoo.layers.reference.nearest_key import nearest_key as reference

CHUNKS = (1, 5_000, 40_000, 300_000, 64_000_000)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_force(queries: Tensor, keys: Tensor) -> Tensor:
    heads = queries.transpose(0, 1)
    return torch.cdist(heads, keys, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1).T


@pytest.mark.parametrize("pairs", [1, 20, 32, 90, 96, 97, 300])
def test_01_it_is_brute_force_for_every_chunk_size(pairs: int) -> None:
    queries, keys = draw(7, 5, 3), draw(5, pairs, 3, seed=1)
    expected = brute_force(queries, keys)
    first = nearest_key(queries, keys)
    for chunk_bytes in CHUNKS:
        indices, distances = nearest_key(queries, keys, chunk_bytes=chunk_bytes)
        assert torch.equal(indices[..., 0], expected)
        assert torch.equal(distances, first[1])
    exact = (queries - keys[torch.arange(5), expected]).square().sum(-1)
    torch.testing.assert_close(first[1][..., 0], exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_01_of_duplicate_keys_the_lowest_is_taken(dtype: torch.dtype) -> None:
    distinct, copies = 24, 20
    keys = draw(3, distinct, 4, dtype=dtype).repeat(1, copies, 1)
    queries = draw(50, 3, 4, seed=1, dtype=dtype)
    for chunk_bytes in CHUNKS:
        assert torch.equal(nearest_key(queries, keys, chunk_bytes=chunk_bytes)[0][..., 0], brute_force(queries, keys))


def test_01_of_keys_on_both_sides_the_lowest_is_taken() -> None:
    keys = torch.arange(200.0)[torch.randperm(200, generator=torch.Generator().manual_seed(0))].view(1, 200, 1)
    queries = (torch.arange(199.0) + 0.5).view(-1, 1, 1)
    places = keys[0, :, 0].argsort()
    indices, distances = nearest_key(queries, keys)
    assert torch.equal(indices[:, 0, 0], places[:-1].minimum(places[1:]))
    assert (distances == 0.25).all()


@pytest.mark.parametrize(("pairs", "topk"), [(150, 1), (150, 3), (150, 40), (40, 3), (5, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_reference(pairs: int, topk: int, masked: bool) -> None:
    queries, keys = draw(2, 2, 3, 4), draw(3, pairs, 4, seed=1)
    keys[:, -1] = keys[:, 0]
    allowed = torch.rand(3, pairs, generator=torch.Generator().manual_seed(2)) < 0.3
    allowed[0] = False
    allowed[1] = False
    allowed[1, pairs // 2] = True
    mask = allowed if masked else None
    expected = reference(queries, keys, topk=topk, allowed=mask)
    for chunk_bytes in CHUNKS:
        found = nearest_key(queries, keys, topk=topk, allowed=mask, chunk_bytes=chunk_bytes)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-13, atol=1e-13)
    if masked:
        assert (found[0][..., 1, 0] == pairs // 2).all()
        assert (found[0][..., 1, 1:] == -1).all()
        assert found[1][..., 1, 1:].isposinf().all()


@pytest.mark.parametrize("masked", [False, True])
def test_float32_far_from_zero_finds_what_float64_finds(masked: bool) -> None:
    """Where ``|k|^2 - 2 q.k`` of float32 would be off by more than a distance."""
    keys = (1000 + draw(4, 400, 3)).float()
    queries = (1000 + draw(60, 4, 3, seed=1)).float()
    allowed = torch.rand(4, 400, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    found, exact = (nearest_key(q, k, allowed=allowed) for q, k in ((queries, keys), (queries.double(), keys.double())))
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("topk", [1, 2])
def test_keys_that_rounding_cannot_tell_apart_are_all_measured(topk: int) -> None:
    """In more groups than are measured otherwise: equal keys, and one that is nearer by less than a score shows."""
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        keys, queries = 3 * draw(2, 1200, 14, seed=seed).float(), draw(7, 2, 14, seed=seed + 100).float()
        near = queries[0] + 0.5 * draw(2, 14, seed=seed + 200).float()
        groups = torch.randperm(37, generator=generator)[:8].sort()[0]
        places = groups * 32 + torch.randint(32, (8,), generator=generator)
        keys[:, places[1:]] = near[:, None]
        keys[:, places[0]] = near + 1e-7 * draw(2, 14, seed=seed + 300).float()
        exact = (queries[:, :, None] - keys).square().sum(-1).sort(dim=-1, stable=True)
        for chunk_bytes in (100, 20_000, 8_000_000):
            indices, distances = nearest_key(queries, keys, topk=topk, chunk_bytes=chunk_bytes)
            assert torch.equal(indices, exact[1][..., :topk])
            assert torch.equal(distances, exact[0][..., :topk])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_not_rounded_as_tf32_or_bfloat16(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the doubt is more than float32's."""
    seen, product = [], torch.baddbmm

    def watched(*arguments: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return product(*arguments)

    monkeypatch.setattr(torch, "baddbmm", watched)
    torch.set_float32_matmul_precision(precision)
    try:
        nearest_key(draw(3, 2, 4).float(), draw(2, 200, 4).float())
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_a_query_that_is_a_key_is_at_distance_zero() -> None:
    keys = draw(3, 500, 8, dtype=torch.float32)
    indices, distances = nearest_key(keys.transpose(0, 1), keys)
    assert torch.equal(indices[..., 0], torch.arange(500)[:, None].expand(-1, 3))
    assert not distances.any()


def test_queries_do_not_see_each_other() -> None:
    """To the bit, in any number, beside NaN and infinity."""
    queries, keys = draw(64, 6, 14, dtype=torch.float32), draw(6, 700, 14, seed=1, dtype=torch.float32)
    together = nearest_key(queries, keys, topk=2)
    for row in (0, 17, 63):
        alone = nearest_key(queries[row], keys, topk=2)
        assert all(torch.equal(one, both[row]) for one, both in zip(alone, together, strict=True))
    queries[0], queries[1] = torch.nan, torch.inf
    beside = nearest_key(queries, keys, topk=2)
    assert all(torch.equal(one[2:], both[2:]) for one, both in zip(beside, together, strict=True))
    assert beside[0].max() < 700
    assert nearest_key(queries, keys[:, :9], topk=2)[0].max() < 9


def test_it_computes_in_float32_and_is_not_differentiated() -> None:
    queries, keys = draw(9, 4, 5, dtype=torch.float32), draw(4, 200, 5, seed=1, dtype=torch.float32)
    expected = nearest_key(queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_key(queries.requires_grad_(), keys.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1].requires_grad
    half = nearest_key(queries.bfloat16(), keys.bfloat16())
    assert half[1].dtype == torch.float32
    assert torch.equal(half[0], nearest_key(queries.bfloat16().float(), keys.bfloat16().float())[0])
    assert nearest_key(queries.double(), keys)[1].dtype == torch.float64


def test_no_queries_find_nothing() -> None:
    indices, distances = nearest_key(draw(0, 4, 5), draw(4, 200, 5), topk=2)
    assert indices.shape == distances.shape == (0, 4, 2)


def test_16_it_is_one_node_of_a_graph_for_any_number_of_queries() -> None:
    class Find(torch.nn.Module):
        def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            return nearest_key(queries, keys, topk=2)

    queries, keys = draw(9, 4, 5), draw(4, 200, 5, seed=1)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Find(), (queries, keys), dynamic_shapes=({0: rows}, None))
    nodes = [str(node.target) for node in program.graph.nodes]
    assert sum("nearest_key" in name for name in nodes) == 1
    compiled = torch.compile(Find(), fullgraph=True, backend="eager")
    for rows in (9, 13):
        more = draw(rows, 4, 5, seed=3)
        expected = nearest_key(more, keys, topk=2)
        for found in (program.module()(more, keys), compiled(more, keys)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch._dynamo.reset()


def test_bad_arguments_are_refused() -> None:
    queries, keys = draw(9, 4, 5), draw(4, 20, 5)
    everything = torch.ones(4, 20, dtype=torch.bool)
    for arguments, words in (
        ({"queries": queries[..., :-1]}, r"queries has shape \(9, 4, 4\).*\(\.\.\., 4, 5\)"),
        ({"queries": queries.long()}, "queries .*torch.int64"),
        ({"keys": keys[0]}, r"keys has shape \(20, 5\)"),
        ({"keys": keys[:, :0]}, r"keys has shape \(4, 0, 5\)"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 21}, "topk=21 is more than the pairs=20"),
        ({"allowed": everything.float()}, "allowed .*torch.float32"),
        ({"allowed": everything[:, 1:]}, r"allowed has shape \(4, 19\)"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
    ):
        with pytest.raises(ValueError, match=words):
            nearest_key(**{"queries": queries, "keys": keys} | arguments)


PEAK = """
import resource, torch
from memzoo.layers.ops.nearest_key import nearest_key
torch.set_num_threads(1)
queries, keys = torch.randn(64, 64, 14), torch.randn(64, 4096, 14)
nearest_key(queries[:2, :2], keys[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_key(queries, keys)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is in other units elsewhere")
def test_a_quarter_of_the_official_size_takes_less_than_ten_megabytes_more() -> None:
    """Its scores would take 67; there are as many blocks of it as there is room for, so all of it takes no more."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 10_000
