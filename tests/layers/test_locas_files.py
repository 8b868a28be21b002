"""Locas on disk (check 12 of its spec), on other devices and in other dtypes, copied, compiled, checkpointed."""

import copy
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch import Block, CausalLM
from memzoo.layers import Attention, FeedForward, Locas, SwiGLU, layer_entry
from memzoo.layers.locas_init import fingerprint
from tests.layers.locas_cases import BIASED, EXACT, GATED, RANK, attach, every_host, gradients, slots_of, teach
from tests.layers.side_hosts import DIM, VOCAB_SIZE, WIDTH, make_host, make_inputs, read

modes = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
each = pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])

LOAD = """
import sys

import torch
from safetensors.torch import load_file, save_file

from memzoo.layers import Locas
from tests.layers.side_hosts import make_host, make_inputs, read

torch.set_num_threads(1)
folder, *names = sys.argv[1:]
logits = {}
for name in names:
    host = make_host(name)
    host.load_state_dict(load_file(f"{folder}/{name}.host"), strict=False)
    memory = Locas.attach(host, rank=4, batch_size=2)
    memory.load(f"{folder}/{name}.memory")
    logits[name] = read(host, make_inputs(name)).detach()
save_file(logits, f"{folder}/logits")
"""


def taught(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Locas, Tensor]:
    host, memory, inputs = attach(name, dtype, **options)
    memory.memorize(inputs)
    teach(memory)
    return host, memory, inputs


@pytest.mark.slow  # a process that imports transformers and timm
def test_12_a_new_process_reads_the_same_to_the_bit(tmp_path):
    expected = {}
    for name in (GATED, "gpt2", "vit"):
        host, memory, inputs = taught(name, batch_size=2)
        for parameter in host.parameters():
            parameter.mul_(1.1)  # so that the host is not what the other process makes by itself
        save_model(host, str(tmp_path / f"{name}.host"))
        memory.save(tmp_path / f"{name}.memory")
        expected[name] = read(host, inputs)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}  # for the hosts of these tests
    arguments = [sys.executable, "-c", LOAD, str(tmp_path), *expected]
    done = subprocess.run(arguments, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits")
    assert all(torch.equal(found[name], logits) for name, logits in expected.items())


@each
@every_host
def test_12_loaded_it_is_what_was_saved(name, batch_size, tmp_path):
    """Parameters, factors and which rows were taken, so that it goes on from there; nothing else is in the folder."""
    host, memory, inputs = taught(name, batch_size=batch_size)
    memory.expand(2)
    memory.save(tmp_path / "memory.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]
    other = Locas.attach(make_host(name), rank=RANK + 2, batch_size=batch_size, tau=float(slots_of(memory)[0].tau))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tau was that of a lower rank: tested below
        other.load(tmp_path / "memory.safetensors")
    state, loaded = memory.state_dict(), other.state_dict()
    assert list(state) == list(loaded)
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert other.free == 2
    assert torch.equal(read(other.host, inputs), read(host, inputs))
    memory.memorize(inputs)
    other.memorize(inputs)
    assert all(torch.equal(a, b) for a, b in zip(memory.parameters(), other.parameters(), strict=True))


def test_12_what_is_saved_while_merged_fits_a_host_without_it(tmp_path):
    host, memory, inputs = taught(GATED)
    beside = read(host, inputs)
    memory.merge()
    memory.save(tmp_path / "memory.safetensors")
    other = Locas.attach(make_host(GATED), rank=RANK)
    other.load(tmp_path / "memory.safetensors")
    assert torch.equal(read(other.host, inputs), beside)


def test_12_parameters_of_a_bf16_host_are_kept_in_full(tmp_path):
    _, memory, _ = taught(GATED, torch.bfloat16)
    memory.save(tmp_path / "memory.safetensors")
    with safe_open(tmp_path / "memory.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": RANK + 1}, f"rank={RANK}, this one has {RANK + 1}"),
        ({"batch_size": 2}, r"batch_size=None, this one has 2"),
        ({"clip": "project"}, r"clip='forward', this one has 'project'"),
        ({"sites": ["blocks.1.ffn"]}, r"sites=\['blocks.0.ffn', 'blocks.1.ffn'\], this one has \['blocks.1.ffn'\]"),
    ],
)
def test_12_a_file_of_other_options_is_refused(options, message, tmp_path):
    _, memory, _ = taught(GATED)
    memory.save(tmp_path / "memory.safetensors")
    other = Locas.attach(make_host(GATED), **{"rank": RANK} | options)
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path / "memory.safetensors")
    assert not any(parameter.any() for parameter in other.parameters())


@pytest.mark.parametrize(
    ("dim", "width", "gated"), [(DIM + 4, WIDTH, True), (DIM, WIDTH + 1, True), (DIM, WIDTH, False)]
)
def test_12_a_file_of_a_host_of_other_sizes_is_refused(dim, width, gated, tmp_path):
    _, memory, _ = taught(GATED)
    memory.save(tmp_path / "memory.safetensors")
    ffn = SwiGLU if gated else FeedForward
    blocks = [Block(Attention(dim, num_heads=2), ffn(dim, hidden_dim=width)) for _ in range(2)]
    other = Locas.attach(CausalLM(VOCAB_SIZE, dim, blocks), rank=RANK)
    with pytest.raises(ValueError, match=r"is of a memory with (sizes|gated)="):
        other.load(tmp_path / "memory.safetensors")
    assert not any(parameter.any() for parameter in other.parameters())


