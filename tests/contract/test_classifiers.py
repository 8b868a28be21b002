"""Every registered classifier keeps its contract (docs/contract.md), also with other options."""

from typing import Any

import pytest

from memzoo.arch.registry import create_model, list_models, model_card
from tests.contract.checks import CHECKS, Part, cases

NAMES = [name for name in list_models() if model_card(name).task == "classification"]
# Options that change what a code is or how it is read; each set is tested like a model of its own.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dkvb_digits": {
        "topk": {"bottleneck_options": {"topk": 2, "standardize": True, "value_init": "normal"}},
    },
}


def classifier_part(name: str, label: str = "", **options: Any) -> Part:
    """The named classifier with fewer codebooks."""
    small = {"num_codebooks": 5, "num_pairs": 12}
    own = f"{name}+{label}" if label else name
    return Part(own, "classifier", lambda: create_model(name, **small | options), skips=model_card(name).skips)


PARTS = [classifier_part(name) for name in NAMES]
PARTS += [classifier_part(name, label, **options) for name, sets in VARIANTS.items() for label, options in sets.items()]
CASES = cases(PARTS)


@pytest.mark.parametrize(("part", "name"), CASES, ids=[f"{part.name}-{name}" for part, name in CASES])
def test_classifier(part: Part, name: str) -> None:
    if reason := part.exempt.get(name):
        pytest.skip(reason)
    CHECKS["classifier"][name](part)
