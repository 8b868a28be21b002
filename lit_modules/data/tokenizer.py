"""Tokenizers: bytes, which need nothing, or a JSON file of the `tokenizers` library."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What `TextData` and text generation need.

    Attributes:
        vocab_size: One more than the largest id.
        fingerprint: Changes whenever the same text may give other ids.
    """

    vocab_size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens not added."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; what is not valid UTF-8 becomes U+FFFD."""

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[np.unsignedinteger]]:
        """Return the ids of many pieces of UTF-8, each in the narrowest unsigned type that holds ``vocab_size``."""


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name.

    Args:
        name: ``"bytes"``, or the path of a ``tokenizer.json``.

    Raises:
        ValueError: There is no such file, it is not a tokenizer, or the `tokenizers` package is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    return FileTokenizer(Path(name).expanduser())


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text, no file, no unknown token."""

    vocab_size = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of UTF-8 bytes; a broken character becomes U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[np.unsignedinteger]]:
        """Return the pieces themselves, as arrays."""
        return [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]


class FileTokenizer:
    """A trained tokenizer of the `tokenizers` library, its truncation and padding switched off.

    Args:
        path: A ``tokenizer.json``.

    Raises:
        ValueError: There is no such file, it is not a tokenizer, or the `tokenizers` package is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"tokenizer={str(path)!r} is no file; pass 'bytes' or the path of a tokenizer.json")
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"tokenizer={str(path)!r} needs the tokenizers package; pip install 'memzoo[data]', or use 'bytes'"
            ) from error
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"tokenizer={str(path)!r} is not a tokenizer file ({error}); "
                f"pass a tokenizer.json saved by the tokenizers library"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=0) + 1

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens not added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[np.unsignedinteger]]:
        """Return the ids of every piece, the pieces shared out over the processor's cores."""
        dtype = np.min_scalar_type(self.vocab_size - 1)
        texts = [piece.decode("utf-8") for piece in pieces]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]
