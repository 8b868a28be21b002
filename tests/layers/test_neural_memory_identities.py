"""What the neural memory becomes at special gates, keys and depths, numbered as in its specification."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers.ops.neural_memory import neural_memory, neural_memory_scan
from memzoo.layers.ops.neural_memory_tables import gate_tables
from memzoo.layers.reference import neural_memory as reference
from tests.layers.neural_memory_cases import (
    Case,
    assert_close,
    assert_same_bits,
    gradients,
    make_case,
    take,
    without,
)

# 6-8. Gates at their extremes.


def test_06_without_steps_the_memory_only_fades():
    case = without(make_case(), "momentum", "base", "anchor") | {"theta": torch.zeros(2, 11, 2, dtype=torch.float64)}
    y, weights, momentum = neural_memory(**case, chunk_size=4)
    left = (1 - case["alpha"]).cumprod(1)
    assert_close(weights, tuple(left[:, -1, :, None, None] * w for w in case["weights"]))
    assert not any(s.any() for s in momentum)
    first, second = (left[..., None, None] * w[:, None] for w in case["weights"])
    assert_close(y, (F.silu(case["q"][..., None, :] @ first) @ second).squeeze(-2))


def test_06_without_steps_and_forgetting_it_is_a_fixed_mlp():
    zero = torch.zeros(2, 11, 2, dtype=torch.float64)
    case = without(make_case(), "momentum", "base", "anchor") | {"theta": zero, "alpha": zero}
    y, weights, _ = neural_memory(**case, chunk_size=4)
    assert_same_bits(weights, case["weights"])
    first, second = (w[:, None] for w in case["weights"])
    assert_close(y, (F.silu(case["q"][..., None, :] @ first) @ second).squeeze(-2), 1e-15)  # sums in another order


def test_07_full_forgetting_leaves_only_the_surprise():
    case = without(make_case(), "anchor")
    case["alpha"][:, -1] = 1
    _, weights, momentum = neural_memory(**case, chunk_size=4)
    assert_close(weights, momentum)


def test_07_full_forgetting_without_past_surprise_keeps_the_last_token_alone():
    case, other = make_case(time=5), make_case(time=5, seed=1)
    for gate, value in (("alpha", 1), ("eta", 0)):
        case[gate][:, -1] = value
    expected = reference.neural_memory_scan(**take(case, times=slice(4, 5)), chunk_size=8, position=7)[1]
    for name in ("q", "k", "v", "theta", "eta", "alpha"):
        other[name][:, -1] = case[name][:, -1]
    other |= {"base": case["base"], "anchor": case["anchor"]}
    assert_close(neural_memory(**case, chunk_size=8, position=3)[1], expected)
    assert_close(neural_memory(**other, chunk_size=8, position=3)[1], expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_07_gates_of_exactly_zero_and_one_make_no_nan(eta, alpha):
    case = make_case(time=5)
    case["eta"].fill_(eta)
    case["alpha"].fill_(alpha)
    for f in (lambda f: f(**case, chunk_size=3), lambda f: gradients(f, case, chunk_size=3)):
        assert_close(f(neural_memory_scan), f(reference.neural_memory_scan))


def test_08_momentum_gate_of_zero_equals_no_momentum():
    case = make_case()
    y, weights, _, base = neural_memory_scan(**case | {"eta": torch.zeros_like(case["eta"])}, chunk_size=4)
    plain = neural_memory_scan(**case | {"eta": None, "momentum": None}, chunk_size=4)
    assert plain[2] == ()
    assert_close((y, weights, base), (plain[0], plain[1], plain[3]))


def delta_rule(case: Case, decay: Tensor, beta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet: W = a (W - b k^T k W) + b k^T v, y = q W."""
    q, k = case["q"], case["k"]
    W, y = case["weights"][0], []
    for t in range(q.shape[1]):
        a, b = decay[:, t, :, None, None], beta[:, t, :, None, None]
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        W = a * (W - b * key @ (key.mT @ W)) + b * key @ value
        y.append((q[:, t, :, None, :] @ W).squeeze(-2))
    return torch.stack(y, 1), W


def test_08_without_momentum_and_forgetting_it_is_deltanet():
    case = without(make_case(depth=1), "base", "anchor", "momentum") | {"eta": None}
    case["alpha"] = torch.zeros_like(case["alpha"])
    y, (weights,), _ = neural_memory(**case, chunk_size=1)
    assert_close((y, weights), delta_rule(case, 1 - case["alpha"], case["theta"], case["v"]))


def test_08_a_full_step_on_a_unit_key_overwrites():
    case = without(make_case(depth=1), "base", "anchor", "momentum") | {"eta": None}
    case |= {"alpha": torch.zeros_like(case["alpha"]), "theta": torch.ones_like(case["theta"]), "q": case["k"]}
    assert_close(neural_memory(**case, chunk_size=1)[0], case["v"], 1e-14)


def test_09_without_momentum_it_is_gated_deltanet_after_a_change_of_gates():
    case = without(make_case(depth=1), "base", "anchor", "momentum") | {"eta": None}
    decay = 1 - case["alpha"]
    y, (weights,), _ = neural_memory(**case, chunk_size=1)
    assert_close((y, weights), delta_rule(case, decay, case["theta"] / decay, decay[..., None] * case["v"]))


