"""Linear recurrences and Mixture-of-Memories on CUDA: the CPU's numbers, fla's numbers, and no needless waiting.

Checks that need no CUDA library run on the CPU as well, so that they are known to be checks that pass.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import MixtureOfMemories, create_layer
from memzoo.layers.ops.delta_rule import delta_rule
from memzoo.layers.ops.linear_recurrence import linear_recurrence

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS = [
    "linear_attention",
    "retnet",
    "gated_linear_attention",
    "deltanet",
    "gated_deltanet",
    "kimi_delta_attention",
    "mixture_of_memories",
]


def distance(x: Tensor, y: Tensor) -> float:
    """Norm of the difference over that of the second."""
    return (torch.linalg.vector_norm(x.float() - y.float()) / torch.linalg.vector_norm(y.float())).item()


def inputs(decay: str | None, device: str, dtype: torch.dtype, time: int = 200) -> list[Tensor]:
    """Return q, k, v, beta and the log decay, leaves."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, time, 2, 64) for _ in range(3))
    axes = {None: None, "head": (2,), "channel": (2, 64)}[decay]
    tokens = [q, F.normalize(k, dim=-1), v, torch.rand(1, time, 2)]
    tokens += [] if axes is None else [-0.5 * torch.rand(1, time, *axes)]
    return [t.to(device, dtype).requires_grad_() for t in tokens]


def results(op, tokens: list[Tensor], **options) -> list[Tensor]:
    """Return outputs, states and gradients."""
    own = tokens if op is delta_rule else [*tokens[:3], *tokens[4:]]
    y, state = op(*own, **options)
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum() + state.square().sum()
    return [y, state, *torch.autograd.grad(loss, own)]


@pytest.mark.gpu
@pytest.mark.parametrize("borders", [None, [0, 70, 71, 200]], ids=["row", "segments"])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("op", [delta_rule, linear_recurrence], ids=["delta", "adding"])
def test_fla_s_kernels_give_the_numbers_of_the_torch_backend(op, decay, borders):
    pytest.importorskip("fla", reason="fla-core is not installed; pip install 'memzoo[cuda]'")
    cu_seqlens = None if borders is None else torch.tensor(borders)
    rows = 1 if borders is None else len(borders) - 1
    options = dict(cu_seqlens=cu_seqlens, state=torch.randn(rows, 2, 64, 64, device="cuda"))
    tokens = inputs(decay, "cuda", torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in tokens]
    for own, expected in zip(
        results(op, tokens, backend="fla", **options), results(op, wide, backend="torch", **options), strict=True
    ):
        assert distance(own, expected) < 2e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_equals_that_of_the_cpu_in_float64(name, device):
    torch.manual_seed(0)
    layer, x = create_layer(name, 32).double(), torch.randn(2, 41, 32, dtype=torch.float64)
    found = []
    for own, tokens in ((layer, x), (copy.deepcopy(layer).to(device), x.to(device))):
        y, state = own(tokens)
        y.square().sum().backward()
        found.append([y, *state.named_tensors().values(), *(p.grad for p in own.parameters())])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_autocast_stays_close_and_finite(name, device):
    torch.manual_seed(0)
    layer, x = create_layer(name, 32).to(device), torch.randn(2, 41, 32, device=device)
    expected, _ = layer(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, state = layer(x)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert all(t.isfinite().all() for t in state.named_tensors().values())
    if name != "mixture_of_memories":  # a router may choose otherwise for a token
        assert distance(y, expected) < 5e-2


@pytest.mark.gpu
def test_25_a_mixture_waits_for_the_device_once():
    """For the counts of its buckets: every other synchronisation is an error here."""
    layer, x = MixtureOfMemories(64, num_heads=2).cuda(), torch.randn(2, 128, 64, device="cuda")
    layer(x)[0].sum().backward()
    torch.cuda.synchronize()
    waited = 0
    original = Tensor.tolist

    def tolist(tensor: Tensor) -> list[object]:
        nonlocal waited
        waited += tensor.is_cuda
        torch.cuda.set_sync_debug_mode("default")
        try:
            return original(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        torch.cuda.set_sync_debug_mode("error")
        try:
            y, _ = layer(x)
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waited == 1
