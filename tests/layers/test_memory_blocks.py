"""The ops of memory blocks against their loops: spec section 16, the parts that are about a layer."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memzoo.layers.banks import products as ops
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.reference import memory_blocks as loop

EXACT = {"rtol": 0, "atol": 1e-10}
DIM, HEADS, HEAD_DIM = 6, 2, 4
PATHS = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 0, 2], [1, 3, 7]])  # the last row shares nothing with the others
SIZES = {"attention_dim": HEADS * HEAD_DIM, "key_dim": HEAD_DIM, "num_heads": HEADS, "hidden_dim": 10}
KINDS = {
    "ffn": {"kind": "ffn"},
    "ffn_relu": {"kind": "ffn", "activation": "relu"},
    "ffn_gelu_plain": {"kind": "ffn", "activation": "gelu", "gated": False},
    "ffn_gelu_tanh": {"kind": "ffn", "activation": "gelu_tanh"},
    "query": {"kind": "lora_qk"},
    "key": {"kind": "lora_qk"},
    "out": {"kind": "lora_vo", "scale": 0.5},
    "down": {"kind": "lora_ffn"},
    "kv": {"kind": "kv", "key_dim": None},
}


def fetch(paths: Tensor, *, rows=(3, 2, 1), seed: int = 0, **options) -> Fetched:
    """Random blocks of two layers, leaves that require gradients, each drawn for its node."""
    layout = BankLayout(2, DIM, **dict(rows=rows, branching=2, dtype=torch.float64) | SIZES | options)

    def block(node: Node) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * node.level + node.node + seed)
        shape = layout.block_shape(node.level)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return Fetched.of(layout, paths, block)


def draw(layout: BankLayout, node: Node) -> Tensor:
    return torch.randn(layout.block_shape(node.level))


def without(fetched: Fetched, *nodes: tuple[int, int]) -> Fetched:
    """What is fetched when some nodes are blocked."""
    kept = [i for i, node in enumerate(fetched.nodes) if node not in nodes]
    nodes, blocks, readers = ([every[i] for i in kept] for every in (fetched.nodes, fetched.blocks, fetched.readers))
    return replace(fetched, nodes=tuple(nodes), blocks=tuple(blocks), readers=tuple(readers))


def inputs(case: str, batch: int = len(PATHS)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = {"kv": (HEADS, HEAD_DIM), "out": (HEADS * HEAD_DIM,), "down": (10,)}.get(case, (DIM,))
    return torch.randn(batch, 3, *shape, generator=generator, dtype=torch.float64).requires_grad_()


def run(module, case: str, x: Tensor, memories: LayerMemories) -> Tensor:
    if memories.layout.kind == "ffn":
        return module.memory_feed_forward(x, memories)
    if case == "kv":
        return module.memory_attention(x, memories)
    return module.memory_patch(x, memories, case)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("paths", [PATHS, PATHS[:1].expand(4, -1)], ids=["mixed", "shared"])
def test_outputs_and_gradients_of_inputs_and_blocks_are_those_of_the_loop(case, paths):
    fetched, x = fetch(paths, **KINDS[case]), inputs(case)
    memories = fetched.layers()[1]
    y, expected = run(ops, case, x, memories), run(loop, case, x, memories)
    torch.testing.assert_close(y, expected, **EXACT)
    leaves, probe = [x, *fetched.blocks], torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, leaves, probe), **EXACT
    )


@pytest.mark.parametrize("case", KINDS)
def test_02_the_order_of_the_levels_does_not_matter(case):
    memories, x = fetch(PATHS, **KINDS[case]).layers()[0], inputs(case)
    turned = replace(memories, groups=memories.groups[::-1])
    torch.testing.assert_close(run(ops, case, x, turned), run(ops, case, x, memories), **EXACT)


@pytest.mark.parametrize("case", KINDS)
def test_10_a_mixed_batch_is_a_loop_over_its_sequences_and_follows_their_order(case):
    options, x = KINDS[case], inputs(case)
    y = run(ops, case, x, fetch(PATHS, **options).layers()[0])
    for b in range(len(PATHS)):
        alone = run(ops, case, x[b : b + 1], fetch(PATHS[b : b + 1], **options).layers()[0])
        torch.testing.assert_close(y[b : b + 1], alone, **EXACT)
    order = torch.tensor([2, 0, 3, 1])
    permuted = run(ops, case, x[order], fetch(PATHS[order], **options).layers()[0])
    torch.testing.assert_close(permuted, y[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", KINDS)
def test_11_a_blocked_node_leaves_rows_that_avoid_it_to_the_bit_and_others_as_without_that_level(case):
    fetched, x = fetch(PATHS, **KINDS[case]), inputs(case)
    y = run(ops, case, x, fetched.layers()[0])
    for node in ((1, 1), (2, 3), (3, 7)):  # of the last row
        blocked = run(ops, case, x, without(fetched, node).layers()[0])
        assert torch.equal(blocked[:3], y[:3])
        own = without(fetch(PATHS[3:], **KINDS[case]), node).layers()[0]
        torch.testing.assert_close(blocked[3:], run(ops, case, x[3:], own), **EXACT)
        assert not torch.allclose(blocked[3], y[3])
    none = without(fetched, (1, 1), (2, 3), (3, 7)).layers()[0]
    assert not run(ops, case, x, none)[3].any()
    assert run(ops, case, x, none)[0].any()


def test_11_one_token_of_a_wide_layer_does_not_see_a_node_of_others_blocked():
    """Widths and times at which libraries choose products by the number of rows."""
    for dim in (5, 512):
        layout = BankLayout(1, dim, rows=(24, 8), branching=4, dtype=torch.float32)
        paths = torch.tensor([[0, 1], [2, 9], [0, 0], [2, 8], [3, 12], [0, 1]])
        whole = Fetched.of(layout, paths, partial(draw, layout))
        x = torch.randn(6, 1, dim)
        y = ops.memory_feed_forward(x, whole.layers()[0])
        for gone, rows in (([(1, 2)], [1, 3]), ([(2, 9)], [1]), ([(1, 0), (2, 1)], [0, 2, 5]), ([(3, 12)], [])):
            blocked = ops.memory_feed_forward(x, without(whole, *gone).layers()[0])
            assert (blocked == y).all((1, 2)).tolist() == [row not in rows for row in range(6)]


class Count(TorchDispatchMode):
    """Counts what is run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("case", ["ffn", "kv", "query"])
