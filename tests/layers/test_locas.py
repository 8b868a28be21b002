"""Locas beside the feed-forwards of every kind of host: checks 1 to 8, 11 and 13 of its spec, and the equations."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memzoo.layers import Locas, SwiGLU
from memzoo.layers.side_slots import clipped
from tests.layers.locas_cases import (
    BIASED,
    EXACT,
    GATED,
    RANK,
    attach,
    every_host,
    gradients,
    on_paper,
    recorded,
    sites_of,
    slots_of,
    teach,
    vectors_of,
)
from tests.layers.side_hosts import DEPTH, DIM, HOSTS, make_host, make_inputs, read

modes = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
rows = pytest.mark.parametrize("batch_size", [None, 2], ids=["shared", "each"])
CLONING = ["topk", "topk_contribution", "bottomk", "random_clone"]


@rows
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_host
def test_01_outputs_stay_what_they_were_while_nothing_is_learnt(name, dtype, wrap, batch_size):
    host, inputs = make_host(name, dtype), make_inputs(name, dtype=dtype)
    before = read(host, inputs)
    memory = Locas.attach(host, rank=RANK, batch_size=batch_size, wrap=wrap)
    assert torch.equal(read(host, inputs), before)  # empty
    memory.memorize(inputs)
    assert torch.equal(read(host, inputs), before)
    teach(memory)
    assert not torch.equal(read(host, inputs), before)


@pytest.mark.parametrize("init", [*CLONING, "gaussian", "activation"])
def test_01_so_they_do_with_every_init_that_returns_nothing(init):
    for name in (GATED, BIASED):
        host, memory, inputs = attach(name, torch.float32, init=init)
        before = read(host, inputs)
        memory.memorize(inputs)
        assert memory.free == 0
        assert all(slots.key.any() and not slots.value.any() for slots in memory.slots)
        assert torch.equal(read(host, inputs), before)


@every_host
def test_02_every_site_adds_as_many_parameters_as_its_slots_have(name):
    _, memory, _ = attach(name)
    kind = HOSTS[name]
    vectors, biases = (3, 2 * kind.biased) if kind.gated else (2, int(kind.biased))
    assert memory.num_parameters() == DEPTH * RANK * (vectors * DIM + biases)
    assert memory.num_parameters() == sum(p.numel() for p in memory.parameters() if p.requires_grad)


def test_02_a_model_of_the_papers_size_takes_eleven_million():
    """Qwen3-1.7B: 28 layers of width 2048, 64 slots."""
    with torch.device("meta"):
        host = nn.Sequential(*(SwiGLU(2048, hidden_dim=6144) for _ in range(28)))
        memory = Locas.attach(host, rank=64)
    assert memory.num_parameters() == 11_010_048


@modes
@every_host
def test_03_only_the_memory_learns(name, wrap):
    """Through training, the host's parameters get no gradient and its state_dict stays, to the bit."""
    host = make_host(name)
    stored = {key: tensor.clone() for key, tensor in host.state_dict().items()}
    memory = Locas.attach(host, rank=RANK, wrap=wrap)
    inputs = make_inputs(name)
    memory.memorize(inputs)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        read(host, inputs).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())
        optimizer.step()
    own = {id(parameter) for parameter in memory.parameters()}
    assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in host.parameters())
    now = host.state_dict()
    assert list(now) == list(stored)
    assert all(torch.equal(now[key], stored[key]) for key in stored)


@every_host
def test_04_at_the_first_step_only_values_have_a_gradient(name):
    _, memory, inputs = attach(name)
    memory.memorize(inputs)
    for key, gradient in gradients(memory, inputs).items():
        assert bool(gradient.any()) == key.endswith("value")


@every_host
def test_06_tau_is_the_mean_column_norm_of_the_down_weight_over_the_rank(name):
    _, memory, _ = attach(name, torch.float32)
    for site, slots in zip(sites_of(memory), memory.slots, strict=True):
        columns = [site.down_weight[:, j].norm().item() for j in range(site.width)]
        assert slots.tau.item() == pytest.approx(sum(columns) / len(columns) / RANK, rel=1e-6)
        assert not slots.tau.requires_grad
    assert Locas.attach(make_host(name, torch.float64), rank=RANK, tau=0.1).slots[0].tau.item() == 0.1


