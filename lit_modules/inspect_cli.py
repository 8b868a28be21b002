"""``memzoo inspect``: let a checkpoint read a text, and show what its layers report on the way."""

import csv
import os
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.graph_figures import (
    MOST_PANELS,
    Entropies,
    Movement,
    SlotGraph,
    Usage,
    edge_figure,
    entropy_figure,
    evenly,
    movement_figure,
    transition_figure,
    usage_figure,
)
from memzoo.lit_modules.inspection import (
    GraphCell,
    Moments,
    Plane,
    Reading,
    Signal,
    context_of,
    read_text,
    slot_rows,
    spectral_order,
)
from memzoo.lit_modules.token_figures import TokenSignal, token_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memzoo.lit_modules.trained_run import TrainedRun

MOST_TOKENS = 1024  # where max_tokens is not given
MOST_TOKEN_PANELS = 8
FILES = (
    "signals.csv",
    "slots.csv",
    "tokens.png",
    "transitions.png",
    "edges.png",
    "movement.png",
    "usage.png",
    "entropy.png",
)
UNITS = {"source_entropy": "nats", "target_entropy": "nats", "mixer_update": "norm", "ffn_update": "norm"}


def run(command: str, options: list[str]) -> None:
    """Parse the options and inspect."""
    parser = ArgumentParser(prog=f"memzoo {command}", description=__doc__, exit_on_error=False)
    parser.add_function_arguments(inspect_checkpoint)
    inspect_checkpoint(**vars(parser.parse_args(options)))


