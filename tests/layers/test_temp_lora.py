"""TempLoRA: adapters beside the linear layers of any host; nothing at first, forgotten by reset, merged to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import SwiGLU, TempLoRA, layer_entry
from memzoo.layers.feed_forward_site import is_conv1d
from memzoo.layers.reference.locas import low_rank
from tests.layers.side_hosts import DEPTH, HOSTS, make_host, make_inputs, read

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
COUNTS = {"ours": 7, "plain": 6, "llama": 7, "phi3": 4, "gpt2": 4, "vit": 4, "vit_swiglu": 5, "vit_glu": 4}
COUNTS |= {"llama_biased": 7, "vit_packed": 4}  # linear layers of a block


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(SwiGLU(8, hidden_dim=12), SwiGLU(8, hidden_dim=12)).eval()


def inputs() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def learn(memory: TempLoRA, seed: int = 0) -> TempLoRA:
    """Move every parameter as learning might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return memory


def weights(layer: Any) -> tuple[Tensor, int, int]:
    matrix = layer.weight.T if is_conv1d(layer) else layer.weight
    return matrix, *matrix.shape[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", HOSTS)
def test_adapters_stand_beside_every_linear_layer_but_the_head_and_add_nothing_at_first(
    name: str, dtype: torch.dtype
) -> None:
    host, x = make_host(name, dtype), make_inputs(name, dtype=dtype)
    before = read(host, x)
    memory = TempLoRA.attach(host, rank=3).train()
    assert len(memory.sites) == DEPTH * COUNTS[name]
    assert not any(site.endswith("head") for site in memory.sites)
    assert torch.equal(read(host, x), before)
    assert {p.dtype for p in memory.parameters()} == {torch.promote_types(dtype, torch.float32)}
    layers = [host.get_submodule(site) for site in memory.sites]
    assert memory.num_parameters() == sum(3 * sum(weights(layer)[1:]) for layer in layers)
    assert memory.num_parameters() == sum(p.numel() for p in memory.parameters())
    assert (read(learn(memory).host, x) - before).abs().max() > 1e-2
    assert read(host, x).dtype == dtype
    with memory.disabled():
        assert torch.equal(read(host, x), before)


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_linear_layer_computes_the_formula(name: str, wrap: bool) -> None:
    host = make_host(name, torch.float64)
    memory = learn(TempLoRA.attach(host, rank=3, alpha=6.0, wrap=wrap))
    for index, site in enumerate(memory.sites):
        layer = dict(host.named_modules())[site]
        matrix, width, _ = weights(layer)
        x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        expected = low_rank(x, matrix, memory.up[index], memory.down[index], 6.0)
        if layer.bias is not None:
            expected = expected + layer.bias
        y = host.get_submodule(site)(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(host.get_submodule(site)(x[0, 0]), expected[0, 0], rtol=0, atol=1e-12)


def test_a_is_drawn_uniformly_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, same, other = (TempLoRA.attach(stack(), seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(3)
    host = nn.ModuleList([nn.Linear(100, 4), nn.Linear(25, 4)])
    torch.set_rng_state(state)
    memory = TempLoRA.attach(host, rank=400)
    assert torch.equal(torch.get_rng_state(), state)
    for down, bound in zip((d.detach() for d in memory.down), (0.1, 0.2), strict=True):
        assert down.abs().max() <= bound
        assert down.abs().max() > 0.999 * bound
        assert abs(float(down.mean())) < 0.02 * bound
        assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first.down, other.down, strict=True))


def trajectory(memory: TempLoRA, x: Tensor) -> list[Tensor]:
    optimiser = torch.optim.AdamW(memory.parameters(), lr=1e-2)
    outputs = []
    for _ in range(4):
        y = read(memory.host, x)
        outputs.append(y.detach())
        optimiser.zero_grad()
        F.cross_entropy(y.flatten(0, 1), x.flatten()).backward()
        optimiser.step()
    return outputs


@BOTH
def test_the_same_trajectory_follows_a_reset_and_gradients_stay_in_the_memory(wrap: bool) -> None:
    host, x = make_host("ours"), make_inputs("ours")
    base = copy.deepcopy(host.state_dict())
    memory = TempLoRA.attach(host, rank=2, wrap=wrap)
    parameters = [*memory.parameters()]
    first = trajectory(memory, x)
    assert all(parameter.grad is not None for parameter in parameters)
    assert not torch.equal(first[-1], first[0])
    memory.reset()
    assert all(parameter.grad is None for parameter in parameters)
    assert all(new is old for new, old in zip(memory.parameters(), parameters, strict=True))
    assert all(torch.equal(*pair) for pair in zip(trajectory(memory, x), first, strict=True))
    assert all(parameter.grad is None for parameter in host.parameters())
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())


def test_the_first_gradient_moves_b_alone() -> None:
    host, x = make_host("llama"), make_inputs("llama")
    memory = TempLoRA.attach(host, rank=2)
    F.cross_entropy(read(host, x).flatten(0, 1), x.flatten()).backward()
    assert all(not down.grad.any() for down in memory.down)
    assert all(up.grad.any() for up in memory.up)


def test_dropout_follows_the_mode_of_the_memory_which_starts_as_that_of_the_host() -> None:
    host, x = stack(), inputs()
    memory = learn(TempLoRA.attach(host, dropout=0.5))
    exact = host(x)
    assert not memory.training
    assert torch.equal(host.train()(x), exact)
    torch.manual_seed(0)
    memory.train()
    mean = torch.stack([host[0].down(x.new_ones(1, 12)) for _ in range(2000)]).mean(0)
    assert not torch.equal(host(x), exact)
    memory.eval()
    torch.testing.assert_close(mean, host[0].down(x.new_ones(1, 12)), rtol=0, atol=0.15)
    assert torch.equal(host(x), exact)
    assert TempLoRA.attach(stack().train()).training


@BOTH
@pytest.mark.parametrize("name", HOSTS)
def test_merged_adapters_are_in_the_weights_and_unmerge_restores_them_to_the_bit(name: str, wrap: bool) -> None:
    host, x = make_host(name, torch.float64), make_inputs(name, dtype=torch.float64)
    base, before = copy.deepcopy(host.state_dict()), read(host, x)
    parameters = dict(host.named_parameters())
    memory = learn(TempLoRA.attach(host, rank=3, wrap=wrap))
    beside = read(host, x)
    memory.merge()
    torch.testing.assert_close(read(host, x), beside, rtol=0, atol=1e-10)
    assert all(not torch.equal(host.get_parameter(f"{s}.weight"), base[f"{s}.weight"]) for s in memory.sites)
    with pytest.raises(ValueError, match=r"reset\(\) of a memory that is part of the host's weights; unmerge\(\)"):
        memory.reset()
    memory.unmerge()
    assert torch.equal(read(host, x), beside)
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    assert all(parameter is parameters[key] for key, parameter in host.named_parameters())
    memory.merge()
    memory.unmerge()
    memory.detach()
    assert torch.equal(read(host, x), before)


def test_merging_into_bf16_rounds_once_and_comes_back_to_the_bit() -> None:
    host = stack().bfloat16()
    base = copy.deepcopy(host.state_dict())
    memory = learn(TempLoRA.attach(host, rank=2, alpha=1.0))
    memory.merge()
    for index, site in enumerate(memory.sites):
        exact = base[f"{site}.weight"].double() + 0.5 * memory.up[index].double() @ memory.down[index].double()
        torch.testing.assert_close(host.get_parameter(f"{site}.weight"), exact.bfloat16(), rtol=2**-7, atol=0)
    memory.unmerge()
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())


