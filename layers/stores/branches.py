"""Sequences that share their beginnings, and the stores that know of them."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from memzoo.layers.stores.store import Entries, Store, end_of, lasting
from memzoo.layers.stores.writer import Writer

Span = tuple[int, int]  # the entries of a sequence's own before a position


@dataclass
class Branch:
    """A sequence: its own entries, and what it shares with those it was forked from.

    Attributes:
        number: Names it, and its own entries.
        shared: What it shares, oldest first.
        end: The next entries go on from here; from before, they make a fork.
    """

    number: int
    shared: tuple[Span, ...]
    end: int

    def spans(self, before: int) -> tuple[Span, ...]:
        """Return where the entries before a position lie, oldest first."""
        spans: list[Span] = []
        for number, end in (*self.shared, (self.number, before)):
            spans.append((number, min(end, before)))
            if end >= before:
                break
        return tuple(spans)


@dataclass(frozen=True)
class Append:
    """Entries of a sequence's own to commit, and what its ``Branch`` is then."""

    number: int
    shared: tuple[Span, ...]
    end: int
    entries: Entries


@dataclass(frozen=True)
class Drop:
    """Entries to delete: of a sequence's own, those at a position or behind it; 0 for a sequence that is gone."""

    unshared: tuple[Span, ...]


class BranchingStore(Store):
    """A store of versions and branches; how they are kept is left to ``_commit`` and ``_find``.

    Args:
        synchronous: Commit in the call that appends, instead of in a thread of its own.
    """

    def __init__(self, *, synchronous: bool) -> None:
        super().__init__()
        self._branches: dict[int, Branch] = {}
        self._shared: dict[int, int] = {}  # of dropped sequences, what others share: entries before a position
        self._last = 0
        self._version = 0
        self._writer: Writer[Append | Drop] = Writer(self._commit, synchronous=synchronous)

    @abstractmethod
    def _commit(self, items: list[Append | Drop]) -> None:
        """Make a version of items, and ``_version`` name it when it can be read."""

    @abstractmethod
    def _find(self, spans: tuple[Span, ...], query: Tensor, count: int, version: int) -> Entries:
        """Answer a query from the entries of spans."""

    def append(self, sequence: int, start: int, entries: Entries) -> int:
        """See ``MemoryStore``."""
        with self._lock, lasting():
            self._check_open()
            self._writer.check()
            branch = None if sequence == 0 else self._branch(sequence)
            entries = self._copy(start, entries)
            end = end_of(start, entries)
            if branch is None or start < branch.end:
                self._last += 1
                branch = Branch(self._last, () if branch is None else branch.spans(start), end)
                self._branches[branch.number] = branch
            branch.end = end
            self._writer.put(Append(branch.number, branch.shared, end, entries))
            return branch.number

    def snapshot(self) -> int:
        """See ``MemoryStore``."""
        return self._version

    def query(self, sequence: int, query: Tensor, count: int, *, before: int, version: int | None = None) -> Entries:
        """See ``MemoryStore``."""
        self._check_open()
        branch = self._branch(sequence)
        version = self._check_query(query, count, before, version)
        found = self._find(branch.spans(before), query.detach(), count, version)
        self._branch(sequence)  # it may have been dropped meanwhile, and only a part of it found
        return found.like(query)

    def flush(self) -> None:
        """See ``MemoryStore``."""
        self._check_open()
        self._writer.flush()

    def drop(self, sequences: Iterable[int]) -> None:
        """See ``MemoryStore``."""
        with self._lock, lasting():
            self._check_open()
            self._writer.check()
            dropped = [self._branch(sequence) for sequence in dict.fromkeys(sequences)]
            if not dropped:
                return
            for branch in dropped:
                del self._branches[branch.number]
                self._shared[branch.number] = branch.end
            self._writer.put(Drop(self._unshared()))

    def _unshared(self) -> tuple[Span, ...]:
        """Return what of the dropped sequences no other one shares any more: (number, from which position on)."""
        needed = dict.fromkeys(self._shared, 0)
        for branch in self._branches.values():
            for number, end in branch.shared:
                if number in needed:
                    needed[number] = max(end, needed[number])
        unshared = tuple((number, end) for number, end in needed.items() if end < self._shared[number])
        self._shared = {number: end for number, end in needed.items() if end > 0}
        return unshared

    def close(self) -> None:
        """See ``MemoryStore``."""
        with self._lock:
            if self._closed or self._is_forked:
                return
            self._closed = True
            try:
                self._writer.flush()
            finally:
                self._release()

    def _release(self) -> None:
        """Let go of what is held."""

    def _branch(self, sequence: int) -> Branch:
        return self._known(sequence, self._branches)
