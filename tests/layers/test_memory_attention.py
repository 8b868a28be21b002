"""MemoryAttention: the contract of a mixer holds with memories, and memories are what the equations say."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memzoo.layers import Attention, MemoryAttention, SwiGLU, create_layer
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.products import memory_patch
from memzoo.layers.reference import memory_blocks as loop

EXACT = {"rtol": 0, "atol": 1e-10}
DIM, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 2
KINDS = ("kv", "lora_qk", "lora_vo")
PATHS = torch.tensor([[0, 1], [0, 0], [1, 2]])


def fetch(kind: str, paths: Tensor = PATHS, *, fresh: bool = False, dtype=torch.float64, **options) -> Fetched:
    sizes = dict(attention_dim=HEADS * HEAD_DIM, key_dim=KV_HEADS * HEAD_DIM, num_heads=HEADS, hidden_dim=5, scale=0.7)
    layout = BankLayout(1, DIM, rows=(3, 2), branching=2, kind=kind, dtype=dtype, **sizes | options)

    def block(node: Node) -> Tensor:
        if fresh:
            return layout.initial_block(node, 0).to(dtype)
        generator = torch.Generator().manual_seed(1000 * node.level + node.node)
        drawn = torch.randn(layout.block_shape(node.level), generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    return Fetched.of(layout, paths, block)


def memories_of(kind: str, paths: Tensor = PATHS) -> LayerMemories:
    return fetch(kind, paths).layers()[0]


def layer(**options) -> MemoryAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, qk_norm=True, num_prefix_tokens=2)
        return MemoryAttention(DIM, **sizes | options).double()


def tokens(batch: int = 3, time: int = 7) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def expected_row(module: MemoryAttention, x: Tensor, memories: LayerMemories, row: int) -> Tensor:
    """One sequence: plain attention with patched weights, and the keys and values read by the loop."""
    plain, kind = copy.deepcopy(module), memories.layout.kind
    own = tuple(g for g in memories.groups if g.rows is None or row in g.rows.tolist())
    if kind != "kv":
        names = [slab.name for slab in memories.layout.slabs]
        with torch.no_grad():
            for group in own:
                slabs = dict(zip(names, group.slabs, strict=True))
                for name in ("query", "key") if kind == "lora_qk" else ("value", "out"):
                    getattr(plain, name).weight += 0.7 * slabs[f"{name}_out"].T @ slabs[f"{name}_in"]
        return Attention.forward(plain, x)[0]
    q, heads = plain.query(x), (HEADS, HEAD_DIM)
    full = plain.query_norm.weight.numel() > HEAD_DIM
    q = plain.query_norm(q).unflatten(-1, heads) if full else plain.query_norm(q.unflatten(-1, heads))
    alone = replace(memories, groups=tuple(replace(g, rows=None) for g in own), batch_size=1)
    _, _, memory = Attention.forward(plain, x, return_memory=True)
    return plain.out(memory + loop.memory_attention(q, alone, scale=module.scale).flatten(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rotary_base": None, "qk_norm": "full", "bias": True, "scale": 0.3}])
def test_10_every_row_is_attention_with_its_own_memories(kind, options):
    module, x, memories = layer(**options), tokens(), memories_of(kind)
    y, _ = module(x, memories=memories)
    for b in range(3):
        torch.testing.assert_close(y[b : b + 1], expected_row(module, x[b : b + 1], memories, b), **EXACT)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(module(x[order], memories=memories_of(kind, PATHS[order]))[0], y[order], **EXACT)
    shared = memories_of(kind, PATHS[:1].expand(3, -1))
    torch.testing.assert_close(module(x[:1].expand(3, -1, -1), memories=shared)[0], y[:1].expand(3, -1, -1), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_everything_and_those_of_blocks_are_the_derivatives(kind):
    module, x, fetched = layer(), tokens().requires_grad_(), fetch(kind)
    blocks = list(fetched.blocks)

    def run(*blocks: Tensor) -> Tensor:
        return module(x, memories=replace(fetched, blocks=blocks).layers()[0])[0].square().sum()

    leaves = [*blocks, x, *module.parameters()]
    found = torch.autograd.grad(run(*blocks), leaves)
    assert all(gradient.any() for gradient in found)
    directions = [torch.randn_like(block) for block in blocks]
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=False))
    with torch.no_grad():
        ahead, behind = (run(*(b + s * d for b, d in zip(blocks, directions, strict=True))) for s in (1e-6, -1e-6))
    torch.testing.assert_close((ahead - behind) / 2e-6, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_16_fresh_memories_change_no_bit(kind, dtype):
    module, x = layer().to(dtype), tokens().to(dtype)
    y, state = module(x, memories=fetch(kind, fresh=True, dtype=dtype).layers()[0])
    expected, expected_state = Attention.forward(module, x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(state.keys, expected_state.keys)
    assert torch.equal(state.values, expected_state.values)


def test_without_memories_for_attention_it_is_plain_attention():
    module, x = layer(), tokens()
    empty = replace(memories_of("kv"), groups=())
    for memories in (None, empty, memories_of("ffn"), memories_of("lora_ffn")):
        y, _, memory = module(x, memories=memories, return_memory=True)
        assert torch.equal(y, Attention.forward(module, x)[0])
        assert torch.equal(module.out(memory), y)


@pytest.mark.parametrize("kind", KINDS)
def test_11_rows_that_avoid_a_blocked_node_are_equal_to_the_bit(kind):
    module, x, memories = layer(), tokens(), memories_of(kind)
    others = tuple(g for g in memories.groups if g.rows is None or g.rows.tolist() != [2])
    assert len(others) == len(memories.groups) - 2
    y = module(x, memories=memories)[0]
    blocked = module(x, memories=replace(memories, groups=others))[0]
    assert torch.equal(blocked[:2], y[:2])
    assert torch.equal(blocked[2:], module(x[2:])[0])
    assert not torch.allclose(y[2:], blocked[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_does_not_see_the_future_nor_a_row_another_one(kind):
    module, x, memories = layer(), tokens(), memories_of(kind)
    y = module(x, memories=memories)[0]
    later, other = x.clone(), x.clone()
    later[:, 4:] += 1
    other[0] += 1
    assert torch.equal(module(later, memories=memories)[0][:, :4], y[:, :4])
    assert torch.equal(module(other, memories=memories)[0][1:], y[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [5, 1, 1]])
@pytest.mark.parametrize("donate", [False, True])
def test_any_cutting_gives_the_outputs_and_state_of_one_call(kind, cuts, donate):
    module, x, memories = layer(), tokens(), memories_of(kind)
    with torch.no_grad():
        y, end = module(x, memories=memories)
        state, outputs = None, []
        for piece in x.split(cuts, dim=1):
            out, state = module(piece, state, memories=memories, donate=donate)
            outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, **EXACT)
    for name, tensor in state.named_tensors().items():
        torch.testing.assert_close(tensor, end.named_tensors()[name], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_do_not_exist_whatever_they_hold(kind):
    module, x, memories = layer(), tokens(), memories_of(kind)
    mask = torch.tensor([[True, False, True, True, False, True, True], [False] * 7, [False] * 3 + [True] * 4])
    x[~mask] = torch.nan
    y, state = module(x.requires_grad_(), mask=mask, memories=memories)
    assert not y[~mask].any()
    assert state.position.tolist() == [5, 0, 4]
    for b in (0, 2):
        alone, _ = module(x[b : b + 1, mask[b]], memories=memories_of(kind, PATHS[b : b + 1]))
        torch.testing.assert_close(y[b : b + 1, mask[b]], alone, **EXACT)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_ones_with_the_memories_of_their_row(kind):
    module, x, memories = layer(), tokens(), memories_of(kind)
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5] * 7, [3, 4, 4, 4, 4, 4, 4]])
    mask = torch.ones_like(doc_ids, dtype=torch.bool)
    mask[0, 1] = False
    y, state = module(x, mask=mask, doc_ids=doc_ids, memories=memories)
    for b in range(3):
        own = memories_of(kind, PATHS[b : b + 1])
        for document in doc_ids[b].unique():
            where = (doc_ids[b] == document) & mask[b]
            alone, end = module(x[b : b + 1, where], memories=own)
            torch.testing.assert_close(y[b : b + 1, where], alone, **EXACT)
        torch.testing.assert_close(state.keys[b, : end.keys.shape[1]], end.keys[0], **EXACT)
    more, _ = module(x, state, doc_ids=doc_ids[:, -1:].expand(-1, 7), memories=memories)  # they go on
    row = torch.cat((x[2:, 1:], x[2:]), 1)
    whole, _ = module(row, memories=memories_of(kind, PATHS[2:]))
    torch.testing.assert_close(more[2:], whole[:, 6:], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_what_the_last_projection_reads(kind):
    module, x, memories = layer(), tokens(), memories_of(kind)
    y, _, memory = module(x, memories=memories, return_memory=True)
    assert torch.equal(y, module(x, memories=memories)[0])
    assert torch.allclose(module.out(memory), y) == (kind != "lora_vo")


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_whole_with_shared_memories(kind):
    module, x, memories = layer(), tokens(), memories_of(kind, PATHS[:1].expand(3, -1))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, memories=memories)[0], module(x, memories=memories)[0], **EXACT)


@torch.no_grad()
def test_under_autocast_memories_on_the_output_reach_a_float32_stream_in_float32():
    module, x = layer().float(), tokens().float()
    fetched = fetch("lora_vo", dtype=torch.float32)
    memories = fetched.layers()[0]
    names = [slab.name for slab in memories.layout.slabs]
    for group in memories.groups:
        group.slabs[names.index("value_out")].zero_()
        group.slabs[names.index("out_out")].mul_(1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        (y, _, heads), (plain, _) = module(x, memories=memories, return_memory=True), module(x)
        update = memory_patch(heads, memories, "out")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(y, plain.float() + update)
    assert (y.bfloat16() == plain).float().mean() > 0.5  # most would be lost


@pytest.mark.parametrize(
    ("options", "memories", "words"),
    [
        ({}, {"kind": "kv", "num_heads": 2}, "memories have num_heads=2, attention_dim=8, the layer 4 and 8"),
        ({}, {"kind": "lora_qk", "key_dim": None}, "patch a 'key' matrix from 6 to 8 channels, .* from 6 to 4"),
        ({}, {"kind": "kv", "dtype": torch.float32}, "fetched blocks have torch.float32; use bank.fetch"),
        ({}, {"kind": "kv", "paths": PATHS[:2]}, "x has batch 3, memories were fetched for batch_size=2"),
    ],
    ids=["heads", "width", "dtype", "batch"],
)
def test_memories_that_do_not_fit_are_refused(options, memories, words):
    with pytest.raises(ValueError, match=words):
        layer(**options)(tokens(), memories=fetch(**memories).layers()[0])


def test_it_is_registered_and_takes_memories():
    module = create_layer("memory_attention", 16)
    assert isinstance(module, MemoryAttention)
    assert module.takes_memories
    assert not hasattr(SwiGLU(4), "takes_memories")
