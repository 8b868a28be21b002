"""CausalLMModule: train any causal language model of the catalog by next-token prediction."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.state import State
from memzoo.layers.trace import Trace
from memzoo.lit_modules.carried import CarriedStates
from memzoo.lit_modules.metrics import ExactMatch, MeanTokenLoss, TokenAccuracy
from memzoo.lit_modules.mup import MuPlusPlus
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.optim import Decay, parameter_groups
from memzoo.lit_modules.schedule import ScheduleName, make_scheduler
from memzoo.lit_modules.sharding import shard

Stage = Literal["train", "val", "test", "predict"]


class CausalLMModule(LightningModule):
    """Next-token prediction with AdamW, a schedule, and memories that may be carried from batch to batch.

    Logs ``train/loss`` (nats per token), ``train/bits_per_byte``, and for validation and test, exact over all their
    tokens, ``val/loss``, ``val/accuracy``, ``val/bits_per_byte``, ``val/perplexity``. Where the data module returns a
    dict of loaders, the same for each of them, ``val/NAME/loss`` and so on; the plain names are then of all of them, or
    of the one that the data module calls its ``main_loader``, if it is there. Bits per byte need to know the bytes of a
    token: the data module's ``bytes_per_token``; without one they are not logged. Where the data module says that it
    has ``long_answers``, ``val/exact_match`` is the share of answers that are right in all tokens. Auxiliary losses
    that layers report through ``Trace`` are added to the objective and logged under ``train/``.

    Args:
        model: Name of a registered model, or a module with the interface of ``memzoo.arch.CausalLM``.
        overrides: Arguments in place of the named model's own.
        learning_rate: At the peak of the schedule.
        weight_decay: Of matrices; vectors, norms, embeddings and initial memory weights have none.
        decay: "all" decays every parameter, vectors, norms, embeddings and initial memory weights too.
        betas: Of AdamW.
        schedule: "cosine", "wsd" (warm-up, stable, decay) or "constant", each after a linear warm-up.
        warmup_steps: Optimiser steps of the warm-up.
        decay_steps: Optimiser steps of the decay of "wsd"; a fifth of all by default.
        schedule_steps: Optimiser steps of the whole schedule; the trainer's number by default.
        final_fraction: Last learning rate, as a fraction of the peak.
        truncated_backpropagation: Start each batch from the state in which the previous one ended, without its graph:
            the model learns to use a past longer than a batch. The data module must be ``contiguous``: row ``i`` of
            a batch continues row ``i`` of the one before. States start afresh with every epoch and every validation.
        mup: Sizes of the base that ``learning_rate`` was tuned on: train with the groups of muP++, from its draw of the
            weights if the model is given by name. A module is taken as it is: call ``mup.initialise(module)`` first; a
            warning says so where the weights show that it was forgotten.

    Raises:
        ValueError: Unknown model or override, ``overrides`` beside a module, a model that ``mup`` does not fit, or
            ``mup`` with ``decay="all"``.
    """

    _not_saved: tuple[str, ...] = ()  # arguments that are no hyper-parameters
    _readings: tuple[str, ...] = ("",)  # what a batch is measured with, by the end of the name it is logged under

    def __init__(
        self,
        model: str | nn.Module,
        overrides: dict[str, Any] | None = None,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        decay: Decay = "matrices",
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: ScheduleName = "cosine",
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        schedule_steps: int | None = None,
        final_fraction: float = 0.1,
        truncated_backpropagation: bool = False,
        mup: MuPlusPlus | None = None,
    ) -> None:
        super().__init__()
        by_name = isinstance(model, str)
        if not by_name and overrides:
            raise ValueError(f"overrides={overrides!r} only apply to a model given by name; build the module with them")
        if mup is not None and decay != "matrices":
            raise ValueError(f"decay={decay!r} is not muP++'s, which decays matrices alone; leave decay or mup out")
        if isinstance(mup, dict):  # as a checkpoint holds it
            mup = MuPlusPlus(**mup)
        # A module is not a hyper-parameter: load_from_checkpoint(path, model=module) takes it anew.
        self.save_hyperparameters(ignore=["mup", *self._not_saved, *([] if by_name else ["model"])])
        self.save_hyperparameters({"mup": None if mup is None else asdict(mup)})  # plain: readable with weights_only
        self.model: Any = create_model(model, **(overrides or {})) if isinstance(model, str) else model
        self._mup: MuPlusPlus | None = mup
        if self._mup is not None and by_name:
            self._mup.initialise(cast(Any, self.model))
        elif self._mup is not None and self._mup.undrawn(cast(Any, self.model)):
            warnings.warn(
                "model's weights are not those of mup, for the gain of its last norm is 1; call mup.initialise(model) "
                "first, unless weights are loaded into it next",
                stacklevel=2,
            )
        self._totals: dict[Stage, dict[str, _Totals]] = {}  # by the beginning of the names they are logged under
        self._names: dict[Stage, list[str]] = {}  # of these, without readings: the plain one, then that of each loader
        self._main: dict[Stage, str | None] = {}  # of these names, that of the one loader which the plain names are of
        self._carried = CarriedStates()

    def forward(self, tokens: Tensor, state: State | None = None, **options: Any) -> tuple[Tensor, State]:
        """Return the model's logits and state; see ``CausalLM.forward``."""
        logits, state = self.model(tokens, state, **options)
        return logits, state

    # Steps

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``loss``, the mean of the counted targets plus the layers' own, and the layers' ``statistics``.

        Callbacks find both in the ``outputs`` of ``on_train_batch_end``: what a layer wants back after the optimiser's
        step is for one of them to hand on, such as ``GraphMemoryUpkeep``.
        """
        trace = Trace(signals=False)
        pieces, logits = self._predict(batch, batch_idx, "train", trace)
        loss = pieces.mean(pieces.losses(logits))
        rows = len(pieces.inputs)
        self.log("train/loss", loss, prog_bar=True, batch_size=rows)
        if (bits := self._bits_per_byte(loss)) is not None:
            self.log("train/bits_per_byte", bits, prog_bar=True, batch_size=rows)
        for name, value in trace.losses.items():
            self.log(f"train/{name}", value, batch_size=rows)
        return {"loss": loss + sum(trace.losses.values()), "statistics": trace.statistics}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the validation's sums."""
        self._measure(batch, batch_idx, dataloader_idx, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the test's sums."""
        self._measure(batch, batch_idx, dataloader_idx, "test")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``losses`` (batch, time), nats per target, and ``counted``, which targets are real."""
        pieces = NextTokens.of(batch)
        given = self._given(batch, batch_idx, "predict", "")
        logits, _ = self.model(pieces.inputs, mask=pieces.mask, doc_ids=pieces.doc_ids, **given)
        return {"losses": pieces.losses(logits), "counted": pieces.counted}

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the validation."""
        self._start_totals("val", self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log the exact means of the validation."""
        self._log_totals("val")

    def on_test_epoch_start(self) -> None:
        """Start the sums of the test."""
        self._start_totals("test", self.trainer.test_dataloaders)

    def on_test_epoch_end(self) -> None:
        """Log the exact means of the test."""
        self._log_totals("test")

    def _given(self, batch: Mapping[str, Tensor], batch_idx: int, stage: Stage, reading: str) -> dict[str, Any]:
        """Return what the model is given besides the tokens of a batch; a subclass may have something."""
        return {}

    def _predict(
        self,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        stage: Stage,
        trace: Trace | None = None,
        reading: str = "",
    ) -> tuple[NextTokens, Tensor]:
        pieces = NextTokens.of(batch)
        state = self._carried.get(stage, batch_idx, pieces.inputs)
        given = self._given(batch, batch_idx, stage, reading)
        logits, state = self.model(pieces.inputs, state, mask=pieces.mask, doc_ids=pieces.doc_ids, trace=trace, **given)
        if self.hparams["truncated_backpropagation"]:
            self._carried.put(stage, state)
        return pieces, logits

    def _measure(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int, stage: Stage) -> None:
        for reading in self._readings:
            pieces, logits = self._predict(batch, batch_idx, stage, reading=reading)
            losses, hits = pieces.losses(logits), pieces.hits(logits)
            for totals in self._totals_of(stage, dataloader_idx, reading):
                totals.loss.update(losses, pieces.counted)
                totals.accuracy.update(hits, pieces.counted)
                if totals.exact_match is not None:
                    exact = pieces.exact_matches(logits)
                    totals.exact_match.update(exact, torch.ones_like(exact))

    def _start_totals(self, stage: Stage, loaders: Any) -> None:
        data = data_module(self.trainer)
        own = [f"{stage}/{name}/" for name in loaders] if isinstance(loaders, dict) else []
        long_answers = getattr(data, "long_answers", False)
        self._names[stage] = [f"{stage}/", *own]
        self._totals[stage] = {
            name + reading: _Totals.on(self.device, long_answers=long_answers)
            for name in self._names[stage]
            for reading in self._readings
        }
        # The trainer keeps the data module of a fit, also where other loaders are passed by hand.
        main = f"{stage}/{getattr(data, 'main_loader', None)}/"
        self._main[stage] = main if main in own else None

    def _totals_of(self, stage: Stage, dataloader_idx: int, reading: str) -> "list[_Totals]":
        """Return the sums that a loader's batches count in: the plain ones, and its own if it has a name."""
        plain, *named = self._names[stage]
        own, main = named[dataloader_idx : dataloader_idx + 1], self._main[stage]
        counts_as_plain = main is None or own[0] == main
        return [self._totals[stage][name + reading] for name in ([plain] if counts_as_plain else []) + own]

    def _log_totals(self, stage: Stage) -> None:
        self._carried.drop(stage)
        for name, totals in self._totals.pop(stage).items():
            loss = totals.loss.compute()
            bits = self._bits_per_byte(loss)
            every = name == f"{stage}/"
            self.log(f"{name}loss", loss, sync_dist=True)
            self.log(f"{name}perplexity", loss.exp(), sync_dist=True)
            self.log(f"{name}accuracy", totals.accuracy.compute(), prog_bar=every and bits is None, sync_dist=True)
            if totals.exact_match is not None:
                self.log(f"{name}exact_match", totals.exact_match.compute(), prog_bar=every, sync_dist=True)
            if bits is not None:
                self.log(f"{name}bits_per_byte", bits, prog_bar=every, sync_dist=True)

    def _bits_per_byte(self, nats_per_token: Tensor) -> Tensor | None:
        bytes_per_token = getattr(data_module(self.trainer), "bytes_per_token", None)
        return None if bytes_per_token is None else nats_per_token / (math.log(2) * bytes_per_token)

    def setup(self, stage: str) -> None:
        """Check that the data fit the model.

        Raises:
            ValueError: More token ids than the model has, or ``truncated_backpropagation`` over unrelated batches.
        """
        data = data_module(self.trainer)
        needed, held = getattr(data, "vocab_size", None), getattr(self.model, "vocab_size", None)
        if needed is not None and held is not None and needed > held:
            raise ValueError(
                f"vocab_size={held} of the model is less than the data's {needed} token ids; "
                f"build the model with overrides={{'vocab_size': {needed}}}"
            )
        carries = self.hparams["truncated_backpropagation"] and stage != "predict"
        if carries and not getattr(data, "contiguous", False):
            raise ValueError(
                "truncated_backpropagation=True carries states from batch to batch, but the batches of "
                f"{type(data).__name__} do not continue one another; "
                "use TextData(contiguous=True), or truncated_backpropagation=False"
            )

    # Truncated backpropagation through time

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the carried state, so that a run stopped in mid-epoch goes on as if it had not been.

        Of several devices each carries its own, and a checkpoint holds one: there, states start afresh on resuming.
        """
        saved = self._carried.save("train")
        if saved is not None and self.trainer.world_size == 1:
            checkpoint["carried_state"] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the carried state."""
        if "carried_state" in checkpoint:
            self._carried.load("train", checkpoint["carried_state"], self.model)

    # Optimisation, sharding

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the groups of ``parameter_groups``, or of muP++, and the schedule, stepped every step.

        Raises:
            ValueError: A bad schedule, or one without an end.
        """
        chosen, optimizer = self.hparams, self._optimizer()
        schedule, steps = chosen["schedule"], chosen["schedule_steps"] or estimated_steps(self.trainer)
        if math.isinf(steps) and schedule != "constant":
            raise ValueError(
                f"schedule={schedule!r} needs an end; set max_steps or max_epochs of the trainer, or schedule_steps"
            )
        scheduler = make_scheduler(
            optimizer,
            schedule,
            warmup_steps=chosen["warmup_steps"],
            max_steps=1 if math.isinf(steps) else int(steps),
            decay_steps=chosen["decay_steps"],
            final_fraction=chosen["final_fraction"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        chosen = self.hparams
        if self._mup is None:
            return parameter_groups(self.model, chosen["weight_decay"], chosen["decay"])
        return self._mup.groups(self.model, chosen["learning_rate"], chosen["weight_decay"])

    def _optimizer(self) -> torch.optim.Optimizer:
        chosen = self.hparams
        return torch.optim.AdamW(self._groups(), lr=chosen["learning_rate"], betas=tuple(chosen["betas"]))

    def configure_model(self) -> None:
        """Shard the parameters block by block (FSDP2) where the strategy brings a device mesh.

        Raises:
            ValueError: The mesh asks for tensor parallelism.
        """
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)


@dataclass(frozen=True)
class _Totals:
    """Sums over a validation or test, or one loader of it."""

    loss: MeanTokenLoss
    accuracy: TokenAccuracy
    exact_match: ExactMatch | None

    @classmethod
    def on(cls, device: torch.device, *, long_answers: bool) -> "_Totals":
        """Start sums; those of whole answers if an answer has several tokens."""
        exact_match = ExactMatch().to(device) if long_answers else None
        return cls(MeanTokenLoss().to(device), TokenAccuracy().to(device), exact_match)


def estimated_steps(trainer: Trainer) -> int | float:
    """Return the optimiser steps of a fit.

    Where they are counted in epochs, Lightning makes the training loader for it, before a checkpoint says from where to
    go on, and then does not look: have it make another one.
    """
    steps = trainer.estimated_stepping_batches
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None
    return steps


def data_module(trainer: Trainer) -> Any:
    """Return the data module that a trainer runs on, or None."""
    return getattr(trainer, "datamodule", None)
