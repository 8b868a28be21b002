"""Measure a large memory bank on disk: opening, fetching, memory, and whether prefetching hides behind a model.

    python scripts/benchmark_bank.py  # 4.6 billion parameters, some minutes; 1.7 GB of disk
    python scripts/benchmark_bank.py --model hier_memory_tiny --rows 8 4 2 --paths 4 --out small.json  # does it run?
    python scripts/benchmark_bank.py --render  # only print what is stored

The bank is that of the paper's 160M model, in bfloat16, with four levels, of which the last owns no blocks. Its files
are sparse: only the blocks on some paths are written, with random numbers, and only these are read. "Warm" is what
lies in the system's page cache, "cold" what the system was told to drop from it before every round. What a fetch is
compared with is one read of as many bytes from one file, in the same state, into memory that is there: both are taken
in turn, and the medians compared.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memzoo.arch import HierarchicalMemoryLM, create_model
from memzoo.layers import BankLayout, ClusterTree, MemoryBank
from memzoo.layers.banks.layout import Node

STORED = Path(__file__).resolve().parents[1] / "docs" / "results" / "memory_bank.json"
Row = dict[str, Any]


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident() -> int:
    """Count the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drop(*files: Path) -> None:
    """Have the system drop files from its page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disjoint_paths(layout: BankLayout, count: int) -> Tensor:
    """Return paths, neighbours among which share no node; as many as there are children share none at all."""
    k = layout.branching
    first = torch.arange(count) % k
    rounds = torch.arange(count) // k
    nodes, path = first, [first]
    for level in range(2, layout.depth + 1):
        nodes = nodes * k + (rounds * 7 + level) % k
        path.append(nodes)
    return torch.stack(path, -1)


def build(path: Path, layout: BankLayout, paths: Tensor) -> Row:
    """Make a bank and write the blocks on some paths."""
    generator = torch.Generator().manual_seed(0)
    centroids = [torch.randn(layout.branching**level, 384, generator=generator) for level in range(1, layout.depth + 1)]
    tree = ClusterTree(centroids)
    banks: list[MemoryBank] = []
    created = timed(lambda: banks.append(MemoryBank.create(tree, layout, path=path)))
    nodes = sorted({Node(level, int(row[level - 1])) for row in paths for level in layout.levels})
    seconds, written = 0.0, 0
    with banks[0] as bank:
        for start in range(0, len(nodes), 16):
            some = nodes[start : start + 16]
            blocks = {node: 0.02 * torch.randn(layout.block_shape(node.level), generator=generator) for node in some}
            bank.put(blocks)
            seconds += timed(bank.commit)
            written += sum(layout.block_bytes(node.level) for node in some)
    held = sum(file.stat().st_size for file in path.iterdir())
    taken = sum(file.stat().st_blocks * 512 for file in path.iterdir())
    return {
        "create_s": created,
        "bytes": held,
        "bytes_on_disk": taken,
        "written": written,
        "mb_per_second": written / seconds / 1e6,
    }


def fetching(path: Path, paths: Tensor, rounds: int, *, cold: bool) -> Row:
    """Compare a fetch of a path, none of whose blocks is cached, with one read of as many bytes."""
    with MemoryBank.open(path, read_only=True) as probe:
        layout = probe.layout
    size = sum(layout.block_bytes(level) for level in layout.levels)
    one_go = [path.parent / f"one_go_{number}" for number in range(2)]  # as many bytes in all as the two paths
    for file in one_go:
        file.write_bytes(os.urandom(size))
    memory = bytearray(size)
    budget = {level: layout.block_bytes(level) for level in layout.levels}
    fetches, reads = [], []
    with ExitStack() as opened:
        bank = opened.enter_context(MemoryBank.open(path, read_only=True, cache_bytes=budget))
        files = [opened.enter_context(open(file, "rb", buffering=0)) for file in one_go]
        for number in range(4 + rounds):
            if cold or not number:  # what is warm came into the page cache by reading, not by writing
                drop(*one_go, *path.glob("*.blocks"))
            asked = paths[number % 2][None]  # neighbours share no node, and the cache has room for one path
            fetch = timed(lambda asked=asked: bank.fetch(asked))
            files[number % 2].seek(0)
            read = timed(lambda file=files[number % 2]: file.readinto(memory))
            if number >= 4:
                fetches.append(fetch)
                reads.append(read)
        assert bank.statistics is not None
        assert not any(bank.statistics.hits.values())
    for file in one_go:
        file.unlink()
    return {
        "bytes": size,
        "fetch_ms": 1e3 * median(fetches),
        "read_ms": 1e3 * median(reads),
        "ratio": median(fetches) / median(reads),
    }


def memory(path: Path, paths: Tensor, budget: int) -> Row:
    """Read all paths, twice, and see by how much the process grows."""
    with MemoryBank.open(path, read_only=True, cache_bytes=budget) as bank:
        before, peak = resident(), 0
        for _ in range(2):
            for row in paths:
                bank.fetch(row[None])
                peak = max(peak, resident())
        assert bank.cache is not None
        return {
            "budget": budget,
            "grown": peak - before,
            "buffers": bank.cache.nbytes,
            "read": bank.cache.statistics.bytes_read,
        }


@torch.no_grad()
def prefetching(path: Path, paths: Tensor, name: str, tokens: int, rounds: int) -> Row:
    """Read contexts with a model, each with a path of its own that is cold, with and without prefetching the next."""
    model: HierarchicalMemoryLM = create_model(name).eval().bfloat16()
    text = torch.randint(model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    contexts = paths[torch.arange(rounds) % len(paths)]

    def run(*, ahead: bool) -> tuple[float, float, float]:
        with MemoryBank.open(path, read_only=True, cache_bytes=2**28) as bank:
            drop(*path.glob("*.blocks"))
            waited, computed, began = 0.0, 0.0, time.perf_counter()
            for number, row in enumerate(contexts):
                start = time.perf_counter()
                memories = bank.fetch(row[None])
                if ahead and number + 1 < len(contexts):
                    bank.prefetch(contexts[number + 1][None])
                waited += time.perf_counter() - start if number else 0.0  # nothing is ahead of the first
                computed += timed(lambda memories=memories: model(text, memories=memories))
            return time.perf_counter() - began, waited, computed

    run(ahead=True)
    without, ahead = run(ahead=False), run(ahead=True)
    return {
        "contexts": len(contexts),
        "tokens": tokens,
        "without": dict(zip(("total_s", "waited_s", "computed_s"), without, strict=True)),
        "ahead": dict(zip(("total_s", "waited_s", "computed_s"), ahead, strict=True)),
    }


def measure(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Measure everything."""
    with torch.device("meta"):
        layout = create_model(options.model).layout(options.rows)
    paths = disjoint_paths(layout, options.paths)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "bank"
        yield "parameters", layout.bank_parameters
        yield "build", build(path, layout, paths)
        opens = [timed(lambda: MemoryBank.open(path, read_only=True).close()) for _ in range(5)]
        yield "open_s", {"first": opens[0], "median": median(opens)}
        yield "warm", fetching(path, paths, options.rounds, cold=False)
        yield "cold", fetching(path, paths, options.rounds, cold=True)
        yield "memory", memory(path, paths, options.budget)
        yield "prefetch", prefetching(path, paths, options.model, options.tokens, options.contexts)


