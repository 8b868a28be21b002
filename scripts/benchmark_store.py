"""Measure DiskStore: how fast it writes, how fast it finds, and whether its reader waits for its writer.

    python scripts/benchmark_store.py                                  # a million keys, minutes, 2 GB
    python scripts/benchmark_store.py --keys 20000 --out small.json    # does it run?
    python scripts/benchmark_store.py --render                         # only print what is stored

Keys and values are random, float32, and lie once in one long sequence and once in many short ones. What was written
is in the page cache when it is read: the numbers are those of memory, SQLite and the search, not of a disk.
"""

import argparse
import json
import os
import platform
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memzoo.layers.stores import DiskStore, Entries

STORED = Path(__file__).resolve().parents[1] / "docs" / "results" / "memory_store.json"
PENDING = 64  # appends between two flushes: what may wait in memory
Row = dict[str, Any]


class Stream:
    """Appends random chunks to a store, to sequences of ``length`` tokens, one after another."""

    def __init__(self, store: DiskStore, options: argparse.Namespace, length: int) -> None:
        self.store, self.length, self.chunk = store, length, options.chunk
        self.shape = options.kv_heads, options.head_dim
        self.sequences: list[int] = []
        self.start = length
        self.seconds: list[float] = []
        # A few chunks serve for all: drawing them would take longer than writing them.
        generator = torch.Generator().manual_seed(0)
        self.chunks = [torch.randn(self.chunk, *self.shape, generator=generator) for _ in range(61)]

    def append(self) -> None:
        """Append a chunk, and take the time."""
        sequence, start = (self.sequences[-1], self.start) if self.start < self.length else (0, 0)
        number = len(self.seconds)
        entries = Entries(
            self.chunks[number % 61] * (1 + 1e-6 * number),  # so that no key comes twice
            self.chunks[number % 59],
            torch.arange(start, start + self.chunk),
            torch.zeros(self.chunk),
        )
        begin = time.perf_counter()
        held = self.store.append(sequence, start, entries)
        self.seconds.append(time.perf_counter() - begin)
        self.sequences += [held] if sequence == 0 else []
        self.start = start + self.chunk

    def run(self, appends: int) -> None:
        """Append chunks at full rate."""
        for _ in range(appends):
            self.append()
            if len(self.seconds) % PENDING == 0:
                self.store.flush()
        self.store.flush()


def quantiles(seconds: list[float]) -> Row:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 3),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
    }


def write(stream: Stream, keys: int) -> Row:
    """Write ``keys`` keys, and say how fast."""
    before, begin = stream.store.snapshot(), time.perf_counter()
    appends = -(-keys // stream.chunk)
    stream.run(appends)
    seconds = time.perf_counter() - begin
    size = 2 * 4 * stream.shape[0] * stream.shape[1]
    return {
        "keys_per_second": round(appends * stream.chunk / seconds),
        "mb_per_second": round(appends * stream.chunk * size / seconds / 1e6, 1),
        "appends": appends,
        "commits": stream.store.snapshot() - before,
        "append": quantiles(stream.seconds),
    }


def query(store: DiskStore, sequences: list[int], length: int, options: argparse.Namespace) -> Row:
    """Query one sequence after another, and say how long it takes."""
    generator = torch.Generator().manual_seed(1)
    seconds = []
    end = time.perf_counter() + options.seconds
    for number in count():
        if number >= options.queries + 2 and time.perf_counter() > end:
            break
        question = torch.randn(options.kv_heads, options.head_dim, generator=generator)
        sequence = sequences[number * 7919 % len(sequences)]
        begin = time.perf_counter()
        found = store.query(sequence, question, options.count, before=length, version=store.snapshot())
        seconds.append(time.perf_counter() - begin)
        assert len(found) == min(options.count, length)
    return quantiles(seconds[2:])


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do work again and again in a thread, and raise what it raises."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        future.result()


def write_until(path: str, options: argparse.Namespace, started: Any, ended: Any) -> None:
    """Write to a folder at full rate: a process of its own."""
    torch.set_num_threads(1)
    with DiskStore(path) as store:
        stream = Stream(store, options, options.short)
        while not ended.is_set():
            stream.run(PENDING)
            started.set()


def compute_until(path: str, options: argparse.Namespace, started: Any, ended: Any) -> None:
    """Keep a core and the memory busy, and write nothing: what a writer takes from a reader by being there."""
    torch.set_num_threads(1)
    chunk = torch.randn(64 * options.chunk, options.kv_heads, options.head_dim)
    started.set()
    while not ended.is_set():
        chunk.clone()


@contextmanager
def other_process(work: Callable[..., None], path: Path, options: argparse.Namespace) -> Iterator[None]:
    """Have another process do work beside this one."""
    context = get_context("spawn")
    started, ended = context.Event(), context.Event()
    process = context.Process(target=work, args=(str(path), options, started, ended))
    process.start()
    try:
        while not started.wait(1):
            if not process.is_alive():
                raise RuntimeError(f"the other process ended with {process.exitcode}")
        yield
    finally:
        ended.set()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the other process ended with {process.exitcode}")


def measure(options: argparse.Namespace) -> Row:
    """Measure everything."""
    layouts = {
        "long": ("one sequence", options.keys),
        "short": (f"sequences of {options.short}", options.short),
    }
    found: Row = {}
    for name, (label, length) in layouts.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder)
            with DiskStore(path) as store:
                stream = Stream(store, options, length)
                row: Row = {"label": label, "write": write(stream, options.keys)}
                row["mb_on_disk"] = round(sum(file.stat().st_size for file in path.iterdir()) / 1e6)
                row["idle"] = query(store, stream.sequences, length, options)
                other, begin = Stream(store, options, options.short), time.perf_counter()
                with in_background(lambda other=other: other.run(PENDING)):
                    row["writing"] = query(store, stream.sequences, length, options)
                written = len(other.seconds) * options.chunk
                row["written_meanwhile"] = round(written / (time.perf_counter() - begin))
                row["append_while_reading"] = quantiles(other.seconds)
            for key, work in (("writing_elsewhere", write_until), ("computing_elsewhere", compute_until)):
                with other_process(work, path, options), DiskStore(path, read_only=True) as store:
                    row[key] = query(store, stream.sequences, length, options)
        found[name] = row
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, DiskStore(folder, synchronous=True) as store:
        stream = Stream(store, options, options.short)
        stream.run(options.queries)
        found["commit"] = quantiles(stream.seconds)
    return found


