"""Locas in the host's own weights: checks 9 and 10 of its spec, and hosts that are saved with it."""

from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM, create_model, from_pretrained, save_pretrained
from memzoo.layers import Attention, Locas, SwiGLU, feed_forward_site
from memzoo.layers.reference import locas as reference
from tests.layers.locas_cases import BIASED, EXACT, GATED, RANK, attach, every_host, sites_of, slots_of, teach
from tests.layers.side_hosts import DIM, HOSTS, VOCAB_SIZE, WIDTH, make_host, make_inputs, read

modes = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
TRANSFORMERS = ["llama", "llama_biased", "phi3", "gpt2"]


def taught(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Locas, Tensor]:
    host, memory, inputs = attach(name, dtype, **options)
    memory.memorize(inputs)
    teach(memory)
    return host, memory, inputs


def snapshot(host: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    return {name: (parameter, parameter.detach().clone()) for name, parameter in host.named_parameters()}


def config_width(host: Any) -> int | None:
    config = getattr(host, "config", None)
    if config is None or isinstance(config, dict):
        return (config or {}).get("hidden_dim")
    return config.n_inner if hasattr(config, "n_inner") else config.intermediate_size


@modes
@every_host
def test_09_merged_and_beside_are_equal(name, wrap):
    """With values above one, so that clipping is in the weights; those are the equations'."""
    host, memory, inputs = taught(name, wrap=wrap)
    beside = read(host, inputs)
    sites = sites_of(memory)
    own = [
        (s.up_weight.clone(), s.down_weight.clone(), None if s.gate_weight is None else s.gate_weight.clone())
        for s in sites
    ]
    memory.merge()
    assert memory.is_merged
    torch.testing.assert_close(read(host, inputs), beside, rtol=1e-10, atol=1e-12)
    for site, slots, (up, down, gate) in zip(sites, slots_of(memory), own, strict=True):
        width = up.shape[0] + RANK
        assert site.width == width
        for attribute in ("intermediate_size", "memory_dim"):  # where the feed-forward says it
            assert getattr(site.module, attribute, width) == width
        assert site.up_weight.shape == (width, DIM)
        assert site.down_weight.shape == (DIM, width)
        tau = reference.slot_scale(down, RANK)
        expected = reference.merged(up, down, slots.key, slots.value, tau, gate=gate, memory_gate=slots.gate)
        found = site.up_weight, site.down_weight, site.gate_weight
        for matrix, merged in zip(found, expected, strict=True):
            if merged is None:
                assert matrix is None
            else:
                torch.testing.assert_close(matrix.detach(), merged.detach(), **EXACT)
        for bias, appended in ((site.up_bias, slots.key_bias), (site.gate_bias, slots.gate_bias)):
            if appended is not None:
                assert torch.equal(bias[-RANK:], appended)
    memory.detach()
    torch.testing.assert_close(read(host, inputs), beside, rtol=1e-10, atol=1e-12)  # it needs nothing beside it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@every_host
def test_10_unmerged_the_host_is_what_it_was(name, dtype):
    """The same parameters, the same numbers, sizes and configuration, to the bit; and the memory beside it again."""
    host, memory, inputs = taught(name, dtype)
    before, width, beside = snapshot(host), config_width(host), read(host, inputs)
    texts = [repr(module) for module in host.modules() if not list(module.children())]
    with memory.disabled():
        alone = read(host, inputs)
    memory.merge()
    assert [repr(module) for module in host.modules() if not list(module.children())] != texts
    memory.unmerge()
    assert not memory.is_merged
    assert [repr(module) for module in host.modules() if not list(module.children())] == texts
    after = dict(host.named_parameters())
    assert list(after) == list(before)
    for key, (parameter, tensor) in before.items():
        assert after[key] is parameter
        assert torch.equal(parameter, tensor)
        assert parameter.is_contiguous()
    assert config_width(host) == width
    assert torch.equal(read(host, inputs), beside)
    memory.detach()
    assert torch.equal(read(host, inputs), alone)


@every_host
def test_10_merged_slots_of_zeros_say_nothing(name):
    """An empty memory, and what `multiple_of` appends."""
    host, memory, inputs = attach(name)
    before = read(host, inputs)
    memory.merge(multiple_of=16)
    for site in sites_of(memory):
        assert site.width % 16 == 0
        assert not site.down_weight[:, -RANK:].any()
    torch.testing.assert_close(read(host, inputs), before, **EXACT)
    memory.unmerge()
    assert torch.equal(read(host, inputs), before)


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 28), (4, 28), (16, 32), (64, 64)])
def test_widths_are_padded_to_a_multiple(multiple_of, width):
    for name in (GATED, "phi3", BIASED):
        host, memory, inputs = taught(name)
        beside = read(host, inputs)
        memory.merge(multiple_of=multiple_of)
        assert [site.width for site in sites_of(memory)] == [width, width]
        assert config_width(host) == width
        torch.testing.assert_close(read(host, inputs), beside, **EXACT)


