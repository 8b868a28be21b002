"""What ``ClassIncrementalModule`` is made of: batches made ready, its loss, its answers counted, and its checks."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.lit_modules.causal_lm import data_module

Ready = Callable[[Any], Any]
OptimizerName = Literal["sgd", "adam", "sparse_adam"]
OPTIMIZERS: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "sparse_adam": torch.optim.SparseAdam,
}


def make_ready(trainer: Any) -> Ready:
    """Return what makes a batch what a step gets: in the trainer's precision and on its device."""
    return lambda batch: trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


@contextmanager
def as_in_a_step(trainer: Any) -> Iterator[Ready]:
    """Compute within as a step does, under autocast where it is; gives what makes batches ready for that."""
    with trainer.precision_plugin.forward_context():
        yield make_ready(trainer)


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluate within; all modes are as they were afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class OnDevice:
    """Batches made ready, as often as they are iterated over.

    Args:
        batches: Tensors, as often as they are asked for.
        ready: Makes them so.
    """

    def __init__(self, batches: Iterable[Tensor], ready: Ready) -> None:
        self.batches, self.ready = batches, ready

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.ready(batch)


@torch.no_grad()
def encode_all(module: Any, batches: Iterable[Tensor]) -> Tensor:
    """Return the codes of batches, on the CPU, as the steps of the module would compute them."""
    with in_evaluation_mode(module), as_in_a_step(module.trainer) as ready:
        return torch.cat([module.model.encode(inputs).cpu() for inputs in OnDevice(batches, ready)])


