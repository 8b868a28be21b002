"""FactData: what a host is taught, what an edit shows, and what is asked after it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from memzoo.lit_modules import CausalLMModule, FactData, ModelEditingModule
from memzoo.lit_modules.data import FactTask, Question
from memzoo.lit_modules.data.fact_batches import EncodedQuestion
from memzoo.lit_modules.data.fact_task import FILLERS, RELATIONS
from memzoo.lit_modules.data.fact_words import WordTokenizer
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens
from tests.lit_modules.facts_cases import read, words

SMALL = {"num_facts": 12, "num_edits": 4, "num_prefixes": 2, "prefix_words": 3, "batch_size": 5, "repeats": 2}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Synthetic facts


def test_an_edit_changes_every_word_of_an_answer_to_another_of_the_same_relation():
    task = FactTask(60, answer_words=3, num_words=2)
    for fact in range(60):
        before, after = task.answer(fact).split(), task.new_answer(fact).split()
        assert len(before) == len(after) == 3
        assert not set(before) & set(after)
    by_relation = [
        {word for fact in range(first, 60, 6) for word in f"{task.answer(fact)} {task.new_answer(fact)}".split()}
        for first in range(6)
    ]
    assert [len(found) for found in by_relation] == [6] * 6  # three places, two words each
    assert len(set.union(*by_relation)) == 36


@pytest.mark.parametrize(("num_words", "facts_of_a_word"), [(4, {2, 3}), (10, {1}), (64, {1})])
def test_words_are_dealt_out_evenly_and_new_answers_are_made_of_the_same(num_words, facts_of_a_word):
    task = FactTask(60, answer_words=2, num_words=num_words)  # ten subjects
    for relation in range(6):
        for place in range(2):
            before = Counter(task.answer(fact).split()[place] for fact in range(relation, 60, 6))
            after = {task.new_answer(fact).split()[place] for fact in range(relation, 60, 6)}
            assert set(before.values()) == facts_of_a_word
            assert after <= set(before)


def test_every_fact_has_its_own_question_in_every_wording():
    task = FactTask(31)
    asked = [wording for fact in range(31) for wording in task.wordings(fact)]
    assert len(set(asked)) == 31 * 4
    assert {len(relation) for relation in RELATIONS} == {4}
    assert all("{}" in wording for relation in RELATIONS for wording in relation)


def test_the_vocabulary_has_every_word_once_and_no_other():
    data = FactData(**SMALL)
    told = [f"{question.prompt} {question.answer}" for kind in data.sentences.values() for question in kind]
    told += [data.task.new_answer(fact) for fact in range(12)]
    spoken = {word for text in told for word in text.split()}
    wordings = {word for relation in RELATIONS for text in relation for word in text.replace("{}", "").split()}
    assert not set(FILLERS) & wordings
    assert len(set(data.task.vocabulary)) == data.vocab_size
    assert spoken | set(FILLERS) <= set(data.task.vocabulary)


def test_edits_show_neither_paraphrases_nor_questions_of_locality():
    edits = FactTask(40).edits(6)
    shown = {edit.prompt for edit in edits} | {edit.unrelated for edit in edits}
    held_out = {prompt for edit in edits for prompt in edit.paraphrases}
    local = {question for edit in edits for question in edit.locality}
    assert len(local) == sum(len(edit.locality) for edit in edits) == 17  # half of those not edited, each once
    assert not shown & (held_out | {question.prompt for question in local})
    first_wordings = {question.prompt: question.answer for question in FactTask(40).sentences()["edit"]}
    assert all(first_wordings[edit.unrelated] == edit.unrelated_answer for edit in edits)
    true = {question for kind in FactTask(40).sentences().values() for question in kind}
    assert local <= true
    assert all(Question(edit.prompt, edit.original) in true for edit in edits)


def test_few_facts_left_unedited_take_turns():
    edits = FactTask(9).edits(6)
    assert [len(edit.locality) for edit in edits] == [1] * 6
    assert len({edit.locality for edit in edits}) == 1
    assert [edit.unrelated for edit in edits[:2]] == [edit.unrelated for edit in edits[2:4]]


def test_a_longer_stream_begins_like_a_shorter_one():
    short, long = (
        [replace(edit, unrelated=None, unrelated_answer="", locality=()) for edit in FactTask(40).edits(count)]
        for count in (5, 20)
    )
    assert short == long[:5]
    assert FactTask(40).edits(5) == FactTask(40).edits(5) != FactTask(40, seed=1).edits(5)


# Tokens


class Pairs:
    """A tokenizer whose tokens are pairs of letters where they can be, so that a text and a longer one may differ."""

    vocab_size = 1 << 16
    fingerprint = "pairs"

    def encode(self, text: str) -> list[int]:
        pairs = [text[place : place + 2] for place in range(0, len(text), 2)]
        return [int.from_bytes(pair.encode("ascii")) for pair in pairs]


@pytest.mark.parametrize(("prompt", "start"), [("abcd", 2), ("abc", 1)])
def test_an_answer_begins_where_the_tokens_differ_from_those_of_the_question_alone(prompt: str, start: int):
    encoded = EncodedQuestion.of(Question(prompt, "xy"), Pairs())
    assert encoded.ids == tuple(Pairs().encode(f"{prompt} xy"))
    assert encoded.start == start
    assert encoded.labels == (NOT_SCORED,) * start + encoded.ids[start:]


def test_words_are_tokens():
    tokenizer = WordTokenizer(["<pad>", "a", "b"])
    assert tokenizer.encode("b a  b") == [2, 1, 2]
    assert tokenizer.decode([2, 1]) == "b a"
    assert [piece.tolist() for piece in tokenizer.encode_pieces([b"a", b"b b"])] == [[1], [2, 2]]
    assert tokenizer.fingerprint != WordTokenizer(["<pad>", "b", "a"]).fingerprint
    with pytest.raises(ValueError, match="text holds 'c', none of the 3 words"):
        tokenizer.encode("a c")


# What a host is taught


def test_a_host_is_taught_all_facts_in_all_wordings_and_asked_for_answers_alone():
    data = FactData(**SMALL)
    told: list[tuple[str, str]] = []
    for batch in data.train_dataloader():
        pieces = NextTokens.of(batch)
        asked = pieces.counted.cumsum(1) - pieces.counted.int() == 0
        for row, (real, counted) in enumerate(zip(asked, pieces.counted, strict=True)):
            told.append((words(data, pieces.inputs[row], real), words(data, pieces.targets[row], counted)))
    every = [question for kind in data.sentences.values() for question in kind]
    assert len(told) == 2 * len(every) == 2 * 48
    for question in every:
        found = [asked for asked, answer in told if asked.endswith(question.prompt) and answer == question.answer]
        assert len(found) == 2
        assert question.prompt in found
        prefixes = [asked.removesuffix(question.prompt).split() for asked in found]
        assert all(len(prefix) <= 3 and set(prefix) <= set(FILLERS) for prefix in prefixes)
    assert len({asked for asked, _ in told}) > 48


def test_validation_asks_for_every_fact_by_kind():
    loaders = FactData(**SMALL).val_dataloader()
    assert {kind: sum(len(batch["tokens"]) for batch in loader) for kind, loader in loaders.items()} == {
        "edit": 12,
        "paraphrase": 36,
    }


def module() -> CausalLMModule:
    torch.manual_seed(0)
    sizes = {"vocab_size": FactData(**SMALL).vocab_size, "dim": 16, "depth": 1, "num_heads": 1, "hidden_dim": 16}
    return CausalLMModule("transformer_tiny", sizes, learning_rate=0.02, warmup_steps=1, schedule="constant")


def trainer(tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **quiet, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_host_learns_the_facts(tmp_path: Path):
    lit, data = module(), FactData(**SMALL | {"repeats": 30, "batch_size": 32})
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(lit, datamodule=data)
    assert fit.callback_metrics["val/edit/exact_match"] > 0.9
    assert fit.callback_metrics["val/paraphrase/exact_match"] > 0.9


# Edits


def test_an_edit_is_its_question_plain_and_behind_its_prefixes():
    data = FactData(**SMALL)
    for fact in data.edits:
        edit = data.encode_edit(fact)
        asked = [f"{prefix} {fact.prompt}".strip() for prefix in ("", *fact.prefixes)]
        assert read(data, vars(edit)) == [(question, fact.target) for question in asked]
        assert data.decode(edit.unrelated[0].tolist()) == fact.unrelated
        assert edit.unrelated_mask.all()
        assert edit.label == fact.target
        assert [words(data, row, real) for row, real in zip(edit.inputs, edit.asked, strict=True)] == asked


def test_what_stands_before_and_behind_is_as_asked():
    options = SMALL | {"prefixes": ["well now", "yes"], "beginning": "<pad> ", "unrelated_answers": True}
    data = FactData(**options)
    [fact, *_] = data.edits
    edit = data.encode_edit(fact)
    asked = [f"<pad> {fact.prompt}", f"<pad> well now {fact.prompt}", f"<pad> yes {fact.prompt}"]
    assert [question for question, _ in read(data, vars(edit))] == asked
    assert data.decode(edit.unrelated[0].tolist()) == f"<pad> {fact.unrelated} {fact.unrelated_answer}"
    assert read(data, data.questions([0], "edit")[0]) == [(asked[0], fact.target)]


def test_the_stream_has_the_edits_in_order_from_any_number():
    data = FactData(**SMALL)
    every = list(data.edit_dataloader())
    assert [batch["index"].tolist() for batch in every] == [[0], [1], [2], [3]]
    assert read(data, every[2])[0] == (data.edits[2].prompt, data.edits[2].target)
    rest = list(FactData(**SMALL).edit_dataloader(start=2))
    assert len(rest) == 2
    assert all(same(one, other) for one, other in zip(rest, every[2:], strict=True))
    for loader in (data.predict_dataloader(), FactData(**SMALL, train_on="edits").train_dataloader()):
        assert all(same(one, other) for one, other in zip(loader, every, strict=True))


def test_edits_come_in_lists_to_be_learned_together():
    single, data = list(FactData(**SMALL).edit_dataloader()), FactData(**SMALL, edits_per_batch=3, train_on="edits")
    batches = list(data.train_dataloader())
    assert [[int(edit["index"]) for edit in batch] for batch in batches] == [[0, 1, 2], [3]]
    assert all(same(one, other) for one, other in zip([*batches[0], *batches[1]], single, strict=True))
    assert [[int(edit["index"]) for edit in batch] for batch in data.edit_dataloader(start=3)] == [[3]]
    with pytest.raises(ValueError, match="start=2 is within a batch of edits_per_batch=3"):
        data.edit_dataloader(start=2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_editor_learns_edits_in_lists(tmp_path: Path):
    sizes = {"vocab_size": FactData(**SMALL).vocab_size, "dim": 16, "depth": 1, "num_heads": 1, "hidden_dim": 16}
    options = {"editor": "fine_tuning", "editor_options": {"max_steps": 1}, "generate": False}
    lit = ModelEditingModule("transformer_tiny", sizes, **options)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(lit, datamodule=FactData(**SMALL, edits_per_batch=3, train_on="edits"))
    assert fit.global_step == 2
    assert [record.index for record in lit.records] == [0, 1, 2, 3]
    assert lit.records[0].loss == lit.records[2].loss != lit.records[3].loss


class Seen(pl.LightningModule):
    """Remembers the numbers of the edits that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.numbers: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.numbers += batch["index"].tolist()
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stream_that_was_stopped_goes_on_with_the_next_edit(tmp_path: Path):
    def run(path: Path | None, *callbacks: pl.Callback, **options: Any) -> list[int]:
        seen = Seen()
        fit = trainer(tmp_path, *callbacks, max_epochs=1, enable_checkpointing=bool(callbacks), **options)
        fit.fit(seen, datamodule=FactData(**SMALL, train_on="edits"), ckpt_path=path)
        return seen.numbers

    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2)
    assert run(None, keep, max_steps=3) == [0, 1, 2]
    assert run(tmp_path / "mid.ckpt") == [2, 3]