def test_07_a_vector_of_length_three_acts_as_its_unit_vector_and_a_short_one_as_itself():
    unit = F.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(clipped(3 * unit), unit)
    assert torch.equal(clipped(0.5 * unit), 0.5 * unit)
    once = clipped(3 * unit.double())
    torch.testing.assert_close(clipped(once), once, rtol=0, atol=1e-15)
    assert torch.equal(clipped(torch.zeros(2, 3)), torch.zeros(2, 3))


@rows
@every_host
def test_07_whichever_vector_of_a_slot_is_long(name, batch_size):
    host, memory, inputs = attach(name, batch_size=batch_size)
    teach(memory, longest=0.9)
    for index in range(len(vectors_of(slots_of(memory)[0]))):
        vectors = vectors_of(slots_of(memory)[0])[index]
        short = vectors.detach().clone()
        logits = []
        for length in (1, 3, 5):
            vectors.data[..., 1, :] = F.normalize(short[..., 1, :], dim=-1) * length
            logits.append(read(host, inputs))
        torch.testing.assert_close(logits[1], logits[0], **EXACT)
        torch.testing.assert_close(logits[2], logits[0], **EXACT)
        vectors.data.copy_(short)
        assert not torch.allclose(read(host, inputs), logits[0])


@every_host
def test_08_what_is_added_is_linear_in_tau_and_in_short_values(name):
    _, memory, inputs = attach(name)
    teach(memory, longest=0.45)
    with recorded(memory, "input") as seen, memory.disabled():
        read(memory.host, inputs)
    for slots, x in zip(slots_of(memory), seen.values(), strict=True):
        nothing = torch.zeros_like(x)
        added = slots(x, nothing)
        slots.tau.mul_(2)
        torch.testing.assert_close(slots(x, nothing), 2 * added, rtol=1e-13, atol=1e-14)
        slots.tau.div_(2)
        short = slots.value.norm(dim=-1) <= 0.5
        slots.value.data.mul_(torch.where(short, 2, 0)[:, None])
        twice = slots(x, nothing)
        slots.value.data.div_(2)
        assert bool(short.any())
        torch.testing.assert_close(twice, 2 * slots(x, nothing), rtol=1e-13, atol=1e-14)


@rows
@modes
@every_host
def test_outputs_and_gradients_are_those_of_the_equations(name, wrap, batch_size):
    host, memory, inputs = attach(name, wrap=wrap, batch_size=batch_size)
    teach(memory)
    logits, slopes = read(host, inputs), gradients(memory, inputs)
    with on_paper(memory):
        expected, expected_slopes = read(host, inputs), gradients(memory, inputs)
    torch.testing.assert_close(logits, expected, **EXACT)
    torch.testing.assert_close(slopes, expected_slopes, **EXACT)
    assert all(slope.any() for slope in slopes.values())
    with on_paper(memory, side=False):
        assert not torch.allclose(read(host, inputs), expected)


@every_host
def test_gradients_by_clones_are_those_of_the_equations(name):
    """Of clones scaled off the kink at length one; their values learn first."""
    _, memory, inputs = attach(name)
    memory.memorize(inputs)
    for slots in memory.slots:
        slots.value.data.normal_(generator=torch.Generator().manual_seed(0))
        slots.key.data.mul_(1.5)
        if slots.gate is not None:
            slots.gate.data.mul_(0.5)
    slopes = gradients(memory, inputs)
    with on_paper(memory):
        torch.testing.assert_close(slopes, gradients(memory, inputs), **EXACT)


@modes
@every_host
def test_11_disabled_or_detached_the_host_is_what_it_was(name, wrap):
    host, inputs = make_host(name), make_inputs(name)
    keys, before = list(host.state_dict()), read(host, inputs)
    hooks = [len(module._forward_hooks) for module in host.modules()]
    memory = Locas.attach(host, rank=RANK, wrap=wrap)
    memory.memorize(inputs)
    teach(memory)
    after = read(host, inputs)
    with memory.disabled():
        assert torch.equal(read(host, inputs), before)
    assert torch.equal(read(host, inputs), after)
    assert not torch.equal(after, before)
    assert list(host.state_dict()) == keys
    memory.enabled = False
    assert torch.equal(read(host, inputs), before)
    memory.enabled = True
    memory.detach()
    assert torch.equal(read(host, inputs), before)
    assert [len(module._forward_hooks) for module in host.modules()] == hooks
    assert list(host.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in host.parameters())
    with pytest.raises(ValueError, match=r"memorize\(\) of a memory that was detached"):
        memory.memorize(inputs)


