"""The samples of a split as a data set that is read a batch at a time: inputs, or what was computed of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from memzoo.lit_modules.data.class_stream_sources import ImageSource, Transform
from memzoo.lit_modules.data.class_stream_tasks import Samples

CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass
class StreamRows:
    """A split: where its inputs come from, and in place of them the codes, once there are some.

    Attributes:
        source: Of the images.
        samples: In order.
        domain: Changes inputs (batch, ...) by their tasks (batch,).
        augment: Of each input, anew whenever it is read.
        codes: (samples, ...) in place of inputs.
    """

    source: ImageSource
    samples: Samples
    domain: Callable[[Tensor, Tensor], Tensor] | None = None
    augment: Transform | None = None
    codes: Tensor | None = None

    def inputs(self, index: Tensor) -> Tensor:
        """Return the inputs of some samples, (batch, ...).

        Raises:
            ValueError: Images are of different shapes.
        """
        images = self.source.read(self.samples.image[index].tolist())
        if len(shapes := {tuple(image.shape) for image in images}) > 1:
            raise ValueError(f"images of a batch have the shapes {sorted(shapes)}; pass a transform to one size")
        inputs = torch.stack(images)
        if self.domain is not None:
            inputs = self.domain(inputs, self.samples.task[index])
        return inputs if self.augment is None else torch.stack([self.augment(one) for one in inputs])

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Return some samples, by their numbers, as a batch."""
        samples = self.samples
        own = {"labels": samples.label[index], "index": index, "task": samples.task[index]}
        if self.codes is None:
            return {"inputs": self.inputs(index), **own}
        codes = self.codes[index]
        return {"codes": codes if codes.is_floating_point() else codes.long(), **own}

    def replace(self, codes: Tensor) -> None:
        """Give codes in place of inputs, kept on the CPU in the smallest integers that hold them.

        Raises:
            ValueError: There is not one for each sample.
        """
        if len(codes) != len(self.samples.image):
            raise ValueError(
                f"codes have {len(codes)} rows for {len(self.samples.image)} samples; pass one for each, by its index"
            )
        kept = codes.detach().cpu()
        if not kept.is_floating_point() and kept.numel():
            low, high = kept.aminmax()
            fits = (d for d in CODE_DTYPES if torch.iinfo(d).min <= int(low) and int(high) <= torch.iinfo(d).max)
            kept = kept.to(next(fits))
        self.codes = kept


class TaskRows(Dataset[dict[str, Tensor]]):
    """Some of the samples of a split; ``collate_fn=as_they_are`` goes with it.

    Args:
        rows: The split.
        index: (samples,) their numbers within it.
    """

    def __init__(self, rows: StreamRows, index: Tensor) -> None:
        self.rows, self.index = rows, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.rows.batch(self.index[[place]]).items()}

    def __getitems__(self, places: Sequence[int]) -> dict[str, Tensor]:
        return self.rows.batch(self.index[list(places)])


def as_they_are(batch: Any) -> Any:
    """Return a batch that was read as one."""
    return batch


class Inputs:
    """The inputs of all samples of a split, without classes and as they are before any augmentation, again and again.

    Args:
        rows: The split.
        batch_size: Samples at a time.
    """

    def __init__(self, rows: StreamRows, batch_size: int) -> None:
        self.rows = StreamRows(rows.source, rows.samples, rows.domain)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows.samples.image) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.arange(len(self.rows.samples.image)).split(self.batch_size):
            yield self.rows.inputs(index)
