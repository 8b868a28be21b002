"""RomeChanges: rank-one changes of a matrix, written call by call and taken back, and what the next are solved with."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.rome_solve import write_directions

TABLES = ("values", "directions", "calls")
FACTOR = "covariance_factor"


class RomeChanges(nn.Module):
    """``D``, the sum of an outer product ``value direction^T`` for each edit. Grows by one an edit.

    It holds tensors alone, and its ``state_dict`` loads into any other of these widths, however many edits either has.

    Args:
        dim: Width of values.
        width: Width of keys.
        like: Gives the device, and the dtype, which is at least float32.

    Attributes:
        values: (edits, dim), the parameter; another object whenever the number of edits changes.
        directions: (edits, width).
        calls: (edits,) number of the call that wrote each.
        covariance_factor: (width, width), that of Cholesky, lower, float64; (0, 0) for the identity.
    """

    values: nn.Parameter
    directions: Tensor
    calls: Tensor
    covariance_factor: Tensor

    def __init__(self, dim: int, width: int, *, like: Tensor) -> None:
        super().__init__()
        real: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        self.values = nn.Parameter(torch.zeros(0, dim, **real))
        self.register_buffer("directions", torch.zeros(0, width, **real))
        self.register_buffer("calls", torch.zeros(0, dtype=torch.int64, device=like.device))
        self.register_buffer(FACTOR, torch.zeros(0, 0, dtype=torch.float64, device=like.device))

    def __len__(self) -> int:
        return len(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``D x``, (..., width) -> (..., dim)."""
        return F.linear(F.linear(x.to(self.directions.dtype), self.directions), self.values.T)

    @property
    def matrix(self) -> Tensor:
        """``D``, (dim, width)."""
        return self.values.T @ self.directions

    @property
    def next_call(self) -> int:
        """The number that the next call gets."""
        return int(self.calls[-1]) + 1 if len(self) else 0

    def write(self, keys: Tensor, values: Tensor, *, ridge: float, call: int) -> None:
        """Add an edit for each key (edits, width), whose values (edits, dim) they write together.

        Raises:
            ValueError: As ``write_directions``.
        """
        new = {
            "values": values,
            "directions": write_directions(keys, ridge, self.covariance_factor),
            "calls": self.calls.new_full((len(keys),), call),
        }
        self.restore({name: torch.cat([table, new[name].to(table)]) for name, table in self.tables().items()})

    def undo(self) -> None:
        """Forget what the last call wrote."""
        kept = self.calls < self.calls[-1]
        self.restore({name: table[kept] for name, table in self.tables().items()})

    def clear(self) -> None:
        """Forget all edits; the covariance stays."""
        self.restore({name: table[:0] for name, table in self.tables().items()})

    def tables(self) -> dict[str, Tensor]:
        """Return what it holds of edits; never changed in place by what this class does."""
        return {name: getattr(self, name).detach() for name in TABLES}

    def restore(self, tables: Mapping[str, Tensor]) -> None:
        """Hold other tables."""
        for name, table in tables.items():
            setattr(self, name, nn.Parameter(table) if name == "values" else table)

    def make_room(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take as many edits as others have, and a covariance if they do, before those are copied into it."""
        for name, table in self.tables().items():
            if name in shapes:
                self.restore({name: table.new_zeros(shapes[name][0], *table.shape[1:])})
        if FACTOR in shapes:
            size = min(shapes[FACTOR][0], self.directions.shape[1])
            self.covariance_factor = self.covariance_factor.new_zeros(size, size)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        found = {name: state_dict.get(prefix + name) for name in (*TABLES, FACTOR)}
        self.make_room({name: tensor.shape for name, tensor in found.items() if tensor is not None})
        super()._load_from_state_dict(state_dict, prefix, *more)


def shapes_in(path: str | os.PathLike[str], prefix: str) -> dict[str, Sequence[int]]:
    """Return the shapes of the tables in a file; none of what is no such file, as loading it will say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            own = [name for name in (*TABLES, FACTOR) if prefix + name in file.keys()]  # noqa: SIM118  (no mapping)
            return {name: file.get_slice(prefix + name).get_shape() for name in own}
    except (OSError, SafetensorError):
        return {}
