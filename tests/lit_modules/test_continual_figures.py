"""ContinualFigures: what it says, writes and draws."""

import csv
import json
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from memzoo.lit_modules import ContinualEval, ContinualFigures, Replay
from memzoo.lit_modules.continual_callbacks import Evaluation
from memzoo.lit_modules.continual_figures import (
    matrix_figure,
    matrix_scalars,
    stream_line,
    trace_figure,
    trace_scalars,
    usage_figure,
    write_trace,
)
from tests.lit_modules.continual_cases import CLASSES, Seen, module, stream, trainer

NAN = math.nan
MATRIX = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]
TRACE = [
    Evaluation(0, -1, (0.5, NAN)),
    Evaluation(4, 0, (0.9, 0.1)),
    Evaluation(6, 1, (0.3, 0.2)),
    Evaluation(8, 1, (0.6, 0.5)),
    Evaluation(10, 1, (0.8, 0.7)),
]


def test_the_matrix_figure_has_what_was_measured_and_begins_before_training():
    _, axes = matrix_figure([*MATRIX[:2], [0.5, NAN, 0.9], [0.1, 0.2, 0.3]], title="a model")
    values = axes.images[0].get_array()
    assert values.shape == (4, 3)
    assert list(values[0]) == [0.1, 0.2, 0.3]
    assert [text.get_text() for text in axes.texts[:4]] == ["10", "20", "30", "90"]
    assert len(axes.texts) == 11  # one was not measured
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "0", "1", "2"]
    assert matrix_figure(MATRIX)[1].images[0].get_array().shape == (3, 3)
    assert not matrix_figure(torch.rand(20, 20))[1].texts