# 10-13. Linear memories.


def brute_force_write_table(theta: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """G_{t,i}: what of token i's gradient the memory holds after token t, summed over every path. Gates (time,)."""
    time = len(theta)
    G = torch.zeros(time, time, dtype=theta.dtype)
    for t in range(time):
        for i in range(t + 1):
            for k in range(i, t + 1):  # carried as surprise up to token k, as memory from there
                G[t, i] += (1 - alpha[k + 1 : t + 1]).prod() * eta[i + 1 : k + 1].prod() * theta[i]
    return G


def test_10_with_a_frozen_empty_base_it_is_decayed_linear_attention():
    case = without(make_case(depth=1, time=9), "base", "anchor", "momentum")
    case["weights"] = (torch.zeros(2, 2, 3, 3, dtype=torch.float64),)
    y, _, _ = neural_memory(**case, chunk_size=9)
    for row in range(2):
        for head in range(2):
            q, k, v, *gates = (case[name][row, :, head] for name in ("q", "k", "v", "theta", "eta", "alpha"))
            assert_close(y[row, :, head], ((q @ k.T) * brute_force_write_table(*gates)) @ v)


def test_10_with_constant_gates_it_is_causal_linear_attention():
    case = without(make_case(depth=1, heads=1), "base", "anchor", "momentum")
    case["weights"] = (torch.zeros(2, 1, 3, 3, dtype=torch.float64),)
    case |= {name: torch.full_like(case[name], value) for name, value in (("theta", 1), ("eta", 0), ("alpha", 0))}
    q, k, v = (case[name].squeeze(2) for name in ("q", "k", "v"))
    assert_close(neural_memory(**case, chunk_size=16)[0].squeeze(2), (q @ k.mT).tril() @ v)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_11_orthonormal_keys_are_recalled_exactly_whatever_the_chunk(chunk_size):
    case = without(make_case(batch=1, heads=1, dim=5, time=5, depth=1), "base", "anchor", "momentum")
    keys = torch.linalg.qr(case["weights"][0][0, 0]).Q
    values = case["v"][0, :, 0]
    case |= {"k": keys[None, :, None], "q": keys[None, :, None], "eta": None}
    case |= {"theta": torch.ones_like(case["theta"]), "alpha": torch.zeros_like(case["alpha"])}
    y, (weights,), _ = neural_memory(**case, chunk_size=chunk_size)
    assert_close(y[0, :, 0], values)
    assert_close(keys @ weights[0, 0], values)


@pytest.mark.parametrize("exact_gates", [False, True])
def test_12_gate_tables_equal_their_closed_forms(exact_gates):
    theta, eta, alpha = (make_case(batch=1, heads=1, time=6)[name][0, :, 0] for name in ("theta", "eta", "alpha"))
    if exact_gates:
        eta[2], alpha[4] = 0, 1
    tables = gate_tables(theta, eta, alpha)
    G, f, beta = tables.write, tables.carry_momentum, tables.carry_weights
    m = torch.cat([torch.ones(1, dtype=torch.float64), eta.cumprod(0)])
    assert_close(G[0], torch.zeros_like(G[0]))
    assert_close(G[1:], brute_force_write_table(theta, eta, alpha))
    assert_close(G[1:].diagonal(), theta)
    assert_close(beta, torch.cat([torch.ones(1, dtype=torch.float64), (1 - alpha).cumprod(0)]))
    expected = [sum((1 - alpha[k:t]).prod() * m[k] for k in range(1, t + 1)) for t in range(7)]
    assert_close(f, torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in expected]))
    assert_close(tables.momentum_carry, m[-1])
    assert_close(tables.momentum_write, torch.stack([eta[i + 1 :].prod() * theta[i] for i in range(6)]))
    if not exact_gates:  # the ratios of the closed form exist
        decays, momenta = (beta[1:, None] / beta[1:]).tril(), (m[1:, None] / m[1:]).tril()
        assert_close(G[1:], (decays @ momenta) * theta)


