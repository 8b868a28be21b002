"""FactData of files: as they are published, what they lack, and rows that give each other away."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from memzoo.lit_modules import FactData
from memzoo.lit_modules.data import Fact, Question, read_facts
from tests.lit_modules.facts_cases import read

ZSRE = {
    "subject": "Christiane",
    "src": "What is the language of Christiane?",
    "pred": "Dutch",
    "rephrase": "What's Christiane's mother tongue?",
    "alt": "German",
    "answers": ["French", "french"],
    "loc": "nq question: what is the current season of the show",
    "loc_ans": "The eighth season",
    "cond": "French >> German || What is the language of Christiane?",
}
EASY_EDIT = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "subject": "Danielle",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
    },
    "paraphrase_prompts": ["Danielle spoke", "Danielle, a native"],
    "neighborhood_prompts": ["The mother tongue of Leon is", "Leon speaks"],
}
KNOW_EDIT = {
    "prompt": "Which river ends at Kiel?",
    "target_new": "Eider",
    "ground_truth": ["Schwentine"],
    "rephrase_prompt": "Kiel is the mouth of which river?",
    "locality": {
        "Relation_Specificity": [{"prompt": "Kiel lies in", "ground_truth": [["Germany", "DE"]]}],
        "Forgetfulness": [{"prompt": "The Elbe ends in", "ground_truth": ["Cuxhaven"]}],
    },
}


def write(path: Path, *rows: Any, array: bool = False) -> Path:
    path.write_text(json.dumps(rows) if array else "".join(f"{json.dumps(row)}\n\n" for row in rows), encoding="utf-8")
    return path


# Files


@pytest.mark.parametrize("array", [True, False])
def test_files_load_as_they_are(tmp_path: Path, array: bool):
    path = write(tmp_path / "facts.json", ZSRE, EASY_EDIT, COUNTERFACT, KNOW_EDIT, {**ZSRE, "alt": ""}, array=array)
    zsre, easy_edit, counterfact, know_edit = read_facts(path)
    assert zsre == Fact(
        prompt="What is the language of Christiane?",
        target="German",
        original="French",
        paraphrases=("What's Christiane's mother tongue?",),
        locality=(Question("nq question: what is the current season of the show", "The eighth season"),),
    )
    assert easy_edit == Fact(
        prompt="Toko Yasuda, the",
        target="piano",
        original="guitar",
        paraphrases=("Toko Yasuda is incredible at",),
        locality=(Question("John Lennon performs on the", "guitar"),),
    )
    assert counterfact == Fact(
        prompt="The mother tongue of Danielle is",
        target="English",
        original="French",
        paraphrases=("Danielle spoke", "Danielle, a native"),
        locality=(Question("The mother tongue of Leon is", "French"), Question("Leon speaks", "French")),
    )
    assert know_edit.original == "Schwentine"
    assert know_edit.locality == (Question("Kiel lies in", "Germany"), Question("The Elbe ends in", "Cuxhaven"))


def test_our_own_rows_name_everything(tmp_path: Path):
    row = {
        "prompt": "q",
        "target": "t",
        "paraphrases": ["p"],
        "unrelated": {"prompt": "u", "answer": "v"},
        "locality": [{"prompt": "l", "answer": "m"}],
        "prefixes": ["x y"],
    }
    fact = Fact("q", "t", None, ("p",), "u", "v", (Question("l", "m"),), ("x y",))
    assert read_facts(write(tmp_path / "own.jsonl", row)) == [fact]


def test_a_file_is_edits_and_what_they_leave_alone_comes_from_another(tmp_path: Path):
    others = [{**ZSRE, "loc": f"question {number}", "loc_ans": f"answer {number}"} for number in range(2)]
    path = write(tmp_path / "edit.json", ZSRE, EASY_EDIT, COUNTERFACT, array=True)
    unrelated = write(tmp_path / "train.jsonl", ZSRE, *others)
    data = FactData(path, unrelated_path=unrelated, tokenizer="bytes")
    assert [fact.unrelated for fact in data.edits] == ["question 0", "question 1", "question 0"]
    assert read(data, vars(data.encode_edit(data.edits[0]))) == [("What is the language of Christiane?", " German")]
    asked = {kind: [question.prompt for question in some] for kind, some in data.sentences.items()}
    assert asked["edit"][1] == "Toko Yasuda, the"
    assert len(asked["paraphrase"]) == len(asked["locality"]) == 4
    assert len(FactData(path, num_edits=2, tokenizer="bytes").edits) == 2
    assert FactData(path, tokenizer="bytes").encode_edit(data.edits[0]).unrelated is not None
    alone = FactData(path, tokenizer="bytes")
    assert alone.encode_edit(alone.edits[0]).unrelated is None
    assert "unrelated" not in next(iter(alone.edit_dataloader()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"src": "a"}', r"line 1 has no 'target'; give it as one of 'target', 'target_new', 'alt'"),
        ('\n{"alt": "a"}', "line 2 has no 'prompt'; give it as one of 'prompt', 'src'"),
        ('[{"src": "a", "alt": "b"}, {"src": "a"}]', "row 2 has no 'target'"),
        ('{"src": "a", "alt": "b", "loc": "c"}', "line 1 has no 'locality_answer'; give it as one of .*'loc_ans'"),
        ('{"src": "a", "alt": "b", "locality": [{"prompt": "c"}]}', "line 1, locality has no 'answer'"),
        (
            '{"src": "a", "alt": "b", "loc": ["c", "d"], "loc_ans": ["e"]}',
            "line 1, loc has 2 questions, loc_ans 1 answers; give one for each",
        ),
        ('{"src": "a", "alt": 3}', "line 1 has alt=3; it must be a text"),
        ('{"src": " ", "alt": "b"}', "line 1 has src=' '; it must be a text"),
        ('{"requested_rewrite": {"prompt": "{}"}}', "line 1 has a requested_rewrite without 'subject'"),
        ('{"src": "a", "alt": ""}', "has no row with a new answer"),
        ("", "has no row with a new answer"),
        ("{src}", "line 1 is not JSON"),
        ("[{]", "is not JSON"),
        ("3", "line 1 is a int; use an object"),
    ],
)
def test_rows_that_are_none_are_refused_by_place(tmp_path: Path, text: str, message: str):
    path = tmp_path / "facts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"path='.*facts.jsonl'.*{message}"):
        read_facts(path)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"path='nowhere.json' cannot be read"):
        read_facts("nowhere.json")


def test_what_measures_locality_is_not_shown(tmp_path: Path):
    path = write(tmp_path / "edit.json", {**ZSRE, "unrelated": ZSRE["loc"]})
    with pytest.raises(ValueError, match=r"has edit 0, unrelated 'nq question: .*': an edit shows"):
        _ = FactData(path, tokenizer="bytes").edits
    with pytest.raises(ValueError, match=r"has no question of locality that path='.*' does not ask too"):
        _ = FactData(path, unrelated_path=path, tokenizer="bytes").edits


def test_rows_that_give_each_other_away_are_refused_or_lose_it(tmp_path: Path):
    rows = [
        {
            "prompt": "capital of X?",
            "target": "b",
            "paraphrases": ["X capital?", "capital of Y?"],
            "unrelated": {"prompt": "Y capital?", "answer": "d"},
            "locality": [{"prompt": "capital of Y?", "answer": "d"}, {"prompt": "capital of Z?", "answer": "e"}],
        },
        {
            "prompt": "capital of Y?",
            "target": "c",
            "paraphrases": ["Y capital?"],
            "unrelated": {"prompt": "capital of V?", "answer": "f"},
            "locality": [{"prompt": "X capital?", "answer": "a"}],
        },
    ]
    path = write(tmp_path / "edit.json", *rows)
    found = (
        "edit 0, locality 'capital of Y?'; edit 0, paraphrase 'capital of Y?'; edit 0, unrelated 'Y capital?'; "
        "edit 1, locality 'X capital?': an edit shows"
    )
    with pytest.raises(ValueError, match=re.escape(found)):
        _ = FactData(path, tokenizer="bytes").edits
    first, second = FactData(path, tokenizer="bytes", leaks="drop").edits
    assert (first.paraphrases, first.unrelated, first.unrelated_answer) == (("X capital?",), None, "")
    assert first.locality == (Question("capital of Z?", "e"),)
    assert (second.paraphrases, second.unrelated, second.locality) == (("Y capital?",), "capital of V?", ())
    [alone] = FactData(path, num_edits=1, tokenizer="bytes", leaks="drop").edits
    assert (alone.paraphrases, alone.unrelated) == (("X capital?", "capital of Y?"), "Y capital?")


def test_texts_that_differ_by_case_and_spaces_are_the_same_text(tmp_path: Path):
    rows = [
        {
            "prompt": "Who wrote Emma?",
            "target": "x",
            "paraphrases": ["who wrote  Emma?", "Emma was written by"],
            "locality": [{"prompt": "Who wrote Emma? ", "answer": "y"}, {"prompt": "Who read it?", "answer": "y"}],
            "unrelated": {"prompt": "emma was WRITTEN by", "answer": "z"},
        }
    ]
    path = write(tmp_path / "edit.json", *rows)
    with pytest.raises(
        ValueError, match=r"locality 'Who wrote Emma\?'; .* paraphrase 'who wrote  Emma\?'; .* unrelated"
    ):
        _ = FactData(path, tokenizer="bytes").edits
    [fact] = FactData(path, tokenizer="bytes", leaks="drop").edits
    assert (fact.paraphrases, fact.unrelated) == (("Emma was written by",), None)
    assert fact.locality == (Question("Who read it?", "y"),)


def test_what_an_edit_shows_behind_a_prefix_is_not_what_measures_it(tmp_path: Path):
    row = {"prompt": "who?", "target": "x", "paraphrases": ["Q: who?", "tell me who"], "loc": "Hm who?", "loc_ans": "l"}
    path = write(tmp_path / "edit.json", row | {"prefixes": ["Q:"]})
    [fact] = FactData(path, tokenizer="bytes", leaks="drop").edits
    assert (fact.paraphrases, len(fact.locality)) == (("tell me who",), 1)
    [fact] = FactData(path, tokenizer="bytes", leaks="drop", prefixes=["hm"]).edits  # in their place
    assert (fact.paraphrases, len(fact.locality)) == (("Q: who?", "tell me who"), 0)
    others = write(
        tmp_path / "others.json", *({"src": "z?", "alt": "z", "loc": t, "loc_ans": "l"} for t in ("HM who?", "d?"))
    )
    [fact] = FactData(path, unrelated_path=others, tokenizer="bytes", leaks="drop", prefixes=["hm"]).edits
    assert fact.unrelated == "d?"


def test_edits_do_not_see_their_own_questions_as_unrelated(tmp_path: Path):
    path = write(tmp_path / "edit.json", {"prompt": "a?", "target": "b", "paraphrases": ["c?"]})
    others = [{"prompt": "z?", "target": "z", "loc": text, "loc_ans": "l"} for text in ("a?", "c?", "d?")]
    data = FactData(path, unrelated_path=write(tmp_path / "train.json", *others), tokenizer="bytes")
    assert data.edits[0].unrelated == "d?"


PAIRS = (Question("a?", "A"), Question("b?", "B"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"locality_prompt": ["a?", "b?"], "locality_ground_truth": ["A", "B"]}, PAIRS),
        ({"locality_inputs": {"neighborhood": {"prompt": ["a?", "b?"], "ground_truth": ["A", "B"]}}}, PAIRS),
        ({"locality": {"n": {"prompt": ["a?", "b?"], "ground_truth": ["A", "B"]}}, "loc_ans": "C"}, PAIRS),
        ({"locality": {"prompt": ["a?", "b?"], "ground_truth": [["A", "C"], "B"]}}, PAIRS),
        ({"locality": {"n": {"prompt": "a?", "answer": "A"}, "m": [{"prompt": "b?", "answer": ["B", "C"]}]}}, PAIRS),
        ({"locality": {"n": "a?", "m": "b?"}, "loc_ans": "A"}, (PAIRS[0], Question("b?", "A"))),
        ({"loc": ["a?", "b?"], "loc_ans": "A"}, (PAIRS[0], Question("b?", "A"))),
        ({"loc": "a?", "loc_ans": ["A", "C"]}, PAIRS[:1]),
    ],
    ids=["lists", "inputs", "named", "mapping", "single", "texts", "one", "aliases"],
)
def test_questions_of_locality_have_their_own_answers(tmp_path: Path, row: dict[str, Any], expected: Any):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"prompt": "q", "target": "t", **row}), encoding="utf-8-sig")  # with a byte-order mark
    assert read_facts(path)[0].locality == expected


def test_more_edits_than_rows_and_nothing_to_teach_are_refused(tmp_path: Path):
    path = write(tmp_path / "edit.json", {"prompt": "a", "target": "b"})
    with pytest.raises(ValueError, match="num_edits=2 is more than the 1 rows"):
        _ = FactData(path, num_edits=2, tokenizer="bytes").edits
    with pytest.raises(ValueError, match="there is nothing to teach"):
        FactData(path, tokenizer="bytes").train_dataloader()
