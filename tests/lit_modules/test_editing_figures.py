"""EditingFigures: what it says, writes and draws."""

import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memzoo.arch import create_model
from memzoo.lit_modules import CausalLMModule, EditingFigures, ModelEditingModule
from memzoo.lit_modules.data.facts import FactData
from memzoo.lit_modules.editing_figures import (
    cost_line,
    editing_figure,
    measure_line,
    routing_figure,
    write_records,
)
from memzoo.lit_modules.editing_metrics import EditRecord
from tests.lit_modules.editing_cases import Facts, host, module, register_dense, trainer

RECORDS = [EditRecord(2, 4, 0.5, 1.0, 1.0, 0.5, 1.0), EditRecord(0, 2, 0.25, 2.0, 0.5, 0.5, 0.0)]
MEASURED = [
    {"count": 1, "reliability": 1.0, "generalisation": 0.5, "locality": 1.0, "memory_bytes": 2**20},
    {
        "count": 2,
        "reliability": 0.25,
        "generated/reliability": 0.125,
        "generalisation": 0.5,
        "locality": 0.5,
        "memory_bytes": 2**21,
    },
]


def test_lines_have_what_was_measured_last_and_right_after_each_edit():
    last = MEASURED[-1]
    assert measure_line("reliability", last, RECORDS) == (
        "reliability: 25.0% of 2 questions after the last of 2 edits (75.0% right after each); 12.5% in full by "
        "generation"
    )
    assert measure_line("locality", last, RECORDS) == (
        "locality: 50.0% of 2 questions after the last of 2 edits (50.0% right after each)"
    )
    assert cost_line("wise", last, RECORDS) == "wise: 2.00 MiB; 3.0 steps and 1.50 s an edit"


def test_the_figure_has_what_was_measured_over_edits_and_thin_what_was_right_after_each():
    _, axes = editing_figure(MEASURED, RECORDS, title="wise")
    by_style = {(line.get_color(), line.get_marker()): line for line in axes.lines if len(line.get_xdata())}
    assert list(by_style["C0", "o"].get_xdata()) == [1, 2]
    assert list(by_style["C0", "o"].get_ydata()) == [1.0, 0.25]
    assert list(by_style["C0", "."].get_ydata()) == [0.125]
    assert list(by_style["C0", "None"].get_ydata()) == [1.0, 0.75]
    assert list(by_style["C2", "None"].get_ydata()) == [1.0, 0.5]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["reliability", "generalisation", "locality", "by generation", "right after each edit, mean"]


def test_the_routing_figure_has_every_question_and_says_how_many_are_above_the_threshold():
    ratios = {"edit": [1.5, 3.0, 1.0], "paraphrase": [], "locality": [0.0, 0.2, math.inf, 0.4]}
    _, axes = routing_figure(ratios)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["edits, 67% above", "unrelated, 25% above"]
    assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(2)
    assert axes.lines[0].get_xdata()[0] == 1


def test_the_table_has_a_row_for_every_edit(tmp_path):
    write_records(tmp_path / "edits.csv", RECORDS)
    rows = list(csv.DictReader((tmp_path / "edits.csv").open()))
    assert [row["index"] for row in rows] == ["2", "0"]
    assert rows[1] == {
        "index": "0",
        "steps": "2",
        "loss": "0.25",
        "seconds": "2.0",
        "reliability": "0.5",
        "generalisation": "0.5",
        "locality": "0.0",
        "reliability_questions": "1",
        "generalisation_questions": "1",
        "locality_questions": "1",
    }


def test_a_stream_of_facts_ends_with_lines_a_table_and_figures(tmp_path, capsys):
    data = FactData(num_facts=6, num_edits=3, num_prefixes=1, train_on="edits", batch_size=4)
    torch.manual_seed(0)
    model = create_model("transformer_tiny", vocab_size=data.vocab_size, dim=16, depth=2, num_heads=2, hidden_dim=24)
    lit = ModelEditingModule(model, editor="wise", editor_options={"max_steps": 5}, evaluate_every=2)
    run = trainer(EditingFigures(), logger=[CSVLogger(tmp_path, "run"), TensorBoardLogger(tmp_path, "run")])
    run.fit(lit, datamodule=data)
    lines = [line for line in capsys.readouterr().out.splitlines() if ":" in line]
    measured = lit.evaluations[-1]
    expected = [measure_line(name, measured, lit.records) for name in ("reliability", "generalisation", "locality")]
    assert lines[-4:] == [*expected, cost_line("wise", measured, lit.records)]
    (table,) = tmp_path.rglob("edits.csv")
    assert len(table.read_text().splitlines()) == 1 + 3
    assert {path.name for path in tmp_path.rglob("*.png")} == {"editing.png", "routing.png"}
    ratios = lit.routing()
    counts = {kind: sum(len(batch["index"]) for batch in data.questions(range(3), kind)) for kind in ratios}
    assert {kind: len(values) for kind, values in ratios.items()} == counts
    assert all(ratio > 1 for ratio in ratios["edit"])
    assert [measured["count"] for measured in lit.evaluations] == [2, 3]


def test_an_editor_without_a_router_has_no_figure_of_it(tmp_path, monkeypatch):
    register_dense(monkeypatch)
    lit = module()
    trainer(EditingFigures(), logger=CSVLogger(tmp_path, "run")).fit(lit, datamodule=Facts())
    assert lit.routing() == {}
    assert {path.name for path in tmp_path.rglob("*.png")} == {"editing.png"}


def test_another_module_is_refused():
    run = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[EditingFigures()])
    with pytest.raises(ValueError, match="edits of a ModelEditingModule, which CausalLMModule is not"):
        run.fit(CausalLMModule(host()), datamodule=Facts())
