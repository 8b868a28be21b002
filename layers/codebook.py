"""Codebook: keys with radii and values, entered edit by edit and taken out again."""

import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.ops.precision import no_autocast

MARGIN = 1e-5  # by which a key that stood first leaves the border between two to the new one
ROUNDED = 3.0  # units that a key of 16 bits may move by
ENTRIES = ("keys", "values", "radii", "labels", "edits")
CHANGING = ("values", "labels", "radii")  # of an entry that is there, by edits that come later
TABLES = (*ENTRIES, *(f"{name}_{kept}" for name in CHANGING for kept in ("changes", "before")))


class Codebook(nn.Module):
    """Keys, each with a radius in which it answers, a value and a label. Grows by an entry an edit at most.

    Next to them it keeps what edits have changed of entries that were there before, so that they can be taken back: of
    radii a number each, of values a vector and its label. It holds tensors alone, and its ``state_dict`` loads into any
    other of these widths, however many entries either has.

    What a model says of a question differs by rounding from batch to batch, up to ``rounding_of`` it. No radius is
    less, whatever ``radius`` says, which is warned of once. Two keys are further apart than twice that: of another
    answer so near to a key the entry becomes that of the newer one, and answers as far as its question, moved by as
    much, may lie: it would be lost otherwise.

    Args:
        key_dim: Width of keys.
        value_dim: Width of values.
        radius: Of new entries.
        like: Gives the device, and the dtype, which is at least float32.

    Attributes:
        keys: (entries, key_dim).
        values: (entries, value_dim), the parameter; another object whenever the number of entries changes.
        radii: (entries,).
        labels: (entries, 32) what tells one answer from another, SHA-256 of what it prints as.
        edits: (entries,) the number of the edit that added each.
        next_edit: The number that the next edit gets, from 0; none is given twice.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor
    edits: Tensor
    next_edit: Tensor
    values_changes: Tensor
    radii_changes: Tensor

    def __init__(self, key_dim: int, value_dim: int, radius: float, *, like: Tensor) -> None:
        super().__init__()
        self.radius = radius
        self._warned = False  # of rounding that is more
        real: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        whole: Any = {"dtype": torch.int64, "device": like.device}
        self.values = nn.Parameter(torch.zeros(0, value_dim, **real))
        self.register_buffer("keys", torch.zeros(0, key_dim, **real))
        self.register_buffer("radii", torch.zeros(0, **real))
        self.register_buffer("labels", torch.zeros(0, 32, dtype=torch.uint8, device=like.device))
        self.register_buffer("edits", torch.zeros(0, **whole))
        self.register_buffer("next_edit", torch.zeros((), **whole))
        for table in CHANGING:  # (edit, edit that added the entry), and what the entry had before
            self.register_buffer(f"{table}_changes", torch.zeros(0, 2, **whole))
            self.register_buffer(f"{table}_before", torch.zeros_like(getattr(self, table), requires_grad=False))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_edits(self) -> int:
        """How many edits are in it: each added an entry or trained the value of one."""
        return len(self.edits) + len(self.values_changes)

    # Reading

    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the nearest key and its place, (rows,) each; of equals the newest. It needs a key."""
        with no_autocast(query.device):
            distances = torch.cdist(query, self.keys.flip(0), compute_mode="donot_use_mm_for_euclid_dist")
        distance, place = distances.min(1)
        return distance, len(self) - 1 - place

    def find(self, query: Tensor) -> Tensor:
        """Return the place of the entry in whose radius each query (rows, key_dim) lies, -1 for none."""
        distance, place = self.nearest(query)
        return torch.where(distance <= self.radii[place], place, -1)

    # Writing

    @torch.no_grad()
    def enter(self, query: Tensor, value: Tensor, label: object) -> int:
        """Give the next edit an entry, one that is there or a new one with ``value``, and return its place.

        Args:
            query: (key_dim,), in the dtype that it was computed in, which says how exact it is.
            value: (value_dim,).
            label: Of its answer; labels are the same if they print the same.
        """
        edit, code, least = self.next_edit.clone(), self._code(label), rounding_of(query).to(self.radii)
        dtype, query, value = query.dtype, query.to(self.keys), value.to(self.keys)
        radius = least.clamp(min=self.radius)
        if not self._warned and least > self.radius:
            self._warned = True
            warnings.warn(
                f"radius={self.radius} is less than rounding in {dtype} may move a key of length "
                f"{query.norm():.3g}: its entry answers within {least:.3g}; use a wider dtype, or radius={least:.3g}",
                stacklevel=2,
            )
        self.next_edit += 1
        if len(self):
            (distance,), (place,) = self.nearest(query[None])
            if distance <= radius + self.radii[place]:
                if torch.equal(self.labels[place], code):
                    self._note(edit, place, "values", "labels")
                    self._widen(edit, place, distance + least)
                    return int(place)
                if distance / 2 - MARGIN < least:
                    self._note(edit, place, "values", "labels")
                    self.values[place], self.labels[place] = value, code
                    self._widen(edit, place, distance + least)
                    return int(place)
                self._note(edit, place, "radii")
                self.radii[place] = distance / 2 - MARGIN
                radius = distance / 2
        for name, row in zip(ENTRIES, (query, value, radius, code, edit), strict=True):
            self._grow(name, row)
        return len(self) - 1

    @torch.no_grad()
    def delete(self, edit: int) -> None:
        """Take an edit out; see ``Grace.delete``.

        Raises:
            ValueError: There is no such edit.
        """
        own = self.edits == edit
        if not own.any() and not (self.values_changes[:, 0] == edit).any():
            raise ValueError(f"edit={edit} is not in the codebook, which has had {int(self.next_edit)}; use one of it")
        for table in CHANGING:
            self._take_back(table, edit)
        if own.any():
            for table in CHANGING:
                self._keep(getattr(self, f"{table}_changes")[:, 1] != edit, f"{table}_changes", f"{table}_before")
            self._keep(~own, *ENTRIES)

    def clear(self) -> None:
        """Take everything out; the next edit has the number 0."""
        for name in TABLES:
            self._set(name, getattr(self, name).detach()[:0].clone())
        self.next_edit.zero_()

    def _take_back(self, table: str, edit: int) -> None:
        """Undo what an edit set, unless a later one has set it again: that has found then what this one had found."""
        changes, before = getattr(self, f"{table}_changes"), getattr(self, f"{table}_before")
        for place in (changes[:, 0] == edit).nonzero().flatten().tolist():
            later = (changes[place + 1 :, 1] == changes[place, 1]).nonzero().flatten()
            if len(later):
                before[place + 1 + later[0]] = before[place]
            else:
                getattr(self, table)[self.edits == changes[place, 1]] = before[place]
        self._keep(changes[:, 0] != edit, f"{table}_changes", f"{table}_before")

    def _note(self, edit: Tensor, place: Tensor, *tables: str) -> None:
        """Keep what an edit is about to change. Labels go with values: both stay if a later edit has set them again."""
        for table in tables:
            self._grow(f"{table}_changes", torch.stack([edit, self.edits[place]]))
            self._grow(f"{table}_before", getattr(self, table)[place])

    def _widen(self, edit: Tensor, place: Tensor, radius: Tensor) -> None:
        """Let an entry answer as far as that, if it does not already."""
        if radius > self.radii[place]:
            self._note(edit, place, "radii")
            self.radii[place] = radius

    def _code(self, label: object) -> Tensor:
        digest = hashlib.sha256(repr(label).encode()).digest()
        return torch.tensor([*digest], dtype=torch.uint8, device=self.labels.device)

    # Tables that grow

    def make_room(self, sizes: Mapping[str, int]) -> None:
        """Give tables the numbers of rows of others, zeros, before those are copied into them."""
        for name, size in sizes.items():
            own = getattr(self, name).detach()
            self._set(name, own.new_zeros(size, *own.shape[1:]))

    def _grow(self, name: str, row: Tensor) -> None:
        self._set(name, torch.cat([getattr(self, name).detach(), row[None]]))

    def _keep(self, rows: Tensor, *names: str) -> None:
        for name in names:
            self._set(name, getattr(self, name).detach()[rows])

    def _set(self, name: str, table: Tensor) -> None:
        setattr(self, name, nn.Parameter(table) if name == "values" else table)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        self.make_room({name: len(state_dict[prefix + name]) for name in TABLES if prefix + name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *more)


def rounding_of(query: Tensor) -> Tensor:
    """Return by how much a query (width,) may differ from the same one computed in another batch.

    In float32 and float64 ``log2(width)`` times the unit of the dtype, of its length: how errors of sums in blocks
    grow. In 16 bits three times: sums are float32 there, and only what is stored is rounded. From alone to padded in a
    batch, keys of a LLaMA with random weights moved by up to 6.6 units in float32 and 1.8 in bfloat16 with 8 layers,
    by 7.6 and 2.6 with 32.
    """
    precision = torch.finfo(query.dtype)
    units = ROUNDED if precision.bits < 32 else max(math.log2(len(query)), 1.0)
    length: Tensor = torch.linalg.vector_norm(query.to(torch.promote_types(query.dtype, torch.float32)))
    return length * (precision.eps * units)


def draw_value(like: Tensor, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def file_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return how many rows the tables of a file have; none of what is no such file, as loading it will say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            own = {*TABLES} & {name.removeprefix("codebook.") for name in file.keys()}  # noqa: SIM118  (no mapping)
            return {name: file.get_slice(f"codebook.{name}").get_shape()[0] for name in own}
    except (OSError, SafetensorError):
        return {}
