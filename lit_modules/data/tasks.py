"""What data modules of synthetic tasks share: batches drawn when they are asked for, and a loader for every size."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from memzoo.layers.errors import check_positive
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler

Size = tuple[int, int]
SPLITS = ("train", "val", "test")


class Task(Protocol):
    """Rows that ask for something, of one length."""

    @property
    def size(self) -> Size:
        """What tells the task from others of the same options."""

    @property
    def sequence_length(self) -> int:
        """Inputs in a row."""

    @property
    def num_queries(self) -> int:
        """Answers asked for in a row."""

    def rows(self, num_rows: int, seed: int | Sequence[int]) -> dict[str, Tensor]:
        """Draw ``tokens`` and ``labels``, (num_rows, sequence_length + 1), as ``NextTokens`` takes them."""


TaskT = TypeVar("TaskT", bound=Task)


class TaskBatches(Dataset[dict[str, Tensor]]):
    """Batches of one task, each drawn when it is asked for, from the seed and its own number alone.

    Args:
        task: What to draw.
        num_rows: Rows in all; the last batch may have fewer than the others.
        batch_size: Rows of a batch.
        seed: Numbers that no other data set has.
    """

    def __init__(self, task: Task, num_rows: int, batch_size: int, seed: Sequence[int]) -> None:
        self.task = task
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = tuple(seed)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = min(self.batch_size, self.num_rows - index * self.batch_size)
        return self.task.rows(rows, (*self.seed, index))


class TaskData(pl.LightningDataModule, Generic[TaskT]):
    """Batches of one task in several sizes: mixed in training, with a loader of its own for each in validation.

    Args:
        task: Builds the task of a size.
        train_sizes: Sizes to train on, each once.
        val_sizes: Sizes to validate, test and predict on; None for those of training.
        train_rows: Rows of an epoch for each size, or one number for all.
        val_rows: Rows of each validation size; testing has as many others.
        batch_size: Rows in a batch of one device.
        num_workers: Worker processes of each loader; 0 draws in the main process.
        seed: Of all rows and their order. The splits are drawn from different seeds.

    Raises:
        ValueError: An argument is out of range, or ``task`` refuses a size.
    """

    long_answers: ClassVar[bool] = False
    """Whether an answer has several tokens. ``CausalLMModule`` then also logs ``exact_match``: all of them right."""

    def __init__(
        self,
        task: Callable[[Size], TaskT],
        train_sizes: Sequence[Size],
        val_sizes: Sequence[Size] | None,
        *,
        train_rows: int | Sequence[int],
        val_rows: int,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        train_rows = [train_rows] * len(train_sizes) if isinstance(train_rows, int) else list(train_rows)
        if len(train_rows) != len(train_sizes):
            raise ValueError(
                f"train_rows={train_rows} does not match {len(train_sizes)} train_sizes; use a number for each, or one "
                f"for all"
            )
        for count in train_rows:
            check_positive("train_rows", count)
        check_positive("val_rows", val_rows)
        check_positive("batch_size", batch_size)
        for name, value in (("num_workers", num_workers), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative; use a whole number >= 0")
        self.train_tasks = _tasks("train_sizes", train_sizes, task)
        self.val_tasks = self.train_tasks if val_sizes is None else _tasks("val_sizes", val_sizes, task)
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def batches(self, split: str, task: TaskT, num_rows: int) -> TaskBatches:
        """Return the batches of a task in a split: "train", "val" or "test"."""
        return TaskBatches(task, num_rows, self.batch_size, (self.seed, SPLITS.index(split), *task.size))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the training rows. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        counted = zip(self.train_tasks.values(), self.train_rows, strict=True)
        batches: ConcatDataset[dict[str, Tensor]] = ConcatDataset([self.batches("train", *pair) for pair in counted])
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return DataLoader(batches, **self._loader_options())
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = RowSampler(batches, 1, seed=self.seed, **share)
        return ResumableLoader(batches, sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the validation rows, by size."""
        return self._loaders("val")

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the test rows, by size."""
        return self._loaders("test")

    def predict_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the test rows, by size."""
        return self._loaders("test")

    def _loaders(self, split: str) -> dict[str, DataLoader[dict[str, Tensor]]]:
        return {
            name: DataLoader(self.batches(split, task, self.val_rows), **self._loader_options())
            for name, task in self.val_tasks.items()
        }

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # what is loaded is a batch already
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _tasks(argument: str, sizes: Sequence[Size], task: Callable[[Size], TaskT]) -> dict[str, TaskT]:
    """Return the task of every size, by name."""
    tasks = {f"{first}x{second}": task((first, second)) for first, second in sizes}
    if not tasks or len(tasks) < len(sizes):
        raise ValueError(f"{argument}={sizes} names no size, or one twice; use one or several, each once")
    return tasks


def draw_distinct(rng: np.random.Generator, num_rows: int, weights: np.ndarray, count: int) -> Tensor:
    """Draw ``count`` numbers below ``len(weights)`` a row, one after another by weight, none twice: (num_rows, count).

    Of exponential clocks with these rates, the order in which the first ones ring is such a draw.
    """
    clocks = rng.standard_exponential((num_rows, len(weights)), dtype=np.float32) / weights.astype(np.float32)
    return torch.from_numpy(clocks).topk(count, largest=False).indices
