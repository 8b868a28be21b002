"""StreamFigure: what a memory gains along a document, and a function that draws it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from memzoo.lit_modules.callbacks import check_shows, run_folders, say, write_figure, write_rows
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.stream import ChunkScore
from memzoo.lit_modules.test_time_training import TestTimeTrainingModule

MOST_NAMES = 8  # in a legend


def perplexity_figure(
    scores: Sequence[ChunkScore], names: Sequence[str], *, bytes_per_token: float | None = None, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """Draw the perplexity of all that was read so far against the position in each document.

    Where the chunks were scored without memory too, that is drawn dashed, and a second panel has the gain of each
    chunk.

    Args:
        scores: Of one document after the other, as ``TestTimeTrainingModule.stream`` has them.
        names: Of the documents, by their number.
        bytes_per_token: Of the documents on average, for a gain in bits per byte; None for bits per token.
        title: Above the first panel.
    """
    documents = by_document(scores)
    compared = any(score.plain_loss_sum is not None for score in scores)
    figure = Figure(figsize=(7.6, 6.0 if compared else 4.0), layout="constrained")
    axes = list(figure.subplots(1 + compared, sharex=True, squeeze=False)[:, 0])
    for index, own in enumerate(documents.values()):
        ends = [score.position + score.tokens for score in own]
        axes[0].plot(ends, running_perplexity(own), color=f"C{index % 10}", label=f"{index}")
        if compared:
            plain = running_perplexity(own, plain=True)
            axes[0].plot(ends, plain, color=f"C{index % 10}", linestyle="--", linewidth=1)
            gains = [bits_gained(score) / (bytes_per_token or 1) for score in own]
            axes[1].plot(ends, gains, color=f"C{index % 10}", marker=".", linewidth=1)
    axes[0].set_ylabel("perplexity so far")
    axes[0].set_title(title)
    if compared:
        axes[1].axhline(0, color="0.4", linewidth=0.8)
        axes[1].set_ylabel(f"gain of a chunk, bits per {'token' if bytes_per_token is None else 'byte'}")
    if len(documents) <= MOST_NAMES:
        _legend(axes[0], [names[document] for document in documents], compared=compared)
    for panel in axes:
        panel.grid(alpha=0.25)
    axes[-1].set_xlabel("position in the document, tokens")
    axes[-1].set_xlim(left=0)
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def _legend(axes: Axes, names: Sequence[str], *, compared: bool) -> None:
    """Name the lines. Texts are set afterwards: matplotlib leaves out labels that begin as ``_pydecimal.py`` does."""
    handles = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    if compared:
        handles += [Line2D([], [], color="0.4"), Line2D([], [], color="0.4", linestyle="--", linewidth=1)]
        names = [*names, "with memory", "without memory"]
    numbers = [f"{number}" for number in range(len(handles))]
    legend = axes.legend(handles, numbers, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def by_document(scores: Sequence[ChunkScore]) -> dict[int, list[ChunkScore]]:
    """Return the scores of each document, in order."""
    return {
        document: [score for score in scores if score.document == document]
        for document in sorted({score.document for score in scores})
    }


def running_perplexity(scores: Sequence[ChunkScore], *, plain: bool = False) -> list[float]:
    """Return exp(nats / tokens) of all up to each chunk, of one document; without memory if ``plain``."""
    sums = np.cumsum([(score.plain_loss_sum or 0.0) if plain else score.loss_sum for score in scores])
    with np.errstate(over="ignore"):  # a memory that has diverged
        perplexities: list[float] = np.exp(sums / np.cumsum([score.tokens for score in scores])).tolist()
    return perplexities


def bits_gained(score: ChunkScore) -> float:
    """Return how many bits a token of a chunk costs less than without memory."""
    return ((score.plain_loss_sum or 0.0) - score.loss_sum) / (math.log(2) * score.tokens)


class StreamFigure(Callback):
    """Say at the end of a test what the memory was worth in each document; draw it along them.

    One line for every document, ``stream.csv`` with the scores of all chunks and ``stream.png`` in the run's folder,
    and the figure to TensorBoard. For a ``TestTimeTrainingModule``; of several devices it shows all documents.

    Raises:
        ValueError: The module is another.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be something to show."""
        check_shows(self, "stream", pl_module, TestTimeTrainingModule)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, write and draw."""
        assert isinstance(pl_module, TestTimeTrainingModule)
        # Of every device: each streams documents of its own.
        shared = [
            trainer.strategy.broadcast((pl_module.stream, pl_module.held_out_after), rank)
            for rank in range(trainer.world_size)
        ]
        scores = [score for stream, _ in shared for score in stream]
        self._show(trainer, pl_module, scores, {name: loss for _, losses in shared for name, loss in losses.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show what was read up to now, of this process."""
        if isinstance(pl_module, TestTimeTrainingModule) and trainer.state.fn == "test":
            self._show(trainer, pl_module, pl_module.stream, pl_module.held_out_after)

    def _show(
        self,
        trainer: Trainer,
        pl_module: TestTimeTrainingModule,
        scores: Sequence[ChunkScore],
        after: Mapping[int, float],
    ) -> None:
        if not trainer.is_global_zero or not scores:
            return
        data = data_module(trainer)
        last = max(score.document for score in scores)
        names = getattr(data, "book_names", None) or [f"document {number}" for number in range(last + 1)]
        size = getattr(data, "test_bytes_per_token", None)
        for document, own in by_document(scores).items():
            change = None if document not in after else after[document] - (pl_module.held_out_before or 0.0)
            line = document_line(names[document], own, bytes_per_token=size)
            say(trainer, line + held_out_note(change, getattr(data, "bytes_per_token", None)))
        figure, _ = perplexity_figure(scores, names, bytes_per_token=size, title=_title(pl_module.hparams))
        for folder in run_folders(trainer):
            write_scores(folder / "stream.csv", scores, names)
        write_figure(trainer, "stream", figure)


def document_line(name: str, scores: Sequence[ChunkScore], *, bytes_per_token: float | None = None) -> str:
    """Return how long a document is and what it has cost without memory and with it."""
    tokens = sum(score.tokens for score in scores)
    unit = "bits/token" if bytes_per_token is None else "bits/byte"
    per_nat = 1 / (math.log(2) * tokens * (bytes_per_token or 1))
    own = f"{sum(score.loss_sum for score in scores) * per_nat:.3f}"
    if scores[0].plain_loss_sum is not None:
        own = f"{sum(score.plain_loss_sum or 0.0 for score in scores) * per_nat:.3f} -> {own}"
    return f"{name}: {tokens:,} tokens, {own} {unit}"


def held_out_note(change: float | None, bytes_per_token: float | None) -> str:
    """Return what a document has added to the held-out loss, given in nats per token; nothing for None."""
    if change is None:
        return ""
    unit = "bits/token" if bytes_per_token is None else "bits/byte"
    return f"; held-out text {change / (math.log(2) * (bytes_per_token or 1)):+.4f} {unit}"


def write_scores(path: Path, scores: Sequence[ChunkScore], names: Sequence[str]) -> None:
    """Write a row for every chunk, with the name of its document."""
    columns = ["name", *(field.name for field in fields(ChunkScore))]
    write_rows(path, columns, ({"name": names[score.document], **asdict(score)} for score in scores))


def _title(chosen: Mapping[str, Any]) -> str:
    if chosen["memory"] is None:
        return "no memory"
    options = ", ".join(f"{name} {value}" for name, value in (chosen["memory_options"] or {}).items())
    return ", ".join(filter(None, [chosen["memory"], options, f"learning rate {chosen['memory_learning_rate']:g}"]))
