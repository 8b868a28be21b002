"""Whole layers against independent code: the torch fallbacks of Hugging Face transformers, with copied weights."""

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import GatedDeltaNet, KimiDeltaAttention

pytest.importorskip("transformers", reason="parity needs the dev extra's transformers")

DIM, HEADS, WIDTH, EPS = 24, 2, 8, 1e-5


@pytest.mark.parametrize(("value_heads", "value_width"), [(2, 8), (4, 6)])
@pytest.mark.parametrize("time", [3, 70])  # less than the convolution is wide, and more than a chunk
def test_gated_deltanet_is_that_of_qwen3_next(
    value_heads: int, value_width: int, time: int, monkeypatch: pytest.MonkeyPatch
):
    configuration, modeling = peer("qwen3_next", monkeypatch)
    config = configuration.Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=WIDTH,
        linear_num_value_heads=value_heads,
        linear_value_head_dim=value_width,
        linear_conv_kernel_dim=4,
        rms_norm_eps=EPS,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    theirs = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    ours = GatedDeltaNet(
        DIM, num_heads=HEADS, head_dim=WIDTH, num_value_heads=value_heads, value_dim=value_width, norm_eps=EPS
    )
    # Their projections are grouped by key head: [q | k | v | z] and [b | a] of each.
    values = value_heads // HEADS * value_width
    q, k, v, z = _by_head(theirs.in_proj_qkvz, [WIDTH, WIDTH, values, values])
    b, a = _by_head(theirs.in_proj_ba, [value_heads // HEADS] * 2)
    with torch.no_grad():
        ours.query_key_value.weight.copy_(torch.cat((q, k, v)))
        ours.gates.weight.copy_(torch.cat((a, b)))
        ours.output_gate.weight.copy_(z)
        ours.conv.weight.copy_(theirs.conv1d.weight[:, 0])
        ours.rule.decay_log.copy_(theirs.A_log)
        ours.rule.step_bias.copy_(theirs.dt_bias)
        ours.norm.weight.copy_(theirs.norm.weight.normal_(1, 0.1))
        ours.out.weight.copy_(theirs.out_proj.weight)
    _same(ours, theirs, time)


@pytest.mark.parametrize("time", [3, 70])
def test_kimi_delta_attention_is_that_of_kimi_linear(time: int, monkeypatch: pytest.MonkeyPatch):
    configuration, modeling = peer("kimi_linear", monkeypatch)
    config = configuration.KimiLinearConfig(
        hidden_size=DIM,
        linear_num_heads=HEADS,
        linear_head_dim=WIDTH,
        linear_conv_kernel_dim=4,
        rms_norm_eps=EPS,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    theirs = modeling.KimiLinearDeltaAttention(config, layer_idx=0)
    ours = KimiDeltaAttention(DIM, num_heads=HEADS, head_dim=WIDTH, norm_eps=EPS)
    forget = theirs.forget_gate
    with torch.no_grad():
        forget.A_log.uniform_(1, 4).log_()
        forget.dt_bias.normal_(-2, 1)
        ours.query_key_value.weight.copy_(torch.cat((theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight)))
        ours.gates.decay[0].weight.copy_(forget.f_a_proj.weight)
        ours.gates.decay[1].weight.copy_(forget.f_b_proj.weight)
        ours.gates.write.weight.copy_(theirs.b_proj.weight)
        ours.output_gate[0].weight.copy_(theirs.g_a_proj.weight)
        ours.output_gate[1].weight.copy_(theirs.g_b_proj.weight)
        ours.conv.weight.copy_(theirs.conv1d.weight[:, 0])
        ours.rule.decay_log.copy_(forget.A_log.flatten())
        ours.rule.step_bias.copy_(forget.dt_bias)
        ours.norm.weight.copy_(theirs.o_norm.weight.normal_(1, 0.1))
        ours.out.weight.copy_(theirs.o_proj.weight)
    _same(ours, theirs, time)


def peer(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """A model's configuration and code, which would call fla's kernels where they are installed, GPU or not."""
    path = f"transformers.models.{name}"
    configuration = pytest.importorskip(f"{path}.configuration_{name}", reason=f"this transformers has no {name}")
    modeling = import_module(f"{path}.modeling_{name}")
    wrapped = {key: value.__wrapped__ for key, value in vars(modeling).items() if hasattr(value, "__wrapped__")}
    assert {key for key in wrapped if key.startswith(("torch_chunk_", "chunk_"))}, "the fallback is not where it was"
    for key, value in wrapped.items():
        monkeypatch.setattr(modeling, key, value)
    return configuration, modeling


def _by_head(projection: nn.Linear, widths: list[int]) -> list[Tensor]:
    return [part.flatten(0, 1) for part in projection.weight.unflatten(0, (HEADS, -1)).split(widths, dim=1)]


def _same(ours: nn.Module, theirs: nn.Module, time: int) -> None:
    """Outputs and the gradient of the input, to the rounding of float32: theirs computes in no other."""
    x = torch.randn(2, time, DIM, requires_grad=True)
    weight = torch.randn(2, time, DIM)
    y, expected = ours(x)[0], theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    (slope,), (expected_slope,) = (torch.autograd.grad((out * weight).sum(), x) for out in (y, expected))
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=1e-5 * expected_slope.abs().max().item())