def facts(options: argparse.Namespace) -> Row:
    """Say what was measured, and with what."""
    return {
        "command": "python scripts/benchmark_bank.py",
        "settings": {name: getattr(options, name) for name in (*SETTINGS, "model", "rows")},
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def cells(found: Row) -> list[tuple[str, str]]:
    """Lay out results."""
    build, grown, hidden = found["build"], found["memory"], found["prefetch"]
    waits = [hidden[name]["waited_s"] / (hidden["contexts"] - 1) * 1e3 for name in ("without", "ahead")]
    totals = [hidden[name]["total_s"] for name in ("without", "ahead")]
    computed = [hidden[name]["computed_s"] / hidden["contexts"] * 1e3 for name in ("without", "ahead")]
    return [
        ("parameters", f"{found['parameters']:,}"),
        ("size of its files / taken on disk, GB", f"{build['bytes'] / 1e9:.2f} / {build['bytes_on_disk'] / 1e9:.2f}"),
        ("create, s", f"{build['create_s']:.3f}"),
        ("write blocks, commits of 16, MB/s", f"{build['mb_per_second']:.0f}"),
        ("open, s: first / median", f"{found['open_s']['first']:.3f} / {found['open_s']['median']:.3f}"),
        *(
            (
                f"fetch {found[state]['bytes'] / 1e6:.1f} MB, {state}, ms / one read of as many bytes / ratio",
                f"{found[state]['fetch_ms']:.1f} / {found[state]['read_ms']:.1f} / {found[state]['ratio']:.2f}",
            )
            for state in ("warm", "cold")
        ),
        (
            "cache budget / growth of resident memory / read meanwhile, MB",
            f"{grown['budget'] / 1e6:.0f} / {grown['grown'] / 1e6:.0f} / {grown['read'] / 1e6:,.0f}",
        ),
        (
            f"wait for a cold path before {hidden['tokens']} tokens, ms: fetched then / prefetched",
            f"{waits[0]:.1f} / {waits[1]:.1f}",
        ),
        ("reading these tokens, ms: fetched then / prefetched", f"{computed[0]:.0f} / {computed[1]:.0f}"),
        (f"{hidden['contexts']} contexts, s: fetched then / prefetched", f"{totals[0]:.2f} / {totals[1]:.2f}"),
    ]


def table(found: Row) -> list[str]:
    """Write results as Markdown."""
    settings, machine = found["settings"], found["machine"]
    return [
        f"Blocks for `{settings['model']}`, rows {tuple(settings['rows'])}, bfloat16; {settings['paths']} paths "
        f"written, {settings['rounds']} rounds; {machine['processor']}, {machine['cpus']} cores, torch "
        f"{machine['torch']} with {machine['threads']} thread(s), Python {machine['python']}.",
        "",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what} | {value} |" for what, value in cells(found)),
    ]


SETTINGS = {"paths": 48, "rounds": 31, "budget": 2**28, "tokens": 256, "contexts": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 64, 16, 0], help="of every level")
    parser.add_argument("--model", default="hier_memory_160m", help="that reads the bank")
    parser.add_argument("--threads", type=int, default=1, help="of torch; prefetching needs a core of its own")
    parser.add_argument("--folder", help="where to make the bank for a while; else the system's temporary one")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--render", action="store_true", help="print what is stored, measure nothing")
    options = parser.parse_args()
    if min(options.paths, options.contexts) < 2:
        parser.error(f"paths={options.paths}, contexts={options.contexts} must be at least 2, to change between")
    torch.set_num_threads(options.threads)
    if options.render:
        results = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        results = facts(options) | dict(measure(options))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shown = Table("what", "measured")
    for what, value in cells(results):
        shown.add_row(what, value)
    Console().print(shown)


if __name__ == "__main__":
    main()