def test_autocast_adds_in_the_dtype_of_products() -> None:
    host, x = stack(), inputs()
    learn(TempLoRA.attach(host))
    exact = host(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = host(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@BOTH
def test_a_compiled_host_learns(wrap: bool) -> None:
    torch._dynamo.reset()
    host, x = stack(), inputs()
    memory = TempLoRA.attach(host, wrap=wrap)
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), host(x))
    learn(memory)
    assert torch.equal(compiled(x), host(x))


# Which layers


class Direct(nn.Module):
    """Multiplies with the weight of a linear layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.called(F.linear(x, self.read.weight))
        return y


@BOTH
def test_memorize_changes_nothing_and_names_what_is_never_called(wrap: bool) -> None:
    host, x = Direct(), inputs()
    memory = TempLoRA.attach(host, wrap=wrap)
    with pytest.raises(ValueError, match=r"sites \['read'\] are not called by the host.*sites=\[...\]"):
        memory.memorize(x)
    memory.detach()
    memory = learn(TempLoRA.attach(host, sites=["called"], wrap=wrap))
    before = copy.deepcopy(memory.state_dict())
    seen: list[bool] = []
    memory.memorize(x, mask=torch.ones(2, 3, dtype=torch.bool), run=lambda x: seen.append(host(x).requires_grad))
    assert seen == [False]
    assert all(torch.equal(tensor, before[key]) for key, tensor in memory.state_dict().items())


def test_named_layers_may_be_any_linear_ones() -> None:
    host = make_host("gpt2")
    assert TempLoRA.attach(host, sites=["lm_head", "transformer.h.1.mlp.c_fc"]).sites[0] == "lm_head"
    assert not {"head"} & set(TempLoRA.attach(make_host("plain")).sites)
    assert TempLoRA.attach(make_host("vit"), sites=["head"]).num_parameters() == 64 * (16 + 5)


def test_a_head_is_also_what_a_model_says_it_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embed_out = nn.Linear(8, 8), nn.Linear(8, 31)

        def get_output_embeddings(self) -> nn.Module:
            return self.embed_out

    assert TempLoRA.attach(Model()).sites == ("body",)
    assert TempLoRA.attach(nn.ModuleDict({"model": Model()})).sites == ("model.body",)


def test_subclasses_of_linear_layers_are_left_out() -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert TempLoRA.attach(host).sites == ("0",)


def test_layers_whose_weight_is_a_subclass_are_left_out() -> None:
    class Sharded(Tensor):
        """Stands for the tensors of torchao and of DTensor."""

    host = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    data = host[1].weight.detach().as_subclass(Sharded)
    host[1].weight = nn.Parameter(data)
    assert TempLoRA.attach(host).sites == ("0",)
    with pytest.raises(ValueError, match=r"site '1' is a Linear, not a plain linear layer .*sharded"):
        TempLoRA.attach(host, sites=["1"])


def test_a_layer_at_two_places_is_merged_as_one() -> None:
    layer = nn.Linear(8, 8)
    host, x = nn.ModuleDict({"a": layer, "b": layer}).eval(), inputs()
    memory = learn(TempLoRA.attach(host))
    beside = host["b"](x)
    memory.merge()
    torch.testing.assert_close(host["b"](x), beside, rtol=0, atol=1e-5)


def test_what_is_merged_for_good_needs_no_copies() -> None:
    host, x = stack(), inputs()
    memory = learn(TempLoRA.attach(host))
    memory.merge()
    assert len(memory._bases) == len(memory.sites)
    merged = host(x)
    memory.detach()
    assert memory._bases == []
    assert torch.equal(host(x), merged)


def tied() -> Any:
    host = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    host["b"].weight = host["a"].weight
    return host


def merge_tied() -> None:
    host = tied()
    memory = learn(TempLoRA.attach(host))
    before = copy.deepcopy(host.state_dict())
    try:
        memory.merge()
    finally:
        assert not memory.is_merged
        assert all(torch.equal(tensor, before[key]) for key, tensor in host.state_dict().items())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: TempLoRA.attach(nn.LayerNorm(8)), "model=LayerNorm has no plain linear layer besides a head"),
    "unknown": (lambda: TempLoRA.attach(stack(), sites=["2"]), r"sites=\['2'\] are not names of modules"),
    "no layer": (lambda: TempLoRA.attach(stack(), sites=["0"]), "site '0' is a SwiGLU, not a plain linear layer"),
    "rank": (lambda: TempLoRA.attach(stack(), rank=0), "rank=0 is not a whole number >= 1"),
    "alpha": (lambda: TempLoRA.attach(stack(), alpha=0.0), "alpha=0.0 is not a finite number > 0"),
    "dropout": (lambda: TempLoRA.attach(stack(), dropout=1.0), r"dropout=1.0 is not a probability in \[0, 1\)"),
    "tied": (merge_tied, r"merge\(\): the weight of site 'a' is that of another module too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_argument_leaves_the_host_as_it_was() -> None:
    host = stack()
    with pytest.raises(ValueError, match="rank=-1"):
        TempLoRA.attach(host, rank=-1, wrap=True)
    assert all(parameter.requires_grad for parameter in host.parameters())
    assert all(type(module) in (nn.Sequential, SwiGLU, nn.Linear) for module in host.modules())


def test_the_registry_attaches_it() -> None:
    entry, host = layer_entry("temp_lora"), stack()
    memory = entry.build(host, rank=2)
    assert (entry.kind, type(memory), memory.host) == ("side", TempLoRA, host)


def test_what_is_saved_is_loaded_by_one_like_it(tmp_path: Path) -> None:
    path, x = tmp_path / "adapters", inputs()
    memory = learn(TempLoRA.attach(stack(), rank=2, seed=1))
    memory.save(path)
    other = TempLoRA.attach(stack(), rank=2)
    other.load(path)
    assert torch.equal(other.host(x), memory.host(x))
    for options, said in (({"rank": 3}, "rank=2, this one has 3"), ({"rank": 2, "alpha": 1.0}, "alpha=64.0")):
        with pytest.raises(ValueError, match=said):
            TempLoRA.attach(stack(), **options).load(path)
