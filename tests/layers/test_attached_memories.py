"""AttachedMemories: hosts of our own and of transformers keep everything, and read what `reading` says."""

import asyncio
import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import AttachedMemories, FeedForward, SwiGLU
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import BankLayout
from memzoo.layers.reference.memory_blocks import memory_feed_forward
from tests.layers.attached_memories_cases import PATHS, Odd, Stack, fetch, inputs, layout_of, stack

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2}


HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("silu", SIZES | {"num_key_value_heads": 1}),
    "Qwen3": ("silu", SIZES | {"num_key_value_heads": 1, "head_dim": 8}),
    "Phi3": ("silu", SIZES | {"num_key_value_heads": 1}),
    "Gemma3": ("gelu_tanh", SIZES | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}),
    "GPT2": ("gelu_tanh", {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
}


CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def transformers_host(name: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="hosts of transformers need the dev extra")
    config_name, model_name = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**HOSTS[name][1], pad_token_id=0, eos_token_id=30, bos_token_id=1)
    return getattr(transformers, model_name)(config).eval()


def tokens(batch: int = 3, time: int = 6) -> Tensor:
    return torch.randint(2, 30, (batch, time), generator=torch.Generator().manual_seed(2))


def test_each_layer_gets_its_own_part_of_the_formula() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    fetched = fetch(layout_of(memories))
    with memories.reading(fetched):
        y = host(x)
    h = x
    for layer, own in zip(host.layers, fetched.layers(), strict=True):
        plain = layer.down(F.silu(layer.gate(h)) * layer.up(h))
        h = h + plain + memory_feed_forward(h, own)
    torch.testing.assert_close(y, h, rtol=0, atol=1e-5)
    assert (y - host(x)).abs().max() > 0.1


def test_a_feed_forward_without_a_gate_gets_memories_without_one() -> None:
    torch.manual_seed(0)
    host, x = Stack(FeedForward(8, bias=True)), inputs()
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories)
    assert (layout.gated, layout.activation) == (False, "gelu")
    assert layout.block_size(1) == 2 * 4 * 8
    fetched = fetch(layout, PATHS[:1].expand(3, -1))
    with memories.reading(fetched):
        y = host(x)
    expected = host(x)
    for block, rows in zip(fetched.blocks, (4, 2), strict=True):
        up, down = block[0].view(2, rows, 8)
        expected = expected + F.gelu(x @ up.T) @ down
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_01_fresh_memories_leave_a_host_of_transformers_as_it_is(name: str) -> None:
    host, x = transformers_host(name), tokens()
    names, before = [*host.state_dict()], host(x).logits
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories)
    assert (layout.num_layers, layout.dim, layout.activation) == (2, 16, HOSTS[name][0])
    assert layout.gated == (name != "GPT2")
    assert [*host.state_dict()] == names
    assert torch.equal(host(x).logits, before)
    with memories.reading(fetch(layout, fresh=True)):
        assert torch.equal(host(x).logits, before)
    with memories.reading(fetch(layout)):
        read = host(x).logits
        memories.enabled = False
        assert torch.equal(host(x).logits, before)
        memories.enabled = True
        assert torch.equal(host(x).logits, read)
    assert (read - before).abs().amax((1, 2)).min() > 1e-3
    memories.detach()
    assert torch.equal(host(x).logits, before)
    assert not any(module._forward_hooks for module in host.modules())


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_generate_of_transformers_reads_them_in_every_step(name: str) -> None:
    host, x = transformers_host(name), tokens()
    memories = AttachedMemories.attach(host)
    with memories.reading(fetch(layout_of(memories), std=2.0)), torch.no_grad():
        new = host.generate(x, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        grown = x
        for _ in range(5):
            logits = host(grown, use_cache=False).logits[:, -1]
            logits[:, 30] = -torch.inf
            grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, grown)
    assert not torch.equal(new, host.generate(x, max_new_tokens=5, min_new_tokens=5, do_sample=False))


