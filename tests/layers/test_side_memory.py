"""SideMemory: hosts keep their names, weights and numbers, whatever comes, goes, is copied, compiled or loaded."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import FeedForward, SwiGLU
from tests.layers.side_cases import BOTH, Skip, inputs, stack
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read


def by_hand(host: nn.Sequential, x: Tensor, *gains: float) -> Tensor:
    for layer, gain in zip(host, gains, strict=True):
        x = layer(x) + gain * x
    return x


# The host


@BOTH
@pytest.mark.parametrize("name", HOSTS)
def test_11_a_host_keeps_names_and_weights_and_gets_its_numbers_back(name: str, wrap: bool) -> None:
    host, x = make_host(name), make_inputs(name)
    before, tensors = read(host, x), {k: v.clone() for k, v in host.state_dict().items()}
    modules, parameters, buffers = dict(host.named_modules()), dict(host.named_parameters()), dict(host.named_buffers())
    memory = Skip.attach(host, wrap=wrap)
    assert memory.sites == tuple(HOSTS[name].names)
    assert dict(host.named_modules()) == modules
    assert [*host.named_parameters()] == [*parameters.items()]
    assert [*host.named_buffers()] == [*buffers.items()]
    assert [*host.state_dict()] == [*tensors]
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in host.state_dict().items())
    assert [n for n, _ in memory.named_parameters()] == ["gain"]
    with_memory = read(host, x)
    assert (with_memory - before).abs().max() > 1e-2
    with memory.disabled() as same:
        assert same is memory
        assert torch.equal(read(host, x), before)
    assert torch.equal(read(host, x), with_memory)
    memory.enabled = False
    assert torch.equal(read(host, x), before)
    memory.enabled = True
    assert memory.is_attached
    memory.detach()
    memory.detach()
    assert not memory.is_attached
    assert torch.equal(read(host, x), before)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in host.modules())
    assert all(host.get_submodule(n) is module for n, module in modules.items())


@BOTH
def test_what_is_beside_a_site_is_in_its_output(wrap: bool) -> None:
    host, x = stack(), inputs()
    expected = by_hand(host, x, 1.0, 3.0)
    memory = Skip.attach(host, wrap=wrap)
    with torch.no_grad():
        memory.gain[1] = 3.0
    assert torch.equal(host(x), expected)


@BOTH
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_are_loaded_under_the_names_they_always_had(wrap: bool, assign: bool) -> None:
    host, other = make_host("llama"), make_host("llama").double().float()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    memory = Skip.attach(host, wrap=wrap)
    host.load_state_dict(other.state_dict(), strict=True, assign=assign)
    x = make_inputs("llama")
    with memory.disabled():
        assert torch.equal(read(host, x), read(other, x))
    stray = {**other.state_dict(), "model.layers.0.mlp.stray": torch.zeros(1)}
    missing = stray.pop("model.layers.1.mlp.up_proj.weight")
    assert missing.shape == (24, 16)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.\S*up_proj\.weight[\s\S]*layers\.0\.mlp\.\S*stray"):
        host.load_state_dict(stray)


@BOTH
def test_attaching_freezes_the_host_and_detach_gives_the_flags_back(wrap: bool) -> None:
    host = stack()
    host[0].up.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in host.named_parameters()}
    memory = Skip.attach(host, wrap=wrap)
    assert not any(parameter.requires_grad for parameter in host.parameters())
    host(inputs()).sum().backward()
    assert all(parameter.grad is None for parameter in host.parameters())
    assert memory.gain.grad is not None
    assert memory.gain.grad.abs().min() > 0
    memory.detach()
    assert {name: parameter.requires_grad for name, parameter in host.named_parameters()} == flags


@BOTH
def test_modes_devices_and_dtypes_of_a_host_reach_what_is_beside(wrap: bool) -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))
    host[0][1].eval()
    memory = Skip.attach(host, "0", wrap=wrap)
    inner = dict(host.named_modules())["0"]
    assert [module.training for module in inner.modules()] == [True, True, False]  # as they were
    assert not any(module.training for module in host.eval().modules())
    assert not host[0].training
    assert all(module.training for module in host.train().modules())
    host.to(torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in host.parameters())
    memory.detach()
    assert host[0] is inner
    assert [type(module).__name__ for module in host.modules()] == ["Sequential", "Sequential", "Linear", "Dropout"]


# Calls


class Odd(nn.Module):
    """Called by keyword, it returns more than what it makes of its input."""

    def forward(self, *, hidden: Tensor, more: str = "more") -> tuple[Tensor, str]:
        return hidden.tanh(), more


class Keywords(nn.Module):
    """Two inputs, and none of them the first."""

    def forward(self, *, scale: Tensor, x: Tensor) -> Tensor:
        return scale * x


@BOTH
def test_sites_may_be_called_by_keyword_and_return_more(wrap: bool) -> None:
    host, x = nn.ModuleDict({"a": Odd()}), inputs()
    Skip.attach(host, "a", wrap=wrap)
    y, more = host["a"](more="rest", hidden=x)
    assert torch.equal(y, x.tanh() + x)
    assert more == "rest"


@BOTH
def test_the_input_is_the_first_argument_of_the_site_not_of_the_call(wrap: bool) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return scale * x

    host, x = nn.ModuleDict({"a": Scaled()}), inputs()
    Skip.attach(host, "a", wrap=wrap)
    assert torch.equal(host["a"](scale=2 * torch.ones(()), x=x), 3 * x)
    assert torch.equal(host["a"](x, torch.zeros(())), x)


@BOTH
def test_sites_that_are_not_called_are_named(wrap: bool) -> None:
    host = stack(3)
    memory, x = Skip.attach(host, wrap=wrap), inputs()
    with memory.calling_all(), memory.disabled():
        host(x)
    with (
        pytest.raises(ValueError, match=r"sites \['1', '2'\] are not called .* attach\(model, sites="),
        memory.calling_all(),
    ):
        host[0](x)
    with pytest.raises(ValueError, match="three axes"), memory.calling_all():
        host(x[0])
    host[0](x)  # outside nothing is asked


# Compiled


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    ("wrap", "late"),
    [(False, False), (True, False), (True, True)],
    ids=["hooks before the first call", "wrappers before it", "wrappers after it"],
)
def test_a_compiled_host_sees_memories_come_go_and_learn(wrap: bool, late: bool, frozen: bool) -> None:
    torch._dynamo.reset()
    host, x = stack().requires_grad_(not frozen), inputs()
    plain, compiled = host(x), torch.compile(host, backend="eager", fullgraph=True)
    if late:
        assert torch.equal(compiled(x), plain)
    memory = Skip.attach(host, wrap=wrap)
    expected = host(x)
    assert torch.equal(compiled(x), expected)
    with memory.disabled():
        assert torch.equal(compiled(x), plain)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        memory.gain.mul_(2)
    assert torch.equal(compiled(x), host(x))
    assert not torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert memory.gain.grad is not None
    memory.detach()
    assert torch.equal(compiled(x), plain)


@BOTH
def test_a_host_is_exported_with_its_memory(wrap: bool) -> None:
    host, x = stack(), inputs()
    names = [*host.state_dict()]
    Skip.attach(host, wrap=wrap)
    exported = torch.export.export(host, (x,))
    assert torch.equal(exported.module()(x), host(x))
    assert [*exported.state_dict] == names


# States


@BOTH
def test_merge_and_unmerge_take_turns(wrap: bool) -> None:
    host, x = stack(), inputs()
    before, tensors = host(x), copy.deepcopy(host.state_dict())
    memory = Skip.attach(host, wrap=wrap)
    beside = host(x)
    with pytest.raises(ValueError, match=r"unmerge\(\) of a memory that is not part of .* merge\(\) comes first"):
        memory.unmerge()
    memory.merge()
    assert memory.is_merged
    assert not torch.equal(host(x), before)
    memory._scale(0.5)
    assert torch.equal(host(x), before)  # nothing is beside it any more
    memory._scale(2.0)
    with pytest.raises(ValueError, match=r"merge\(\) of a memory that is part .* unmerge\(\) comes first"):
        memory.merge()
    with pytest.raises(ValueError, match=r"enabled=False cannot leave out .* unmerge\(\) it"):
        memory.enabled = False
    with pytest.raises(ValueError, match="enabled=False"), memory.disabled():
        pass
    with pytest.raises(ValueError, match="enabled=False"):
        memory.offload()
    memory.unmerge()
    assert not memory.is_merged
    assert torch.equal(host(x), beside)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in host.state_dict().items())
    memory.merge()
    memory.detach()
    for call in (memory.merge, memory.unmerge):
        with pytest.raises(ValueError, match=r"of a memory that was detached; attach another: Skip.attach\(\)"):
            call()
    assert not torch.equal(host(x), before)


def test_disabled_nests_and_restores_after_an_exception() -> None:
    memory = Skip.attach(stack())
    with memory.disabled():
        with memory.disabled():
            assert not memory.enabled
        assert not memory.enabled
    assert memory.enabled
    with pytest.raises(RuntimeError, match="inside"), memory.disabled():
        raise RuntimeError("inside")
    assert memory.enabled
    memory.enabled = False
    with memory.disabled():
        assert not memory.enabled
    assert not memory.enabled


def test_offload_moves_it_away_disabled_and_onload_brings_it_back() -> None:
    host, x = stack(), inputs()
    before = host(x)
    memory = Skip.attach(host)
    beside, gain = host(x), memory.gain
    memory.offload()
    assert torch.equal(host(x), before)
    memory.onload()
    assert memory.gain is gain
    assert torch.equal(host(x), beside)
    memory.offload("meta")
    assert memory.gain.is_meta
    assert torch.equal(host(x), before)


def shared() -> tuple[nn.Module, str]:
    layer = SwiGLU(8)
    return nn.ModuleDict({"a": layer, "b": layer}), "a"


def wrapped() -> tuple[nn.Module, str]:
    host = stack()
    Skip.attach(host, "0", wrap=True)
    return host, "0"


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, str]], str]] = {
    "the host": (lambda: (stack(), ""), "wrap=True: site '' is the host itself; use wrap=False"),
    "wrapped": (wrapped, "wrap=True: site '0' is wrapped already; use wrap=False"),
    "shared": (shared, "wrap=True: site 'a' is at several places of the host; use wrap=False"),
    "keywords": (
        lambda: (nn.ModuleDict({"a": Keywords()}), "a"),
        "site 'a' is a Keywords, whose forward takes 'scale'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sites_that_cannot_be_wrapped_are_refused_and_the_host_is_left_alone(case: str) -> None:
    make, message = REFUSED[case]
    host, name = make()
    modules, flags = [*host.modules()], [parameter.requires_grad for parameter in host.parameters()]
    with pytest.raises(ValueError, match=message):
        Skip.attach(host, name, wrap=True)
    assert [*host.modules()] == modules
    assert [parameter.requires_grad for parameter in host.parameters()] == flags


def test_the_host_itself_may_be_a_site_of_hooks() -> None:
    host, x = FeedForward(8), inputs()
    plain = host(x)
    Skip.attach(host, "")
    assert torch.equal(host(x), plain + x)
