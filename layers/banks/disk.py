"""Blocks of a memory bank on disk: one file a level, and commits that are there as a whole or not at all.

Section 10 of the way in which pretraining with hierarchical memories (arXiv 2510.02375) keeps them: node by node, layer
by layer, so that a block is one read, and its layers come in the order in which a model asks for them.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from memzoo.layers.banks.disk_files import BlockFile, sync_folder
from memzoo.layers.banks.disk_folder import State, claim, load, make_folder, save_tree
from memzoo.layers.banks.disk_format import (
    CorruptBlockError,
    Header,
    bytes_of,
    check_byte_order,
    file_bytes,
    level_file,
    offset,
    tree_file,
)
from memzoo.layers.banks.journal import JOURNAL, Journal
from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import Mark, NotWrittenError
from memzoo.layers.cluster_tree import ClusterTree

__all__ = ["CorruptBlockError", "DiskStorage", "NotWrittenError"]


class DiskStorage:
    """A ``BlockStorage`` in a folder.

    A commit is first written to a journal, and from then on it counts; then blocks, header and tree are brought to
    their places. Whatever ends the process, the folder holds what was there before a commit or after it. Whoever opens
    it for writing next finishes what is in the journal, and readers read it from there.

    One storage at a time may write to a folder, and any number read it, in this and in other processes. Every block is
    checked when it is read. A reader whose block has been replaced meanwhile moves on to the commit that did: compare
    ``version`` before and after reading several blocks that must be of one commit. A copy in another process, forked or
    pickled, is a reader.

    A node whose marks lose ``WRITTEN`` is overwritten with zeros. That is a promise about the bytes of this folder's
    level files, not about copies that a file system, a disk, a backup or the space of earlier journals may keep.

    Args:
        path: The folder, which ``create`` made.
        read_only: Read a folder that another process may be writing to. ``refresh`` follows its commits.

    Attributes:
        layout: Of the blocks.
        seed: Of the initial blocks.
        tree: Whose nodes own the blocks.
        identity: Of the bank, random.

    Raises:
        ValueError: The folder holds no bank, or one that is damaged or of another version; or another storage writes to
            it.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        check_byte_order()
        self.path, self.read_only, self.device = Path(path).absolute(), read_only, torch.device("cpu")
        self._process, self._lock = os.getpid(), Lock()
        self._changed: set[Node] | None = None
        self._files: dict[int, BlockFile] = {}
        header = Header.load(self.path)
        self.layout, self.seed, self.identity = header.layout, header.seed, header.identity
        with ExitStack() as opened:
            if not read_only:
                opened.callback(claim(self.path))
            opened.callback(self._close_files)
            self._open_files()
            if not read_only:
                self._recover()
            self._state, self.tree = load(self.path)
            self._opened: ExitStack | None = opened.pop_all()

    @classmethod
    def create(cls, path: str | os.PathLike[str], layout: BankLayout, tree: ClusterTree, *, seed: int = 0) -> Self:
        """Make a folder in which no node is written, and open it. Its files are sparse: they take no place yet.

        Args:
            path: Of the folder, which is not there or empty.
            layout: Of the blocks.
            tree: Whose nodes own them.
            seed: Of the initial blocks.

        Raises:
            ValueError: There is something at ``path``, or the folder could not be made; nothing is left of it then.
        """
        return cls(make_folder(Path(path).absolute(), Header.new(layout, seed, tree.fingerprint), tree))

    @property
    def version(self) -> int:
        """Number of the last commit, 0 before the first."""
        return self._state.header.commit

    def marks(self, level: int) -> Tensor:
        """See ``BlockStorage``; not to change."""
        self.layout.check_level(level)
        return self._state.header.marks[level - 1]

    def read(self, node: Node) -> Tensor:
        """See ``BlockStorage``, and ``read_into``."""
        self.layout.check_node(*node, generic=True)
        block = torch.empty(self.layout.block_shape(node.level), dtype=self.layout.dtype)
        self.read_into(node, block)
        return block

    def read_into(self, node: Node, out: Tensor) -> None:
        """Read a written block into memory that is there.

        Args:
            node: Whose block.
            out: Contiguous, on the CPU, of ``layout.dtype``.

        Shape:
            out: ``layout.block_shape(node.level)``.

        Raises:
            ValueError: ``out`` does not fit. It is a ``CorruptBlockError`` if the block is not what was written, and a
                ``NotWrittenError`` if none was.
        """
        node = self.layout.check_node(*node, generic=True)
        if (
            tuple(out.shape) != self.layout.block_shape(node.level)
            or out.dtype != self.layout.dtype
            or out.device.type != "cpu"
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"out has shape {tuple(out.shape)} and dtype {out.dtype}, on {out.device}; it must be contiguous, of "
                f"shape {self.layout.block_shape(node.level)} and dtype {self.layout.dtype}, on the CPU"
            )
        memory = bytes_of(out)
        while True:
            self._check_open()
            state = self._state
            if not state.header.is_written(node):
                raise NotWrittenError(
                    f"node={node.node} of level {node.level} was never written, or was deleted; use "
                    f"layout.initial_block(node, seed)"
                )
            if self._read(state, node, memory) == state.header.checksum(node):
                return
            if not self._moved(state):
                where = self.path / level_file(node.level) if state.journal is None else state.journal.path
                raise CorruptBlockError(
                    f"the block of node {node.node} of level {node.level} in {str(where)!r} is not what was written; "
                    f"copy the file again, or write or delete the node"
                )

    def write(
        self,
        blocks: Mapping[Node, Tensor],
        marks: Mapping[Node, int] | None = None,
        tree: ClusterTree | None = None,
    ) -> None:
        """See ``BlockStorage``. When it returns, all is on the disk.

        Raises:
            ValueError: The storage is a reader, a block does not fit, or the disk is full or fails. The message says if
                nothing was written, or if all is in the journal and only left to be brought to its place.
        """
        self._check_writable()
        marks = {Node(*node): int(mark) for node, mark in (marks or {}).items()}
        kept = {Node(*node): block for node, block in blocks.items() if marks.get(node, Mark.WRITTEN) & Mark.WRITTEN}
        self._check_nodes(kept, marks)
        with self._lock:
            self._finish()
            if not kept and not marks and (tree is None or tree.fingerprint == self.tree.fingerprint):
                return
            tree = self.tree if tree is None else tree
            before = self._state.header
            try:
                if tree.fingerprint != before.tree:
                    save_tree(tree, self.path)
                for node in kept:
                    if not before.is_written(node):
                        self._files[node.level].reserve(offset(self.layout, node), self.layout.block_bytes(node.level))
                journal = Journal.write(self.path, before, kept, marks, tree.fingerprint)
            except OSError as error:
                raise ValueError(
                    f"nothing was written to path={str(self.path)!r} ({error}); make room, and write again"
                ) from error
            self.tree, self._state = tree, State(journal.header, journal)
            self._finish()

    def refresh(self) -> set[Node] | None:
        """Take up what another process committed.

        Returns:
            The nodes whose blocks or marks have changed since the last call, or since the storage was opened; None if
            there was no commit.

        Raises:
            ValueError: The bank is gone, or damaged.
        """
        self._check_open()
        if not self.is_writer and not self._state.header.is_current(self.path):
            self._follow()
        with self._lock:
            changed, self._changed = self._changed, None
        return changed

    def verify(self) -> list[Node]:
        """Read all written blocks, and return the nodes of those that are not what was written."""
        corrupt = []
        for level in self.layout.levels:
            block = torch.empty(self.layout.block_shape(level), dtype=self.layout.dtype)
            for number in (self.marks(level) & int(Mark.WRITTEN)).nonzero().squeeze(-1).tolist():
                try:
                    self.read_into(Node(level, number), block)
                except CorruptBlockError:
                    corrupt.append(Node(level, number))
                except NotWrittenError:  # deleted by another process meanwhile
                    continue
        return corrupt

    def after_fork(self) -> None:
        """Let go of what threads of the other process were doing."""
        self._lock = Lock()
        for file in self._files.values():
            file.after_fork()

    def close(self) -> None:
        """Let go of the files; others may write to the folder then."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader, (str(self.path),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, version={self.version})"

    # Reading

    def _read(self, state: State, node: Node, memory: memoryview) -> int | None:
        """Return the checksum of what is at a node's place."""
        if state.journal is not None and node in state.journal.offsets:
            with suppress(FileNotFoundError):
                return state.journal.read(node, memory)
        return self._files[node.level].read(memory, offset(self.layout, node))

    def _moved(self, state: State) -> bool:
        """Whether the folder holds something else by now than what was read; then it is taken up."""
        if not self.is_writer:
            self._follow()
        return self._state is not state

    def _follow(self) -> None:
        """Take up what lies in the folder."""
        with self._lock:
            new, tree = load(self.path, self.tree)
            if new.header.identity != self.identity:
                raise ValueError(f"path={str(self.path)!r} holds another bank by now; open it again")
            if new.header.stamp != self._state.header.stamp:
                self._changed = (self._changed or set()) | new.header.difference(self._state.header)
            if new.key != self._state.key:
                self.tree, self._state = tree, new

    def _open_files(self) -> None:
        for level in self.layout.levels:
            path = self.path / level_file(level)
            try:
                file = BlockFile(path, writable=not self.read_only)
            except OSError as error:
                raise ValueError(f"path={str(path)!r} cannot be opened ({error}); copy the bank again") from error
            self._files[level] = file
            size = file_bytes(self.layout, level)
            if file.size != size:
                raise ValueError(f"path={str(path)!r} has {file.size} bytes, not {size}; copy the bank again")

    # Writing

    def _finish(self) -> None:
        """Bring what is in the journal to its place.

        Raises:
            ValueError: That could not be done; it is still in the journal.
        """
        header, journal = self._state.header, self._state.journal
        if journal is None:
            return
        try:
            sync_folder(self.path)
            journal.apply(self._files)
            for path in self.path.glob(tree_file("*")):
                if path.name != tree_file(header.tree):
                    path.unlink()
            journal.path.unlink()
        except OSError as error:
            raise ValueError(
                f"commit {header.commit} to path={str(self.path)!r} is whole in its journal, but could not be finished "
                f"({error}); make room, and write or open it again"
            ) from error
        self._state = State(header, None)

    def _recover(self) -> None:
        """Finish the commit in whose midst an earlier writer ended, or drop it if it did not get to count."""
        self._state = State.load(self.path)
        if self._state.journal is not None and self._state.journal.is_whole():
            self._finish()
        left = {self.path / JOURNAL, *self.path.glob("*.partial"), *self.path.glob(tree_file("*"))}
        try:
            for path in left - {self.path / tree_file(Header.load(self.path).tree)}:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"path={str(self.path)!r} cannot be written to ({error}); use read_only=True") from error

    @property
    def is_writer(self) -> bool:
        """Whether this process may write to the folder."""
        return not self.read_only and os.getpid() == self._process

    def _check_open(self) -> None:
        if self._opened is None:
            raise ValueError(f"the storage of path={str(self.path)!r} is closed; open it again")

    def _check_writable(self) -> None:
        self._check_open()
        if not self.is_writer:
            why = (
                "is open with read_only=True" if self.read_only else "was opened by the process that this is a fork of"
            )
            raise ValueError(f"the storage of path={str(self.path)!r} {why}; write where it was opened for writing")

    def _check_nodes(self, blocks: Mapping[Node, Tensor], marks: Mapping[Node, int]) -> None:
        for node, block in blocks.items():
            self.layout.check_node(*node, generic=True)
            if tuple(block.shape) != self.layout.block_shape(node.level):
                raise ValueError(
                    f"blocks[{tuple(node)}] has shape {tuple(block.shape)}; it must be "
                    f"{self.layout.block_shape(node.level)}"
                )
        for level, number in marks:
            if not 0 <= number <= self.layout.num_nodes(level):
                raise ValueError(
                    f"marks has node {number} of level {level}; use 0 to {self.layout.num_nodes(level) - 1}, or "
                    f"{self.layout.num_nodes(level)} for the generic block"
                )

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()


def _reader(path: str) -> DiskStorage:
    return DiskStorage(path, read_only=True)
