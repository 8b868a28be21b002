"""Batches of questions: token ids padded on the right, the answers alone scored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from memzoo.lit_modules.data.fact_rows import Question
from memzoo.lit_modules.data.tokenizer import Tokenizer
from memzoo.lit_modules.objective import NOT_SCORED

PADDING = 0  # an id like any other: masks tell


@dataclass(frozen=True)
class EncodedQuestion:
    """A question with its answer behind it.

    Attributes:
        ids: Of both.
        start: How many of them are the question's.
    """

    ids: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, question: Question, tokenizer: Tokenizer, *, beginning: str = "", prefix: str = "") -> Self:
        """Encode a question and its answer, a space between them, as one text.

        The answer begins with the first token in which question and answer differ from the question alone.

        Args:
            question: Both.
            tokenizer: Makes tokens of them.
            beginning: What all texts begin with.
            prefix: Text between that and the question, a space behind it unless it is empty.

        Raises:
            ValueError: The question has no token, so that nothing could be asked with it.
        """
        asked = beginning + (f"{prefix} {question.prompt}" if prefix else question.prompt)
        alone, ids = tokenizer.encode(asked), tokenizer.encode(f"{asked} {question.answer}")
        start = next((i for i, pair in enumerate(zip(alone, ids, strict=False)) if pair[0] != pair[1]), len(alone))
        if start == 0:
            raise ValueError(f"question {asked!r} has no token of its own; use a text the tokenizer knows")
        return cls(tuple(ids), start)

    @property
    def labels(self) -> tuple[int, ...]:
        """The ids of the answer, and ``NOT_SCORED`` for those of the question."""
        return (NOT_SCORED,) * self.start + self.ids[self.start :]


def question_batch(rows: Iterable[EncodedQuestion]) -> dict[str, Tensor]:
    """Return ``inputs``, ``targets`` and ``mask``, each (rows, time), as ``Edit`` has them."""
    rows = list(rows)
    inputs, mask = pad([row.ids[:-1] for row in rows], PADDING)
    targets, _ = pad([row.labels[1:] for row in rows], NOT_SCORED)
    return {"inputs": inputs, "targets": targets, "mask": mask}


def sentence_batch(rows: Iterable[EncodedQuestion]) -> dict[str, Tensor]:
    """Return ``tokens``, ``labels`` and ``mask``, each (rows, time + 1), as ``NextTokens`` takes them."""
    rows = list(rows)
    tokens, mask = pad([row.ids for row in rows], PADDING)
    labels, _ = pad([row.labels for row in rows], NOT_SCORED)
    return {"tokens": tokens, "labels": labels, "mask": mask}


def pad(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Return rows of numbers as one tensor, int64, and which of them are real, bool."""
    length = max(map(len, rows))
    numbers = torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
    return numbers, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
