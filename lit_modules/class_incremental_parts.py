"""What ``ClassIncrementalModule`` is made of: its loss, what teaches a head without gradients, and its checks."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.lit_modules.causal_lm import data_module


class OnDevice:
    """Batches on a device, as often as they are iterated over.

    Args:
        batches: Tensors, as often as they are asked for.
        device: Where to.
    """

    def __init__(self, batches: Iterable[Tensor], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield batch.to(self.device)


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
