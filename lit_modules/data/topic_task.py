"""TopicTask: documents of topics, which tell facts, some often and most of them seldom."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from memzoo.layers.errors import check_number, check_positive
from memzoo.lit_modules.data.phone_book import CONSONANTS, VOWELS
from memzoo.lit_modules.data.tasks import SPLITS, draw_distinct

BUCKETS = ("common", "frequent", "middle", "rare")
FACTS, WORDS = len(SPLITS), len(SPLITS) + 1  # seeds that no split has
LETTERS = 6  # of a word: so many that words share few n-grams


@dataclass(frozen=True)
class TopicTask:
    """Documents of topics, and the facts that they tell.

    A document begins with words, most of them its topic's own, the others common to all topics, in any order. Facts
    follow, each a key and its value, a token each; no fact comes twice:

        dorifa kuleso banuti ... dorifa  k17 v203  k4 v88  k51 v9 ...

    All topics have the same keys, and a value of its own, drawn alike, for each: which one is right depends on the
    words. A topic's i-th fact (from 1) is drawn with a weight of ``i ** -zipf``; which key that is differs between
    topics. Common facts have keys of their own, the same values in all topics, and are drawn alike.

    Facts belong to four buckets: "common", and a topic's own ones by rank, up to the cube root of ``facts_per_topic``
    ("frequent"), its square ("middle") and the rest ("rare"). With ``zipf=1`` each of these three is asked for about as
    often as the others, so the rare ones, being many, are each told seldom.

    Args:
        num_topics: Topics, told alike often.
        facts_per_topic: Facts that a topic has of its own.
        num_common_facts: Facts that hold in all topics.
        num_values: Values to guess from: a fact is ``log2(num_values)`` bits.
        words_per_topic: Words that no other topic has.
        num_common_words: Words that all have.
        context_words: Words of a document; a quarter of them, rounded down, are common ones.
        num_statements: Facts that a document tells.
        common_share: Of the weight of all facts, what common facts have.
        zipf: Exponent of the frequencies; 0 tells all facts of a topic alike often.
        seed: Of the values, of which keys are frequent, and of how words are spelt.

    Raises:
        ValueError: An argument is out of range, or a document would tell more facts than its topic has.
    """

    num_topics: int = 64
    facts_per_topic: int = 64
    num_common_facts: int = 16
    num_values: int = 256
    words_per_topic: int = 3
    num_common_words: int = 32
    context_words: int = 8
    num_statements: int = 8
    common_share: float = 0.25
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_topics", "facts_per_topic", "num_common_facts", "num_values", "words_per_topic"):
            check_positive(name, getattr(self, name))
        for name in ("num_common_words", "context_words", "num_statements"):
            check_positive(name, getattr(self, name))
        if self.facts_per_topic < (least := 8):
            raise ValueError(f"facts_per_topic={self.facts_per_topic} fills no three buckets; use at least {least}")
        if not 0 < self.common_share < 1:
            raise ValueError(f"common_share={self.common_share} is not between 0 and 1, both excluded; use 0.25")
        check_number("zipf", self.zipf, zero=True)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; use a whole number >= 0")
        if self.num_statements > (most := self.num_common_facts + self.facts_per_topic):
            raise ValueError(
                f"num_statements={self.num_statements} is more than the {most} facts of a topic, which come once in a "
                f"document; use fewer, or raise facts_per_topic"
            )

    @property
    def vocab_size(self) -> int:
        """Token ids: common words, the topics' words, common keys, keys, values, in this order."""
        return self.first_value + self.num_values

    @property
    def first_key(self) -> int:
        """Id of the first key; all below are words."""
        return self.num_common_words + self.num_topics * self.words_per_topic

    @property
    def first_value(self) -> int:
        """Id of the first value; values are the last ids."""
        return self.first_key + self.num_common_facts + self.facts_per_topic

    @property
    def document_length(self) -> int:
        """Tokens of a document."""
        return self.context_words + 2 * self.num_statements

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each fact of a topic is drawn, (num_common_facts + facts_per_topic,): common ones, then by rank."""
        common = np.full(self.num_common_facts, self.common_share / self.num_common_facts)
        own = np.arange(1, 1 + self.facts_per_topic) ** -self.zipf
        return np.concatenate([common, (1 - self.common_share) * own / own.sum()])

    @cached_property
    def facts(self) -> Tensor:
        """The (key, value) of every fact, ordered like ``weights``: (num_topics, facts, 2) int64."""
        rng = np.random.default_rng((self.seed, FACTS))
        first_own = self.first_key + self.num_common_facts
        common = np.arange(self.first_key, first_own), rng.integers(self.num_values, size=self.num_common_facts)
        own_shape = self.num_topics, self.facts_per_topic
        keys = rng.permuted(np.tile(np.arange(first_own, self.first_value), (self.num_topics, 1)), axis=1)
        pairs = np.stack([keys, rng.integers(self.num_values, size=own_shape)], -1)
        shared = np.broadcast_to(np.stack(common, -1), (self.num_topics, self.num_common_facts, 2))
        facts = np.concatenate([shared, pairs], 1)
        facts[..., 1] += self.first_value
        return torch.from_numpy(facts)

    @cached_property
    def buckets(self) -> dict[str, range]:
        """The places in ``weights`` that make up each bucket, by name, from the most frequent to the rarest."""
        edges = [0, *(round(self.facts_per_topic ** (third / 3)) for third in (1, 2, 3))]
        bounds = [0, *(self.num_common_facts + edge for edge in edges)]
        return {name: range(*bound) for name, bound in zip(BUCKETS, pairwise(bounds), strict=True)}

    def contexts(self, topics: Tensor, rng: np.random.Generator) -> Tensor:
        """Draw the words with which documents of these topics begin: (topics,) -> (topics, context_words)."""
        shape = len(topics), self.context_words
        words = self.num_common_words + torch.from_numpy(rng.integers(self.words_per_topic, size=shape))
        words += self.words_per_topic * topics[:, None]
        shared = self.context_words // 4
        words[:, :shared] = torch.from_numpy(rng.integers(self.num_common_words, size=(len(topics), shared)))
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(self.context_words), (len(topics), 1)), axis=1))
        return words.gather(1, order)

    def documents(self, count: int, seed: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw documents; every seed, a number or a sequence of them, gives its own.

        Returns:
            Token ids, (count, document_length), and topics, (count,).
        """
        rng = np.random.default_rng(seed)
        topics = torch.from_numpy(rng.integers(self.num_topics, size=count))
        told = draw_distinct(rng, count, self.weights, self.num_statements)
        statements = self.facts[topics[:, None], told].flatten(1)
        return torch.cat([self.contexts(topics, rng), statements], 1), topics

    def questions(self, topics: Tensor, facts: Tensor, rng: np.random.Generator) -> Tensor:
        """Ask for facts, given by topic and place in ``weights``: words drawn anew, the key, the value.

        Shape:
            topics, facts: (questions,). Returns (questions, context_words + 2) token ids.
        """
        return torch.cat([self.contexts(topics, rng), self.facts[topics, facts]], 1)

    def render(self, tokens: Tensor) -> list[str]:
        """Return the words of every row of tokens as text; keys and values are left out."""
        return [" ".join(self._words[i] for i in row if i < self.first_key) for row in tokens.tolist()]

    @cached_property
    def _words(self) -> list[str]:
        """The spelling of every word, no two alike: syllables of a consonant and a vowel."""
        rng = np.random.default_rng((self.seed, WORDS))
        words: dict[str, None] = {}
        while len(words) < self.first_key:
            pairs = rng.integers((len(CONSONANTS), len(VOWELS)), size=(LETTERS // 2, 2)).tolist()
            words["".join(CONSONANTS[consonant] + VOWELS[vowel] for consonant, vowel in pairs)] = None
        return list(words)
