"""Locas on hosts that are called otherwise: experts, beams, pieces of a text, other threads, autocast."""

import threading
from typing import Any
from weakref import ref as weakref

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import Locas, SwiGLU
from tests.layers.locas_cases import BIASED, EXACT, GATED, RANK, attach, gradients, slots_of, teach
from tests.layers.side_hosts import DIM, WIDTH, make_host, make_inputs, moe, read

each = pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])
INITS = ["topk", "topk_contribution", "bottomk", "random_clone", "gaussian", "activation"]


# Experts


@pytest.mark.parametrize("init", INITS)
def test_a_shared_expert_has_a_memory(init, tmp_path):
    """It reads (batch * time, dim)."""
    (host, sites), tokens = moe(), make_inputs("llama")
    before = read(host, tokens)
    memory = Locas.attach(host, sites=sites, rank=RANK, init=init)
    mask = torch.ones_like(tokens)
    mask[:, 4:] = 0
    memory.memorize(tokens, mask=mask)
    assert memory.free == 0
    assert torch.equal(read(host, tokens), before)
    padded = Locas.attach(moe()[0], sites=sites, rank=RANK, init=init)
    padded.memorize(tokens.where(mask.bool(), 9), mask=mask)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(slots_of(memory), slots_of(padded), strict=True))
    torch.testing.assert_close(dict(memory.named_parameters()), dict(padded.named_parameters()))
    teach(memory)
    after = read(host, tokens)
    assert not torch.allclose(after, before)
    assert all(slope.any() for slope in gradients(memory, tokens).values())
    memory.save(tmp_path / "memory.safetensors")
    other = Locas.attach(moe()[0], sites=sites, rank=RANK)
    other.load(tmp_path / "memory.safetensors")
    assert torch.equal(read(other.host, tokens), after)


def test_rows_of_a_shared_expert_cannot_be_told_apart():
    (host, sites), tokens = moe(), make_inputs("llama")
    memory = Locas.attach(host, sites=sites, rank=RANK, batch_size=2)
    for call in (lambda: memory.memorize(tokens), lambda: host(tokens), lambda: host(tokens[:, :1])):
        with pytest.raises(ValueError, match=r"\(tokens, dim\), in which rows .* attach with batch_size=None"):
            call()
    assert memory.free == RANK


# Rows of the batch


def test_rows_says_which_memory_a_row_reads():
    for name in (GATED, BIASED):
        host, memory, inputs = attach(name, batch_size=3)
        inputs = inputs[[0, 1, 0]]
        memory.memorize(inputs)
        teach(memory)
        own = read(host, inputs)
        index = torch.tensor([2, 0, 0, 1])
        with memory.rows(index):
            found = read(host, inputs[index])
            with memory.rows(torch.tensor([1])):
                torch.testing.assert_close(read(host, inputs[1:2]), own[1:2], **EXACT)
            slopes = torch.autograd.grad(found[0].square().sum(), list(memory.parameters()))
            with pytest.raises(ValueError, match=r"batch of 3 rows inside rows\(\) of 4; pass as many"):
                read(host, inputs)
        torch.testing.assert_close(found, own[index], **EXACT)
        assert all(slope[2].any() and not slope[:2].any() for slope in slopes)
        assert torch.equal(read(host, inputs), own)
        with pytest.raises(ValueError, match=r"batch_size=3; .*with memory.rows\(torch.arange\(3\).repeat_interleave"):
            read(host, inputs[index])


def test_rows_are_those_of_the_thread():
    host, memory, inputs = attach(GATED, batch_size=2)
    teach(memory)
    own, found = read(host, inputs), []
    with memory.rows(torch.tensor([1, 0])):
        thread = threading.Thread(target=lambda: found.append(read(host, inputs)))
        thread.start()
        thread.join()
        assert not torch.allclose(read(host, inputs), own)
    assert torch.equal(found[0], own)


