"""WordTokenizer: a token a word, of a vocabulary that is known beforehand."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class WordTokenizer:
    """Words between spaces, each a token; an id is a word's place in the vocabulary.

    Args:
        vocabulary: The words, no two alike.

    Example:
        >>> words = WordTokenizer(["<pad>", "rivers", "flow"])
        >>> words.encode("rivers flow")
        [1, 2]
        >>> words.decode([2, 1])
        'flow rivers'
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self.vocab_size = len(self.vocabulary)
        self.fingerprint = hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()
        self._ids = {word: number for number, word in enumerate(self.vocabulary)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of a text.

        Raises:
            ValueError: A word is not in the vocabulary.
        """
        words = text.split()
        if unknown := [word for word in words if word not in self._ids]:
            raise ValueError(
                f"text holds {unknown[0]!r}, none of the {self.vocab_size} words; use words of the vocabulary, or "
                f"tokenizer='bytes' for any text"
            )
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of ids, a space between them."""
        return " ".join(self.vocabulary[number] for number in ids)

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[NDArray[np.unsignedinteger]]:
        """Return the ids of many pieces of UTF-8."""
        dtype = np.min_scalar_type(self.vocab_size - 1)
        return [np.array(self.encode(piece.decode("utf-8")), dtype=dtype) for piece in pieces]
