"""ProgressBar: one line that says how far a run is, how good, how fast, and when it ends."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar as LightningProgressBar
from tqdm import tqdm

from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.objective import NextTokens

# Logged name -> what the bar calls it, and how it is written.
_LABELS = {
    "train/loss": ("loss", "{:.2f}"),
    "train/bits_per_byte": ("bits/byte", "{:.2f}"),
    "train/tokens_per_second": ("tokens/s", "{:.0f}"),
    "val/bits_per_byte": ("val", "{:.3f}"),  # last: what a narrow terminal cuts off
    "test/bits_per_byte": ("bits/byte", "{:.3f}"),
    "test/plain/bits_per_byte": ("plain", "{:.3f}"),
}
_BAR = "{desc}|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_LINE = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_ENDLESS = "{desc} {n_fmt} [{elapsed}{postfix}]"


class ProgressBar(LightningProgressBar):
    """A bar over all optimiser steps of a fit, with everything logged as ``prog_bar=True`` behind it.

    Validation inside a fit shows in the same bar. Where the output is not a terminal (a file, a pipe, a job's log) a
    plain line is printed now and then instead. Metrics are read only when something is shown, so that a
    bar costs no synchronisation with the device per step.

    Args:
        bar_seconds: Time between two refreshes of the bar in a terminal.
        line_seconds: Time between two lines elsewhere.
    """

    def __init__(self, bar_seconds: float = 0.2, line_seconds: float = 10.0) -> None:
        super().__init__()
        self.bar_seconds = bar_seconds
        self.line_seconds = line_seconds
        self._enabled = True
        self._counts_tokens = False
        self._bar: tqdm | None = None
        self._close()

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print without breaking the bar."""
        if self._bar is not None:
            self._bar.write(sep.join(map(str, args)), file=sys.stdout)
        elif self._enabled:
            print(*args, sep=sep, **kwargs, flush=True)

    # What is shown

    def _open(self, description: str, total: float | None, done: int = 0) -> None:
        self._close()
        self._description = description
        self._total = None if total is None or math.isinf(total) else int(total)
        self._initial = self._done = done
        self._started = self._shown = time.monotonic()
        self._line = ""
        if self._enabled and sys.stdout.isatty():
            self._bar = tqdm(
                desc=description,
                total=self._total,
                initial=done,
                file=sys.stdout,
                dynamic_ncols=True,
                mininterval=0,
                miniters=0,
                smoothing=0,
                bar_format=_ENDLESS if self._total is None else _BAR,
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._description, self._total, self._initial, self._done = None, "", None, 0, 0

    def _advance(self, done: int, note: str = "", *, force: bool = False) -> None:
        self._done = done
        wait = self.line_seconds if self._bar is None else self.bar_seconds
        if not self._enabled or (time.monotonic() - self._shown < wait and not force):
            return
        self._shown = time.monotonic()
        text = ", ".join(filter(None, [note, self._metrics()]))
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        else:
            meter = tqdm.format_meter(
                done,
                self._total,
                self._shown - self._started,
                prefix=self._description,
                postfix=text,
                initial=self._initial,
                bar_format=_ENDLESS if self._total is None else _LINE,
            )
            if meter != self._line:
                print(meter, flush=True)
            self._line = meter

    def _metrics(self) -> str:
        values = self.trainer.progress_bar_metrics
        known = [(label, form.format(values[name])) for name, (label, form) in _LABELS.items() if name in values]
        others = [(name, f"{value:.4g}") for name, value in values.items() if name not in _LABELS]
        return ", ".join(f"{label} {value}" for label, value in known + others)

    # Fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar over all steps."""
        self._open("training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Advance."""
        self._advance(trainer.global_step)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Show the last values and leave the bar."""
        self._advance(trainer.global_step, force=True)
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Leave the bar."""
        self._close()

    # Validation, test, prediction

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless it is the validation of a fit."""
        if trainer.state.fn == "validate":
            self._open("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Advance, or note the validation in the bar of the fit."""
        if trainer.state.fn == "validate":
            self._advance(self._done + 1)
        elif not trainer.sanity_checking:
            self._advance(self._done, f"validating {batch_idx + 1}/{int(sum(trainer.num_val_batches))}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last values."""
        if not trainer.sanity_checking:
            self._advance(self._done, force=True)
        if trainer.state.fn == "validate":
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, over tokens where the data module has ``test_tokens`` and all of them are asked for."""
        tokens, limit = getattr(data_module(trainer), "test_tokens", None), trainer.limit_test_batches
        self._counts_tokens = tokens is not None and isinstance(limit, float) and limit == 1
        self._open("testing", tokens if self._counts_tokens else sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Advance, with the ``note`` that a step may return."""
        note = outputs.get("note", "") if isinstance(outputs, Mapping) else ""
        if self._counts_tokens:  # of other devices as many, or what is left
            done = self._done + int(NextTokens.of(batch).counted.sum()) * trainer.world_size
            self._advance(min(done, self._total or 0), note)
        else:
            self._advance(self._done + 1, note)

    def on_test_end(self, *_: Any) -> None:
        """Leave the bar."""
        self._advance(self._done, force=True)
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar."""
        self._open("predicting", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *_: Any) -> None:
        """Advance."""
        self._advance(self._done + 1)

    def on_predict_end(self, *_: Any) -> None:
        """Leave the bar."""
        self._advance(self._done, force=True)
        self._close()
