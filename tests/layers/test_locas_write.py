"""Locas-MLP: slots from one backward pass (check 14 of the spec), and their compression."""

from typing import Any

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch import Block, CausalLM
from memzoo.layers import Attention, FeedForward, Locas
from memzoo.layers.locas_init import next_token_log_likelihood
from memzoo.layers.reference import locas as reference
from tests.layers.locas_cases import BIASED, EXACT, GATED, attach, plain_host, sites_of, slots_of
from tests.layers.side_hosts import DIM, VOCAB_SIZE, WIDTH, make_host, make_inputs, read

each = pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])
language = pytest.mark.parametrize("name", ["plain", "gpt2"])


def log_likelihoods(host: nn.Module, tokens: Tensor) -> Tensor:
    """Of every next token, (batch, time - 1)."""
    logits = read(host, tokens)[:, :-1].log_softmax(-1)
    return logits.gather(-1, tokens[:, 1:, None])[..., 0]


def recorded_with_gradients(
    memory: Locas, tokens: Tensor, *, per_token: bool, mask: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what every site reads, and the gradient of the log-likelihood by what is added to its output, zeros."""
    sites, inputs, added = sites_of(memory), [], []

    def hook(module: nn.Module, x: Any, y: Tensor) -> Tensor:
        inputs.append(x[0].detach())
        added.append(torch.zeros_like(y, requires_grad=True))
        return y + added[-1]

    handles = [site.module.register_forward_hook(hook) for site in sites]
    likelihood = log_likelihoods(memory.host, tokens)
    likelihood = F.pad(likelihood if mask is None else likelihood * mask[:, 1:], (0, 1))
    for handle in handles:
        handle.remove()
    if not per_token:
        return inputs, list(torch.autograd.grad(likelihood.sum(), added))
    own: list[list[Tensor]] = []
    for row, time in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        slopes = torch.autograd.grad(likelihood[row, time], added, retain_graph=True)
        own.append([slope[row, time] for slope in slopes])
    return inputs, [torch.stack(layer).view_as(added[0]) for layer in zip(*own, strict=True)]


@pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
@pytest.mark.parametrize("per_token", [False, True], ids=["summed", "per-token"])
@each
@language
def test_what_is_written_is_that_of_the_equations(name, batch_size, per_token, wrap):
    """Upon a memory that has something in it already."""
    _, memory, tokens = attach(name, rank=15, batch_size=batch_size, wrap=wrap)
    memory.write(tokens[:, 2:4], mask=torch.tensor([[True, False]] * 2), log_likelihood=next_token_log_likelihood)
    held = memory.free
    assert all(slots.value.any() for slots in memory.slots)
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, True, True]])
    inputs, slopes = recorded_with_gradients(memory, tokens, per_token=per_token, mask=mask)
    memory.write(tokens, mask=mask, eps=0.3, per_token=per_token)
    count = 4 if batch_size else 8
    assert memory.free == held - count
    keys, values = reference.write(
        [x.flatten(0, 1) for x in inputs], [slope.flatten(0, 1) for slope in slopes], eps=0.3
    )
    place = slice(15 - held, 15 - held + count)
    for slots, key, value in zip(slots_of(memory), keys, values, strict=True):
        shape = (2, 4, DIM) if batch_size else (8, DIM)
        torch.testing.assert_close(slots.key[..., place, :].detach(), key[mask.flatten()].view(shape), **EXACT)
        torch.testing.assert_close(slots.value[..., place, :].detach(), value[mask.flatten()].view(shape), **EXACT)
        assert not slots.key_bias.any()
        assert set(slots.rows[..., place].flatten().tolist()) == {-2}
    assert not any(parameter.grad is not None for parameter in memory.host.parameters())


@language
def test_written_for_each_token_differs_from_the_sum(name):
    """The sum has what a token does for later ones."""
    found = []
    for per_token in (False, True):
        _, memory, tokens = attach(name, rank=12)
        memory.write(tokens, per_token=per_token)
        found.append(slots_of(memory)[0].value.detach().view(2, 6, DIM))
    last = slice(4, 6)  # behind which there is nothing: only its own
    torch.testing.assert_close(found[0][:, last], found[1][:, last], **EXACT)
    assert not torch.allclose(found[0][:, 0], found[1][:, 0])


@pytest.mark.parametrize("layer", [0, 1])
@language
def test_14_one_token_moves_its_layer_along_the_gradient(name, layer):
    host, inputs = make_host(name, torch.float64), make_inputs(name)[:1, :2]
    sites = [f"{'blocks' if name == 'plain' else 'transformer.h'}.{layer}.{'ffn' if name == 'plain' else 'mlp'}"]
    memory = Locas.attach(host, rank=1, sites=sites)
    _, (slope,) = recorded_with_gradients(memory, inputs, per_token=True)
    outputs: list[Tensor] = []
    hook = host.get_submodule(sites[0]).register_forward_hook(lambda module, x, y: outputs.append(y.detach()))
    before = log_likelihoods(host, inputs)
    memory.write(inputs, mask=torch.tensor([[1, 0]]), eps=1e-3, log_likelihood=next_token_log_likelihood)
    after = log_likelihoods(host, inputs)
    hook.remove()
    moved = outputs[-1][0, 0] - outputs[0][0, 0]
    assert F.cosine_similarity(moved, slope[0, 0], dim=0).item() == pytest.approx(1, abs=1e-6)
    assert after.sum() > before.sum()


@pytest.mark.parametrize("per_token", [False, True], ids=["summed", "per-token"])
@language
def test_padding_has_no_part_in_what_is_written(name, per_token):
    found = []
    for padding in (5, 9):
        _, memory, tokens = attach(name, rank=8)
        mask = (torch.arange(6) < 4).long().expand(2, 6)  # as tokenizers have it
        memory.write(tokens.where(mask.bool(), padding), mask=mask, per_token=per_token)
        found.append([parameter.detach() for parameter in memory.parameters()])
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert all(slots.value[[0, 4]].any() for slots in memory.slots)


class Flat(nn.Module):
    """A host whose second feed-forward reads (batch * time, dim)."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.first, self.second, self.flat = Mlp(DIM, WIDTH), Mlp(DIM, WIDTH), flat

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        y = self.second(x.flatten(0, 1)).view_as(x) if self.flat else self.second(x)
        return x + y.cumsum(1)


@pytest.mark.parametrize("per_token", [False, True], ids=["summed", "per-token"])
def test_a_feed_forward_that_reads_tokens_without_rows_is_written_as_others(per_token):
    x = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0))
    found = []
    for flat in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            memory = Locas.attach(Flat(flat=flat), rank=12)
        memory.write(x, log_likelihood=lambda y, _: -y.square().sum(-1), per_token=per_token)
        found.append([parameter.detach() for parameter in memory.parameters()])
    torch.testing.assert_close(found[0], found[1])
    memory.reset()
    if per_token:
        with pytest.raises(ValueError, match=r"log_likelihood returned \(2, 3\) for 12 tokens"):
            memory.write(x, log_likelihood=lambda y, _: -y.square().sum(-1)[:, :3], per_token=True)


