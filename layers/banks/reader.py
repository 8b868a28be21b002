"""Reading a memory bank: paths, the blocks on them, and the caches between."""

import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.banks.cache import BlockCache, CacheStatistics, CopyCache
from memzoo.layers.banks.disk import DiskStorage
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import BlockStorage, Mark, NotWrittenError
from memzoo.layers.cluster_tree import ClusterTree

CacheBytes = int | Mapping[int, int]
_PATIENCE = 4  # rounds of a fetch before writers of this process have to wait for it


class BankReader:
    """What of a ``MemoryBank`` reads; see there.

    ``_lock`` is held for moments, ``_writing`` for as long as a change takes, the first within the second.

    Args:
        storage: Where blocks are kept.
        cache_bytes: Budget of the blocks from disk that are kept in memory.
        copy_bytes: Budget of copies on another device or in another dtype.
    """

    def __init__(self, storage: BlockStorage, *, cache_bytes: CacheBytes, copy_bytes: int) -> None:
        check_budgets(storage.layout, cache_bytes, copy_bytes)
        self.layout = storage.layout
        self._storage = storage
        self._disk = storage if isinstance(storage, DiskStorage) else None
        self._budgets: dict[str, Any] = {"cache_bytes": cache_bytes, "copy_bytes": copy_bytes}
        self._cache = None if self._disk is None else BlockCache(self.layout, self._disk.read_into, cache_bytes)
        self._copies = CopyCache(copy_bytes)
        self._uncommitted: dict[Node, Tensor] = {}
        self._changes: defaultdict[Node, int] = defaultdict(int)  # of each node
        self._closed = False
        self._start_threads()
        _OPEN.add(self)

    def _start_threads(self) -> None:
        self._lock, self._writing = threading.RLock(), threading.RLock()
        self._prefetcher: ThreadPoolExecutor | None = None

    def _after_fork(self) -> None:
        """Begin anew what was shared with threads of the other process; what it writes is its own affair."""
        self._start_threads()
        self._copies.after_fork()
        if self._disk is not None and self._cache is not None:
            self._disk.after_fork()
            self._cache.after_fork()
            self._forget(self._uncommitted)
            self._uncommitted.clear()

    @property
    def tree(self) -> ClusterTree:
        """The tree whose nodes own the blocks."""
        return self._storage.tree

    @property
    def seed(self) -> int:
        """Seed of the initial blocks."""
        return self._storage.seed

    @property
    def path(self) -> Path | None:
        """The folder of a bank on disk."""
        return None if self._disk is None else self._disk.path

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written: it was opened so, or by the process that this one is a fork of."""
        return self._disk is not None and not self._disk.is_writer

    def route(
        self, embeddings: Tensor, *, reroute: bool = False, keep: Tensor | None = None, margin: float = 0.1
    ) -> Tensor:
        """Find the paths of some contexts; see ``ClusterTree.route``.

        Args:
            embeddings: Of the contexts, by the embedder that the tree was fitted with.
            reroute: Pass over nodes that are blocked or deleted, places that no child was added to, and nodes all of
                whose children are such, in favour of the next nearest. Otherwise they stay on the path, and ``fetch``
                leaves them out.
            keep: Paths to stay on unless another child is nearer by ``margin``, for a text that goes on.
            margin: As ``ClusterTree.route`` takes it.

        Shape:
            embeddings: (batch, width). keep: (batch, depth). Returns (batch, depth) int64.

        Raises:
            ValueError: ``embeddings`` do not fit, or every way is closed.
        """
        self._follow()
        blocked = self._dead_ends() if reroute else None
        return self.tree.route(embeddings, blocked=blocked, keep=keep, margin=margin)

    def generic_paths(self, batch_size: int) -> Tensor:
        """Return the paths that read every level's generic block, (batch_size, depth)."""
        ends = [self.layout.num_nodes(level) for level in range(1, self.layout.depth + 1)]
        return torch.tensor(ends).repeat(batch_size, 1)

    def fetch(
        self, paths: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Fetched:
        """Get the blocks on some paths, each distinct one once, all as they were at one moment.

        Blocked, deleted and never written ones are left out: they add nothing.

        Args:
            paths: The node of every level; the number of a level's nodes stands for its generic block.
            dtype: To cast to, that of the model's activations; as they are kept by default.
            device: To move to; where they are kept by default.

        Shape:
            paths: (batch, depth) int64.

        Raises:
            ValueError: ``paths`` does not fit, the bank is closed, or a block on disk is not what was written
                (``CorruptBlockError``).
        """
        nodes, rounds = self._nodes_on(paths), 0
        while True:
            with self._writing if rounds == _PATIENCE else nullcontext():
                before = self._changes_of(nodes)
                with suppress(NotWrittenError):  # deleted meanwhile: look again
                    fetched = Fetched.of(self.layout, paths, lambda node: self._readable(node, dtype, device))
                    if self._changes_of(nodes) == before:
                        return fetched
            rounds = min(rounds + 1, _PATIENCE)

    def prefetch(self, paths: Tensor) -> "Future[None]":
        """Begin to read the blocks on some paths into the cache, in a thread, and return at once.

        A ``fetch`` that comes meanwhile waits for what is being read and reads the rest itself. A bank in memory has
        nothing to do.

        Shape:
            paths: (batch, depth) int64.

        Returns:
            Done when they are read, or with the error of a damaged block.

        Raises:
            ValueError: ``paths`` does not fit, or the bank is closed.
        """
        nodes = self._nodes_on(paths)
        with self._lock:
            self._check_open()
            if self._cache is None:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="memory-bank")
            return self._prefetcher.submit(self._read_ahead, nodes)

    def block_of(self, level: int, node: int) -> Tensor:
        """Return a node's block as it is kept, blocked or not, or its initial one; not to change.

        Shape:
            Returns ``layout.block_shape(level)``, in ``layout.dtype``.

        Raises:
            ValueError: There is no such node, its block was deleted, or the bank is closed.
        """
        where = self.layout.check_node(level, node, generic=True)
        while True:
            self._follow()
            mark = self.mark(where)
            if mark & Mark.DELETED:
                raise ValueError(f"node={node} of level {level} was deleted; choose another, or add_child in its place")
            if where not in self._uncommitted and not mark & Mark.WRITTEN:
                initial = self.layout.initial_block(where, self.seed)
                return initial.to(self._storage.device, self.layout.dtype)
            with suppress(NotWrittenError):
                return self._read(where)

    def marks(self, level: int) -> Tensor:
        """Return what is noted of a level's nodes and of its generic block, as ``Mark``, (num_nodes + 1,) uint8."""
        self.layout.check_level(level)
        self._follow()
        return self._storage.marks(level).clone()

    def mark(self, node: Node) -> Mark:
        """Return what is noted of a node.

        Raises:
            ValueError: There is no such node.
        """
        where = self.layout.check_place(*node)
        return Mark(int(self._storage.marks(where.level)[where.node]))

    def changes(self, node: Node) -> int:
        """Return how often a node's block or mark has changed since the bank was opened; a ``put`` is one change."""
        with self._lock:
            return self._changes[node]

    def is_readable(self, node: Node) -> bool:
        """Whether a node is neither blocked nor deleted."""
        return not self.mark(node) & (Mark.BLOCKED | Mark.DELETED)

    def written(self) -> list[Node]:
        """Return the nodes, generic ones among them, whose blocks are not the initial ones."""
        self._follow()
        with self._lock:
            kept = [
                Node(level, node)
                for level in self.layout.levels
                for node in (self._storage.marks(level) & int(Mark.WRITTEN)).nonzero().squeeze(-1).tolist()
            ]
            return sorted({*kept, *self._uncommitted})

    @property
    def statistics(self) -> CacheStatistics | None:
        """What the cache of a bank on disk did so far."""
        return None if self._cache is None else self._cache.statistics

    @property
    def cache(self) -> BlockCache | None:
        """The cache of a bank on disk."""
        return self._cache

    def close(self) -> None:
        """Let go of files, when nothing is being written any more. What was not committed is lost."""
        with self._writing:
            with self._lock:
                self._closed = True
                prefetcher, self._prefetcher = self._prefetcher, None
            if prefetcher is not None:
                prefetcher.shutdown(cancel_futures=True)
            self._storage.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this or another process: of a bank in memory all of it, of one on disk a reader of its folder."""
        return partial(type(self), **self._budgets), (self._storage,)

    # Parts

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the bank{'' if self.path is None else f' at path={str(self.path)!r}'} is closed")

    def _follow(self) -> None:
        """Take up what another process committed."""
        self._check_open()
        if self._disk is not None and not self._disk.is_writer:
            with self._lock:  # who takes it up forgets what has changed before another goes on
                if changed := self._disk.refresh():
                    self._forget(changed)

    def _changes_of(self, nodes: Sequence[Node]) -> list[int]:
        """Return what is equal at two times only if nodes have not changed in between."""
        self._follow()
        with self._lock:
            return [self._changes[node] for node in nodes]

    def _forget(self, nodes: Iterable[Node]) -> None:
        """Note that nodes have changed."""
        changed = list(nodes)
        with self._lock:
            for node in changed:
                self._changes[node] += 1
        self._copies.drop(changed)
        if self._cache is not None:
            self._cache.drop(changed)

    def _readable(self, node: Node, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor | None:
        """Return the block that a context reads, or None where that is nothing."""
        if not self.is_readable(node) or not (node in self._uncommitted or self.mark(node) & Mark.WRITTEN):
            return None
        if dtype is None and device is None:
            return self._read(node)
        where = self._storage.device if device is None else torch.empty(0, device=device).device  # with its number
        return self._copies.get(node, lambda: self._read(node), where, dtype or self.layout.dtype)

    def _read(self, node: Node) -> Tensor:
        if (block := self._uncommitted.get(node)) is not None:
            return block
        return self._storage.read(node) if self._cache is None else self._cache.get(node)

    def _read_ahead(self, nodes: Sequence[Node]) -> None:
        self._follow()
        for node in nodes:
            with suppress(NotWrittenError):
                self._readable(node, None, None)

    def _dead_ends(self) -> dict[int, Tensor]:
        """Return by level the nodes that are closed, that stand in for no cluster, or whose children are all such."""
        closed, levels = int(Mark.BLOCKED | Mark.DELETED), range(1, self.layout.depth + 1)
        if not any(((self._storage.marks(level)[:-1] & closed) > 0).any() for level in levels):
            return {}
        ends = {
            level: ((self._storage.marks(level)[:-1] & closed) > 0) | self.tree.repeated[level - 1] for level in levels
        }
        for level in range(self.layout.depth - 1, 0, -1):
            ends[level] = ends[level] | ends[level + 1].view(-1, self.layout.branching).all(-1)
        if ends[1].all():
            raise ValueError("reroute=True finds no way: every node is blocked, or leads to such alone; unblock some")
        return {level: mask for level, mask in ends.items() if mask.any()}

    def _nodes_on(self, paths: Tensor) -> list[Node]:
        """Check paths and return the nodes on them that own blocks."""
        if paths.dim() != 2 or paths.shape[1] != self.layout.depth or paths.dtype != torch.int64:
            raise ValueError(
                f"paths has shape {tuple(paths.shape)} and dtype {paths.dtype}; it must be (batch, {self.layout.depth})"
                f" int64, as bank.route returns it"
            )
        found = []
        for level in range(1, self.layout.depth + 1):
            nodes, last = paths[:, level - 1].unique().tolist(), self.layout.num_nodes(level)
            if bad := [node for node in nodes if not 0 <= node <= last]:
                raise ValueError(
                    f"paths holds node {bad[0]} of level {level}; use 0 to {last - 1}, or {last} for the generic block"
                )
            if self.layout.rows[level - 1]:
                found += [Node(level, node) for node in nodes]
        return found


_OPEN: "weakref.WeakSet[BankReader]" = weakref.WeakSet()


def _after_fork() -> None:
    for bank in list(_OPEN):
        bank._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_budgets(layout: BankLayout, cache_bytes: CacheBytes, copy_bytes: int) -> None:
    """Require numbers of bytes, of levels that own blocks.

    Raises:
        ValueError: One is none.
    """
    budgets: dict[str, object] = {"copy_bytes": copy_bytes}
    if isinstance(cache_bytes, Mapping):
        if stray := set(cache_bytes) - set(layout.levels):
            raise ValueError(f"cache_bytes={dict(cache_bytes)} names {sorted(map(str, stray))}; use {layout.levels}")
        budgets |= {f"cache_bytes[{level}]": value for level, value in cache_bytes.items()}
    else:
        budgets["cache_bytes"] = cache_bytes
    for name, value in budgets.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r} is no number of bytes; use a whole number >= 0")
