"""Random cases for the tests of the memory of single tokens."""

from typing import Any

from tests.layers.neural_memory_cases import (
    Case,
    make_case,
    without,
)


def linear_case(**sizes: Any) -> Case:
    """Arguments of the op: keys of width 3, values of width 4 unless told otherwise."""
    return without(make_case(depth=1, **{"value_dim": 4} | sizes), "base")
