"""Every registered model keeps the contract (docs/contract.md), in its smallest size and with other options."""

from typing import Any

import pytest

from memzoo.arch.registry import create_model, list_models, model_card
from tests.contract.checks import CHECKS, Part, cases
from tests.contract.fetched import ReadingLM

# Borders of chunks, segments and windows within a few tokens.
SMALL = {"depth": 2, "chunk_size": 4, "window": 5, "segment_size": 6, "memory": {"chunk_size": 4}}
# What is computed does not depend on how wide it is: narrow, with several heads everywhere.
NARROW = {"dim": 16, "num_heads": 4, "hidden_dim": 24}
MATRIX = NARROW | {"num_heads": 2, "head_dim": 6}
TITANS = NARROW | {"num_heads": 2, "head_dim": 8}
# Of equal blocks one is enough: what is between two, other models with the same ``CausalLM`` have.
ONE_BLOCK = TITANS | {"depth": 1}
HYBRID = NARROW | {"num_kv_heads": 2, "head_dim": 4}
BMOJO = HYBRID | {"ssm_options": {"num_heads": 2, "head_dim": 8, "state_dim": 6, "chunk_size": 4}}
# Models whose layers depend on their depth are deep enough for one of every kind.
OWN: dict[str, dict[str, Any]] = {
    "transformer_tiny": NARROW,
    "gpt_tiny": NARROW,
    "hier_memory_tiny": NARROW,
    "gmt_tiny": {"dim": 16, "navigation_dim": 8},
    "gated_deltanet_tiny": MATRIX,
    "mom_tiny": MATRIX,
    "mamba_tiny": {"dim": 16, "state_dim": 3, "step_rank": 3},
    "mamba2_tiny": {"dim": 16, "num_heads": 4, "head_dim": 8, "state_dim": 6},
    "titans_lmm_tiny": TITANS,
    "titans_linear_online_tiny": ONE_BLOCK,
    "titans_mac_tiny": ONE_BLOCK,
    "titans_mag_tiny": ONE_BLOCK,
    "titans_mal_tiny": ONE_BLOCK,
    "sambay_tiny": HYBRID | {"depth": 8, "ssm_options": {"state_dim": 3, "chunk_size": 4}},
    "samba_tiny": HYBRID | {"depth": 4, "ssm_options": {"state_dim": 3, "chunk_size": 4}},
    "transformerpp_tiny": HYBRID | {"depth": 4, "self_pattern": "local_global"},
    "bmojo_tiny": BMOJO | {"num_eidetic": 10},  # twice the window: no chunk takes more than half of the slots
    "bmojo_f_tiny": BMOJO | {"depth": 1},
}
# Options that change what a state holds or how a call is computed; each set is tested like a model of its own.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "transformer_tiny": {
        "window": {"window": 5, "tie_embeddings": False, "qk_norm": True, "num_kv_heads": 2},
        "checkpointed": {"checkpoint_blocks": True},
    },
    "gpt_tiny": {
        "attention_only": {"hidden_dim": 0, "context": 120, "tie_embeddings": False},
        "checkpointed": {"checkpoint_blocks": True},
    },
    "gmt_tiny": {
        "deferred": {
            "cell": {"write_back": "deferred", "edge_mode": "logprob", "hops": 2, "channel_gate": True},
            "tie_embeddings": False,
            "checkpoint_blocks": True,
        },
    },
    "hier_memory_tiny": {
        "checkpointed": {"num_heads": 3, "head_dim": 6, "tie_embeddings": False, "checkpoint_blocks": True},
    },
    "titans_lmm_tiny": {"recomputed": {"checkpoint_chunks": 2, "depth": 1}},
    "bmojo_tiny": {
        "gated_deltanet": {
            "depth": 1,
            "ssm": "gated_deltanet",
            "ssm_options": {"num_heads": 2, "head_dim": 4, "chunk_size": 4},
            "fading_stride": 2,
            "tie_projections": False,
            "eidetic_positions": "clamp",
            "segment_bias": True,
            "tie_embeddings": False,
            "checkpoint_blocks": True,
        },
    },
    "sambay_tiny": {
        "differential": {"differential": True, "gmu_source": "attention", "attention_bias": True},
        "mlp_memory": {"cross": "gmu", "gmu_source": "mlp", "norm": "layernorm", "tie_embeddings": False},
        "mamba2": {
            "self_pattern": "ssm",
            "ssm": "mamba2",
            "cross": "attention",
            "rotary_base": 100.0,
            "checkpoint_blocks": True,
            "ssm_options": {"num_heads": 2, "head_dim": 8, "state_dim": 6, "chunk_size": 4},
        },
        "gated_deltanet": {
            "ssm": "gated_deltanet",
            "ssm_options": {"num_heads": 2, "head_dim": 4, "value_dim": 6, "chunk_size": 4},
        },
    },
}


def model_part(name: str, label: str = "", **options: Any) -> Part:
    """The named model with fewer blocks and shorter chunks, where it has such arguments; a window bounds its state."""
    card, whole = model_card(name), create_model(name, **options)
    small = {key: value for key, value in SMALL.items() if whole.config.get(key) is not None}
    overrides = small | OWN.get(name, {}) | options
    return Part(
        f"{name}+{label}" if label else name,
        "model",
        lambda: create_model(name, **overrides),
        "constant" if options.get("window") else card.state_size,
        routed=card.routed,
        skips=card.skips,
        vocab_size=whole.vocab_size,
    )


PARTS = [model_part(name) for name in list_models("*_tiny")]
PARTS += [Part("hier_memory_tiny+fetched", "model", ReadingLM, "grows", vocab_size=256)]
PARTS += [model_part(name, label, **options) for name, sets in VARIANTS.items() for label, options in sets.items()]
# Compiling such blocks takes long: once for their wiring; their layers are compiled one by one (test_layers.py).
CASES = [
    (part, name)
    for part, name in cases(PARTS)
    if not (part.name.startswith(("sambay_tiny+", "bmojo_tiny+")) and name == "it_compiles_as_one_graph")
]


def slow_if_it_compiles(name: str) -> list[pytest.MarkDecorator]:
    """Compiling a model takes up to half a minute, and `make test` compiles its layers."""
    return [pytest.mark.slow] if name == "it_compiles_as_one_graph" else []


@pytest.mark.parametrize(
    ("part", "name"),
    [pytest.param(part, name, marks=slow_if_it_compiles(name), id=f"{part.name}-{name}") for part, name in CASES],
)
def test_model(part: Part, name: str) -> None:
    if reason := part.exempt.get(name):
        pytest.skip(reason)
    CHECKS["model"][name](part)
