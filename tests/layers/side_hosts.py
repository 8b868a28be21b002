"""Hosts for tests of side memories: tiny, of every kind whose feed-forwards are recognised, each with an input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM, create_model
from memzoo.layers import Attention, FeedForward

DIM, WIDTH, DEPTH, VOCAB_SIZE = 16, 24, 2, 31


@dataclass(frozen=True)
class HostKind:
    """A kind of host.

    Attributes:
        build: Makes the model, in float32.
        sites: Names of its feed-forwards, ``{}`` for the number of the layer.
        gated: Whether those have a gate.
        biased: Whether their matrices have biases.
        images: Whether it reads images, and tokens otherwise.
    """

    build: Callable[[], Any]
    sites: str
    gated: bool
    biased: bool = False
    images: bool = False

    @property
    def names(self) -> list[str]:
        return [self.sites.format(layer) for layer in range(DEPTH)]


def _ours() -> nn.Module:
    sizes = {"dim": DIM, "depth": DEPTH, "num_heads": 2, "hidden_dim": WIDTH}
    return create_model("transformer_tiny", vocab_size=VOCAB_SIZE, **sizes)


def _plain() -> nn.Module:
    def block() -> Block:
        return Block(Attention(DIM, num_heads=2), FeedForward(DIM, hidden_dim=WIDTH, bias=True))

    return CausalLM(VOCAB_SIZE, DIM, [block() for _ in range(DEPTH)], tie_embeddings=False)


def _transformers(name: str, **options: Any) -> Callable[[], Any]:
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    if name == "GPT2":
        sizes = {"n_embd": DIM, "n_layer": DEPTH, "n_inner": WIDTH, "n_head": 2, "n_positions": 32}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": VOCAB_SIZE - 1}
    model = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"

    def build() -> Any:
        library = pytest.importorskip("transformers", reason="hosts of transformers need the dev extra")
        config = getattr(library, f"{name}Config")(vocab_size=VOCAB_SIZE, **sizes, **ends, **options)
        return getattr(library, model)(config)

    return build


def _timm(**options: Any) -> Callable[[], nn.Module]:
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2, "mlp_ratio": WIDTH / DIM, "num_classes": 5}
    return lambda: VisionTransformer(img_size=8, patch_size=4, **sizes, **options)


def moe() -> Any:
    """Return a mixture of experts, whose shared ones read (batch * time, dim), and their names."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = _transformers("Qwen2Moe", num_key_value_heads=1, shared_expert_intermediate_size=WIDTH, **experts)()
    return host.eval(), [f"model.layers.{layer}.mlp.shared_expert" for layer in range(DEPTH)]


HOSTS = {
    "ours": HostKind(_ours, "blocks.{}.ffn", gated=True),
    "plain": HostKind(_plain, "blocks.{}.ffn", gated=False, biased=True),
    "llama": HostKind(_transformers("Llama", num_key_value_heads=1), "model.layers.{}.mlp", gated=True),
    "llama_biased": HostKind(_transformers("Llama", mlp_bias=True), "model.layers.{}.mlp", gated=True, biased=True),
    "phi3": HostKind(_transformers("Phi3"), "model.layers.{}.mlp", gated=True),
    "gpt2": HostKind(_transformers("GPT2"), "transformer.h.{}.mlp", gated=False, biased=True),
    "vit": HostKind(_timm(), "blocks.{}.mlp", gated=False, biased=True, images=True),
    "vit_swiglu": HostKind(_timm(mlp_layer=timm.layers.SwiGLU), "blocks.{}.mlp", gated=True, biased=True, images=True),
    "vit_glu": HostKind(_timm(mlp_layer=timm.layers.GluMlp), "blocks.{}.mlp", gated=True, biased=True, images=True),
    "vit_packed": HostKind(
        _timm(mlp_layer=timm.layers.SwiGLUPacked), "blocks.{}.mlp", gated=True, biased=True, images=True
    ),
}


def make_host(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Build a host in eval mode, every parameter moved off its first value: the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = HOSTS[name].build()
        with torch.no_grad():
            for parameter in host.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return host.to(dtype).eval()


def make_inputs(name: str, batch: int = 2, time: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what the host reads: tokens, or images in its dtype."""
    generator = torch.Generator().manual_seed(1)
    if HOSTS[name].images:
        return torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)
    return torch.randint(2, VOCAB_SIZE - 1, (batch, time), generator=generator)


def read(host: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits that a host of any kind makes of its input."""
    result: Any = host(inputs)
    if isinstance(result, tuple):
        return result[0]  # type: ignore[no-any-return]
    return getattr(result, "logits", result)  # type: ignore[no-any-return]
