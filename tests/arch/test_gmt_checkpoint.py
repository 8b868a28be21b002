"""Checkpoints of the official code: its names and shapes, loaded, mean its equations; others are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.arch import GraphMemoryTransformer

V, D, L, H, T, S, N = 13, 8, 2, 2, 10, 6, 5


def model(**options: Any) -> GraphMemoryTransformer:
    sizes = dict(num_heads=H, context=T, num_slots=S, navigation_dim=N)
    return GraphMemoryTransformer(V, D, L, **sizes | options).double().eval()


def official(seed: int = 0) -> dict[str, Tensor]:
    """A random state as the official GMTV7 names and shapes it."""
    torch.manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    state = {
        "temp": torch.tensor(0.3, dtype=torch.float64),
        "embed.weight": randn(V, D),
        "pos_embed.weight": randn(T, D),
    }
    for block in (f"blocks.{index}" for index in range(L)):
        for norm in ("ln1", "ln2", "cell.norm_C", "cell.norm_disp"):
            state |= {f"{block}.{norm}.weight": randn(D), f"{block}.{norm}.bias": randn(D)}
        state |= {f"{block}.attn.qkv.weight": randn(3 * D, D), f"{block}.attn.out_proj.weight": randn(D, D)}
        cell = {"C": randn(S, D), "E": randn(S, S), "gate": randn(), "write_momentum": randn()}
        cell |= {"Q_proj.weight": randn(N, D), "K_proj.weight": randn(N, D)}
        cell |= {"usage": randn(S).softmax(0), "centroid_age": torch.arange(S, dtype=torch.float64)}
        cell |= {"diag_mask": torch.zeros(S, S).fill_diagonal_(-torch.inf)}
        state |= {f"{block}.cell.{name}": value for name, value in cell.items()}
    state |= {"norm_final.weight": randn(D), "norm_final.bias": randn(D)}
    return state | {"lm_head.weight": state["embed.weight"]}


def logits(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The equations of the spec, section 3, with the official names."""
    batch, time = tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    h = w["embed.weight"][tokens] + w["pos_embed.weight"][:time]
    for block in (f"blocks.{index}" for index in range(L)):
        qkv = norm(h, f"{block}.ln1") @ w[f"{block}.attn.qkv.weight"].T
        q, k, v = (x.reshape(batch, time, H, D // H).transpose(1, 2) for x in qkv.split(D, -1))
        scores = q @ k.mT / (D // H) ** 0.5 + torch.full((time, time), -torch.inf).triu(1)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, D) @ w[f"{block}.attn.out_proj.weight"].T
        x, cell = norm(h, f"{block}.ln2"), f"{block}.cell"
        centroids = norm(w[f"{cell}.C"], f"{cell}.norm_C")
        similarity = F.cosine_similarity(x[..., None, :], centroids, dim=-1)
        source = (1 / (1 - similarity).clamp(min=0.01) / w["temp"]).softmax(-1)
        prior = source @ (w[f"{cell}.E"] + w[f"{cell}.diag_mask"]).softmax(-1)
        queries, keys = x @ w[f"{cell}.Q_proj.weight"].T, centroids @ w[f"{cell}.K_proj.weight"].T
        target = (prior + queries @ keys.T / N**0.5).softmax(-1)
        movement = target @ centroids - source @ centroids
        h = h + torch.sigmoid(w[f"{cell}.gate"]) * norm(movement, f"{cell}.norm_disp")
    return norm(h, "norm_final") @ w["embed.weight"].T


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_official_checkpoint_means_its_equations(wrapper: str | None, compiled: bool) -> None:
    state, loaded = official(), model()
    given: dict[str, Any] = {("_orig_mod." * compiled) + name: value for name, value in state.items()}
    loaded.load_gmt_state_dict(given if wrapper is None else {wrapper: given, "opt": {}, "step": 3})
    tokens = torch.randint(V, (3, T))
    torch.testing.assert_close(loaded(tokens)[0], logits(state, tokens), rtol=0, atol=1e-10)
    for index, cell in enumerate(loaded.cells()):
        assert torch.equal(cell.usage, state[f"blocks.{index}.cell.usage"])
        assert torch.equal(cell.age.double(), state[f"blocks.{index}.cell.centroid_age"])
        assert cell.momentum.item() == state[f"blocks.{index}.cell.write_momentum"].item()
        assert cell.temperature == state["temp"]


def test_a_model_loads_what_it_is_in_the_official_names() -> None:
    torch.manual_seed(1)
    saved, loaded = model(), model()
    own = saved.state_dict()
    state = {"temp": own["blocks.0.ffn.temperature"], "embed.weight": own["embedding.weight"]}
    state |= {"pos_embed.weight": own["positions.weight"]}
    state |= {f"norm_final.{part}": own[f"norm.{part}"] for part in ("weight", "bias")}
    renamed = {
        "ln1": "mixer_norm",
        "ln2": "ffn_norm",
        "cell.norm_C": "ffn.centroid_norm",
        "cell.norm_disp": "ffn.movement_norm",
    }
    single = {"C": "centroids", "E": "edges", "gate": "gate", "write_momentum": "momentum", "usage": "usage"}
    single |= {"centroid_age": "age", "Q_proj.weight": "query.weight", "K_proj.weight": "key.weight"}
    for block in (f"blocks.{index}" for index in range(L)):
        for theirs, ours in renamed.items():
            state |= {f"{block}.{theirs}.{part}": own[f"{block}.{ours}.{part}"] for part in ("weight", "bias")}
        state |= {f"{block}.cell.{theirs}": own[f"{block}.ffn.{ours}"] for theirs, ours in single.items()}
        parts = [own[f"{block}.mixer.{part}.weight"] for part in ("query", "key", "value")]
        state |= {f"{block}.attn.qkv.weight": torch.cat(parts)}
        state |= {f"{block}.attn.out_proj.weight": own[f"{block}.mixer.out.weight"]}
    assert state.keys() | {"lm_head.weight"} | {f"blocks.{i}.cell.diag_mask" for i in range(L)} == official().keys()
    loaded.load_gmt_state_dict(state)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_buffers_may_be_missing_and_are_kept() -> None:
    state, loaded = official(), model()
    for index, cell in enumerate(loaded.cells()):
        cell.temperature.fill_(0.1 + index)
        cell.usage.copy_(torch.randn(S).softmax(0))
        cell.age.fill_(3 + index)
    kept = {name: value.clone() for name, value in loaded.named_buffers()}
    buffers = ("temp", "usage", "centroid_age", "diag_mask")
    loaded.load_gmt_state_dict({name: value for name, value in state.items() if not name.endswith(buffers)})
    assert {name.rpartition(".")[2] for name in kept} == {"temperature", "usage", "age"}
    for name, value in loaded.named_buffers():
        assert torch.equal(value, kept[name]), name
    assert torch.equal(loaded.blocks[1].ffn.centroids, state["blocks.1.cell.C"])


@pytest.mark.parametrize("missing", ["embed.weight", "lm_head.weight"])
def test_tied_embeddings_go_by_either_name(missing: str) -> None:
    state, loaded = official(), model()
    loaded.load_gmt_state_dict({name: value for name, value in state.items() if name != missing})
    assert torch.equal(loaded.embedding.weight, state["embed.weight"])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_may_be_a_scalar_or_a_vector_of_one(shape: tuple[int, ...]) -> None:
    scalars = ("temp", "cell.gate", "cell.write_momentum")
    state, loaded = official(), model()
    given = {name: value.reshape(shape) if name.endswith(scalars) else value for name, value in state.items()}
    loaded.load_gmt_state_dict(given)
    for index, cell in enumerate(loaded.cells()):
        found = cell.temperature.item(), cell.gate.item(), cell.momentum.item()
        names = ("temp", f"blocks.{index}.cell.gate", f"blocks.{index}.cell.write_momentum")
        assert found == tuple(state[name].item() for name in names)


def test_an_untied_model_takes_the_head() -> None:
    state, loaded = official() | {"lm_head.weight": torch.randn(V, D, dtype=torch.float64)}, model(tie_embeddings=False)
    loaded.load_gmt_state_dict(state)
    assert torch.equal(loaded.head.weight, state["lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (
            {},
            {"ln_f.weight": torch.zeros(D)},
            r"an official GMT with these options: none missing, 1 names \(ln_f.weight\) unknown; build the model with",
        ),
        ({}, {"embed.weight": None, "lm_head.weight": None}, r"1 names \(embed.weight\) missing, none unknown"),
        (
            {},
            {f"blocks.1.cell.{n}": None for n in ("C", "E", "gate", "Q_proj.weight")},
            r"4 names \(.*, \.\.\.\) missing",
        ),
        ({}, {"blocks.2.cell.C": torch.zeros(S, D)}, r"none missing, 1 names \(blocks.2.cell.C\) unknown"),
        ({}, {"blocks.0.cell.E": torch.zeros(S, 2)}, r"blocks.0.cell.E has shape \(6, 2\) in the checkpoint, \(6, 6\)"),
        ({}, {"blocks.0.attn.qkv.weight": torch.zeros(2 * D, D)}, r"qkv.weight has shape \(16, 8\) .*, \(24, 8\) in"),
        ({}, {"temp": torch.zeros(2)}, r"temp has shape \(2,\) in the checkpoint, \(\) in the model"),
        ({}, {"lm_head.weight": torch.zeros(V, D)}, "lm_head.weight is not the embeddings; .*tie_embeddings=False"),
        ({"tie_embeddings": False}, {"lm_head.weight": None}, r"1 names \(lm_head.weight\) missing"),
        ({"context": 4}, {}, r"pos_embed.weight has shape \(10, 8\) in the checkpoint, \(4, 8\) in the model"),
        ({"cell": {"channel_gate": True}}, {}, r"blocks.0.cell.gate has shape \(\) in the checkpoint, \(8,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_leaves_the_weights(
    options: dict[str, Any], change: dict[str, Tensor | None], message: str
) -> None:
    own = model(**options)
    state = {name: value for name, value in (official() | change).items() if value is not None}
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        own.load_gmt_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
