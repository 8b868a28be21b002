"""The tokens with the highest scores: what a layer's own state keeps, as a store."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.layers.stores.store import Entries, Store, end_of, lasting


class TopKStore(Store):
    """A ``MemoryStore`` in which a sequence keeps the highest scores, of equal ones the earlier, in host memory.

    ``query`` returns what is kept, whatever it asks for; where that is more than its ``count``, the highest scores.

    Every append is committed at once. Versions and forks are exact as far back as the last ``history`` appends of a
    sequence: of each of these the store holds what would have been kept at any moment.

    Args:
        size: Tokens that a sequence keeps.
        history: Appends of a sequence that can be told apart. Before them lies one set, which can be queried and
            forked as a whole.
    """

    def __init__(self, size: int, *, history: int = 8) -> None:
        check_positive("size", size)
        check_positive("history", history)
        super().__init__()
        self.size, self.history = size, history
        self._kept: dict[int, _Kept] = {}
        self._version = self._last = 0

    def append(self, sequence: int, start: int, entries: Entries) -> int:
        """See ``MemoryStore``.

        Raises:
            ValueError: As there; or the fork would begin before the last ``history`` appends.
        """
        with self._lock, lasting():
            self._check_open()
            kept = None if sequence == 0 else self._known(sequence, self._kept)
            entries = self._copy(start, entries)
            if kept is None:
                kept = _Kept(entries.select(slice(0)))
            elif start < kept.end:
                self._check_history("start", start, kept.begin, sequence)
                kept, sequence = kept.fork(start), 0
            if sequence == 0:
                self._last += 1
                sequence = self._last
            end = end_of(start, entries)
            blocks = (*kept.blocks, _Block(self._version + 1, end, self._admitted(kept, entries)))
            if len(blocks) > self.history:
                oldest, *rest = blocks
                whole = _highest(Entries.join([kept.whole, oldest.entries]), self.size)
                kept, blocks = _Kept(whole, oldest.end, oldest.version), tuple(rest)
            self._kept[sequence] = replace(kept, blocks=blocks)
            self._version += 1
            return sequence

    def snapshot(self) -> int:
        """See ``MemoryStore``."""
        return self._version

    def query(self, sequence: int, query: Tensor, count: int, *, before: int, version: int | None = None) -> Entries:
        """See ``MemoryStore``.

        Raises:
            ValueError: As there; or ``before`` or ``version`` lie before the last ``history`` appends.
        """
        version = self._check_query(query, count, before, version)
        kept = self._known(sequence, self._kept)
        self._check_history("before", before, kept.begin, sequence)
        self._check_history("version", version, kept.version, sequence)
        return _highest(kept.seen(before, version), min(count, self.size)).like(query)

    def flush(self) -> None:
        """See ``MemoryStore``."""
        self._check_open()

    def drop(self, sequences: Iterable[int]) -> None:
        """See ``MemoryStore``."""
        with self._lock:
            self._check_open()
            dropped = set(sequences)
            for sequence in dropped:
                self._known(sequence, self._kept)
            for sequence in dropped:
                del self._kept[sequence]
            self._version += 1

    def close(self) -> None:
        """See ``MemoryStore``."""
        self._closed = True
        self._kept = {}

    def _check_history(self, name: str, value: int, least: int, sequence: int) -> None:
        if value < least:
            raise ValueError(
                f"{name}={value} lies before the last history={self.history} appends of sequence {sequence}, which "
                f"begin at {least}; use a larger history, or a HostStore, which keeps everything"
            )

    def _admitted(self, kept: "_Kept", entries: Entries) -> Entries:
        """Leave out what would not even be kept if nothing came after it."""
        highest = _highest(kept.seen(kept.end, self._version), self.size).scores.tolist()
        heapq.heapify(highest)
        admitted = []
        for index, score in enumerate(entries.scores.tolist()):
            if len(highest) < self.size:
                heapq.heappush(highest, score)
            elif score > highest[0]:
                heapq.heapreplace(highest, score)
            else:
                continue
            admitted.append(index)
        return entries.select(entries.positions.new_tensor(admitted))


@dataclass(frozen=True)
class _Block:
    """What an append brought: the version that it made, the position where the next may begin, what may be kept."""

    version: int
    end: int
    entries: Entries


@dataclass(frozen=True)
class _Kept:
    """A sequence.

    Attributes:
        whole: What is kept of all appends before the last few.
        begin: The first position behind these appends.
        version: What the last of them made.
        blocks: The last few.
    """

    whole: Entries
    begin: int = 0
    version: int = 0
    blocks: tuple[_Block, ...] = ()

    @property
    def end(self) -> int:
        """From here on the sequence goes on."""
        return self.blocks[-1].end if self.blocks else self.begin

    def seen(self, before: int, version: int) -> Entries:
        """Return what may be kept of the tokens before a position that a version holds."""
        entries = Entries.join([self.whole, *(block.entries for block in self.blocks if block.version <= version)])
        return entries.select(entries.positions < before)

    def fork(self, start: int) -> "_Kept":
        """Return the sequence as it was before a position."""
        blocks: list[_Block] = []
        end = self.begin
        for block in self.blocks:
            if end >= start:
                break
            end = min(block.end, start)
            blocks.append(replace(block, end=end, entries=block.entries.select(block.entries.positions < start)))
        return replace(self, blocks=tuple(blocks))


def _highest(entries: Entries, count: int) -> Entries:
    """Return the ``count`` highest scores, of equal ones the earlier, in the order of their positions."""
    index = entries.scores.sort(descending=True, stable=True).indices[:count]
    return entries.select(index.sort().values)