def inspect_checkpoint(
    *,
    checkpoint: str,
    text: str | None = None,
    prompt: str | None = None,
    out: str = "inspection",
    max_tokens: int | None = None,
    routing_temperature: float | None = None,
    tokenizer: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Read a text once and write what the layers report as tables and figures.

    Of any model: ``signals.csv``, every signal in numbers, and ``tokens.png``, those of tokens along the text. Of graph
    memory cells also ``slots.csv``, ``transitions.png``, ``edges.png``, ``movement.png``, ``usage.png`` and
    ``entropy.png``.

    Args:
        checkpoint: A .ckpt file that a run has written.
        text: A file of UTF-8 to read.
        prompt: A text to read, in place of a file.
        out: Folder for the results; files of an earlier inspection are replaced or deleted.
        max_tokens: Read at most so many tokens, from the beginning; 1024 by default.
        routing_temperature: Of graph memory cells; that at which the run was evaluated by default.
        tokenizer: "bytes" or a tokenizer.json; the one the model was trained with by default.
        device: Where to run.

    Raises:
        ValueError: The checkpoint cannot be read, there is no text or the model's vocabulary does not hold it, the
            results cannot be written, or an option is out of range.
    """
    from memzoo.lit_modules.trained_run import TrainedRun

    if max_tokens is not None:
        check_positive("max_tokens", max_tokens)
    trained = TrainedRun.find(checkpoint, tokenizer=tokenizer, device=device, routing_temperature=routing_temperature)
    outline = trained.outline()
    tokens = _tokens(trained, _words(text, prompt), "prompt" if text is None else "text", outline.vocab_size)
    folder = _folder(out)
    most, reason = _limit(max_tokens, context_of(outline))
    reading = read_text(trained.load(), tokens[:most])
    shown = Console()
    shown = shown if shown.is_terminal else Console(width=160)
    _show(reading, shown)
    written = _write(reading, trained, folder)
    if len(tokens) > most:
        shown.print(f"read the first {most:,} of {len(tokens):,} tokens ({reason})", highlight=False)
    if (hidden := reading.along_text(MOST_TOKEN_PANELS)[1]) > 0:
        shown.print(f"tokens.png leaves out {hidden} kinds of signals; signals.csv has all", highlight=False)
    if len(reading.cells) > MOST_PANELS:
        shown.print(f"figures show {MOST_PANELS} of {len(reading.cells)} graph memory cells", highlight=False)
    shown.print(f"wrote {', '.join(written)} to {folder}", highlight=False)


# What is read and where to


def _words(text: str | None, prompt: str | None) -> str:
    if (text is None) == (prompt is None):
        raise ValueError(f"text={text!r} and prompt={prompt!r}; pass exactly one of --text FILE and --prompt WORDS")
    if text is None:
        return prompt or ""
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={text!r} is not UTF-8 ({error}); convert it first") from error
    except OSError as error:
        raise ValueError(f"text={text!r} cannot be read ({error.strerror}); pass a file of text") from error


def _tokens(trained: "TrainedRun", words: str, argument: str, vocab_size: int) -> Tensor:
    ids = trained.tokenizer.encode(words)
    if not ids:
        raise ValueError(f"{argument} holds no token; pass at least one that the tokenizer knows")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"{argument} holds token id {max(ids)}, the model's vocab_size is {vocab_size}; pass the --tokenizer that"
            " the model was trained with"
        )
    return torch.tensor(ids)


def _limit(max_tokens: int | None, context: int | None) -> tuple[int, str]:
    """Return how many tokens are read at most, and why."""
    if context is not None and context <= (MOST_TOKENS if max_tokens is None else max_tokens - 1):
        return context, "the model's context"
    return (MOST_TOKENS, f"max_tokens={MOST_TOKENS} by default") if max_tokens is None else (max_tokens, "max_tokens")


def _folder(out: str) -> Path:
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out!r} cannot be made a folder ({error.strerror}); choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out={out!r} cannot be written to; choose another folder")
    return folder


# Tables


def _show(reading: Reading, console: Console) -> None:
    table = _table("signal", "blocks", "shape", "mean", "sd", "min", "max")
    for kind, signals in reading.kinds().items():
        total = Moments.join([signal.moments for signal in signals])
        shapes = {_shape(signal) for signal in signals}
        shape = shapes.pop() if len(shapes) == 1 else "various"
        table.add_row(kind, str(len(signals)), shape, *_numbers(total.mean, total.sd, total.least, total.most))
    console.print(table)
    for cell_table in (_text_table, _cell_table) if reading.cells else ():
        console.print()
        console.print(cell_table(reading))


def _text_table(reading: Reading) -> Table:
    """Return a row a graph memory cell: how the text uses its slots, and how widely its tokens spread."""
    table = _table(
        "block",
        "slots used",
        "likeliest used",
        "Gini",
        "nats said",
        "H source",
        "H target",
        "peak source",
        "peak target",
        "stay",
    )
    for cell in reading.cells:
        numbers = [cell.effective, cell.likeliest_effective, cell.likeliest_gini, cell.information]
        for values in (cell.source_entropy, cell.target_entropy, cell.source.amax(-1), cell.target.amax(-1)):
            numbers.append(values.mean().item())
        table.add_row(cell.block, *_numbers(*numbers, cell.stays))
    return table


def _cell_table(reading: Reading) -> Table:
    """Return a row a graph memory cell: what training has made of it, and how loud it is."""
    of_training = {
        "in training": "usage_effective",
        "dead": "dead",
        "coverage": "coverage",
        "H edges": "edge_entropy",
        "peak edges": "edge_peak",
        "temperature": "temperature",
        "momentum": "momentum",
        "gate": "gate",
    }
    table = _table("block", *of_training, "|y|", "|y|/|mixer|")
    means = {signal.name: signal.moments.mean for signal in reading.signals}
    for cell in reading.cells:
        numbers = [means[f"{cell.path}.{name}"] for name in of_training.values()]
        added, mixed = (
            means.get(f"{path}_update", nan) for path in (cell.path, cell.path.removesuffix("ffn") + "mixer")
        )
        table.add_row(cell.block, *_numbers(*numbers, added, added / mixed))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, justify="right" if index else "left")
    return table


def _numbers(*values: float) -> list[str]:
    return [f"{value:.4g}" for value in values]


def _shape(signal: Signal) -> str:
    return "x".join(map(str, signal.shape)) or "scalar"


# Files


def _write(reading: Reading, trained: "TrainedRun", folder: Path) -> list[str]:
    """Write everything in place of what an earlier inspection has written, and return the names of the files."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    rows = [_signal_row(signal) for signal in reading.signals]
    _write_csv(folder / "signals.csv", ("name", "shape", "mean", "sd", "min", "max"), rows)
    written = ["signals.csv"]
    if reading.cells:
        rows = slot_rows(reading, trained.tokenizer.decode)
        _write_csv(folder / "slots.csv", tuple(rows[0]), rows)
        written.append("slots.csv")
    for name, figure in _figures(reading, trained).items():
        figure.savefig(folder / name, dpi=150)
        written.append(name)
    return written


def _signal_row(signal: Signal) -> dict[str, Any]:
    moments = signal.moments
    values = dict(mean=moments.mean, sd=moments.sd, min=moments.least, max=moments.most)
    return {"name": signal.name, "shape": _shape(signal)} | {name: f"{value:.9g}" for name, value in values.items()}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _figures(reading: Reading, trained: "TrainedRun") -> "dict[str, Figure]":
    figures = {}
    kinds, _ = reading.along_text(MOST_TOKEN_PANELS)
    if kinds:
        signals = [
            TokenSignal(
                _title(kind, of_kind[0]),
                [signal.block for signal in of_kind],
                torch.stack([signal.along for signal in of_kind if signal.along is not None]).numpy(),
                UNITS.get(kind.rpartition(".")[2], ""),
            )
            for kind, of_kind in kinds.items()
        ]
        tokens = [(trained.tokenizer.decode([token]), token) for token in reading.tokens.tolist()]
        figures["tokens.png"] = token_figure(signals, tokens)[0]
    if reading.cells:
        cells = [reading.cells[index] for index in evenly(len(reading.cells))]
        graphs = [_slot_graph(cell) for cell in cells]
        figures["transitions.png"] = transition_figure(graphs)[0]
        figures["edges.png"] = edge_figure(graphs)[0]
        figures["movement.png"] = movement_figure([_movement(cell) for cell in cells])[0]
        figures["usage.png"] = usage_figure([_usage(cell) for cell in cells])[0]
        entropies = [
            Entropies(
                cell.block,
                cell.source_entropy.numpy(),
                cell.target_entropy.numpy(),
                cell.scalars["edge_entropy"],
                cell.num_slots,
            )
            for cell in reading.cells
        ]
        figures["entropy.png"] = entropy_figure(entropies)[0]
    return figures


def _title(kind: str, signal: Signal) -> str:
    name = kind.removeprefix("blocks.*.")
    further = [size for size in signal.shape[2:] if size > 1]
    return f"{name}, mean of {'x'.join(map(str, further))}" if further else name


def _slot_graph(cell: GraphCell) -> SlotGraph:
    moves = cell.soft_moves
    return SlotGraph(
        f"block {cell.block}",
        spectral_order(moves).numpy(),
        cell.source.mean(0).numpy(),
        moves.numpy(),
        cell.moves.numpy(),
        cell.edges.numpy(),
    )


def _movement(cell: GraphCell) -> Movement:
    plane = Plane.of(torch.cat((cell.source_centre, cell.target_centre)))
    source, target = (plane.project(centre).numpy() for centre in (cell.source_centre, cell.target_centre))
    return Movement(f"block {cell.block}", source, target, cell.source.argmax(-1).numpy(), plane.shares)


def _usage(cell: GraphCell) -> Usage:
    soft, target = cell.source.mean(0).numpy(), cell.target.mean(0).numpy()
    return Usage(f"block {cell.block}", soft, cell.likeliest.numpy(), target, cell.usage.numpy())