@every_host
def test_any_row_of_the_batch_can_be_merged(name):
    host, memory, inputs = taught(name, batch_size=2)
    beside = read(host, inputs)
    for row in range(2):
        memory.merge(row=row)
        torch.testing.assert_close(read(host, inputs)[row], beside[row], **EXACT)
        assert not torch.allclose(read(host, inputs)[1 - row], beside[1 - row])
        memory.unmerge()
    assert torch.equal(read(host, inputs), beside)


def test_what_merge_refuses():
    memory = attach(GATED, batch_size=2)[1]
    with pytest.raises(ValueError, match=r"row=None of batch_size=2; pass one of the batch"):
        memory.merge()
    for row in (2, -1):
        with pytest.raises(ValueError, match=f"row={row} is outside of batch_size=2"):
            memory.merge(row=row)
    host, memory, inputs = taught(GATED)
    with pytest.raises(ValueError, match=r"row=0 of batch_size=None; pass None"):
        memory.merge(row=0)
    with pytest.raises(ValueError, match="multiple_of=0"):
        memory.merge(multiple_of=0)
    with pytest.raises(ValueError, match=r"unmerge\(\) of a memory that is not part"):
        memory.unmerge()
    memory.merge()
    for call in (memory.merge, lambda: memory.expand(1), memory.reset, lambda: memory.compress(1), memory.offload):
        with pytest.raises(ValueError, match=r"unmerge\(\)"):
            call()
    merged = read(host, inputs)
    memory.detach()
    assert torch.equal(read(host, inputs), merged)
    with pytest.raises(ValueError, match=r"unmerge\(\) of a memory that was detached"):
        memory.unmerge()


@pytest.mark.parametrize("name", [GATED, "phi3", BIASED, "vit_glu"])
def test_a_second_memory_goes_on_top(name):
    """The merged host has more slots, which the second memory can clone; each is taken out again in turn."""
    host, first, inputs = taught(name)
    before = snapshot(host)
    first.merge()
    once = read(host, inputs)
    second = Locas.attach(host, rank=RANK + 2)
    second.memorize(inputs)
    torch.testing.assert_close(read(host, inputs), once, rtol=0, atol=0)
    teach(second, seed=6)
    twice = read(host, inputs)
    assert not torch.allclose(twice, once)
    second.merge()
    torch.testing.assert_close(read(host, inputs), twice, **EXACT)
    with pytest.raises(
        ValueError, match=r"unmerge\(\) of a memory that a Locas was merged after, so unmerge\(\) that one first"
    ):
        first.unmerge()
    assert first.is_merged
    second.unmerge()
    second.detach()
    first.unmerge()
    assert all(torch.equal(parameter, tensor) for parameter, tensor in before.values())


def test_merged_slots_can_be_cloned():
    host, first, inputs = taught(GATED)
    with torch.no_grad():
        for slots in first.slots:
            slots.gate.mul_(0).add_(1)
            slots.key.mul_(0).add_(1)
    first.merge()
    second = Locas.attach(host, rank=WIDTH + RANK)
    second.memorize(inputs)
    assert sorted(slots_of(second)[0].rows.tolist()) == list(range(WIDTH + RANK))


