"""docs/BENCHMARKS.md from the rows that `benchmark.py` stored: tables, and whether each case showed what it was to."""

import itertools
import math
from collections.abc import Callable

from benchmark_cases.case import Case

Row = dict[str, str]

HEAD = """\
# Benchmarks

Written by `python scripts/benchmark.py` from `docs/benchmarks.csv`; how it measures is said at its top. FLOPs are those
of the matrix products, counted on paper (`scripts/benchmark_cases/products.py`); elementwise work counts as nothing.
"Of the matmul rate" is their share of the rate of one large product measured in the same rounds: 2048 x 2048 in float32
on the CPU, 8192 x 8192 in bfloat16 on CUDA. "Of its products' rate" holds every product to the rate that the library's
own batched product reaches at that shape, run alone and in cache, in the same rounds too: what lacks to 100% there is
ours, what the first share lacks beyond that is the library's at small matrices."""


def render(cases: list[Case], rows: list[Row]) -> str:
    """Write the page."""
    lines = [HEAD]
    for case in cases:
        own = [row for row in rows if row["case"] == case.name]
        if own:
            lines += ["", f"## {case.title}", "", *table(case, own)]
    return "\n".join(lines) + "\n"


def table(case: Case, rows: list[Row]) -> list[str]:
    """One case as a Markdown table and what it shows. A column that no row fills is left out."""
    first = rate(rows[0])
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["variant"],
        "tokens/s": lambda row: f"{rate(row):,.0f}",
        "ms a call": lambda row: f"{float(row['seconds']) * 1e3:.2f}",
        "the first is": lambda row: "" if case.axis or row is rows[0] else f"{first / rate(row):.1f}x",
        "of the matmul rate": lambda row: f"{matmul_share(row):.0%}" if row["flops"] else "",
        "of its products' rate": lambda row: f"{products_share(row):.0%}" if row["product_seconds"] else "",
        "peak extra memory": lambda row: f"{int(row['peak_bytes']) / 1e6:.0f} MB" if row["peak_bytes"] else "",
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [f"{rows[0]['machine']}; matmul {float(rows[0]['matmul_rate']) / 1e9:.0f} GFLOP/s."]
    if case.note:
        lines.append(case.note)
    if any(row["flops"] for row in rows) and not any(row["product_seconds"] for row in rows):
        lines.append("Measured by earlier versions of memory and script; peaks then included lazy imports.")
    lines += ["", f"| {' | '.join(cells)} |", f"|---|{'---:|' * (len(cells) - 1)}"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells.values(), strict=True)]
    found = verdicts(case, rows)
    return [*lines, "", *found] if found else lines


def rate(row: Row) -> float:
    """Tokens a second."""
    return float(row["tokens"]) / float(row["seconds"])


def matmul_share(row: Row) -> float:
    """Share of the large product's rate."""
    return float(row["flops"]) / float(row["seconds"]) / float(row["matmul_rate"])


def products_share(row: Row) -> float:
    """Share of the rate that the library has for the products of the same shapes."""
    return float(row["product_seconds"]) / float(row["seconds"])


def verdicts(case: Case, rows: list[Row]) -> list[str]:
    """Say what the case was to show and whether it did."""
    by_name = {row["variant"]: row for row in rows}
    found = []
    for name, least in case.targets.items():
        if name in by_name:
            ratio = rate(rows[0]) / rate(by_name[name])
            found.append(f"- {_verdict(ratio >= least)}: at least {least:.3g}x {name}: {ratio:.3g}x")
    for name, most in case.most_memory.items():
        if name in by_name:
            part = int(rows[0]["peak_bytes"]) / int(by_name[name]["peak_bytes"])
            found.append(f"- {_verdict(part <= most)}: at most {most:g} of the peak extra memory of {name}: {part:.3f}")
    if case.least_share is not None:
        for row in rows:
            if row["flops"]:
                met = _verdict(matmul_share(row) >= case.least_share)
                what = f"at least {case.least_share:.0%} of the matmul rate: {row['variant']}"
                found.append(f"- {met}: {what}: {matmul_share(row):.0%}")
    along = {None: lambda _: [], "length": _over_length, "context": _over_context, "depth": _over_depth}
    return found + along[case.axis](rows)


def _over_length(rows: list[Row]) -> list[str]:
    times = [float(row["seconds"]) for row in rows]
    largest = max(b / a for a, b in itertools.pairwise(times))
    exponent = math.log(times[-1] / times[0]) / math.log(float(rows[-1]["tokens"]) / float(rows[0]["tokens"]))
    return [
        f"- {_verdict(largest <= 2.2)}: time(2N) / time(N) at most 2.2: largest {largest:.2f}",
        f"- Exponent of time over length: {exponent:.2f}",
    ]


def _over_context(rows: list[Row]) -> list[str]:
    times = [float(row["seconds"]) for row in rows]
    spread = max(times) / min(times)
    return [f"- {_verdict(spread <= 1.25)}: flat in the context's length: slowest over fastest {spread:.2f}"]


def _over_depth(rows: list[Row]) -> list[str]:
    """Fit a straight line of time over depth."""
    times = [float(row["seconds"]) for row in rows]
    depths = [1.0 + index for index in range(len(times))]
    middle, mean = sum(depths) / len(depths), sum(times) / len(times)
    spread = sum((depth - middle) ** 2 for depth in depths)
    slope = sum((depth - middle) * time for depth, time in zip(depths, times, strict=True)) / spread
    line = [mean + slope * (depth - middle) for depth in depths]
    worst = max(abs(time / fit - 1) for time, fit in zip(times, line, strict=True))
    return [
        f"- {_verdict(worst <= 0.15)}: linear in the depth, no time more than 15% off a straight line: {worst:.0%}",
        f"- A layer more costs {slope * 1e3:.1f} ms",
    ]


def _verdict(met: bool) -> str:
    return "Met" if met else "**Not met**"
