"""FactData: facts to teach a model, then a stream of edits to some of them, and questions about what they changed.

The data of lifelong model editing (WISE, arXiv 2405.14768): an edit is a question with its new answer. After it the
model should give that answer to the question (reliability) and to its paraphrases (generalisation), and answer all else
as before (locality).
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from memzoo.layers.editor import Edit
from memzoo.layers.errors import check_choice, check_positive
from memzoo.lit_modules.data.fact_batches import EncodedQuestion, question_batch, sentence_batch
from memzoo.lit_modules.data.fact_leaks import check_leaks, folded, shown_and_asked, without_leaks
from memzoo.lit_modules.data.fact_rows import Fact, Question, read_facts
from memzoo.lit_modules.data.fact_task import FactTask
from memzoo.lit_modules.data.fact_words import WordTokenizer
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler
from memzoo.lit_modules.data.tokenizer import Tokenizer, load_tokenizer

FactKind = Literal["edit", "paraphrase", "locality"]
TrainOn = Literal["facts", "edits"]
Leaks = Literal["refuse", "drop"]
WORDS = "words"
DEFAULT_EDITS = 50


class FactData(pl.LightningDataModule):
    """Facts, edits to some of them, and questions.

    By default the facts are synthetic (see ``FactTask``), nothing is read, and a token is a word:

        FactData()                                                      # 300 facts, 50 of them edited
        FactData(num_facts=3000, num_edits=1000)
        FactData("zsre_mend_edit.json", unrelated_path="zsre_mend_train.json", tokenizer="tokenizer.json")

    The first stage teaches a host the facts as they were at first, in every wording, so that the questions asked later
    have an answer to change or to keep: ``fit`` with a ``CausalLMModule``. Only answers are scored; what is asked about
    is drawn by chance, so no other word could be learned. Validation asks for every fact, "edit" in the wording of
    edits and "paraphrase" in the others, and "locality" where a file has such questions.

    The second stage is the stream of ``edits``, in an order of its own that nothing else depends on: ``fit`` with
    ``train_on="edits"``, ``predict``, or ``edit_dataloader``. No edit shows a paraphrase or a question of locality.

    Args:
        path: JSON file of edits, in their order; see ``read_facts`` for its keys. None for synthetic facts.
        unrelated_path: Such a file, whose questions of locality are what edits see in order to leave it alone, taken in
            turn; those that any edit is asked, for locality or otherwise, are left out. None leaves the rows of
            ``path`` as they are.
        leaks: What to do with rows that show or change what measures something else, see ``find_leaks``: "refuse" the
            file, or "drop" those questions.
        num_facts: Synthetic facts.
        num_edits: Edits; by default all rows of the file, or 50 synthetic ones.
        answer_words: As in ``FactTask``, and so up to ``prefix_words``.
        num_words: Words that each word of an answer is one of.
        num_prefixes: Prefixes of an edit.
        prefix_words: Words of a prefix at most, in edits and in the sentences that teach a host.
        prefixes: Texts to put before the question of every edit, each one row more, in place of its own: what the model
            itself generates, in the paper. The rows of files have none unless they say so.
        unrelated_answers: Put its answer behind the unrelated question, as EasyEdit does.
        tokenizer: "words" of the synthetic facts, "bytes", or the path of a ``tokenizer.json``.
        beginning: What all texts begin with, such as "<s>" for a model whose texts begin with that token; no tokenizer
            adds one by itself here.
        train_on: What ``fit`` is given: "facts" for a host, or "edits".
        edits_per_batch: Edits to learn together, the last ones perhaps fewer.
        repeats: How often an epoch tells each fact in each wording; after the first time behind other words.
        batch_size: Sentences or questions in a batch.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of all that is drawn.

    Attributes:
        edits: The stream.
        sentences: What a host is taught, by kind.
        tokenizer: Turns text into tokens.
        vocab_size: Of the tokenizer.

    Shape:
        Sentences come as a dict of ``tokens``, ``labels`` (int64) and ``mask`` (bool), each (batch, time + 1), as
        ``NextTokens`` takes them. Questions come as a dict of ``inputs``, ``targets`` (int64) and ``mask`` (bool), each
        (rows, time), and ``index`` (rows,), the numbers of their edits. An edit is the same of its rows, with ``index``
        (1,) and, if it has any, ``unrelated`` and ``unrelated_mask`` (1, time); several that are to be learned together
        come as a list. All are padded on the right.

    Raises:
        ValueError: An argument is out of range or does not go with another; from the attributes and loaders: a file
            cannot be read.
    """

    long_answers = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        unrelated_path: str | os.PathLike[str] | None = None,
        leaks: Leaks = "refuse",
        num_facts: int = 300,
        num_edits: int | None = None,
        answer_words: int = 2,
        num_words: int = 8,
        num_prefixes: int = 10,
        prefix_words: int = 8,
        prefixes: Sequence[str] | None = None,
        unrelated_answers: bool = False,
        tokenizer: str = WORDS,
        beginning: str = "",
        train_on: TrainOn = "facts",
        edits_per_batch: int = 1,
        repeats: int = 8,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("train_on", train_on, get_args(TrainOn))
        check_choice("leaks", leaks, get_args(Leaks))
        counts = {"edits_per_batch": edits_per_batch, "repeats": repeats, "batch_size": batch_size}
        for name, count in (counts if num_edits is None else counts | {"num_edits": num_edits}).items():
            check_positive(name, count)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; use 0 to load in the main process")
        if path is not None and tokenizer == WORDS:
            raise ValueError(
                f"tokenizer={tokenizer!r} are those of synthetic facts, not of path={str(path)!r}; pass 'bytes' or the "
                f"tokenizer.json of the model"
            )
        if path is None and unrelated_path is not None:
            raise ValueError(f"unrelated_path={str(unrelated_path)!r} goes with the edits of a file; pass path too")
        self.task = FactTask(num_facts, answer_words, num_words, num_prefixes, prefix_words, seed)
        self.save_hyperparameters(logger=False)
        self.path = path
        self.unrelated_path = unrelated_path
        self.leaks = leaks
        self.num_edits = num_edits
        self.prefixes = prefixes
        self.unrelated_answers = unrelated_answers
        self.beginning = beginning
        self.train_on = train_on
        self.edits_per_batch = edits_per_batch
        self.repeats = repeats
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.tokenizer: Tokenizer = (
            WordTokenizer(self.task.vocabulary) if tokenizer == WORDS else load_tokenizer(tokenizer)
        )
        self.vocab_size = self.tokenizer.vocab_size

    @cached_property
    def edits(self) -> Sequence[Fact]:
        """The edits, in the order of the stream."""
        if self.path is None:
            return tuple(self._prefixed(self.task.edits(self.num_edits or DEFAULT_EDITS)))
        return tuple(self._read())

    @cached_property
    def sentences(self) -> dict[str, list[Question]]:
        """What a host is taught, by kind; of a file, those of its edits whose answer before is known."""
        if self.path is None:
            return self.task.sentences()
        known = [(fact, fact.original) for fact in self.edits if fact.original]
        found = {
            "edit": [Question(fact.prompt, answer) for fact, answer in known],
            "paraphrase": [Question(prompt, answer) for fact, answer in known for prompt in fact.paraphrases],
            "locality": [question for fact in self.edits for question in fact.locality],
        }
        return {kind: questions for kind, questions in found.items() if questions}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""
        return self.tokenizer.decode(tokens)

    # Edits

    def encode_edit(self, fact: Fact) -> Edit:
        """Return an edit in tokens: the question, then the same behind each of its prefixes; labelled by its target."""
        question = Question(fact.prompt, fact.target)
        own = question_batch([self._encode(question, prefix) for prefix in ("", *fact.prefixes)])
        if fact.unrelated is not None:
            other = self._encode(Question(fact.unrelated, fact.unrelated_answer))
            ids = other.ids if self.unrelated_answers else other.ids[: other.start]
            own["unrelated"] = torch.tensor([ids])
            own["unrelated_mask"] = torch.ones(1, len(ids), dtype=torch.bool)
        return Edit(**own, label=fact.target)

    def edit_dataloader(self, start: int = 0) -> DataLoader[Any]:
        """Return the loader of the edits in order, from number ``start``; its place goes into checkpoints.

        Raises:
            ValueError: No batch begins with that edit.
        """
        if start % self.edits_per_batch:
            raise ValueError(
                f"start={start} is within a batch of edits_per_batch={self.edits_per_batch}; use its first"
            )
        rows: ConcatDataset[Any] = ConcatDataset([FactEdits(self)])
        loader = ResumableLoader(rows, sampler=RowSampler(rows, 1, contiguous=True), **self._options(None))
        loader.sampler.resume(0, start // self.edits_per_batch)
        return loader

    # Questions

    def asked(self, edits: Iterable[int], kind: FactKind) -> list[tuple[int, Question]]:
        """Return the questions of one kind that belong to some edits, each with its edit's number; texts.

        Raises:
            ValueError: There is no such kind.
        """
        check_choice("kind", kind, get_args(FactKind))
        found: list[tuple[int, Question]] = []
        for index in edits:
            fact = self.edits[index]
            questions = {
                "edit": [Question(fact.prompt, fact.target)],
                "paraphrase": [Question(prompt, fact.target) for prompt in fact.paraphrases],
                "locality": fact.locality,
            }[kind]
            found += [(index, question) for question in questions]
        return found

    def questions(self, edits: Iterable[int], kind: FactKind) -> list[dict[str, Tensor]]:
        """Return the questions of one kind that belong to some edits, in batches, in the order of ``asked``.

        Raises:
            ValueError: There is no such kind.
        """
        asked = self.asked(edits, kind)
        batches = []
        for first in range(0, len(asked), self.batch_size):
            some = asked[first : first + self.batch_size]
            batch = question_batch(self._encode(question) for _, question in some)
            batches.append(batch | {"index": torch.tensor([index for index, _ in some])})
        return batches

    # Lightning

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of what ``train_on`` says. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        if self.train_on == "edits":
            return self.edit_dataloader()
        questions = list(chain(*self.sentences.values()))
        if not questions:
            raise ValueError(
                f"path={str(self.path)!r} says neither what was answered before nor questions of locality, so there is "
                f"nothing to teach; add 'original' to its rows, or use train_on='edits'"
            )
        rows: ConcatDataset[Any] = ConcatDataset([FactSentences(self, questions, self.repeats)])
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = RowSampler(rows, self.batch_size, seed=self.task.seed, **share)
        return ResumableLoader(rows, sampler=sampler, collate_fn=sentence_batch, **self._options(self.batch_size))

    def val_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the facts taught, by kind; none beside edits, which have ``questions``."""
        if self.train_on == "edits":
            return {}
        return {
            kind: DataLoader(
                FactSentences(self, questions, 1), collate_fn=sentence_batch, **self._options(self.batch_size)
            )
            for kind, questions in self.sentences.items()
        }

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the facts taught, those of validation: there are no others."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the edits."""
        return self.edit_dataloader()

    def _options(self, batch_size: int | None) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _encode(self, question: Question, prefix: str = "") -> EncodedQuestion:
        return EncodedQuestion.of(question, self.tokenizer, beginning=self.beginning, prefix=prefix)

    def _prefixed(self, facts: list[Fact]) -> list[Fact]:
        """Put the prefixes that all edits are to have in the place of their own."""
        if self.prefixes is None:
            return facts
        return [replace(fact, prefixes=tuple(self.prefixes)) for fact in facts]

    def _read(self) -> list[Fact]:
        """Read the file of the edits, and that of what they leave alone."""
        assert self.path is not None
        facts = read_facts(self.path)
        if self.num_edits is not None and self.num_edits > len(facts):
            raise ValueError(
                f"num_edits={self.num_edits} is more than the {len(facts)} rows of path={str(self.path)!r}; use fewer, "
                f"or None for all"
            )
        facts = self._prefixed(facts[: self.num_edits])
        if self.unrelated_path is not None:
            _, asked, local = shown_and_asked(facts)
            others = [question for fact in read_facts(self.unrelated_path) for question in fact.locality]
            others = [question for question in others if folded(question.prompt) not in asked | local]
            if not others:
                raise ValueError(
                    f"unrelated_path={str(self.unrelated_path)!r} has no question of locality that "
                    f"path={str(self.path)!r} does not ask too; pass another file"
                )
            turns = (others[index % len(others)] for index in range(len(facts)))
            facts = [
                replace(fact, unrelated=other.prompt, unrelated_answer=other.answer)
                for fact, other in zip(facts, turns, strict=True)
            ]
        if self.leaks == "drop":
            return without_leaks(facts)
        check_leaks(str(self.path), facts)
        return facts


