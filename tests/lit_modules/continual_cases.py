"""Small streams, models of the interfaces that ``ClassIncrementalModule`` knows, and trainers for both."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from memzoo.lit_modules import ClassIncrementalModule, ClassStreamData

CLASSES, SIDE = 6, 4


def pictures(per_class: int = 12, *, noise: float = 0.3, common: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """Return images (1, 4, 4) of six classes: noise about a picture of each; what is common makes tasks interfere."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)
    labels = torch.arange(CLASSES).repeat(per_class)
    images = common + means[labels] + noise * torch.randn(len(labels), 1, SIDE, SIDE, generator=generator)
    return {"images": images, "labels": labels}


def stream(**options: Any) -> ClassStreamData:
    """Return three tasks of two classes, two epochs each, with splits that leave tasks of different sizes."""
    chosen = dict(num_tasks=3, epochs_per_task=2, batch_size=8, validation=0.1, test=0.25) | options
    return ClassStreamData(**(pictures() | chosen))


class Net(nn.Module):
    """All that training or evaluation could disturb: normalisation by batch, dropout, a counter of its own."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(SIDE * SIDE)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(SIDE * SIDE, classes)
        self.register_buffer("usage", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.usage += len(x)
        return self.head(self.drop(self.norm(x.flatten(1))))


def linear(seed: int = 0) -> nn.Module:
    """Return a linear probe of the pixels, always the same."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


class Coded(nn.Module):
    """A frozen projection, keys that must be initialised, and values that are trained: a bottleneck in small."""

    def __init__(self, pairs: int = 12, *, sparse: bool = False) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(pairs, SIDE * SIDE))
        self.register_buffer("ready", torch.tensor(False))
        self.values = nn.Parameter(torch.zeros(pairs, CLASSES))
        self.extra = nn.Parameter(torch.ones(3))  # not among the trainable ones
        self.sparse = sparse
        self.encoded = 0

    @property
    def needs_keys(self) -> bool:
        return not bool(self.ready)

    def initialize_keys(self, batches: Iterable[Tensor], *, shift: float = 0.0) -> None:
        seen = torch.cat([batch.flatten(1) for batch in batches])
        assert len(seen) == sum(len(batch) for batch in batches)  # they come again
        self.keys.copy_(seen[: len(self.keys)] + shift)
        self.ready.fill_(True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [self.values]

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        assert self.ready
        self.encoded += len(inputs)
        return torch.cdist(inputs.flatten(1), self.keys).topk(2, largest=False).indices

    def decode(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.values, sparse=self.sparse).mean(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(self.encode(inputs))


class MeanHead(nn.Module):
    """The nearest class mean, learned without gradients; it grows with the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(CLASSES, SIDE * SIDE, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(CLASSES, dtype=torch.float64))

    def learn(self, features: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, features.double())
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        known = int(self.counts.nonzero().max()) + 1 if self.counts.any() else 0
        means = self.sums[:known] / self.counts[:known, None]
        return (-torch.cdist(features.double(), means)).nan_to_num(nan=-torch.inf)


class Learner(nn.Module):
    """A frozen encoder, and a head with ``learn``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = MeanHead()

    def encode(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.head(codes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(self.encode(inputs))


def module(model: nn.Module | None = None, *, seed: int = 0, **options: Any) -> ClassIncrementalModule:
    """Return a module; a ``Net`` by default, always with the same weights."""
    torch.manual_seed(seed)
    return ClassIncrementalModule(Net() if model is None else model, **options)


def trainer(data: ClassStreamData, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a trainer that runs through a stream."""
    chosen: dict[str, Any] = dict(
        max_epochs=data.num_tasks * data.epochs_per_task,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return pl.Trainer(callbacks=list(callbacks), **(chosen | options))


def every_place(folder: Path) -> list[ModelCheckpoint]:
    """Return what writes a checkpoint after every step, and at the end of every epoch."""
    steps = ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    epochs = ModelCheckpoint(
        folder,
        "epoch-{epoch}",
        every_n_epochs=1,
        save_top_k=-1,
        save_on_train_epoch_end=True,
        auto_insert_metric_name=False,
    )
    return [steps, epochs]


class Seen(pl.Callback):
    """Notes which epoch each batch was trained in, its classes, and which samples it had."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int], list[int]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches.append((trainer.current_epoch, batch["labels"].tolist(), batch["index"].tolist()))
