"""Parity with independent implementations of the same recurrence (the `peers` extra; skipped where it is absent)."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers.ops.neural_memory import neural_memory

MAX_THETA = 0.25


@pytest.fixture(scope="module")
def titans_pytorch() -> ModuleType:
    return pytest.importorskip("titans_pytorch", reason="needs titans-pytorch==0.5.5: pip install 'memzoo[peers]'")


def build_peer(
    peer: ModuleType, *, depth: int, heads: int = 1, chunk_size: int | None = 4, momentum: bool = True
) -> nn.Module:
    """A titans-pytorch memory with gates a token, whose gradient base moves every ``chunk_size`` tokens (None: never).

    With a loss summed over features instead of averaged, and L2 norms in place of RMS norms, it is the paper's
    recurrence with loss scale 2, GELU and reading after the write. Its defaults are another model.
    """
    dim, head_dim = 6, 4 if heads > 1 else 6
    memory = peer.NeuralMemory(
        dim,
        heads=heads,
        dim_head=head_dim,
        chunk_size=1,
        batch_size=chunk_size,
        model=peer.MemoryMLP(head_dim, depth=depth, expansion_factor=2.0),
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        qk_rmsnorm=True,
        momentum=momentum,
        activation=nn.SiLU(),
        default_step_transform_max_lr=MAX_THETA,
        store_memory_loss_fn=lambda prediction, target: (prediction - target).pow(2).sum(-1),
    ).double()
    for norm in (memory.q_norm, memory.k_norm):
        nn.init.constant_(norm.gamma, head_dim**-0.5 - 1)
    nn.init.constant_(memory.to_decay_factor[0].bias, -3.0)  # a memory that lasts longer than two tokens
    for layer in memory.memory_model_parameters:  # heads begin as copies of one another
        nn.init.normal_(layer, std=layer.shape[-2] ** -0.5)
    return memory


def run_ours(memory: nn.Module, x: Tensor, chunk_size: int) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Our op between the peer's projections and its output layer, from the peer's initial memory."""
    q = memory.q_norm(memory.split_heads(memory.to_queries(x)))
    k = memory.k_norm(memory.split_heads(memory.to_keys(x)))
    v = memory.split_heads(memory.to_values(x))
    y, weights, momentum = neural_memory(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        MAX_THETA * memory.to_adaptive_step[0](x).sigmoid(),
        memory.to_momentum[0](x).sigmoid() if memory.to_momentum else None,
        memory.to_decay_factor[0](x).sigmoid(),
        tuple(layer.expand(len(x), *layer.shape) for layer in memory.memory_model_parameters),
        chunk_size=chunk_size,
        activation="gelu",
        loss_scale=2.0,
    )
    if memory.retrieve_gate:
        y = y * memory.retrieve_gate(x).transpose(1, 2)
    return memory.combine_heads(y.flatten(2)), weights, momentum


def assert_parity(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_16_titans_pytorch_computes_the_same(titans_pytorch, depth, heads, chunk_size):
    torch.manual_seed(0)
    memory = build_peer(titans_pytorch, depth=depth, heads=heads, chunk_size=chunk_size)
    x = torch.randn(2, 10, 6, dtype=torch.float64, requires_grad=True)
    expected, state = memory(x)
    y, weights, momentum = run_ours(memory, x, chunk_size or 10)
    assert_parity(y, expected)
    peer_weights, peer_momentum = (list(part.values()) for part in state.states)
    assert_parity([w.flatten(0, 1) for w in weights], peer_weights)
    assert_parity([s.flatten(0, 1) for s in momentum], [s.squeeze(0) for s in peer_momentum])

    probe = torch.randn_like(y)
    leaves = [x, *(p for name, p in memory.named_parameters() if not name.startswith("memory_model."))]
    assert_parity(torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, leaves, probe))


def test_16_titans_pytorch_computes_the_same_without_momentum(titans_pytorch):
    torch.manual_seed(0)
    memory = build_peer(titans_pytorch, depth=2, momentum=False)
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    assert_parity(run_ours(memory, x, 4)[0], memory(x)[0])


# titans-unofficial, a token at a time: a second and unrelated oracle.


@pytest.fixture(scope="module")
def titans_unofficial() -> ModuleType:
    """Its import name is ``titans``, which another package has too."""
    try:
        installed = version("titans-unofficial")
    except PackageNotFoundError:
        pytest.skip("needs titans-unofficial==2.0.0: pip install 'memzoo[peers]'")
    assert installed == "2.0.0"
    return importlib.import_module("titans.utils.memory")


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("momentum", "forgetting"), [(True, True), (False, True), (True, False)])
def test_16_online_memory_equals_titans_unofficial(
    titans_unofficial: ModuleType, depth: int, momentum: bool, forgetting: bool
) -> None:
    torch.manual_seed(depth)
    peer = titans_unofficial.NeuralMemoryModule(
        5, memory_depth=depth, memory_dim=4, use_momentum=momentum, use_weight_decay=forgetting, max_grad_norm=None
    ).double()
    for layer in peer.memory_layers:
        nn.init.zeros_(layer.bias)  # our memory has none
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    (parameters, surprise), rows = peer.init_state(2), []
    for t in range(9):
        rows.append(peer.retrieve(x[:, t : t + 1], (parameters, surprise)))
        parameters, surprise = peer._update_step(x[:, t], (parameters, surprise))
        for tensors in (parameters, surprise):
            tensors[1::2] = [torch.zeros_like(bias) for bias in tensors[1::2]]
    theirs = torch.cat(rows, 1)

    def gate(project: nn.Linear, shift: float = 0.0) -> Tensor:
        return torch.sigmoid(project(x) - shift)

    q, k = (nn.functional.normalize(project(x), dim=-1)[:, :, None] for project in (peer.W_Q, peer.W_K))
    alpha = gate(peer.alpha_proj, titans_unofficial.FORGET_GATE_SHIFT)
    y, weights, _ = neural_memory(
        q,
        k,
        peer.W_V(x)[:, :, None],
        gate(peer.theta_proj),
        gate(peer.eta_proj) if momentum else None,
        alpha if forgetting else torch.zeros_like(alpha),
        tuple(layer.weight.T.expand(2, 1, 4, 4) for layer in peer.memory_layers),
        chunk_size=1,
        activation="relu",
        loss_scale=2.0,
        read="pre",
    )
    torch.testing.assert_close(y[:, :, 0], theirs, rtol=1e-10, atol=1e-10)
    for ours, weight in zip(weights, parameters[::2], strict=True):
        torch.testing.assert_close(ours[:, 0], weight.mT, rtol=1e-10, atol=1e-10)
    leaves = [x, *(p for name, p in peer.named_parameters() if "bias" not in name)]
    probe = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, leaves, probe, allow_unused=True)
    actual = torch.autograd.grad(y[:, :, 0], leaves, probe, allow_unused=True)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
