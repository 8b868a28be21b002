"""ModelEditingModule: a stream of edits to a model, and what it knows after the last of them."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.editor import Edit, Editor
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.registry import layer_entry, list_layers
from memzoo.layers.wise import Wise
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.editing_host import load_weights, read_host
from memzoo.lit_modules.editing_metrics import (
    GENERATED,
    MEASURES,
    Answers,
    Batch,
    EditRecord,
    QuestionKind,
    generate_answers,
    mean,
    memory_bytes,
    read_answers,
    read_routing,
    right_after,
)
from memzoo.lit_modules.editing_stream import (
    check_fit,
    check_made_with,
    check_next,
    describe_data,
    describe_editor,
    warn_of_unrelated,
)

PART = "editing"  # of a checkpoint


class EditCounter(torch.optim.Optimizer):
    """Optimises nothing: its steps are what Lightning counts, the editors having optimisers of their own."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count; the closure of a manual optimisation does nothing."""


class ModelEditingModule(LightningModule):
    """Edit a model again and again, and measure all edits after the last one.

    ``fit`` takes the edits of a data module such as ``FactData(train_on="edits")`` one after the other. Each batch, one
    edit or a list of several to learn together, goes to ``editor.edit``, which has an optimiser of its own, and counts
    as one step of the trainer. It needs ``Trainer(max_epochs=1)`` and one device. The model itself is never written.
    The editor stays attached: ``module.model`` is the edited model, with ``module.editor.disabled()`` the one before.

    Measured is the share of an answer's tokens that are the likeliest ones behind those before them, the mean over
    questions: ``reliability`` of the edits as they were taught, ``generalisation`` of their paraphrases. ``locality``
    is the share that is as it was before the first edit. Behind ``generated/`` an answer counts if the model, going on
    from the question by itself, gives all of it: the data's, or for locality what it went on with before the first
    edit, as many tokens as the data's answer has. Where answers are classes they are not generated.

    Logs ``edits/reliability``, ``edits/generated/reliability`` and so on, of **all** edits so far, after the last and
    every ``evaluate_every``; ``just_edited/reliability`` and so on, of the edits just learned alone, which is a
    different thing and says nothing of what is forgotten later, and after the last edit
    ``just_edited/mean_reliability`` and so on, means over questions too. What no question asks for, as where no edit
    has a paraphrase, is nan in ``edits/`` and left out of ``just_edited/``. ``edits/count``, ``edits/memory_bytes`` and
    ``edits/parameters`` say what the editor holds, ``train/loss``, ``train/steps`` and ``train/seconds`` what the last
    batch took.

    A checkpoint holds the weights of the model, the editor, the answers before the first edit and the records: a run
    that was killed goes on to the same memory, to the bit, with the same editor, its ``editor_options`` and data in
    batches of the same number of edits; others are refused. A fit without ``ckpt_path`` starts with no edits. What
    ``editor.calibrate()`` of ``Wise`` has measured before the first fit stays, for all fits.

    Args:
        model: Name of a registered model, or a module: with the interface of ``memzoo.arch.CausalLM``, or a classifier
            of images. None for that of the ``checkpoint``.
        overrides: Arguments in place of the named model's own, and of those in the checkpoint.
        checkpoint: File that a ``CausalLMModule`` has written, for the weights of the model.
        editor: Name of a registered editor, such as "wise", "grace" or "rome".
        editor_options: Of attaching it.
        evaluate_every: Edits between two evaluations on the way; None evaluates after the last alone.
        generate: Evaluate by generation too.
        max_new_tokens: Of an answer, how many are generated and compared; all by default.

    Attributes:
        model: The model.
        editor: The editor, attached to it.
        records: What each edit took, in order.
        evaluations: What was measured of all edits so far, each time, with ``count``, how many those were.
        before: The model's own answers to all questions of locality; None before a fit.
        generated_before: Those that it generates; None before a fit, and where nothing is generated.

    Raises:
        ValueError: There is no such model, checkpoint or editor, or an argument does not go with another.

    Example:
        >>> module = ModelEditingModule("transformer_tiny", editor="wise")
        >>> # Trainer(max_epochs=1).fit(module, FactData(train_on="edits"))
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        overrides: dict[str, Any] | None = None,
        *,
        checkpoint: str | None = None,
        editor: str = "wise",
        editor_options: dict[str, Any] | None = None,
        evaluate_every: int | None = None,
        generate: bool = True,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("editor", editor, list_layers("side"))
        for name, count in {"evaluate_every": evaluate_every, "max_new_tokens": max_new_tokens}.items():
            if count is not None:
                check_positive(name, count)
        weights: dict[str, Tensor] = {}
        if checkpoint is not None:
            model, overrides, weights = read_host(checkpoint, model, overrides)
        if model is None:
            raise ValueError("model=None is that of a checkpoint, but checkpoint=None; pass one of them")
        by_name = isinstance(model, str)
        if not by_name and overrides:
            raise ValueError(f"overrides={overrides!r} only apply to a model given by name; build the module with them")
        # The weights of the checkpoint are then those of this module; a module is not a hyper-parameter.
        self.save_hyperparameters(ignore=["checkpoint", "model", "overrides"])
        if by_name:
            self.save_hyperparameters({"model": model, "overrides": overrides})
        self.model: Any = create_model(model, **(overrides or {})) if isinstance(model, str) else model
        if checkpoint is not None:
            load_weights(self.model, weights, checkpoint)
        self.editor = attach_editor(self.model, editor, editor_options or {})
        self.automatic_optimization = False
        self.records: list[EditRecord] = []
        self.evaluations: list[dict[str, float]] = []
        self.before: Answers | None = None
        self.generated_before: Answers | None = None
        self._scale: Tensor | None = None  # of an editor that has one, as it was before any edit
        self._data: dict[str, Any] | None = None  # what describes the data of this fit, once somebody asked
        self._resumed = False  # and no edit was made since
        self.train()  # which Lightning does not call

    def train(self, mode: bool = True) -> Self:
        """Set the module's mode; the model and its editor evaluate in any."""
        super().train(mode)
        self.model.eval()
        self.editor.eval()
        return self

    # The stream

    def on_train_start(self) -> None:
        """Start a stream, or go on with that of a checkpoint."""
        self._resumed = self.trainer.ckpt_path is not None
        if not self._resumed:
            self._reset_editor()
            self.records, self.evaluations = [], []
            every = range(len(data_module(self.trainer).edits))
            self.before = self.answers(every, "locality")
            self.generated_before = self.generated_answers(every, "locality") if self._generates else None

    def _reset_editor(self) -> None:
        """Forget all edits, but not a scale that the editor was given before the first."""
        if isinstance(self.editor, Wise) and not int(self.editor.num_edits):
            self._scale = self.editor.scale.clone()
        self.editor.reset()
        if isinstance(self.editor, Wise) and self._scale is not None:
            self.editor.scale.copy_(self._scale)

    def training_step(self, batch: Batch | Sequence[Batch], batch_idx: int) -> None:
        """Learn an edit, or several together, then ask for them, and for all so far where that is due."""
        batches = [batch] if isinstance(batch, Mapping) else batch
        edits, index = [edit_of(one) for one in batches], [int(one["index"]) for one in batches]
        if self._resumed:
            check_next(self.records, index)
        if not self.records:
            warn_of_unrelated(self.editor, batches, data_module(self.trainer).edits)
        self._resumed = False
        began = time.monotonic()
        with torch.enable_grad():
            report = self.editor.edit(edits)
        seconds = time.monotonic() - began
        cast(Any, self.optimizers()).step()  # a batch is a step, for checkpoints and progress
        shares = {name: self._shares(index, kind) for name, kind in MEASURES.items()}
        for number in index:
            own = {name: values[numbers == number] for name, (values, numbers) in shares.items()}
            told: dict[str, Any] = {name: mean(values) for name, values in own.items()}
            told |= {f"{name}_questions": len(values) for name, values in own.items()}
            self.records.append(EditRecord(number, report.steps, report.loss, seconds / len(index), **told))
        self.log("train/loss", report.loss, prog_bar=True, batch_size=1)
        self.log("train/steps", float(report.steps), batch_size=1)
        self.log("train/seconds", seconds, batch_size=1)
        asked = {f"just_edited/{name}": mean(values) for name, (values, _) in shares.items() if len(values)}
        self.log_dict(asked, batch_size=1)
        every, count = self.hparams["evaluate_every"], len(self.records)
        if every is not None and (count - len(index)) // every < count // every:
            self.evaluate()

    def on_train_epoch_end(self) -> None:
        """Measure all edits after the last, and log it."""
        self.log_dict(_named(self.evaluate()), logger=False, batch_size=1)
        for name in MEASURES:
            if len(means := right_after(self.records, name)):
                self.log(f"just_edited/mean_{name}", float(means[-1]), batch_size=1)

    def on_train_end(self) -> None:
        """Measure all edits if that was not done yet: a run may go on from a checkpoint with nothing left to edit."""
        self.evaluate()

    # What is measured

    def evaluate(self) -> dict[str, float]:
        """Return the last of ``evaluations``, after measuring all edits so far if that was not done; log it then.

        The editor is left as it is.
        """
        count = len(self.records)
        if self.evaluations and self.evaluations[-1]["count"] == count:
            return self.evaluations[-1]
        made = sorted(record.index for record in self.records)
        measured: dict[str, float] = {"count": count}
        for name, kind in MEASURES.items():
            measured[name] = mean(self._shares(made, kind)[0])
            if self._generates:
                answers = self.generated_answers(made, kind)
                wanted = cast(Answers, self.generated_before).of(made).said if kind == "locality" else answers.expected
                measured[GENERATED + name] = mean(answers.matches(wanted))
        measured["memory_bytes"] = memory_bytes(self.editor)
        measured["parameters"] = self.editor.num_parameters()
        self.evaluations.append(measured)
        for logger in self.trainer.loggers:  # now, whatever log_every_n_steps is
            logger.log_metrics(_named(measured), self.trainer.global_step)
        return measured

    def answers(self, edits: Iterable[int], kind: QuestionKind) -> Answers:
        """Return the answers to the questions of one kind that belong to some edits, by their numbers."""
        with self.trainer.precision_plugin.val_step_context():
            return read_answers(self.editor, self._questions(edits, kind))

    def generated_answers(self, edits: Iterable[int], kind: QuestionKind) -> Answers:
        """Return what the model generates by itself to the questions of one kind that belong to some edits."""
        limit = self.hparams["max_new_tokens"]
        with self.trainer.precision_plugin.val_step_context():
            return generate_answers(self.editor, self.model, self._questions(edits, kind), max_new_tokens=limit)

    def routing(self) -> dict[QuestionKind, list[float]]:
        """Return how strongly the questions about all edits so far make the router of ``Wise`` respond, by kind.

        See ``read_routing``; nothing for other editors.
        """
        if not isinstance(self.editor, Wise):
            return {}
        made = sorted(record.index for record in self.records)
        with self.trainer.precision_plugin.val_step_context():
            return {kind: read_routing(self.editor, self._questions(made, kind)).tolist() for kind in MEASURES.values()}

    def _questions(self, edits: Iterable[int], kind: QuestionKind) -> Iterator[Batch]:
        for batch in data_module(self.trainer).questions(list(edits), kind):
            # As Lightning does with what it hands to training_step: of the dtype of "bf16-true" and the like.
            yield self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))

    @property
    def _generates(self) -> bool:
        return bool(self.hparams["generate"]) and hasattr(self.model, "prefill")

    def _shares(self, edits: list[int], kind: QuestionKind) -> tuple[Tensor, Tensor]:
        """Return which share of each answer is right, or as before, and the numbers of their edits."""
        answers = self.answers(sorted(edits), kind)
        if kind != "locality":
            return answers.shares(answers.expected), answers.index
        return answers.shares(cast(Answers, self.before).of(edits).said), answers.index

    # Lightning

    def setup(self, stage: str) -> None:
        """Check that data and trainer can run a stream of edits.

        Raises:
            ValueError: They cannot.
        """
        self._data = None
        if stage == "fit":
            check_fit(self.trainer, data_module(self.trainer), self.model)

    def configure_callbacks(self) -> list[Callback]:
        """Return none, and silence three warnings of what is meant here.

        A checkpoint holds the memory after the edit, edits are measured without a validation, and the model evaluates.
        """
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        warnings.filterwarnings("ignore", message="You passed in a `val_dataloader` but have no `validation_step`")
        return cast(list[Callback], super().configure_callbacks())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return what counts the edits."""
        return EditCounter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the stream is, in plain values."""
        checkpoint[PART] = {
            "made_with": self._describe(),
            "records": [asdict(record) for record in self.records],
            "evaluations": self.evaluations,
            "before": None if self.before is None else vars(self.before),
            "generated_before": None if self.generated_before is None else vars(self.generated_before),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up.

        Raises:
            ValueError: The checkpoint is of another module, or made with another editor or data.
        """
        kept = checkpoint.get(PART)
        if kept is None:
            raise ValueError(
                "the checkpoint holds no stream of edits to go on with; for a trained model to edit, pass it to the "
                "module: ModelEditingModule(checkpoint=...)"
            )
        check_made_with(kept["made_with"], self._describe())
        self.records = [EditRecord(**record) for record in kept["records"]]
        self.evaluations = kept["evaluations"]
        self.before = None if kept["before"] is None else Answers(**kept["before"])
        self.generated_before = None if kept["generated_before"] is None else Answers(**kept["generated_before"])

    def _describe(self) -> dict[str, Any]:
        """Return what a stream must go on with, in plain values; of the data where there are some."""
        made_with = describe_editor(self.editor, self.hparams["editor_options"] or {})
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            return made_with
        self._data = self._data or describe_data(data_module(trainer))
        asked = {"generate": self._generates, "max_new_tokens": self.hparams["max_new_tokens"]}
        return made_with | self._data | asked


def attach_editor(model: nn.Module, name: str, options: Mapping[str, Any]) -> Editor:
    """Attach a registered editor.

    Raises:
        ValueError: It is none, or does not have these options.
    """
    try:
        editor = layer_entry(name).build(model, **options)
    except TypeError as error:
        raise ValueError(
            f"editor_options={dict(options)!r} are not those of editor={name!r} ({error}); use arguments of its "
            f"attach()"
        ) from error
    if not isinstance(editor, Editor):
        raise ValueError(
            f"editor={name!r} is a {type(editor).__name__}, which learns texts and not edits; use 'wise', 'grace', "
            f"'rome' or 'fine_tuning'"
        )
    return editor


def edit_of(batch: Batch) -> Edit:
    """Return the edit in a batch.

    Raises:
        ValueError: There is none.
    """
    if not {"inputs", "targets", "index"} <= batch.keys():
        raise ValueError(
            f"batch has {sorted(batch)}, no edit: 'inputs', 'targets' and 'index'; use FactData(train_on='edits')"
        )
    names = ("inputs", "targets", "mask", "unrelated", "unrelated_mask", "subject")
    return Edit(**{name: batch[name] for name in names if name in batch})


def _named(measured: Mapping[str, float]) -> dict[str, float]:
    return {f"edits/{name}": float(value) for name, value in measured.items()}
