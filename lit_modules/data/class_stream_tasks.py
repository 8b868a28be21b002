"""How images become a stream of tasks: the order of the classes, which sample goes where, what changes the inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Scenario = Literal["class", "task", "domain"]
Domain = Literal["permuted", "rotated"]
Split = Literal["train", "val", "test"]


def draw_order(num_classes: int, seed: int) -> list[int]:
    """Return a permutation of the classes."""
    return torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).tolist()


def check_order(order: Sequence[int], num_classes: int) -> None:
    """Require every class once.

    Raises:
        ValueError: It is not so.
    """
    if sorted(order) != list(range(num_classes)):
        raise ValueError(
            f"class_order={list(order)!r} is no order of the {num_classes} classes; name each of 0 to "
            f"{num_classes - 1} once, or pass None to draw one by seed"
        )


def divide_classes(order: Sequence[int], num_tasks: int, first: int | None) -> list[list[int]]:
    """Return the classes of each task, in order; the first has ``first``, all others the same number.

    Raises:
        ValueError: They cannot be divided so.
    """
    begin = len(order) // num_tasks if first is None else first
    left, others = len(order) - begin, num_tasks - 1
    if begin < 1 or left < others or (others and left % others) or (not others and left):
        raise ValueError(
            f"num_tasks={num_tasks} does not divide {len(order)} classes with first_classes={first}; use a number of "
            f"tasks that does, or first_classes for a first task of another size"
        )
    size = left // others if others else 0
    return [list(order[:begin])] + [
        list(order[begin + size * task : begin + size * (task + 1)]) for task in range(others)
    ]


def divide_rows(
    labels: Tensor, parts: Mapping[str, Tensor] | None, validation: float, test: float, seed: int
) -> dict[Split, Tensor]:
    """Return the numbers of the images of each split, in an order drawn by seed; shares are taken of each class.

    Args:
        labels: (images,) their classes.
        parts: Those given as "train" and "test", if they are.
        validation: Share of those for training that is kept back.
        test: Share of all to test on; of no use where parts are given.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if parts is None:
        held_out, kept = _split(torch.randperm(len(labels), generator=generator), labels, test)
    else:
        held_out, kept = (
            parts[name][torch.randperm(len(parts[name]), generator=generator)] for name in ("test", "train")
        )
    val, train = _split(kept, labels, validation)
    return {"train": train, "val": val, "test": held_out}


def _split(images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return a share of each class, rounded and one image at least unless it is 0, and the others."""
    taken = torch.zeros(len(images), dtype=torch.bool)
    for label in labels[images].unique() if share else ():
        own = (labels[images] == label).nonzero().flatten()
        taken[own[: max(round(share * len(own)), 1)]] = True
    return images[taken], images[~taken]


@dataclass(frozen=True)
class Samples:
    """The samples of a split.

    Attributes:
        image: (samples,) numbers of their images.
        label: (samples,) their classes.
        task: (samples,) the task that they belong to.
        shown: (samples,) the task in which they are shown: the same, but at blurry boundaries.
    """

    image: Tensor
    label: Tensor
    task: Tensor
    shown: Tensor

    @classmethod
    def by_class(cls, image: Tensor, labels: Tensor, task_classes: Sequence[Sequence[int]]) -> "Samples":
        """Return images as samples of the tasks that their classes belong to."""
        home = torch.empty(sum(map(len, task_classes)), dtype=torch.long)
        for task, classes in enumerate(task_classes):
            home[list(classes)] = task
        label = labels[image]
        return cls(image, label, home[label], home[label])

    @classmethod
    def by_domain(cls, image: Tensor, labels: Tensor, num_tasks: int) -> "Samples":
        """Return all images as samples of each of the tasks."""
        task = torch.arange(num_tasks).repeat_interleave(len(image))
        return cls(image.repeat(num_tasks), labels[image].repeat(num_tasks), task, task)

    def blurred(self, share: float, num_tasks: int, seed: int) -> "Samples":
        """Return them with a share of each task's samples shown in place of one another, in whatever task."""
        if not share:
            return self
        generator = torch.Generator().manual_seed(seed)
        moved = []
        for task in range(num_tasks):
            own = (self.shown == task).nonzero().flatten()
            moved.append(own[torch.randperm(len(own), generator=generator)[: round(share * len(own))]])
        places = torch.cat(moved)
        shown = self.shown.clone()
        shown[places] = self.shown[places[torch.randperm(len(places), generator=generator)]]
        return Samples(self.image, self.label, self.task, shown)


# Domains


class Permutations:
    """A fixed permutation of the pixels for each task; the first task has them as they are.

    Args:
        num_tasks: Tasks.
        seed: Of the draw.
    """

    def __init__(self, num_tasks: int, seed: int) -> None:
        self.num_tasks, self.seed = num_tasks, seed
        self._orders: dict[int, Tensor] = {}

    def __call__(self, inputs: Tensor, task: Tensor) -> Tensor:
        """Return inputs (batch, channels, height, width) as their tasks (batch,) have them."""
        pixels = inputs.shape[-2] * inputs.shape[-1]
        if pixels not in self._orders:
            generator = torch.Generator().manual_seed(self.seed)
            orders = [torch.randperm(pixels, generator=generator) for _ in range(self.num_tasks - 1)]
            self._orders[pixels] = torch.stack([torch.arange(pixels), *orders])
        places = self._orders[pixels][task][:, None].expand(-1, inputs.shape[1], -1)
        return inputs.flatten(2).gather(2, places).view_as(inputs)


class Rotations:
    """Each task turns the images further than the one before, counterclockwise; the first has them as they are.

    Args:
        degrees: From a task to the next.
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, inputs: Tensor, task: Tensor) -> Tensor:
        """Return inputs (batch, channels, height, width) as their tasks (batch,) have them."""
        angle = torch.deg2rad(task.double() * self.degrees).to(inputs)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        ratio = inputs.shape[-2] / inputs.shape[-1]  # the grid runs from -1 to 1 along either side
        grid = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
        places = F.affine_grid(grid, list(inputs.shape), align_corners=False)
        turned = F.grid_sample(inputs, places, mode="bilinear", padding_mode="border", align_corners=False)
        return torch.where((task == 0).view(-1, 1, 1, 1), inputs, turned)
