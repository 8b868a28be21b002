"""What a graph memory cell keeps in evaluation: the tables of its parameters, until one of them changes."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from memzoo.layers.ops.graph_memory import GraphTables

Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class KeptTables:
    """Tables, the weights they were made of, and a mark of what these were then.

    Attributes:
        tables: Made of the weights.
        weights: Parameters.
        marks: Version and address of each.
    """

    tables: GraphTables
    weights: Weights
    marks: list[tuple[int, int]]

    @classmethod
    def of(cls, tables: GraphTables, weights: Weights) -> Self:
        """Keep tables that were made of weights just now."""
        return cls(tables, weights, _marks(weights))

    def are_of(self, weights: Weights) -> bool:
        """Whether these weights are the same and have not been changed since."""
        same = all(old is new for old, new in zip(self.weights, weights, strict=True))
        return same and self.marks == _marks(weights)


def can_be_marked(weights: Weights) -> bool:
    """Whether the weights count their changes: parameters do, unless they were made in inference mode."""
    return all(isinstance(weight, nn.Parameter) and not weight.is_inference() for weight in weights)


def _marks(weights: Weights) -> list[tuple[int, int]]:
    return [(weight._version, weight.data_ptr()) for weight in weights]
