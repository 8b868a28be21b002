"""Train the miniature of a paper's claims over seeds, say which held, and write it into docs/RESULTS.md.

    python scripts/reproduce.py titans                   # some seeds of every variant; what is stored is not run again
    python scripts/reproduce.py titans --claims window   # one claim of them
    python scripts/reproduce.py titans --quick           # a few steps each, nothing stored: does it run?

Every run is stored as it ends, in docs/results/NAME.json, so an interrupted command goes on where it stopped. Runs have
one thread each; as many as there are cores go side by side, except those that measure times. A statement held if the
mean of its margin over seeds lies at least two standard errors above 0.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from catalog import VERDICTS, figure, rewritten
from claims import Claim, ClaimSet, Metrics, Settings, load
from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
Run = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run to do; ``label`` says which, ``measure`` is that of its claim set."""

    label: str
    measure: Callable[[Settings, int], Metrics]
    settings: Settings
    seed: int


def reproduce(
    claim_set: ClaimSet, store: Path | None, *, seeds: Sequence[int], names: Sequence[str], jobs: int
) -> list[Run]:
    """Do the runs that are not stored yet, storing each, and return all runs of the claim set.

    Args:
        claim_set: Whose runs.
        store: File of the runs; None to keep none.
        seeds: Of every variant.
        names: Claims whose runs to do.
        jobs: Runs side by side.
    """
    runs = [] if store is None else stored(store, claim_set)
    done = {identity(run["settings"], run["seed"]) for run in runs}
    timed = {identity(v) for claim in claim_set.claims.values() if claim.alone for v in claim.variants.values()}
    missing: dict[str, Job] = {}
    for seed in seeds:
        for name in names:
            for variant, settings in claim_set.claims[name].variants.items():
                key = identity(settings, seed)
                if key not in done:
                    missing.setdefault(key, Job(f"{name}, {variant}", claim_set.measure, settings, seed))
    for alone in (False, True):
        phase = [job for job in missing.values() if (identity(job.settings) in timed) == alone]
        for number, (job, run) in enumerate(in_processes(phase, 1 if alone else jobs), 1):
            runs.append(run)
            if store is not None:
                write(store, claim_set, runs)
            line = ", ".join(f"{metric} {value:.3f}" for metric, value in run["metrics"].items())
            print(f"{number}/{len(phase)} {job.label}, seed {job.seed}: {line} ({run['seconds']:.0f} s)", flush=True)
    if store is not None:
        write(store, claim_set, runs)
    return runs


def in_processes(jobs: Sequence[Job], count: int) -> Iterator[tuple[Job, Run]]:
    """Do jobs, in processes of their own if more than one at a time, and yield them with their runs as they end."""
    if count == 1:
        yield from ((job, do(job)) for job in jobs)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            futures = {pool.submit(do, job): job for job in jobs}
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def do(job: Job) -> Run:
    """Do a run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        metrics = job.measure(job.settings, job.seed)
    finally:
        torch.set_num_threads(threads)
    return {
        "settings": job.settings,
        "seed": job.seed,
        "metrics": metrics,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


# Storage


def identity(settings: Settings, seed: int | None = None) -> str:
    """Return what tells a run from all others, or without a seed, what tells a variant."""
    return json.dumps([settings, seed], sort_keys=True)


def stored(store: Path, claim_set: ClaimSet) -> list[Run]:
    """Return the stored runs whose settings are still those of a variant."""
    if not store.exists():
        return []
    current = {identity(settings) for claim in claim_set.claims.values() for settings in claim.variants.values()}
    runs: list[Run] = json.loads(store.read_text(encoding="utf-8"))["runs"]
    return [run for run in runs if identity(run["settings"]) in current]


def write(store: Path, claim_set: ClaimSet, runs: Sequence[Run]) -> None:
    """Store runs and what they say of the claims; a process killed meanwhile leaves the file as it was."""
    ordered = sorted(runs, key=lambda run: identity(run["settings"], run["seed"]))
    said = {"paper": claim_set.paper, "command": command(store.stem), "claims": outcome(claim_set, ordered)}
    head = json.dumps(said, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(run)}" for run in ordered)  # a line each, for readable differences
    store.parent.mkdir(parents=True, exist_ok=True)
    aside = store.with_suffix(".json.new")
    aside.write_text(f'{head},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(aside, store)


def command(name: str) -> str:
    """Return what does all runs of a claim set."""
    return f"python scripts/reproduce.py {name}"


# Judgement


def outcome(claim_set: ClaimSet, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what the runs say of every claim that has any: what the tables show."""
    return [judged(claim, runs) | {"name": name} for name, claim in claim_set.claims.items() if measured(claim, runs)]


