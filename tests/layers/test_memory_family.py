"""The rules of related papers, against loops that know nothing of the neural memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import NeuralMemory, delta_memory, longhorn, omega_memory, ttt_linear, ttt_mlp
from tests.layers.neural_memory_cases import assert_close


def seen(layer: NeuralMemory, x: Tensor) -> list[Tensor]:
    """What the rule works on, of one row: q, k, v, theta, each (heads, time, ...)."""
    projected, _ = layer.conv(layer.query_key_value(x))
    q, k, v = projected.unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
    q, k = (F.normalize(z, dim=-1) for z in (q, k))
    theta = layer.max_learning_rate * layer.gates(x)[..., : layer.num_gates].sigmoid()
    return [z[0].transpose(0, 1) for z in (q, k, v, theta.unflatten(-1, (layer.num_heads, -1)))]


def told(layer: NeuralMemory, heads: list[Tensor], x: Tensor) -> Tensor:
    return layer.output(torch.stack(heads, 1)[None], x)


def build(make: object, **options: object) -> tuple[NeuralMemory, Tensor]:
    torch.manual_seed(0)
    layer = make(8, num_heads=2, **options).double()
    for w in layer.initial_weights:
        w.data += 0.3 * torch.randn_like(w)
    return layer, torch.randn(1, 11, 8, dtype=torch.float64)


@pytest.mark.parametrize("make", [ttt_linear, ttt_mlp])
def test_ttt_takes_mini_batch_gradient_steps_behind_a_residual_norm(make: object) -> None:
    layer, x = build(make, chunk_size=4)
    torch.nn.init.normal_(layer.norm_gain)
    torch.nn.init.normal_(layer.norm_bias)
    heads = []
    for h, (q, k, v, theta) in enumerate(zip(*seen(layer, x), strict=True)):
        gain, bias = layer.norm_gain[h], layer.norm_bias[h]

        def f(weights: list[Tensor], z: Tensor, gain: Tensor = gain, bias: Tensor = bias) -> Tensor:
            inner = z @ weights[0]
            for w in weights[1:]:
                inner = F.gelu(inner) @ w
            return z + F.layer_norm(inner, inner.shape[-1:], gain, bias, eps=1e-6)

        weights, rows = [w[h] for w in layer.initial_weights], []
        for t in range(len(q)):
            if t % 4 == 0:
                base = [w.detach().requires_grad_() for w in weights]
            loss = (f(base, k[t]) - v[t]).square().sum() / 2
            gradients = torch.autograd.grad(loss, base)
            weights = [w - theta[t] * g for w, g in zip(weights, gradients, strict=True)]
            rows.append(f(weights, q[t]))
        heads.append(torch.stack(rows))
    assert_close(layer(x)[0], told(layer, heads, x))


def test_delta_memory_replaces_a_share_of_what_the_key_recalls() -> None:
    layer, x = build(delta_memory)
    heads = []
    for h, (q, k, v, theta) in enumerate(zip(*seen(layer, x), strict=True)):
        w, rows = layer.initial_weights[0][h], []
        for t in range(len(q)):
            w = w - theta[t] * torch.outer(k[t], k[t] @ w - v[t])
            rows.append(q[t] @ w)
        heads.append(torch.stack(rows))
    assert_close(layer(x)[0], told(layer, heads, x))


def test_longhorn_solves_every_channel_s_loss() -> None:
    layer, x = build(longhorn)
    assert layer.gate_groups == 4
    heads = []
    for h, (q, k, v, theta) in enumerate(zip(*seen(layer, x), strict=True)):
        w, rows = layer.initial_weights[0][h], []
        for t in range(len(q)):
            # Of every column: argmin |u - w|^2 + theta (k u - v)^2.
            columns = [
                torch.linalg.solve(
                    torch.eye(4, dtype=w.dtype) + theta[t, c] * torch.outer(k[t], k[t]),
                    w[:, c] + theta[t, c] * v[t, c] * k[t],
                )
                for c in range(4)
            ]
            w = torch.stack(columns, 1)
            rows.append(q[t] @ w)
        heads.append(torch.stack(rows))
    assert_close(layer(x)[0], told(layer, heads, x))


@pytest.mark.parametrize("window", [2, 3, 16])
def test_omega_memory_descends_the_objective_of_its_window(window: int) -> None:
    layer, x = build(omega_memory, chunk_size=4, objective_window=window, activation="gelu")
    gates = dict(zip(layer.gate_names, layer.gates(x)[0].sigmoid().split(layer.num_heads, -1), strict=True))
    assert list(gates) == ["theta", "alpha", "gamma"]
    heads = []
    for h, (q, k, v, theta) in enumerate(zip(*seen(layer, x), strict=True)):
        alpha, gamma = gates["alpha"][:, h], gates["gamma"][:, h]
        (first, second), rows = (w[h] for w in layer.initial_weights), []
        for t in range(len(q)):
            if t % 4 == 0:
                base = [w.detach().requires_grad_() for w in (first, second)]
            tokens = slice(max(0, t - window + 1), t + 1)
            errors = F.gelu(k[tokens] @ base[0]) @ base[1] - v[tokens]
            objective = (gamma[tokens] * errors.square().sum(-1)).sum() / 2
            d_first, d_second = torch.autograd.grad(objective, base)
            first = (1 - alpha[t]) * first - theta[t] * d_first
            second = (1 - alpha[t]) * second - theta[t] * d_second
            rows.append(F.gelu(q[t] @ first) @ second)
        heads.append(torch.stack(rows))
    assert_close(layer(x)[0], told(layer, heads, x))


def test_omega_memory_starts_with_steps_as_long_as_those_on_one_loss() -> None:
    layer = omega_memory(8, num_heads=2)
    gamma = layer.gates.bias.split(2)[layer.gate_names.index("gamma")].sigmoid()
    torch.testing.assert_close(gamma, torch.full((2,), 1 / 16))