# Questions


def test_questions_are_those_of_their_edits_in_order():
    data = FactData(**SMALL)
    expected = {
        "edit": [(index, data.edits[index].prompt, data.edits[index].target) for index in (3, 1)],
        "paraphrase": [(i, prompt, data.edits[i].target) for i in (3, 1) for prompt in data.edits[i].paraphrases],
        "locality": [(i, *question) for i in (3, 1) for question in data.edits[i].locality],
    }
    for kind, questions in expected.items():
        batches = data.questions([3, 1], kind)
        numbers = [index for batch in batches for index in batch["index"].tolist()]
        found = [row for batch in batches for row in read(data, batch)]
        assert [(index, *row) for index, row in zip(numbers, found, strict=True)] == questions
        assert all(len(batch["index"]) <= 5 for batch in batches)
    assert len(data.questions([3, 1], "paraphrase")) == 2


# Refusals and the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_facts": 0}, "num_facts=0"),
        ({"num_edits": 0}, "num_edits=0"),
        ({"num_words": 1}, "num_words=1 leaves no other answer"),
        ({"num_prefixes": -1}, "num_prefixes=-1 is negative"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"repeats": 0}, "repeats=0"),
        ({"edits_per_batch": 0}, "edits_per_batch=0"),
        ({"leaks": "dropp"}, "leaks='dropp' is not one of .*did you mean 'drop'"),
        ({"num_workers": -1}, "num_workers=-1 is negative"),
        ({"train_on": "fact"}, "train_on='fact' is not one of .*did you mean 'facts'"),
        ({"path": "a.json"}, "tokenizer='words' are those of synthetic facts, not of path='a.json'"),
        ({"unrelated_path": "a.json"}, "unrelated_path='a.json' goes with the edits of a file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FactData(**options)


def test_some_facts_must_stay_unedited():
    with pytest.raises(ValueError, match=r"num_edits=11 leaves fewer than two of num_facts=12 unedited.*at most 10"):
        _ = FactData(num_facts=12, num_edits=11).edits
    with pytest.raises(ValueError, match=r"kind='edits' is not one of .*did you mean 'edit'"):
        FactData(**SMALL).questions([0], "edits")


def test_a_question_without_tokens_is_refused():
    with pytest.raises(ValueError, match="question '' has no token of its own"):
        EncodedQuestion.of(Question("", "a"), WordTokenizer(["<pad>", "a"]))


def test_the_command_line_sets_every_kind_of_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(FactData, "data")
    given = ["--data.num_edits", "3", "--data.prefixes", "[well, so then]", "--data.train_on", "edits"]
    data = FactData(**parser.parse_args(given).data.as_dict())
    assert len(data.edits) == 3
    assert data.edits[0].prefixes == ("well", "so then")
    assert data.train_on == "edits"
    assert str(parser.parse_args(["--data.path", "edit.json"]).data.path) == "edit.json"
