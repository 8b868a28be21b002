"""Callbacks: speed, samples, figures, and the line that says how good a run was."""

import csv
import json
import math
import platform
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.figures import Curve, loss_figure
from memzoo.lit_modules.metrics import UnigramEntropy
from memzoo.lit_modules.objective import NextTokens
from memzoo.recipes import read_reference


class Throughput(Callback):
    """Log tokens seen and tokens per second, over all devices.

    ``train/tokens``: seen since the first step of the first run (kept in checkpoints).
    ``train/tokens_per_second``: over the last steps, training alone.
    ``train/tokens_per_second_overall``: over the time since this run began, with validation and checkpoints.

    Args:
        window: Number of last steps.
    """

    def __init__(self, window: int = 20) -> None:
        check_positive("window", window)
        self.tokens = 0
        self._tokens_before = 0
        self._began = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=window + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of tokens seen."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens = state_dict["tokens"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._tokens_before = time.monotonic(), self.tokens
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep validation out of the last steps' speed."""
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count the batch and log."""
        rows, columns = batch["tokens"].shape
        self.tokens += rows * (columns - 1) * trainer.world_size
        now = time.monotonic()
        self._recent.append((now, self.tokens))
        since, seen = self._recent[0]
        pl_module.log("train/tokens", float(self.tokens), batch_size=rows)
        pl_module.log(
            "train/tokens_per_second", (self.tokens - seen) / max(now - since, 1e-9), prog_bar=True, batch_size=rows
        )
        overall = (self.tokens - self._tokens_before) / max(now - self._began, 1e-9)
        pl_module.log("train/tokens_per_second_overall", overall, batch_size=rows)

    def _restart(self) -> None:
        self._recent.clear()
        self._recent.append((time.monotonic(), self.tokens))


class SampleText(Callback):
    """Continue a prompt at the end of a fit, and after each validation if asked: print it and log it to TensorBoard.

    The sample has its own source of randomness, so training is the same with and without it.

    Args:
        prompt: Text to continue.
        max_new_tokens: Length of the continuation; less where the model has a ``context`` and the prompt leaves less.
        temperature: Of sampling.
        top_p: Nucleus of sampling; None for all tokens.
        seed: Of the sample.
        every_validation: Sample after each validation too.
    """

    def __init__(
        self,
        prompt: str = "def ",
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_p: float | None = 0.95,
        seed: int = 0,
        every_validation: bool = False,
    ) -> None:
        if not prompt:
            raise ValueError("prompt='' gives a model nothing to continue; pass at least one character")
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.options = {"temperature": temperature, "top_p": top_p}
        self.seed = seed
        self.every_validation = every_validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the data module can turn text into tokens and back, and that the prompt fits the model.

        Raises:
            ValueError: It cannot, or the prompt fills the model's context.
        """
        if not hasattr(data_module(trainer), "encode") or not hasattr(data_module(trainer), "decode"):
            raise ValueError(
                f"SampleText needs encode(text) and decode(tokens) of the data module, which "
                f"{type(data_module(trainer)).__name__} lacks; use TextData, or leave SampleText out"
            )
        length, context = len(data_module(trainer).encode(self.prompt)), _context(pl_module)
        if stage == "fit" and length > context:
            raise ValueError(
                f"prompt={self.prompt!r} has {length} tokens, the model has context={context}, which leaves no room "
                f"for a new one; use a shorter prompt, or a model with a larger context"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, if asked to."""
        if self.every_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, unless the last validation has just done so."""
        if not self.every_validation:
            self._show(trainer, pl_module)

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the prompt and its continuation: ``max_new_tokens``, or as many as the context has room for."""
        prompt = torch.tensor([data_module(trainer).encode(self.prompt)], device=pl_module.device)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        training = pl_module.training
        pl_module.eval()
        model: Any = pl_module.model
        room = _context(pl_module) - prompt.shape[1] + 1  # the last new token is not read
        count = int(min(self.max_new_tokens, room))
        tokens = list(model.generate(prompt, count, generator=generator, **self.options))
        pl_module.train(training)
        return f"{self.prompt}{data_module(trainer).decode(torch.cat(tokens).tolist())}"

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every rank samples, since a sharded model needs them all; one prints.
        text = self.sample(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        say(trainer, f"--- sample after {trainer.global_step} steps ---\n{text}\n---")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", trainer.global_step)


class Summary(Callback):
    """Say at the end of a fit, in one line, how good the model is: beside a recorded baseline and beside unigrams.

    Logs ``val/unigram_bits_per_byte``, the entropy of the validation text's token frequencies. Writes everything
    measured to ``summary.json`` in the run's folder; ``scripts/record_reference.py`` makes a recipe's reference of it.

    Args:
        reference: Recipe whose recorded outcome to compare with, such as ``transformer/tiny``.

    Raises:
        ValueError: There is no such recipe, or it was never recorded.
    """

    def __init__(self, reference: str | None = None) -> None:
        self.reference = None if reference is None else read_reference(reference)
        self._began = 0.0
        self._measured_at: tuple[int, int | None] = (0, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        model: Any = pl_module.model
        self._unigrams = UnigramEntropy(model.vocab_size).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the targets."""
        pieces = NextTokens.of(batch)
        self._unigrams.update(pieces.targets, pieces.counted)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log their entropy."""
        bytes_per_token = getattr(data_module(trainer), "bytes_per_token", None)
        if bytes_per_token is not None:
            entropy = self._unigrams.compute() / bytes_per_token
            pl_module.log("val/unigram_bits_per_byte", entropy, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember when it was measured: a run may go on after its last validation."""
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        counters = [callback.tokens for callback in callbacks if isinstance(callback, Throughput)]
        self._measured_at = (trainer.global_step, counters[0] if counters else None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line and write the file, if a validation has measured anything."""
        folder = trainer.log_dir  # which rank 0 tells all others
        if not trainer.is_global_zero:
            return
        if "val/bits_per_byte" not in trainer.callback_metrics:
            say(trainer, f"{_name(pl_module.model)}: no validation was run, so there is nothing to compare")
            return
        outcome = self.measured(trainer, pl_module)
        if folder is not None and not _is_trial(trainer):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "summary.json").write_text(json.dumps(outcome, indent=2) + "\n")
        say(trainer, summary_line(outcome, self.reference))

    def measured(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the run measured."""
        metrics = trainer.callback_metrics
        model: Any = pl_module.model
        steps, tokens = self._measured_at
        return {
            "model": _name(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": steps,
            "tokens": tokens,
            "val_bits_per_byte": float(metrics["val/bits_per_byte"]),
            "unigram_bits_per_byte": float(metrics["val/unigram_bits_per_byte"]),
            "seconds": round(time.monotonic() - self._began, 1),
            "device": str(pl_module.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        }


def summary_line(outcome: Mapping[str, Any], reference: Mapping[str, Any] | None = None) -> str:
    """Return one line: bits per byte of a run, of unigrams, and of a recorded baseline."""
    own, unigram = outcome["val_bits_per_byte"], outcome["unigram_bits_per_byte"]
    line = (
        f"{outcome['model']}: {own:.3f} bits/byte on validation after {_tokens(outcome)}; unigrams need {unigram:.3f}"
    )
    if reference is None:
        return line
    other = reference["val_bits_per_byte"]
    change = f"{abs(own / other - 1):.1%} {'below' if own < other else 'above'}"
    same = reference["tokens"] == outcome["tokens"]
    after = "the same tokens" if same else _tokens(reference)
    # The validation text is another one where the corpus is, such as another Python version's sources.
    elsewhere = "" if abs(reference["unigram_bits_per_byte"] - unigram) < 1e-4 else ", recorded on another text"
    return f"{line}; {change} {reference['model']}'s {other:.3f} after {after}{elsewhere}"


class LossFigure(Callback):
    """Draw bits per byte against tokens at the end of a fit: ``loss.png`` in the run's folder, and to TensorBoard.

    Drawn from the run's CSV log: training, validation, the entropy of unigrams if ``Summary`` logged it.

    Args:
        reference: Recipe whose recorded outcome to draw as a line, such as ``transformer/tiny``.

    Raises:
        ValueError: There is no such recipe, or it was never recorded.
    """

    def __init__(self, reference: str | None = None) -> None:
        self.reference = None if reference is None else read_reference(reference)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a log to draw from.

        Raises:
            ValueError: The trainer has no ``CSVLogger``.
        """
        if stage == "fit" and not _is_trial(trainer) and self._csv(trainer) is None:
            raise ValueError("LossFigure draws from the CSV log; add lightning.pytorch.loggers.CSVLogger to logger")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        logger = self._csv(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        logger.save()
        path = Path(logger.log_dir) / logger.experiment.NAME_METRICS_FILE
        if not path.exists():
            return
        train, validation, unigrams = (
            Curve.read(path, name) for name in ("train/bits_per_byte", "val/bits_per_byte", "val/unigram_bits_per_byte")
        )
        levels = {"unigrams": unigrams.values[-1]} if unigrams.values else {}
        if self.reference is not None:
            levels[f"{self.reference['model']}, recorded"] = self.reference["val_bits_per_byte"]
        figure, _ = loss_figure(train, validation, levels=levels, title=_name(pl_module.model))
        figure.savefig(path.with_name("loss.png"), dpi=150)
        for other in trainer.loggers:
            if isinstance(other, TensorBoardLogger):
                other.experiment.add_figure("bits_per_byte", figure, trainer.global_step)

    def _csv(self, trainer: Trainer) -> CSVLogger | None:
        return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)


def say(trainer: Trainer, text: str) -> None:
    """Print without breaking the progress bar."""
    bar = trainer.progress_bar_callback
    (print if bar is None else bar.print)(text)


def run_folders(trainer: Trainer) -> list[Path]:
    """Return the folders of a run, one for every ``CSVLogger``; they are there then."""
    folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def check_shows(callback: Callback, what: str, pl_module: LightningModule, kind: type[LightningModule]) -> None:
    """Require the module whose results a callback shows.

    Raises:
        ValueError: It is another.
    """
    if not isinstance(pl_module, kind):
        raise ValueError(
            f"{type(callback).__name__} shows the {what} of a {kind.__name__}, which {type(pl_module).__name__} is "
            f"not; use that module, or leave the callback out"
        )


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Write a figure to ``<name>.png`` in the folders of a run, and to TensorBoard."""
    for folder in run_folders(trainer):
        figure.savefig(folder / f"{name}.png", dpi=150)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)


def _context(pl_module: LightningModule) -> float:
    """Return how many tokens a model can read."""
    return getattr(pl_module.model, "context", math.inf)


def _name(model: Any) -> str:
    return getattr(model, "name", None) or type(model).__name__


def _is_trial(trainer: Trainer) -> bool:
    """Whether it is a ``fast_dev_run``, which writes nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _tokens(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['tokens']:,} tokens" if outcome["tokens"] else f"{outcome['steps']} steps"