def best_class(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the class of each row (batch,); -1 where none has a score above minus infinity, or one is NaN.

    Args:
        logits: (batch, classes).
        allowed: (batch, classes) or (classes,) bool; None for all.
    """
    if not logits.shape[1]:  # of a head that has no class yet
        return torch.full((len(logits),), -1, device=logits.device)
    scores = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
    best, chosen = scores.max(1)
    return torch.where((best == -torch.inf) | logits.isnan().any(1), -1, chosen)


def of_all_devices(trainer: Any, right: int, asked: int, labels: Tensor) -> tuple[int, int, list[int]]:
    """Return two sums over devices, and the classes among the labels (batch,) of all of them."""
    if trainer.world_size == 1:
        return right, asked, labels.tolist()
    by_class = labels.bincount(minlength=data_module(trainer).num_classes)
    counts = torch.cat([torch.tensor([right, asked], device=labels.device), by_class])
    torch.distributed.all_reduce(counts)
    right, asked, *numbers = counts.tolist()
    return right, asked, [label for label, number in enumerate(numbers) if number]


class Answers:
    """What was said of the samples of a split: each counts once, on however many devices it was asked.

    Samplers of several devices repeat some, so that all have as many; hence a note for each sample and no counts.

    Args:
        samples: Of the split.
        num_tasks: Of the stream.
        num_classes: Of the data.
        device: To take notes on.
    """

    def __init__(self, samples: int, num_tasks: int, num_classes: int, device: torch.device) -> None:
        self.num_tasks, self.num_classes = num_tasks, num_classes
        # 0 for what was not asked, else 1 + right + 2 * (class + classes * task).
        self.notes = torch.zeros(samples, dtype=torch.long, device=device)

    def add(self, batch: Mapping[str, Tensor], chosen: Tensor) -> None:
        """Take note of a batch."""
        place = batch["labels"] + self.num_classes * batch["task"]
        self.notes[batch["index"]] = 1 + (chosen == batch["labels"]).long() + 2 * place

    def gather(self, trainer: Any) -> None:
        """Take over what other devices have noted."""
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self.notes, torch.distributed.ReduceOp.MAX)

    def accuracies(self) -> dict[str, float]:
        """Return the mean over tasks, that over classes, and that of each task; nothing where nothing was asked."""
        notes = self.notes[self.notes > 0].cpu() - 1
        if not len(notes):
            return {}
        right, place = notes % 2, notes // 2
        tasks = _shares(place // self.num_classes, right, self.num_tasks)
        classes = _shares(place % self.num_classes, right, self.num_classes)
        means = {"accuracy": tasks.values(), "macro_accuracy": classes.values()}
        return {name: sum(shares) / len(shares) for name, shares in means.items()} | {
            f"accuracy/task_{task}": share for task, share in tasks.items()
        }


def _shares(group: Tensor, right: Tensor, groups: int) -> dict[int, float]:
    """Return the share that is right of each group that is there."""
    asked, hits = group.bincount(minlength=groups), group[right > 0].bincount(minlength=groups)
    return {one: int(hits[one]) / int(asked[one]) for one in range(groups) if asked[one]}


def fraction_unused(model: Any) -> float | None:
    """Return the share of pairs that training has not fetched yet; None for a model without a bottleneck."""
    return cast(float | None, getattr(getattr(model, "bottleneck", None), "fraction_unused", None))


def go_past_epoch(trainer: Any) -> None:
    """Let a resumed fit go on after the last batch of an epoch.

    Lightning asks whether that was done by the length of the next epoch's loader, which is another where tasks have
    different sizes.
    """
    epochs = trainer.fit_loop
    batches = epochs.epoch_loop
    if epochs.restarted_mid_epoch and batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
        batches.batch_progress.current.completed = sys.maxsize - 1


def masked_cross_entropy(logits: Tensor, labels: Tensor, allowed: Tensor | None, smoothing: float) -> Tensor:
    """Return the mean cross-entropy with the classes that are allowed, which alone share the smoothing.

    Args:
        logits: (batch, classes).
        labels: (batch,); one that is not allowed makes it infinite.
        allowed: (batch, classes) bool; None for all.
        smoothing: Share of a target that is spread over the allowed classes, its own included.
    """
    if allowed is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    nats = -logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
    own = nats.gather(1, labels[:, None]).squeeze(1)
    spread = nats.masked_fill(~allowed, 0.0).sum(1) / allowed.sum(1)
    return ((1 - smoothing) * own + smoothing * spread).mean()


def find_learner(model: Any) -> Any:
    """Return the model or its head if it has ``learn``, else None."""
    for part in (model, getattr(model, "head", None), getattr(model, "decoder", None)):
        if hasattr(part, "learn"):
            return part
    return None


def check_gradients(optimizer: str, weights: Iterable[Tensor]) -> None:
    """Require gradients that an optimiser takes.

    Raises:
        ValueError: They are others.
    """
    given = [weight.grad.is_sparse for weight in weights if weight.grad is not None]
    if optimizer == "sparse_adam" and not all(given):
        raise ValueError("optimizer='sparse_adam' takes sparse gradients and the model has dense ones; use 'adam'")
    if optimizer == "adam" and any(given):
        raise ValueError("optimizer='adam' takes dense gradients and the model has sparse ones; use 'sparse_adam'")


def silence() -> None:
    """Silence warnings: encoders evaluate, heads learn in a step, and a stream without validation has no loader."""
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")


def check_stream(trainer: Any, module: Any, stage: str) -> None:
    """Require data and trainer to run through a stream as they must.

    Raises:
        ValueError: They do not.
    """
    data, chosen, strategy = data_module(trainer), module.hparams, module.strategy
    if not hasattr(data, "task_classes") or not hasattr(data, "epochs_per_task"):
        raise ValueError(f"{type(data).__name__} is no stream of tasks; use ClassStreamData")
    if chosen["eval_logits"] == "task" and data.scenario != "task":
        raise ValueError(
            f"eval_logits='task' tells the model which task a sample is of, which scenario={data.scenario!r} does not; "
            f"use ClassStreamData(scenario='task'), or 'all' or 'seen'"
        )
    if stage != "fit":
        return
    epochs = data.num_tasks * data.epochs_per_task
    if trainer.max_epochs != epochs and not trainer.fast_dev_run:
        raise ValueError(
            f"max_epochs={trainer.max_epochs} of the trainer, but {data.num_tasks} tasks of {data.epochs_per_task} "
            f"epochs take {epochs}; use Trainer(max_epochs={epochs})"
        )
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        raise ValueError(f"max_steps={trainer.max_steps} of the trainer cuts the stream; leave it out")
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ValueError(
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} of the trainer would train "
            f"on the samples of another task, at the latest when a run is resumed; use 1"
        )
    if chosen["train_logits"] == "current" and getattr(data, "blurry", 0):
        raise ValueError(
            f"train_logits='current' leaves out classes that blurry={data.blurry} shows in other tasks; use 'seen'"
        )
    if module.learner is not None and data.epochs_per_task != 1:
        raise ValueError(
            f"epochs_per_task={data.epochs_per_task} would teach {type(module.learner).__name__} each sample so many "
            f"times, which learns it from one; use ClassStreamData(epochs_per_task=1)"
        )
    alone = type(strategy).__name__ if strategy is not None and strategy.one_device else None
    alone = type(module.learner).__name__ if module.learner is not None else alone
    if alone is not None and trainer.world_size > 1:
        raise ValueError(f"{alone} works on one device and not on {trainer.world_size}; use Trainer(devices=1)")
    if (
        strategy is not None
        and strategy.needs_boundaries
        and not any(hasattr(c, "tells_tasks") for c in trainer.callbacks)
    ):
        raise ValueError(
            f"strategy={type(strategy).__name__} must be told where tasks end; add the callback TaskBoundary"
        )
    if chosen["precompute"] and getattr(data, "augment", None) is not None:
        raise ValueError(
            "precompute=True computes codes once, but the data augment inputs anew each time; use "
            "ClassStreamData(augment=None), or precompute=False"
        )
    if chosen["precompute"] and not getattr(module.model, "codes_are_constant", True):
        raise ValueError(
            "precompute=True computes codes once, but mask_unused=True of the model has them depend on what was "
            "trained; use mask_unused=False, or precompute=False"
        )
