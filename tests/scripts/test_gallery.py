"""The figures of the documentation are drawn by a script, and are small."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def gallery() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("gallery")
    sys.path.remove(str(SCRIPTS))


def test_the_script_writes_a_small_file_for_every_figure(gallery, tmp_path, capsys):
    assert gallery.main(["--quick", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in gallery.FIGURES.iterdir())
    assert "of all points so far after each task" in capsys.readouterr().out
    assert all(path.stat().st_size < 300_000 for path in gallery.FIGURES.iterdir())


def test_the_toy_has_two_classes_a_task_where_the_figure_says(gallery):
    stream = gallery.tasks(torch.Generator().manual_seed(1))
    assert [sorted(set(classes.tolist())) for _, classes in stream] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    for (points, classes), means in zip(stream, gallery.MEANS, strict=True):
        for label, mean in zip((classes.min(), classes.max()), means, strict=True):
            assert torch.allclose(points[classes == label].mean(0), torch.tensor(mean), atol=0.03)


def test_the_toy_forgets_nothing_when_it_learns(gallery):
    _, accuracies = gallery.toy_figure(steps=150, key_batches=20)
    assert [len(values) for values in accuracies.values()] == [4, 4]
    assert all(min(values) > 0.97 for values in accuracies.values())


def test_the_grid_runs_row_by_row_from_below(gallery):
    points = gallery.square().view(gallery.GRID, gallery.GRID, 2)
    assert torch.equal(points[0, :, 1], points[0, :1, 1].expand(gallery.GRID))
    assert (points[0, 1:, 0] > points[0, :-1, 0]).all()
    assert (points[1:, 0, 1] > points[:-1, 0, 1]).all()
