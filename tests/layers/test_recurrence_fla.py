"""The fla backend: what its ops are called with, told by stand-ins that have their signatures, and where it applies."""

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memzoo.layers.ops import recurrence, recurrence_fla
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.reference.delta_rule import delta_rule as delta_loop
from memzoo.layers.reference.linear_recurrence import linear_recurrence as linear_loop

FLA = find_spec("fla")  # the installed one, found before stand-ins take its name
# (module, op, has beta, the decay's axes beside batch and time): fla-core 0.6.0, fla/ops/*/chunk.py.
OPS = [
    ("simple_gla", "chunk_simple_gla", False, None),
    ("simple_gla", "chunk_simple_gla", False, "head"),
    ("gla", "chunk_gla", False, "channel"),
    ("delta_rule", "chunk_delta_rule", True, None),
    ("gated_delta_rule", "chunk_gated_delta_rule", True, "head"),
    ("kda", "chunk_kda", True, "channel"),
]


@pytest.fixture
def stand_ins(monkeypatch):
    """Put the loops in fla's place, under its names, and let the backend apply anywhere; yields the names called."""
    called = []

    def stand_in(name, has_beta, per_channel):
        def run(q, k, v, *, scale, initial_state, output_final_state, g=None, beta=None, cu_seqlens=None):
            assert output_final_state
            assert initial_state.dtype == torch.float32
            assert g is None or (g.dtype == torch.float32 and (g.dim() == 4) == per_channel)
            assert (beta is not None) == has_beta
            assert cu_seqlens is None or (cu_seqlens.dtype == torch.long and (cu_seqlens.diff() > 0).all())
            assert q.shape[2] == k.shape[2] == v.shape[2], "some of fla's ops want as many heads everywhere"
            called.append(name)
            options = dict(state=initial_state, log_decay=g, scale=scale, cu_seqlens=cu_seqlens)
            return delta_loop(q, k, v, beta, **options) if has_beta else linear_loop(q, k, v, **options)

        return run

    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    for module, op, has_beta, decay in OPS:
        fake = ModuleType(f"fla.ops.{module}")
        setattr(fake, op, stand_in(op, has_beta, decay == "channel"))
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", fake)
    monkeypatch.setattr(recurrence, "choose_fla", lambda backend, *_: backend == "fla")
    monkeypatch.setattr(recurrence, "check_backend", lambda *_: None)
    return called


