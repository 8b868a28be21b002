"""EditingFigures: what a stream of edits has come to, said, drawn and written, and functions that draw it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from memzoo.lit_modules.callbacks import check_shows, run_folders, say, write_figure, write_rows
from memzoo.lit_modules.editing_metrics import GENERATED, MEASURES, EditRecord, QuestionKind, questions_of, right_after
from memzoo.lit_modules.model_editing import ModelEditingModule

LABELS: dict[QuestionKind, str] = {"edit": "edits", "paraphrase": "paraphrases", "locality": "unrelated"}
BINS = 40


def routing_figure(ratios: Mapping[QuestionKind, Sequence[float]], *, title: str = "") -> tuple[Figure, Axes]:
    """Draw how strongly a router responds to questions of each kind, over its threshold: above 1 the edits are read.

    Args:
        ratios: Response over threshold of every question, by kind; what is 0 or infinite is drawn at the border.
        title: Above.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    found = {kind: np.asarray(values, dtype=float) for kind, values in ratios.items() if len(values)}
    finite = np.concatenate([[1.0], *found.values()])
    finite = finite[np.isfinite(finite) & (finite > 0)]
    low, high = min(finite.min(), 0.5), max(finite.max(), 2.0)
    edges = np.geomspace(low / 1.1, high * 1.1, BINS + 1)
    for index, (kind, values) in enumerate(found.items()):
        label = f"{LABELS[kind]}, {np.mean(values > 1):.0%} above"
        shares = np.full(len(values), 1 / len(values))
        inside = values.clip(edges[0], edges[-1])
        axes.hist(inside, edges.tolist(), weights=shares, color=f"C{index}", alpha=0.5, label=label)
    axes.axvline(1, color="0.2", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("activation / threshold")
    axes.set_ylabel("questions of a kind")
    axes.set_title(title)
    axes.legend(fontsize=8)
    return figure, axes


def editing_figure(
    evaluations: Sequence[Mapping[str, float]], records: Sequence[EditRecord], *, title: str = ""
) -> tuple[Figure, Axes]:
    """Draw what was measured of all edits so far against their number; thin, the mean of what each was right after it.

    Dotted is what was measured by generation.

    Args:
        evaluations: As ``ModelEditingModule`` has them.
        records: Its records.
        title: Above.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    counts = [measured["count"] for measured in evaluations]
    made = np.arange(1, len(records) + 1)
    for color, marker, name in zip(("C0", "C1", "C2"), "os^", MEASURES, strict=True):
        axes.plot(counts, [measured[name] for measured in evaluations], color=color, marker=marker, label=name)
        generated = [(m["count"], m[GENERATED + name]) for m in evaluations if GENERATED + name in m]
        if generated:
            axes.plot(*zip(*generated, strict=True), color=color, marker=".", linestyle=":")
        means = right_after(records, name)
        axes.plot(made[: len(means)], means.numpy(), color=color, linewidth=0.8, alpha=0.7)
    if any(GENERATED + name in measured for name in MEASURES for measured in evaluations):
        axes.plot([], [], color="0.4", marker=".", linestyle=":", label="by generation")
    axes.plot([], [], color="0.4", linewidth=0.8, label="right after each edit, mean")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("edits")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure, axes


class EditingFigures(Callback):
    """Say at the end of a fit how all edits are answered after the last one; draw it, and write what each took.

    A line for each measure. ``editing.png``, ``edits.csv`` with a row for every edit and, for an editor with a router,
    ``routing.png`` go to the run's folder, and the figures to TensorBoard. For a ``ModelEditingModule``.

    Raises:
        ValueError: The module is another.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be something to show."""
        check_shows(self, "edits", pl_module, ModelEditingModule)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, draw and write."""
        assert isinstance(pl_module, ModelEditingModule)
        measured, records, name = pl_module.evaluate(), pl_module.records, pl_module.hparams["editor"]
        for measure in MEASURES:
            say(trainer, measure_line(measure, measured, records))
        say(trainer, cost_line(name, measured, records))
        for folder in run_folders(trainer):
            write_records(folder / "edits.csv", records)
        write_figure(trainer, "editing", editing_figure(pl_module.evaluations, records, title=name)[0])
        if ratios := pl_module.routing():
            write_figure(trainer, "routing", routing_figure(ratios, title=name)[0])


def measure_line(measure: str, measured: Mapping[str, float], records: Sequence[EditRecord]) -> str:
    """Return what was measured after the last edit, and right after each; both are means over questions."""
    count, asked = len(records), int(questions_of(records, measure).sum())
    if not asked:
        return f"{measure}: no edit of {count} has such a question"
    after, each = measured[measure], float(right_after(records, measure)[-1])
    line = f"{measure}: {after:.1%} of {asked} questions after the last of {count} edits ({each:.1%} right after each)"
    generated = measured.get(GENERATED + measure)
    return line if generated is None else f"{line}; {generated:.1%} in full by generation"


def cost_line(name: str, measured: Mapping[str, float], records: Sequence[EditRecord]) -> str:
    """Return what an editor holds, and what an edit took."""
    steps, seconds = _mean([record.steps for record in records]), _mean([record.seconds for record in records])
    size = measured["memory_bytes"] / 2**20
    return f"{name}: {size:.2f} MiB; {steps:.1f} steps and {seconds:.2f} s an edit"


def write_records(path: Path, records: Sequence[EditRecord]) -> None:
    """Write a row for every edit."""
    write_rows(path, [field.name for field in fields(EditRecord)], map(asdict, records))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