def test_the_trace_figure_has_boundaries_and_minima_of_tasks_that_were_left():
    _, axes = trace_figure(TRACE)
    lines = {style: [line for line in axes.lines if line.get_linestyle() == style] for style in ("-", "--", ":")}
    assert [list(line.get_ydata()) for line in lines["-"]] == [[0.5, 0.9, 0.3, 0.6, 0.8], [0.1, 0.2, 0.5, 0.7]]
    assert list(lines["-"][1].get_xdata()) == [4, 6, 8, 10]
    assert [line.get_xdata()[0] for line in lines["--"]] == [0, 4]
    assert [line.get_ydata()[0] for line in lines[":"]] == [0.3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["task 0", "task 1"]


def test_the_usage_figure_counts_pairs_and_says_how_many_were_never_fetched():
    _, axes = usage_figure(torch.tensor([[0, 1, 5], [100, 0, 5]]))
    assert sum(patch.get_height() for patch in axes.patches) == 4
    assert axes.get_legend().get_texts()[0].get_text() == "6 pairs, 33.3% never"
    usage_figure(torch.zeros(2, 3))


def test_scalars_carry_the_names_of_their_modes():
    scalars = matrix_scalars([*MATRIX, [0.1] * 3], [1, 1, 2])
    assert scalars["forgetting"] == pytest.approx({"chaudhry": 0.25, "clipped": 0.25, "first_minus_last": 0.25})
    assert scalars["backward_transfer"] == pytest.approx({"gem": -0.25, "all_pairs": -0.8 / 3})
    assert scalars["average_accuracy"] == pytest.approx({"macro": 0.7, "micro": 0.75})
    assert scalars["average_incremental_accuracy"]["macro"] == pytest.approx(2.3 / 3)
    assert scalars["forward_transfer"] == pytest.approx(0.05)
    assert scalars["learning_accuracy"] == pytest.approx(2.6 / 3)
    assert scalars["lower_triangle_accuracy"] == pytest.approx(4.4 / 6)
    anytime = trace_scalars(TRACE, 2)
    assert anytime["minimum_accuracy"] == 0.3
    assert anytime["worst_case_accuracy"] == pytest.approx(0.5)
    assert anytime["windowed_forgetting"] == pytest.approx(0.3)
    assert anytime["windowed_plasticity"] == pytest.approx((0.4 + 0.3) / 2)
    assert anytime["average_anytime_accuracy"] == pytest.approx((0.9 + 0.25 + 0.55 + 0.75) / 4)
    assert trace_scalars([], 2) == {}


def test_the_line_says_how_good_and_how_forgetful():
    results = {"scalars": matrix_scalars(MATRIX, [1, 1, 1]), "num_tasks": 3, "anytime": {}, "rho": None}
    line = "Net: 70.0% on all 3 tasks after the last (86.7% right after each); forgetting (Chaudhry) 25.0%"
    assert stream_line("Net", results) == line
    results |= {"anytime": {"minimum_accuracy": 0.3}, "rho": 2}
    assert stream_line("Net", results) == f"{line}; at worst 30.0% of a task left, every 2 updates"
    results["scalars"]["forgetting"]["chaudhry"] = None
    assert "forgetting (Chaudhry) -" in stream_line("Net", results)


def test_the_table_has_a_row_for_every_evaluation(tmp_path):
    write_trace(tmp_path / "trace.csv", TRACE)
    rows = list(csv.DictReader((tmp_path / "trace.csv").open()))
    assert rows[0] == {"step": "0", "trained": "-1", "task_0": "0.5", "task_1": ""}
    assert [row["task_1"] for row in rows] == ["", "0.1", "0.2", "0.5", "0.7"]


class Bottleneck(nn.Module):
    """A model with a counter of uses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)
        self.bottleneck = nn.Module()
        self.bottleneck.register_buffer("usage", torch.tensor([[0, 3], [2, 1]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def test_a_stream_ends_with_a_line_results_a_table_and_figures(tmp_path, capsys):
    data, measured = stream(seed=3), ContinualEval(every_n_steps=2, samples=4, window=5)
    lit = module(Bottleneck(), strategy=Replay(7))
    logger = [CSVLogger(tmp_path, "run"), TensorBoardLogger(tmp_path, "board")]
    run = trainer(data, measured, ContinualFigures(), logger=logger, log_every_n_steps=1)
    run.fit(lit, data)
    (path,) = tmp_path.rglob("results.json")
    results = json.loads(path.read_text())
    assert {file.name for file in path.parent.glob("*.png")} == {"matrix.png", "trace.png", "usage.png"}
    assert stream_line("Bottleneck", results) in capsys.readouterr().out
    assert results["matrix"] == measured.matrix[:3].tolist()
    assert results["before"] == measured.matrix[3].tolist()
    assert results["class_order"] == data.class_order
    assert results["task_classes"] == data.task_classes
    assert results["seeds"]["data"] == 3
    assert results["strategy"] == {"name": "Replay", "capacity": 7, "replayed": None, "seed": 0}
    assert (results["rho"], results["window"], results["samples"]) == (2, 5, 4)
    assert results["sizes"] == [6, 6, 6]
    assert results["versions"]["torch"] == torch.__version__
    assert results["anytime"] == trace_scalars(measured.trace, 5)
    assert (results["train_logits"], results["eval_logits"], results["scenario"]) == ("all", "all", "class")
    assert len((path.parent / "trace.csv").read_text().splitlines()) == 1 + len(measured.trace)
    assert results["online_accuracy"] == lit.online_accuracy


def test_what_is_not_defined_is_null_and_without_a_trace_there_is_none(tmp_path):
    data = stream(num_tasks=1)
    logger = CSVLogger(tmp_path, "run")
    trainer(data, ContinualEval(), ContinualFigures(), logger=logger, log_every_n_steps=1).fit(module(), data)
    (path,) = tmp_path.rglob("results.json")
    results = json.loads(path.read_text())
    assert results["scalars"]["forgetting"] == dict.fromkeys(("chaudhry", "clipped", "first_minus_last"))
    assert results["anytime"] == {}
    assert {file.name for file in path.parent.glob("*.png")} == {"matrix.png"}
    assert not (path.parent / "trace.csv").exists()


def test_a_run_stopped_in_its_first_task_has_nothing_to_show(capsys):
    class Stop(Seen):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.should_stop = True

    data = stream()
    trainer(data, Stop(), ContinualEval(), ContinualFigures()).fit(module(), data)
    assert "no task was trained to its end" in capsys.readouterr().out


def test_without_anything_measured_it_is_refused():
    data = stream()
    with pytest.raises(ValueError, match="ContinualFigures shows what ContinualEval measures; add that callback"):
        trainer(data, ContinualFigures()).fit(module(), data)
