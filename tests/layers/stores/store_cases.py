"""What the tests of the stores share: entries, operations, and a store that is nothing but its definition."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers.stores import Entries

HEADS, WIDTH = 2, 3
FEW = settings(max_examples=15, deadline=None)

# One append: the sequence (0 begins one), where it starts seen from the end of that, the gaps between the positions.
APPENDS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-7, 2), st.lists(st.integers(1, 3), max_size=4)), min_size=1, max_size=9
)


def entries(positions: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64, heads: int = HEADS) -> Entries:
    """Entries of whole numbers: products are exact, and ties common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, (len(positions), *shape), generator=generator)

    score_dtype = torch.promote_types(dtype, torch.float32)
    keys, values, scores = draw(heads, WIDTH).to(dtype), draw(heads, WIDTH).to(dtype), draw().to(score_dtype)
    return Entries(keys, values, torch.tensor(positions, dtype=torch.long), scores)


def queries(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [torch.randint(-2, 3, (HEADS, WIDTH), generator=generator).to(dtype) for _ in range(count)]


def same(found: Entries, expected: Entries) -> None:
    """Bit for bit, and in dtype."""
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@dataclass
class Sequence:
    """Everything a sequence sees, shared or its own: entries and the version of their commit; where it goes on."""

    rows: list[tuple[int, Entries]] = field(default_factory=list)
    end: int = 0
    appends: list[tuple[int, int]] = field(default_factory=list)  # version, end


class Model:
    """Sequences as lists of single entries. A fork copies; a query looks at all."""

    def __init__(self) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.last = 0

    def place(self, sequence: int, start: int) -> int:
        """Return the sequence that an append goes to, made if it is new."""
        if sequence == 0:
            source = Sequence()
        else:
            source = self.sequences[sequence]
            if start >= source.end:
                return sequence
        self.last += 1
        fork = Sequence([(v, row) for v, row in source.rows if int(row.positions) < start], min(source.end, start))
        self.sequences[self.last] = fork
        return self.last

    def append(self, sequence: int, start: int, new: Entries, version: int) -> None:
        held = self.sequences[sequence]
        held.rows += [(version, new.select(slice(i, i + 1))) for i in range(len(new))]
        held.end = max([start, *new.positions.tolist()]) + 1

    def seen(self, sequence: int, before: int, version: int) -> list[Entries]:
        rows = self.sequences[sequence].rows
        return [row for committed, row in rows if committed <= version and int(row.positions) < before]

    def query(self, sequence: int, query: Tensor, count: int, before: int, version: int) -> Entries:
        rows = self.seen(sequence, before, version)
        rows.sort(key=lambda row: (-float((query.double() * row.keys[0].double()).sum()), int(row.positions)))
        return in_order(rows[:count])


def in_order(rows: list[Entries]) -> Entries:
    return Entries.join([entries([]), *sorted(rows, key=lambda row: int(row.positions))])


def run(store: Any, model: Model, appends: list[tuple[int, int, list[int]]]) -> list[int]:
    """Append to a store that commits at once and to the model; return all versions."""
    versions = [store.snapshot()]
    for seed, (which, offset, gaps) in enumerate(appends):
        sequence = min(which, model.last)
        end = model.sequences[sequence].end if sequence else 0
        start = max(0, end + offset)
        positions = [start - 1 + sum(gaps[: i + 1]) for i in range(len(gaps))]
        new = entries(positions, seed=seed)
        expected = model.place(sequence, start)
        assert store.append(sequence, start, new) == expected
        model.append(expected, start, new, store.snapshot())
        versions.append(store.snapshot())
    assert versions == sorted(set(versions))
    return versions
