"""The C++ kernels of the neural memory: what the torch backend and the loop say, on the CPU they were compiled for."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from memzoo.layers import MemoryAsContext
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.ops import cpp_library
from memzoo.layers.ops import neural_memory_fused as fused
from memzoo.layers.ops.neural_memory import neural_memory, neural_memory_scan
from memzoo.layers.ops.neural_memory_tables import chunk_coefficients
from memzoo.layers.reference.neural_memory import neural_memory as loop
from tests.layers.fused_scan_cases import CASES, call, distance, prepare
from tests.layers.neural_memory_cases import assert_close, gradients, make_case, random_cases, without

needs_cpp = pytest.mark.skipif(cpp_library.obstacle() is not None, reason=f"{cpp_library.obstacle()}")

MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what Triton's do not take
    "a matrix": (dict(time=33, heads=1, dim=32, depth=1), dict(keep=("momentum", "anchor"), loss_scale=2.0)),
    "three layers": (
        dict(time=33, heads=2, dim=16, hidden=48, depth=3),
        dict(keep=("momentum", "anchor"), max_gradient_norm=0.3, lengths=[33, 20]),
    ),
    "four layers, no momentum": (
        dict(time=32, heads=1, dim=16, hidden=32, depth=4),
        dict(keep=(), eta=None, activation="gelu", max_gradient_norm=0.5),
    ),
    "a narrow hidden layer": (dict(time=32, heads=1, dim=48, hidden=16), dict(keep=("momentum",))),
    "panels that do not divide": (dict(time=40, heads=1, dim=80, hidden=112), dict(keep=("momentum",))),
    "a norm": (dict(time=40, heads=2, dim=16, hidden=32, with_norm=True), dict(keep=("momentum", "norm"))),
    "a norm of a limited matrix within a chunk": (
        dict(time=41, heads=1, dim=48, depth=1, with_norm=True),
        dict(
            keep=("momentum", "anchor", "base", "norm"),
            position=[3, 16],
            lengths=[30, 41],
            loss_scale=2.0,
            max_gradient_norm=0.3,
            checkpoint_chunks=2,
        ),
    ),
    "a norm of tokens that overflow": (
        dict(time=32, heads=1, dim=16, hidden=16, with_norm=True),
        dict(max_gradient_norm=1.0, keep=("norm",), eta=None, activation="gelu", odd={"v": 1e200}),
    ),
    "a norm of tokens that are no numbers": (
        dict(time=32, heads=1, dim=16, hidden=16, with_norm=True),
        dict(max_gradient_norm=1.0, keep=("momentum", "norm"), odd={"v": float("nan")}),
    ),
    "a norm of a matrix of keys that overflow": (
        dict(time=32, heads=1, dim=16, depth=1, with_norm=True),
        dict(max_gradient_norm=1.0, keep=("momentum", "norm"), odd={"k": 1e300}, scale=1e10),
    ),
    "recomputed chunks": (dict(time=100, heads=1, dim=16, hidden=32), dict(keep=("momentum",), checkpoint_chunks=3)),
    "recomputed chunks within a chunk": (
        dict(time=70, heads=1, dim=16, hidden=32),
        dict(keep=("momentum", "base"), position=7, lengths=[70, 20], checkpoint_chunks=4),
    ),
    "all chunks recomputed": (
        dict(time=50, heads=1, dim=16, hidden=16),
        dict(keep=("momentum", "anchor"), checkpoint_chunks=99),
    ),
}


@needs_cpp
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_values_and_all_gradients_are_those_of_the_torch_backend(name: str) -> None:
    case, options = prepare(*(CASES | MORE)[name])
    found, expected = (call(case, options, backend) for backend in ("cpp", "torch"))
    assert len(found) >= 11
    assert all(distance(x, y) < 1e-12 for x, y in zip(found, expected, strict=True))


@needs_cpp
@random_cases
@given(
    rows=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    chunk=st.sampled_from([16, 48, 80]),
    time=st.integers(1, 100),
    position=st.integers(0, 100),
    has_anchor=st.booleans(),
    dim=st.sampled_from([16, 48, 64]),
    hidden=st.sampled_from([16, 32, 80]),
    depth=st.integers(1, 3),
    read=st.sampled_from(["post", "pre"]),
    with_norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_of_any_size_they_are_the_loop_s(
    rows: tuple[int, int],
    chunk: int,
    time: int,
    position: int,
    has_anchor: bool,
    dim: int,
    hidden: int,
    depth: int,
    read: str,
    with_norm: bool,
    seed: int,
) -> None:
    batch, heads = rows
    sizes = dict(time=time, dim=dim, hidden=hidden, depth=depth, with_norm=with_norm)
    case = make_case(batch=batch, heads=heads, **sizes, seed=seed)
    case = without(case, *(() if has_anchor else ("anchor",)))
    options = dict(chunk_size=chunk, read=read, position=position)
    assert_close(neural_memory(**case, **options, backend="cpp"), loop(**case, **options))


@needs_cpp
@pytest.mark.parametrize("read", ["post", "pre"])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_the_coefficients_are_those_of_torch(read: str, momentum: bool, ragged: bool) -> None:
    torch.manual_seed(0)
    gates = [torch.rand(2, 3, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    real = torch.rand(2, 3, 32) < 0.7 if ragged else None
    theta, eta, alpha = gates
    results = []
    for backend in ("cpp", "torch"):
        found = chunk_coefficients(theta, eta if momentum else None, alpha, real, read, backend)
        draw = torch.Generator().manual_seed(1)
        probes = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in found]
        probes[0] = probes[0].tril(0 if read == "post" else -1)  # above that no gradient comes
        total = sum((t * probe).sum() for t, probe in zip(found, probes, strict=True))
        results.append([*found, *torch.autograd.grad(total, [theta, alpha, *([eta] if momentum else [])])])
    assert_close(*results)


@needs_cpp
def test_an_infinite_error_stops_where_the_activation_is_off() -> None:
    case = without(make_case(time=16, heads=1, dim=16, hidden=32), "base", "anchor")
    case["v"][:, 5] = 1e300
    case["weights"] = tuple(w * 1e10 for w in case["weights"])
    results = []
    for backend in ("cpp", "torch"):
        _, weights, _ = neural_memory(**case, chunk_size=16, activation="relu", backend=backend)
        results.append([weights[0].isfinite(), weights[1].isfinite()])
    assert 0 < results[1][0].sum() < results[1][0].numel()
    assert_close(*results)


@needs_cpp
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("key", [1e308, torch.inf, torch.nan])
def test_a_key_that_overflows_is_dropped_as_by_torch(key: float, activation: str, with_norm: bool) -> None:
    sizes: dict[str, Any] = dict(time=32, heads=1, dim=16, hidden=32, depth=3, with_norm=with_norm)
    keep = ("momentum", "anchor", *(["norm"] if with_norm else []))
    options = dict(max_gradient_norm=1.0, activation=activation, odd={"k": key}, scale=3, keep=keep)
    case, options = prepare(sizes, options)
    found, expected = (call(case, options, backend) for backend in ("cpp", "torch"))
    assert all(x.isfinite().all() for x in expected[:-1])
    assert all(distance(x, y) < 1e-12 for x, y in zip(found[:-1], expected[:-1], strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
def test_a_key_whose_square_overflows_leaves_nothing_in_the_gradients(backend: str, activation: str) -> None:
    case = without(make_case(time=32, heads=1, dim=16, hidden=16), "base", "anchor")
    case["k"][:, [3, 20]] = 1e160
    weights = tuple(w.requires_grad_() for w in case["weights"])
    y, *_ = neural_memory(**case, chunk_size=16, activation=activation, max_gradient_norm=1.0, backend=backend)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(y.square().sum(), weights))


@needs_cpp
@pytest.mark.parametrize("position", [0, 5])
def test_gradients_are_the_loop_s(position: int) -> None:
    case = make_case(time=40, heads=1, dim=16, hidden=32, depth=3)
    options = dict(chunk_size=16, max_gradient_norm=0.5, loss_scale=2.0, position=position)
    found = gradients(lambda **t: neural_memory(**t, backend="cpp"), case, **options)
    assert_close(found, gradients(loop, case, **options))


@needs_cpp
@pytest.mark.parametrize("name", ["everything", "three layers", "a norm of a limited matrix within a chunk"])
def test_in_float32_they_are_as_close_as_torch(name: str) -> None:
    case, options = prepare(*(CASES | MORE)[name])
    exact = call(case, options, "torch")
    rough = {k: tuple(w.float() for w in t) if isinstance(t, tuple) else t.float() for k, t in case.items()}
    found, peer = (
        [distance(x, y) for x, y in zip(call(rough, options, backend), exact, strict=True)]
        for backend in ("cpp", "torch")
    )
    assert all(ours < 1e-5 + 3 * theirs for ours, theirs in zip(found, peer, strict=True))
    assert max(found) < 1e-4


@needs_cpp
@pytest.mark.parametrize("name", ["everything", "rows anywhere in a chunk"])
def test_without_gradients_and_with_other_threads_every_bit_is_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = prepare(*CASES[name])
    own, args = fused.FusedScan.forward, []

    def forward(ctx: Any, *rest: Any) -> Any:
        args.append(rest)
        return own(ctx, *rest)

    monkeypatch.setattr(fused.FusedScan, "forward", staticmethod(forward))
    number = torch.get_num_threads()
    first = call(case, options, "cpp")
    settings, *rest = args[0]
    with torch.no_grad():
        alone = fused.FusedScan.apply(replace(settings, keeps_work=False), *rest)
    kept = fused.FusedScan.apply(settings, *rest)
    assert all(torch.equal(x, y) for x, y in zip(alone, kept, strict=True))
    try:
        torch.set_num_threads(3 - number if number < 3 else 1)
        assert all(torch.equal(x, y) for x, y in zip(first, call(case, options, "cpp"), strict=True))
    finally:
        torch.set_num_threads(number)


@needs_cpp
def test_recomputed_chunks_keep_no_states() -> None:
    case = without(make_case(time=160, heads=1, dim=16, hidden=32), "base", "anchor")
    kept = {}
    for group in (None, 1, 2, 4, 10):
        sizes: list[int] = []
        tokens = {name: case[name].clone().requires_grad_() for name in ("q", "k", "v")}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            neural_memory(**case | tokens, chunk_size=16, checkpoint_chunks=group, backend="cpp")
        kept[group] = sum(sizes)
    blocks = sum(t.numel() for t in (*case["weights"], *case["momentum"]))
    assert [kept[None] - kept[group] for group in (1, 2, 4, 10)] == [n * blocks for n in (0, 5, 7, 9)]


@needs_cpp
@pytest.mark.parametrize("name", ["everything", "a norm of a limited matrix within a chunk"])
def test_nothing_given_is_changed(name: str) -> None:
    case, options = prepare(*(CASES | MORE)[name])
    copies = {k: tuple(w.clone() for w in t) if isinstance(t, tuple) else t.clone() for k, t in case.items()}
    call(case, options, "cpp")
    assert_close(case, copies, 0)


@needs_cpp
def test_the_past_does_not_see_the_future_to_the_bit() -> None:
    case = without(make_case(time=64, heads=2, dim=16, hidden=32), "base", "anchor")
    y, *_ = neural_memory(**case, chunk_size=32, backend="cpp")
    for t in (5, 31, 32, 40):
        other = {
            name: torch.cat([part[:, :t], part[:, t:].flip(1)], 1) if isinstance(part, Tensor) else part
            for name, part in case.items()
        }
        changed, *_ = neural_memory(**other, chunk_size=32, backend="cpp")
        assert torch.equal(changed[:, :t], y[:, :t])
        assert not torch.equal(changed[:, t], y[:, t])


@needs_cpp
@pytest.mark.parametrize(
    "name", ["a norm of a limited matrix within a chunk", pytest.param("three layers", marks=pytest.mark.slow)]
)
def test_a_compiler_takes_each_kernel_as_one_operation(name: str) -> None:
    case, options = prepare(*(CASES | MORE)[name])
    compiled = torch.compile(neural_memory_scan, fullgraph=True, backend="aot_eager")
    found, expected = (call(case, options, "cpp", scan) for scan in (compiled, neural_memory_scan))
    assert all(distance(x, y) < 1e-12 for x, y in zip(found, expected, strict=True))


@needs_cpp
@pytest.mark.parametrize("lengths", [None, [70, 33]])
def test_a_layer_that_streams_is_that_of_torch(lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    layer = NeuralMemory(32, num_heads=2, chunk_size=16, backend="cpp", decay_to_init=True).double()
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    mask = None if lengths is None else torch.arange(70) < torch.tensor(lengths)[:, None]
    pieces, state = [], None
    for part in x.split(21, 1):  # from a border, then from anywhere
        piece = None if mask is None else mask[:, sum(p.shape[1] for p in pieces) :][:, : part.shape[1]]
        y, state = layer(part, state, mask=piece)
        pieces.append(y)
    whole, end = layer(x, mask=mask)
    layer.backend = "torch"
    expected, expected_end = layer(x, mask=mask)
    assert_close((whole, end), (expected, expected_end))
    assert_close((torch.cat(pieces, 1), state), (expected, expected_end))


@needs_cpp
def test_inside_a_checkpoint_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    layer = NeuralMemory(32, num_heads=2, chunk_size=16, backend="cpp", decay_to_init=True)
    x = torch.randn(2, 48, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@needs_cpp
def test_a_second_derivative_is_refused() -> None:
    case = without(make_case(time=16, heads=1, dim=16, hidden=16), "base", "anchor")
    case["q"].requires_grad_()
    y, *_ = neural_memory(**case, chunk_size=16, backend="cpp")
    (first,) = torch.autograd.grad(y.square().sum(), case["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        first.sum().backward()


SIZES: dict[str, Any] = dict(dim=64, num_heads=4, chunk_size=16)


@needs_cpp
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 96}, "head_dim=24; use a multiple of 16"),
        ({"chunk_size": 24}, "chunk_size=24; use a multiple of 16"),
        ({"memory_expansion": 1.5}, "memory_expansion gives a head 24 hidden units; use one with which 16 divides"),
        ({"objective_window": 2}, "objective_window=2; use 1"),
    ],
)
def test_a_memory_that_the_kernels_do_not_take_is_refused_when_it_is_built(options, words) -> None:
    with pytest.raises(ValueError, match=f"^backend='cpp' does not apply: {words}.*, or use backend='auto'$"):
        NeuralMemory(**SIZES | options, backend="cpp")


@needs_cpp
def test_every_hidden_layer_must_fit() -> None:
    case = without(make_case(time=16, heads=1, dim=16, hidden=16, depth=3), "base", "anchor", "momentum")
    first, second, third = case["weights"]
    case["weights"] = first, second.repeat(1, 1, 1, 2)[..., :24], third.repeat(1, 1, 2, 1)[..., :24, :]
    with pytest.raises(ValueError, match="a head 24 hidden units; use one with which 16 divides them"):
        neural_memory(**case, chunk_size=16, backend="cpp")


@needs_cpp
def test_an_empty_batch_is_one() -> None:
    y, state = NeuralMemory(32, num_heads=2, chunk_size=16, backend="cpp")(torch.zeros(0, 80, 32))
    assert y.shape == (0, 80, 32)
    assert state.weights[0].shape[0] == 0


@needs_cpp
def test_values_of_another_width_and_other_devices() -> None:
    case = without(make_case(time=16, heads=1, dim=16, hidden=16, value_dim=32), "base", "anchor")
    with pytest.raises(ValueError, match="v has width 32, q has 16; use equal widths"):
        neural_memory(**case, chunk_size=16, backend="cpp")
    case = without(make_case(time=16, heads=1, dim=16, hidden=16), "base", "anchor")
    with pytest.raises((RuntimeError, NotImplementedError)):
        neural_memory(**case | {"k": case["k"].to("meta")}, chunk_size=16, backend="cpp")
    layer = NeuralMemory(**SIZES, backend="cpp").to("meta")
    y, state = layer(torch.randn(2, 40, 64, device="meta"))
    assert y.shape == (2, 40, 64)
    assert state.weights[0].is_meta

    class OnDevice:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="q is on cuda; move the inputs to the CPU, or use backend='auto'"):
        fused.KERNELS["cpp"].check_place(OnDevice())


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_compiled_for_lesser_processors_they_are_the_same(capability: str, tmp_path: Path) -> None:
    code = (
        "import pytest, sys\n"
        "names = ' or '.join(['values_and_all', 'float32', 'of_any_size'])\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {__file__!r}, '-k', names]))\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(list((tmp_path / "memzoo").glob("neural_memory-*.so"))) == 1


@needs_cpp
@pytest.mark.parametrize("residual", [True, False])
def test_memory_as_context_trains_on_them(residual: bool) -> None:
    torch.manual_seed(0)
    memory = dict(chunk_size=16, backend="cpp", decay_to_init=residual, max_gradient_norm=1.0 if residual else None)
    layer = MemoryAsContext(
        32, num_heads=2, segment_size=64, num_persistent_tokens=3, shared_query=False, residual=residual, memory=memory
    ).double()
    x, probe = (torch.randn(2, 150, 32, dtype=torch.float64) for _ in range(2))
    results = []
    for backend in ("cpp", "torch"):
        layer.memory.backend = layer.memory.conv.backend = layer.retrieval_conv.backend = backend
        y, state = layer(x)
        grads = torch.autograd.grad((y * probe).sum(), list(layer.parameters()), allow_unused=True)
        results.append([y, *tree_leaves(state), *(g for g in grads if g is not None)])
    assert_close(*results)