def test_12_a_file_of_a_host_of_another_activation_is_refused(tmp_path):
    def host(activation: Any) -> nn.Module:
        return nn.Sequential(Mlp(DIM, WIDTH, act_layer=activation)).eval()

    Locas.attach(host(nn.ReLU), rank=RANK).save(tmp_path / "memory.safetensors")
    for activation in (nn.GELU, nn.ReLU6, partial(nn.GELU, approximate="tanh")):
        with pytest.raises(ValueError, match="is of a memory with activation="):
            Locas.attach(host(activation), rank=RANK).load(tmp_path / "memory.safetensors")
    assert fingerprint(nn.GELU()) == fingerprint(F.gelu) != fingerprint(nn.GELU(approximate="tanh"))
    assert fingerprint(nn.PReLU(init=0.5).bfloat16()) == fingerprint(nn.LeakyReLU(0.5))


def test_12_what_is_no_file_of_a_memory_is_refused(tmp_path):
    _, memory, _ = attach(GATED)
    path = tmp_path / "memory.safetensors"
    with pytest.raises(ValueError, match=r"is no file that save\(\) wrote"):
        memory.load(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"is no file that save\(\) wrote"):
        memory.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds a None, not a Locas"):
        memory.load(path)
    layer_entry("temp_lora").build(make_host(GATED), rank=2).save(path)
    with pytest.raises(ValueError, match="holds a TempLoRA, not a Locas"):
        memory.load(path)


def test_12_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    _, memory, _ = taught(GATED)
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    with safe_open(path, framework="pt") as file:
        said, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert json.loads(said["options"])["rank"] == RANK
    del tensors["slots.1.gate"]
    save_file(tensors, path, metadata=said)
    with pytest.raises(ValueError, match=r"'slots.1.gate' of shape None, this memory has"):
        memory.load(path)


