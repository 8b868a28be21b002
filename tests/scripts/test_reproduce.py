"""Claims in miniature: runs are stored, resumed and judged; the page says what the stored runs say."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.scripts.reproduce_cases import SCRIPTS, stored

MODULE = """
from claims import Check, Claim, ClaimSet, at_least, at_most, beats

SCORES = {"good": 0.9, "bad": 0.5, "same": 0.9}
DONE = []


def measure(settings, seed):
    DONE.append((settings["kind"], seed))
    if settings.get("fails_at") == seed:
        raise RuntimeError("interrupted")
    return {"score": SCORES[settings["kind"]] + seed / 100, "steps": settings["steps"]}


def shorten(settings):
    return settings | {"steps": 1}


def variant(kind, **options):
    return {"kind": kind, "steps": 10} | options


COLUMNS = {"score": "score, %"}
CLAIMS = ClaimSet(
    paper="Nobody, arXiv 0000.00000",
    measure=measure,
    shorten=shorten,
    claims={
        "order": Claim(
            "Good is better", "Both are tried.", {"good": variant("good"), "bad": variant("bad")}, COLUMNS,
            (beats("good", "bad", "score"), beats("bad", "good", "score")),
        ),
        "bounds": Claim(
            "Good is good", "It is tried.", {"good": variant("good")}, COLUMNS,
            (at_least("good", ("score",), 0.8), at_most("good", ("score",), 0.8)), alone=True,
        ),
    },
)
"""


@pytest.fixture(scope="module")
def reproduce() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("reproduce")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def fake(reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "fake_claims.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("fake_claims")
    del sys.modules["fake_claims"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results" / "fake.json"


def runs_of(reproduce: ModuleType, claim_set: Any, store: Path | None, seeds: int = 2, **options: Any) -> list[dict]:
    return reproduce.reproduce(
        claim_set, store, seeds=range(seeds), **{"names": [*claim_set.claims], "jobs": 1} | options
    )


def changed(claim_set: Any, name: str, **variants: Any) -> Any:
    claim = claim_set.claims[name]
    return replace(claim_set, claims=claim_set.claims | {name: replace(claim, variants=claim.variants | variants)})


# Runs


def test_what_claims_share_is_run_once(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store)
    assert sorted(fake.DONE) == [("bad", 0), ("bad", 1), ("good", 0), ("good", 1)]
    assert [run["seed"] for run in stored(store)["runs"]] == [0, 1, 0, 1]


def test_every_run_is_stored_with_what_it_was_run_with(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store, seeds=1)
    file = stored(store)
    assert file["command"] == "python scripts/reproduce.py fake"
    [run] = [run for run in file["runs"] if run["settings"]["kind"] == "bad"]
    assert run["settings"] == {"kind": "bad", "steps": 10}
    assert run["metrics"] == {"score": 0.5, "steps": 10}
    assert run["seconds"] >= 0
    assert run["machine"]["torch"] == torch.__version__
    assert set(run["machine"]) == {"processor", "cpus", "python", "torch"}


def test_only_what_is_missing_is_run(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store, names=["order"], seeds=1)
    fake.DONE.clear()
    runs_of(reproduce, fake.CLAIMS, store, seeds=2)
    assert sorted(fake.DONE) == [("bad", 1), ("good", 1)]
    fake.DONE.clear()
    assert len(runs_of(reproduce, fake.CLAIMS, store, seeds=1)) == 4, "seeds beyond those asked for count too"
    assert not fake.DONE


def test_a_variant_with_other_settings_is_run_anew_and_its_old_runs_are_dropped(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store)
    fake.DONE.clear()
    other = changed(fake.CLAIMS, "order", bad=fake.variant("bad", steps=20))
    runs_of(reproduce, other, store, seeds=1)
    assert fake.DONE == [("bad", 0)]
    assert [(run["settings"]["kind"], run["settings"]["steps"]) for run in stored(store)["runs"]] == [
        ("bad", 20),
        ("good", 10),
        ("good", 10),
    ]


def test_an_interrupted_command_keeps_the_runs_that_ended(reproduce, fake, store):
    failing = changed(fake.CLAIMS, "order", bad=fake.variant("bad", fails_at=1))
    with pytest.raises(RuntimeError, match="interrupted"):
        runs_of(reproduce, failing, store)
    assert fake.DONE == [("bad", 0), ("bad", 1)]
    fake.DONE.clear()
    with pytest.raises(RuntimeError, match="interrupted"):
        runs_of(reproduce, failing, store)
    assert fake.DONE == [("bad", 1)]
    assert [run["seed"] for run in stored(store)["runs"]] == [0]


def test_a_killed_write_leaves_the_file_whole(reproduce, fake, store, monkeypatch):
    runs_of(reproduce, fake.CLAIMS, store, seeds=1)
    before = store.read_text()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs_of(reproduce, fake.CLAIMS, store)
    assert store.read_text() == before


def test_runs_in_processes_are_those_of_one_process(reproduce, fake, store):
    def without_time(runs: list[dict]) -> list[str]:
        return sorted(json.dumps({key: run[key] for key in ("settings", "seed", "metrics")}) for run in runs)

    alone = runs_of(reproduce, fake.CLAIMS, None)
    fake.DONE.clear()
    assert without_time(runs_of(reproduce, fake.CLAIMS, store, jobs=2)) == without_time(alone)
    assert fake.DONE == [("good", 0), ("good", 1)], "only what is timed runs in this process"


# Judgement


@pytest.mark.parametrize(
    ("margins", "held"),
    [
        ([], None),
        ([1.0], None),
        ([0.1, 0.1], True),
        ([0.0, 0.0], False),
        ([-0.1, -0.2, -0.1], False),
        ([0.1, 0.2, 0.3], True),
        ([0.0, 0.1, 0.6], False),
    ],
)
def test_a_statement_holds_two_standard_errors_above_zero(reproduce, margins, held):
    verdict = reproduce.verdict(margins)
    assert verdict["held"] is held
    if len(margins) > 1:
        n, mean = len(margins), sum(margins) / len(margins)
        sd = math.sqrt(sum((margin - mean) ** 2 for margin in margins) / (n - 1))
        assert held == (mean > 2 * sd / math.sqrt(n))
        assert verdict["margin"] == pytest.approx({"mean": mean, "sd": sd, "seeds": n})


def test_claims_are_judged_by_their_runs(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store)
    order, bounds = stored(store)["claims"]
    assert [row["variant"] for row in order["rows"]] == ["good", "bad"]
    assert order["rows"][1]["score, %"] == pytest.approx({"mean": 0.505, "sd": 0.01 / math.sqrt(2), "seeds": 2})
    assert [(check["statement"], check["held"]) for check in order["checks"] + bounds["checks"]] == [
        ("good beats bad", True),
        ("bad beats good", False),
        ("good reaches 0.8 (score)", True),
        ("good stays within 0.8 (score)", False),
    ]
    assert order["checks"][0]["margin"]["mean"] == pytest.approx(0.4)
    assert bounds["checks"][0]["margin"]["mean"] == pytest.approx(0.105)


def test_a_variant_may_have_none_of_a_metric(reproduce):
    runs = [{"metrics": {"score": 1.0}}, {"metrics": {"score": 3.0}}]
    assert reproduce.of_metric("score", runs)["mean"] == 2
    assert reproduce.of_metric("drift", runs) is None


def test_only_seeds_that_all_variants_have_are_judged(reproduce, fake, store):
    runs_of(reproduce, fake.CLAIMS, store, names=["bounds"])
    order, bounds = stored(store)["claims"]
    assert bounds["checks"][0]["held"] is True
    assert order["checks"] == [
        {"statement": "good beats bad", "held": None, "margin": None},
        {"statement": "bad beats good", "held": None, "margin": None},
    ]


# The page and the command


@pytest.fixture
def page(reproduce: ModuleType, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results page of the fake claims, in a folder that the scripts take for the repository."""
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "RESULTS.md"
    path.write_text("# Results\n\n<!-- generated: reproduced fake -->\n<!-- end -->\n\nEnd.\n")
    monkeypatch.setattr(reproduce, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(sys.modules["catalog"], "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "load", lambda name: fake.CLAIMS)
    return path


def test_the_command_writes_the_page_from_what_it_stored(reproduce, page, capsys):
    assert reproduce.main(["fake", "--seeds", "2", "--jobs", "1"]) == 0
    text = page.read_text()
    assert text.startswith("# Results\n\n<!-- generated: reproduced fake -->\n**Good is better.** Both are tried.\n")
    assert "| good | 0.905 ± 0.007 | 0 ± 0 |" in text
    assert "- Held: good beats bad (margin 0.400 ± 0.000)\n- **Did not hold**: bad beats good (margin -0.400" in text
    assert f"2 seeds; processor {reproduce.platform.machine()}, cpus" in text
    assert text.endswith("\n<!-- end -->\n\nEnd.\n")
    printed = capsys.readouterr().out
    assert "Held: good beats bad (margin 0.400 ± 0.000)" in printed
    assert "Did not hold: bad beats good" in printed


def test_the_page_says_what_was_not_judged(reproduce, page):
    reproduce.main(["fake", "--seeds", "1", "--jobs", "1"])
    assert "- Not judged: good beats bad (margin 0.400)" in page.read_text()


def test_a_page_without_runs_says_how_to_get_them(reproduce, page):
    lines = sys.modules["catalog"].reproduced(page, "fake")
    assert lines == ["Not measured yet: `python scripts/reproduce.py fake` does."]


def test_some_claims_can_be_asked_for(reproduce, page, fake, capsys):
    reproduce.main(["fake", "--claims", "bounds", "--seeds", "1"])
    assert fake.DONE == [("good", 0)]
    assert "order" not in capsys.readouterr().out


def test_a_folder_of_ones_own_leaves_the_page_alone(reproduce, page, tmp_path):
    before = page.read_text()
    reproduce.main(["fake", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "fake.json").exists()
    assert page.read_text() == before


def test_quick_is_short_and_stores_nothing(reproduce, page, fake, capsys):
    before = page.read_text()
    reproduce.main(["fake", "--quick", "--jobs", "1"])
    assert sorted(fake.DONE) == [("bad", 0), ("good", 0)]
    assert "steps 1.000" in capsys.readouterr().out
    assert page.read_text() == before
    assert not (page.parent / "results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["titan"], "name='titan' is no claim set; did you mean 'titans'?"),
        (["titans", "--claims", "speed"], "claims=['speed'] are not among ablation,"),
        (["titans", "--seeds", "0"], "seeds=0 and jobs="),
    ],
)
def test_a_command_that_cannot_be_is_refused(reproduce, words, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(words)
    assert message in capsys.readouterr().err
