"""Texts as vectors: what embeds them, and a way without a trained model, hashed n-grams of characters.

Feature hashing (arXiv 0902.2206): every n-gram adds its weight, with a sign, to a place that a hash chooses; the signs
make collisions cancel on average. It needs no download, and is the same in every process.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_positive


class Embedder(Protocol):
    """What makes vectors of texts, for a ``ClusterTree`` to cluster and route."""

    @property
    def fingerprint(self) -> str:
        """What changes whenever the same text may give another vector."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed every text, whatever the others are: (len(texts), width), floating point."""


@dataclass(frozen=True)
class HashedNgrams:
    """Embed texts by the n-grams of characters that they hold, cases folded, runs of white space made one.

    An n-gram that occurs ``count`` times weighs ``1 + log(count)``. Vectors have length 1; a text without n-grams is
    the zero vector.

    Args:
        dim: Width of the embeddings.
        ngram: Least and greatest number of characters; a space before the text and one behind it count.

    Raises:
        ValueError: ``dim`` is not positive, or ``ngram`` is no range of positive numbers.
    """

    dim: int = 256
    ngram: tuple[int, int] = (3, 5)

    def __post_init__(self) -> None:
        check_positive("dim", self.dim)
        if len(self.ngram) != 2 or not 1 <= self.ngram[0] <= self.ngram[1]:
            raise ValueError(f"ngram={self.ngram!r} is no range of lengths; use (least, greatest) from 1 on")

    @property
    def fingerprint(self) -> str:
        """What changes whenever the same text may give another vector."""
        return f"hashed n-grams, version 1, dim {self.dim}, ngram {self.ngram[0]} to {self.ngram[1]}"

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed every text.

        Shape:
            Returns (len(texts), dim), float32.

        Raises:
            ValueError: ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts={texts[:40]!r} is one string; pass a list of them: [text]")
        rows = torch.tensor([self._row(text) for text in texts], dtype=torch.float64).view(-1, self.dim)
        return F.normalize(rows, dim=-1).float()

    def _row(self, text: str) -> list[float]:
        row = [0.0] * self.dim
        for ngram, count in Counter(self._ngrams(text.casefold().split())).items():
            value = _hash(ngram)
            sign = 1 if value & 1 else -1
            row[(value >> 1) % self.dim] += sign * (1 + math.log(count))
        return row

    def _ngrams(self, words: Iterable[str]) -> Iterator[str]:
        text = " ".join(words)
        if not text:
            return
        text = f" {text} "
        for length in range(self.ngram[0], self.ngram[1] + 1):
            for start in range(len(text) - length + 1):
                yield text[start : start + length]


@lru_cache(maxsize=2**16)
def _hash(ngram: str) -> int:
    # Surrogates that stand alone have no UTF-8 of their own; texts read from disk may hold some.
    code = ngram.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(code, digest_size=8).digest(), "little")
