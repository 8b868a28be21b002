"""Which library an op uses, and flash-attn behind ops.attention."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from memzoo.layers.ops import attention as op
from memzoo.layers.ops import backend
from memzoo.layers.ops.attention import attention
from memzoo.layers.reference import attention as loop


@pytest.fixture
def installed(monkeypatch):
    """Choose which libraries seem to be installed."""
    names: set[str] = set()
    for module in (backend, op):
        monkeypatch.setattr(module, "is_installed", lambda library: library in names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return names


def test_a_library_is_looked_for_without_being_imported():
    assert backend.is_installed("json")
    assert not backend.is_installed("no_such_library")
    before = set(sys.modules)
    for library in backend.LIBRARIES:
        backend.is_installed(library)
    assert not {name.split(".")[0] for name in set(sys.modules) - before} & backend.LIBRARIES.keys()


def test_a_backend_must_be_known_to_the_op_and_installed(installed):
    backend.check_backend("auto", ("torch",))
    backend.check_backend("torch", ("torch", "flash_attn"))
    with pytest.raises(ValueError, match="backend='trch' is not one of 'auto', 'torch'; did you mean 'torch'"):
        backend.check_backend("trch", ("torch",))
    with pytest.raises(ValueError, match=r"needs the package flash-attn, which is not installed; .*backend='auto'"):
        backend.check_backend("flash_attn", ("torch", "flash_attn"))
    installed.add("flash_attn")
    backend.check_backend("flash_attn", ("torch", "flash_attn"))


def test_the_report_says_of_every_library_whether_it_can_be_used(installed, monkeypatch):
    installed.update({"fla", "mamba_ssm"})
    monkeypatch.setattr(backend.metadata, "packages_distributions", lambda: {"fla": ["flash-linear-attention"]})
    monkeypatch.setattr(backend.metadata, "version", {"flash-linear-attention": "0.4.0"}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.report() == {
        "flash_attn": "not installed",
        "fla": "0.4.0, idle: no CUDA device",
        "mamba_ssm": "unknown version, idle: no CUDA device",
        "causal_conv1d": "not installed",
        "triton": "not installed",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.report()["fla"] == "0.4.0, usable"


def cuda_like(dtype=torch.bfloat16, width=64, device="cuda"):
    """What the choice of a backend looks at, so that it can be tested without a device."""
    return SimpleNamespace(is_cuda=device == "cuda", device=SimpleNamespace(type=device), dtype=dtype, shape=[width])


FITTING = {"q": cuda_like(), "v": cuda_like(), "window": 8, "prefix": None, "state": None, "lengths": None}
OBSTACLES = [
    ({"q": cuda_like(device="cpu")}, "q is on cpu; move it to a CUDA device"),
    ({"q": cuda_like(torch.float32)}, "q has dtype torch.float32; cast to float16 or bfloat16"),
    ({"v": cuda_like(width=32)}, "key_dim=64 and value_dim=32"),
    ({"q": cuda_like(width=512), "v": cuda_like(width=512)}, "key_dim=512"),
    ({"prefix": ()}, "prefix is given"),
    ({"state": ()}, "state is given"),
]


@pytest.mark.parametrize(("change", "words"), OBSTACLES)
def test_flash_attn_is_refused_where_it_does_not_apply_and_not_chosen_by_auto(installed, change, words):
    installed.add("flash_attn")
    with pytest.raises(ValueError, match=f"backend='flash_attn' does not apply: {words}.*or use backend='auto'"):
        op._choose_flash("flash_attn", **FITTING | change)
    assert not op._choose_flash("auto", **FITTING | change)


def test_auto_takes_flash_attn_for_windows_and_ragged_rows_where_it_is_installed(installed, monkeypatch):
    ragged = FITTING | {"window": None, "lengths": torch.ones(1)}
    assert not op._choose_flash("auto", **FITTING)
    installed.add("flash_attn")
    assert op._choose_flash("auto", **FITTING)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not op._choose_flash("auto", **FITTING), "Turing"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert op._choose_flash("auto", **ragged)
    assert not op._choose_flash("torch", **FITTING)
    assert not op._choose_flash("auto", **ragged | {"lengths": None})
    assert op._choose_flash("flash_attn", **ragged | {"lengths": None})


def stand_in() -> ModuleType:
    """flash_attn by its documentation: query i sees keys [i - left, i + right] (-1: no bound), none after itself."""
    module = ModuleType("flash_attn")

    def flash_attn_func(q, k, v, *, dropout_p, softmax_scale, causal, window_size):
        assert causal
        assert dropout_p == 0
        assert window_size in [(-1, -1), (window_size[0], 0)]
        window = None if window_size[0] == -1 else window_size[0] + 1
        return loop.attention(q, k, v, scale=softmax_scale, window=window)[0]

    def flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k, **options):
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert longest_q == longest_k >= ends_q.diff().max()
        rows = [flash_attn_func(*(x[None, a:b] for x in (q, k, v)), **options)[0] for a, b in pairwise(ends_q) if b > a]
        return torch.cat(rows)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [None, [4, 0, 7], [0, 0, 0]])
def test_flash_attn_is_called_so_that_it_means_the_same(monkeypatch, window, lengths):
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in())
    monkeypatch.setattr(op, "_choose_flash", lambda *_: True)
    q, k, v = (torch.randn(3, 7, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    lengths = None if lengths is None else torch.tensor(lengths)
    y, state = attention(q, k, v, window=window, lengths=lengths)
    y_loop, state_loop = loop.attention(q, k, v, window=window, lengths=lengths)
    torch.testing.assert_close(y, y_loop, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.keys, state_loop.keys, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [None, [300, 0, 17]])
def test_flash_attn_equals_torch_on_cuda(dtype, window, lengths):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed; pip install 'memzoo[cuda]'")
    leaves = [torch.randn(3, 300, heads, 64, device="cuda").to(dtype).requires_grad_() for heads in (4, 2, 2)]
    lengths = None if lengths is None else torch.tensor(lengths, device="cuda")
    real = torch.arange(300, device="cuda") < (300 if lengths is None else lengths[:, None])
    results = []
    for name in ("flash_attn", "torch"):
        y, _ = attention(*leaves, window=window, lengths=lengths, backend=name)
        y = y * real[..., None, None]
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)