class FactEdits(Dataset[Any]):
    """The edits of ``FactData``, each a dict of tensors that depends on its number alone, or lists of several."""

    def __init__(self, data: FactData) -> None:
        self.data = data

    def __len__(self) -> int:
        return -(-len(self.data.edits) // self.data.edits_per_batch)

    def __getitem__(self, index: int) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        count = self.data.edits_per_batch
        if count == 1:
            return self._edit(index)
        return [self._edit(number) for number in range(len(self.data.edits))[index * count : (index + 1) * count]]

    def _edit(self, index: int) -> dict[str, Tensor]:
        edit = vars(self.data.encode_edit(self.data.edits[index]))
        return {name: value for name, value in edit.items() if isinstance(value, Tensor)} | {
            "index": torch.tensor([index])
        }


class FactSentences(Dataset[Any]):
    """Questions with their answers, told some times over: the first time as they are, then behind other words.

    Those words are ``FactTask``'s for synthetic facts; files have none.
    """

    def __init__(self, data: FactData, questions: Sequence[Question], repeats: int) -> None:
        self.data = data
        self.questions = questions
        self.repeats = repeats

    def __len__(self) -> int:
        return self.repeats * len(self.questions)

    def __getitem__(self, index: int) -> EncodedQuestion:
        if not 0 <= index < len(self):
            raise IndexError(f"sentence {index} of {len(self)}")
        drawn = index >= len(self.questions) and self.data.path is None
        prefix = self.data.task.training_prefix(index) if drawn else ""
        return self.data._encode(self.questions[index % len(self.questions)], prefix)
