"""Layers and inputs for the tests of MixtureOfMemories, and its weights as the reference takes them."""

from typing import Any

import torch
from hypothesis import settings
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
)
from memzoo.layers.mixture_of_memories import MixtureOfMemories
from memzoo.layers.reference.mixture_of_memories import Mixture, Result
from memzoo.layers.state import State

DIM, MEMORIES, HEADS, KEY, VALUE, WIDTH = 12, 4, 2, 4, 3, 4
PLACES = ("bucket", "input")  # of the convolution
PLAIN: dict[str, type[MatrixMemory]] = {
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GatedLinearAttention,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
}
RULES = tuple(PLAIN)
SIZES: dict[str, Any] = dict(num_heads=HEADS, head_dim=KEY, value_dim=VALUE)
few_cases = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def build(seed: int = 0, *, dtype: torch.dtype = torch.float64, **options: Any) -> MixtureOfMemories:
    """A small layer whose every parameter is random; its first M inputs alone choose the memories."""
    torch.manual_seed(seed)
    layer = MixtureOfMemories(DIM, **SIZES | dict(num_memories=MEMORIES) | options).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        layer.router.weight.copy_(torch.eye(*layer.router.weight.shape))
    return layer.to(dtype)


def tokens(batch: int = 2, time: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choose(x: Tensor, memories: list[list[int]]) -> Tensor:
    """Make token t of every row choose ``memories[t]``, in that order of weight, without changing its other inputs."""
    x = x.clone()
    x[..., :MEMORIES] = -4.0 - 0.1 * torch.arange(MEMORIES)
    for t, chosen in enumerate(memories):
        x[:, t, chosen] = torch.linspace(1, 0.5, len(chosen), dtype=x.dtype)
    return x


def chosen_by(layer: MixtureOfMemories, x: Tensor) -> Tensor:
    """How many tokens of each row (batch, time, dim) chose each memory, (batch, M)."""
    indices = F.linear(x, layer.router.weight).topk(layer.top_k).indices
    return F.one_hot(indices, MEMORIES).sum((1, 2))


def pad(pieces: list[Tensor], width: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows (1, time, dim) of any length -> (rows, width, dim) with NaN where nothing is, and the mask of what is."""
    x, mask = torch.full((len(pieces), width, DIM), torch.nan, dtype=torch.float64), torch.zeros(len(pieces), width)
    for row, piece in enumerate(pieces):
        where = slice(width - piece.shape[1], None) if left else slice(piece.shape[1])
        x[row, where], mask[row, where] = piece[0], 1
    return x, mask.bool()


def run_by(layer: MixtureOfMemories, x: Tensor, cuts: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Run the pieces between cuts one after the other, handing the state on."""
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = layer(x[:, start:end], state)
        pieces.append(y)
    assert state is not None
    return torch.cat(pieces, 1), state


def assert_close(actual: Tensor | State, expected: Tensor | State, tolerance: float = 1e-10) -> None:
    """Compare tensors, or every tensor of two states, absolutely."""
    left, right = (x.named_tensors() if isinstance(x, State) else {"": x} for x in (actual, expected))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_is(layer: MixtureOfMemories, x: Tensor, truth: Result, tolerance: float = 1e-10) -> None:
    """Compare what a fresh layer returns with what the reference does."""
    y, state = layer(x)
    assert_close(y, truth.y, tolerance)
    assert_close(state.memories, truth.memories, tolerance)
    assert (state.conv is None) == (truth.tails is None)
    if truth.tails is not None:
        assert_close(state.conv, truth.tails, tolerance)
    assert torch.equal(state.tokens_seen, truth.tokens_seen)
    assert state.position.tolist() == [x.shape[1]] * len(x)


def plain(layer: MixtureOfMemories, memory: int, rule: str) -> MatrixMemory:
    """The base layer with the weights of one memory. Kimi's gates its output in a way of its own: not comparable."""
    gated = layer.output_gate is not None
    base = PLAIN[rule](DIM, **SIZES, conv_width=WIDTH, output_gate=gated, norm_eps=layer.norm.eps).double()
    weights = layer.state_dict()
    weights["query_key_value.weight"] = torch.cat((layer.query.weight, layer.key_value[memory].weight))
    for name in [*weights]:
        if name.startswith(f"gates.{memory}."):
            weights[name.replace(f"gates.{memory}.", "gates.")] = weights[name]
    base.load_state_dict({name: weights[name] for name in base.state_dict()})
    return base


def mixture_of(layer: MixtureOfMemories) -> Mixture:
    """What the reference needs of a layer."""
    rule, conv, memories = layer.rule, layer.conv, layer.num_memories + layer.shared
    activated = rule.uses_conv if conv is None else conv.activation == "silu"

    def own(projections: nn.ModuleList) -> tuple[nn.Module, ...]:
        return tuple(projections) * memories if layer.tie_key_values else tuple(projections)

    def gates(raw: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        like = layer.out.weight.new_zeros(1, 1, rule.num_value_heads, VALUE)
        values = rule.gate_values(None if raw is None else raw[None, None], like)
        return tuple(None if value is None else value[0, 0] for value in values)

    def prepare(q: Tensor, k: Tensor, position: int) -> tuple[Tensor, Tensor]:
        q, k = rule.prepare(q[None, None], k[None, None], torch.tensor([position]))
        return q[0, 0], k[0, 0]

    def output(y: Tensor, x: Tensor) -> Tensor:
        y = layer.norm(y).flatten()
        return layer.out(y if layer.output_gate is None else y * F.silu(layer.output_gate(x)))

    return Mixture(
        router=layer.router.weight,
        query=layer.query.weight,
        key_value=tuple(projection.weight for projection in own(layer.key_value)),
        raw_gates=() if layer.gates is None else own(layer.gates),
        gates=gates,
        prepare=prepare,
        output=output,
        heads=HEADS,
        value_heads=rule.num_value_heads,
        top_k=layer.top_k,
        shared=layer.shared,
        renormalize=layer.renormalize,
        filters=None if conv is None else conv.weight,
        place=layer.conv_place,
        activation=F.silu if activated else nn.Identity(),
        normalizer=rule.state_shape[-1] > VALUE,
    )


def fla_state_dict(seed: int = 0, *, shared: bool = True, single: bool = False) -> dict[str, Tensor]:
    """Random weights under the names and shapes of flash-linear-attention's MoM layer."""
    draw = torch.Generator().manual_seed(seed)
    inner, values = HEADS * KEY, HEADS * VALUE
    own = {"k": (inner, DIM), "v": (values, DIM), "a": (HEADS, DIM), "b": (HEADS, DIM)}
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (MEMORIES, DIM),
        "q_proj.weight": (inner, DIM),
        "A_log": (HEADS,),
        "dt_bias": (HEADS,),
        "q_conv1d.weight": (inner, 1, WIDTH),
        "k_conv1d.weight": (inner, 1, WIDTH),
        "v_conv1d.weight": (values, 1, WIDTH),
        "g_proj.weight": (values, DIM),
        "o_norm.weight": (VALUE,),
        "o_proj.weight": (DIM, values),
    }
    for kind, shape in own.items():
        if not single:
            shapes |= {f"{kind}_proj.{m}.weight": shape for m in range(MEMORIES)}
        if shared or single:
            shapes[f"shared_{kind}.weight"] = shape
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def mixture_of_fla(weights: dict[str, Tensor], *, top_k: int, shared: bool, eps: float) -> Mixture:
    """The equations of the spec, sections 1.2 and 1.5, on fla's weights: nothing of the layer is used."""

    def memory(kind: str) -> tuple[Tensor, ...]:
        routed = [weights.get(f"{kind}_proj.{m}.weight", weights.get(f"shared_{kind}.weight")) for m in range(MEMORIES)]
        return tuple([*routed, weights[f"shared_{kind}.weight"]] if shared else routed)

    def gates(raw: Tensor | None) -> tuple[Tensor, Tensor]:
        assert raw is not None
        a, b = raw.view(2, HEADS)
        return b.sigmoid(), -weights["A_log"].exp() * F.softplus(a + weights["dt_bias"])

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def output(y: Tensor, x: Tensor) -> Tensor:
        normal = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weights["o_norm.weight"]
        return weights["o_proj.weight"] @ (normal.flatten() * F.silu(weights["g_proj.weight"] @ x))

    return Mixture(
        router=weights["gate.weight"],
        query=weights["q_proj.weight"],
        key_value=tuple(torch.cat(pair) for pair in zip(memory("k"), memory("v"), strict=True)),
        raw_gates=tuple(
            lambda x, a=a, b=b: torch.cat((a @ x, b @ x)) for a, b in zip(memory("a"), memory("b"), strict=True)
        ),
        gates=gates,
        prepare=lambda q, k, position: (unit(q), unit(k)),
        output=output,
        heads=HEADS,
        value_heads=HEADS,
        top_k=top_k,
        shared=shared,
        renormalize=True,
        filters=torch.cat([weights[f"{kind}_conv1d.weight"] for kind in "qkv"]).squeeze(1),
        place="bucket",
        activation=F.silu,
        normalizer=False,
    )


EXACT = 1e-12
