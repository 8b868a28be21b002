"""Everything in host memory: a query reads all keys of its sequence, in one product of a matrix and a vector."""

from bisect import bisect_right
from dataclasses import replace

import torch
from torch import Tensor

from memzoo.layers.stores.branches import Append, BranchingStore, Drop, Span
from memzoo.layers.stores.ranking import largest_norm, search
from memzoo.layers.stores.store import Entries


class HostStore(BranchingStore):
    """A ``MemoryStore`` that keeps every token in host memory.

    Exact, and exactly the same in float32 and below: candidates are ranked by inner products in float64. Keys of half
    precision are held in float32, so that a query does not convert them every time.

    Args:
        synchronous: Commit in the call that appends. Otherwise a thread does, so that no caller waits for memory to
            grow; ``flush`` waits for it.
    """

    def __init__(self, *, synchronous: bool = True) -> None:
        super().__init__(synchronous=synchronous)
        self._rows: dict[int, _Rows] = {}

    def _commit(self, items: list[Append | Drop]) -> None:
        version = self._version + 1
        for item in items:
            if isinstance(item, Append):
                rows = self._rows.get(item.number, _Rows())
                rows.extend(item.entries, version)
                self._rows[item.number] = rows
                continue
            for number, end in item.unshared:
                if end:
                    self._rows[number].keep(end)
                else:
                    del self._rows[number]
        self._version = version  # all of it is seen from here on

    def _release(self) -> None:
        self._rows = {}

    def _find(self, spans: tuple[Span, ...], query: Tensor, count: int, version: int) -> Entries:
        held = [(self._rows.get(number), end) for number, end in spans]
        parts = [(rows, rows.seen(end, version)) for rows, end in held if rows is not None]
        if not parts:
            assert self._layout is not None
            return self._layout.empty()
        return search([part for _, part in parts], query, count, max(rows.largest for rows, _ in parts))


class _Rows:
    """The entries of a sequence's own, in buffers that double.

    Readers take no lock: rows are written behind those that a version counts, and buffers that were outgrown stay as
    they are for whoever reads them.
    """

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.counts: list[int] = []
        self.largest = 0.0
        self.buffers: Entries | None = None

    def extend(self, entries: Entries, version: int) -> None:
        """Add entries that are seen from a version on."""
        keys = entries.keys if entries.keys.dtype.itemsize >= 4 else entries.keys.float()
        entries = replace(entries, keys=keys)
        count = self.counts[-1] if self.counts else 0
        total = count + len(entries)
        if self.buffers is None or total > len(self.buffers):
            grown = Entries(*(t.new_empty(max(2 * count, total), *t.shape[1:]) for t in entries.tensors))
            if self.buffers is not None:
                _put(grown, slice(count), self.buffers.select(slice(count)))
            self.buffers = grown
        _put(self.buffers, slice(count, total), entries)
        if len(entries):
            self.largest = max(self.largest, largest_norm(keys))
        self.counts.append(total)
        self.versions.append(version)  # behind the count that it leads to

    def seen(self, end: int, version: int) -> Entries:
        """Return a view of the entries before a position that a version holds."""
        number = bisect_right(self.versions, version)
        count = self.counts[number - 1] if number else 0
        assert self.buffers is not None
        entries = self.buffers.select(slice(count))
        return entries.select(slice(int(torch.searchsorted(entries.positions, end))))

    def keep(self, end: int) -> None:
        """Let go of all entries at a position or behind it, which no one reads."""
        kept = self.seen(end, self.versions[-1])
        self.counts = [min(count, len(kept)) for count in self.counts]
        self.buffers = Entries(*(tensor.clone() for tensor in kept.tensors))


def _put(buffers: Entries, rows: slice, entries: Entries) -> None:
    for buffer, tensor in zip(buffers.tensors, entries.tensors, strict=True):
        buffer[rows] = tensor
