"""Gated DeltaNet as a baseline: sizes, options that arrive, and one memory of a mixture."""

import inspect
from typing import Any

import pytest
import torch

from memzoo.arch import GatedDeltaNetLM, MoM, create_model, gated_deltanet, part_sizes
from memzoo.layers import GatedDeltaNet, MatrixMemory

SIZES = {  # vocabulary, width, depth, query and key width, width of a head, hidden width
    "gated_deltanet_tiny": (256, 128, 4, 64, 32, 576),
    "gated_deltanet_340m": (32000, 1024, 24, 1024, 256, 2048),
}
PARAMETERS = {"gated_deltanet_tiny": 1_087_760, "gated_deltanet_340m": 310_140_096}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_announced_ones(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    vocabulary, dim, depth, keys, head, hidden = SIZES[name]
    heads = keys // head
    mixer = 5 * dim * keys + 2 * dim * heads + 3 * 4 * keys + 2 * heads + head  # q, k, v, gate, output; gates; ...
    expected = vocabulary * dim + depth * (mixer + 3 * dim * hidden + 2 * dim) + dim
    assert model.num_parameters() == expected == PARAMETERS[name]
    sizes = part_sizes(model)
    assert sum(size.parameters for size in sizes) == expected
    assert sum(size.state_bytes for size in sizes) == model.initial_state(1).nbytes


def test_every_option_of_the_layer_is_one_of_the_model_with_its_default() -> None:
    own, shared, model = (inspect.signature(cls).parameters for cls in (GatedDeltaNet, MatrixMemory, GatedDeltaNetLM))
    layer = {**shared, **own}
    for name in layer.keys() - {"dim", "rule_options", "options"}:
        assert model[name].default == (1e-6 if name == "norm_eps" else layer[name].default), name


def test_options_arrive_at_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict(
        num_heads=2, head_dim=6, value_dim=10, num_value_heads=4, negative_eigenvalues=True, conv_width=None,
        output_gate=False, norm_eps=1e-3, chunk_size=8, backend="torch",
    )  # fmt: skip
    calls: list[dict[str, Any]] = []

    def build(dim: int, **options: Any) -> GatedDeltaNet:
        calls.append({"dim": dim, **options})
        return GatedDeltaNet(dim)

    monkeypatch.setattr(gated_deltanet, "GatedDeltaNet", build)
    model = GatedDeltaNetLM(256, 128, 2, hidden_dim=24, checkpoint_blocks=True, **given)
    assert calls == [{"dim": 128, **given}] * 2
    assert model.blocks[0].ffn.down.in_features == 24
    assert model.checkpoint_blocks


def test_it_is_a_mixture_of_one_memory() -> None:
    options: dict[str, Any] = dict(vocab_size=11, dim=16, depth=2, num_heads=2, head_dim=4, hidden_dim=24)
    torch.manual_seed(0)
    one = GatedDeltaNetLM(**options).double()
    mixture = MoM(**options, num_memories=1, top_k=1, shared=False).double()
    renamed = {name.replace("key_value.0", "kv").replace("gates.0", "gates"): name for name in mixture.state_dict()}
    weights = {}
    for name, weight in one.state_dict().items():
        if name.endswith("query_key_value.weight"):
            stem = name.removesuffix("query_key_value.weight")
            weights[f"{stem}query.weight"], weights[f"{stem}key_value.0.weight"] = weight[:8], weight[8:]
        else:
            weights[renamed[name]] = weight
    missing, unexpected = mixture.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([f"blocks.{block}.mixer.router.weight" for block in range(2)], [])
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(mixture(tokens)[0], one(tokens)[0], rtol=0, atol=1e-12)