def test_a_merged_slot_of_zeros_is_cloned_as_one():
    """It has no direction to be scaled; the memory stays finite."""
    host, first, inputs = attach(BIASED)
    first.merge()
    second = Locas.attach(host, rank=WIDTH + RANK)
    second.memorize(inputs)
    assert all(parameter.isfinite().all() for parameter in second.parameters())


@pytest.mark.parametrize("name", [GATED, "phi3", BIASED])
def test_feed_forwards_without_a_memory_become_as_wide(name):
    """A configuration knows one width."""
    host = make_host(name, torch.float64)
    memory = Locas.attach(host, rank=RANK, sites=HOSTS[name].names[1:])
    inputs, before = make_inputs(name), snapshot(host)
    memory.memorize(inputs)
    teach(memory)
    beside = read(host, inputs)
    memory.merge(multiple_of=8)
    widths = [site.width for site in Locas.attach(host, rank=1)._feed_forwards.values()]
    assert widths == [32, 32]
    assert config_width(host) == 32
    torch.testing.assert_close(read(host, inputs), beside, **EXACT)
    memory.unmerge()
    assert all(torch.equal(parameter, tensor) for parameter, tensor in before.values())


def test_feed_forwards_of_several_widths_are_padded_each_to_its_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(Attention(DIM, num_heads=2), SwiGLU(DIM, hidden_dim=width)) for width in (20, 26, 26, 20, 9)]
        host = CausalLM(VOCAB_SIZE, DIM, blocks).double().eval()
    memory, tokens = Locas.attach(host, rank=RANK, sites=["blocks.0.ffn", "blocks.1.ffn"]), make_inputs(GATED)
    before = snapshot(host)
    memory.memorize(tokens)
    teach(memory)
    beside = read(host, tokens)
    memory.merge(multiple_of=16)
    assert [block.ffn.up.out_features for block in host.blocks] == [32, 32, 32, 32, 9]
    assert [block.ffn.memory_dim for block in host.blocks] == [32, 32, 32, 32, 9]
    torch.testing.assert_close(read(host, tokens), beside, **EXACT)
    memory.unmerge()
    assert all(torch.equal(parameter, tensor) for parameter, tensor in before.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_merged_host_of_transformers_is_saved_as_any(name, tmp_path):
    host, memory, tokens = taught(name, torch.float32)
    beside = read(host, tokens)
    memory.merge(multiple_of=8)
    merged = read(host, tokens)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    host.save_pretrained(tmp_path)
    again = type(host).from_pretrained(tmp_path).eval()
    assert config_width(again) == 32
    assert torch.equal(read(again, tokens), merged)


@pytest.mark.parametrize("name", ["transformer_tiny", "gpt_tiny"])
def test_a_merged_host_of_ours_is_saved_as_any(name, tmp_path):
    """Also where its width was not given: the default is written down."""
    host = create_model(name, vocab_size=VOCAB_SIZE, dim=DIM, depth=2, num_heads=2).eval()
    tokens = make_inputs(GATED)
    memory = Locas.attach(host, rank=RANK)
    memory.memorize(tokens)
    teach(memory)
    given = dict(host.config)
    memory.merge()
    merged = read(host, tokens)
    again = from_pretrained(save_pretrained(host, tmp_path)).eval()
    assert torch.equal(read(again, tokens), merged)
    memory.unmerge()
    assert host.config == given


def test_a_learned_activation_stays_the_hosts():
    """It is neither trained, nor emptied, nor saved with the memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = nn.Sequential(timm.layers.Mlp(DIM, WIDTH, act_layer=nn.PReLU)).double()
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = host(x)
    memory = Locas.attach(host, rank=RANK)
    assert memory.num_parameters() == RANK * (2 * DIM + 1)
    memory.memorize(x)
    teach(memory)
    beside = host(x)
    memory.merge()
    torch.testing.assert_close(host(x), beside, **EXACT)
    memory.unmerge()
    memory.reset()
    assert torch.equal(host(x), before)
    assert not any("activation" in name for name in memory.state_dict())


def unreadable(kind: str) -> nn.Module:
    """Two feed-forwards of a width, the second of which cannot be grown."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = nn.Sequential(timm.layers.Mlp(DIM, WIDTH), timm.layers.Mlp(DIM, WIDTH), nn.Linear(DIM, WIDTH)).double()
        if kind == "norm":
            host[1].norm = nn.LayerNorm(WIDTH).double()
        elif kind == "tied":
            host[2].weight = host[1].fc1.weight
        else:
            nn.utils.parametrizations.weight_norm(getattr(host[1], kind))
    return host.eval()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("norm", "site '1' has a LayerNorm between"),
        ("tied", "site '1' shares the matrix or bias of fc1"),
        ("fc1", "site '1': fc1 is a ParametrizedLinear"),
        ("fc2", "site '1': fc2 is a ParametrizedLinear"),
    ],
)
def test_where_another_feed_forward_cannot_grow_nothing_is_merged(kind, message):
    host, x = unreadable(kind), torch.randn(1, 5, DIM, dtype=torch.float64)
    memory = Locas.attach(host, rank=RANK, sites=["0"])
    memory.memorize(x)
    teach(memory)
    before, beside = snapshot(host), host[1](host[0](x))
    with pytest.raises(ValueError, match=rf"merge\(\) makes all feed-forwards of a width wider, .*{message}"):
        memory.merge()
    assert not memory.is_merged
    assert all(torch.equal(parameter, tensor) for parameter, tensor in before.values())
    assert torch.equal(host[1](host[0](x)), beside)
    host[1] = timm.layers.Mlp(DIM, WIDTH + 1).double()  # of another width, it is left alone
    memory.merge()
    assert host[1].fc1.out_features == WIDTH + 1