def test_a_batch_is_gathered_once_a_level_however_many_nodes_it_reads(case):
    found = []
    for count in (2, 8):
        paths = torch.arange(8)[:, None] * count // 8
        x = inputs(case, 8)
        y = run(ops, case, x, fetch(paths, rows=(3,), **KINDS[case] | {"branching": 8}).layers()[0])
        with Count() as counted:
            y.sum().backward()
        found.append(counted.calls["index_add"])
    assert found[0] == found[1]


@pytest.mark.parametrize("case", KINDS)
def test_04_the_gradient_of_a_shared_block_is_the_sum_over_its_readers(case):
    options, x, probe = KINDS[case], inputs(case), None
    paths = PATHS[[0, 2]]  # both through node 0 of level 1, and through 2 of level 3
    fetched = fetch(paths, **options)
    y = run(ops, case, x[:2], fetched.layers()[0])
    probe = torch.randn_like(y)
    together = dict(zip(fetched.nodes, torch.autograd.grad(y, fetched.blocks, probe), strict=True))
    apart: dict[Node, Tensor] = {}
    for b in range(2):
        own = fetch(paths[b : b + 1], **options)
        out = run(ops, case, x[b : b + 1], own.layers()[0])
        for node, gradient in zip(own.nodes, torch.autograd.grad(out, own.blocks, probe[b : b + 1]), strict=True):
            apart[node] = apart.get(node, 0) + gradient
    assert list(together) == [(1, 0), (2, 0), (2, 1), (3, 2)]
    assert together.keys() == apart.keys()
    for node, gradient in together.items():
        torch.testing.assert_close(gradient, apart[node], **EXACT)
        assert gradient[0].any()
        assert not gradient[1].any()  # the other layer was not run


@pytest.mark.parametrize("case", KINDS)
def test_01_blocks_as_they_start_add_nothing(case):
    layout = fetch(PATHS, **KINDS[case]).layout
    fetched = Fetched.of(layout, PATHS, lambda node: layout.initial_block(node, seed=0).double())
    assert not run(ops, case, inputs(case), fetched.layers()[0]).any()
    assert any(block.any() for block in fetched.blocks)


def test_of_several_levels_the_keys_share_one_softmax():
    """Equal keys everywhere: the read is the plain mean of all levels' values."""
    fetched = fetch(PATHS[:1], **KINDS["kv"])
    memories = fetched.layers()[0]
    groups = tuple(replace(g, slabs=(torch.ones_like(g.slabs[0]), g.slabs[1])) for g in memories.groups)
    read = ops.memory_attention(inputs("kv", 1), replace(memories, groups=groups))
    mean = torch.cat([group.slabs[1] for group in groups]).mean(0).unflatten(0, (HEADS, HEAD_DIM))
    torch.testing.assert_close(read, mean.expand_as(read), **EXACT)


def test_large_scores_do_not_overflow():
    fetched = fetch(PATHS, **KINDS["kv"])
    y = ops.memory_attention(1e4 * inputs("kv"), fetched.layers()[0])
    y.sum().backward()
    assert y.isfinite().all()
    assert all(block.grad.isfinite().all() for block in fetched.blocks)