def facts(options: argparse.Namespace) -> Row:
    """Say what was measured, and with what."""
    return {
        "command": "python scripts/benchmark_store.py",
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sqlite": sqlite3.sqlite_version,
        },
    }


def cells(results: Row) -> tuple[list[str], list[list[str]]]:
    """Lay out results: a head, and rows."""

    def latency(row: Row) -> str:
        return f"{row['p50_ms']:.3g} / {row['p99_ms']:.3g}"

    layouts = [results["long"], results["short"]]
    rows = [
        ["keys written a second", *(f"{one['write']['keys_per_second']:,}" for one in layouts)],
        ["MB written a second", *(f"{one['write']['mb_per_second']:g}" for one in layouts)],
        ["appends / commits", *(f"{one['write']['appends']:,} / {one['write']['commits']:,}" for one in layouts)],
        ["MB on disk", *(f"{one['mb_on_disk']:,}" for one in layouts)],
        ["append, ms", *(latency(one["write"]["append"]) for one in layouts)],
        ["append while a thread queries, ms", *(latency(one["append_while_reading"]) for one in layouts)],
        ["query, writer idle, ms", *(latency(one["idle"]) for one in layouts)],
        ["query, a thread writes at full rate, ms", *(latency(one["writing"]) for one in layouts)],
        ["keys that it writes meanwhile, a second", *(f"{one['written_meanwhile']:,}" for one in layouts)],
        ["query, another process does, ms", *(latency(one["writing_elsewhere"]) for one in layouts)],
        ["query, another process copies memory instead, ms", *(latency(one["computing_elsewhere"]) for one in layouts)],
        ["append and its commit, synchronous, ms", "", latency(results["commit"])],
    ]
    return ["p50 / p99 where times are given", *(one["label"] for one in layouts)], rows


def table(results: Row) -> list[str]:
    """Write results as Markdown."""
    settings, machine = results["settings"], results["machine"]
    head, rows = cells(results)
    return [
        f"{settings['keys']:,} keys and values of {settings['kv_heads']} x {settings['head_dim']} float32, appends of "
        f"{settings['chunk']}, {settings['count']} found; at least {settings['queries']} queries and "
        f"{settings['seconds']} s each; "
        f"{machine['processor']}, {machine['cpus']} cores, "
        f"torch {machine['torch']} with {machine['threads']} thread(s), "
        f"Python {machine['python']}, SQLite {machine['sqlite']}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


SETTINGS = {
    "keys": 1_000_000,
    "kv_heads": 2,
    "head_dim": 64,
    "chunk": 512,
    "short": 1024,
    "count": 32,
    "queries": 300,
    "seconds": 5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the process that queries")
    parser.add_argument("--folder", help="where to make the stores for a while; else the system's temporary one")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--render", action="store_true", help="print what is stored, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.render:
        results = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        results = facts(options) | measure(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    head, rows = cells(results)
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


if __name__ == "__main__":
    main()
