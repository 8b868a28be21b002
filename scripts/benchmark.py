"""Measure ours, the loop and the peers side by side, and write docs/BENCHMARKS.md and docs/benchmarks.csv.

    python scripts/benchmark.py                             # everything, some minutes on 2 cores
    python scripts/benchmark.py --cases 'neural_memory_*'   # some of it; the stored rows of the others stay
    python scripts/benchmark.py --render                    # only write the page again from the CSV

Times are medians of interleaved rounds in one process, after warm-up; the matmul rate is measured in the same rounds.
Peak extra memory is that of one call in a fresh process, over what that process held before it.
"""

import argparse
import csv
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from benchmark_cases import CASES, Case, Variant

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIELDS = ["case", "variant", "tokens", "seconds", "flops", "matmul_rate", "peak_bytes", "machine"]
Row = dict[str, str]


def matmul(size: int = 2048) -> float:
    """Seconds of one large float32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


def measure(case: Case, rounds: int) -> list[Row]:
    """Time every variant of a case, interleaved, and measure its memory."""
    runnable = [variant for variant in case.variants if variant.missing is None]
    for variant in case.variants:
        if variant.missing is not None:
            print(f"  left out: {variant.name}: {variant.missing}", file=sys.stderr)
    works = [variant.build() for variant in runnable]
    for work in works:
        work()
        work()
    matmul()
    seconds: list[list[float]] = [[] for _ in works]
    rates = []
    for _ in range(rounds):
        rates.append(2 * 2048**3 / matmul())
        for work, times in zip(works, seconds, strict=True):
            # Short work is repeated, so that the clock and a stray interrupt do not count, and is run once before: its
            # caches hold what the variant before it left there.
            repeats = 1 if not times else max(1, min(20, int(0.4 / times[0])))
            if repeats > 1:
                work()
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            times.append((time.perf_counter() - start) / repeats)
    return [
        {
            "case": case.name,
            "variant": variant.name,
            "tokens": str(variant.tokens),
            "seconds": f"{median(times):.6g}",
            "flops": "" if variant.flops is None else f"{variant.flops:.6g}",
            "matmul_rate": f"{median(rates):.6g}",
            "peak_bytes": str(peak_bytes(case, variant)),
            "machine": machine(),
        }
        for variant, times in zip(runnable, seconds, strict=True)
    ]


def machine() -> str:
    """Describe what the numbers were measured with."""
    peer = version("titans-pytorch") if importable("titans_pytorch") else "none"
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, titans-pytorch {peer}"
    )


def importable(name: str) -> bool:
    """Whether a package is installed."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def peak_bytes(case: Case, variant: Variant) -> int:
    """Peak resident memory of one call beyond what stood before it, in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(torch.get_num_threads()),
        "--memory-of",
        case.name,
        variant.name,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_bytes(case_name: str, variant_name: str) -> None:
    """Run one variant once and print its peak extra memory (Linux: the kernel's own high-water mark, reset before)."""
    [variant] = [v for case in CASES if case.name == case_name for v in case.variants if v.name == variant_name]
    work = variant.build()
    torch.ones(64, 64) @ torch.ones(64, 64)  # load the libraries
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status: memory is measured on Linux only")


def render(rows: list[Row]) -> str:
    """Write the page from stored rows."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python scripts/benchmark.py` from `docs/benchmarks.csv`; how it measures is said at its top.",
        "Share is that of the float32 rate of a 2048 x 2048 product measured in the same rounds, for the",
        "matrix-product FLOPs counted on paper (`scripts/benchmark_cases.py`); elementwise work counts as nothing.",
    ]
    for case in CASES:
        own = [row for row in rows if row["case"] == case.name]
        if own:
            lines += ["", f"## {case.title}", "", *table(case, own)]
    return "\n".join(lines) + "\n"


def table(case: Case, rows: list[Row]) -> list[str]:
    """One case as a Markdown table and what it shows."""
    ours = rate(rows[0])
    lines = [
        f"{rows[0]['machine']}; matmul {float(rows[0]['matmul_rate']) / 1e9:.0f} GFLOP/s.",
        "",
        "| | tokens/s | ms a call | ours is | share of matmul | peak extra memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = float(row["seconds"])
        share = f"{float(row['flops']) / seconds / float(row['matmul_rate']):.0%}" if row["flops"] else ""
        ratio = "" if case.growth or row is rows[0] else f"{ours / rate(row):.1f}x"
        memory = f"{int(row['peak_bytes']) / 1e6:.0f} MB"
        lines.append(f"| {row['variant']} | {rate(row):,.0f} | {seconds * 1e3:.2f} | {ratio} | {share} | {memory} |")
    return [*lines, "", *verdicts(case, rows)]


def rate(row: Row) -> float:
    """Tokens a second."""
    return float(row["tokens"]) / float(row["seconds"])


def verdicts(case: Case, rows: list[Row]) -> list[str]:
    """Say what the case was to show and whether it did."""
    by_name = {row["variant"]: row for row in rows}
    found = []
    for name, least in case.targets.items():
        if name in by_name:
            ratio = rate(rows[0]) / rate(by_name[name])
            found.append(f"- {_verdict(ratio >= least)}: at least {least:g}x {name}: {ratio:.1f}x")
    for name, most in case.most_memory.items():
        if name in by_name:
            part = int(rows[0]["peak_bytes"]) / int(by_name[name]["peak_bytes"])
            found.append(f"- {_verdict(part <= most)}: at most {most:g} of the peak extra memory of {name}: {part:.3f}")
    if case.least_share is not None:
        for row in rows:
            if row["flops"]:
                share = float(row["flops"]) / float(row["seconds"]) / float(row["matmul_rate"])
                met = _verdict(share >= case.least_share)
                found.append(
                    f"- {met}: at least {case.least_share:.0%} of the matmul rate: {row['variant']}: {share:.0%}"
                )
    if case.growth:
        times = [float(row["seconds"]) for row in rows]
        if len({row["tokens"] for row in rows}) > 1:
            steps = [b / a for a, b in itertools.pairwise(times)]
            span = math.log(float(rows[-1]["tokens"]) / float(rows[0]["tokens"]))
            exponent = math.log(times[-1] / times[0]) / span
            found.append(f"- {_verdict(max(steps) <= 2.2)}: time(2N) / time(N) at most 2.2: largest {max(steps):.2f}")
            found.append(f"- Exponent of time over length: {exponent:.2f}")
        else:
            spread = max(times) / min(times)
            found.append(
                f"- {_verdict(spread <= 1.25)}: flat in the context's length: slowest over fastest {spread:.2f}"
            )
    return found


def _verdict(met: bool) -> str:
    return "Met" if met else "**Not met**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="pattern of case names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--render", action="store_true", help="write the page from the stored rows, measure nothing")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        print_peak_bytes(*options.memory_of)
        return
    chosen = [] if options.render else [case for case in CASES if fnmatch(case.name, options.cases)]
    if not chosen and not options.render:
        parser.error(f"--cases {options.cases!r} matches none of {', '.join(case.name for case in CASES)}")
    stored = DOCS / "benchmarks.csv"
    rows: list[Row] = []
    if stored.exists():
        with stored.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for case in chosen:
        print(f"{case.name} ...", file=sys.stderr)
        measured = measure(case, options.rounds)
        rows = [row for row in rows if row["case"] != case.name] + measured
        print("\n".join(table(case, measured)))
        with stored.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (DOCS / "BENCHMARKS.md").write_text(render(rows))


if __name__ == "__main__":
    main()
