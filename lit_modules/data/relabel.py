"""RelabelData: model editing on images. A classifier is told that an image is of another class from now on.

The analogue of ``FactData`` for vision transformers: an edit is an image with its new class, paraphrases are the same
image shifted, and locality is asked with other images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from memzoo.layers.editor import Edit
from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.lit_modules.data.facts import FactKind, TrainOn
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler

DIGIT_LEVELS = 16
SHIFTS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))  # of paraphrases: down, right


@dataclass(frozen=True)
class Relabel:
    """An image that is to be of another class; images by their numbers.

    Attributes:
        image: The image.
        target: Its new class.
        original: Its class before.
        unrelated: An image that the edit may see in order to leave it alone.
        locality: Images whose classes must stay what they were, which no edit shows.
    """

    image: int
    target: int
    original: int
    unrelated: int
    locality: tuple[int, ...]


class RelabelData(pl.LightningDataModule):
    """Images of classes, edits to some that were held out, and questions.

    The images are divided by seed: a part for edits and the questions of locality, a part for validation, the others
    for training. An edit shows its image, and copies of it with noise; paraphrases are copies shifted by a pixel, which
    no edit shows. Of the images held out that are not edited, one half is what edits see in order to leave it alone,
    the other asks for locality; they take turns where there are fewer of them than edits.

    Args:
        images: (images, channels, height, width), floating point, what the model reads. None for scikit-learn's 1,797
            digits of 8 x 8 pixels, from -1 to 1.
        labels: (images,) their classes, from 0. None for those of the digits.
        image_size: Height and width to bring images to; what the model was built for.
        channels: Copies of a single channel; what the model was built for.
        num_edits: Edits.
        num_copies: Copies with noise that an edit shows besides.
        noise: Standard deviation of theirs.
        num_paraphrases: Shifted copies, up to eight.
        held_out: Images for edits and locality.
        validation: Images for validation.
        train_on: What ``fit`` is given: "facts", the images with their classes, or "edits" one by one.
        batch_size: Images in a batch.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of all that is drawn.

    Attributes:
        edits: The stream.
        num_classes: One more than the largest label.

    Shape:
        Images and questions come as a dict of ``inputs`` (rows, channels, image_size, image_size) and ``targets``
        (rows,); questions have ``index`` (rows,), the numbers of their edits. An edit is the same of its rows, with
        ``index`` (1,) and ``unrelated`` (1, channels, image_size, image_size).

    Raises:
        ValueError: An argument is out of range or does not go with another, or scikit-learn is missing.
    """

    def __init__(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        image_size: int = 32,
        channels: int = 3,
        num_edits: int = 50,
        num_copies: int = 4,
        noise: float = 0.1,
        num_paraphrases: int = 4,
        held_out: int = 300,
        validation: int = 300,
        train_on: TrainOn = "facts",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = dict(image_size=image_size, channels=channels, num_edits=num_edits, batch_size=batch_size)
        for name, count in dict(**counts, held_out=held_out, validation=validation).items():
            check_positive(name, count)
        for name, count in dict(num_copies=num_copies, num_workers=num_workers, seed=seed).items():
            if count < 0:
                raise ValueError(f"{name}={count} is negative; use a whole number >= 0")
        check_number("noise", noise, zero=True)
        check_choice("train_on", train_on, get_args(TrainOn))
        if not 0 <= num_paraphrases <= len(SHIFTS):
            raise ValueError(
                f"num_paraphrases={num_paraphrases} is not within [0, {len(SHIFTS)}], the shifts by a pixel"
            )
        if num_edits > held_out - 2:
            raise ValueError(
                f"num_edits={num_edits} leaves fewer than two of held_out={held_out} images unedited, one to train "
                f"with and one to ask for locality; use at most {max(held_out - 2, 0)}, or hold out more"
            )
        if (images is None) != (labels is None):
            raise ValueError("images and labels go together; pass both, or neither for digits")
        if images is None or labels is None:
            images, labels = load_digits()
        _check_images(images, labels, held_out + validation, channels)
        self.save_hyperparameters(ignore=["images", "labels"], logger=False)
        self.images = images
        self.labels = labels
        self.num_classes = int(labels.max()) + 1
        self.image_size = image_size
        self.channels = channels
        self.num_edits = num_edits
        self.num_copies = num_copies
        self.noise = noise
        self.num_paraphrases = num_paraphrases
        self.train_on = train_on
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        self._held_out, self._validation, self._training = order.tensor_split([held_out, held_out + validation])

    @cached_property
    def edits(self) -> Sequence[Relabel]:
        """The edits, in the order of the stream."""
        edited, others = self._held_out[: self.num_edits], self._held_out[self.num_edits :].tolist()
        unrelated, local = others[::2], others[1::2]
        generator = torch.Generator().manual_seed(self.seed)
        change = torch.randint(1, self.num_classes, (len(self._held_out),), generator=generator)[: self.num_edits]
        original = self.labels[edited]
        pairs = zip(edited.tolist(), original.tolist(), ((original + change) % self.num_classes).tolist(), strict=True)
        return tuple(
            Relabel(
                image=image,
                target=target,
                original=label,
                unrelated=unrelated[index % len(unrelated)],
                locality=tuple(local[index :: self.num_edits] or [local[index % len(local)]]),
            )
            for index, (image, label, target) in enumerate(pairs)
        )

    # Edits

    def encode_edit(self, edit: Relabel) -> Edit:
        """Return an edit as the model reads it: the image, then copies with noise; labelled by its class."""
        image = self.images[edit.image]
        generator = torch.Generator().manual_seed(self.seed * len(self.images) + edit.image)
        noise = torch.randn(self.num_copies, *image.shape, generator=generator, dtype=image.dtype)
        rows = torch.cat([image[None], image + self.noise * noise])
        targets = torch.full((len(rows),), edit.target)
        return Edit(
            self.fit_size(rows), targets, unrelated=self.fit_size(self.images[[edit.unrelated]]), label=edit.target
        )

    def edit_dataloader(self, start: int = 0) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the edits one by one, from number ``start``; its place goes into checkpoints."""
        rows: ConcatDataset[dict[str, Tensor]] = ConcatDataset([RelabelEdits(self)])
        loader = ResumableLoader(rows, sampler=RowSampler(rows, 1, contiguous=True), **self._options(None))
        loader.sampler.resume(0, start)
        return loader

    # Questions

    def questions(self, edits: Iterable[int], kind: FactKind) -> list[dict[str, Tensor]]:
        """Return the questions of one kind that belong to some edits, in batches.

        Raises:
            ValueError: There is no such kind.
        """
        check_choice("kind", kind, get_args(FactKind))
        rows: list[tuple[int, int, Tensor]] = []  # edit, class, image
        for index in edits:
            edit = self.edits[index]
            image = self.images[edit.image]
            if kind == "edit":
                rows.append((index, edit.target, image))
            elif kind == "paraphrase":
                rows += [(index, edit.target, shift(image, *by)) for by in SHIFTS[: self.num_paraphrases]]
            else:
                rows += [(index, int(self.labels[other]), self.images[other]) for other in edit.locality]
        batches = []
        for first in range(0, len(rows), self.batch_size):
            numbers, targets, images = zip(*rows[first : first + self.batch_size], strict=True)
            batches.append(
                {
                    "inputs": self.fit_size(torch.stack(images)),
                    "targets": torch.tensor(targets),
                    "index": torch.tensor(numbers),
                }
            )
        return batches

    # Lightning

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of what ``train_on`` says. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        if self.train_on == "edits":
            return self.edit_dataloader()
        rows: ConcatDataset[dict[str, Tensor]] = ConcatDataset([RelabelImages(self, self._training)])
        share = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = RowSampler(rows, self.batch_size, seed=self.seed, **share)
        return ResumableLoader(rows, sampler=sampler, **self._options(self.batch_size))

    def val_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """Return the loader of the validation images; none beside edits, which have ``questions``."""
        if self.train_on == "edits":
            return []
        return [DataLoader(RelabelImages(self, self._validation), **self._options(self.batch_size))]

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the edits."""
        return self.edit_dataloader()

    def fit_size(self, images: Tensor) -> Tensor:
        """Bring images (rows, own channels, height, width) to the size and the channels that the model reads."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.expand(-1, self.channels, -1, -1).contiguous()

    def _options(self, batch_size: int | None) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class RelabelEdits(Dataset[dict[str, Tensor]]):
    """The edits of ``RelabelData``, each a dict of tensors that depends on its number alone."""

    def __init__(self, data: RelabelData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.edits)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        edit = vars(self.data.encode_edit(self.data.edits[index]))
        tensors = {name: value for name, value in edit.items() if isinstance(value, Tensor)}
        return tensors | {"index": torch.tensor([index])}