@each
@language
def test_14_a_small_step_makes_the_whole_text_likelier(name, batch_size):
    host, memory, tokens = attach(name, rank=12, batch_size=batch_size)
    before = log_likelihoods(host, tokens).sum()
    memory.write(tokens[:, :6], eps=1e-3)
    assert log_likelihoods(host, tokens).sum() > before


@each
def test_gradient_init_writes_evenly_spread_tokens(batch_size):
    _, memory, tokens = attach(BIASED, rank=3, init="gradient", batch_size=batch_size)
    inputs, slopes = recorded_with_gradients(memory, tokens, per_token=False)
    memory.memorize(tokens)
    keys, values = reference.write([x.flatten(0, 1) for x in inputs], [s.flatten(0, 1) for s in slopes], eps=1.0)
    picked = torch.tensor([0, 4, 8] if batch_size is None else [[0, 2, 4], [6, 8, 10]])
    for slots, key, value in zip(slots_of(memory), keys, values, strict=True):
        torch.testing.assert_close(slots.key.detach(), key[picked], **EXACT)
        torch.testing.assert_close(slots.value.detach(), value[picked], **EXACT)


def test_any_likelihood_can_be_written_of_images_too():
    """Of a ViT: every token has a part in what becomes of the class."""
    host, memory, images = attach("vit", rank=10)
    labels = torch.tensor([3, 1])

    def likelihood(logits: Any, inputs: Tensor) -> Tensor:
        own = logits.log_softmax(-1).gather(1, labels[:, None])
        return F.pad(own, (0, 4))  # that of the class token

    before = likelihood(host(images), images).sum()
    memory.write(images, log_likelihood=likelihood, eps=1e-3)
    assert memory.free == 0
    assert likelihood(host(images), images).sum() > before


@pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
def test_blocks_that_are_computed_again_are_written_as_others(wrap):
    """Gradient checkpointing calls a block once more in the backward pass; for every token if ``per_token``."""
    found = []
    for again in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [Block(Attention(DIM, num_heads=2), FeedForward(DIM, hidden_dim=WIDTH)) for _ in range(2)]
            host = CausalLM(VOCAB_SIZE, DIM, blocks, checkpoint_blocks=again).double().train()
        for per_token in (False, True):
            memory = Locas.attach(host, rank=12, wrap=wrap)
            memory.write(make_inputs("plain"), per_token=per_token)
            found.append([parameter.detach() for parameter in memory.parameters()])
            memory.detach()
    torch.testing.assert_close(found[2:], found[:2], **EXACT)
    assert all(parameter.any() for memory in found for parameter in memory)


def test_what_write_refuses():
    _, memory, tokens = attach(GATED)
    with pytest.raises(ValueError, match=r"write\(\) is for feed-forwards without a gate.*use memorize\(\)"):
        memory.write(tokens)
    _, memory, tokens = attach(BIASED, rank=11)
    with pytest.raises(ValueError, match=r"12 empty slots are needed, and 11 are left; expand\(\)"):
        memory.write(tokens)
    with pytest.raises(ValueError, match="eps=0"):
        memory.write(tokens, eps=0)
    with pytest.raises(ValueError, match="mask counts nothing"):
        memory.write(tokens, mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 6\)"):
        memory.write(tokens, mask=torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"was called several times.*let run\(\) call the host once"):
        memory.write(tokens[:, :2], run=lambda tokens: (memory.host(tokens), memory.host(tokens))[1])
    assert memory.free == 11
    _, memory, tokens = attach(BIASED, rank=6, batch_size=2)
    with pytest.raises(ValueError, match="mask counts 3 tokens in one row and 5 in another"):
        memory.write(tokens, mask=torch.arange(6) < torch.tensor([[5], [3]]))
    assert memory.free == 6
    memory.detach()
    with pytest.raises(ValueError, match=r"write\(\) of a memory that was detached"):
        memory.write(tokens)


# Compression