@pytest.mark.parametrize("call", ["merge", "unmerge"])
def test_a_host_that_gets_no_room_is_left_as_it_was(call, monkeypatch):
    host, memory, inputs = taught(BIASED)
    if call == "unmerge":
        memory.merge()
    before, outputs, texts = snapshot(host), read(host, inputs), repr(host)
    resized, calls = feed_forward_site._resized, []

    def fails_at_the_last(*layer):
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError("no room")
        return resized(*layer)

    monkeypatch.setattr(feed_forward_site, "_resized", fails_at_the_last)
    with pytest.raises(MemoryError, match="no room"):
        getattr(memory, call)()
    assert memory.is_merged == (call == "unmerge")
    assert repr(host) == texts
    assert all(torch.equal(parameter, tensor) for parameter, tensor in before.values())
    assert torch.equal(read(host, inputs), outputs)
    monkeypatch.undo()
    getattr(memory, call)()
    assert memory.is_merged == (call == "merge")


def test_a_part_of_a_host_is_another_host_whose_slots_are_not_cut_off():
    host, memory, _ = taught("llama")
    memory.merge()
    other = Locas.attach(host.model, rank=1)
    other.merge()
    with pytest.raises(ValueError, match=r"not the last of .* unmerge\(\) the memory that was merged after this one"):
        memory.unmerge()
    assert memory.is_merged
    other.unmerge()
    memory.unmerge()


def test_the_shared_expert_of_a_mixture_is_saved_with_the_host(tmp_path):
    library = pytest.importorskip("transformers", reason="hosts of transformers need the dev extra")
    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "intermediate_size": 20, "num_attention_heads": 2}
    sizes |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": WIDTH, "num_experts": 2}
    sizes |= {"num_key_value_heads": 2, "num_experts_per_tok": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = library.Qwen2MoeForCausalLM(library.Qwen2MoeConfig(vocab_size=VOCAB_SIZE, **sizes))
    host, tokens = host.eval(), make_inputs("llama")
    memory = Locas.attach(host, rank=RANK, sites=[f"model.layers.{layer}.mlp.shared_expert" for layer in range(2)])
    memory.memorize(tokens)
    teach(memory)
    beside = read(host, tokens)
    memory.merge()
    merged = read(host, tokens)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    said = host.config.intermediate_size, host.config.shared_expert_intermediate_size, host.config.moe_intermediate_size
    assert said == (20, WIDTH + RANK, 8)
    host.save_pretrained(tmp_path)
    again = library.Qwen2MoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(read(again, tokens), merged)
    memory.unmerge()
    assert host.config.shared_expert_intermediate_size == WIDTH
