"""TaskBoundary tells where tasks begin and end; ContinualEval measures all tasks there, and on the way if asked to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_positive
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.class_incremental import ClassIncrementalModule, EvalLogits
from memzoo.lit_modules.class_incremental_parts import Answers, Ready, as_in_a_step, in_evaluation_mode
from memzoo.lit_modules.continual_metrics import average_accuracy
from memzoo.lit_modules.task_matrix import AnytimeTracker, TaskMatrix

OptimizerReset = Literal["keep", "reinit"]
EvalSplit = Literal["val", "test"]


class TaskBoundary(Callback):
    """Tell the module where tasks begin and end.

    Calls ``on_task_start(task)`` before the first batch of a task, with ``on_classes_added(classes)`` after it where
    the task brings classes that none before it had, and ``on_task_end(task)`` after the last epoch of a task; each
    once, in resumed runs too.

    Args:
        optimizer_reset: "keep" goes on with what the optimiser has gathered; "reinit" lets it forget that at the
            beginning of each task but the first, as if it were new.

    Raises:
        ValueError: There is no such way, or the module has no such methods.
    """

    tells_tasks = True

    def __init__(self, optimizer_reset: OptimizerReset = "keep") -> None:
        check_choice("optimizer_reset", optimizer_reset, get_args(OptimizerReset))
        self.optimizer_reset = optimizer_reset
        self._started, self._ended = -1, -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can be told."""
        names = ("on_task_start", "on_task_end", "on_classes_added")
        if missing := [name for name in names if not hasattr(pl_module, name)]:
            raise ValueError(
                f"TaskBoundary calls {', '.join(missing)} of the module, which {type(pl_module).__name__} lacks; use "
                f"ClassIncrementalModule, or define them"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, unless a checkpoint says where the stream is."""
        if trainer.ckpt_path is None:
            self._started, self._ended = -1, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a task, if this is its first batch; of an epoch begun by resuming, this is the first hook."""
        data, module = data_module(trainer), cast(Any, pl_module)
        task = data.current_task
        if task == self._started:
            return
        self._end(trainer, module, task - 1)
        self._started = task
        if self.optimizer_reset == "reinit" and task:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        module.on_task_start(task)
        before = {one for classes in data.task_classes[:task] for one in classes}
        if added := [one for one in data.task_classes[task] if one not in before]:
            module.on_classes_added(added)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a task, if this was its last epoch."""
        if _ends_task(trainer):
            self._end(trainer, pl_module, self._started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last task, if a run was resumed after its last batch."""
        if _is_over(trainer):
            self._end(trainer, pl_module, self._started)

    def _end(self, trainer: Trainer, module: Any, task: int) -> None:
        if task > self._ended:
            self._ended = task
            module.on_task_end(task)

    def state_dict(self) -> dict[str, Any]:
        """Return which tasks have begun and ended."""
        return {"started": self._started, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self._started, self._ended = state_dict["started"], state_dict["ended"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the way.

    Attributes:
        step: Updates before it.
        trained: The task of the last of them, -1 before any.
        accuracies: Of each task, NaN where it was not measured.
    """

    step: int
    trained: int
    accuracies: tuple[float, ...]


class ContinualEval(Callback):
    """Measure all tasks before training and after each task; some of them more often if asked to.

    The matrix has a row for the end of every task, and the last for before any training, always of all samples. The
    trace has the tasks so far, of ``samples`` each, every ``every_n_steps`` updates; also once before the first update
    of each task, that task included, and after the last of all. Both are this callback's own: Lightning's validation,
    its sanity check included, never enters them.

    Evaluation leaves weights, buffers, random numbers and the modes of all modules as they were.

    Logs ``test/accuracy/task_0`` and so on, ``test/average_accuracy`` (of the tasks so far) and ``test/macro_accuracy``
    (the mean over all classes) with each row, and ``anytime/minimum_accuracy`` and so on with each evaluation of the
    trace.

    Args:
        split: "test", or "val" to choose hyper-parameters by.
        every_n_steps: Updates between two evaluations of the trace (rho); None for no trace. Minima depend on it.
        samples: Of each task for the trace, the first, which are a random choice; None for all.
        window: Evaluations of windowed forgetting and plasticity.
        logits: Which classes can be answered, "all", "seen" or "task"; what the module says by default.
        device_bytes: Of the trace's samples, to keep on the device during a fit. What is beyond them waits in main
            memory and is moved for each evaluation.

    Attributes:
        trace: The evaluations on the way.
        rows: The rows of the matrix that are filled, in order; -1 is before any training.
        matrix: The accuracies, (tasks + 1, tasks), as ``TaskMatrix`` gives them.

    Raises:
        ValueError: An argument is out of range, or module or data do not go with it.
    """

    def __init__(
        self,
        *,
        split: EvalSplit = "test",
        every_n_steps: int | None = None,
        samples: int | None = 1000,
        window: int = 10,
        logits: EvalLogits | None = None,
        device_bytes: int = 256 * 2**20,
    ) -> None:
        check_choice("split", split, get_args(EvalSplit))
        if logits is not None:
            check_choice("logits", logits, get_args(EvalLogits))
        for name, count in dict(every_n_steps=every_n_steps, samples=samples).items():
            if count is not None:
                check_positive(name, count)
        self.split, self.every_n_steps, self.samples = split, every_n_steps, samples
        if device_bytes < 0:
            raise ValueError(f"device_bytes={device_bytes} is negative; use 0 to keep nothing on the device")
        self.window, self.logits, self.device_bytes = window, logits, device_bytes
        AnytimeTracker(1, window)  # which checks it
        self.trace: list[Evaluation] = []
        self._metric: TaskMatrix | None = None
        self._tracker: AnytimeTracker | None = None
        self._loaded: dict[str, Any] | None = None
        self.rows: list[int] = []
        self._kept: dict[int, list[dict[str, Tensor]]] = {}  # batches of the trace
        self._used = 0  # bytes of them on the device

    @property
    def state_key(self) -> str:
        """Of its part of a checkpoint: there may be several, of other logits or splits."""
        return self._generate_state_key(split=self.split, logits=self.logits)

    @property
    def matrix(self) -> Tensor:
        """The accuracies so far.

        Raises:
            ValueError: There was no fit.
        """
        if self._metric is None:
            raise ValueError("matrix: nothing was measured yet; call trainer.fit first")
        return self._metric.compute().cpu()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to measure."""
        data = data_module(trainer)
        if not isinstance(pl_module, ClassIncrementalModule):
            raise ValueError(
                f"ContinualEval measures a ClassIncrementalModule, not {type(pl_module).__name__}; use that"
            )
        if stage != "fit":
            return
        if not data.size(self.split):
            raise ValueError(
                f"split={self.split!r} of the data is empty; use ClassStreamData(validation=0.1), or 'test'"
            )
        if self.logits == "task" and data.scenario != "task":
            raise ValueError(
                f"logits='task' tells which task a sample is of, which scenario={data.scenario!r} does not; use "
                f"ClassStreamData(scenario='task'), or 'all' or 'seen'"
            )

    # When

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from a checkpoint."""
        tasks, loaded = data_module(trainer).num_tasks, self._loaded
        self._kept, self._used, self._loaded = {}, 0, None
        # Every device measures everything: there is nothing to add up.
        self._metric = TaskMatrix(tasks, sync_on_compute=False)
        self._tracker = AnytimeTracker(tasks, self.window, sync_on_compute=False)
        if trainer.ckpt_path is None or loaded is None:
            self.trace, self.rows = [], []
            return
        for metric, name in ((self._metric, "matrix"), (self._tracker, "anytime")):
            for state, value in loaded[name].items():
                setattr(metric, state, value.clone())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the row from before any training."""
        if -1 not in self.rows and trainer.global_step == 0:
            self._fill(trainer, pl_module, -1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fill the row of the task before, if a run was resumed after its last batch; look before the first update."""
        data = data_module(trainer)
        task = data.current_task
        if batch_idx or trainer.current_epoch % data.epochs_per_task:
            return
        if task and task - 1 not in self.rows:
            self._fill(trainer, pl_module, task - 1)
        if self.every_n_steps is not None and not (self.trace and not math.isnan(self.trace[-1].accuracies[task])):
            self._look(trainer, pl_module, task - 1, range(task + 1))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time. After the last batch of a task it is looked at before the next one, or at the end."""
        task, step = data_module(trainer).current_task, trainer.global_step
        if self.every_n_steps is None or step % self.every_n_steps or (trainer.is_last_batch and _ends_task(trainer)):
            return
        if not self.trace or self.trace[-1].step < step:  # batches may be gathered before an update
            self._look(trainer, pl_module, task, range(task + 1))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the row of a task that has ended."""
        if _ends_task(trainer):
            self._finish(trainer, pl_module, data_module(trainer).current_task)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the last row, if a run was resumed after its last batch."""
        if _is_over(trainer):
            self._finish(trainer, pl_module, data_module(trainer).num_tasks - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the samples."""
        self._kept, self._used = {}, 0

    def _finish(self, trainer: Trainer, pl_module: LightningModule, task: int) -> None:
        if task not in self.rows:
            self._fill(trainer, pl_module, task)
            last = task == data_module(trainer).num_tasks - 1
            if last and self.every_n_steps is not None:
                self._look(trainer, pl_module, task, range(task + 1))

    # What

    def _fill(self, trainer: Trainer, pl_module: LightningModule, trained: int) -> None:
        """Add a row to the matrix, of all samples of all tasks."""
        assert isinstance(pl_module, ClassIncrementalModule)
        assert self._metric is not None
        data = data_module(trainer)
        answers = Answers(data.size(self.split), data.num_tasks, data.num_classes, pl_module.device)
        with evaluating(trainer, pl_module) as ready:
            for task in range(data.num_tasks):
                for batch in map(ready, data.task_loader(self.split, task)):
                    chosen = pl_module.predict(batch, self.logits)
                    self._metric.update(chosen.cpu(), batch["labels"].cpu(), trained, task)
                    answers.add(batch, chosen)
        self.rows.append(trained)
        row = self._metric.compute()[trained]
        measured = {f"{self.split}/accuracy/task_{task}": float(value) for task, value in enumerate(row)}
        measured[f"{self.split}/macro_accuracy"] = answers.accuracies()["macro_accuracy"]
        if trained >= 0:
            square = self._metric.compute()[: data.num_tasks]
            measured[f"{self.split}/average_accuracy"] = average_accuracy(square, after=trained)
        self._log(trainer, measured)

    def _look(self, trainer: Trainer, pl_module: LightningModule, trained: int, tasks: range) -> None:
        """Add an evaluation to the trace."""
        assert isinstance(pl_module, ClassIncrementalModule)
        assert self._tracker is not None
        data = data_module(trainer)
        accuracies = torch.full((data.num_tasks,), torch.nan, dtype=torch.float64)
        with evaluating(trainer, pl_module) as ready:
            for task in tasks:
                batches = map(ready, self._batches(trainer, task))
                right = [pl_module.predict(batch, self.logits) == batch["labels"] for batch in batches]
                accuracies[task] = float(torch.cat(right).double().mean())
        self.trace.append(Evaluation(trainer.global_step, trained, tuple(accuracies.tolist())))
        self._tracker.update(accuracies, trained)
        self._log(trainer, {f"anytime/{name}": float(value) for name, value in self._tracker.compute().items()})

    def _batches(self, trainer: Trainer, task: int) -> list[dict[str, Tensor]]:
        if task not in self._kept:
            loader = data_module(trainer).task_loader(self.split, task, limit=self.samples)
            self._kept[task] = [self._placed(trainer, batch) for batch in loader]
        return self._kept[task]

    def _placed(self, trainer: Trainer, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = trainer.precision_plugin.convert_input(batch)
        size = sum(value.nbytes for value in batch.values())
        if self._used + size > self.device_bytes:
            return batch
        self._used += size
        placed: dict[str, Tensor] = trainer.strategy.batch_to_device(batch)
        return placed

    def _log(self, trainer: Trainer, measured: dict[str, float]) -> None:
        known = {name: value for name, value in measured.items() if not math.isnan(value)}
        for logger in trainer.loggers:  # now, whatever log_every_n_steps is
            logger.log_metrics(known, trainer.global_step)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        if self._metric is None or self._tracker is None:
            return {}
        return {
            "matrix": {name: getattr(self._metric, name).clone() for name in self._metric._defaults},
            "anytime": {name: getattr(self._tracker, name).clone() for name in self._tracker._defaults},
            "rows": list(self.rows),
            "trace": [[one.step, one.trained, list(one.accuracies)] for one in self.trace],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        if state_dict:
            self._loaded, self.rows = state_dict, list(state_dict["rows"])
            self.trace = [Evaluation(step, task, tuple(values)) for step, task, values in state_dict["trace"]]


@contextmanager
def evaluating(trainer: Trainer, module: nn.Module) -> Iterator[Ready]:
    """Evaluate within: no gradients, nothing drawn, and all modes as they were afterwards.

    Gives what makes batches ready.
    """
    with in_evaluation_mode(module), isolate_rng(), torch.inference_mode(), as_in_a_step(trainer) as ready:
        yield ready


def _ends_task(trainer: Trainer) -> bool:
    data = data_module(trainer)
    return bool((trainer.current_epoch + 1) % data.epochs_per_task == 0)


def _is_over(trainer: Trainer) -> bool:
    data = data_module(trainer)
    return bool(trainer.current_epoch >= data.num_tasks * data.epochs_per_task)
