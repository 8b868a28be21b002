"""MemoryFeedForward: added and concatenated memories; the ops it stands on have their own tests."""

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch.block import Block
from memzoo.arch.causal_lm import residual_outputs
from memzoo.layers import Attention, GraphMemoryCell, MemoryFeedForward, SwiGLU, Trace, create_layer
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.banks.layout import BankLayout
from memzoo.layers.banks.products import memory_feed_forward, memory_patch
from memzoo.layers.reference import memory_blocks as loop
from tests.layers.memory_feedforward_cases import DIM, EXACT, FORMS, HIDDEN, MIXED, SAME, fetch, layer, tokens


def subset(memories: LayerMemories, levels: tuple[int, ...]) -> LayerMemories:
    return replace(memories, groups=tuple(g for level in levels for g in memories.groups if g.level == level))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("paths", [SAME, MIXED], ids=["shared", "mixed"])
def test_it_is_the_feed_forward_and_the_loop_over_memories_in_outputs_and_gradients(form, mode, paths):
    module, x, fetched = layer(form, mode), tokens().requires_grad_(), fetch(paths, **FORMS[form][1])
    for block in fetched.blocks:
        block.requires_grad_()
    memories = fetched.layers()[0]
    y, expected = module(x, memories), module.ffn(x) + loop.memory_feed_forward(x, memories)
    torch.testing.assert_close(y, expected, **EXACT)
    leaves, probe = [x, *module.parameters(), *fetched.blocks], torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, leaves, probe), **EXACT
    )
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, memories), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn"])
def test_01_without_memories_or_with_fresh_ones_the_output_is_that_of_the_feed_forward_to_the_bit(dtype, kind):
    module, x = layer().to(dtype), tokens(dtype=dtype)
    for paths in (SAME, MIXED):
        assert torch.equal(module(x, fetch(paths, fresh=True, dtype=dtype, kind=kind).layers()[0]), module.ffn(x))
    none = replace(fetch(dtype=dtype).layers()[0], groups=())
    for mode in ("add", "concat"):
        module.mode = mode
        assert torch.equal(module(x), module.ffn(x))
        assert torch.equal(module(x, none), module.ffn(x))


@pytest.mark.parametrize("form", FORMS)
def test_02_concatenated_is_added_for_every_subset_and_order_of_levels(form):
    add, concat, x = layer(form).float(), layer(form, "concat").float(), tokens(dtype=torch.float32)
    every = fetch(dtype=torch.float32, **FORMS[form][1]).layers()[0]
    subsets = [levels for n in (1, 2, 3) for levels in combinations((1, 2, 3), n)]
    with torch.no_grad():
        for training in (True, False):
            for levels in [*subsets, (3, 1, 2), (2, 1), (1, 2, 3)]:  # one module: what it keeps is used again and again
                memories = subset(every, levels)
                expected = add(x, memories)
                torch.testing.assert_close(concat.train(training)(x, memories), expected, rtol=0, atol=1e-5)
                torch.testing.assert_close(add(x, subset(every, levels[::-1])), expected, rtol=0, atol=1e-5)


def test_10_a_mixed_batch_is_a_loop_over_its_sequences():
    x, memories = tokens(), fetch(MIXED).layers()[0]
    for mode in ("add", "concat"):
        y = layer(mode=mode)(x, memories)
        for b in range(3):
            alone = layer(mode=mode)(x[b : b + 1], fetch(MIXED[b : b + 1]).layers()[0])
            torch.testing.assert_close(y[b : b + 1], alone, **EXACT)
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(layer(mode=mode)(x[order], fetch(MIXED[order]).layers()[0]), y[order], **EXACT)


