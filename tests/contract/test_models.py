"""Every registered model keeps the contract (docs/contract.md), in its smallest size and with other options."""

from typing import Any

import pytest

from memzoo.arch.registry import create_model, list_models, model_card
from tests.contract.checks import CHECKS, Part, cases

# Borders of chunks, segments and windows within a few tokens.
SMALL = {"depth": 2, "chunk_size": 4, "window": 5, "segment_size": 6, "memory": {"chunk_size": 4}}
# Options that change what a state holds or how a call is computed; each set is tested like a model of its own.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "transformer_tiny": {
        "window": {"window": 5, "tie_embeddings": False, "qk_norm": True, "num_kv_heads": 2},
        "checkpointed": {"checkpoint_blocks": True},
    },
    "titans_lmm_tiny": {"recomputed": {"checkpoint_chunks": 2}},
}


def model_part(name: str, label: str = "", **options: Any) -> Part:
    """The named model with fewer blocks and shorter chunks, where it has such arguments."""
    card, whole = model_card(name), create_model(name, **options)
    overrides = {key: value for key, value in SMALL.items() if whole.config.get(key) is not None} | options
    return Part(
        f"{name}+{label}" if label else name,
        "model",
        lambda: create_model(name, **overrides),
        "constant" if whole.config.get("window") else card.state_size,
        routed=card.routed,
        skips=card.skips,
        vocab_size=whole.vocab_size,
    )


PARTS = [model_part(name) for name in list_models("*_tiny")]
PARTS += [model_part(name, label, **options) for name, sets in VARIANTS.items() for label, options in sets.items()]
CASES = cases(PARTS)


@pytest.mark.parametrize(("part", "name"), CASES, ids=[f"{part.name}-{name}" for part, name in CASES])
def test_model(part: Part, name: str) -> None:
    if reason := part.exempt.get(name):
        pytest.skip(reason)
    CHECKS["model"][name](part)
