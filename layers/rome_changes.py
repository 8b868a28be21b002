"""RomeChanges: rank-one changes of a matrix, written call by call and taken back, and what the next are solved with."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.ops.precision import no_autocast
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
        values: (edits, dim), the parameter; another object whenever the number of edits changes, with the same
            ``requires_grad``.
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
        """``D``, (dim, width); under autocast, too, in the dtype of its factors."""
        with no_autocast(self.values.device):
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
        self.restore({name: torch.cat([table.detach(), new[name].to(table)]) for name, table in self.tables().items()})

    def undo(self) -> None:
        """Forget what the last call wrote."""
        kept = self.calls < self.calls[-1]
        self.restore({name: table[kept] for name, table in self.tables().items()})

    def clear(self) -> None:
        """Forget all edits; the covariance stays."""
        self.restore({name: table[:0] for name, table in self.tables().items()})

    def tables(self) -> dict[str, Tensor]:
        """Return what it holds of edits, the parameter itself among it; this class changes none of it in place."""
        return {name: getattr(self, name) for name in TABLES}

    def restore(self, tables: Mapping[str, Tensor]) -> None:
        """Hold other tables; a parameter among them stays the object that it is."""
        with torch.inference_mode(False):  # what is made in it could not be learnt through afterwards
            for name, table in tables.items():
                if table.is_inference():
                    table = table.clone()
                if name == "values" and not isinstance(table, nn.Parameter):
                    table = nn.Parameter(table.detach(), requires_grad=self.values.requires_grad)
                setattr(self, name, table)

    def fault(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Return why tables of others do not fit in here, however many edits they have; None if they do."""
        tables, found = self.tables(), {name: tuple(shapes[name]) for name in TABLES if name in shapes}
        for name, shape in found.items():
            own = tuple(tables[name].shape)
            if len(shape) != len(own) or shape[1:] != own[1:]:
                return f"holds {name!r} of shape {shape}, and not {('edits', *own[1:])}"
        if found and (len(found) < len(TABLES) or len({shape[0] for shape in found.values()}) > 1):
            return f"does not hold one row of each of {TABLES} for an edit, but tables of shapes {found}"
        width = self.directions.shape[1]
        if FACTOR in shapes and tuple(shapes[FACTOR]) not in {(0, 0), (width, width)}:
            return f"holds {FACTOR!r} of shape {tuple(shapes[FACTOR])}, and not {(width, width)}, or (0, 0) for none"
        return None

    def make_room(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take as many edits as others have, and a covariance if they do, before those are copied into it.

        Those have no ``fault``.
        """
        with torch.inference_mode(False):
            tables = {name: table for name, table in self.tables().items() if name in shapes}
            self.restore({name: table.new_zeros(shapes[name]) for name, table in tables.items()})
            if FACTOR in shapes:
                self.covariance_factor = self.covariance_factor.new_zeros(shapes[FACTOR])

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take all of it, or nothing and say why."""
        found = {name: state_dict.get(prefix + name) for name in (*TABLES, FACTOR)}
        shapes = {name: tensor.shape for name, tensor in found.items() if tensor is not None}
        if said := self.fault(shapes):
            error_msgs.append(f"{prefix or 'it'} {said}")
            return
        self.make_room(shapes)
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *rest)


def shapes_in(path: str | os.PathLike[str], prefix: str) -> dict[str, Sequence[int]]:
    """Return the shapes of the tables in a file; none of what is no such file, as loading it will say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            own = [name for name in (*TABLES, FACTOR) if prefix + name in file.keys()]  # noqa: SIM118  (no mapping)
            return {name: file.get_slice(prefix + name).get_shape() for name in own}
    except (OSError, SafetensorError):
        return {}