def test_11_rows_that_avoid_a_blocked_node_are_equal_to_the_bit():
    x, memories = tokens(), fetch(MIXED).layers()[0]
    y = layer()(x, memories)
    others = [group for group in memories.groups if group.rows is None or group.rows.tolist() != [2]]
    assert len(others) == len(memories.groups) - 3
    blocked = layer()(x, replace(memories, groups=tuple(others)))
    assert torch.equal(blocked[:2], y[:2])
    assert torch.equal(blocked[2:], layer()(x[2:]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("paths", [SAME, MIXED], ids=["shared", "mixed"])
def test_16_low_rank_memories_patch_the_matrices_of_the_feed_forward(form, paths):
    module, x = layer(form), tokens()
    memories = fetch(paths, kind="lora_ffn", scale=0.7, **FORMS[form][1]).layers()[0]
    y = module(x, memories)
    names = [slab.name for slab in memories.layout.slabs]
    for b in range(3):
        patched = copy.deepcopy(module.ffn)
        for group in memories.groups:
            if group.rows is None or b in group.rows.tolist():
                slabs = dict(zip(names, group.slabs, strict=True))
                for name in ("gate", "up", "down") if form == "swiglu" else ("up", "down"):
                    getattr(patched, name).weight.data += 0.7 * slabs[f"{name}_out"].T @ slabs[f"{name}_in"]
        torch.testing.assert_close(y[b : b + 1], patched(x[b : b + 1]), **EXACT)


def test_memories_for_other_layers_are_ignored():
    kv = fetch(kind="kv", attention_dim=4, num_heads=2).layers()[0]
    assert torch.equal(layer()(tokens(), kv), layer()(tokens()))


# Around it


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn"])
def test_a_trace_gets_how_much_the_memories_add_to_every_token(mode, kind):
    module, x, trace = layer(mode=mode), tokens(), Trace()
    memories = fetch(kind=kind).layers()[0]
    y = module(x, memories, trace=trace)
    assert torch.equal(y, module(x, memories, trace=Trace(signals=False)))
    torch.testing.assert_close(trace.signals, {"memory_update": (y - module.ffn(x)).norm(dim=-1)}, **EXACT)
    trace = Trace()
    module(x, trace=trace)
    assert not trace.signals


@pytest.mark.parametrize("mode", ["add", "concat"])
def test_under_autocast_blocks_and_inputs_of_other_dtypes_meet(mode):
    module, x = layer(mode=mode), tokens()
    expected = module(x, fetch().layers()[0])
    module, memories = module.float(), fetch(dtype=torch.bfloat16).layers()[0]
    for grads in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grads):
            y = module.train(grads)(x.float(), memories)
        assert y.dtype == torch.float32
        assert (y - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn"])
def test_under_autocast_memories_too_small_for_bfloat16_reach_the_stream(mode, kind):
    module, x = layer(mode=mode).float().eval(), tokens(dtype=torch.float32)
    memories = fetch(dtype=torch.float32, kind=kind).layers()[0]
    for group in memories.groups:
        group.slabs[-1].mul_(1e-5)
        for inner in group.slabs[:-1] if kind == "lora_ffn" else ():  # of gate and up
            inner.zero_()
    if kind == "lora_ffn":
        for group in memories.groups:
            group.slabs[-2].fill_(1.0)  # into down
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = module(x, memories), module(x)
        hidden = F.silu(module.ffn.gate(x)) * module.ffn.up(x)
        update = memory_feed_forward(x, memories) if kind == "ffn" else memory_patch(hidden, memories, "down")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(y, plain.float() + update)
    assert (y.bfloat16() == plain).float().mean() > 0.5  # most would be lost
    assert module._kept is None


def test_in_bfloat16_the_sum_is_rounded_once():
    """-256 + (256 + 0.5 + 0.5); 257 is no number of bfloat16."""
    layout = BankLayout(1, 1, rows=(1, 1, 1), branching=2, gated=False, activation="relu")
    adds = {1: 256.0, 2: 0.5, 3: 0.5}
    fetched = Fetched.of(layout, SAME[:1], lambda node: torch.tensor([[1.0, adds[node.level]]]).bfloat16())
    anchor = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(anchor.weight, -256.0)
    y = MemoryFeedForward(Channel(anchor))(torch.ones(1, 1, 1, dtype=torch.bfloat16), fetched.layers()[0])
    assert y.dtype == torch.bfloat16
    assert y.item() == 1.0


class Channel(nn.Module):
    """Any module as a channel layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, trace: Trace | None = None) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class Adapted(nn.Linear):
    """A projection with a low-rank adapter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_what_sits_in_the_feed_forward_is_not_passed_over_by_concat(training):
    x, memories = tokens(), fetch().layers()[0]

    def double(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return 2 * output

    for place in ("", "gate", "up", "down"):
        module = layer(mode="concat").train(training)
        expected = module(x, memories)
        handle = module.ffn.get_submodule(place).register_forward_hook(double)
        assert torch.equal(module(x, memories), MemoryFeedForward(module.ffn)(x, memories))
        handle.remove()
        torch.testing.assert_close(module(x, memories), expected, **EXACT)
    module.ffn.up = Adapted(DIM, HIDDEN, bias=False).double()
    assert torch.equal(module(x, memories), MemoryFeedForward(module.ffn)(x, memories))


@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole_with_shared_memories(mode, training):
    module, x, memories = layer(mode=mode).train(training), tokens(), fetch().layers()[0]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x, memories), module(x, memories), **EXACT)
        assert not torch.equal(compiled(x, memories), module(x))


def test_any_channel_layer_will_do_and_gets_what_is_for_it():
    cell = GraphMemoryCell(DIM, num_slots=3).double()
    module, x, residual = MemoryFeedForward(cell), tokens(), tokens() + 1
    memories, mask = fetch(MIXED).layers()[0], torch.ones(3, 4, dtype=torch.bool)
    assert module.takes_residual
    given = {"residual": residual, "mask": mask}
    trace = Trace()
    y = module(x, memories, trace=trace, **given)
    torch.testing.assert_close(y, cell(x, **given) + loop.memory_feed_forward(x, memories), **EXACT)
    assert {"memory_update", *_signals(cell, x, given)} == trace.signals.keys()
    block = Block(Attention(DIM, num_heads=1), module).double()
    assert block(x)[0].shape == x.shape


def _signals(cell: nn.Module, x: Tensor, given: dict) -> set[str]:
    trace = Trace()
    cell(x, trace=trace, **given)
    return set(trace.signals)


@pytest.mark.parametrize("kind", ["ffn", "lora_ffn"])
def test_the_half_that_is_not_activated_is_handed_through(kind):
    for mode in ("add", "concat"):
        module, x = layer(mode=mode), tokens()
        assert module.memory_dim == HIDDEN
        assert torch.equal(module(x, return_memory=True)[1], module.ffn.up(x))
        memories = fetch(kind=kind).layers()[0]
        y, memory = module(x, memories, return_memory=True)
        torch.testing.assert_close(y, module(x, memories), **EXACT)
        assert torch.equal(memory, module.ffn.up(x)) == (kind == "ffn")


def test_the_projections_to_the_residual_stream_are_those_of_the_feed_forward():
    module = layer()
    assert module.dim == DIM
    assert residual_outputs(module) == [module.ffn.down]
    assert residual_outputs(MemoryFeedForward(module)) == [module.ffn.down]
    assert MemoryFeedForward(nn.Sequential(nn.Linear(2, 2))).residual_outputs() == []


def hooked() -> MemoryFeedForward:
    module = layer()
    module.ffn.register_forward_pre_hook(lambda ffn, inputs: None)
    return module


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemoryFeedForward(SwiGLU(4), mode="sum"), "mode='sum' is not one of 'add', 'concat'"),
        (lambda: MemoryFeedForward(nn.Identity(), mode="concat"), "ffn is a Identity; use mode='add'"),
        (lambda: layer()(tokens(2), fetch().layers()[0]), "x has batch 2, memories were fetched for batch_size=3"),
        (
            lambda: layer()(tokens(), fetch(dtype=torch.bfloat16).layers()[0]),
            r"x has dtype torch.float64, the fetched blocks have torch.bfloat16; use bank.fetch\(paths, dtype=torch.f",
        ),
        (
            lambda: layer("gelu", "concat")(tokens(), fetch().layers()[0]),
            "gated=True, activation='silu' beside a FeedForward, which has gated=False, activation='gelu'",
        ),
        (
            lambda: MemoryFeedForward(nn.Identity())(tokens(), fetch(kind="lora_ffn").layers()[0]),
            "kind='lora_ffn' patches .* ffn is a Identity",
        ),
        (
            lambda: layer("gelu")(tokens(), fetch(kind="lora_ffn").layers()[0]),
            "memories have gated=True, a FeedForward has gated=False",
        ),
        (
            lambda: layer()(tokens(), fetch(kind="lora_ffn", hidden_dim=8).layers()[0]),
            "patch a 'up' matrix from 6 to 8 channels, the layer's goes from 6 to 10",
        ),
        (
            lambda: hooked()(tokens(), fetch(kind="lora_ffn").layers()[0]),
            "kind='lora_ffn' patches the matrices of a SwiGLU that has hooks",
        ),
    ],
    ids=["mode", "ffn", "batch", "dtype", "form", "lora", "lora_form", "lora_width", "lora_hooks"],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_it_is_registered_around_a_swiglu():
    module = create_layer("memory_feed_forward", 16, mode="concat")
    assert module.mode == "concat"
    assert isinstance(module.ffn, SwiGLU)
