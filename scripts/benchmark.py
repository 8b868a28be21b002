"""Measure ours, the loop and the peers side by side, and write docs/BENCHMARKS.md and docs/benchmarks.csv.

    python scripts/benchmark.py                 # everything that runs here, some minutes on 2 cores
    python scripts/benchmark.py --only mac      # a group of cases, or patterns of their names; the other rows stay
    python scripts/benchmark.py --render        # only write the page again from the CSV

Times are medians of interleaved rounds in one process, after warm-up; the rates of matrix products are measured in the
same rounds. Peak extra memory is that of the second call in a fresh process, over what that process held before it:
what the first one imports, loads or compiles does not count.
"""

import argparse
import csv
import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from benchmark_cases import CASES
from benchmark_cases.case import Case, Variant, Work
from benchmark_page import Row, render, table

from memzoo.layers import keep_freed_memory

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIELDS = [
    "case", "variant", "tokens", "seconds", "flops", "product_seconds", "matmul_rate", "peak_bytes", "machine",
]  # fmt: skip
SECONDS_A_CASE = 12.0  # of timed rounds, above LEAST_ROUNDS of them
LEAST_ROUNDS = 3


def clock(work: Work, device: str, repeats: int = 1) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def matmul(device: str) -> tuple[Work, float]:
    """One large product and its FLOPs: in float32 on the CPU, in bfloat16 on CUDA."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def batched_product(shape: tuple[int, int, int, int]) -> Work:
    """One batch of float32 products."""
    batch, m, k, n = shape
    a, b, out = torch.randn(batch, m, k), torch.randn(batch, k, n), torch.empty(batch, m, n)
    return lambda: torch.bmm(a, b, out=out)


class Timed:
    """Work and what its calls took."""

    def __init__(self, work: Work, device: str, total: float) -> None:
        """Warm up. Short work is repeated for ``total`` seconds, so that neither clock nor a stray interrupt counts."""
        self.work, self.device = work, device
        first = clock(work, device)
        self.expected = clock(work, device) if first < 2 else first
        self.repeats = max(1, int(total / self.expected))
        self.seconds: list[float] = []

    def round(self) -> None:
        """Time it again."""
        if self.repeats > 1:  # its caches hold what the work before it left there
            self.work()
        self.seconds.append(clock(self.work, self.device, self.repeats))


def measure(case: Case, most_rounds: int, peak: Callable[[Case, Variant], int]) -> list[Row]:
    """Time every variant of a case, interleaved, and measure its memory."""
    runnable = [variant for variant in case.variants if variant.missing is None]
    for variant in case.variants:
        if variant.missing is not None:
            print(f"  left out: {variant.name}: {variant.missing}", file=sys.stderr)
    if not runnable:
        return []
    large, large_flops = matmul(case.device)
    rate = Timed(large, case.device, 0.0)
    works = [Timed(variant.build(), case.device, 0.4) for variant in runnable]
    # On CUDA, ours multiplies as the variant says, in float32 or TF32; there the large product is all there is.
    shapes = {p.shape for variant in runnable for p in variant.products} if case.device == "cpu" else set()
    products = {shape: Timed(batched_product(shape), case.device, 0.02) for shape in shapes}
    timed = [rate, *works, *products.values()]
    a_round = sum(one.expected * one.repeats for one in timed)
    for _ in range(min(most_rounds, max(LEAST_ROUNDS, int(SECONDS_A_CASE / a_round)))):
        for one in timed:
            one.round()
    rows = []
    for variant, work in zip(runnable, works, strict=True):
        own = variant.products
        at_library_rate = sum(p.count * median(products[p.shape].seconds) for p in own) if products else 0.0
        rows.append(
            {
                "case": case.name,
                "variant": variant.name,
                "tokens": str(variant.tokens),
                "seconds": f"{median(work.seconds):.6g}",
                "flops": f"{sum(p.flops for p in own):.6g}" if own else "",
                "product_seconds": f"{at_library_rate:.6g}" if at_library_rate else "",
                "matmul_rate": f"{large_flops / median(rate.seconds):.6g}",
                "peak_bytes": str(peak(case, variant)) if case.has_memory else "",
                "machine": machine(case.device),
            }
        )
    return rows


def machine(device: str) -> str:
    """Describe what the numbers were measured with."""
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    peer = ("fla", "fla-core") if device == "cuda" else ("titans_pytorch", "titans-pytorch")
    found = version(peer[1]) if find_spec(peer[0]) else "none"
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {peer[1]} {found}"


def peak_bytes(case: Case, variant: Variant) -> int:
    """Peak memory of a call beyond what stood before it, in a fresh process."""
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, *threads, "--memory-of", case.name, variant.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak_bytes(case_name: str, variant_name: str) -> None:
    """Print the peak extra memory of one variant's second call: resident on the CPU (Linux), allocated on CUDA."""
    [case] = [case for case in CASES if case.name == case_name]
    [variant] = [v for v in case.variants if v.name == variant_name]
    work = variant.build()
    work()
    gc.collect()
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        print(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without showing
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own high-water mark starts anew
    work()
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status: memory is measured on Linux only")


def chosen_cases(patterns: list[str]) -> list[Case]:
    """Return the cases whose group or name matches one of the patterns; all without any."""
    found = [c for c in CASES if not patterns or any(fnmatch(c.name, p) or c.group == p for p in patterns)]
    for pattern in patterns:
        if not any(fnmatch(c.name, pattern) or c.group == pattern for c in found):
            groups = ", ".join(dict.fromkeys(c.group for c in CASES))
            raise SystemExit(f"--only {pattern!r} matches no case; groups: {groups}; or a pattern of case names")
    return found


def merge(stored: list[Row], case: Case, measured: list[Row]) -> list[Row]:
    """Replace the rows of a case by what was measured now, in the order of the cases; nothing measured changes none."""
    rows = [row for row in stored if row["case"] != case.name] + measured if measured else stored
    order = {known.name: index for index, known in enumerate(CASES)}
    return sorted((row for row in rows if row["case"] in order), key=lambda row: order[row["case"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="groups, or patterns of case names")
    parser.add_argument("--rounds", type=int, default=7, help="most rounds; long cases take fewer, 3 at least")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--render", action="store_true", help="write the page from the stored rows, measure nothing")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        print_peak_bytes(*options.memory_of)
        return
    stored = DOCS / "benchmarks.csv"
    rows: list[Row] = []
    if stored.exists():
        with stored.open(newline="") as file:
            rows = list(csv.DictReader(file))
    chosen = [] if options.render else chosen_cases(options.only)
    for case in sorted(chosen, key=lambda case: case.keeps_memory):  # those last: it cannot be undone
        print(f"{case.name} ...", file=sys.stderr)
        if case.keeps_memory:
            keep_freed_memory()
        measured = measure(case, options.rounds, peak_bytes)
        if not measured:
            continue
        rows = merge(rows, case, measured)
        print("\n".join(table(case, measured)))
        with stored.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (DOCS / "BENCHMARKS.md").write_text(render(CASES, rows))


if __name__ == "__main__":
    main()
