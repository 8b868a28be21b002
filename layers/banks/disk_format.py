"""What the folder of a memory bank holds: the names of its files, its header, its checksums."""

import json
import secrets
import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from memzoo.layers.banks.layout import BankLayout, Node
from memzoo.layers.banks.storage import Mark

FORMAT = "memzoo memory bank"
FORMAT_VERSION = 1
ALIGNMENT = 4096
"""Bytes that the start of every block is a multiple of: a page, and a sector of any disk."""
HEADER = "bank.json"
PIECE = 2**18
"""Bytes read, hashed or written at a time: they fit into a processor's own cache."""
_STAMP = 256  # bytes; the format, the identity, the commit and the checksum, which come first, are within


class CorruptBlockError(ValueError):
    """A block on disk is not what was written."""


@dataclass(frozen=True)
class Header:
    """``bank.json``: all of a bank but the numbers in its blocks and its tree. It is replaced as a whole.

    Attributes:
        layout: Of the blocks.
        seed: Of the initial blocks.
        tree: Fingerprint of the tree.
        identity: Of the bank, random.
        commit: Number of the last commit; 0 is the creation.
        marks: Of every level, for its nodes and its generic block.
        checksums: Of every level's blocks, as ``checksum_of``; 0 where nothing is written. Empty for levels without.
    """

    layout: BankLayout
    seed: int
    tree: str
    identity: str
    commit: int
    marks: tuple[Tensor, ...]
    checksums: "tuple[array[int], ...]"

    @classmethod
    def new(cls, layout: BankLayout, seed: int, tree: str) -> Self:
        """Return the header of a bank in which nothing was written yet."""
        counts = [layout.num_nodes(level) + 1 for level in range(1, layout.depth + 1)]
        marks = tuple(torch.zeros(count, dtype=torch.uint8) for count in counts)
        checksums = tuple(
            array("Q", bytes(8 * count * (rows > 0))) for count, rows in zip(counts, layout.rows, strict=True)
        )
        return cls(layout, seed, tree, secrets.token_hex(16), 0, marks, checksums)

    def following(self, checksums: Mapping[Node, int], marks: Mapping[Node, int], tree: str) -> Self:
        """Return the header of the next commit: blocks with these checksums, then these marks, and a tree."""
        new_marks = tuple(level.clone() for level in self.marks)
        new_checksums = tuple(array("Q", level) for level in self.checksums)
        for (level, node), checksum in checksums.items():
            new_marks[level - 1][node] |= int(Mark.WRITTEN)
            new_checksums[level - 1][node] = checksum
        for (level, node), mark in marks.items():
            new_marks[level - 1][node] = int(mark)
            if self.layout.rows[level - 1] and not mark & Mark.WRITTEN:
                new_checksums[level - 1][node] = 0
        return replace(self, commit=self.commit + 1, marks=new_marks, checksums=new_checksums, tree=tree)

    def is_written(self, node: Node) -> bool:
        """Whether a node's block is kept."""
        return bool(int(self.marks[node.level - 1][node.node]) & Mark.WRITTEN)

    def checksum(self, node: Node) -> int:
        """Return the checksum of a node's block."""
        return self.checksums[node.level - 1][node.node]

    def difference(self, other: "Header") -> set[Node]:
        """Return the nodes whose blocks or marks are not those of another header of the same bank."""
        found = set()
        for level in range(1, self.layout.depth + 1):
            changed = self.marks[level - 1] != other.marks[level - 1]
            if self.layout.rows[level - 1]:
                own, others = (
                    torch.frombuffer(header.checksums[level - 1], dtype=torch.int64) for header in (self, other)
                )
                changed |= own != others
            found |= {Node(level, node) for node in changed.nonzero().squeeze(-1).tolist()}
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the file says, as JSON has it."""
        first = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": self.identity, "commit": self.commit}
        levels = []
        for level, marks, checksums in zip(range(1, self.layout.depth + 1), self.marks, self.checksums, strict=True):
            facts: dict[str, Any] = {"level": level, "marks": _base64(marks.numpy())}
            if self.layout.rows[level - 1]:
                facts |= {
                    "file": level_file(level),
                    "blocks": self.layout.num_nodes(level) + 1,
                    "block_shape": list(self.layout.block_shape(level)),
                    "block_bytes": self.layout.block_bytes(level),
                    "stride": stride(self.layout, level),
                    "checksums": _base64(checksums),
                }
            levels.append(facts)
        rest = {
            "byte_order": "little",
            "checksums": "XXH3-64 of the XXH3-64s of pieces",
            "piece_bytes": PIECE,
            "seed": self.seed,
            "tree": {"file": tree_file(self.tree), "fingerprint": self.tree},
            "layout": self.layout.as_json(),
            "levels": levels,
        }
        return {**first, "checksum": _digest(first | rest), **rest}

    @cached_property
    def text(self) -> bytes:
        """The file's contents."""
        return json.dumps(self.facts, indent=1).encode()

    @property
    def stamp(self) -> bytes:
        """The beginning of the file, which tells commits, and banks, apart."""
        return self.text[:_STAMP]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], name: str) -> Self:
        """Return the header with these ``facts``, read from what is called ``name``.

        Raises:
            ValueError: They are of no bank, of one that another version wrote, or not what was written.
        """
        if facts.get("format") != FORMAT:
            raise ValueError(f"{name} is not the header of a memory bank; make one with MemoryBank.create")
        if facts.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{name} has format_version={facts.get('format_version')!r}; this version reads {FORMAT_VERSION}: open "
                f"it with the version of memzoo that wrote it"
            )
        if _digest({key: value for key, value in facts.items() if key != "checksum"}) != facts.get("checksum"):
            raise _damaged(name)
        return cls(
            layout=BankLayout.from_json(facts["layout"]),
            seed=facts["seed"],
            tree=facts["tree"]["fingerprint"],
            identity=facts["identity"],
            commit=facts["commit"],
            marks=tuple(
                torch.frombuffer(bytearray(b64decode(level["marks"])), dtype=torch.uint8) for level in facts["levels"]
            ),
            checksums=tuple(array("Q", b64decode(level.get("checksums", ""))) for level in facts["levels"]),
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the header of a bank.

        Raises:
            ValueError: There is none, or it is not as it was written.
        """
        path = folder / HEADER
        try:
            facts = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"path={str(folder)!r} holds no memory bank; make one with MemoryBank.create") from None
        except ValueError as error:
            raise _damaged(repr(str(path))) from error
        if not isinstance(facts, dict):
            raise _damaged(repr(str(path)))
        return cls.from_facts(facts, repr(str(path)))

    def is_current(self, folder: Path) -> bool:
        """Whether this is the header that lies in a folder, without reading all of it."""
        try:
            with open(folder / HEADER, "rb") as file:
                return file.read(_STAMP) == self.stamp
        except FileNotFoundError:
            return False


def level_file(level: int) -> str:
    """Name the file of a level's blocks."""
    return f"level_{level}.blocks"


def tree_file(fingerprint: str) -> str:
    """Name the file of a tree."""
    return f"tree-{fingerprint[:16]}.safetensors"


def stride(layout: BankLayout, level: int) -> int:
    """Count the bytes from one block of a level to the next."""
    return -(-layout.block_bytes(level) // ALIGNMENT) * ALIGNMENT


def file_bytes(layout: BankLayout, level: int) -> int:
    """Count the bytes of the file of a level's blocks, the generic one behind the others."""
    return stride(layout, level) * (layout.num_nodes(level) + 1)


def offset(layout: BankLayout, node: Node) -> int:
    """Return where in its file a node's block begins."""
    return node.node * stride(layout, node.level)


def bytes_of(block: Tensor) -> memoryview:
    """View the memory of a contiguous tensor of the CPU."""
    return block.detach().view(-1).view(torch.uint8).numpy().data


def checksum_of(data: "bytes | memoryview") -> int:
    """Return the checksum of bytes: that of the checksums of their pieces, so that several threads can share in it."""
    return checksum_of_pieces([checksum_of_piece(data[start : start + PIECE]) for start in range(0, len(data), PIECE)])


def checksum_of_pieces(checksums: Sequence[int]) -> int:
    """Return the checksum of bytes whose pieces have these."""
    return checksum_of_piece(b"".join(checksum.to_bytes(8, "little") for checksum in checksums))


def checksum_of_piece(data: "bytes | memoryview") -> int:
    """Return the XXH3 of bytes, 64 bits."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(data)


def check_byte_order() -> None:
    """Require a machine that keeps numbers as the files do.

    Raises:
        ValueError: It has the most significant byte first.
    """
    if sys.byteorder != "little":
        raise ValueError(f"byte order {sys.byteorder!r} is not that of a bank's files; use a little-endian machine")


def _base64(data: Any) -> str:
    return b64encode(data).decode()


def _digest(facts: Mapping[str, Any]) -> str:
    return f"{checksum_of_piece(json.dumps(facts).encode()):016x}"


def _damaged(name: str) -> ValueError:
    return ValueError(f"{name} is not as it was written: the file is damaged; copy the bank again")