def test_12_tau_of_another_host_warns_and_is_kept(tmp_path):
    _, memory, _ = taught(GATED)
    memory.save(tmp_path / "memory.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Locas.attach(make_host(GATED), rank=RANK).load(tmp_path / "memory.safetensors")
    other = make_host(GATED)
    other.blocks[1].ffn.down.weight.data.mul_(2)
    loaded = Locas.attach(other, rank=RANK)
    with pytest.warns(UserWarning, match=r"tau=.* of the file is not that of this host.*'blocks.1.ffn'") as caught:
        loaded.load(tmp_path / "memory.safetensors")
    assert len(caught) == 1
    assert Path(caught[0].filename).name == Path(__file__).name
    assert torch.equal(slots_of(loaded)[1].tau, slots_of(memory)[1].tau)


@modes
def test_a_copy_of_both_is_independent(wrap):
    for name in (GATED, BIASED):
        host, memory, inputs = taught(name, wrap=wrap)
        before = read(host, inputs)
        host2, memory2 = copy.deepcopy((host, memory))
        assert memory2.host is host2
        assert torch.equal(read(host2, inputs), before)
        memory2.reset()
        memory2.memorize(inputs)
        assert torch.equal(read(host, inputs), before)
        with memory.disabled():
            assert torch.equal(read(host2, inputs), read(host, inputs))
        teach(memory2, seed=9)
        beside = read(host2, inputs)
        memory2.merge()
        torch.testing.assert_close(read(host2, inputs), beside, rtol=1e-4, atol=1e-4)
        assert torch.equal(read(host, inputs), before)
        memory2.unmerge()
        memory2.detach()
        assert torch.equal(read(host, inputs), before)
        assert memory.is_attached


def test_a_copy_of_a_merged_host_can_be_unmerged():
    host, memory, inputs = taught("phi3")
    with memory.disabled():
        alone = read(host, inputs)
    memory.merge()
    host2, memory2 = copy.deepcopy((host, memory))
    memory2.unmerge()
    memory2.detach()
    assert torch.equal(read(host2, inputs), alone)
    assert memory.is_merged


def test_a_copy_of_a_merged_host_has_a_configuration_of_its_own():
    host, memory, _ = taught("phi3")
    memory.merge()
    host2, memory2 = copy.deepcopy((host, memory))
    memory2.unmerge()
    assert (host2.config.intermediate_size, host.config.intermediate_size) == (WIDTH, WIDTH + RANK)


def test_offloaded_it_is_disabled_and_comes_back():
    host, memory, inputs = taught(GATED)
    with memory.disabled():
        alone = read(host, inputs)
    beside = read(host, inputs)
    memory.offload("meta")  # the numbers are lost there, which shows that they were moved
    assert not memory.enabled
    assert {tensor.device.type for tensor in memory.state_dict().values()} == {"meta"}
    assert {parameter.device.type for parameter in host.parameters()} == {"cpu"}
    assert torch.equal(read(host, inputs), alone)
    host, memory, inputs = taught(GATED)
    memory.offload()
    assert torch.equal(read(host, inputs), alone)
    memory.onload()
    assert memory.enabled
    assert torch.equal(read(host, inputs), beside)


@each
@every_host
def test_a_bf16_host_has_a_memory_in_fp32_that_learns(name, batch_size):
    """Steps too small for bfloat16 are not lost, and the outputs stay in the host's dtype."""
    host, memory, inputs = attach(name, torch.bfloat16, batch_size=batch_size)
    memory.memorize(inputs)
    teach(memory)
    assert {parameter.dtype for parameter in memory.parameters()} == {torch.float32}
    logits = read(host, inputs)
    assert logits.dtype == torch.bfloat16
    optimizer = torch.optim.Adam(memory.parameters(), lr=1e-5)
    before = [parameter.detach().clone() for parameter in memory.parameters()]
    logits.float().square().mean().backward()
    optimizer.step()
    for parameter, old in zip(memory.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    exact = make_host(name, torch.bfloat16).double()
    for parameter in exact.parameters():
        parameter.requires_grad_(False)
    other = Locas.attach(exact, rank=RANK, batch_size=batch_size)
    other.load_state_dict(memory.state_dict())
    expected = read(exact, inputs.double() if inputs.is_floating_point() else inputs)
    error = (logits.double() - expected).norm() / expected.norm()
    assert error < 0.05


@pytest.mark.parametrize("name", [GATED, "plain", "llama", "gpt2", "vit", "vit_glu"])
@each
def test_autocast_runs_the_memory_as_the_host(name, batch_size):
    host, memory, inputs = taught(name, batch_size=batch_size)
    expected = read(host, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = read(host, inputs)
        with memory.disabled():
            alone = read(host, inputs)
    assert logits.dtype == alone.dtype == torch.bfloat16
    error, size = (logits.float() - expected).norm(), (alone.float() - expected).norm()
    assert error < 0.05 * expected.norm()
    assert error < 0.5 * size
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() and p.dtype == torch.float32 for p in memory.parameters())
    memory.reset()
    with torch.autocast("cpu", torch.bfloat16):
        memory.memorize(inputs)
        assert torch.equal(read(host, inputs), alone)


@each
@modes
@pytest.mark.parametrize("ffn", [SwiGLU, FeedForward])
def test_blocks_that_are_computed_again_have_the_same_gradients(ffn, wrap, batch_size):
    found = []
    for again in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [Block(Attention(DIM, num_heads=2), ffn(DIM, hidden_dim=WIDTH)) for _ in range(2)]
            host = CausalLM(VOCAB_SIZE, DIM, blocks, checkpoint_blocks=again).double().train()
        tokens = make_inputs(GATED)
        memory = Locas.attach(host, rank=RANK, wrap=wrap, batch_size=batch_size)
        memory.memorize(tokens)
        teach(memory)
        found.append((read(host, tokens).detach(), gradients(memory, tokens)))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize(("name", "batch_size"), [(GATED, 2), pytest.param("gpt2", None, marks=pytest.mark.slow)])
def test_compiled_in_one_graph_it_is_what_it_is_eagerly(name, batch_size):
    """Wrapped; switching it off, training it and taking it away are seen by the compiled host."""
    torch.compiler.reset()
    host, inputs = make_host(name, torch.float64), make_inputs(name, dtype=torch.float64)
    alone = read(host, inputs)
    compiled: Any = torch.compile(host, fullgraph=True, backend="eager")
    memory = Locas.attach(host, rank=RANK, wrap=True, batch_size=batch_size)
    memory.memorize(inputs)
    teach(memory)
    beside = read(host, inputs)
    torch.testing.assert_close(read(compiled, inputs), beside, **EXACT)
    expected = gradients(memory, inputs)
    logits = read(compiled, inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    slopes = torch.autograd.grad((logits * weights).sum(), list(memory.parameters()))
    torch.testing.assert_close(dict(zip(expected, slopes, strict=True)), expected, **EXACT)
    memory.enabled = False
    torch.testing.assert_close(read(compiled, inputs), alone, **EXACT)
    memory.enabled = True
    teach(memory, seed=8)
    torch.testing.assert_close(read(compiled, inputs), read(host, inputs), **EXACT)
    memory.detach()
    torch.testing.assert_close(read(compiled, inputs), alone, **EXACT)


def test_the_registry_builds_it():
    host = make_host(GATED)
    memory = layer_entry("locas").build(host, rank=3)
    assert isinstance(memory, Locas)
    assert memory.host is host
    assert memory.free == 3


def test_a_training_loop_in_plain_pytorch():
    """A host in train mode with dropout: the memory learns there too, and dropout stays the host's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(Attention(DIM, num_heads=2, dropout=0.1), SwiGLU(DIM, hidden_dim=WIDTH)) for _ in range(2)]
        host: nn.Module = CausalLM(VOCAB_SIZE, DIM, blocks).train()
        tokens, memory = make_inputs(GATED), Locas.attach(host, rank=8)
        memory.memorize(tokens)
        assert host.training
        optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0)
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(read(host, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert min(losses[-2:]) < losses[0]
