"""Texts of facts that an edit shows or changes, where the same are to measure what it must not."""

from collections.abc import Sequence
from dataclasses import replace

from memzoo.lit_modules.data.fact_rows import Fact

NAMED = 5  # in a message


def find_leaks(facts: Sequence[Fact]) -> list[str]:
    """Return what is in two places that exclude each other, in words, each with the number of its edit.

    - ``locality``: questions that an edit asks, in its wording or in a paraphrase. Their answers change.
    - ``paraphrases``: those that an edit shows.
    - ``unrelated``: questions that an edit asks, or that measure locality. To leave it alone would be wrong, or shows
      what is measured.

    What an edit shows is its question and that behind each of its prefixes. Texts are the same if they are but for
    letter case and the width of spaces.
    """
    found = []
    for number, (fact, clean) in enumerate(zip(facts, without_leaks(facts), strict=True)):
        left = {question.prompt for question in clean.locality}
        found += [f"edit {number}, locality {q.prompt!r}" for q in fact.locality if q.prompt not in left]
        found += [f"edit {number}, paraphrase {p!r}" for p in fact.paraphrases if p not in clean.paraphrases]
        if fact.unrelated != clean.unrelated:
            found.append(f"edit {number}, unrelated {fact.unrelated!r}")
    return found


def without_leaks(facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts without what ``find_leaks`` finds; all edits stay."""
    shown, asked, local = shown_and_asked(facts)
    clean = []
    for fact in facts:
        leaks = fact.unrelated is not None and folded(fact.unrelated) in asked | local
        clean.append(
            replace(
                fact,
                paraphrases=tuple(prompt for prompt in fact.paraphrases if folded(prompt) not in shown),
                locality=tuple(question for question in fact.locality if folded(question.prompt) not in asked),
                unrelated=None if leaks else fact.unrelated,
                unrelated_answer="" if leaks else fact.unrelated_answer,
            )
        )
    return clean


def shown_and_asked(facts: Sequence[Fact]) -> tuple[set[str], set[str], set[str]]:
    """Return what edits show, that and all paraphrases, and the questions of locality; all ``folded``."""
    shown = {folded(f"{prefix} {fact.prompt}") for fact in facts for prefix in ("", *fact.prefixes)}
    asked = shown | {folded(prompt) for fact in facts for prompt in fact.paraphrases}
    return shown, asked, {folded(question.prompt) for fact in facts for question in fact.locality}


def folded(text: str) -> str:
    """Return a text without letter case, with single spaces and none at its ends."""
    return " ".join(text.casefold().split())


def check_leaks(path: str, facts: Sequence[Fact]) -> None:
    """Require that nothing leaks.

    Raises:
        ValueError: Something does.
    """
    if leaks := find_leaks(facts):
        more = f" and {len(leaks) - NAMED} more" if len(leaks) > NAMED else ""
        raise ValueError(
            f"path={path!r} has {'; '.join(leaks[:NAMED])}{more}: an edit shows, or answers otherwise, what measures "
            f"or trains something else; take it out of the file, or pass leaks='drop'"
        )
