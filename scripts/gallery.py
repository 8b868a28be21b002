"""Draw the figures of the documentation that a run of seconds makes: the 2-D toy of the discrete key-value bottleneck.

    python scripts/gallery.py                # write docs/figures/dkvb_toy.png
    python scripts/gallery.py --out FOLDER

Inputs lie in the unit square, eight classes in four tasks, two classes each (figure 2 of arXiv 2207.11240, with the
numbers of the authors' notebook). Two bottlenecks learn one task after the other, and are asked for the class of every
point of the square after each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers import DiscreteKeyValueBottleneck

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
MEANS = (
    ((0.25, 0.25), (0.75, 0.5)),
    ((0.75, 0.25), (0.5, 0.75)),
    ((0.75, 0.75), (0.25, 0.5)),
    ((0.25, 0.75), (0.5, 0.25)),
)
SPREAD, SAMPLES, CLASSES, GRID = 0.035, 100, 8, 100
MODELS = {
    "one codebook of 400 keys in the plane": dict(num_codebooks=1, num_pairs=400, splitter="chunk"),
    "20 codebooks of 20 keys, random projections": dict(num_codebooks=20, num_pairs=20, splitter="random"),
}
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#9c755f", "#59a14f", "#b07aa1", "#edc948")


def tasks(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return points and classes of each task: ``task`` and ``task + 4``."""
    made = []
    for task, means in enumerate(MEANS):
        centres = torch.tensor(means).repeat_interleave(SAMPLES // 2, 0)
        points = centres + SPREAD * torch.randn(SAMPLES, 2, generator=generator)
        made.append((points, torch.tensor([task, task + 4]).repeat_interleave(SAMPLES // 2)))
    return made


def build(options: dict[str, object], generator: torch.Generator, key_batches: int) -> DiscreteKeyValueBottleneck:
    """Return a bottleneck with keys from uniform points and values near zero."""
    torch.manual_seed(0)
    bottleneck = DiscreteKeyValueBottleneck(2, dim_key=2, dim_value=CLASSES, **options)  # type: ignore[arg-type]
    bottleneck.initialize_keys([torch.rand(100, 2, generator=generator) for _ in range(key_batches)], epochs=1)
    torch.nn.init.normal_(bottleneck.values, std=1e-3)
    return bottleneck


def learn(bottleneck: DiscreteKeyValueBottleneck, points: Tensor, classes: Tensor, steps: int) -> None:
    """Take full-batch steps of Adam on one task; a new Adam, as its averages would move other values on."""
    optimizer = torch.optim.Adam(bottleneck.trainable_parameters(), lr=1e-3)
    indices = bottleneck.lookup(points)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(bottleneck.vote(indices), classes).backward()
        optimizer.step()


def square() -> Tensor:
    """Return the points of a grid over the unit square, row by row."""
    line = (torch.arange(GRID) + 0.5) / GRID
    return torch.cartesian_prod(line, line).flip(1)


def toy_figure(*, steps: int = 1000, key_batches: int = 1000) -> tuple[Figure, dict[str, list[float]]]:
    """Draw what both bottlenecks answer after each task.

    Args:
        steps: Of Adam on a task.
        key_batches: Batches of 100 points that the keys are from.

    Returns:
        The figure, and of each model the accuracy on all points so far after each task.
    """
    generator = torch.Generator().manual_seed(0)
    stream, accuracies = tasks(generator), {}
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    panels = figure.subplots(len(MODELS), len(stream), sharex=True, sharey=True)
    for row, (name, options) in zip(panels, MODELS.items(), strict=True):
        bottleneck, accuracies[name] = build(options, generator, key_batches), []
        for task, axes in enumerate(row):
            learn(bottleneck, *stream[task], steps)
            bottleneck.eval()
            answered = bottleneck.vote(bottleneck.lookup(square())).argmax(1).view(GRID, GRID)
            points, classes = (torch.cat(parts) for parts in zip(*stream[: task + 1], strict=True))
            right = bottleneck.vote(bottleneck.lookup(points)).argmax(1) == classes
            bottleneck.train()
            accuracies[name].append(float(right.double().mean()))
            colours = ListedColormap(COLOURS)
            limits = dict(cmap=colours, vmin=0, vmax=CLASSES - 1)
            axes.imshow(answered, origin="lower", extent=(0, 1, 0, 1), alpha=0.45, interpolation="nearest", **limits)
            axes.scatter(*points.T, c=classes, s=6, edgecolors="black", linewidths=0.2, **limits)
            axes.set(xticks=(), yticks=(), xlim=(0, 1), ylim=(0, 1))
            axes.set_title(f"after task {task + 1}: {accuracies[name][-1]:.0%} of all so far", fontsize=9)
        row[0].set_ylabel(name.replace(", ", ",\n").replace(" of 400", "\nof 400"), fontsize=9)
    return figure, accuracies


def main(words: Sequence[str] | None = None) -> int:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    options = parser.parse_args(words)
    figure, accuracies = toy_figure(**dict(steps=5, key_batches=5) if options.quick else {})
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "dkvb_toy.png", dpi=110)
    for name, values in accuracies.items():
        print(f"{name}: {', '.join(f'{value:.1%}' for value in values)} of all points so far after each task")
    return 0


if __name__ == "__main__":
    sys.exit(main())
