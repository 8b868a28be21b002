"""The named models: sizes, options that arrive, states, and state-dict keys that do not move.

The golden files change only on purpose: ``python tests/arch/test_models.py`` writes them again.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memzoo.arch import (
    TitansLMM,
    Transformer,
    create_model,
    list_models,
    model_card,
    model_entry,
    part_sizes,
    titans_lmm,
    transformer,
)
from memzoo.arch.causal_lm import residual_outputs
from memzoo.layers.attention import SlidingWindowAttention
from memzoo.layers.neural_memory import NeuralMemory

GOLDEN = Path(__file__).parent / "golden"
TINY = list_models("*_tiny")
SAVED = [*TINY, *(name for name in list_models() if model_card(name).task == "classification")]
SIZES = {  # vocab_size, dim, depth, hidden width of the feed-forward
    "170m": (32000, 768, 12, 2048),
    "340m": (32000, 1024, 24, 2752),
    "760m": (32000, 1536, 24, 4096),
}
PARAMETERS = {
    "transformer_tiny": 1_082_496,
    "transformer_170m": 109_529_856,
    "transformer_340m": 336_380_928,
    "transformer_760m": 728_704_512,
    "titans_lmm_tiny": 1_092_248,
    "titans_lmm_170m": 119_419_056,
    "titans_lmm_340m": 369_338_496,
    "titans_lmm_760m": 797_899_968,
    "titans_linear_online_tiny": 1_092_248,
    "titans_linear_online_170m": 117_649_584,
    "titans_linear_online_340m": 364_619_904,
    "titans_linear_online_760m": 790_822_080,
    "titans_mac_tiny": 1_084_300,
    "titans_mac_170m": 154_974_384,
    "titans_mac_340m": 495_609_984,
    "titans_mac_760m": 1_081_679_040,
    "titans_mag_tiny": 1_084_300,
    "titans_mag_170m": 154_974_384,
    "titans_mag_340m": 495_609_984,
    "titans_mag_760m": 1_081_679_040,
    "titans_mal_tiny": 1_081_996,
    "titans_mal_170m": 147_887_280,
    "titans_mal_340m": 470_419_584,
    "titans_mal_760m": 1_025_019_072,
}


def transformer_parameters(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    attention = 4 * dim**2
    return vocab_size * dim + depth * (attention + 3 * dim * hidden + 2 * dim) + dim


def memory_parameters(dim: int, memory_depth: int = 2) -> int:
    heads = dim // 64
    projections = 5 * dim**2  # queries, keys, values, output gate, output
    convolution = 3 * dim * 4
    gates = 3 * heads * (dim + 1)
    initial_weights = heads * 64 * (64 if memory_depth == 1 else 2 * 128)
    return projections + convolution + gates + initial_weights + dim  # and the output's norm


def titans_parameters(mixer: int, vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    return vocab_size * dim + depth * (mixer + 3 * dim * hidden + 2 * dim) + dim


def lmm_parameters(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    return titans_parameters(memory_parameters(dim), vocab_size, dim, depth, hidden)


def online_parameters(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    return titans_parameters(memory_parameters(dim, 1), vocab_size, dim, depth, hidden)


def gated_parameters(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    persistent_tokens = (4 if dim == 128 else 16) * dim
    mixer = memory_parameters(dim) + 4 * dim**2 + persistent_tokens + 2 * dim + dim**2  # the gate's norms, the output
    return titans_parameters(mixer, vocab_size, dim, depth, hidden)


def mal_parameters(vocab_size: int, dim: int, depth: int, hidden: int) -> int:
    persistent_tokens = (4 if dim == 128 else 16) * dim
    mixer = memory_parameters(dim) + 4 * dim**2 + persistent_tokens + dim  # a norm more than in one half
    return titans_parameters(mixer, vocab_size, dim, depth, hidden)


FAMILIES = {  # formula; depth and hidden width of the tiny one
    "transformer": (transformer_parameters, 4, 512),
    "titans_lmm": (lmm_parameters, 4, 384),
    "titans_linear_online": (online_parameters, 4, 448),
    "titans_mac": (gated_parameters, 2, 848),
    "titans_mag": (gated_parameters, 2, 848),
    "titans_mal": (mal_parameters, 2, 888),
}


def meta(name: str, **overrides: Any) -> Any:
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.mark.parametrize("size", ["tiny", *SIZES])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_the_announced_ones(family: str, size: str) -> None:
    formula, depth, hidden = FAMILIES[family]
    name = f"{family}_{size}"
    model = meta(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters() == formula(*SIZES.get(size, (256, 128, depth, hidden))) == PARAMETERS[name]


def test_the_tiny_models_are_of_equal_size() -> None:
    sizes = [meta(name).num_parameters() for name in TINY]
    assert max(sizes) / min(sizes) < 1.02


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parts_of_a_model_add_up(name: str) -> None:
    model = meta(name)
    sizes = part_sizes(model)
    assert sum(size.parameters for size in sizes) == model.num_parameters()
    assert sum(size.state_bytes for size in sizes) == model.initial_state(1).nbytes
    assert [(size.part, size.count) for size in sizes if size.part in ("Embedding", "SwiGLU", "RMSNorm")] == [
        ("Embedding", 1),
        ("RMSNorm", sum(1 if block.mixer.reads_residual else 2 for block in model.blocks) + 1),
        ("SwiGLU", len(model.blocks)),
    ]


def test_the_parts_of_an_untied_model_include_its_head() -> None:
    sizes = part_sizes(meta("transformer_tiny", tie_embeddings=False))
    assert [(size.part, size.parameters) for size in sizes if size.part in ("Embedding", "Linear")] == [
        ("Embedding", 256 * 128),
        ("Linear", 256 * 128),
    ]


def test_parts_measure_the_state_they_are_given() -> None:
    model = create_model("transformer_tiny", depth=1)
    _, state = model(torch.zeros(2, 10, dtype=torch.long))
    keys_and_values = 2 * 10 * 128 * 4
    (attention,) = [size for size in part_sizes(model, state) if size.part == "Attention"]
    assert keys_and_values <= attention.state_bytes <= 2 * keys_and_values


@pytest.mark.parametrize("name", ["titans_lmm_tiny", "titans_lmm_340m"])
def test_a_titans_state_is_three_copies_of_the_memory_and_the_convolution_s_tail(name: str) -> None:
    model = meta(name)
    floats = model.dim // 64 * (64 * 128 + 128 * 64) * 3 + 3 * 3 * model.dim
    counters = 2 * 8
    assert model.initial_state(5).nbytes == 5 * len(model.blocks) * (4 * floats + counters)


def test_every_option_of_the_memory_is_an_option_of_the_model_with_its_default() -> None:
    layer, model = (inspect.signature(cls).parameters for cls in (NeuralMemory, TitansLMM))
    for name in layer.keys() - {"dim"}:
        assert model[name].default == layer[name].default, name


@pytest.mark.parametrize(
    ("name", "module", "layer", "given"),
    [
        (
            "titans_lmm_tiny",
            titans_lmm,
            "NeuralMemory",
            {
                "num_heads": 8, "head_dim": 16, "memory_depth": 3, "memory_expansion": 4.0, "chunk_size": 16,
                "activation": "gelu", "momentum": False, "forgetting": False, "conv_width": None,
                "max_learning_rate": 0.5, "loss_scale": 2.0, "read": "pre", "output_gate": False,
                "output_norm": False, "decay_to_init": True, "max_gradient_norm": 1.0, "residual_norm": True,
                "gate_groups": 2, "lookahead_values": True, "implicit_step": True, "objective_window": 5,
                "checkpoint_chunks": 3, "backend": "torch",
            },
        ),
        (
            "transformer_tiny",
            transformer,
            "SlidingWindowAttention",
            {
                "num_heads": 8, "head_dim": 16, "num_kv_heads": 2, "window": 7, "rotary_base": None, "qk_norm": True,
                "backend": "torch",
            },
        ),
    ],
)  # fmt: skip
def test_options_arrive_at_the_layers(
    name: str, module: Any, layer: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def build(dim: int, **options: Any) -> NeuralMemory:
        calls.append({"dim": dim, **options})
        return NeuralMemory(dim)

    monkeypatch.setattr(module, layer, build)
    model = create_model(name, depth=2, hidden_dim=24, checkpoint_blocks=True, **given)
    assert calls == [{"dim": 128, **given}] * 2
    assert model.blocks[0].ffn.down.in_features == 24
    assert model.checkpoint_blocks


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_how_many_blocks_are_computed_again_arrives(name: str) -> None:
    assert "checkpoint_blocks" in inspect.signature(model_entry(name).architecture).parameters
    with torch.device("meta"):
        assert create_model(name, checkpoint_blocks=2).checkpoint_blocks == 2


MEMORY = {"chunk_size": 8, "momentum": False}
PLACED = {"num_persistent_tokens": 3, "num_heads": 4, "head_dim": 16, "rotary_base": None, "qk_norm": True}
OWN = {
    "titans_mac": {
        "segment_size": 8, "gate": "convex", "literal": True, "retrieved_positions": False, "shared_query": False,
        "residual": True,
    },
    "titans_mag": {"window": 8, "gate": "convex", "num_kv_heads": 2, "backend": "torch"},
    "titans_mal": {"window": 8, "num_kv_heads": 2, "backend": "torch"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "layer"), zip(OWN, ("MemoryAsContext", "MemoryAsGate", "MemoryAsLayer"), strict=True))
def test_options_of_attention_and_memory_arrive_at_the_layer(
    name: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = importlib.import_module(f"memzoo.arch.{name}"), []
    mixer, given = getattr(module, layer), PLACED | OWN[name] | {"memory": MEMORY}
    architecture = model_entry(f"{name}_tiny").architecture
    taken, offered = (inspect.signature(cls).parameters for cls in (mixer, architecture))
    assert taken.keys() - {"dim"} == given.keys()
    assert all(offered[option].default == taken[option].default for option in given)

    def build(dim: int, **options: Any) -> nn.Module:
        calls.append({"dim": dim, **options})
        return mixer(dim)

    monkeypatch.setattr(module, layer, build)
    architecture(256, 128, 2, **given)
    assert calls == [{"dim": 128, **given}] * 2


def test_a_window_makes_the_baseline_s_state_constant() -> None:
    model = Transformer(16, 16, 1, num_heads=2, window=4)
    assert isinstance(model.blocks[0].mixer, SlidingWindowAttention)
    tokens = torch.zeros(1, 30, dtype=torch.long)
    assert model(tokens)[1].nbytes == model(tokens[:, :10])[1].nbytes


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith(("gmt_", "gpt_", "mamba_", "mamba2_"))])
def test_both_halves_of_every_block_start_small(name: str) -> None:
    """Mamba, GPT and GMT start as published: test_mamba_lm.py, test_gpt.py, test_graph_memory_transformer.py."""
    torch.manual_seed(0)
    for block in create_model(name, depth=8).blocks:
        outputs = block.mixer.residual_outputs() if hasattr(block.mixer, "residual_outputs") else [block.mixer.out]
        branches = 8 * (len(outputs) + 1)
        for projection in (*outputs, *residual_outputs(block.ffn)):
            assert projection.weight.std().item() == pytest.approx(0.02 * branches**-0.5, rel=0.05)


@pytest.mark.parametrize("name", SAVED)
def test_state_dict_keys_and_shapes_do_not_move(name: str) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert shapes(meta(name)) == expected


def test_every_tiny_model_and_classifier_has_a_golden_file() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(SAVED)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def write_golden() -> None:
    for name in SAVED:
        lines = (f"  {json.dumps(key)}: {shape}" for key, shape in shapes(meta(name)).items())
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_golden()