class RelabelImages(Dataset[dict[str, Tensor]]):
    """Some of the images of ``RelabelData``, by their numbers, with their classes."""

    def __init__(self, data: RelabelData, numbers: Tensor) -> None:
        self.data = data
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self.numbers[index]
        return {"inputs": self.data.fit_size(self.data.images[number][None])[0], "targets": self.data.labels[number]}


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the digits that come with scikit-learn, (1797, 1, 8, 8) from -1 to 1, and their classes.

    Raises:
        ValueError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "images=None are the digits of scikit-learn, which is missing; pip install 'memzoo[digits]', or pass "
            "images and labels"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    return pixels * (2 / DIGIT_LEVELS) - 1, torch.from_numpy(labels).long()


def shift(image: Tensor, down: int, right: int) -> Tensor:
    """Return an image (channels, height, width) shifted by a pixel or none each way; its edge fills what is free."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    return padded[:, 1 - down : 1 - down + image.shape[1], 1 - right : 1 - right + image.shape[2]]


def _check_images(images: Tensor, labels: Tensor, taken: int, channels: int) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}; they must be (images, channels, "
            f"height, width), floating point"
        )
    if images.shape[1] not in (1, channels):
        raise ValueError(f"images have {images.shape[1]} channels, channels={channels}; make them equal, or pass one")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, the least is {labels.min()}; pass a "
            f"class from 0 for each of the {len(images)} images, int64"
        )
    if int(labels.max()) == 0:
        raise ValueError("labels are all 0, which leaves no other class for an edit; pass two classes or more")
    if taken >= len(images):
        raise ValueError(
            f"held_out and validation take {taken} of {len(images)} images and leave none to train on; lower them"
        )
