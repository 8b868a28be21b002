"""The neural memory inside another layer, built from a mapping of options: the same in Python and in YAML."""

import inspect
from collections.abc import Mapping
from typing import Any

from memzoo.layers.errors import check_choice
from memzoo.layers.neural_memory import NeuralMemory

OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(NeuralMemory).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def build_memory(
    dim: int,
    options: Mapping[str, Any] | None = None,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> NeuralMemory:
    """Build ``NeuralMemory(dim, **options)`` inside a layer that has heads of its own.

    Args:
        dim: Width of the layer.
        options: Keyword options of ``NeuralMemory``, checked by name; None for its defaults.
        num_heads: Of the layer; the memory has as many, unless ``options`` says anything about heads.
        head_dim: Of the layer, likewise.

    Raises:
        ValueError: An option is unknown, the nearest one is suggested; or ``NeuralMemory`` refuses its value.
    """
    given = dict(options or {})
    for name in given:
        check_choice("memory option", name, OPTIONS)
    if "num_heads" not in given and "head_dim" not in given:
        given |= {"num_heads": num_heads, "head_dim": head_dim}
    return NeuralMemory(dim, **given)
