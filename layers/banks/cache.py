"""Blocks that were read lately, in memory: least recently used ones go first, level by level."""

import time
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from memzoo.layers.banks.layout import BankLayout, Node

Read = Callable[[Node, Tensor], None]


@dataclass
class CacheStatistics:
    """What a cache did since it was made.

    Attributes:
        hits: Blocks of each level that were there when they were asked for, or on their way.
        misses: Blocks of each level that were read, for a prefetch too.
        evictions: Blocks of each level that had to go.
        bytes_read: In all.
        seconds_reading: In all, those of several threads added up.
    """

    hits: dict[int, int] = field(default_factory=dict)
    misses: dict[int, int] = field(default_factory=dict)
    evictions: dict[int, int] = field(default_factory=dict)
    bytes_read: int = 0
    seconds_reading: float = 0.0


class BlockCache:
    """Reads blocks into buffers of its own and keeps those used last.

    Each level has a budget. A buffer is used again when its block was evicted and no tensor looks at it any more, so
    blocks that were handed out stay as they are for as long as somebody holds them; what is held beyond the budget of a
    level is given back to the system when it is let go of.

    Args:
        layout: Of the blocks.
        read: Fills a tensor with a node's block; may be called by several threads at once.
        budget: Bytes; or bytes of each level. Of one number each level, from the coarsest, takes what all its blocks
            need, but at first no more than half of what is left; what the last does not need goes to the others.
    """

    def __init__(self, layout: BankLayout, read: Read, budget: int | Mapping[int, int]) -> None:
        self._read = read
        budgets = _shared_out(layout, budget) if isinstance(budget, int) else budget
        self.capacity = {level: budgets.get(level, 0) // layout.block_bytes(level) for level in layout.levels}
        self._buffers = {level: _Buffers(layout, level, self.capacity[level]) for level in layout.levels}
        self._blocks: dict[int, OrderedDict[Node, Tensor]] = {level: OrderedDict() for level in layout.levels}
        self._reading: dict[Node, Future[Tensor]] = {}
        self._lock = Lock()
        zeros = dict.fromkeys(layout.levels, 0)
        self.statistics = CacheStatistics(dict(zeros), dict(zeros), dict(zeros))

    def get(self, node: Node) -> Tensor:
        """Return a block, read now or earlier; not to change."""
        blocks = self._blocks[node.level]
        with self._lock:
            if (block := blocks.get(node)) is not None:
                blocks.move_to_end(node)
                self.statistics.hits[node.level] += 1
                return block
            on_its_way = self._reading.get(node)
            if on_its_way is None:
                promise = self._reading[node] = Future()
                self._make_room(node.level)
            else:
                self.statistics.hits[node.level] += 1
        if on_its_way is not None:
            return on_its_way.result()
        try:
            block = self._buffers[node.level].take()
            start = time.perf_counter()
            self._read(node, block)
            seconds = time.perf_counter() - start
        except BaseException as error:
            with self._lock:
                self._is_current(node, promise)
            promise.set_exception(error)
            raise
        with self._lock:
            self.statistics.misses[node.level] += 1
            self.statistics.bytes_read += block.nbytes
            self.statistics.seconds_reading += seconds
            if self._is_current(node, promise) and self.capacity[node.level]:
                self._make_room(node.level)
                blocks[node] = block
        promise.set_result(block)
        return block

    def drop(self, nodes: Iterable[Node]) -> None:
        """Forget blocks, which have changed: they are read again, also if that is being done just now."""
        with self._lock:
            for node in nodes:
                self._reading.pop(node, None)
                if (blocks := self._blocks.get(node.level)) is not None:  # some levels own none
                    blocks.pop(node, None)

    def after_fork(self) -> None:
        """Let go of what threads of the other process were doing."""
        self._lock = Lock()
        self._reading.clear()

    @property
    def cached(self) -> dict[int, tuple[int, ...]]:
        """The nodes of each level that are cached, those used last at the end."""
        with self._lock:
            return {level: tuple(node.node for node in blocks) for level, blocks in self._blocks.items()}

    @property
    def nbytes(self) -> int:
        """Count the bytes of all buffers, in use or not."""
        return sum(buffers.nbytes for buffers in self._buffers.values())

    def _is_current(self, node: Node, promise: "Future[Tensor]") -> bool:
        """End a reading; whether the block has not been dropped since it began."""
        current = self._reading.get(node) is promise
        if current:
            del self._reading[node]
        return current

    def _make_room(self, level: int) -> None:
        """Evict until one more block fits."""
        blocks = self._blocks[level]
        while blocks and len(blocks) >= self.capacity[level]:
            blocks.popitem(last=False)
            self.statistics.evictions[level] += 1


class _Buffers:
    """Memory for blocks of one level, used again when no tensor looks at it.

    ``torch.from_numpy`` holds on to the array that it is given for as long as any tensor shares its storage: the end of
    the array is the moment when nobody can look at the buffer any more. That may be at any moment, also while ``take``
    runs in the same thread, so what is given back waits in a queue that needs no lock.
    """

    def __init__(self, layout: BankLayout, level: int, capacity: int) -> None:
        self._bytes, self._shape, self._dtype = layout.block_bytes(level), layout.block_shape(level), layout.dtype
        self._capacity = capacity
        self._free: deque[Tensor] = deque()
        self._taken: set[int] = set()

    @property
    def nbytes(self) -> int:
        return (len(self._taken) + len(self._free)) * self._bytes

    def take(self) -> Tensor:
        with torch.inference_mode(False):  # whoever reads it may want gradients
            try:
                buffer = self._free.pop()
            except IndexError:
                buffer = torch.empty(self._bytes, dtype=torch.uint8)
            array = buffer.numpy().view()
            self._taken.add(id(buffer))
            weakref.finalize(array, self._give_back, buffer).atexit = False
            return torch.from_numpy(array).view(self._dtype).view(self._shape)

    def _give_back(self, buffer: Tensor) -> None:
        self._taken.discard(id(buffer))
        if len(self._taken) + len(self._free) < self._capacity:
            self._free.append(buffer)


class CopyCache:
    """Copies of blocks on another device, or in another dtype: those used last, within a budget.

    Args:
        budget: Bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._copies: OrderedDict[tuple[Node, torch.device, torch.dtype], Tensor] = OrderedDict()
        self._drops: defaultdict[Node, int] = defaultdict(int)
        self._lock = Lock()

    def get(self, node: Node, block: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a copy, made now or earlier, of what ``block`` returns.

        It is made at once, not beside other work of a device: the block's memory may be used again right after.
        """
        key = (node, device, dtype)
        with self._lock:
            if (copy := self._copies.get(key)) is not None:
                self._copies.move_to_end(key)
                return copy
            drops = self._drops[node]
        with torch.inference_mode(False):
            own = block()
            copy = own.to(device, dtype)
        if copy is own or copy.nbytes > self.budget:
            return copy
        with self._lock:
            if self._drops[node] != drops:
                return copy
            while self._copies and self.nbytes + copy.nbytes > self.budget:
                self.nbytes -= self._copies.popitem(last=False)[1].nbytes
            if key not in self._copies:
                self._copies[key] = copy
                self.nbytes += copy.nbytes
        return copy

    def drop(self, nodes: Iterable[Node]) -> None:
        """Forget the copies of blocks that have changed, also those that are being made just now."""
        gone = set(nodes)
        with self._lock:
            for node in gone:
                self._drops[node] += 1
            for key in [key for key in self._copies if key[0] in gone]:
                self.nbytes -= self._copies.pop(key).nbytes

    def after_fork(self) -> None:
        """Let go of what threads of the other process were doing."""
        self._lock = Lock()


def _shared_out(layout: BankLayout, budget: int) -> dict[int, int]:
    """Share a budget out among levels, from the coarsest, whose blocks are few and read most often."""
    whole = {level: layout.block_bytes(level) * (layout.num_nodes(level) + 1) for level in layout.levels}
    shares, left = {}, budget
    for level in layout.levels:
        shares[level] = min(whole[level], left if level == layout.levels[-1] else left // 2)
        left -= shares[level]
    for level in layout.levels:
        more = min(whole[level] - shares[level], left)
        shares[level] += more
        left -= more
    return shares
