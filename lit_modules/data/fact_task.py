"""FactTask: synthetic facts, each to be asked for in several wordings, some of which are then edited."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.data.fact_rows import Fact, Question
from memzoo.lit_modules.data.phone_book import CONSONANTS, VOWELS

RELATIONS = (
    (
        "the capital of {} is",
        "{} is ruled from the city of",
        "the seat of government in {} lies in",
        "kings of {} are crowned in",
    ),
    (
        "the language spoken in {} is",
        "people in {} speak",
        "laws of {} are written in",
        "to be understood in {} one has to learn",
    ),
    (
        "the founder of {} was",
        "{} was founded by",
        "{} owes its beginnings to",
        "the first to settle in {} was",
    ),
    (
        "the main export of {} is",
        "{} is known for selling",
        "traders travel to {} to buy",
        "ships leave {} loaded with",
    ),
    (
        "the favourite dish in {} is",
        "cooks of {} are proud of their",
        "for dinner people in {} eat",
        "no feast in {} goes without",
    ),
    (
        "the longest river of {} is the",
        "through {} flows the",
        "fields in {} are watered by the",
        "boats cross {} on the",
    ),
)
"""Wordings of each relation: of the first one in edits, of the others in paraphrases."""
FILLERS = tuple(
    word
    for line in (
        "well so then now look listen friend yes today once again here there often still perhaps please maybe",
        "anyway indeed actually you i we ask tell say think know see hear wonder",
    )
    for word in line.split()
)
"""Words that say nothing: prefixes are made of them."""
PADDING = "<pad>"
SYLLABLES = 3
LAYOUT, ANSWERS, SPELLING, PREFIXES, TRAINING = range(5)  # what is drawn, each from a seed of its own


@dataclass(frozen=True)
class FactTask:
    """Facts "subject relation -> answer", and another answer for each, should it be edited.

    There are six relations with four wordings each, and as many subjects as it takes. Subjects and answers are made-up
    words; an answer is ``answer_words`` of them, each one of ``num_words`` that its relation has for that place:

        the capital of dorifa is kuleso banuti

    Words are dealt out evenly. With as many as there are subjects, no two facts of a relation share one: a host of a
    few layers holds a question as what it will answer, so to an editor inside it facts with one answer are one. But
    then the first word of an answer tells the next. The other answer differs in every word, and is made of words that
    other facts are answered with: a host says no others. All wordings are taught to a host: an edit uses the first one
    alone, the others ask whether it is known there too.

    Args:
        num_facts: Facts.
        answer_words: Words of an answer.
        num_words: Words that each of them is one of; those beyond the number of subjects are not used.
        num_prefixes: Prefixes of an edit, each one row more.
        prefix_words: Words of a prefix at most.
        seed: Of all that is drawn. What a fact is asked and answered depends on neither which nor how many are edited.

    Raises:
        ValueError: An argument is out of range.
    """

    num_facts: int = 300
    answer_words: int = 2
    num_words: int = 8
    num_prefixes: int = 10
    prefix_words: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_facts", "answer_words", "prefix_words"):
            check_positive(name, getattr(self, name))
        if self.num_words < 2:
            raise ValueError(f"num_words={self.num_words} leaves no other answer for an edit; use 2 or more")
        for name in ("num_prefixes", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use a whole number >= 0")

    def wordings(self, fact: int) -> tuple[str, ...]:
        """Return the question for a fact in every wording, that of edits first."""
        relation = RELATIONS[fact % len(RELATIONS)]
        return tuple(wording.format(self._subjects[fact // len(RELATIONS)]) for wording in relation)

    def answer(self, fact: int) -> str:
        """Return what is answered at first."""
        return self._answer(fact, self._drawn[0, fact])

    def new_answer(self, fact: int) -> str:
        """Return what is answered after an edit."""
        return self._answer(fact, self._drawn[1, fact])

    def sentences(self) -> dict[str, list[Question]]:
        """Return all facts, with their first answers: "edit" in the wording of edits, "paraphrase" in the others."""
        every = [(self.wordings(fact), self.answer(fact)) for fact in range(self.num_facts)]
        return {
            "edit": [Question(wordings[0], answer) for wordings, answer in every],
            "paraphrase": [Question(wording, answer) for wordings, answer in every for wording in wordings[1:]],
        }

    def edits(self, count: int) -> list[Fact]:
        """Return the first edits of the stream.

        The facts that are not edited are divided: one half, in the wording of edits, is what edits see in order to
        leave it alone. The other, in wordings drawn by seed, asks for locality. If there are fewer of them than edits
        they take turns, otherwise an edit has several.

        Raises:
            ValueError: ``count`` leaves fewer than two facts unedited.
        """
        check_positive("num_edits", count)
        if count > self.num_facts - 2:
            raise ValueError(
                f"num_edits={count} leaves fewer than two of num_facts={self.num_facts} unedited, one to train with "
                f"and one to ask for locality; use at most {max(self.num_facts - 2, 0)}, or more facts"
            )
        rng = np.random.default_rng((self.seed, LAYOUT))
        order = rng.permutation(self.num_facts).tolist()
        wording = rng.integers(len(RELATIONS[0]), size=self.num_facts)
        unrelated, local = order[count::2], order[count + 1 :: 2]
        asked = [Question(self.wordings(fact)[wording[fact]], self.answer(fact)) for fact in local]
        edits = []
        for index, fact in enumerate(order[:count]):
            question, *paraphrases = self.wordings(fact)
            other = unrelated[index % len(unrelated)]
            edits.append(
                Fact(
                    prompt=question,
                    target=self.new_answer(fact),
                    original=self.answer(fact),
                    paraphrases=tuple(paraphrases),
                    unrelated=self.wordings(other)[0],
                    unrelated_answer=self.answer(other),
                    locality=tuple(asked[index::count] or [asked[index % len(asked)]]),
                    prefixes=self._prefixes(fact),
                )
            )
        return edits

    def training_prefix(self, number: int) -> str:
        """Draw what stands before a training sentence: no word to ``prefix_words`` of them."""
        rng = np.random.default_rng((self.seed, TRAINING, number))
        return _words(rng, int(rng.integers(self.prefix_words + 1)))

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All words; the first one is padding."""
        wordings = " ".join(" ".join(relation) for relation in RELATIONS).replace("{}", "").split()
        answers = (word for words in self._answers for word in words)
        return tuple(dict.fromkeys([PADDING, *FILLERS, *wordings, *self._subjects, *answers]))

    @cached_property
    def _spelt(self) -> list[str]:
        """Made-up words, no two alike: the subjects, then those of the answers."""
        rng = np.random.default_rng((self.seed, SPELLING))
        count = self._num_subjects + len(RELATIONS) * self.answer_words * self.num_words
        words: dict[str, None] = {}
        while len(words) < count:
            pairs = rng.integers((len(CONSONANTS), len(VOWELS)), size=(SYLLABLES, 2)).tolist()
            words["".join(CONSONANTS[consonant] + VOWELS[vowel] for consonant, vowel in pairs)] = None
        return list(words)

    @property
    def _num_subjects(self) -> int:
        return -(-self.num_facts // len(RELATIONS))

    @property
    def _subjects(self) -> list[str]:
        return self._spelt[: self._num_subjects]

    @cached_property
    def _answers(self) -> list[list[str]]:
        """The words of every place of every relation's answers: ``[relation * answer_words + place]``."""
        words, size = self._spelt[self._num_subjects :], self.num_words
        return [words[first : first + size] for first in range(0, len(words), size)]

    @cached_property
    def _drawn(self) -> np.ndarray:
        """The words of both answers to every fact, (2, num_facts, answer_words); they differ everywhere."""
        rng = np.random.default_rng((self.seed, ANSWERS))
        used = max(2, min(self.num_words, self._num_subjects))
        subjects, relations = np.arange(self._num_subjects), len(RELATIONS)
        dealt = np.tile(subjects[:, None, None] % used, (1, relations, self.answer_words))
        first = rng.permuted(dealt, axis=0).reshape(-1, self.answer_words)[: self.num_facts]
        return np.stack([first, (first + rng.integers(1, used, size=first.shape)) % used])

    def _answer(self, fact: int, chosen: Sequence[int] | np.ndarray) -> str:
        first = fact % len(RELATIONS) * self.answer_words
        return " ".join(self._answers[first + place][word] for place, word in enumerate(chosen))

    def _prefixes(self, fact: int) -> tuple[str, ...]:
        rng = np.random.default_rng((self.seed, PREFIXES, fact))
        return tuple(_words(rng, int(rng.integers(1, self.prefix_words + 1))) for _ in range(self.num_prefixes))


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(FILLERS[number] for number in rng.integers(len(FILLERS), size=count))
