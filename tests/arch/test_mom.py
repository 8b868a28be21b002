"""MoM: sizes, hybrids, the balance loss, and checkpoints of flash-linear-attention."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.arch import MoM, create_model, mom, part_sizes
from memzoo.layers import Attention, MixtureOfMemories, Trace

SIZES = {  # vocabulary, width, depth, query and key width, width of a head, hidden width
    "mom_tiny": (256, 128, 4, 64, 32, 400),
    "mom_340m": (32000, 1024, 24, 1024, 256, 2048),
    "mom_1b3": (32000, 2048, 24, 1024, 256, 5632),
}
PARAMETERS = {  # all, and those a token meets
    "mom_tiny": (1_089_808, 954_640),
    "mom_340m": (512_351_424, 411_294_912),
    "mom_1b3": (1_552_883_904, 1_350_770_880),
}
SMALL: dict[str, Any] = dict(vocab_size=11, dim=16, depth=2, num_heads=2, head_dim=4, hidden_dim=24, chunk_size=4)


def meta(name: str, **overrides: Any) -> MoM:
    with torch.device("meta"):
        model: MoM = create_model(name, **overrides)
    return model


def small(**options: Any) -> MoM:
    torch.manual_seed(0)
    return MoM(**SMALL | options).double()


# Sizes


def parameters(name: str, memories: int) -> int:
    """Of 4 memories and a shared one, with so many of the four counted; embeddings tied."""
    vocabulary, dim, depth, keys, head, hidden = SIZES[name]
    heads = keys // head
    own = 2 * dim * keys + 2 * dim * heads  # keys, values, two gates
    common = 4 * dim + 3 * dim * keys + 3 * 4 * keys + 2 * heads + head  # router; queries, output and its gate; ...
    return vocabulary * dim + depth * ((memories + 1) * own + common + 3 * dim * hidden + 2 * dim) + dim


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_announced_ones(name: str) -> None:
    model = meta(name)
    assert (model.num_parameters(), model.num_activated_parameters()) == PARAMETERS[name]
    assert PARAMETERS[name] == (parameters(name, 4), parameters(name, 2))
    sizes = part_sizes(model)
    assert sum(size.parameters for size in sizes) == model.num_parameters()
    assert sum(size.state_bytes for size in sizes) == model.initial_state(1).nbytes


def test_the_paper_counts_444m_activated_parameters_untied() -> None:
    untied = meta("mom_340m", tie_embeddings=False)
    assert untied.num_activated_parameters() == pytest.approx(444.0e6, abs=0.1e6)
    assert untied.num_parameters() - meta("mom_340m").num_parameters() == 32000 * 1024


def test_the_state_is_five_matrices_a_head_and_the_tails() -> None:
    model = meta("mom_340m")
    matrices, tails, counters = 5 * 4 * 256**2 * 4, 5 * 3 * 3 * 1024 * 4, (2 + 4) * 8
    assert model.initial_state(1).nbytes == 24 * (matrices + tails + counters)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"top_k": 4}, 0),
        ({"tie_key_values": True}, 0),
        ({"rule": "linear_attention"}, 2 * 2 * 2 * 16 * 8),  # blocks, idle memories, keys and values
        ({"attention_layers": [0], "attention": {"num_heads": 2}}, 1 * 2 * (2 * 16 * 8 + 2 * 16 * 2)),
    ],
)
def test_what_a_token_does_not_meet(options: dict[str, Any], idle: int) -> None:
    model = small(**options)
    assert model.num_parameters() - model.num_activated_parameters() == idle


# Options


def test_every_option_of_the_layer_is_one_of_the_model_with_its_default() -> None:
    layer, model = (inspect.signature(cls).parameters for cls in (MixtureOfMemories, MoM))
    for name in layer.keys() - {"dim"}:
        expected = 1e-6 if name == "norm_eps" else layer[name].default  # the released models' is not the layer's
        assert model[name].default == expected, name


def test_options_arrive_at_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict(
        num_memories=5, top_k=3, shared=False, rule="gla", rule_options={"gate_rank": 3}, num_heads=2, head_dim=6,
        value_dim=10, num_value_heads=4, renormalize=False, conv="input", conv_width=3, balance="pooled",
        balance_weight=0.5, tie_key_values=True, output_gate=False, norm_eps=1e-3, chunk_size=8, backend="torch",
    )  # fmt: skip
    assert given.keys() == inspect.signature(MixtureOfMemories).parameters.keys() - {"dim"}
    calls: list[dict[str, Any]] = []

    def build(dim: int, **options: Any) -> MixtureOfMemories:
        calls.append({"dim": dim, **options})
        return MixtureOfMemories(dim)

    monkeypatch.setattr(mom, "MixtureOfMemories", build)
    model = MoM(256, 128, 2, hidden_dim=24, checkpoint_blocks=True, **given)
    assert calls == [{"dim": 128, **given}] * 2
    assert model.blocks[0].ffn.down.in_features == 24
    assert model.checkpoint_blocks


# Hybrids


def hybrid() -> MoM:
    return small(depth=3, attention_layers=[1], attention={"num_heads": 4, "num_kv_heads": 2})


def test_a_hybrid_has_attention_in_the_blocks_named() -> None:
    model = hybrid()
    assert [type(block.mixer) for block in model.blocks] == [MixtureOfMemories, Attention, MixtureOfMemories]
    assert model.blocks[1].mixer.num_kv_heads == 2
    assert model.mixtures() == [model.blocks[0].mixer, model.blocks[2].mixer]


def test_a_hybrid_streams_and_its_state_grows_by_keys_and_values_alone() -> None:
    model, tokens = hybrid(), torch.randint(11, (2, 9))
    whole, end = model(tokens)
    first, state = model(tokens[:, :4])
    second, last = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-10)
    assert [block.nbytes for block in last.blocks[::2]] == [block.nbytes for block in state.blocks[::2]]
    assert last.blocks[1].nbytes > state.blocks[1].nbytes
    assert [block.nbytes for block in last.blocks[::2]] == [block.nbytes for block in end.blocks[::2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_layers": [0, 2]}, r"attention_layers=\[0, 2\] are not all blocks; use numbers from 0 to 1"),
        ({"attention_layers": [-1]}, r"attention_layers=\[-1\]"),
        ({"attention": {"num_heads": 2}}, r"attention={'num_heads': 2} is used by no block; name its blocks"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


# The balance loss


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_the_balance_loss_is_the_mean_over_blocks_and_reaches_every_router(checkpoint_blocks: bool) -> None:
    model, trace = small(checkpoint_blocks=checkpoint_blocks, balance_weight=0.5), Trace()
    model(torch.randint(11, (2, 9)), trace=trace)
    losses = []
    for block in range(2):
        probabilities = trace.signals[f"blocks.{block}.mixer.router_probabilities"].flatten(0, 1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1)
        losses.append(0.5 * 4 * (chosen.mean(0) * probabilities.mean(0)).sum())
    assert list(trace.losses) == ["balance"]
    torch.testing.assert_close(trace.losses["balance"], sum(losses) / 2)
    trace.losses["balance"].backward()
    assert all(mixer.router.weight.grad.abs().max() > 0 for mixer in model.mixtures())


def test_without_a_balance_loss_there_is_none() -> None:
    trace = Trace()
    small(balance=None)(torch.randint(11, (2, 9)), trace=trace)
    assert not trace.losses


# Checkpoints of flash-linear-attention


def as_fla(model: MoM) -> dict[str, Tensor]:
    """The weights of a model, split and named as there."""
    own, parts = model.state_dict(), {}
    parts["model.embeddings.weight"], parts["model.norm.weight"] = own["embedding.weight"], own["norm.weight"]
    parts["lm_head.weight"] = own["embedding.weight" if model.head is None else "head.weight"]
    for index, mixer in enumerate(model.mixtures()):
        block = {name.removeprefix(f"blocks.{index}."): value for name, value in own.items()}
        layer = {"attn_norm.weight": block["mixer_norm.weight"], "mlp_norm.weight": block["ffn_norm.weight"]}
        layer |= {f"mlp.{name}_proj.weight": block[f"ffn.{name}.weight"] for name in ("gate", "up", "down")}
        attn = {"gate": "router", "q_proj": "query", "g_proj": "output_gate", "o_norm": "norm", "o_proj": "out"}
        layer |= {f"attn.{theirs}.weight": block[f"mixer.{ours}.weight"] for theirs, ours in attn.items()}
        layer |= {"attn.A_log": block["mixer.rule.decay_log"], "attn.dt_bias": block["mixer.rule.step_bias"]}
        filters = block["mixer.conv.weight"][:, None].split(mixer.widths)
        layer |= {f"attn.{name}_conv1d.weight": weight for name, weight in zip("qkv", filters, strict=True)}
        for m in range(5):
            k, v = block[f"mixer.key_value.{m}.weight"].split(mixer.widths[1:])
            a, b = block[f"mixer.gates.{m}.weight"].chunk(2)
            for letter, weight in zip("kvab", (k, v, a, b), strict=True):
                layer[f"attn.{letter}_proj.{m}.weight" if m < 4 else f"attn.shared_{letter}.weight"] = weight
        parts |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    return {name: value.clone() for name, value in parts.items()}


def other(**options: Any) -> MoM:
    """A model with no weight in common with ``small``'s."""
    model = small(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_an_fla_checkpoint_is_the_model(tie_embeddings: bool) -> None:
    saved, model = other(tie_embeddings=tie_embeddings), small(tie_embeddings=tie_embeddings)
    tokens = torch.randint(11, (2, 9))
    assert not torch.equal(model(tokens)[0], saved(tokens)[0])
    model.load_fla_state_dict(as_fla(saved))
    assert torch.equal(model(tokens)[0], saved(tokens)[0])


def test_a_tied_checkpoint_may_leave_the_head_out() -> None:
    saved, model = other(), small()
    names = as_fla(saved)
    del names["lm_head.weight"]
    model.load_fla_state_dict(names)
    assert torch.equal(model.embedding.weight, saved.embedding.weight)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"lm_head.weight": torch.zeros(11, 16)}, "lm_head.weight is not the embeddings; .*tie_embeddings=False"),
        ({"tie_embeddings": False}, {"lm_head.weight": None}, r"missing \['lm_head.weight'\], unknown \[\]"),
        ({}, {"model.layers.1.mlp_norm.weight": None}, r"missing \['model.layers.1.mlp_norm.weight'\]"),
        ({}, {"model.layers.1.attn.A_log": None}, r"missing \['A_log'\]"),
        ({}, {"model.layers.2.mlp_norm.weight": torch.zeros(16)}, r"unknown \['model.layers.2.mlp_norm.weight'\]"),
        ({}, {"model.norm.weight": torch.zeros(15)}, r"norm.weight has shape \(15,\) in the checkpoint, \(16,\)"),
        ({"attention_layers": [1]}, {}, r"attention_layers=\[1\] exist in no fla checkpoint"),
        ({"conv": "input"}, {}, "conv='input' exist in no fla checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_leaves_the_weights(
    options: dict[str, Any], change: dict[str, Tensor | None], message: str
) -> None:
    heads = {"attention": {"num_heads": 2}} if "attention_layers" in options else {}
    state_dict = {name: value for name, value in (as_fla(other()) | change).items() if value is not None}
    model = small(**options, **heads)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_fla_state_dict(state_dict)
    assert all(map(torch.equal, before, model.parameters()))
