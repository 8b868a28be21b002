"""MemoryBank: a small model's very large memory, a block for every node of a tree of clusters.

Pretraining with hierarchical memories (arXiv 2510.02375). A document reads the blocks on its path from the root to a
leaf; all others stay where they are, in memory or on disk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from memzoo.layers.banks import editing
from memzoo.layers.banks.disk import DiskStorage
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.reader import BankReader, CacheBytes, check_budgets
from memzoo.layers.banks.storage import BlockStorage, Mark, NotWrittenError, RamStorage, check_tree
from memzoo.layers.cluster_tree import ClusterTree

CACHE_BYTES = 2**30
COPIED_AT_ONCE = 2**28  # bytes


class MemoryBank(BankReader):
    """Blocks of memory for the nodes of a tree, fetched by path.

    ``paths = bank.route(embeddings)``, ``memories = bank.fetch(paths)``, ``model(tokens, memories=memories)``

    Use ``MemoryBank.create`` for a new bank and ``MemoryBank.open`` for one on disk. A node that was never written has
    its initial block, which adds nothing, and takes no place. Behind the nodes of every level lies its generic block,
    which is for all contexts: the paper's control, and something to read where nothing is known of the context.

    On disk, what ``put`` is given is kept in memory until ``commit`` writes all of it or, if the process ends
    meanwhile, nothing. Editing (``block``, ``unblock``, ``delete``, ``add_child``) is written at once. Any number of
    processes may read a bank, of which one may write: readers see its commits at their next ``fetch``. Methods may be
    called by several threads; in the process that writes, they wait for a commit to be done.

    Args:
        storage: Where blocks are kept.
        cache_bytes: Budget of the blocks from disk that are kept in memory; of all levels, or by level.
        copy_bytes: Budget of copies on another device or in another dtype that ``fetch`` keeps. By default it makes
            them anew in every call.

    Attributes:
        layout: Kind and sizes of the blocks.

    Raises:
        ValueError: The budgets are negative, or the tree is not that of the layout.
    """

    def __init__(self, storage: BlockStorage, *, cache_bytes: CacheBytes = CACHE_BYTES, copy_bytes: int = 0) -> None:
        check_tree(storage.tree, storage.layout)
        super().__init__(storage, cache_bytes=cache_bytes, copy_bytes=copy_bytes)

    @classmethod
    def create(
        cls,
        tree: ClusterTree,
        layout: BankLayout,
        *,
        path: str | Path | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        cache_bytes: CacheBytes = CACHE_BYTES,
        copy_bytes: int = 0,
    ) -> Self:
        """Make a bank whose blocks are all initial ones.

        Args:
            tree: Whose nodes own the blocks.
            layout: Kind and sizes of the blocks.
            path: Folder to make for it; None for a bank in memory.
            seed: Of the initial blocks. Each is drawn when it is first needed, the same in whatever order.
            device: Of a bank in memory.
            cache_bytes: As ``MemoryBank`` takes it, and so ``copy_bytes``.
            copy_bytes: Budget of copies.

        Raises:
            ValueError: The tree is not that of the layout, a budget is negative, or there is something at ``path``.
        """
        check_tree(tree, layout)
        check_budgets(layout, cache_bytes, copy_bytes)
        if path is None:
            storage: BlockStorage = RamStorage(layout, tree, seed=seed, device=device)
            return cls(storage, cache_bytes=cache_bytes, copy_bytes=copy_bytes)
        if torch.device(device).type != "cpu":
            raise ValueError(f"device={device!r} is for a bank in memory; leave it out, and give it to fetch instead")
        storage = DiskStorage.create(path, layout, tree, seed=seed)
        return cls(storage, cache_bytes=cache_bytes, copy_bytes=copy_bytes)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        read_only: bool = False,
        cache_bytes: CacheBytes = CACHE_BYTES,
        copy_bytes: int = 0,
    ) -> Self:
        """Open a bank on disk; no block is read for it.

        Args:
            path: Its folder.
            read_only: Leave writing to others.
            cache_bytes: As ``MemoryBank`` takes it, and so ``copy_bytes``.
            copy_bytes: Budget of copies.

        Raises:
            ValueError: There is none, it is damaged, a budget is negative, or another process writes to it and
                ``read_only`` is not set.
        """
        storage = DiskStorage(path, read_only=read_only)
        try:
            return cls(storage, cache_bytes=cache_bytes, copy_bytes=copy_bytes)
        except ValueError:
            storage.close()
            raise

    # Writing

    def put(self, blocks: Mapping[Node, Tensor]) -> None:
        """Give nodes new blocks, which ``fetch`` returns from now on; ``commit`` brings them to the disk.

        Args:
            blocks: Copied, and cast to the layout's dtype.

        Shape:
            blocks[node]: ``layout.block_shape(node.level)``.

        Raises:
            ValueError: A block does not fit, is not finite, or its node was deleted; or the bank is ``read_only`` or
                closed. Nothing is put then.
        """
        with self._change():
            cast = {self.layout.check_node(*node, generic=True): self._cast(node, own) for node, own in blocks.items()}
            if self._disk is None:
                self._write(cast)
                return
            with self._lock:
                self._uncommitted |= cast
                self._forget(cast)

    def commit(self) -> None:
        """Write what was ``put`` since the last commit to the disk: all of it, or nothing if that fails.

        Raises:
            ValueError: The bank is ``read_only`` or closed, or the disk fails; the message says what is left to do.
        """
        with self._change():
            if blocks := dict(self._uncommitted):
                self._write(blocks, settled=blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Editing

    def block(self, level: int, node: int, *, subtree: bool = False) -> None:
        """Leave a node out of what is fetched: contexts through it read the model with that level missing.

        All others read what they did, to the bit. ``unblock`` takes it back, to the bit. A node of a level without
        memory may be blocked too, for ``route`` to pass over.

        Args:
            level: Of the node.
            node: Its number.
            subtree: Block its descendants too.

        Raises:
            ValueError: There is no such node, or the bank is ``read_only`` or closed.
        """
        self._mark(level, node, lambda mark: mark | Mark.BLOCKED, subtree=subtree)

    def unblock(self, level: int, node: int, *, subtree: bool = False) -> None:
        """Take ``block`` back; its arguments are the same."""
        self._mark(level, node, lambda mark: mark & ~Mark.BLOCKED, subtree=subtree)

    def delete(self, level: int, node: int, *, subtree: bool = False) -> None:
        """Overwrite a node's block with zeros, for good; it is left out from then on, as if it were blocked.

        What the document that it was trained on left in the other nodes of its path, and in a model that was trained
        with it, stays there; so do copies that file systems, disks and checkpoints keep.

        Args:
            level: Of the node.
            node: Its number.
            subtree: Delete its descendants too.

        Raises:
            ValueError: There is no such node, or the bank is ``read_only`` or closed.
        """
        self._mark(level, node, lambda mark: Mark.DELETED, subtree=subtree)

    def add_child(self, level: int, node: int, centroid: Tensor) -> Node:
        """Add a child to a node, in a place that was deleted or that nothing is routed to.

        A place is free if no node below it has a block any more. The child and its descendants, which have the same
        centroid, start with their initial blocks, which add nothing.

        Contexts of the node go to the nearest of its children as they are now: those that lie nearer to the new
        centroid go to it, and those that went to the child which was deleted go to any. All other contexts of the node,
        and those of other nodes, read what they did, to the bit. The whole tree is written anew.

        Args:
            level: Of the parent; 0 for the root.
            node: Number of the parent; 0 for the root.
            centroid: A mean of L2-normalised embeddings, which no other child has.

        Shape:
            centroid: (width,).

        Returns:
            The child.

        Raises:
            ValueError: There is no such node, ``centroid`` does not fit, there is no place, or the bank is
                ``read_only`` or closed.
        """
        with self._change():
            child = editing.free_child(self.tree, level, node, self._storage.marks, self._uncommitted)
            nodes = editing.descendants(self.layout.branching, self.layout.depth, child)
            tree = editing.with_child(self.tree, nodes, centroid)
            self._write({}, dict.fromkeys(nodes, Mark(0)), tree)
        return child

    # Whole banks

    def merge(self, parts: Mapping[int, "MemoryBank"]) -> None:
        """Take over what copies of this bank were trained to, each in other subtrees of the root.

        Of each subtree, what this bank has is replaced by what the part has: blocks, and what is blocked or deleted.
        That is one commit for each. All parts are checked before the first.

        Args:
            parts: By the children of the root, the bank whose subtree to take; ``branching``, the number behind the
                last child, stands for the generic blocks.

        Raises:
            ValueError: A part is of another layout, tree or seed, there is no such child, or the bank is ``read_only``
                or closed.
        """
        with self._change():
            for subtree, part in parts.items():
                editing.check_part(self, subtree, part)
            for subtree, part in parts.items():
                nodes = editing.subtree_nodes(self.layout, subtree)
                marks = {node: part.mark(node) for node in nodes}
                held = {*part.written()}
                blocks = {node: part.block_of(*node) for node in nodes if node in held}
                kept = {node: mark | (Mark.WRITTEN * (node in blocks)) for node, mark in marks.items()}
                self._write(blocks, kept, settled=nodes)

    def copy_to(self, path: str | Path | None = None, *, branching: int | None = None) -> "MemoryBank":
        """Copy the bank, with what was not committed.

        Args:
            path: Folder to make for the copy, which is there as a whole or not at all; None for a bank in memory.
            branching: Children of a node in the copy, as many or more: room for ``add_child``. Nodes get other numbers
                then, and those without a block other initial ones.

        Returns:
            The copy, open, with budgets as this one has.

        Raises:
            ValueError: There is something at ``path``, ``branching`` is less than it was, or another process wrote to
                the bank meanwhile.
        """
        layout, tree, target = self.layout, self.tree, None if path is None else Path(path).absolute()
        if branching is not None:
            layout, tree = replace(layout, branching=branching), editing.widened(tree, branching)
        with self._writing, editing.folder_in_one(target) as folder:
            device = self._storage.device if folder is None else "cpu"
            copy = type(self).create(tree, layout, path=folder, seed=self.seed, device=device, **self._budgets)
            try:
                self._copy_into(copy)
            except BaseException:
                copy.close()
                raise
            if target is None:
                return copy
            copy.close()
        return type(self).open(target, **self._budgets)

    def verify(self) -> list[Node]:
        """Read every block on disk and return the nodes whose block is not what was written."""
        self._check_open()
        return [] if self._disk is None else self._disk.verify()

    def __repr__(self) -> str:
        where = "memory" if self.path is None else repr(str(self.path))
        return f"{type(self).__name__}({self.layout.bank_parameters:,} parameters in {where})"

    # Parts

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Make a change alone."""
        with self._writing:
            self._check_open()
            if self.read_only:
                raise ValueError(
                    f"the bank at path={str(self.path)!r} can only be read: it was opened with read_only=True, or "
                    f"before this process was forked; write where it was opened for writing"
                )
            yield

    def _write(
        self,
        blocks: Mapping[Node, Tensor],
        marks: Mapping[Node, int] | None = None,
        tree: ClusterTree | None = None,
        *,
        settled: Iterable[Node] = (),
    ) -> None:
        """Write to the storage, and forget what that changes, in one step for all other threads.

        Args:
            blocks: As the storage takes them, and so ``marks`` and ``tree``.
            marks: To set.
            tree: The new one.
            settled: Nodes for which nothing waits to be committed any more, once this counts.
        """
        with self._lock:
            before = None if self._disk is None else self._disk.version
            try:
                self._storage.write(blocks, marks, tree)
            finally:  # a commit that fails may count all the same, with something left to do
                if self._disk is None or self._disk.version != before:
                    for node in settled:
                        self._uncommitted.pop(node, None)
                    self._forget([*blocks, *(marks or {})])

    def _mark(self, level: int, node: int, change: Callable[[Mark], Mark], *, subtree: bool) -> None:
        root = self.layout.check_place(level, node)
        with self._change():
            nodes = editing.descendants(self.layout.branching, self.layout.depth, root) if subtree else [root]
            marks = {own: change(self.mark(own)) for own in nodes}
            self._write({}, marks, settled=[own for own, mark in marks.items() if mark & Mark.DELETED])

    def _copy_into(self, copy: "MemoryBank") -> None:
        """Write blocks, some at a time, and marks to a fresh copy."""

        def place(node: Node) -> Node:
            return editing.renumbered(node, self.layout.branching, copy.layout.branching)

        self._follow()
        before = None if self._disk is None else self._disk.version
        blocks: dict[Node, Tensor] = {}
        waiting = 0
        for node in self.written():
            with suppress(NotWrittenError):  # the version has changed then
                blocks[place(node)] = own = self._read(node)
                waiting += own.nbytes
            if waiting > COPIED_AT_ONCE:
                copy._write(blocks)
                blocks, waiting = {}, 0
        copy._write(blocks)
        marks = {
            place(Node(level, node)): int(self._storage.marks(level)[node])
            for level in range(1, self.layout.depth + 1)
            for node in (self._storage.marks(level) & ~int(Mark.WRITTEN)).nonzero().squeeze(-1).tolist()
        }
        copy._write({}, marks)
        self._follow()
        if self._disk is not None and self._disk.version != before:
            raise ValueError(f"the bank at path={str(self.path)!r} was written to meanwhile; copy it again")

    def _cast(self, node: tuple[int, int], block: Tensor) -> Tensor:
        """Return a block to keep, in the layout's dtype: a copy, unless the storage makes one.

        Raises:
            ValueError: It does not fit.
        """
        where = self.layout.check_node(*node, generic=True)
        shape = self.layout.block_shape(where.level)
        if tuple(block.shape) != shape or not block.is_floating_point():
            raise ValueError(
                f"blocks[{tuple(where)}] has shape {tuple(block.shape)} and dtype {block.dtype}; it must be floating "
                f"point, {shape}"
            )
        if self.mark(where) & Mark.DELETED:
            raise ValueError(f"blocks[{tuple(where)}] is for a node that was deleted; use add_child to open its place")
        with torch.inference_mode(False):  # whoever fetches it may want gradients
            on_disk = self._disk is not None
            cast = block.detach().to(self._storage.device, self.layout.dtype, copy=on_disk).contiguous()
        if not cast.isfinite().all():
            raise ValueError(
                f"blocks[{tuple(where)}] is not finite in {self.layout.dtype}; lower the learning rate, or leave it out"
            )
        return cast