def measured(claim: Claim, runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Return a claim's runs: variant -> seed -> run."""
    found: dict[str, dict[int, Run]] = {}
    for variant, settings in claim.variants.items():
        for run in runs:
            if identity(run["settings"]) == identity(settings):
                found.setdefault(variant, {})[run["seed"]] = run
    return found


def judged(claim: Claim, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the table and the verdicts of a claim."""
    found = measured(claim, runs)
    rows = [
        {
            "variant": variant,
            "seconds": spread([run["seconds"] for run in own.values()]),
            **{head: of_metric(key, list(own.values())) for key, head in claim.columns.items()},
        }
        for variant, own in found.items()
    ]
    common = sorted(set.intersection(*(set(found.get(variant, {})) for variant in claim.variants)))
    results = [{variant: own[seed]["metrics"] for variant, own in found.items()} for seed in common]
    machines = sorted({json.dumps(run["machine"]) for own in found.values() for run in own.values()})
    return {
        "statement": claim.statement,
        "test": claim.test,
        "rows": rows,
        "checks": [
            {"statement": check.statement} | verdict([check.margin(result) for result in results])
            for check in claim.checks
        ],
        "machines": [json.loads(machine) for machine in machines],
    }


def of_metric(key: str, runs: Sequence[Run]) -> dict[str, float | int | None] | None:
    """Return the spread of a metric over runs of a variant; None if it is nothing that the variant has."""
    values = [run["metrics"][key] for run in runs if key in run["metrics"]]
    return spread(values) if values else None


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, the standard deviation (None for a single value) and the number of values."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def verdict(margins: Sequence[float]) -> dict[str, Any]:
    """Return whether a margin is above 0 for sure, None with less than two seeds, and the margin's spread."""
    if len(margins) < 2:
        return {"held": None, "margin": spread(margins) if margins else None}
    held = mean(margins) > 2 * stdev(margins) / math.sqrt(len(margins))
    return {"held": held, "margin": spread(margins)}


# Reports


def show(outcomes: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the tables and verdicts."""
    for claim in outcomes:
        heads = [head for head in claim["rows"][0] if head not in ("variant", "seconds")]
        table = Table(
            "variant", *heads, "seconds", title=f"{claim['name']}: {claim['statement']}", title_justify="left"
        )
        for row in claim["rows"]:
            table.add_row(row["variant"], *(figure(row[head]) for head in heads), figure(row["seconds"], 0))
        console.print(table)
        for check in claim["checks"]:
            line = f"  {VERDICTS[check['held']].strip('*')}: {check['statement']} (margin {figure(check['margin'])})"
            console.print(line, soft_wrap=True, highlight=False)


def shortened(claim_set: ClaimSet) -> ClaimSet:
    """Return a claim set whose runs are as short as can be."""
    claims = {
        name: replace(
            claim, variants={variant: claim_set.shorten(settings) for variant, settings in claim.variants.items()}
        )
        for name, claim in claim_set.claims.items()
    }
    return replace(claim_set, claims=claims)


def main(words: Sequence[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="claim set, a file of scripts/claims/")
    parser.add_argument("--seeds", type=int, help="seeds of every variant; by default 3, or what the claim set says")
    parser.add_argument("--claims", nargs="+", help="some of its claims instead of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--out", type=Path, default=DOCS / "results", help="folder of the stored runs")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps; store nothing")
    options = parser.parse_args(words)
    try:
        claim_set = load(options.name)
    except ValueError as error:
        parser.error(str(error))
    names = options.claims or list(claim_set.claims)
    if unknown := set(names) - set(claim_set.claims):
        parser.error(f"claims={sorted(unknown)} are not among {', '.join(claim_set.claims)}")
    options.seeds = claim_set.seeds if options.seeds is None else options.seeds
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"seeds={options.seeds} and jobs={options.jobs} must be at least 1")
    if options.quick:
        claim_set, options.seeds = shortened(claim_set), 1
    store = None if options.quick else options.out / f"{options.name}.json"
    start = time.perf_counter()
    runs = reproduce(claim_set, store, seeds=range(options.seeds), names=names, jobs=options.jobs)
    outcomes = [claim for claim in outcome(claim_set, runs) if claim["name"] in names]
    show(outcomes, Console())
    print(f"{time.perf_counter() - start:.0f} s")
    if options.out.resolve() == DOCS / "results" and not options.quick:
        page = DOCS / "RESULTS.md"
        page.write_text(rewritten(page, page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
