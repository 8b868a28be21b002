"""The Triton kernels of the neural memory, without a GPU.

Triton's interpreter runs them with numpy and gives the numbers of the torch backend, in float64; its compiler makes
code for GPUs that are not here and says what of their shared memory it takes. What only a GPU shows, races and speed
among it, is in the tests marked ``gpu``.
"""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.ops import backend as libraries
from memzoo.layers.ops import neural_memory_fused as fused
from memzoo.layers.ops import neural_memory_triton as backend
from memzoo.layers.ops.neural_memory import neural_memory, neural_memory_scan
from tests.interpreted_triton import run_interpreted
from tests.layers.fused_scan_cases import CASES, call, distance, prepare
from tests.layers.neural_memory_cases import make_case

BRIEF = ("everything", "rows anywhere in a chunk")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton, which torch brings on Linux")


def distances(name: str) -> list[float]:
    """Largest differences between the backends, and without gradients; for the process of the interpreter."""
    backend.check_place = lambda q: None  # no device, and float64
    backend.precision = lambda: "ieee"
    case, options = prepare(*CASES[name])
    found, expected = (call(case, options, name) for name in ("triton", "torch"))
    apart = [distance(x, y) for x, y in zip(found, expected, strict=True)]
    own, args = fused.FusedScan.forward, []

    def forward(ctx: Any, settings: Any, *rest: Any) -> Any:
        args.append((settings, *rest))
        return own(ctx, settings, *rest)

    fused.FusedScan.forward = staticmethod(forward)
    call(case, options, "triton")
    kept = fused.FusedScan.apply(*args[0])
    with torch.no_grad():
        alone = fused.FusedScan.apply(replace(args[0][0], keeps_work=False), *args[0][1:])
    return [*apart, *(distance(x, y) for x, y in zip(alone, kept, strict=True))]


def distances_compiled(name: str) -> list[float]:
    """The same between one compiled graph and what is not compiled; for the process of the interpreter."""
    backend.check_place = lambda q: None
    backend.precision = lambda: "ieee"
    case, options = prepare(*CASES[name])
    compiled = torch.compile(neural_memory_scan, fullgraph=True, backend="aot_eager")
    found, expected = (call(case, options, "triton", scan) for scan in (compiled, neural_memory_scan))
    return [distance(x, y) for x, y in zip(found, expected, strict=True)]