def test_what_rows_refuses():
    _, memory, _ = attach(GATED, batch_size=2)
    for index in (torch.tensor([0, 2]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match=r"index=.* pass \(batch,\) int64 from 0, below batch_size=2"):
            memory.rows(index).__enter__()
    with pytest.raises(ValueError, match="batch_size=None; call the host without it"):
        attach(GATED)[1].rows(torch.tensor([0])).__enter__()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beams_read_the_memory_of_their_prompt(name):
    host, memory, tokens = attach(name, batch_size=2)
    memory.memorize(tokens)
    teach(memory)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    with pytest.raises(ValueError, match=r"with memory.rows\(torch.arange\(2\).repeat_interleave\(copies\)\)"):
        host.generate(tokens, **options)
    with memory.rows(torch.arange(2).repeat_interleave(2)):
        beams = host.generate(tokens, **options)
    memory.detach()
    plain = host.generate(tokens, **options)
    for row in range(2):
        alone = Locas.attach(host, rank=RANK)
        for slots, own in zip(memory.slots, alone.slots, strict=True):
            own.load_state_dict({key: t[row] if t.dim() else t for key, t in slots.state_dict().items()})
        assert torch.equal(host.generate(tokens[row : row + 1], **options), beams[2 * row : 2 * row + 2])
        alone.detach()
    assert not torch.equal(beams, plain)


# Memorizing


@each
@pytest.mark.parametrize("init", ["topk", "activation"])
def test_pieces_of_a_text_all_count(init, batch_size):
    x = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = nn.Sequential(SwiGLU(DIM, hidden_dim=WIDTH), SwiGLU(DIM, hidden_dim=WIDTH))
    memory = Locas.attach(host, rank=RANK, init=init, batch_size=batch_size)
    found = []
    for run in (host, lambda x: (host(x[:, :2]), host(x[:, 2:])), lambda x: host(x[:, 2:])):
        memory.reset()
        memory.memorize(x, run=run)
        found.append([slots.key.detach().clone() for slots in memory.slots])
    if init == "topk" or batch_size:  # without rows of their own, pieces are in another order
        torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[1][0], found[2][0])
    memory.reset()
    mask = torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6\), for 8 tokens .*in pieces none"):
        memory.memorize(x, mask=mask, run=lambda x: (host(x[:, :4]), host(x[:, 4:])))
    assert memory.free == RANK


@pytest.mark.parametrize("init", ["topk", "activation"])
def test_calls_of_other_threads_do_not_count(init):
    host, memory, tokens = attach(GATED, init=init)

    def busy(tokens: Tensor) -> Any:
        thread = threading.Thread(target=lambda: read(host, make_inputs(GATED, batch=5, time=9)))
        thread.start()
        thread.join()
        return host(tokens)

    memory.memorize(tokens, run=busy)
    first = [parameter.clone() for parameter in memory.parameters()]
    memory.reset()
    memory.memorize(tokens)
    assert all(torch.equal(*pair) for pair in zip(first, memory.parameters(), strict=True))


def test_of_what_the_host_computes_only_sums_are_kept():
    """At the last layer, nothing as large as what the first has computed is alive for it."""
    host = nn.Sequential(*(SwiGLU(DIM, hidden_dim=WIDTH) for _ in range(3)))
    alive: list[Any] = []
    for layer in host:
        layer.down.register_forward_pre_hook(lambda module, inputs: alive.append(weakref(inputs[0])))
    memory = Locas.attach(host, rank=RANK)
    kept: list[bool] = []
    host[2].register_forward_hook(lambda *_: kept.extend(reference() is not None for reference in alive[:2]))
    memory.memorize(torch.randn(2, 6, DIM))
    assert kept == [False, False]


def test_a_default_device_changes_nothing():
    for init in ("topk", "random_clone", "gaussian"):
        found = []
        for device in ("cpu", "meta"):
            host, inputs = make_host(GATED), make_inputs(GATED)
            with torch.device(device):
                memory = Locas.attach(host, rank=RANK, init=init, tau=0.1)
                memory.memorize(inputs)
            found.append([tensor.detach() for tensor in memory.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Precision


@each
def test_a_wide_output_is_added_to_as_it_is_under_autocast(batch_size):
    class Wide(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    host, x = nn.Sequential(Wide(DIM, hidden_dim=WIDTH)), torch.randn(2, 3, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        before = host(x)
        memory = Locas.attach(host, rank=RANK, batch_size=batch_size)
        memory.memorize(x)
        assert before.dtype == torch.float32
        assert torch.equal(host(x), before)
        teach(memory)
        assert not torch.allclose(host(x), before)
