"""Sites: the feed-forwards of every kind of host are found, read as matrices, grown and cut back to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import FeedForward, SwiGLU
from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.reference import locas as reference
from memzoo.layers.sites import find_feed_forwards
from tests.layers.side_hosts import DEPTH, DIM, HOSTS, make_host, make_inputs, read

SIZES = ("in_features", "out_features", "nx", "nf", "intermediate_size", "memory_dim")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(host: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: {s: vars(module)[s] for s in SIZES if s in vars(module)} for name, module in host.named_modules()}


def slots(site: FeedForwardSite, count: int, *, biased: bool) -> dict[str, Any]:
    new: dict[str, Any] = {"up": normal(count, DIM), "down": normal(DIM, count, seed=1)}
    if biased:
        new["up_bias"] = normal(count, seed=2)
    if site.gated:
        new["gate"] = normal(count, DIM, seed=3)
        if biased:
            new["gate_bias"] = normal(count, seed=4)
    return new


@pytest.mark.parametrize("name", HOSTS)
def test_the_feed_forwards_of_a_host_are_read_as_matrices(name: str) -> None:
    kind, host = HOSTS[name], make_host(name, torch.float64)
    found = find_feed_forwards(host)
    assert list(found) == kind.names
    for site_name, site in found.items():
        assert (site.name, site.module) == (site_name, host.get_submodule(site_name))
        assert (site.dim, site.gated, site.up_bias is not None) == (DIM, kind.gated, kind.biased)
        assert site.up_weight.shape == site.down_weight.T.shape == (site.width, DIM)
        assert (site.gate_bias is not None) == (kind.gated and kind.biased)
        x = normal(2, 3, DIM)
        gate, values = site.gate_weight, site.down_weight.T
        for row, read_row in zip(x, site.module(x), strict=True):
            expected = reference.feed_forward(
                row, gate, site.up_weight, values, site.activation, site.up_bias, site.gate_bias
            )
            expected = expected if site.down.bias is None else expected + site.down.bias
            torch.testing.assert_close(read_row, expected, rtol=0, atol=1e-12)
        hidden = site.hidden(x)
        assert hidden.shape == (2, 3, site.width)
        down = F.linear(hidden, site.down_weight, site.down.bias)
        torch.testing.assert_close(site.module(x), down, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", HOSTS)
def test_matrices_are_views_of_the_parameters(name: str) -> None:
    host = make_host(name)
    site = find_feed_forwards(host)[HOSTS[name].names[0]]
    views = [site.up_weight, site.down_weight] + ([site.gate_weight] if site.gate_weight is not None else [])
    storages = {p.untyped_storage().data_ptr() for p in site.module.parameters()}
    assert {view.untyped_storage().data_ptr() for view in views} <= storages


@pytest.mark.parametrize("name", HOSTS)
def test_appended_slots_add_what_they_say_and_remove_restores_everything(name: str) -> None:
    kind, host, inputs = HOSTS[name], make_host(name, torch.float64), make_inputs(name, dtype=torch.float64)
    parameters, tensors = dict(host.named_parameters()), {k: v.clone() for k, v in host.state_dict().items()}
    layouts, logits, before = {k: p.stride() for k, p in parameters.items()}, read(host, inputs), sizes(host)
    x = normal(3, DIM, seed=5)
    for site in find_feed_forwards(host).values():
        new, width, y = slots(site, 5, biased=kind.biased), site.width, site.module(x[None])[0]
        site.append(**new)
        assert site.width == site.up_weight.shape[0] == width + 5
        added = reference.feed_forward(
            x, new.get("gate"), new["up"], new["down"].T, site.activation, new.get("up_bias"), new.get("gate_bias")
        )
        torch.testing.assert_close(site.module(x[None])[0], y + added, rtol=0, atol=1e-11)
        for layer, own in ((site._layer(part), sizes(site.module)[part]) for part in (site.parts.up, site.parts.down)):
            shape = layer.weight.shape
            said = (own["nx"], own["nf"]) if "nx" in own else (own["out_features"], own["in_features"])
            assert said == shape
        for said in ("intermediate_size", "memory_dim"):
            assert getattr(site.module, said, width + 5) == width + 5
    assert (read(host, inputs) - logits).abs().max() > 1e-3
    for site in find_feed_forwards(host).values():
        site.remove(5)
    assert sizes(host) == before
    for key, parameter in host.named_parameters():
        assert parameter is parameters[key]
        assert parameter.stride() == layouts[key]
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in host.state_dict().items())
    assert torch.equal(read(host, inputs), logits)


def test_slots_take_the_dtype_of_the_host_and_biases_that_are_not_given_are_zero() -> None:
    site = find_feed_forwards(make_host("plain", torch.bfloat16))["blocks.0.ffn"]
    site.append(normal(2, DIM), normal(DIM, 2))
    assert site.up_weight.dtype == site.down_weight.dtype == torch.bfloat16
    assert site.up_bias is not None
    assert torch.equal(site.up_bias[-2:], torch.zeros(2, dtype=torch.bfloat16))


def test_sites_are_the_named_ones_in_the_order_they_are_named() -> None:
    host = make_host("ours")
    names = HOSTS["ours"].names[::-1]
    assert list(find_feed_forwards(host, names)) == names
    assert list(find_feed_forwards(host, names[:1])) == names[:1]


def test_a_host_on_the_meta_device_is_read_without_numbers() -> None:
    with torch.device("meta"):
        host = nn.ModuleList([SwiGLU(8)])
    assert find_feed_forwards(host)["0"].dim == 8


def test_the_comparison_with_the_formula_is_on_the_device_of_the_host() -> None:
    host = nn.ModuleList([SwiGLU(8, hidden_dim=12)])
    with torch.device("meta"):
        assert find_feed_forwards(host)["0"].width == 12


def test_a_feed_forward_that_many_layers_share_is_named_once() -> None:
    layer = SwiGLU(8, hidden_dim=12)
    host = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer})})
    with pytest.raises(ValueError, match=r"sites 'a' and 'b\.c' are one module"):
        find_feed_forwards(host)
    assert list(find_feed_forwards(host, ["b.c"])) == ["b.c"]


def test_of_two_feed_forwards_a_layer_the_right_ones_must_be_named() -> None:
    host = timm.create_model("mixer_s32_224", img_size=32, num_classes=5)
    assert isinstance(host.blocks, nn.Sequential)
    with pytest.raises(ValueError, match="has 8 layers, and 16 feed-forwards are recognised; name"):
        find_feed_forwards(host)
    assert find_feed_forwards(host, ["blocks.0.mlp_channels"])["blocks.0.mlp_channels"].dim == 512


def test_gradients_of_another_size_are_forgotten() -> None:
    host = make_host("plain", torch.float64)
    site = find_feed_forwards(host)["blocks.0.ffn"]
    for change in (lambda: site.append(normal(2, DIM), normal(DIM, 2)), lambda: site.remove(2)):
        site.module(normal(1, 3, DIM)).sum().backward()
        change()
        assert [name for name, p in site.module.named_parameters() if p.grad is not None] == ["down.bias"]
        site.module(normal(1, 3, DIM)).sum().backward()
        assert all(p.grad.shape == p.shape for p in site.module.parameters())


def test_dropout_and_training_mode_are_left_as_they_are() -> None:
    host = nn.ModuleList([timm.layers.Mlp(8, 12, drop=0.5)]).train()
    host[0].drop2.eval()
    assert list(find_feed_forwards(host)) == ["0"]
    assert (host[0].training, host[0].drop1.training, host[0].drop2.training) == (True, True, False)


def test_autocast_does_not_blur_the_comparison_with_the_formula() -> None:
    torch.manual_seed(0)
    host = nn.ModuleList([SwiGLU(8)])
    with torch.autocast("cpu", torch.bfloat16):
        assert list(find_feed_forwards(host)) == ["0"]


class Adapted(nn.Module):
    """A linear layer inside another, as adapters of other libraries are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y