def inputs(has_beta, decay, *, time=11, rows=2, dtype=torch.float32):
    batch = rows if time == 11 else 1
    q, k = (torch.randn(batch, time, 2, 4, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, 4, 3, dtype=dtype)
    gates = [torch.rand(batch, time, 4, dtype=dtype)] if has_beta else []
    axes = {None: None, "head": (4,), "channel": (4, 4)}[decay]
    log_decay = None if axes is None else -torch.rand(batch, time, *axes, dtype=dtype)
    return [q, torch.nn.functional.normalize(k, dim=-1), v, *gates, log_decay]


each_op = pytest.mark.parametrize(
    ("module", "op", "has_beta", "decay"), OPS, ids=[f"{module}-{decay}" for module, *_, decay in OPS]
)


@each_op
@pytest.mark.parametrize("ragged", [False, True], ids=["rows", "segments"])
def test_an_op_of_fla_gets_its_arguments(stand_ins, module, op, has_beta, decay, ragged):
    ours = delta_rule if has_beta else linear_recurrence
    tokens = inputs(has_beta, decay, time=13 if ragged else 11)
    cu_seqlens = torch.tensor([0, 4, 4, 5, 13]) if ragged else None
    state = torch.randn(4 if ragged else 2, 4, 4, 3)
    options = dict(state=state, cu_seqlens=cu_seqlens, scale=0.3)
    y, end = ours(*tokens, **options, backend="fla")
    assert stand_ins == [op]
    expected, expected_end = ours(*tokens, **options, backend="torch")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(end, expected_end, rtol=0, atol=1e-5)
    if ragged:
        assert torch.equal(end[1], state[1]), "an empty segment lost its state"


def parameters_of(module, op):
    """Names and required names of an op of the fla that is installed; read, not imported, since that needs Triton."""
    if FLA is None or not FLA.submodule_search_locations:
        pytest.skip("needs fla-core: pip install 'memzoo[peers]'")
    tree = ast.parse(Path(FLA.submodule_search_locations[0], "ops", module, "chunk.py").read_text())
    (arguments,) = (node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == op)
    assert not arguments.posonlyargs
    positional = [argument.arg for argument in arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if not default]
    return {*positional, *(argument.arg for argument in arguments.kwonlyargs)}, {*required}


@each_op
def test_fla_as_it_is_installed_takes_these_arguments(monkeypatch, stand_ins, module, op, has_beta, decay):
    """By name: what an op has no name for, most would take as **kwargs and leave unread."""
    names, required = parameters_of(module, op)
    fake, passed = sys.modules[f"fla.ops.{module}"], []
    stand_in = getattr(fake, op)
    monkeypatch.setattr(fake, op, lambda **options: passed.append({*options}) or stand_in(**options))
    ours, cu_seqlens = delta_rule if has_beta else linear_recurrence, torch.tensor([0, 4, 13])
    ours(*inputs(has_beta, decay, time=13), cu_seqlens=cu_seqlens, backend="fla")
    (keywords,) = passed
    assert "cu_seqlens" in keywords
    assert required <= keywords <= names


def test_a_decay_that_forgets_all_reaches_the_kernels_as_a_finite_one(stand_ins, monkeypatch):
    q, k, v, beta, log_decay = inputs(True, "head")
    log_decay[:, 4] = -torch.inf
    given = []
    monkeypatch.setattr(recurrence_fla, "_operation", lambda *_: lambda **options: given.append(options) or (v, None))
    recurrence_fla.recur_by_fla(q, k, v, beta, log_decay, torch.zeros(2, 4, 4, 3), 0.5, None)
    assert given[0]["g"].isfinite().all()
    assert not given[0]["g"][:, 4].exp().gt(1e-37).any()
    assert torch.equal(given[0]["g"][:, :4], log_decay[:, :4])


def test_half_precision_goes_in_and_comes_out(stand_ins):
    tokens = inputs(True, "head", dtype=torch.bfloat16)
    y, state = delta_rule(*tokens, backend="fla", lengths=torch.tensor([11, 0]))
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert not y[1].any()
    assert not state[1].any()


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (torch.ones(1, 1, 1, 8, dtype=torch.bfloat16), "q is on cpu"),
        (torch.ones(1, 1, 1, 8, dtype=torch.float32, device="meta"), "q is on meta"),
    ],
    ids=["cpu", "meta"],
)
def test_asked_for_in_vain_it_says_why(q, words):
    with pytest.raises(ValueError, match=f"backend='fla' does not apply: {words}.*backend='auto'"):
        recurrence_fla.choose_fla("fla", q, q)
    assert not recurrence_fla.choose_fla("auto", q, q)
    assert not recurrence_fla.choose_fla("torch", q, q)


class OnCuda:
    """Looks like a tensor there."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype, width):
        self.dtype, self.shape = dtype, (1, 1, 1, width)


@pytest.mark.parametrize(
    ("dtype", "key_width", "value_width", "words"),
    [
        (torch.float32, 64, 64, "dtype torch.float32; cast q, k, v to bfloat16"),
        (torch.float16, 512, 64, "key width 512; use at most 256"),
        (torch.float16, 8, 16, "key width 8; use an even one of at least 16"),
        (torch.float16, 16, 8, "value width 8; use an even one of at least 16"),
        (torch.float16, 17, 16, "key width 17; use an even one"),
        (torch.float16, 16, 33, "value width 33; use an even one"),
    ],
)
def test_on_cuda_it_takes_half_precision_and_heads_that_fit(monkeypatch, dtype, key_width, value_width, words):
    monkeypatch.setattr(recurrence_fla, "is_installed", lambda _: True)
    unfit = OnCuda(dtype, key_width), OnCuda(dtype, value_width)
    with pytest.raises(ValueError, match=words):
        recurrence_fla.choose_fla("fla", *unfit)
    assert not recurrence_fla.choose_fla("auto", *unfit)
    fit = OnCuda(torch.bfloat16, 16), OnCuda(torch.bfloat16, 512)
    assert recurrence_fla.choose_fla("auto", *fit)
    assert not recurrence_fla.choose_fla("torch", *fit)
    monkeypatch.setattr(recurrence_fla, "is_installed", lambda _: False)
    assert not recurrence_fla.choose_fla("auto", *fit)
