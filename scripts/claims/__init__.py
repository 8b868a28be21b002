"""Claim sets: what a paper claims, in miniature. A file a paper, each with a ``CLAIMS: ClaimSet``.

``scripts/reproduce.py`` runs, stores and judges them. A run is described by its settings, plain data, and a seed:
what two claims share is run once, and what was run with other settings does not count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Metrics = dict[str, float]
Results = Mapping[str, Metrics]  # of one seed, by variant


@dataclass(frozen=True)
class Check:
    """A statement that the results of every seed put a number to.

    Attributes:
        statement: What is to be shown.
        margin: By how much the results of a seed show it; below 0, they show the contrary.
    """

    statement: str
    margin: Callable[[Results], float]


@dataclass(frozen=True)
class Claim:
    """What a paper says, the variants that test it, and what must come out.

    Attributes:
        statement: The paper's words, shortened.
        test: What is trained and measured here, in Markdown.
        variants: Name -> settings, in the order of the table.
        columns: Metric -> head of its column; a variant may have none of a metric.
        checks: What must come out.
        alone: Times are measured, so nothing runs beside it.
    """

    statement: str
    test: str
    variants: Mapping[str, Settings]
    columns: Mapping[str, str]
    checks: tuple[Check, ...]
    alone: bool = False


@dataclass(frozen=True)
class ClaimSet:
    """The claims of a paper.

    Attributes:
        paper: Whose claims.
        measure: Runs one thing, settings and seed -> metrics; a function of a module, for other processes.
        shorten: Settings of a run so short that it only shows that everything runs.
        claims: By name.
        seeds: Of every variant, unless the command says otherwise.
    """

    paper: str
    measure: Callable[[Settings, int], Metrics]
    shorten: Callable[[Settings], Settings]
    claims: Mapping[str, Claim] = field(default_factory=dict)
    seeds: int = 3


def beats(better: str, worse: str, metric: str) -> Check:
    """One variant has more of a metric than another, seed by seed."""
    return Check(f"{better} beats {worse}", lambda results: results[better][metric] - results[worse][metric])


def at_least(variant: str, metrics: tuple[str, ...], bound: float) -> Check:
    """Each of some metrics of a variant reaches a bound."""
    statement = f"{variant} reaches {bound:g} ({', '.join(metrics)})"
    return Check(statement, lambda results: min(results[variant][metric] for metric in metrics) - bound)


def at_most(variant: str, metrics: tuple[str, ...], bound: float) -> Check:
    """Each of some metrics of a variant stays within a bound."""
    statement = f"{variant} stays within {bound:g} ({', '.join(metrics)})"
    return Check(statement, lambda results: bound - max(results[variant][metric] for metric in metrics))


def claim_sets() -> list[str]:
    """Return the names of all claim sets."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> ClaimSet:
    """Return a claim set.

    Raises:
        ValueError: There is none of that name.
    """
    known = claim_sets()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"name={name!r} is no claim set; {hint}")
    claims: ClaimSet = import_module(f"claims.{name}").CLAIMS
    return claims
