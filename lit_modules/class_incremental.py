"""ClassIncrementalModule: train a classifier on a stream of tasks, and ask it for all of them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.errors import check_choice, check_number
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.class_incremental_parts import (
    OPTIMIZERS,
    Answers,
    OnDevice,
    OptimizerName,
    best_class,
    check_gradients,
    check_stream,
    encode_all,
    find_learner,
    fraction_unused,
    go_past_epoch,
    make_ready,
    masked_cross_entropy,
    of_all_devices,
    silence,
)
from memzoo.lit_modules.continual_strategies import ContinualStrategy
from memzoo.lit_modules.model_editing import EditCounter

PART = "class_incremental"  # of a checkpoint

TrainLogits = Literal["all", "seen", "current"]
EvalLogits = Literal["all", "seen", "task"]


class ClassIncrementalModule(LightningModule):
    """Cross-entropy on the samples of a stream, task after task, with one head over all classes.

    The data module is ``ClassStreamData`` or alike. One fit runs through the stream:
    ``Trainer(max_epochs=num_tasks * epochs_per_task, reload_dataloaders_every_n_epochs=1)``. The model is not told of
    tasks, unless the logits are restricted to their classes; ``TaskBoundary`` tells what needs to know,
    ``ContinualEval`` measures all tasks after each. The module works without either.

    A model with ``encode`` and ``decode``, such as ``memzoo.arch.FrozenClassifier``, may have its codes computed once
    with ``precompute``. One that ``needs_keys`` gets them before the first step, from all training inputs without
    classes. One whose head has ``learn(codes, labels)``, such as ``AnalyticClassifier``, is taught by that, without
    gradients, and counts each batch as a step.

    Logs ``train/loss``, ``train/online_accuracy`` (the share of all samples so far that were right when they came,
    before they were trained on; later passes over them count too) and, with validation, ``val/accuracy`` (the mean over
    tasks), ``val/macro_accuracy`` (that over classes) and ``val/accuracy/task_0`` and so on; the same for a test. Of a
    model with a ``bottleneck``, ``train/fraction_unused`` at the end of each epoch. Dropout, if there is any, is on
    where the online accuracy is measured, which is in the training step. On several devices all of it, and ``seen``,
    is of the samples of all of them, each counted once in validation and test.

    A run that was killed goes on to the same weights, to the bit, on one device: a checkpoint holds the classes seen,
    the state of the strategy and that of the random numbers. A fit without ``ckpt_path`` starts with the model as it is
    and nothing seen.

    Args:
        model: Name of a registered model, or a module: inputs -> logits (batch, classes), or with ``encode`` and
            ``decode``.
        overrides: Arguments in place of the named model's own.
        learning_rate: Constant.
        optimizer: "sgd" without momentum or weight decay, which leaves weights without gradient as they are; "adam",
            which does not; "sparse_adam", which does, for a model with sparse gradients.
        label_smoothing: Of the cross-entropy, over the classes that are not left out.
        train_logits: Classes in the softmax of the loss: "all", those "seen" so far, or those of the "current" task;
            replayed samples then have all that were seen.
        eval_logits: Classes that can be answered: "all", those "seen" so far (all, before any), or those of the
            sample's own "task", which only scenario "task" allows.
        strategy: Against forgetting; none by default.
        precompute: Encode all samples once, before the first step.
        key_options: Of ``model.initialize_keys``.
        online_accuracy: Ask for each batch before it is trained on. False spares a head that learns without gradients
            the answer, which costs ``AnalyticClassifier(form="gram")`` a solution of its system at every step.

    Attributes:
        model: The model.
        seen: The classes seen in training, ascending.

    Raises:
        ValueError: There is no such model, or an argument is out of range or does not go with another.

    Example:
        >>> module = ClassIncrementalModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), learning_rate=0.1)
        >>> # data = ClassStreamData(num_tasks=5, epochs_per_task=2)
        >>> # Trainer(max_epochs=10, reload_dataloaders_every_n_epochs=1).fit(module, data)
    """

    def __init__(
        self,
        model: str | nn.Module,
        overrides: dict[str, Any] | None = None,
        *,
        learning_rate: float = 0.3,
        optimizer: OptimizerName = "sgd",
        label_smoothing: float = 0.1,
        train_logits: TrainLogits = "all",
        eval_logits: EvalLogits = "all",
        strategy: ContinualStrategy | None = None,
        precompute: bool = False,
        key_options: dict[str, Any] | None = None,
        online_accuracy: bool = True,
    ) -> None:
        super().__init__()
        check_number("learning_rate", learning_rate)
        check_choice("optimizer", optimizer, get_args(OptimizerName))
        check_choice("train_logits", train_logits, get_args(TrainLogits))
        check_choice("eval_logits", eval_logits, get_args(EvalLogits))
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} is no share; use a number in [0, 1)")
        by_name = isinstance(model, str)
        if not by_name and overrides:
            raise ValueError(f"overrides={overrides!r} only apply to a model given by name; build the module with them")
        self.save_hyperparameters(ignore=["strategy", *([] if by_name else ["model"])])
        self.model: Any = create_model(model, **(overrides or {})) if isinstance(model, str) else model
        self.strategy = strategy
        self.learner = find_learner(self.model)
        if precompute and not (hasattr(self.model, "encode") and hasattr(self.model, "decode")):
            raise ValueError(
                f"precompute=True needs encode() and decode() of the model, which {type(self.model).__name__} lacks; "
                f"use a FrozenClassifier, or precompute=False"
            )
        if self.learner is not None and strategy is not None:
            raise ValueError(
                f"strategy={type(strategy).__name__} acts on gradients, but {type(self.learner).__name__} learns "
                f"without; use strategy=None"
            )
        self.automatic_optimization = self.learner is None
        self.seen: list[int] = []
        self._online = [0, 0]  # right, asked
        self._taken_up: dict[str, Any] | None = None  # of a checkpoint, until the fit begins
        self._answers: Answers | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        return cast(Tensor, self.model(inputs))

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return ``model.trainable_parameters()`` where there is such a thing, else what requires a gradient."""
        if hasattr(self.model, "trainable_parameters"):
            return list(self.model.trainable_parameters())
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def online_accuracy(self) -> float:
        """Share of all samples so far that were right when they came; NaN before any, and where it is not asked for."""
        right, asked = self._online
        return right / asked if asked else math.nan

    # Answers

    def class_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch, of its ``codes`` where it has some."""
        return cast(Tensor, self.model.decode(batch["codes"]) if "codes" in batch else self.model(batch["inputs"]))

    def predict(self, batch: Mapping[str, Tensor], logits: EvalLogits | None = None) -> Tensor:
        """Return the class of each sample (batch,), -1 where the model has none to offer or a score is NaN.

        Args:
            batch: A batch of the data module.
            logits: Which classes can be answered; ``eval_logits`` by default.
        """
        return self._choose(self.class_logits(batch), batch, logits or self.hparams["eval_logits"])

    def _choose(self, logits: Tensor, batch: Mapping[str, Tensor], policy: EvalLogits) -> Tensor:
        if policy == "task":
            return best_class(logits, self._task_table(logits)[batch["task"]])
        return best_class(logits, self._mask(self.seen, logits) if policy == "seen" and self.seen else None)

    def _mask(self, classes: Iterable[int], logits: Tensor) -> Tensor:
        mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        mask[[one for one in classes if one < logits.shape[1]]] = True
        return mask

    def _task_table(self, logits: Tensor) -> Tensor:
        return torch.stack([self._mask(classes, logits) for classes in data_module(self.trainer).task_classes])

    # Steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss; a model that learns without gradients learns here and has none."""
        rows, labels = len(batch["labels"]), batch["labels"]
        if self.learner is not None:
            self._note(self.class_logits(batch) if self.hparams["online_accuracy"] else None, batch)
            codes = batch["codes"] if "codes" in batch else self.model.encode(batch["inputs"])
            self.learner.learn(codes, labels)
            cast(Any, self.optimizers()).step()  # a batch is a step, for checkpoints and progress
            return None
        data = data_module(self.trainer)
        used = batch if self.strategy is None else self.strategy.extend(batch)
        logits = self.class_logits(used)
        if logits.shape[1] <= int(labels.max()):
            raise ValueError(
                f"the model has {logits.shape[1]} classes and the data a class {int(labels.max())}; build the model "
                f"for {data.num_classes} classes"
            )
        self._note(logits[:rows].detach() if self.hparams["online_accuracy"] else None, batch)
        smoothing, allowed = self.hparams["label_smoothing"], self.in_loss(logits, data.current_task, used)
        loss = masked_cross_entropy(logits, used["labels"], allowed, smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=rows)
        if self.strategy is not None:
            if (penalty := self.strategy.penalty(self)) is not None:
                self.log("train/penalty", penalty, batch_size=rows)
                loss = loss + penalty
            # Before the step: a checkpoint is written between the step and any later hook of a module.
            first = self.trainer.current_epoch % data.epochs_per_task == 0
            self.strategy.observe(batch, first_pass=first)
        return loss

    def in_loss(self, logits: Tensor, task: int, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return which classes are in the softmax of each row of a batch that is shown in a task; None for all.

        Args:
            logits: (batch, classes).
            task: From 0.
            batch: With ``replayed``, where some rows are.
        """
        policy: TrainLogits = self.hparams["train_logits"]
        if policy == "all":
            return None
        seen = self._mask(self.seen, logits)
        if policy == "seen":
            return seen.expand_as(logits)
        own = self._mask(data_module(self.trainer).task_classes[task], logits)
        replayed = batch.get("replayed")
        return own.expand_as(logits) if replayed is None else torch.where(replayed[:, None], seen, own)

    def _note(self, logits: Tensor | None, batch: Mapping[str, Tensor]) -> None:
        """Count what is right and take note of the classes, of all devices."""
        labels, right, asked = batch["labels"], 0, 0
        if logits is not None:
            right = int((self._choose(logits, batch, self.hparams["eval_logits"]) == labels).sum())
            asked = len(labels)
        right, asked, classes = of_all_devices(self.trainer, right, asked, labels)
        self.seen = sorted({*self.seen, *classes})
        if asked:
            self._online = [self._online[0] + right, self._online[1] + asked]
            self.log("train/online_accuracy", self.online_accuracy, prog_bar=True, batch_size=len(labels))

    def on_train_epoch_end(self) -> None:
        """Log the share of a bottleneck's pairs that training has not fetched yet."""
        if (unused := fraction_unused(self.model)) is not None:
            self.log("train/fraction_unused", unused, sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take note of what is said."""
        assert self._answers is not None
        self._answers.add(batch, self.predict(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take note of what is said."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._ask("val")

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._ask("test")

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_answers("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_answers("test")

    def _ask(self, split: str) -> None:
        data = data_module(self.trainer)
        self._answers = Answers(data.size(split), data.num_tasks, data.num_classes, self.device)

    def _log_answers(self, split: str) -> None:
        assert self._answers is not None
        self._answers.gather(self.trainer)
        for name, share in self._answers.accuracies().items():  # which all devices agree on
            self.log(f"{split}/{name}", share, prog_bar=name == "accuracy", sync_dist=True)

    # What is told by TaskBoundary

    def on_task_start(self, task: int) -> None:
        """Tell the model, if it has such a method."""
        self._tell("on_task_start", task)

    def on_task_end(self, task: int) -> None:
        """Tell the strategy, and the model if it has such a method."""
        if self.strategy is not None:
            self.strategy.on_task_end(self, task)
        self._tell("on_task_end", task)

    def on_classes_added(self, classes: list[int]) -> None:
        """Tell the model, if it has such a method."""
        self._tell("on_classes_added", classes)

    def _tell(self, name: str, value: Any) -> None:
        if hasattr(self.model, name):
            getattr(self.model, name)(value)

    # Lightning

    def setup(self, stage: str) -> None:
        """Check that data and trainer run through a stream as they must.

        Raises:
            ValueError: They do not.
        """
        check_stream(self.trainer, self, stage)
        data_module(self.trainer).restore_inputs()

    def on_fit_start(self) -> None:
        """Take up a checkpoint, or start; then give the model its keys and the data their codes."""
        kept, self._online, self.seen = self._taken_up, [0, 0], []
        if self.trainer.ckpt_path is not None and kept is not None:
            self.seen, self._online = list(kept["seen"]), list(kept["online"])
        if self.strategy is not None:
            self.strategy.reset()
            if self.trainer.ckpt_path is not None and kept is not None:
                self.strategy.load_state_dict(kept["strategy_state"])
        data = data_module(self.trainer)
        if getattr(self.model, "needs_keys", False):
            inputs = OnDevice(data.unlabelled(), make_ready(self.trainer))
            self.model.initialize_keys(inputs, **(self.hparams["key_options"] or {}))
        if self.hparams["precompute"]:
            for split in ("train", "val", "test"):
                if data.size(split):
                    data.replace_inputs(split, encode_all(self, data.unlabelled(split=split)))

    def on_train_start(self) -> None:
        """Go on with the random numbers of a checkpoint, and past a finished epoch."""
        if self.trainer.ckpt_path is None or self._taken_up is None:
            return
        kept, self._taken_up = self._taken_up, None
        torch.set_rng_state(kept["random"].cpu())
        if kept["cuda_random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in kept["cuda_random"]])
        go_past_epoch(self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that gradients are what the optimiser takes.

        Raises:
            ValueError: They are not.
        """
        check_gradients(self.hparams["optimizer"], self.trained_parameters())

    def configure_callbacks(self) -> list[Callback]:
        """Return none, and silence three warnings of what is meant here."""
        silence()
        return cast(list[Callback], super().configure_callbacks())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser, or what counts the steps of a model that learns without one.

        Raises:
            ValueError: Nothing is to be trained.
        """
        if self.learner is not None:
            return EditCounter()
        parameters = self.trained_parameters()
        if not parameters:
            raise ValueError(f"model={type(self.model).__name__} has nothing to train; unfreeze some of it")
        return OPTIMIZERS[self.hparams["optimizer"]](parameters, lr=self.hparams["learning_rate"])  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run goes on with, in plain values."""
        checkpoint[PART] = {
            "seen": self.seen,
            "online": self._online,
            "strategy": None if self.strategy is None else type(self.strategy).__name__,
            "strategy_state": {} if self.strategy is None else self.strategy.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up.

        Raises:
            ValueError: A fit is to go on with another strategy.
        """
        kept = checkpoint.get(PART)
        if kept is None:
            return
        own = None if self.strategy is None else type(self.strategy).__name__
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        if fitting and kept["strategy"] != own:
            raise ValueError(f"strategy={own} cannot go on from a checkpoint of strategy={kept['strategy']}; use that")
        self.seen, self._online = list(kept["seen"]), list(kept["online"])
        self._taken_up = kept
