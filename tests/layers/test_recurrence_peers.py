"""Parity of the recurrences with independent implementations (the `peers` extra; skipped where it is absent).

23: float32 against the plain PyTorch references of flash-linear-attention and the PyTorch fallbacks of transformers;
outputs, final states and all gradients. Arguments go by name, for their order differs from function to function.
"""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layers.recurrence_cases import RULES, Op, cast, make_case, run, without


def load_fla(rule: str, function: str) -> Callable[..., Any]:
    """A reference of fla, found by path: fla itself cannot be imported without Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs fla-core==0.6.0: pip install 'memzoo[peers]'")
    path = Path(found.submodule_search_locations[0], "ops", rule, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def load_transformers(model: str, function: str) -> Callable[..., Any]:
    """A fallback of transformers, from below the wrapper that calls fla's kernels instead where fla is installed."""
    name = f"transformers.models.{model}.modeling_{model}"
    module = pytest.importorskip(name, reason="needs transformers: pip install 'memzoo[peers]'")
    return inspect.unwrap(getattr(module, function))


def assert_parity(name: str, peer: Op, *, group: int = 1, time: int = 128, continued: bool = True) -> None:
    """Compare a rule with a peer that has its signature; one that is not ``continued`` knows no states."""
    case = cast(make_case(RULES[name], time=time, group=group, key_dim=16, value_dim=12), torch.float32)
    ours = RULES[name].op
    if not continued:
        case = without(case, "state")
        ours, peer = only_outputs(ours), only_outputs(peer)
    assert_equal(run(ours, case), run(peer, case))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert (actual[name] - value).norm() <= 1e-5 * value.norm(), name


def only_outputs(function: Op) -> Op:
    return lambda *args, **options: (function(*args, **options)[0], torch.zeros(()))


def head_first(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Call a function of (batch, heads, time, ...) with what is time first."""
    result = function(*(x.transpose(1, 2) for x in inputs), **options)
    y, state = result if isinstance(result, tuple) else (result, None)
    return y.transpose(1, 2), state


# flash-linear-attention


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_23_gated_deltanet_equals_fla(form):
    naive = load_fla("gated_delta_rule", f"naive_{form}_gated_delta_rule")

    def peer(q, k, v, state, beta, log_decay):
        return naive(q=q, k=k, v=v, beta=beta, g=log_decay, initial_state=state, output_final_state=True)

    assert_parity("gated_deltanet", peer, time=100)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_23_kda_with_grouped_value_heads_equals_fla(form):
    naive = load_fla("kda", f"naive_{form}_kda")

    def peer(q, k, v, state, beta, log_decay):
        return naive(q=q, k=k, v=v, beta=beta, g=log_decay, initial_state=state, output_final_state=True)

    assert_parity("kda", peer, group=2)


def test_23_deltanet_equals_fla_token_by_token():
    naive = load_fla("delta_rule", "delta_rule_recurrence")
    assert_parity("deltanet", lambda q, k, v, state, beta: head_first(naive, q, k, v, beta, initial_state=state))


def test_23_deltanet_equals_fla_in_chunks():
    naive = load_fla("delta_rule", "delta_rule_chunkwise")
    assert_parity("deltanet", lambda q, k, v, beta: head_first(naive, q, k, v, beta), continued=False)


def test_23_gla_equals_fla():
    naive = load_fla("gla", "naive_recurrent_gla")

    def peer(q, k, v, state, log_decay):
        return naive(q=q, k=k, v=v, gk=log_decay, initial_state=state, output_final_state=True)

    assert_parity("gla", peer)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_23_ssd_equals_simple_gla_of_fla(form):
    naive = load_fla("simple_gla", f"naive_{form}_simple_gla")

    def peer(q, k, v, state, log_decay):
        return naive(q=q, k=k, v=v, g=log_decay, initial_state=state, output_final_state=True)

    assert_parity("ssd", peer, time=100)


def test_23_ssd_equals_simple_gla_of_fla_in_parallel():
    naive = load_fla("simple_gla", "naive_parallel_simple_gla")
    assert_parity("ssd", lambda q, k, v, log_decay: naive(q=q, k=k, v=v, g=log_decay), continued=False)


def test_23_linear_attention_equals_fla_token_by_token():
    naive = load_fla("linear_attn", "naive_recurrent_linear_attn")

    def peer(q, k, v, state):
        return naive(q=q, k=k, v=v, initial_state=state, output_final_state=True, normalize=False)

    assert_parity("linear_attention", peer)


def test_23_linear_attention_equals_fla_in_chunks():
    naive = load_fla("linear_attn", "naive_chunk_linear_attn")
    assert_parity("linear_attention", lambda q, k, v: (naive(q=q, k=k, v=v, normalize=False),), continued=False)


def test_23_retention_equals_fla():
    naive = load_fla("retention", "naive_retention")
    case = cast(without(make_case(RULES["linear_attention"], time=128, heads=4), "state"), torch.float32)
    log_decay = torch.log1p(-(2.0 ** -torch.arange(5.0, 9.0))).expand(2, 128, 4)
    actual = run(lambda **inputs: only_outputs(RULES["ssd"].op)(**inputs, log_decay=log_decay), case)
    assert_equal(actual, run(lambda q, k, v: only_outputs(head_first)(naive, q, k, v), case))


# transformers


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_23_gated_deltanet_with_grouped_value_heads_equals_qwen3_next(form):
    fallback = load_transformers("qwen3_next", f"torch_{form}_gated_delta_rule")

    def peer(q, k, v, state, beta, log_decay):
        return fallback(q, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True)

    assert_parity("gated_deltanet", peer, group=2, time=100)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_23_kda_equals_kimi_linear(form):
    fallback = load_transformers("kimi_linear", f"{form}_kimi_delta_attention")

    def peer(q, k, v, state, beta, log_decay):
        return fallback(q, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True)

    assert_parity("kda", peer, time=100)
