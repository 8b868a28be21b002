"""Several memories on one host, copies of it, and what is done to a host through wrappers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import Locas, SwiGLU, TempLoRA
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.side_record import NAME
from memzoo.layers.side_wrapper import Wrapper
from tests.layers.side_cases import BOTH, Skip, inputs, stack
from tests.layers.side_hosts import make_host, make_inputs, read

KINDS: dict[str, Callable[..., Any]] = {"Locas": Locas.attach, "TempLoRA": TempLoRA.attach}
PAIRS = pytest.mark.parametrize(("lower", "upper"), [(a, b) for a in KINDS for b in KINDS])


def attached(kind: str, host: Any, x: Tensor, seed: int = 0, **options: Any) -> Any:
    """Attach a memory that has learnt something."""
    memory = KINDS[kind](host, rank=2, **options)
    memory.memorize(x)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return memory


def flags(host: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in host.named_parameters()}


@BOTH
def test_two_memories_act_one_after_the_other_and_leave_in_the_other_order(wrap: bool) -> None:
    class Square(Skip):
        def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
            return y.square()

    host, x = stack(1), inputs()
    plain, flags = host(x), [parameter.requires_grad for parameter in host.parameters()]
    first = Skip.attach(host, wrap=False)
    second = Square.attach(host, wrap=wrap)
    assert torch.equal(host(x), (plain + x).square())
    with first.disabled():
        assert torch.equal(host(x), plain.square())
    second.detach()
    assert torch.equal(host(x), plain + x)
    first.detach()
    assert torch.equal(host(x), plain)
    assert [parameter.requires_grad for parameter in host.parameters()] == flags
    last, hooked = Square.attach(host, wrap=True), Skip.attach(host)
    assert torch.equal(host(x), (plain + x).square())  # wrappers are outside of hooks
    hooked.detach()
    last.detach()
    assert torch.equal(host(x), plain)


def test_a_site_inside_a_wrapped_one_is_wrapped_too() -> None:
    host, x = nn.Sequential(nn.Sequential(nn.Linear(8, 8))), inputs()
    plain, inner = host(x), host[0]
    outer = Skip.attach(host, "0", wrap=True)
    deep = Skip.attach(host, "0.0", gain=2.0, wrap=True)
    assert torch.equal(host(x), plain + 2 * x + x)
    outer.detach()
    assert torch.equal(host(x), plain + 2 * x)
    deep.detach()
    assert torch.equal(host(x), plain)
    assert host[0] is inner


@BOTH
def test_a_copy_of_host_and_memory_is_another_pair(wrap: bool) -> None:
    host, x = make_host("gpt2"), make_inputs("gpt2")
    plain = read(host, x)
    memory = Skip.attach(host, wrap=wrap)
    expected = read(host, x)
    twin, own = copy.deepcopy((host, memory))
    assert own.host is twin
    assert torch.equal(read(twin, x), expected)
    with torch.no_grad():
        own.gain.zero_()
    assert not torch.equal(read(twin, x), expected)
    own.enabled = False
    assert torch.equal(read(host, x), expected)
    memory.detach()
    assert torch.equal(read(host, x), plain)
    own.enabled = True
    own.reset()
    assert torch.equal(read(twin, x), expected)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    own.detach()
    assert torch.equal(read(twin, x), plain)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not any(module._forward_hooks for module in twin.modules())


@BOTH
def test_a_copy_of_the_host_alone_has_a_memory_of_its_own(wrap: bool) -> None:
    host, x = stack(), inputs()
    memory = Skip.attach(host, wrap=wrap)
    expected, twin = host(x), copy.deepcopy(host)
    with torch.no_grad():
        memory.gain.zero_()
    memory.detach()
    assert torch.equal(twin(x), expected)


# What the host keeps


@BOTH
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 0, 1]], ids=str)
def test_memories_leave_in_any_order_and_the_last_gives_the_flags_back(order: list[int], wrap: bool) -> None:
    host, x = stack(), inputs()
    host[0].up.requires_grad_(False)
    before, plain = flags(host), host(x)
    memories = [
        Skip.attach(host, "0", gain=2.0),
        Skip.attach(host, "1", wrap=wrap),
        TempLoRA.attach(host, wrap=wrap),
    ]
    for index in order:
        assert not any(flags(host).values())
        memories[index].detach()
    assert flags(host) == before
    assert NAME not in vars(host)
    assert torch.equal(host(x), plain)


def test_a_memory_is_given_up_when_it_is_detached_but_its_record_stays_for_the_others() -> None:
    host = stack()
    first, second = Skip.attach(host), Skip.attach(host)
    first.detach()
    first.detach()
    assert vars(host)[NAME].memories == [second]


@BOTH
def test_flags_are_given_back_by_name_to_parameters_that_were_assigned(wrap: bool) -> None:
    host = make_host("gpt2")  # its head is tied
    host.transformer.wpe.requires_grad_(False)
    before, memory = flags(host), Skip.attach(host, wrap=wrap)
    host.load_state_dict(copy.deepcopy(host).state_dict(), assign=True)
    host.lm_head.weight = nn.Parameter(host.lm_head.weight.detach().clone(), requires_grad=False)
    memory.detach()
    assert flags(host) == before | {"lm_head.weight": True}


@BOTH
def test_pickles_of_host_and_memories_are_another_set(wrap: bool) -> None:
    host, x = stack(), inputs()
    first, second = Skip.attach(host, wrap=wrap), TempLoRA.attach(host, wrap=wrap)
    second.merge()
    twin, one, two = pickle.loads(pickle.dumps((host, first, second)))
    assert vars(twin)[NAME].memories == [one, two]
    assert vars(twin)[NAME].merged == [two]
    assert torch.equal(twin(x), host(x))
    two.unmerge()
    one.detach()
    two.detach()
    assert all(flags(twin).values())
    assert not any(flags(host).values())
    assert second.is_merged


# Merged


@PAIRS
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_last_merged_memory_is_unmerged(name: str, lower: str, upper: str) -> None:
    host, x = make_host(name), make_inputs(name)
    plain = copy.deepcopy(host.state_dict())
    below = attached(lower, host, x, wrap=True)
    below.merge()
    once = copy.deepcopy(host.state_dict())
    above = attached(upper, host, x, seed=1)
    above.merge()
    twice = copy.deepcopy(host.state_dict())
    with pytest.raises(
        ValueError, match=rf"unmerge\(\) of .* a {upper} was merged after, so unmerge\(\) that one first"
    ):
        below.unmerge()
    with pytest.raises(ValueError, match=rf"detach\(\) of .* a {upper} was merged after; unmerge\(\) that one first"):
        below.detach()
    assert below.is_merged
    assert below.is_attached
    assert same(host, twice)
    above.unmerge()
    assert same(host, once)
    above.merge()
    assert same(host, twice)
    above.unmerge()
    above.detach()
    below.unmerge()
    assert same(host, plain)


def same(host: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in host.state_dict().items())


@PAIRS
def test_under_what_stays_for_good_everything_stays(lower: str, upper: str) -> None:
    host, x = stack(), inputs()
    below = attached(lower, host, x)
    below.merge()
    above = attached(upper, host, x, seed=1)
    above.merge()
    above.detach()
    merged = copy.deepcopy(host.state_dict())
    with pytest.raises(ValueError, match=rf"a {upper} was merged after, which was detached and stays, .*; detach\(\)"):
        below.unmerge()
    assert same(host, merged)
    below.detach()
    assert same(host, merged)
    assert all(flags(host).values())


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_a_memory_is_beside_keep_their_size(name: str, wrap: bool) -> None:
    host, x = make_host(name), make_inputs(name)
    slots = attached("Locas", host, x)
    adapters = attached("TempLoRA", host, x, wrap=wrap)
    before, beside = copy.deepcopy(host.state_dict()), read(host, x)
    with pytest.raises(ValueError, match=r"merge\(\) would change the size of .* TempLoRA is beside; .* detach\(\)"):
        slots.merge()
    assert not slots.is_merged
    assert same(host, before)
    assert torch.equal(read(host, x), beside)
    adapters.detach()
    slots.merge()
    adapters = attached("TempLoRA", host, x, wrap=wrap)
    merged = read(host, x)
    with pytest.raises(ValueError, match=r"unmerge\(\) would change the size of .* TempLoRA is beside; detach\(\)"):
        slots.unmerge()
    assert torch.equal(read(host, x), merged)
    adapters.detach()
    slots.unmerge()
    assert same(host, before)


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "vit"])
def test_locas_comes_after_adapters_that_have_learnt(name: str, wrap: bool) -> None:
    host, x = make_host(name), make_inputs(name)
    adapters = attached("TempLoRA", host, x, wrap=wrap)
    learnt = read(host, x)
    slots = Locas.attach(host, rank=2)
    slots.memorize(x)
    assert adapters.enabled
    assert torch.equal(read(host, x), learnt)
    assert slots.free == 0
    adapters.merge()
    merged = read(host, x)
    slots.merge(multiple_of=8)
    torch.testing.assert_close(read(host, x), merged, rtol=1e-4, atol=1e-4)
    slots.unmerge()
    assert torch.equal(read(host, x), merged)


# Calls that are refused


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_is_refused_before_anything_changes(kind: str) -> None:
    host, x = stack(), inputs()
    remedy = r"outside of torch.inference_mode\(\); with Lightning Trainer\(inference_mode=False\)"
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"attach\(\) inside of .* {remedy}"):
        KINDS[kind](host, rank=2)
    assert all(flags(host).values())
    assert NAME not in vars(host)
    memory = attached(kind, host, x)
    weights = copy.deepcopy(host.state_dict())
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"merge\(\) inside of .* {remedy}"):
        memory.merge()
    assert same(host, weights)
    memory.merge()
    weights = copy.deepcopy(host.state_dict())
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"unmerge\(\) inside of .* {remedy}"):
        memory.unmerge()
    assert same(host, weights)
    memory.unmerge()
    host(x).sum().backward()


def test_what_fails_on_the_way_leaves_the_host_as_it_was() -> None:
    class Fails(Skip):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            raise MemoryError("no room")

    for wrap in (False, True):
        host = stack()
        modules = [type(module) for module in host.modules()]
        with pytest.raises(MemoryError, match="no room"):
            Fails.attach(host, wrap=wrap)
        assert all(flags(host).values())
        assert not any(module._forward_hooks for module in host.modules())
        assert [type(module) for module in host.modules()] == modules
        assert [type(module) for module in host.children()] == [SwiGLU, SwiGLU]
        assert NAME not in vars(host)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 1.5, True, "a"], ids=str)
def test_a_seed_is_a_whole_number(kind: str, seed: Any) -> None:
    host = stack()
    with pytest.raises(ValueError, match=f"seed={seed!r} is not a whole number"):
        KINDS[kind](host, seed=seed)
    assert all(flags(host).values())


def test_a_detached_memory_memorizes_nothing() -> None:
    for kind in KINDS:
        memory = attached(kind, stack(), inputs())
        memory.detach()
        with pytest.raises(ValueError, match=r"memorize\(\) of a memory that was detached"):
            memory.memorize(inputs())


# Places


@pytest.mark.parametrize("kind", KINDS)
def test_onload_brings_each_part_to_its_own_site(kind: str) -> None:
    host, x = stack(), inputs()
    memory: SideMemory = attached(kind, host, x)
    host(x).sum().backward()
    kept = [tensor for index, site in enumerate(memory.sites) if site[0] == "0" for tensor in memory._part(index)]
    values = [tensor.detach().clone() for tensor in kept]
    host[1].to("meta")
    memory.offload()
    memory.onload()
    assert memory.enabled
    for index, site in enumerate(memory.sites):
        for tensor in memory._part(index):
            assert tensor.is_meta == (site[0] == "1")
            assert tensor.grad is None or tensor.grad.is_meta == tensor.is_meta
    assert all(torch.equal(tensor, value) for tensor, value in zip(kept, values, strict=True))
    assert len(kept) < len([*memory.parameters(), *memory.buffers()])


# Through wrappers


def test_what_is_set_on_a_wrapper_is_set_on_the_module() -> None:
    host, x = stack(), inputs()
    inner = host[0]
    memory = Skip.attach(host, wrap=True)
    wrapper: Any = host[0]
    assert isinstance(wrapper, Wrapper)
    expected = copy.deepcopy(inner)
    expected.up = layer = nn.Linear(8, 12, bias=False)
    wrapper.up = layer
    assert torch.equal(wrapper(x), expected(x) + x)
    wrapper.flag, wrapper.scale = 1, nn.Parameter(torch.ones(1))
    wrapper.register_buffer("shift", torch.zeros(1))
    wrapper.register_parameter("bias", None)
    wrapper.add_module("extra", nn.Tanh())
    wrapper.register_module("more", nn.ReLU())
    assert {"0.up.weight", "0.scale", "0.shift"} < host.state_dict().keys()
    assert isinstance(host.get_submodule("0.extra"), nn.Tanh)
    assert not {"flag", "scale", "shift", "extra", "more", "up", "bias"} & {
        *vars(wrapper),
        *wrapper._modules,
        *wrapper._parameters,
        *wrapper._buffers,
    }
    wrapper.eval()
    assert not wrapper.training
    assert not inner.training
    del wrapper.flag, wrapper.extra
    assert not hasattr(inner, "flag")
    assert not hasattr(wrapper, "extra")
    memory.detach()
    assert host[0] is inner
    assert (inner.up, inner.bias, [*inner._buffers]) == (layer, None, ["shift"])
    assert isinstance(inner.more, nn.ReLU)


def test_a_module_that_was_put_in_the_place_of_a_wrapper_stays() -> None:
    host = stack()
    memory, other = Skip.attach(host, wrap=True), nn.Identity()
    host[0] = other
    memory.detach()
    assert host[0] is other
    assert type(host[1]) is SwiGLU
