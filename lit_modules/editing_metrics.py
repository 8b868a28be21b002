"""What an edited model answers: reliability, generalisation and locality, and what decides whether an edit acts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from memzoo.arch.generation import generate
from memzoo.layers.editor import NOT_SCORED, Edit, Editor
from memzoo.layers.wise import Wise

QuestionKind = Literal["edit", "paraphrase", "locality"]
MEASURES: dict[str, QuestionKind] = {"reliability": "edit", "generalisation": "paraphrase", "locality": "locality"}
"""What is measured, and on which questions."""

GENERATED = "generated/"  # before the name of what is measured by generation

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class EditRecord:
    """What one edit took, and how it was answered right after it: before the edits that follow.

    Attributes:
        index: Number of the edit in the data.
        steps: Of the editor's optimiser; the same for all edits that were learned together, like ``loss``.
        loss: Of its answer, before the last step.
        seconds: It took, its share of those learned together.
        reliability: Share of its answer's tokens that were right.
        generalisation: The same for its paraphrases; nan if it has none.
        locality: Share of the answers to its questions of locality that were as before the first edit; nan without any.
        reliability_questions: How many questions that is the mean of; 1 in records that do not tell.
        generalisation_questions: The same for its paraphrases.
        locality_questions: The same for its questions of locality.
    """

    index: int
    steps: int
    loss: float
    seconds: float
    reliability: float
    generalisation: float
    locality: float
    reliability_questions: int = 1
    generalisation_questions: int = 1
    locality_questions: int = 1


@dataclass(frozen=True)
class Answers:
    """The answers to questions, one after the other: of each token of an answer the likeliest, or the class.

    Attributes:
        said: (tokens,) what the model says.
        expected: (tokens,) what the data have for it.
        lengths: (questions,) tokens of each answer; 1 for classes.
        index: (questions,) numbers of the edits that they belong to.
    """

    said: Tensor
    expected: Tensor
    lengths: Tensor
    index: Tensor

    def of(self, edits: Iterable[int]) -> Self:
        """Return the answers to the questions that belong to some edits, in the order they have here."""
        chosen = torch.isin(self.index, torch.tensor(list(edits), dtype=self.index.dtype, device=self.index.device))
        tokens = chosen.repeat_interleave(self.lengths)
        return type(self)(self.said[tokens], self.expected[tokens], self.lengths[chosen], self.index[chosen])

    def shares(self, wanted: Tensor) -> Tensor:
        """Return the share of each answer's tokens that are those wanted, (questions,) float64.

        Args:
            wanted: (tokens,).
        """
        question = torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)
        right = torch.zeros(len(self.lengths), dtype=torch.float64, device=self.lengths.device)
        return right.index_add_(0, question, (self.said == wanted).double()) / self.lengths

    def matches(self, wanted: Tensor) -> Tensor:
        """Return which answers are those wanted in full, (questions,) float64.

        Args:
            wanted: (tokens,).
        """
        return (self.shares(wanted) == 1).double()


@torch.no_grad()
def read_answers(editor: Editor, batches: Iterable[Batch]) -> Answers:
    """Ask questions, every token of an answer behind those that the data have before it.

    Args:
        editor: With its edits, or ``disabled()``. It is left as it is.
        batches: Dicts of ``inputs``, ``targets``, ``index`` (rows,) and, of padded rows, ``mask``, as ``Edit`` has
            them; on the device of the model.

    Returns:
        The answers, on the CPU.
    """
    none = torch.zeros(0, dtype=torch.int64)
    parts = [(none, none, none, none)]
    for batch in batches:
        targets = batch["targets"]
        logits = editor.answer(batch["inputs"], batch.get("mask"), asked=asked_tokens(batch))
        scored = targets != NOT_SCORED
        lengths = scored.view(len(targets), -1).sum(1)
        parts.append((logits.argmax(-1)[scored].cpu(), targets[scored].cpu(), lengths.cpu(), batch["index"].cpu()))
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def generate_answers(
    editor: Editor, model: Any, batches: Iterable[Batch], *, max_new_tokens: int | None = None
) -> Answers:
    """Have the model answer by itself, going on from each question for as many tokens as the data's answer has.

    Args:
        editor: With its edits, or ``disabled()``. It is left as it is.
        model: Its host, which ``generate`` can run.
        batches: As in ``read_answers``, of tokens.
        max_new_tokens: No more than the first tokens of an answer; all by default.

    Returns:
        The answers, on the CPU.
    """
    none = torch.zeros(0, dtype=torch.int64)
    parts = [(none, none, none, none)]
    for batch in batches:
        targets = batch["targets"]
        scored = targets != NOT_SCORED
        longest = int(scored.sum(1).max())
        count = longest if max_new_tokens is None else min(longest, max_new_tokens)
        prompt, mask = _to_the_right(batch["inputs"], asked_tokens(batch))
        with editor.reading(mask):
            tokens = torch.stack(list(generate(model, prompt, count, temperature=0, mask=mask)), 1)
        place = scored.int().cumsum(1) - 1  # of a token within its answer
        within = scored & (place < count)
        said = tokens.gather(1, place.clamp(0, count - 1))[within]
        parts.append((said.cpu(), targets[within].cpu(), within.sum(1).cpu(), batch["index"].cpu()))
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


def read_routing(editor: Wise, batches: Iterable[Batch]) -> Tensor:
    """Return how strongly each question makes a router respond, over its threshold, on the CPU: above 1 it is routed.

    Of several side memories it is the one that responds most, which alone decides, over its own threshold. With
    granularity "token" there is one for every token of a question, with "batch" one for every batch.
    """
    found = [torch.zeros(0)]
    for batch in batches:
        asked = asked_tokens(batch)
        routing = editor.routing(batch["inputs"], batch.get("mask"), asked=asked)
        strongest, side = routing.activations.max(0)
        ratios = (strongest / routing.thresholds[side]).nan_to_num(0.0, posinf=math.inf)
        found.append((ratios if asked is None or ratios.dim() < 2 else ratios[asked]).flatten().float().cpu())
    return torch.cat(found)


def asked_tokens(batch: Batch) -> Tensor | None:
    """Return which tokens are the questions; see ``Edit.asked``."""
    return Edit(batch["inputs"], batch["targets"], batch.get("mask")).asked


def memory_bytes(editor: Editor) -> int:
    """Return the bytes of what an editor keeps."""
    return sum(tensor.nbytes for tensor in editor.state_dict().values())


def mean(values: Tensor) -> float:
    """Return the mean, nan of nothing."""
    return float(values.mean()) if len(values) else math.nan


def questions_of(records: Iterable[EditRecord], measure: str) -> Tensor:
    """Return how many questions are behind a measure of each edit, (edits,) int64; 0 where it is nan."""
    told = [(getattr(record, measure), getattr(record, f"{measure}_questions")) for record in records]
    return torch.tensor([0 if math.isnan(value) else count for value, count in told], dtype=torch.int64)


def right_after(records: Sequence[EditRecord], measure: str) -> Tensor:
    """Return the mean of what was measured right after each edit, over all questions up to each of them.

    (edits,) float64; nan where none was asked yet. Empty if none was asked at all.
    """
    counts = questions_of(records, measure)
    if not bool(counts.any()):
        return torch.zeros(0, dtype=torch.float64)
    values = torch.tensor([getattr(record, measure) for record in records], dtype=torch.float64)
    return (values.nan_to_num(0.0) * counts).cumsum(0) / counts.cumsum(0)


def _to_the_right(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return prompts that end in the last place, and their mask."""
    assert mask is not None
    order = mask.long().argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return tokens.gather(1, order), mask.gather(1, order)