@needs_triton
@pytest.mark.parametrize(
    "name", [name if name in BRIEF else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_interpreted_kernels_equal_the_torch_backend_in_values_and_all_gradients(name: str) -> None:
    found = run_interpreted(__name__, "distances", name)
    assert len(found) >= 15
    assert all(apart < 1e-10 for apart in found)  # not NaN either


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "plain"])
def test_a_compiler_takes_each_kernel_as_one_operation(name: str) -> None:
    found = run_interpreted(__name__, "distances_compiled", name)
    assert all(apart < 1e-12 for apart in found)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "capability", "shared_memory"),
    [("tf32", 80, 163 * 1024), ("tf32", 90, 227 * 1024), ("tf32x3", 90, 227 * 1024)],
)
@pytest.mark.parametrize(
    ("module", "kernel"), [("neural_memory", "scan_forward"), ("neural_memory_backward", "scan_backward")]
)
def test_kernels_of_the_largest_head_compile_and_fit(
    module: str, kernel: str, precision: str, capability: int, shared_memory: int
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = dict(C=max(backend.SIZES), D=max(backend.SIZES), H=128, B=backend.part_of(128))
    parts = dict(HAS_MOMENTUM=True, HAS_BASE=True, HAS_ANCHOR=True, HAS_LIMIT=True)
    options = parts | dict(ACTIVATION="silu", PRECISION=precision)
    numbers = {
        "limit": "fp32",
        "num_chunks": "i32",
        "num_rows": "i32",
        "state_stride": "i32",
        "loss_scale": "fp32",
        "last": "*i32",
    }
    function = getattr(import_module(f"memzoo.layers.ops.kernels.{module}"), kernel)
    signature = {p.name: "constexpr" if p.is_constexpr else numbers.get(p.name, "*fp32") for p in function.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(function, signature, sizes | options, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=8, num_stages=1))
    assert compiled.metadata.shared <= shared_memory
    assert "cubin" in compiled.asm


SIZES = dict(dim=256, num_heads=4, chunk_size=64)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is here, whether it is or not."""
    monkeypatch.setattr(libraries, "is_installed", lambda library: True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_depth": 3}, "memory_depth=3; use 2"),
        ({"memory_depth": 1, "chunk_size": 1}, "memory_depth=1; use 2"),
        ({"residual_norm": True}, "residual_norm=True; use False"),
        ({"checkpoint_chunks": 4}, "checkpoint_chunks=4, .*; use None"),
        ({"objective_window": 2}, "objective_window=2; use 1"),
        ({"num_heads": 2}, "head_dim=128; use one of 16, 32, 64"),
        ({"chunk_size": 100}, "chunk_size=100; use one of 16, 32, 64"),
        (
            {"memory_expansion": 1.125},
            "memory_expansion gives a head 72 hidden units; use one with which 16",
        ),
    ],
)
def test_a_memory_that_the_kernels_do_not_take_is_refused_when_it_is_built(options, words) -> None:
    with pytest.raises(ValueError, match=f"^backend='triton' does not apply: {words}.*, or use backend='auto'$"):
        NeuralMemory(**SIZES | options, backend="triton")


@pytest.mark.usefixtures("installed")
def test_without_triton_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = NeuralMemory(**SIZES, backend="triton")
    with pytest.raises(ValueError, match=r"q is on cpu; move the inputs to CUDA, or use backend='auto'"):
        layer(torch.randn(1, 64, 256))
    with pytest.raises(ValueError, match=r"q is on cpu"):
        layer.double()(torch.randn(1, 64, 256, dtype=torch.float64))
    monkeypatch.setattr(libraries, "is_installed", lambda library: False)
    with pytest.raises(ValueError, match="backend='triton' needs the package triton, which is not installed"):
        NeuralMemory(**SIZES, backend="triton")


def test_it_is_taken_where_it_is_asked_for_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights = torch.empty(2, 64, 4, 64), (torch.empty(2, 4, 64, 128), torch.empty(2, 4, 128, 64))
    options: dict[str, Any] = dict(chunk_size=64, residual_norm=False, window=1, gamma=None, checkpoint_chunks=None)
    with pytest.raises(ValueError, match="q is on cpu"):
        fused.choose_fused("triton", (rows, rows, rows), weights, **options)
    monkeypatch.setattr(backend, "check_place", lambda q: None)

    def chosen(name: str, width: int = 64, **others: Any) -> str:
        return fused.choose_fused(name, (rows, rows, rows[..., :width]), weights, **options | others)

    assert chosen("triton") == "triton"
    assert chosen("auto") == "torch"
    assert chosen("torch") == "torch"
    with pytest.raises(ValueError, match="v has width 32, q has 64; use equal widths"):
        chosen("triton", width=32)
    with pytest.raises(ValueError, match="residual_norm=True; use False"):
        chosen("triton", residual_norm=True)
    with pytest.raises(ValueError, match="window=3; use 1"):
        chosen("triton", window=3)
    with pytest.raises(ValueError, match="gamma is given; use None"):
        chosen("triton", gamma=torch.ones(2, 64, 4))


@pytest.mark.parametrize(
    ("time", "chunk_size", "expected"),
    [(1, 64, (16, 16, 1)), (17, 64, (32, 32, 17)), (40, 64, (64, 48, 40)), (500, 64, (64, 64, 64))],
)
def test_short_calls_fill_the_smallest_chunk_that_the_kernels_have(time, chunk_size, expected) -> None:
    assert tuple(fused.chunk_width(name, time, chunk_size) for name in ("triton", "cpp", "torch")) == expected


def test_another_dtype_is_refused() -> None:
    class OnDevice:
        device, dtype = torch.device("cuda"), torch.float64

    with pytest.raises(ValueError, match=r"the memory computes in torch\.float64; use float32 or less"):
        backend.check_place(OnDevice())


def test_products_are_as_exact_as_torch_s_own_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.precision() == "tf32x3"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert backend.precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    setting = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert backend.precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    assert backend.precision() == "tf32x3"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend.precision() == "ieee"


@pytest.mark.usefixtures("installed")
def test_on_the_meta_device_shapes_are_torch_s() -> None:
    with torch.device("meta"):
        layer = NeuralMemory(**SIZES, backend="triton")
        y, state = layer(torch.randn(2, 130, 256))
    assert y.shape == (2, 130, 256)
    assert state.weights[0].is_meta


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 1e-4), ("high", 2e-2)])
@pytest.mark.parametrize("lengths", [None, [1000, 300]])
@pytest.mark.parametrize("position", [0, 37, [5, 640]])
def test_on_a_gpu_the_kernels_equal_the_torch_backend(
    precision: str, tolerance: float, lengths: list[int] | None, position: int | list[int]
) -> None:
    case = make_case(batch=2, time=1000, heads=4, dim=64, hidden=128)
    case = {
        name: tuple(w.float().cuda() for w in t) if isinstance(t, tuple) else t.float().cuda()
        for name, t in case.items()
    }
    case["theta"] = case["theta"] * 0.1
    names = ("q", "k", "v", "theta", "eta", "alpha")
    options = {
        name: torch.tensor(numbers, device="cuda") if isinstance(numbers, list) else numbers
        for name, numbers in {"chunk_size": 64, "lengths": lengths, "position": position}.items()
    }
    before = torch.get_float32_matmul_precision()

    def run(backend: str) -> list[Tensor]:
        tokens = [case[name].clone().requires_grad_() for name in names]
        weights, base = (tuple(w.clone().requires_grad_() for w in case[name]) for name in ("weights", "base"))
        y, *ends = neural_memory(
            *tokens, weights, case["momentum"], base=base, anchor=case["anchor"], **options, backend=backend
        )
        loss = F.mse_loss(y, case["v"]) + sum(w.square().sum() for part in ends for w in part)
        used = base if position else ()
        return [y.detach(), *torch.autograd.grad(loss, [*tokens, *weights, *used])]

    expected = run("torch")
    torch.set_float32_matmul_precision(precision)
    try:
        found = run("triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for x, y in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(x - y) <= tolerance * torch.linalg.vector_norm(y)
