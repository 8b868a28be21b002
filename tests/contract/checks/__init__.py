"""The contract as checks, grouped by what they look at; importing this package fills ``CHECKS``."""

from tests.contract.checks import bottleneck, classifier, layer, model, module, sequence, side, state
from tests.contract.checks.core import CHECKS, Part, cases, check

__all__ = [
    "CHECKS",
    "Part",
    "bottleneck",
    "cases",
    "check",
    "classifier",
    "layer",
    "model",
    "module",
    "sequence",
    "side",
    "state",
]
