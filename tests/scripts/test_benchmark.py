"""The benchmark's page: what it says of stored figures, without measuring any."""

import csv
import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("benchmark")
    sys.path.remove(str(SCRIPTS))


def row(variant, seconds, *, case="neural_memory_single_head", tokens=2000, flops="", peak=10):
    return {
        "case": case,
        "variant": variant,
        "tokens": str(tokens),
        "seconds": str(seconds),
        "flops": str(flops),
        "matmul_rate": "1e9",
        "peak_bytes": str(peak * 10**6),
        "machine": "a machine",
    }


def test_targets_are_judged_by_what_was_measured(benchmark):
    from benchmark_cases import CHUNKED, EXACT

    rows = [row("ours", 1.0), row(EXACT, 41.0, peak=200), row(CHUNKED, 1.5)]
    page = benchmark.render(rows)
    assert "| ours | 2,000 | 1000.00 |  |  | 10 MB |" in page
    assert f"- Met: at least 40x {EXACT}: 41.0x" in page
    assert f"- **Not met**: at least 2x {CHUNKED}: 1.5x" in page
    assert f"- Met: at most 0.1 of the peak extra memory of {EXACT}: 0.050" in page


def test_the_share_of_the_matmul_rate_is_judged(benchmark):
    page = benchmark.render([row("ours", 1.0, case="neural_memory_four_heads", flops=6e8)])
    assert "| ours | 2,000 | 1000.00 |  | 60% | 10 MB |" in page
    assert "- **Not met**: at least 70% of the matmul rate: ours: 60%" in page


@pytest.mark.parametrize(("seconds", "verdict"), [((1.0, 2.1, 4.3), "Met"), ((1.0, 2.1, 4.9), "**Not met**")])
def test_growth_is_judged_by_its_largest_step(benchmark, seconds, verdict):
    case = "neural_memory_growth"
    rows = [row(f"{n}", s, case=case, tokens=n) for n, s in zip((1024, 2048, 4096), seconds, strict=True)]
    assert f"- {verdict}: time(2N) / time(N) at most 2.2" in benchmark.render(rows)


def test_the_stored_page_is_that_of_the_stored_rows(benchmark):
    with (benchmark.DOCS / "benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (benchmark.DOCS / "BENCHMARKS.md").read_text() == benchmark.render(rows)
    assert {r["case"] for r in rows} == {case.name for case in benchmark.CASES}
