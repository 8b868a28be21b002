"""Where the images of a class stream come from: tensors, a folder of image files, or a Hugging Face data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from memzoo.lit_modules.data.relabel import load_digits

Transform = Callable[[Any], Any]  # into a tensor; jsonargparse would take Tensor for a class to build
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = ("test", "val", "validation")  # names of a part to test on, the first that is there


class ImageSource(Protocol):
    """Numbered images with their classes."""

    @property
    def labels(self) -> Tensor:
        """(images,) int64, from 0."""
        ...

    @property
    def parts(self) -> Mapping[str, Tensor] | None:
        """Numbers of the images that are given as "train" and "test"; None where they are not divided."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return some of the images, each as a tensor."""
        ...


class TensorImages:
    """Images in a tensor.

    Args:
        images: (images, ...), floating point.
        labels: (images,) classes from 0.
        transform: Of each image.

    Raises:
        ValueError: They do not fit.
    """

    parts = None

    def __init__(self, images: Tensor, labels: Tensor, transform: Transform | None = None) -> None:
        if images.dim() < 2 or not images.is_floating_point():
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}; they must be (images, ...), "
                f"floating point"
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point() or not len(labels) or int(labels.min()) < 0:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; pass a class from 0 for each of "
                f"the {len(images)} images, int64"
            )
        self.images, self.labels, self.transform = images, labels.long(), transform

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return some of the images."""
        images = self.images[torch.as_tensor(numbers, dtype=torch.long)].unbind()
        return list(images) if self.transform is None else [self.transform(image) for image in images]


class FolderImages:
    """Image files in a folder for each class; such folders may lie in ``train`` and ``test`` (or ``val``).

    Classes are numbered in the order of the names of their folders.

    Args:
        folder: Its path.
        transform: Of a PIL image in RGB into a tensor; by default (3, height, width) from 0 to 1.

    Raises:
        ValueError: It holds no images, or a part lacks a class.
    """

    def __init__(self, folder: str | Path, transform: Transform | None = None) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise ValueError(f"folder={str(folder)!r} is no folder; pass one that holds a folder of images a class")
        held_out = next((name for name in HELD_OUT if (root / name).is_dir()), None)
        divided = held_out is not None and (root / "train").is_dir()
        homes = {"train": root / "train", "test": root / str(held_out)} if divided else {"train": root}
        names = sorted(path.name for path in homes["train"].iterdir() if path.is_dir() and path.name[0] != ".")
        self.files: list[Path] = []
        labels: list[int] = []
        parts: dict[str, Tensor] = {}
        for part, home in homes.items():
            begin = len(self.files)
            for label, name in enumerate(names):
                found = sorted(path for path in (home / name).rglob("*") if path.suffix.lower() in SUFFIXES)
                if not found:
                    raise ValueError(f"{home / name} holds no images ({', '.join(SUFFIXES)}); add some or remove it")
                self.files += found
                labels += [label] * len(found)
            parts[part] = torch.arange(begin, len(self.files))
        if not labels:
            raise ValueError(f"{homes['train']} holds no folder; put the images of each class into a folder of its own")
        self.labels = torch.tensor(labels)
        self.parts = parts if divided else None
        self.transform = transform or to_tensor

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return some of the images."""
        from PIL import Image

        images = []
        for number in numbers:
            with Image.open(self.files[number]) as image:
                images.append(self.transform(image.convert("RGB")))
        return images


class HubImages:
    """Images of a Hugging Face data set, with the extra ``data``.

    Args:
        dataset: Name, or the path of one saved by ``save_to_disk``.
        transform: As of ``FolderImages``.
        image_column: That holds the images.
        label_column: That holds the classes.

    Raises:
        ValueError: ``datasets`` is missing, or the data set has no such columns or no part "train".
    """

    def __init__(
        self,
        dataset: str,
        transform: Transform | None = None,
        *,
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"dataset={dataset!r} is read by the package datasets, which is missing; pip install 'memzoo[data]', "
                f"or pass images and labels, or a folder"
            ) from error
        loaded = datasets.load_from_disk(dataset) if Path(dataset).is_dir() else datasets.load_dataset(dataset)
        held_out = next((name for name in HELD_OUT if name in loaded), None)
        if "train" not in loaded:
            raise ValueError(f"dataset={dataset!r} has the parts {list(loaded)} and no 'train'; choose another")
        self._tables = [loaded[name] for name in ("train", held_out) if name is not None]
        for table in self._tables:
            if missing := {image_column, label_column} - {*table.column_names}:
                raise ValueError(
                    f"dataset={dataset!r} has the columns {table.column_names} and no {sorted(missing)}; say which "
                    f"hold images and classes by image_column and label_column"
                )
        self._stops = np.cumsum([len(table) for table in self._tables])
        self.labels = torch.cat([torch.tensor(list(table[label_column])) for table in self._tables])
        cut = int(self._stops[0])
        self.parts = {"train": torch.arange(cut), "test": torch.arange(cut, len(self.labels))} if held_out else None
        self.image_column = image_column
        self.transform = transform or to_tensor

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return some of the images."""
        images = []
        for number in numbers:
            part = int(np.searchsorted(self._stops, number, side="right"))
            row = self._tables[part][int(number - (self._stops[part - 1] if part else 0))]
            images.append(self.transform(row[self.image_column].convert("RGB")))
        return images


def open_source(
    images: Tensor | None,
    labels: Tensor | None,
    folder: str | None,
    dataset: str | None,
    transform: Transform | None,
    columns: tuple[str, str],
) -> ImageSource:
    """Return the source that is named by one of the arguments; scikit-learn's digits where none is.

    Raises:
        ValueError: Two are named, or one cannot be read.
    """
    named = [name for name, given in dict(images=images, folder=folder, dataset=dataset).items() if given is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} each name the images; pass one of them")
    if (images is None) != (labels is None):
        raise ValueError("images and labels go together; pass both, or neither")
    if folder is not None:
        return FolderImages(folder, transform)
    if dataset is not None:
        return HubImages(dataset, transform, image_column=columns[0], label_column=columns[1])
    if images is None or labels is None:
        images, labels = load_digits()
    return TensorImages(images, labels, transform)


def to_tensor(image: Any) -> Tensor:
    """Return a PIL image as (channels, height, width), from 0 to 1."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.movedim(-1, 0).contiguous()
