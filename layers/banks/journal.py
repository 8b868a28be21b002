"""The journal of a memory bank on disk: a commit as a whole, before any of it is done."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from memzoo.layers.banks.disk_files import BlockFile, sync_folder, write_all, write_whole
from memzoo.layers.banks.disk_format import HEADER, PIECE, Header, bytes_of, checksum_of, offset
from memzoo.layers.banks.layout import Node

JOURNAL = "journal"
_FOOTER = struct.Struct("<8sQQ")
_MAGIC = b"memzooJ1"


@dataclass(frozen=True)
class Journal:
    """A file that is there from the moment in which a commit counts, until all of it is in its place.

    It holds the new blocks, one after the other; then, as JSON, the new header, where in the file the blocks are, and
    which nodes are to be overwritten with zeros; then, in 24 bytes, a name, the length of the JSON and its checksum.

    Attributes:
        path: Of the file.
        header: The new one.
        offsets: Of the new blocks.
        erased: Nodes to overwrite.
    """

    path: Path
    header: Header
    offsets: Mapping[Node, int]
    erased: tuple[Node, ...]

    @classmethod
    def write(
        cls, folder: Path, header: Header, blocks: Mapping[Node, Tensor], marks: Mapping[Node, int], tree: str
    ) -> Self:
        """Write the journal of the commit that follows a header; when this returns, the commit counts.

        Args:
            folder: Of the bank.
            header: The last.
            blocks: To write.
            marks: To set then.
            tree: Fingerprint of the tree from then on.

        Raises:
            OSError: It could not be written. Then there is none, or it is whole.
        """
        path, written = folder / JOURNAL, []

        def write(descriptor: int) -> None:
            offsets, checksums, end = {}, {}, 0
            for node, block in blocks.items():
                data = bytes_of(block.detach().to("cpu", header.layout.dtype).contiguous())
                write_all(descriptor, data)
                offsets[node], checksums[node] = end, checksum_of(data)
                end += len(data)
            new = header.following(checksums, marks, tree)
            erased = tuple(node for node in marks if header.is_written(node) and not new.is_written(node))
            facts = {"blocks": [[*node, start] for node, start in offsets.items()], "erased": erased}
            index = json.dumps({"header": new.facts, **facts}).encode()
            write_all(descriptor, index + _FOOTER.pack(_MAGIC, len(index), checksum_of(index)))
            written.append(cls(path, new, offsets, erased))

        write_whole(path, write)
        return written[0]

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the journal in a folder, or None if there is none or its end is not there."""
        path = folder / JOURNAL
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _FOOTER.size:
                    return None
                file.seek(size - _FOOTER.size)
                magic, length, checksum = _FOOTER.unpack(file.read(_FOOTER.size))
                if magic != _MAGIC or length > size - _FOOTER.size:
                    return None
                file.seek(size - _FOOTER.size - length)
                index = file.read(length)
        except FileNotFoundError:
            return None
        if checksum_of(index) != checksum:
            return None
        facts = json.loads(index)
        offsets = {Node(level, node): start for level, node, start in facts["blocks"]}
        header = Header.from_facts(facts["header"], repr(str(path)))
        return cls(path, header, offsets, tuple(Node(*node) for node in facts["erased"]))

    def follows(self, header: Header) -> bool:
        """Whether this is of the commit after that of a header."""
        return (self.header.identity, self.header.commit) == (header.identity, header.commit + 1)

    def read(self, node: Node, out: memoryview) -> int | None:
        """Read a block, and return its checksum; None if it is not there.

        Raises:
            FileNotFoundError: All is in its place by now.
        """
        with BlockFile(self.path) as file:
            return file.read(out, self.offsets[node])

    def is_whole(self) -> bool:
        """Whether all blocks are what was written."""
        size = self.header.layout.block_bytes
        return all(
            self.read(node, memoryview(bytearray(size(node.level)))) == self.header.checksum(node)
            for node in self.offsets
        )

    def apply(self, files: Mapping[int, BlockFile]) -> None:
        """Do what the commit is; doing it again, or going on behind where it was left, comes to the same.

        Raises:
            OSError: It could not be done.
        """
        layout, zeros = self.header.layout, bytes(PIECE)
        with open(self.path, "rb") as file:
            for node, start in self.offsets.items():
                file.seek(start)
                for done in range(0, layout.block_bytes(node.level), PIECE):
                    piece = file.read(min(PIECE, layout.block_bytes(node.level) - done))
                    files[node.level].write(piece, offset(layout, node) + done)
        for node in self.erased:
            for done in range(0, layout.block_bytes(node.level), PIECE):
                piece = zeros[: layout.block_bytes(node.level) - done]
                files[node.level].write(piece, offset(layout, node) + done)
        for level in sorted({node.level for node in (*self.offsets, *self.erased)}):
            files[level].sync()
        folder = self.path.parent
        write_whole(folder / HEADER, lambda descriptor: write_all(descriptor, self.header.text))
        sync_folder(folder)
