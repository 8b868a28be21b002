"""ClassStreamData: images of classes as a stream of tasks, one after the other, for continual learning."""

import hashlib
import math
from itertools import accumulate
from typing import Any, cast, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.lit_modules.data.class_stream_rows import Inputs, StreamRows, TaskRows, as_they_are
from memzoo.lit_modules.data.class_stream_sources import Transform, open_source
from memzoo.lit_modules.data.class_stream_tasks import (
    Domain,
    Permutations,
    Rotations,
    Samples,
    Scenario,
    Split,
    check_order,
    divide_classes,
    divide_rows,
    draw_order,
)
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler

SPLITS: tuple[Split, ...] = get_args(Split)
FIXED = (
    *("scenario", "num_tasks", "epochs_per_task", "first_classes", "domain", "rotation", "blurry"),
    *("validation", "test", "online", "folder", "dataset", "batch_size", "seed"),
)


class ClassStreamData(pl.LightningDataModule):
    """Images of classes, shown task by task.

    Scenarios: in "class" every task has classes of its own, and which task an image belongs to is not told when it is
    asked for; in "task" the same with that told; in "domain" all tasks have the same classes, and their inputs are
    changed, more or otherwise in each task. ``blurry`` boundaries show a share of the samples of each task in another;
    they still belong to their task when they are asked for. ``online`` shows each sample once.

    One fit runs through the stream: ``Trainer(max_epochs=num_tasks * epochs_per_task,
    reload_dataloaders_every_n_epochs=1)``. The task is that of ``trainer.current_epoch // epochs_per_task``, which is
    right in a resumed run too; the place within an epoch goes into checkpoints.

    Args:
        images: (images, channels, height, width), floating point; in scenarios "class" and "task" of any shape
            (images, ...). None for a folder, a data set, or else scikit-learn's 1,797 digits of 8 x 8 pixels, from -1
            to 1.
        labels: (images,) their classes, from 0.
        folder: A folder of images for each class, which may lie in ``train`` and ``test`` (or ``val``).
        dataset: Name of a Hugging Face data set of images, or path of one that was saved; with the extra ``data``.
        image_column: Of the data set.
        label_column: Of the data set.
        transform: Of an image, always the same: a PIL image of a folder or data set, which it makes a tensor of one
            size, such as ``timm.data.create_transform(...)``; a tensor of ``images``.
        augment: Of an input for training, a tensor to a tensor, anew each time; what was computed of inputs once cannot
            follow it.
        scenario: See above.
        num_tasks: Tasks.
        epochs_per_task: Passes over each.
        first_classes: Classes of the first task; as many as all others have by default.
        class_order: The classes in the order in which they come; drawn by seed by default.
        domain: How "domain" changes inputs: "permuted" pixels, or "rotated".
        rotation: Degrees from a task to the next.
        blurry: Share of each task's samples that is shown in a task drawn by chance.
        online: One pass, as ``epochs_per_task=1`` without ``augment``: both are required.
        validation: Share of each class's images for training to keep back; 0 for no validation.
        test: Share of each class's images to test on, where they do not come divided.
        batch_size: Samples in a batch.
        eval_batch_size: In one that is not trained on.
        num_workers: Worker processes of the training loader; 0 loads in the main process, where a run resumed within an
            epoch goes on with the same random augmentations.
        seed: Of all that is drawn.

    Attributes:
        class_order: The classes in the order in which they come; kept in hyper-parameters and checkpoints.
        task_classes: The classes of each task.
        num_classes: One more than the largest label.

    Shape:
        A batch is a dict of ``inputs`` (batch, ...), or ``codes`` once they have replaced them, ``labels`` (batch,),
        ``index`` (batch,), the number of a sample within its split, and ``task`` (batch,), which it belongs to.

    Raises:
        ValueError: An argument is out of range or does not go with another, a package is missing, or a task has no
            samples to train or test on.
    """

    def __init__(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        folder: str | None = None,
        dataset: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        transform: Transform | None = None,
        augment: Transform | None = None,
        scenario: Scenario = "class",
        num_tasks: int = 5,
        epochs_per_task: int = 1,
        first_classes: int | None = None,
        class_order: list[int] | None = None,
        domain: Domain = "permuted",
        rotation: float = 30.0,
        blurry: float = 0.0,
        online: bool = False,
        validation: float = 0.1,
        test: float = 0.25,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = dict(num_tasks=num_tasks, epochs_per_task=epochs_per_task, batch_size=batch_size)
        for name, count in dict(**counts, eval_batch_size=eval_batch_size).items():
            check_positive(name, count)
        for name, count in dict(num_workers=num_workers, seed=seed).items():
            if count < 0:
                raise ValueError(f"{name}={count} is negative; use a whole number >= 0")
        for name, share in dict(blurry=blurry, validation=validation, test=test).items():
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} is no share; use a number in [0, 1)")
        check_number("rotation", rotation)
        check_choice("scenario", scenario, get_args(Scenario))
        check_choice("domain", domain, get_args(Domain))
        if online and (epochs_per_task != 1 or augment is not None):
            raise ValueError(
                f"online=True shows each sample once, but epochs_per_task={epochs_per_task} and augment="
                f"{'None' if augment is None else 'given'}; use 1 and None"
            )
        if scenario == "domain" and first_classes is not None:
            raise ValueError(
                f"first_classes={first_classes}, but tasks of scenario='domain' have the same; leave it out"
            )
        self.source = open_source(images, labels, folder, dataset, transform, (image_column, label_column))
        self.num_classes = int(self.source.labels.max()) + 1
        order = draw_order(self.num_classes, seed) if class_order is None else list(class_order)
        check_order(order, self.num_classes)
        self.save_hyperparameters(ignore=["images", "labels", "transform", "augment"], logger=False)
        self.scenario: Scenario = scenario
        self.num_tasks, self.epochs_per_task = num_tasks, epochs_per_task
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augment, self.blurry, self.seed = augment, blurry, seed
        changes = Permutations(num_tasks, seed) if domain == "permuted" else Rotations(rotation)
        self._domain = changes if scenario == "domain" else None
        self._images = divide_rows(self.source.labels, self.source.parts, validation, test, seed)
        self._take_order(order)

    def _take_order(self, order: list[int]) -> None:
        """Divide the samples into tasks."""
        self.class_order = order
        self.hparams["class_order"] = order
        by_domain = self.scenario == "domain"
        first = self.hparams["first_classes"]
        self.task_classes = [order] * self.num_tasks if by_domain else divide_classes(order, self.num_tasks, first)
        self._rows: dict[Split, StreamRows] = {}
        for split, image in self._images.items():
            labels = self.source.labels
            if by_domain:
                samples = Samples.by_domain(image, labels, self.num_tasks)
            else:
                samples = Samples.by_class(image, labels, self.task_classes)
            if split == "train":
                samples = samples.blurred(self.blurry, self.num_tasks, self.seed)
            self._rows[split] = StreamRows(
                self.source, samples, self._domain, self.augment if split == "train" else None
            )
            for task in range(self.num_tasks):
                if split != "val" and not (samples.shown == task).any():
                    raise ValueError(
                        f"task {task} has no sample of classes {self.task_classes[task]} in the split {split!r} of "
                        f"{len(image)}; use fewer tasks, or another share for validation or test"
                    )

    # The stream

    @property
    def current_task(self) -> int:
        """The task of the trainer's present epoch, from 0; the last after the end."""
        return self.task_of(0 if self.trainer is None else self.trainer.current_epoch)

    def task_of(self, epoch: int) -> int:
        """Return the task of an epoch."""
        return min(epoch // self.epochs_per_task, self.num_tasks - 1)

    def boundary(self, step: int) -> bool:
        """Return whether the training step with this number, from 0, is the first of a task, on one device."""
        batches = [math.ceil(self.task_size(task) / self.batch_size) for task in range(self.num_tasks - 1)]
        return step in accumulate((self.epochs_per_task * count for count in batches), initial=0)

    def task_size(self, task: int, split: Split = "train") -> int:
        """Return how many samples of a split are shown in a task."""
        return int((self._split(split).samples.shown == task).sum())

    def size(self, split: Split) -> int:
        """Return how many samples a split has."""
        return len(self._split(split).samples.image)

    # What encoders and keys need

    def unlabelled(self, batch_size: int = 256, split: Split = "train") -> Inputs:
        """Return the inputs of all samples of a split in batches, by their index, as often as they are iterated over.

        They come without classes, in an order drawn by seed, and are not augmented.

        Raises:
            ValueError: There is no such split, or the batch size is below 1.
        """
        check_positive("batch_size", batch_size)
        return Inputs(self._split(split), batch_size)

    def replace_inputs(self, split: Split, codes: Tensor) -> None:
        """Give ``codes`` in place of ``inputs`` in the batches of a split.

        Args:
            split: "train", "val" or "test".
            codes: (samples, ...) of all samples of the split, by their index.

        Raises:
            ValueError: There is no such split, its inputs are augmented, or there is not one for each sample.
        """
        rows = self._split(split)
        if rows.augment is not None:
            raise ValueError(
                f"codes of the split {split!r} would hide its augmentation, which changes inputs each time; use "
                f"augment=None, or leave the inputs as they are"
            )
        rows.replace(codes)

    def restore_inputs(self) -> None:
        """Give ``inputs`` again."""
        for rows in self._rows.values():
            rows.codes = None

    # Loaders

    def task_loader(
        self,
        split: Split,
        task: int,
        *,
        batch_size: int | None = None,
        limit: int | None = None,
        shown: bool = False,
    ) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of the samples that belong to a task, in their order; it is not shuffled nor augmented.

        Args:
            split: "train", "val" or "test".
            task: From 0.
            batch_size: ``eval_batch_size`` by default.
            limit: The first samples alone, which are a random choice; all by default.
            shown: Those that are shown in the task, in place of those that belong to it.

        Raises:
            ValueError: There is no such split or task.
        """
        rows = self._split(split)
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task={task} is not within [0, {self.num_tasks}); use one of the stream")
        plain = StreamRows(rows.source, rows.samples, rows.domain, codes=rows.codes)
        index = ((rows.samples.shown if shown else rows.samples.task) == task).nonzero().flatten()[:limit]
        size = batch_size or self.eval_batch_size
        return DataLoader(TaskRows(plain, index), size, collate_fn=as_they_are, generator=torch.Generator())

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of what is shown in the present task, shuffled by seed and epoch; its last batch is short.

        In a plain loop, call ``loader.sampler.set_epoch(epoch)``.
        """
        rows = self._rows["train"]
        index = (rows.samples.shown == self.current_task).nonzero().flatten()
        shown = TaskRows(rows, index)
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = RowSampler(cast(Any, shown), self.batch_size, seed=self.seed, **share)
        sampler.set_epoch(0 if self.trainer is None else self.trainer.current_epoch)
        return ResumableLoader(
            shown,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=as_they_are,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Iterating would else draw from the generator that the model draws from; workers draw by epoch.
            generator=torch.Generator().manual_seed(self.seed + sampler.epoch),
        )

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Return a loader for each task; none without validation."""
        return self._loaders("val") if self.size("val") else []

    def test_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Return a loader for each task."""
        return self._loaders("test")

    def _loaders(self, split: Split) -> list[DataLoader[dict[str, Tensor]]]:
        return [self.task_loader(split, task) for task in range(self.num_tasks)]

    def _split(self, split: Split) -> StreamRows:
        check_choice("split", split, SPLITS)
        return self._rows[split]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the order of the classes and what the stream was made with."""
        return {"class_order": self.class_order, **self._fixed}

    @property
    def _fixed(self) -> dict[str, Any]:
        labels = self.source.labels
        digest = hashlib.sha256(labels.cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
        return {"images": len(labels), **{name: self.hparams[name] for name in FIXED}, "labels_sha256": digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the order of the classes, which is not drawn again.

        Raises:
            ValueError: The stream of the checkpoint was made otherwise, or of other classes.
        """
        own = self._fixed
        if other := [name for name in own if state_dict.get(name) != own[name]]:
            named = ", ".join(f"{name}={state_dict.get(name)!r} and not {own[name]!r}" for name in other)
            raise ValueError(f"the checkpoint is of a stream with {named}; go on with what it was made with, or anew")
        check_order(state_dict["class_order"], self.num_classes)
        if state_dict["class_order"] != self.class_order:
            self._take_order(list(state_dict["class_order"]))
