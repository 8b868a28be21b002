"""Rows of model editing: a question, what is to be answered to it, and what that must and must not change.

``read_facts`` reads them from JSON lines or a JSON array, with the keys of the sets that are in use: ZsRE as MEND and
EasyEdit publish it, CounterFact as ROME's authors or EasyEdit do, KnowEdit.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PROMPT = ("prompt", "src")
TARGET = ("target", "target_new", "alt")
ORIGINAL = ("original", "ground_truth", "answers", "pred")
PARAPHRASES = ("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt", "ood_rephrase")
UNRELATED = ("unrelated",)
LOCALITY = ("locality", "locality_inputs", "locality_prompt", "neighborhood_prompts", "loc")
ANSWERS = ("answer", "ground_truth")  # of a question that is a mapping
LOCALITY_ANSWER = ("locality_answer", "locality_ground_truth", "loc_ans")


class Question(NamedTuple):
    """A question and the answer that is scored."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """What is to be answered otherwise from now on; all texts.

    Attributes:
        prompt: The question, in the wording of the edit.
        target: The new answer.
        original: The answer before, if it is known.
        paraphrases: The question in other words, which no edit shows.
        unrelated: A question that the edit may see in order to leave it alone; never one of ``locality``.
        unrelated_answer: The answer to it.
        locality: Questions whose answers must stay what they were, which no edit shows.
        prefixes: Texts to put before the question in further rows of the edit.
    """

    prompt: str
    target: str
    original: str | None = None
    paraphrases: tuple[str, ...] = ()
    unrelated: str | None = None
    unrelated_answer: str = ""
    locality: tuple[Question, ...] = ()
    prefixes: tuple[str, ...] = ()


def read_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """Read facts from a file, in its order: JSON lines, or one JSON array.

    A row is an object with

    - the question, as ``prompt`` or ``src``, and the new answer, as ``target``, ``target_new`` or ``alt``;
    - if it is there, the answer before, as ``original``, ``ground_truth``, ``answers`` or ``pred``;
    - paraphrases, as ``paraphrases``, ``paraphrase_prompts``, ``rephrase``, ``rephrase_prompt`` or ``ood_rephrase``;
    - questions whose answers must stay, as ``locality``, ``locality_inputs``, ``locality_prompt``,
      ``neighborhood_prompts`` or ``loc``: a text, whose answer is ``locality_answer``, ``locality_ground_truth`` or
      ``loc_ans``, or objects of ``prompt`` and ``answer`` or ``ground_truth``, or lists of either, or an object of any
      of these by name. A list of texts goes with a list of answers, one each, or with one text that answers all;
    - a question to leave alone that the edit may see, as ``unrelated``, like those;
    - texts to put before the question in further rows of the edit, as ``prefixes``.

    Of each, the first key in this order counts. Where otherwise a text is meant, a list stands for its first one. In a
    row with ``requested_rewrite`` (CounterFact) question, subject and answers are in there, and ``target_true`` is what
    the questions about its neighbours are answered with. A row without text for a new answer is left out: ZsRE has
    some.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read, a row is no such object, or nothing is left; with the line, or in an array the
            number of the row from 1. Or it has not as many answers as questions of locality.
    """
    rows = [fact for place, record in _records(Path(path)) if (fact := _fact(place, record)).target]
    if not rows:
        raise ValueError(f"path={str(path)!r} has no row with a new answer; pass a file with some")
    return rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place for messages."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read ({error}); pass a file of JSON lines") from error
    if text.lstrip().startswith("["):
        array = _parse(f"path={str(path)!r}", text)
        yield from ((f"path={str(path)!r}, row {number}", record) for number, record in enumerate(array, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"path={str(path)!r}, line {number}"
            yield place, _parse(place, line)


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); use an object a line, or one array of objects") from error


def _fact(place: str, record: Any) -> Fact:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} is a {type(record).__name__}; use an object with the keys 'prompt' and 'target'")
    if "requested_rewrite" in record:
        record = _flatten_counterfact(place, record)
    unrelated = _questions(place, record, UNRELATED)
    return Fact(
        prompt=_text(place, record, PROMPT),
        target=_text(place, record, TARGET, empty=True),
        original=_text(place, record, ORIGINAL, empty=True) if _key(record, ORIGINAL) else None,
        paraphrases=tuple(_texts(place, record, PARAPHRASES)),
        unrelated=unrelated[0].prompt if unrelated else None,
        unrelated_answer=unrelated[0].answer if unrelated else "",
        locality=tuple(_questions(place, record, LOCALITY)),
        prefixes=tuple(_texts(place, record, ("prefixes",))),
    )


def _flatten_counterfact(place: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Bring what is in ``requested_rewrite`` to where other sets have it."""
    rewrite = record["requested_rewrite"]
    try:
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
        target, original = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{place} has a requested_rewrite without {error}; it needs texts 'prompt' and 'subject', and 'target_new' "
            f"and 'target_true' with a text 'str' each"
        ) from error
    own = {"prompt": prompt, "target": target, "original": original, "locality_answer": original}
    return {**record, **own}


def _key(record: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first of some keys that a row has something for."""
    return next((key for key in keys if record.get(key) not in (None, [], {})), None)


def _text(place: str, record: Mapping[str, Any], keys: Sequence[str], *, empty: bool = False) -> str:
    """Return the text under one of some keys; of a list, or a list in a list, the first one."""
    key = _key(record, keys)
    value = None if key is None else record[key]
    while isinstance(value, list) and value:
        value = value[0]
    if key is None:
        raise ValueError(f"{place} has no {keys[0]!r}; give it as one of {', '.join(map(repr, keys))}")
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{place} has {key}={value!r}; it must be a text")
    return value.strip()


def _texts(place: str, record: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return all texts under one of some keys, which a row need not have."""
    key = _key(record, keys)
    values = [] if key is None else record[key] if isinstance(record[key], list) else [record[key]]
    return [_text(place, {key: value}, [key]) for value in values if key is not None]


def _questions(place: str, record: Mapping[str, Any], keys: Sequence[str]) -> list[Question]:
    """Return all questions under one of some keys, which a row need not have, with their answers."""
    key = _key(record, keys)
    return [] if key is None else _paired(f"{place}, {key}", record[key], record, LOCALITY_ANSWER, place)


def _paired(inside: str, value: Any, answered: Mapping[str, Any], answers: Sequence[str], place: str) -> list[Question]:
    """Return the questions in a value, texts with the answers under one of some keys of what is around them."""
    if isinstance(value, Mapping):
        if "prompt" in value:
            return _paired(inside, value["prompt"], value, ANSWERS, inside)
        return [q for name, part in value.items() for q in _paired(f"{inside}, {name}", part, answered, answers, place)]
    if not isinstance(value, list):
        return [Question(_text(inside, {"prompt": value}, ["prompt"]), _text(place, answered, answers))]
    key, rows = _key(answered, answers), [answered] * len(value)
    if key is not None and isinstance(told := answered[key], list) and not any(isinstance(v, Mapping) for v in value):
        if len(told) != len(value):
            raise ValueError(f"{inside} has {len(value)} questions, {key} {len(told)} answers; give one for each")
        rows = [{key: answer} for answer in told]
    return [q for part, row in zip(value, rows, strict=True) for q in _paired(inside, part, row, answers, place)]