def test_12_tables_skip_tokens_that_do_not_exist():
    theta, eta, alpha = (make_case(time=6)[name].transpose(1, 2) for name in ("theta", "eta", "alpha"))
    real = (torch.arange(6) < 4).expand_as(theta)
    tables, short = gate_tables(theta, eta, alpha, real), gate_tables(theta[..., :4], eta[..., :4], alpha[..., :4])
    assert_close(tables.write[..., :5, :4], short.write)
    assert not tables.write[..., 4:].any()
    assert not tables.momentum_write[..., 4:].any()
    assert_close(tables.momentum_write[..., :4], short.momentum_write)
    assert_close(tables.momentum_carry, short.momentum_carry)
    for row in (5, 6):
        assert_same_bits(tables.write[..., row, :], tables.write[..., 4, :])
        assert_same_bits(tables.carry_momentum[..., row], tables.carry_momentum[..., 4])
        assert_same_bits(tables.carry_weights[..., row], tables.carry_weights[..., 4])


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 10, 17])
def test_12_tables_and_their_gradients_are_those_of_the_recurrence(size, skips):
    gates = make_case(batch=2, heads=2, time=size)
    leaves = [gates[name].transpose(1, 2).clone().requires_grad_() for name in ("theta", "eta", "alpha")]
    real = (torch.arange(size) % 3 != 1).expand_as(leaves[0]) if skips else None
    tables = gate_tables(*leaves, real)
    ours = (tables.write, tables.carry_momentum, tables.carry_weights, tables.momentum_write, tables.momentum_carry)
    theirs = tables_by_steps(*leaves, torch.ones_like(leaves[0], dtype=torch.bool) if real is None else real)
    assert_close(ours, theirs)
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(0)) for t in ours]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(given, weights, strict=True)), leaves, allow_unused=True)
        for given in (ours, theirs)
    ]
    for mine, loop in zip(*grads, strict=True):
        assert_close(mine, torch.zeros_like(mine) if loop is None else loop)


def tables_by_steps(theta, eta, alpha, real):
    """The tables by the recurrence of every token: columns of the tokens, of S_0 and of W_0."""
    size = theta.shape[-1]
    unit = torch.eye(size + 2, dtype=theta.dtype).expand(*theta.shape[:-1], -1, -1)
    momentum, weights = unit[..., size, :], unit[..., size + 1, :]
    rows = [weights]
    for t in range(size):
        moved = eta[..., t, None] * momentum + theta[..., t, None] * unit[..., t, :]
        here = real[..., t, None]
        momentum = torch.where(here, moved, momentum)
        weights = torch.where(here, (1 - alpha[..., t, None]) * weights + momentum, weights)
        rows.append(weights)
    table = torch.stack(rows, -2)
    return table[..., :size], table[..., size], table[..., size + 1], momentum[..., :size], momentum[..., size]


def test_12_gates_of_tokens_that_do_not_exist_may_be_anything():
    leaves = [make_case(time=6)[name].transpose(1, 2).clone() for name in ("theta", "eta", "alpha")]
    real = (torch.arange(6) < 4).expand_as(leaves[0])
    expected = gate_tables(*leaves, real)
    for leaf in leaves:
        leaf[..., 4:] = torch.nan
    assert_same_bits(gate_tables(*leaves, real).write, expected.write)


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.0), (0.5, 0.1), (0.8, 0.3)])
@pytest.mark.parametrize(("factor", "diverges"), [(0.99, False), (1.01, True)])
def test_13_a_repeated_key_is_stable_up_to_the_bound_on_theta(eta, alpha, factor, diverges):
    case = without(make_case(batch=1, heads=1, dim=2, time=800, depth=1), "base", "anchor", "momentum")
    case |= {name: case[name][:, :1].expand(case[name].shape) for name in ("q", "k", "v")}
    gates = {"theta": factor * (2 - alpha) * (1 + eta), "eta": eta, "alpha": alpha}
    case |= {name: torch.full_like(case[name], value) for name, value in gates.items()}
    y, _, _ = neural_memory(**case | {"q": case["k"]}, chunk_size=1)
    error = (y - case["v"]).norm(dim=-1).flatten()
    assert bool(error[-1] > 1e3 * error[0]) == diverges
    assert diverges or error.max() < 10 * case["v"].norm()


# 14-15. What must not matter.


def test_14_doubling_the_loss_equals_doubling_the_step():
    case = make_case()
    doubled = neural_memory(**case | {"theta": 2 * case["theta"]}, chunk_size=4)
    assert_close(neural_memory(**case, chunk_size=4, loss_scale=2.0), doubled)


def test_14_permuting_heads_permutes_outputs():
    case, order = make_case(heads=3), torch.tensor([2, 0, 1])
    y, weights, _ = neural_memory(**case, chunk_size=4)
    moved_y, moved_weights, _ = neural_memory(**take(case, heads=order), chunk_size=4)
    assert_close((moved_y, moved_weights), (y[:, :, order], tuple(w[:, order] for w in weights)))


def test_14_heads_are_separate_memories():
    case = make_case(heads=3)
    y, _, _ = neural_memory(**case, chunk_size=4)
    alone = [neural_memory(**take(case, heads=[head]), chunk_size=4)[0] for head in range(3)]
    assert_close(y, torch.cat(alone, 2))


def test_14_rows_do_not_see_each_other():
    case, other = make_case(), make_case(seed=1)
    mixed = tree_map(lambda a, b: torch.stack([a[0], b[1]]), case, other)
    before, after = (neural_memory_scan(**c, chunk_size=4) for c in (case, mixed))
    assert_same_bits(tree_map(lambda x: x[0], after), tree_map(lambda x: x[0], before))


@pytest.mark.parametrize("depth", [2, 3])
def test_15_a_deep_memory_of_zeros_stays_dead(depth):
    case = without(make_case(depth=depth), "base", "anchor", "momentum")
    case["weights"] = tuple(map(torch.zeros_like, case["weights"]))
    assert not any(x.any() for x in tree_leaves(neural_memory(**case, chunk_size=4)))