def test_beams_need_a_path_for_each() -> None:
    host, x = transformers_host("Llama"), tokens()
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories)
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with memories.reading(fetch(layout)), pytest.raises(ValueError, match=r"batch 6, .* batch_size=3"):
        host.generate(x, **options)
    repeated = fetch(layout, PATHS.repeat_interleave(2, 0), std=2.0)
    assert repeated.nbytes == fetch(layout).nbytes
    with memories.reading(repeated):
        together = host.generate(x, **options)
    for row in range(3):
        with memories.reading(fetch(layout, PATHS[row : row + 1].expand(2, -1), std=2.0)):
            alone = host.generate(x[row : row + 1], **options)[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_10_rows_read_their_own_path_and_no_other() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories)
    with memories.reading(fetch(layout)):
        together = host(x)
    for row in range(3):
        with memories.reading(fetch(layout, PATHS[row : row + 1])):
            torch.testing.assert_close(host(x[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


def test_only_fetched_blocks_get_gradients_and_a_frozen_host_none() -> None:
    host, x = stack().requires_grad_(False), inputs()
    memories = AttachedMemories.attach(host)
    fetched = fetch(layout_of(memories))
    for block in fetched.blocks:
        block.requires_grad_()
    with memories.reading(fetched):
        host(x).square().sum().backward()
    assert all(block.grad.abs().amax(1).min() > 0 for block in fetched.blocks)  # in every layer
    assert all(parameter.grad is None for parameter in host.parameters())


def test_reading_nests_and_is_restored_after_an_exception() -> None:
    host, x = stack(), inputs()
    plain = host(x)
    memories = AttachedMemories.attach(host)
    outer, inner = fetch(layout_of(memories)), fetch(layout_of(memories), PATHS.flip(0))
    with memories.reading(outer) as same:
        assert same is memories
        read = host(x)
        with memories.reading(inner):
            assert not torch.equal(host(x), read)
        with pytest.raises(ValueError, match="width is 3"), memories.reading(inner):
            host(x[..., :3])
        assert torch.equal(host(x), read)
        with memories.reading(None):
            assert torch.equal(host(x), plain)
        assert torch.equal(host(x), read)
    assert torch.equal(host(x), plain)


def test_threads_and_tasks_do_not_see_what_others_read() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories)
    choices = [None, fetch(layout), fetch(layout, PATHS.flip(0))]

    def read(fetched: Fetched | None) -> Tensor:
        with memories.reading(fetched):
            return host(x)

    expected = [read(fetched) for fetched in choices]
    barrier, found = threading.Barrier(3), dict[int, Tensor]()

    def run(index: int) -> None:
        with memories.reading(choices[index]):
            barrier.wait(10)
            found[index] = host(x)
            barrier.wait(10)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    with memories.reading(choices[1]):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(3))

    async def task(index: int) -> Tensor:
        with memories.reading(choices[index]):
            await asyncio.sleep(0)
            return host(x)

    async def tasks() -> list[Tensor]:
        return await asyncio.gather(*(task(index) for index in range(3)))

    assert all(torch.equal(*pair) for pair in zip(asyncio.run(tasks()), expected, strict=True))


def test_two_banks_on_one_host_add_up() -> None:
    host, x = Stack(SwiGLU(8)), inputs()
    first, second = AttachedMemories.attach(host), AttachedMemories.attach(host)
    one, other = fetch(layout_of(first)), fetch(layout_of(second), PATHS.flip(0))
    with first.reading(one):
        a = host(x)
        with second.reading(other):
            both = host(x)
    with second.reading(other):
        b = host(x)
    torch.testing.assert_close(both, a + b - host(x), rtol=0, atol=1e-5)
    first.detach()
    with second.reading(other):
        assert torch.equal(host(x), b)


def test_a_copy_of_the_host_reads_what_the_host_does_and_nothing_once_they_are_detached() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    copied = copy.deepcopy(host)
    with memories.reading(fetch(layout_of(memories))):
        read, plain = copied(x), stack()(x)
        assert torch.equal(read, host(x))
        assert not torch.equal(read, plain)
        memories.detach()
        assert torch.equal(copied(x), plain)
    assert torch.equal(copied(x), plain)


def test_named_sites_may_be_anything_that_maps_the_stream_to_itself() -> None:
    torch.manual_seed(0)
    host = nn.ModuleDict({"b": Odd(), "a": Odd()})
    stated: Any = {"dim": 8, "activation": "relu", "gated": False}
    memories = AttachedMemories.attach(host, sites=["a", "b"], **stated)
    layout, x = layout_of(memories), inputs()
    assert layout == BankLayout(2, 8, (4, 2), 2, gated=False, activation="relu", dtype=torch.float32)
    fetched = fetch(layout)
    with memories.reading(fetched):
        y, more = host["a"](hidden=x)
    expected = host["a"](hidden=x)[0] + memory_feed_forward(x, fetched.layers()[0])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert more == "more"


def test_bf16_and_autocast() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    layout = layout_of(memories, torch.bfloat16)
    with memories.reading(fetch(layout).to(dtype=torch.float32)):
        exact = host(x)
    with memories.reading(fetch(layout)), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(host(x).float(), exact, rtol=0.05, atol=0.05)
    host.to(torch.bfloat16)
    with memories.reading(fetch(layout)):
        y = host(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)


def test_a_host_on_the_meta_device_tells_its_layout() -> None:
    with torch.device("meta"):
        assert layout_of(AttachedMemories.attach(stack())).num_layers == 3


def test_gradient_checkpointing_of_the_host_needs_the_backward_pass_inside() -> None:
    host = transformers_host("Llama").train()
    memories = AttachedMemories.attach(host)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            host.activation_checkpointing_enable({"use_reentrant": False})
        fetched = fetch(layout_of(memories))
        for block in fetched.blocks:
            block.requires_grad_()
        with memories.reading(fetched):
            host(tokens()).logits.square().mean().backward()
        gradients.append([block.grad for block in fetched.blocks])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_compiled_host_reads_them() -> None:
    host, x = stack(), inputs()
    memories = AttachedMemories.attach(host)
    fetched = fetch(layout_of(memories))
    plain = host(x)
    with memories.reading(fetched):
        expected = host(x)
    compiled = torch.compile(host, backend="eager")
    assert torch.equal(compiled(x), plain)
    with memories.reading(fetched):
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), plain)