class Quantised(nn.Linear):
    """Eight bits, as those of bitsandbytes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = nn.Parameter((base.weight.detach() * 100).to(torch.int8), requires_grad=False)


class Between(nn.Module):
    """Names of a feed-forward's parts, and a formula of its own."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.scale * self.act(self.fc1(x)))
        return y


class Pair(Between):
    """Two inputs."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + other


def changed(part: str, wrap: Callable[[Any], Any]) -> nn.Module:
    torch.manual_seed(0)
    ffn = SwiGLU(8, hidden_dim=12)
    setattr(ffn, part, wrap(getattr(ffn, part)))
    return nn.ModuleList([ffn])


def adapted_llama() -> nn.Module:
    host = make_host("llama")
    mlp = host.model.layers[1].mlp
    mlp.down_proj = Adapted(mlp.down_proj)
    return host


def twice() -> nn.Module:
    ffn = SwiGLU(8, hidden_dim=12)
    ffn.gate = ffn.up
    return nn.ModuleList([ffn])


def tied(first: str, second: str) -> nn.Module:
    host = nn.ModuleDict({name: SwiGLU(8, hidden_dim=8) for name in "ab"})
    host["read"] = nn.Linear(8, 8, bias=False)
    host.get_submodule(first).weight = host.get_submodule(second).weight
    return host


class Scaled(Tensor):
    """Eight bits and a scale that pass for numbers of 32, as those of torchao."""

    q: Tensor

    @staticmethod
    def __new__(cls, q: Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, q: Tensor) -> None:
        self.q = q

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(inputs[0].q)
        plain = [part.q.float() / 127 if isinstance(part, cls) else part for part in inputs]
        return function(*plain, **(options or {}))


def as_subclass(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(Scaled((127 * layer.weight.detach()).to(torch.int8)), requires_grad=False)
    return layer


def one_layer_in_two() -> nn.Module:
    host = nn.ModuleDict({name: SwiGLU(8, hidden_dim=12) for name in "ab"})
    host["b"].up = host["a"].up
    return host


def one_bias_in_two() -> nn.Module:
    host = nn.ModuleDict({name: FeedForward(8, hidden_dim=12, bias=True) for name in "ab"})
    host["b"].up.bias = host["a"].up.bias
    return host


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a tensor subclass": (
        lambda: changed("up", as_subclass),
        "site '0': up is a Linear, not a plain linear layer .*quantised, sharded or parametrised",
    ),
    "one layer in two sites": (one_layer_in_two, "site 'a' shares the matrix or bias of up with another module"),
    "one layer twice in a site": (
        twice,
        "site '0' shares the matrix or bias of gate with another module",
    ),
    "one bias in two sites": (one_bias_in_two, "site 'a' shares the matrix or bias of up with another module"),
    "parametrised": (
        lambda: changed("up", nn.utils.parametrizations.weight_norm),
        "site '0': up is a ParametrizedLinear, not a plain linear layer",
    ),
    "parametrised by hooks": (
        lambda: changed("gate", lambda layer: torch.nn.utils.spectral_norm(layer)),
        "site '0': gate is a Linear, not a plain linear layer .*quantised, sharded or parametrised",
    ),
    "quantised": (lambda: changed("down", Quantised), "site '0': down is a Quantised, not a plain"),
    "adapted": (lambda: changed("down", Adapted), "site '0': down is a Adapted, not a plain"),
    "adapted Llama": (adapted_llama, "site 'model.layers.1.mlp': down_proj is a Adapted, not a plain"),
    "tied sites": (lambda: tied("a.down", "b.down"), "site 'a' shares the matrix or bias of down with another module"),
    "tied in a site": (lambda: tied("b.gate", "b.up"), "site 'b' shares the matrix or bias of gate with another"),
    "tied elsewhere": (lambda: tied("read", "b.up"), "site 'b' shares the matrix or bias of up with another .*untie"),
    "norm": (
        lambda: nn.ModuleList([timm.layers.Mlp(8, 12, norm_layer=nn.LayerNorm)]),
        "site '0' has a LayerNorm between its matrices",
    ),
    "formula": (
        lambda: nn.ModuleList([Between()]),
        "site '0' is a Between that computes something else than its matrices fc1 and fc2 say",
    ),
    "two inputs": (lambda: nn.ModuleList([Pair()]), "site '0' is a Pair that computes something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_matrices_that_cannot_be_read_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        find_feed_forwards(make())


def test_names_with_the_formula_to_them_are_a_feed_forward() -> None:
    torch.manual_seed(0)
    assert list(find_feed_forwards(nn.ModuleList([Between(scale=1.0)]))) == ["0"]


def test_whole_layers_that_hold_the_matrices_themselves_are_not_taken_for_feed_forwards() -> None:
    library = pytest.importorskip("transformers", reason="hosts of transformers need the dev extra")
    options = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    config = library.OPTConfig(vocab_size=31, word_embed_proj_dim=16, max_position_embeddings=32, **options)
    host = library.OPTForCausalLM(config)
    layer = host.model.decoder.layers[0]
    assert layer.fc1.out_features == layer.fc2.in_features == 24
    with pytest.raises(ValueError, match="OPTForCausalLM has no feed-forward that is recognised; name"):
        find_feed_forwards(host)
    with pytest.raises(ValueError, match="is a OPTDecoderLayer, whose matrices are not known"):
        find_feed_forwards(host, ["model.decoder.layers.0"])


def test_squeeze_and_excitation_is_no_feed_forward() -> None:
    gate = timm.layers.SEModule(16)
    assert isinstance(gate.fc1, nn.Conv2d)
    with pytest.raises(ValueError, match="ModuleList has no feed-forward that is recognised"):
        find_feed_forwards(nn.ModuleList([gate]))
    assert list(find_feed_forwards(nn.ModuleList([gate, FeedForward(8)]))) == ["1"]
