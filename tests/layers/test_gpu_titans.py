"""Titans on CUDA: the same numbers as on the CPU, in bfloat16 autocast too, and whole graphs for the compiler.

Every check runs on the CPU as well, so that where there is no GPU it is at least known to be a check that passes.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.arch import CausalLM, create_model
from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.ops.neural_memory_online import neural_memory_online

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ATTENDS = dict(num_persistent_tokens=3, num_heads=2, memory={"chunk_size": 8})
MODELS = {
    "titans_lmm_tiny": dict(num_heads=2, chunk_size=8),
    "titans_linear_online_tiny": dict(num_heads=2, hidden_dim=64),
    "titans_mac_tiny": dict(segment_size=8, **ATTENDS),
    "titans_mag_tiny": dict(window=8, **ATTENDS),
    "titans_mal_tiny": dict(window=8, **ATTENDS),
}


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions on CUDA multiply in TF32 unless told otherwise; matrix products do not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def build(name: str) -> CausalLM:
    torch.manual_seed(0)
    return create_model(name, **dict(vocab_size=32, dim=32, depth=2) | MODELS[name])


def training_step(model: CausalLM, tokens: Tensor, *, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients, on the CPU."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert None not in gradients.values()
    return loss.detach().cpu(), {name: g.cpu() for name, g in gradients.items()}


def distance(x: Tensor, y: Tensor) -> float:
    """Norm of the difference over that of the second."""
    return (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-3), (True, 5e-2)])
def test_a_training_step_equals_that_of_the_cpu_in_float32(name, device, autocast, tolerance):
    model, tokens = build(name), torch.randint(32, (2, 41))
    loss, gradients = training_step(copy.deepcopy(model), tokens, autocast=False)
    own_loss, own = training_step(model.to(device), tokens.to(device), autocast=autocast)
    assert own_loss.isfinite()
    assert abs(own_loss - loss) <= tolerance * loss
    for parameter, gradient in own.items():
        assert gradient.isfinite().all(), parameter
    whole, expected = (torch.cat([g.flatten() for g in each.values()]) for each in (own, gradients))
    assert distance(whole, expected) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_equals_reading_at_once(name, device):
    model, tokens = build(name).to(device).eval(), torch.randint(32, (2, 24), device=device)
    expected, _ = model(tokens)
    logits, state = model.prefill(tokens[:, :13])
    steps = [logits]
    for token in tokens[:, 13:].unbind(1):
        logits, state = model.step(token, state, donate=True)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 12:], rtol=1e-3, atol=1e-4)


def memory_inputs(depth: int, device: str) -> list[Tensor]:
    """Return q, k, v, gates and weights of one chunk."""
    torch.manual_seed(0)
    q, k, v = (F.normalize(torch.randn(2, 64, 2, 64), dim=-1) for _ in range(3))
    gates = [torch.rand(2, 64, 2) * 0.1 for _ in range(3)]
    weights = [torch.randn(2, 2, 64, 64) / 8 for _ in range(2 * depth)]  # the memory's, then the momentum's
    return [t.to(device).requires_grad_() for t in (q, k, v, *gates, *weights)]


# On the CPU `make test` compiles the layer (tests/contract/test_layers.py) and the op of single tokens
# (test_neural_memory_online.py).
COMPILED = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]


@pytest.mark.parametrize("device", COMPILED)
@pytest.mark.parametrize(("op", "depth"), [(neural_memory, 2), (neural_memory_online, 1)])
def test_the_chunk_step_compiles_as_one_graph(op, depth, device):
    def step(*t: Tensor) -> list[Tensor]:
        y, weights, momentum = op(*t[:6], t[6 : 6 + depth], t[6 + depth :], chunk_size=64)
        return [y, *weights, *momentum]

    leaves = memory_inputs(depth, device)
    grads = [torch.randn_like(t) for t in step(*leaves)]
    # fullgraph refuses any graph break; without a compiler of C++ code on the CPU its graphs are run as they are
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for function in (step, compiled):
        out = function(*leaves)
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_flash_linear_attention_s_gated_delta_rule_is_the_online_memory():
    pytest.importorskip("fla", reason="fla-core is not installed; pip install 'memzoo[cuda]'")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, theta, _, alpha = (t.detach() for t in memory_inputs(1, "cuda")[:6])
    q, k, v = (t.bfloat16() for t in (q, k, v))
    zeros = (torch.zeros(2, 2, 64, 64, device="cuda"),)
    expected, _, _ = neural_memory_online(q.float(), k.float(), v.float(), theta, None, alpha, zeros)
    kept = 1 - alpha
    own_v = (kept[..., None] * v).bfloat16()
    y, _ = chunk_gated_delta_rule(q, k, own_v, kept.log(), theta / kept, scale=1.0)
    assert distance(y.float(), expected) <= 2e-2
