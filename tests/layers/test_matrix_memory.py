"""The plain layers: each equals its equations, token by token; options, state, segments, signals."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LinearAttention,
    MatrixMemory,
    RetNet,
    Rotary,
    Trace,
    create_layer,
)
from memzoo.layers.matrix_memory import positions

DIM, H, HV, K, V = 10, 2, 4, 6, 3
BATCH, TIME = 2, 9
LAYERS: list[type[MatrixMemory]] = [
    LinearAttention,
    RetNet,
    GatedLinearAttention,
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
]
GROUPED = {"num_heads": H, "head_dim": K, "num_value_heads": HV, "value_dim": V, "chunk_size": 4}


def build(cls: type[MatrixMemory], **options: object) -> MatrixMemory:
    torch.manual_seed(0)
    return cls(DIM, **GROUPED | options).double()


def inputs(time: int = TIME, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# --- the equations ---------------------------------------------------------------------------------------------------


def by_hand(layer: MatrixMemory, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as its docstring has it, written from its parameters, one token and head at a time."""
    p = {name: value.detach() for name, value in layer.named_parameters()}
    qkv = x @ p["query_key_value.weight"].T
    if layer.conv is not None:
        taps = p["conv.weight"]
        qkv = sum(F.pad(qkv, (0, 0, taps.shape[1] - 1 - i, 0))[:, : x.shape[1]] * taps[:, i] for i in range(4))
    if layer.rule.uses_conv:
        qkv = qkv * torch.sigmoid(qkv)
    q, k, v = qkv.split([H * K, H * K, HV * V], -1)
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    q, k, decay, beta = SHAPED[type(layer)](p, x, q, k)
    S = torch.zeros(len(x), HV, K, V, dtype=x.dtype)
    z = torch.zeros(len(x), HV, K, dtype=x.dtype)
    outputs = torch.zeros(len(x), x.shape[1], HV, V, dtype=x.dtype)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            for h in range(HV):
                key, query = k[b, t, h // (HV // H)], q[b, t, h // (HV // H)]
                S[b, h] = decay[b, t, h][:, None] * S[b, h]
                u = v[b, t, h] if beta is None else beta[b, t, h] * (v[b, t, h] - key @ S[b, h])
                S[b, h] += torch.outer(key, u)
                z[b, h] += key
                outputs[b, t, h] = query @ S[b, h] * K**-0.5
                if isinstance(layer, LinearAttention):
                    outputs[b, t, h] /= query @ z[b, h] * K**-0.5 + 1e-10
    normal = outputs * torch.rsqrt(outputs.square().mean(-1, keepdim=True) + 1e-5) * p["norm.weight"]
    gate = 1.0
    if isinstance(layer, KimiDeltaAttention):
        gate = torch.sigmoid(x @ p["output_gate.0.weight"].T @ p["output_gate.1.weight"].T)
    elif layer.output_gate is not None:
        gate = F.silu(x @ p["output_gate.weight"].T)
    memory = torch.cat((S, z[..., None]), -1) if isinstance(layer, LinearAttention) else S
    return (normal.flatten(2) * gate) @ p["out.weight"].T, memory


Parameters = dict[str, Tensor]
Shaped = tuple[Tensor, Tensor, Tensor, Tensor | None]  # q, k, decay (batch, time, HV, K), beta


def _whole(x: Tensor, decay: Tensor | float = 1.0) -> Tensor:
    return torch.as_tensor(decay, dtype=x.dtype).expand(*x.shape[:2], HV, K)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _linear_attention(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    return F.elu(q) + 1, F.elu(k) + 1, _whole(x), None


def _retnet(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    gamma = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256], dtype=x.dtype)
    turn = torch.arange(x.shape[1])
    return Rotary(K)(q, turn), Rotary(K)(k, turn), _whole(x, gamma[:, None]), None


def _gla(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    raw = x @ p["gates.0.weight"].T @ p["gates.1.weight"].T + p["gates.1.bias"]
    return q, k, torch.sigmoid(raw).pow(1 / 16).unflatten(-1, (HV, K)), None


def _deltanet(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    return _unit(q), _unit(k), _whole(x), torch.sigmoid(x @ p["gates.weight"].T)


def _gated_deltanet(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    a, b = (x @ p["gates.weight"].T).split(HV, -1)
    decay = torch.exp(-torch.exp(p["rule.decay_log"]) * F.softplus(a + p["rule.step_bias"]))
    return _unit(q), _unit(k), _whole(x, decay[..., None]), torch.sigmoid(b)


def _kda(p: Parameters, x: Tensor, q: Tensor, k: Tensor) -> Shaped:
    f = x @ p["gates.decay.0.weight"].T @ p["gates.decay.1.weight"].T + p["rule.step_bias"]
    decay = torch.exp(-torch.exp(p["rule.decay_log"])[:, None] * F.softplus(f).unflatten(-1, (HV, K)))
    return _unit(q), _unit(k), decay, torch.sigmoid(x @ p["gates.write.weight"].T)


SHAPED = {
    LinearAttention: _linear_attention,
    RetNet: _retnet,
    GatedLinearAttention: _gla,
    DeltaNet: _deltanet,
    GatedDeltaNet: _gated_deltanet,
    KimiDeltaAttention: _kda,
}


@pytest.mark.parametrize("cls", LAYERS)
def test_a_layer_is_its_equations(cls):
    """With grouped value heads, with and without the convolution where the paper has one."""
    x = inputs()
    for options in ({}, {"conv_width": None}) if cls.rule_class.uses_conv else ({},):
        layer = build(cls, **options)
        y, state = layer(x)
        expected, memory = by_hand(layer, x)
        close(y, expected)
        close(state.memory, memory)


@pytest.mark.parametrize("cls", LAYERS)
def test_the_chunk_size_changes_nothing(cls):
    x = inputs(23)
    layers = [build(cls, chunk_size=size) for size in (1, 16, 64)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[2].load_state_dict(layers[0].state_dict())
    y, state = layers[0](x)
    for layer in layers[1:]:
        y_other, other = layer(x)
        close(y_other, y)
        close(other.memory, state.memory)


# --- defaults and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "conv", "gate"),
    [
        (LinearAttention, False, False),
        (RetNet, False, True),
        (GatedLinearAttention, False, True),
        (DeltaNet, True, False),
        (GatedDeltaNet, True, True),
        (KimiDeltaAttention, True, True),
    ],
)
def test_layers_have_the_parts_their_papers_have(cls, conv, gate):
    layer = cls(128)
    assert (layer.conv is not None, layer.output_gate is not None) == (conv, gate)
    assert (layer.rule.num_heads, layer.rule.num_value_heads) == (2, 2)
    assert (layer.rule.key_dim, layer.rule.value_dim, layer.norm.weight.shape[0]) == (64, 64, 64)
    plain = cls(128, conv_width=None, output_gate=False)
    assert plain.conv is None
    assert plain.output_gate is None
    assert cls(128, conv_width=3).conv.weight.shape[1] == 3


def test_options_of_a_rule_reach_it():
    assert not LinearAttention(16, head_dim=8, normalize=False).rule.normalize
    assert LinearAttention(16, head_dim=8, feature_map="relu").rule.feature_map == "relu"
    assert RetNet(16, head_dim=8, rotary_base=7.0).rule.rotary.base == 7
    gla = GatedLinearAttention(16, head_dim=8, gate_rank=3, gate_divisor=2.0).rule
    assert (gla.gate_rank, gla.gate_divisor) == (3, 2)
    for cls in (DeltaNet, GatedDeltaNet, KimiDeltaAttention):
        assert cls(16, head_dim=8, negative_eigenvalues=True, backend="torch").rule.negative_eigenvalues
        assert cls(16, head_dim=8, backend="torch").rule.backend == "torch"
    assert KimiDeltaAttention(16, head_dim=8, decay_lower_bound=-5.0).rule.decay_lower_bound == -5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "dim=10 is not divisible by num_heads=3"),
        ({"num_heads": 2, "conv_width": 0}, "conv_width=0"),
        ({"num_heads": 2, "num_value_heads": 3}, "num_value_heads=3 is not divisible"),
        ({"num_heads": 2, "value_dim": 0}, "value_dim=0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GatedDeltaNet(DIM, **options)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LAYERS)
def test_11_the_state_has_as_many_numbers_after_any_number_of_tokens(cls):
    layer = build(cls).float()
    numbers = HV * K * (V + (cls is LinearAttention)) + (layer.conv is not None) * 3 * (2 * H * K + HV * V)
    fresh = layer.initial_state(BATCH)
    with torch.no_grad():
        for time in (1, 100, 3000):
            _, state = layer(torch.randn(BATCH, time, DIM))
            assert state.nbytes == fresh.nbytes == BATCH * (4 * numbers + 2 * 8)
            assert (state.position == time).all()


def test_a_state_of_another_layer_is_refused():
    x, layer = inputs(), build(GatedDeltaNet)
    for other in (build(GatedDeltaNet, conv_width=None), build(GatedDeltaNet, value_dim=5)):
        _, state = other(x)
        with pytest.raises(
            ValueError, match=r"state holds memories of .*; this layer's are \(4, 6, 3\), convolution=True"
        ):
            layer(x, state)


def test_positions_go_on_in_rows_and_in_segments():
    x, before = torch.zeros(1, 5, 2), torch.tensor([3, 10, 0])
    assert positions(torch.zeros(3, 2, 2), before, None).tolist() == [[3, 4], [10, 11], [0, 1]]
    assert positions(x, before, torch.tensor([0, 2, 2, 5])).tolist() == [[3, 4, 0, 1, 2]]


# --- documents, natively ---------------------------------------------------------------------------------------------


def documents(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    doc_ids = (torch.rand(3, 13, generator=generator) < 0.3).cumsum(1)
    mask = torch.rand(3, 13, generator=generator) < 0.8
    mask[seed % 3] = seed % 2 == 0  # a row wholly real, or wholly masked
    return doc_ids, mask


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("seed", range(4))
def test_documents_end_to_end_equal_documents_in_padded_rows(cls, seed):
    """Outputs, states, gradients and signals, from a state that the first document may continue."""
    doc_ids, mask = documents(seed)
    x = inputs(13, 3)
    results = []
    for native in (True, False):
        layer = build(cls)
        layer.native_segments = native
        _, start = layer(inputs(4, 3), doc_ids=doc_ids[:, :1].expand(-1, 4))
        trace = Trace()
        y, state = layer(x, start, doc_ids=doc_ids, mask=mask, trace=trace)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.memory.square().sum()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        results.append((y, state.named_tensors(), gradients, trace.signals))
    (y, state, gradients, signals), (y_padded, state_padded, gradients_padded, signals_padded) = results
    close(y, y_padded)
    for name, tensor in state_padded.items():
        close(state[name], tensor)
    for actual, expected in zip(gradients, gradients_padded, strict=True):
        close(actual, expected, tolerance=1e-10)
    assert signals.keys() == signals_padded.keys()
    for name, signal in signals_padded.items():
        close(signals[name], signal)


def test_25_projections_see_the_real_tokens_and_no_others():
    layer, rows = build(GatedDeltaNet), {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, y, name=name: rows.update({name: args[0].shape[:-1].numel()}))
    doc_ids, mask = documents(0)
    layer(inputs(13, 3), doc_ids=doc_ids, mask=mask)
    assert rows == dict.fromkeys(("query_key_value", "gates", "output_gate", "out"), int(mask.sum()))
    layer(inputs(13, 3), doc_ids=doc_ids)
    assert {*rows.values()} == {3 * 13}


# --- signals ---------------------------------------------------------------------------------------------------------


def test_signals_are_the_gates_and_the_norm_of_the_memory():
    x = inputs()
    expected = {
        "linear_attention": {},
        "retnet": {"decay": (3,)},
        "gated_linear_attention": {"decay": (3, 4)},
        "deltanet": {"beta": (3,)},
        "gated_deltanet": {"beta": (3,), "decay": (3,)},
        "kimi_delta_attention": {"beta": (3,), "decay": (3, 4)},
    }
    for name, shapes in expected.items():
        layer, trace = create_layer(name, DIM, num_heads=3, head_dim=4).double(), Trace()
        _, state = layer(x, trace=trace)
        seen = dict(trace.signals)
        close(seen.pop("memory_norm"), state.memory.flatten(2).norm(dim=-1))
        assert {key: (BATCH, TIME, *rest) for key, rest in shapes.items()} == {
            k: tuple(v.shape) for k, v in seen.items()
        }
        assert all(((value > 0) & (value < 1)).all() for value in seen.values())
        silent = Trace(signals=False)
        layer(x, trace=silent)
        assert not silent.signals
