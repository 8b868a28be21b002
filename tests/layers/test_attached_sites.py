"""AttachedMemories: which feed-forwards are found in which order, what they read, and in which precision."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import AttachedMemories, SwiGLU
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.products import memory_feed_forward

STATED: dict[str, Any] = {"dim": 8, "activation": "silu", "gated": True}


def tree(**children: Any) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def says(module: nn.Module, **config: Any) -> nn.Module:
    module.config = SimpleNamespace(**config)  # type: ignore[assignment]
    return module


def fetch(memories: AttachedMemories) -> Fetched:
    layout = memories.layout((4,), branching=2, dtype=torch.float32)

    def block(node: Any) -> Tensor:
        return 0.3 * torch.randn(layout.block_shape(1), generator=torch.Generator().manual_seed(node.node))

    return Fetched.of(layout, torch.tensor([[0], [1]]), block)


def inputs() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Gated(nn.Module):
    """As in Llama, with any activation."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act_fn = act_fn


def shared() -> SwiGLU:
    return SwiGLU(8)


def twice(name: str) -> nn.Module:
    layer = shared()
    return nn.ModuleDict({name: layer, "b": layer})


def two() -> nn.ModuleList:
    return nn.ModuleList([shared(), nn.Linear(8, 8)])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "declared": (
        lambda: AttachedMemories.attach(says(two(), num_hidden_layers=2)),
        r"has 2 layers, and 1 feed-forwards are recognised; name the feed-forwards: attach\(model, sites=",
    ),
    "text": (
        lambda: AttachedMemories.attach(says(two(), get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))),
        "has 2 layers, and 1 feed-forwards",
    ),
    "blocks": (lambda: AttachedMemories.attach(tree(blocks=two())), "has 2 layers, and 1 feed-forwards"),
    "experts": (
        lambda: AttachedMemories.attach(tree(mlp=tree(experts=nn.ModuleList([shared()])))),
        r"'mlp.experts.0' is an expert, a part of a layer's feed-forward; name the feed-forwards: .*sites=",
    ),
    "shared expert": (lambda: AttachedMemories.attach(tree(shared_expert=shared())), "'shared_expert' is an expert"),
    "encoder": (
        lambda: AttachedMemories.attach(says(nn.ModuleList([shared()]), is_encoder_decoder=True)),
        "has an encoder and a decoder, .*sites=",
    ),
    "one module": (lambda: AttachedMemories.attach(twice("a")), "sites 'a' and 'b' are one module"),
    "one named module": (lambda: AttachedMemories.attach(twice("a"), sites=["b", "a"]), "sites 'b' and 'a' are one"),
    "keywords": (
        lambda: AttachedMemories.attach(tree(a=Keywords()), sites=["a"], **STATED),
        "site 'a' is a Keywords, whose forward takes 'scale' and others by keyword alone",
    ),
    "relu6": (lambda: AttachedMemories.attach(tree(a=Gated(F.relu6))), "activation=None is not known of site 'a'"),
    "clamped": (
        lambda: AttachedMemories.attach(tree(a=Gated(lambda z: F.silu(z).clamp(max=7)))),
        "activation=None is not known of site 'a'",
    ),
    "thresholded": (
        lambda: AttachedMemories.attach(tree(a=Gated(lambda z: F.threshold(z, 0.05, 0.0)))),
        "activation=None is not known of site 'a'",
    ),
}


class Keywords(nn.Module):
    """Two inputs, and none of them the first."""

    def forward(self, *, scale: Tensor, x: Tensor) -> Tensor:
        return scale * x


class Scaled(nn.Module):
    """A second input, which a caller may name first."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * x


@pytest.mark.parametrize("case", REFUSED)
def test_where_sites_are_not_one_a_layer_they_must_be_named(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_a_model_says_of_itself_is_met() -> None:
    whole = says(nn.ModuleList([shared(), shared()]), num_hidden_layers=2)
    assert AttachedMemories.attach(whole).sites == ("0", "1")
    assert AttachedMemories.attach(says(two(), num_hidden_layers=2), sites=["0"]).sites == ("0",)
    assert AttachedMemories.attach(twice("a"), sites=["a"]).sites == ("a",)
    moe = tree(mlp=tree(experts=nn.ModuleList([shared()])))
    assert AttachedMemories.attach(moe, sites=["mlp"], **STATED).sites == ("mlp",)


def test_numbered_siblings_stand_in_the_order_of_their_numbers_and_others_as_they_are_listed() -> None:
    names = ["10", "9", "2"]
    host = tree(low=nn.ModuleDict({name: shared() for name in names}), head=shared())
    host.add_module("base", nn.ModuleDict({"1": tree(mlp=shared()), "0": tree(mlp=shared())}))
    found = AttachedMemories.attach(host).sites
    assert found == ("low.2", "low.9", "low.10", "head", "base.0.mlp", "base.1.mlp")


def test_the_input_is_the_first_of_the_site_not_of_the_call() -> None:
    host, x = tree(a=Scaled()), inputs()
    memories = AttachedMemories.attach(host, sites=["a"], **STATED)
    fetched, scale = fetch(memories), torch.full_like(x, 2.0)
    expected = 2 * x + memory_feed_forward(x, fetched.layers()[0])
    with memories.reading(fetched):
        assert torch.equal(host.a(scale=scale, x=x), expected)
        assert torch.equal(host.a(x, scale=scale), expected)


def test_under_autocast_memories_reach_a_float32_stream_in_float32_and_else_sites_keep_their_dtype() -> None:
    host, x = nn.ModuleList([shared()]), inputs()
    memories = AttachedMemories.attach(host)
    fetched = fetch(memories)
    for block in fetched.blocks:
        block.mul_(1e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, update = host[0](x), memory_feed_forward(x, fetched.layers()[0])
        with memories.reading(fetched):
            y = host[0](x)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(y, plain.float() + update)
    assert (y.bfloat16() == plain).float().mean() > 0.5  # most would be lost
    narrow = tree(a=Narrow())
    memories = AttachedMemories.attach(narrow, sites=["a"], **STATED)
    with memories.reading(fetched):
        assert narrow.a(x).dtype == torch.bfloat16


class Narrow(nn.Module):
    """Returns bfloat16, whatever it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()