@modes
@every_host
def test_13_every_row_reads_a_memory_of_its_own(name, wrap):
    host, memory, inputs = attach(name, batch_size=2, wrap=wrap)
    memory.memorize(inputs)
    teach(memory)
    together = read(host, inputs)
    for row in range(2):
        slopes = torch.autograd.grad(together[row].square().sum(), list(memory.parameters()), retain_graph=True)
        assert all(slope[row].any() and not slope[1 - row].any() for slope in slopes)
    memory.detach()
    for row in range(2):
        alone = Locas.attach(host, rank=RANK)
        for slots, own in zip(memory.slots, alone.slots, strict=True):
            own.load_state_dict({key: t[row] if t.dim() else t for key, t in slots.state_dict().items()})
        torch.testing.assert_close(read(host, inputs[row : row + 1])[0], together[row], **EXACT)
        alone.detach()


@every_host
def test_13_every_row_memorizes_itself(name):
    """What a row's memory begins with is what a memory that reads the row alone begins with."""
    _, memory, inputs = attach(name, batch_size=2)
    memory.memorize(inputs)
    for row in range(2):
        _, alone, _ = attach(name)
        alone.memorize(inputs[row : row + 1])
        for slots, own in zip(memory.slots, alone.slots, strict=True):
            assert torch.equal(slots.rows[row], own.rows)
            torch.testing.assert_close(slots.key[row], own.key)


def test_a_batch_of_another_size_is_refused():
    host, memory, inputs = attach(GATED, batch_size=3)
    with pytest.raises(ValueError, match=r"batch of 2 rows.*batch_size=3; attach with batch_size=2"):
        read(host, inputs)
    with pytest.raises(ValueError, match=r"inputs has 2 rows.*batch_size=3; pass as many"):
        memory.memorize(inputs)
    with memory.disabled():
        read(host, inputs)


@rows
@pytest.mark.parametrize("name", [GATED, BIASED])
def test_clip_project_follows_the_same_values_as_projecting_by_hand(name, batch_size):
    """After every step of AdamW, parameters that were projected read as unprojected ones read in the forward pass."""
    host, memory, inputs = attach(name, batch_size=batch_size, clip="project")
    memory.memorize(inputs)
    other = Locas.attach(make_host(name, torch.float64), rank=RANK, batch_size=batch_size)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.5)
    grown = 0.0
    for _ in range(4):
        optimizer.zero_grad()
        read(host, inputs).square().mean().backward()
        optimizer.step()
        other.load_state_dict(memory.state_dict())
        grown = max(grown, *(w.norm(dim=-1).max().item() for slots in memory.slots for w in vectors_of(slots)))
        memory.constrain()
        lengths = torch.cat([w.norm(dim=-1).flatten() for slots in memory.slots for w in vectors_of(slots)])
        assert lengths.max() <= 1 + 1e-12
        torch.testing.assert_close(read(host, inputs), read(other.host, inputs), **EXACT)
    assert grown > 1.5
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    other.constrain()  # does nothing to clip="forward"
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("name", ["ours", "llama", "phi3", "gpt2", "plain"])
def test_training_makes_a_repeated_text_likelier(name):
    host, memory, tokens = attach(name, torch.float32, rank=8)
    memory.memorize(tokens)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0)

    def loss() -> Any:
        return F.cross_entropy(read(host, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    first = loss().item()
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        memory.constrain()
    assert loss().item() < 0.95 * first
    memory.reset()
    assert loss().item() == first


def test_reset_starts_the_same_trajectory_again():
    """Of every init: the same draws, the same clones, the same steps, to the bit."""
    for init in (*CLONING, "gaussian", "activation"):
        host, memory, tokens = attach(GATED, torch.float32, init=init, batch_size=2)
        runs = []
        for _ in range(2):
            memory.memorize(tokens)
            optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05)
            for _ in range(2):
                optimizer.zero_grad()
                read(host, tokens).square().mean().backward()
                optimizer.step()
            runs.append(read(host, tokens))
            memory.reset()
            assert memory.free == RANK
            assert not any(parameter.any() for parameter in memory.parameters())
        assert torch.equal(*runs)


@every_host
def test_hosts_on_paper_compute_what_the_hosts_do(name):
    """What the comparisons with the equations stand on."""
    host, memory, inputs = attach(name)
    before = read(host, inputs)
    with on_paper(memory, side=False):
        torch.testing.assert_close(read(host, inputs), before, **EXACT)