@pytest.mark.parametrize("case", ["ffn", "key", "kv"])
def test_half_precision_is_added_up_in_float32(case):
    fetched = fetch(PATHS, **KINDS[case])
    x = inputs(case)
    y = run(ops, case, x.bfloat16(), fetched.to(dtype=torch.bfloat16).layers()[0])
    assert y.dtype == torch.float32
    expected = run(ops, case, x, fetched.layers()[0])
    assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_of_bfloat16_add_up_to_what_bfloat16_cannot_hold(dtype):
    """256 + 0.5 is 256 in bfloat16."""
    layout = BankLayout(1, 1, rows=(1, 1, 1), branching=2, gated=False, activation="relu", dtype=dtype)
    adds = {1: 256.0, 2: 0.5, 3: 0.5}
    for paths in (torch.tensor([[0, 1, 2], [1, 2, 4]]), torch.tensor([[0, 1, 2]] * 2)):
        fetched = Fetched.of(layout, paths, lambda node: torch.tensor([[1.0, adds[node.level]]], dtype=dtype))
        y = ops.memory_feed_forward(torch.ones(2, 1, 1, dtype=dtype), fetched.layers()[0])
        assert y.tolist() == [[[257.0]], [[257.0]]]


@pytest.mark.parametrize("autocast", [False, True])
def test_near_scores_that_are_large_are_told_apart(autocast):
    """Scores 100 and 100.25, one a level: bfloat16 holds no number between 100 and 100.5."""
    layout = BankLayout(1, 2, (1, 1), 2, "kv", attention_dim=2, num_heads=1, dtype=torch.bfloat16)
    blocks = {1: [10.0, 0.0, 0.0, 0.0], 2: [10.0, 1.0, 1.0, 0.0]}  # a key, a value
    fetched = Fetched.of(layout, torch.tensor([[0, 1]]), lambda node: torch.tensor([blocks[node.level]]).bfloat16())
    q = torch.tensor([10.0, 0.25], dtype=torch.bfloat16).view(1, 1, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.memory_attention(q, fetched.layers()[0], scale=1.0)
    assert y[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.25)), abs=1e-5)
    assert y.dtype == torch.float32


def test_what_was_fetched_is_copied_and_pickled_after_it_was_read_with_gradients():
    fetched = fetch(PATHS)
    expected = [group.slabs for group in fetched.layers()[1].groups]
    for same in (copy.deepcopy(fetched), pickle.loads(pickle.dumps(fetched))):
        torch.testing.assert_close([group.slabs for group in same.layers()[1].groups], expected, rtol=0, atol=0)
        same.layers()[1].groups[0].slabs[0].sum().backward()
        assert same.blocks[0].grad is not None
    assert all(block.grad is None for block in fetched.blocks)


def test_16_numbers_on_a_path_are_those_of_the_papers_table():
    """r L d times 3 for "ffn", and so on: spec section 4, with all heads as wide as the paper's."""
    L, d, f, hd, r = 2, DIM, 10, HEADS * HEAD_DIM, 3
    sizes = SIZES | {"key_dim": None}
    counts = {
        kind: BankLayout(L, d, rows=(r,), branching=2, kind=kind, **sizes).fetched_parameters
        for kind in ("ffn", "kv", "lora_qk", "lora_vo", "lora_ffn")
    }
    lora = 2 * r * L * (d + hd)
    assert counts == {
        "ffn": 3 * r * L * d,
        "kv": 2 * r * L * hd,
        "lora_qk": lora,
        "lora_vo": lora,
        "lora_ffn": 3 * r * L * (d + f),
    }


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(4, 2, 5), r"x has width 5, memories are of a bank with dim=6; use a bank"),
        (torch.zeros(4, 6), r"x has shape \(4, 6\); memories are read by \(batch, time, 6\)"),
        (torch.zeros(3, 2, 6), r"x has batch 3, memories were fetched for batch_size=4; fetch them with one path"),
        (torch.zeros(4, 2, 6), r"float32, the fetched blocks have torch.float64; use bank.fetch\(paths, dtype=torch.f"),
        (torch.zeros(4, 2, 6, device="meta", dtype=torch.float64), r"x is on meta, .* on cpu.*fetched.to\('meta'\)"),
    ],
    ids=["width", "axes", "batch", "dtype", "device"],
)
def test_memories_for_another_input_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        ops.check_memories(fetch(PATHS).layers()[0], x)


def test_a_patch_for_another_matrix_is_refused():
    memories = fetch(PATHS, **KINDS["query"]).layers()[0]
    with pytest.raises(ValueError, match="patch a 'query' matrix from 6 to 8 channels, the layer's goes from 6 to 12"):
        ops.patched(torch.nn.Linear(6, 12).double(), inputs("query"), memories, "query")