def relu_host(kind: str) -> tuple[Any, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "vit":
            sizes = {"img_size": 8, "patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": 2, "num_classes": 5}
            pooled = {"class_token": False, "global_pool": "avg"}  # every token has a part in the class
            vit = VisionTransformer(**sizes, **pooled, act_layer=nn.ReLU)
            return vit.double().eval(), make_inputs("vit", dtype=torch.float64)
        library = pytest.importorskip("transformers", reason="hosts of transformers need the dev extra")
        sizes = {"n_embd": DIM, "n_layer": 2, "n_inner": WIDTH, "n_head": 2, "n_positions": 32}
        config = library.GPT2Config(vocab_size=VOCAB_SIZE, activation_function="relu", **sizes)
        return library.GPT2LMHeadModel(config).double().eval(), make_inputs("gpt2")


def written(kind: str, batch_size: int | None = None, rank: int = 20) -> Locas:
    host, inputs = relu_host(kind)
    memory = Locas.attach(host, rank=rank, batch_size=batch_size)
    likelihood = (lambda y, x: F.pad(y[:, :1], (0, 3))) if kind == "vit" else None
    memory.write(inputs, log_likelihood=likelihood, eps=0.05)
    return memory


@pytest.mark.parametrize("both_signs", [False, True])
@each
@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_compressed_slots_are_those_of_the_equations(kind, batch_size, both_signs):
    memory = written(kind, batch_size)
    for slots in slots_of(memory):  # some longer than what is read of them
        slots.value.data[..., ::2, :] *= 100
        slots.key.data[..., 1::2, :] *= 2
    old = [slots.effective() for slots in slots_of(memory)]
    filled = slots_of(memory)[0].filled
    memory.compress(4, both_signs=both_signs)
    count = 8 if both_signs else 4
    assert memory.free == 20 - count
    for slots, before in zip(slots_of(memory), old, strict=True):
        key, value = slots.key.detach(), slots.value.detach()
        assert not key[..., count:, :].any()
        assert not value[..., count:, :].any()
        for row in [...] if batch_size is None else range(2):
            memorised = before["key"][row][:filled].detach(), before["value"][row][:filled].detach()
            keys, values = reference.nonlinear_svd(*memorised, 4, threshold=1e-8, both_signs=both_signs)
            torch.testing.assert_close(key[row][:count], keys, rtol=0, atol=1e-7)  # eigenvectors lose half the digits
            torch.testing.assert_close(value[row][:count], values, rtol=0, atol=1e-7)


def test_along_a_new_key_the_memory_says_what_it_said():
    memory = written("gpt2")
    before = [slots.effective() for slots in slots_of(memory)]
    memory.compress(6)
    for slots, old in zip(slots_of(memory), before, strict=True):
        x = 3 * slots.key[None, :6].detach()
        expected = slots.tau * (x @ old["key"].T).relu() @ old["value"]
        torch.testing.assert_close(slots(x, torch.zeros_like(x)), expected, **EXACT)
        assert expected.any()


def test_compressing_makes_room_for_more():
    memory = written("gpt2", rank=12)
    host, tokens = memory.host, make_inputs("gpt2")
    with pytest.raises(ValueError, match=r"12 empty slots are needed, and 0 are left; expand\(\).*compress\(\)"):
        memory.write(tokens)
    memory.compress(6)
    with pytest.raises(ValueError, match="12 empty slots are needed, and 6 are left"):
        memory.write(tokens)
    before = log_likelihoods(host, tokens).sum()
    memory.write(tokens, mask=torch.arange(6).expand(2, 6) < 3, eps=1e-3)
    assert memory.free == 0
    assert log_likelihoods(host, tokens).sum() != before


def test_what_compress_refuses():
    with pytest.raises(ValueError, match=r"compress\(\) is for slots relu.* 'blocks.0.ffn' have a gate"):
        attach(GATED)[1].compress(2)
    for memory in (attach(BIASED)[1], Locas.attach(nn.Sequential(Mlp(DIM, WIDTH, act_layer=nn.ReLU6)), rank=4)):
        with pytest.raises(ValueError, match=r"compress\(\) is for slots relu.* another activation"):
            memory.compress(2)
    memory = written("gpt2")
    with pytest.raises(ValueError, match="count=11 needs 22 slots, and there are 20; lower count"):
        memory.compress(11, both_signs=True)
    with pytest.raises(ValueError, match="count=13 is more than the directions of 12 keys"):
        memory.compress(13)
    memory.compress(12)
    slots_of(memory)[1].key_bias.data[0] = 0.1
    with pytest.raises(ValueError, match=r"'transformer.h.1.mlp' have a gate, a bias"):
        memory.compress(2)


@plain_host
def test_writing_leaves_the_host_as_it_was(name):
    host, memory, inputs = attach(name, rank=12)
    before = read(host, inputs)
    flags = [parameter.requires_grad for parameter in host.parameters()]
    likelihood = (lambda y, x: F.pad(y[:, :1], (0, 4))) if name == "vit" else None
    memory.write(inputs, log_likelihood=likelihood)
    assert not torch.allclose(read(host, inputs), before)
    memory.reset()
    assert torch.equal(read(host, inputs), before)
    assert [parameter.requires_grad for parameter in host.parameters()] == flags
    assert not any(module._forward_pre_hooks for module in host.modules())
