"""StreamFigure: what it says, writes and draws."""

import csv
import math

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memzoo.lit_modules import CausalLMModule, ChunkScore, StreamFigure
from memzoo.lit_modules.stream_figures import (
    bits_gained,
    by_document,
    document_line,
    held_out_note,
    perplexity_figure,
    running_perplexity,
    write_scores,
)
from tests.lit_modules.stream_cases import Stream, host, module, register_low_rank, trainer

LN2 = math.log(2)
SCORES = [  # two bits a token, then one with memory; the second document has no gain
    ChunkScore(0, 0, 0, 10, 20 * LN2, 20 * LN2),
    ChunkScore(0, 1, 10, 10, 10 * LN2, 20 * LN2),
    ChunkScore(1, 0, 0, 4, 12 * LN2, 12 * LN2),
]
PLAIN = [ChunkScore(0, 0, 0, 10, 20 * LN2, None)]


def test_perplexity_is_of_all_tokens_so_far():
    first, second = by_document(SCORES).values()
    assert running_perplexity(first) == pytest.approx([4.0, 2**1.5])
    assert running_perplexity(first, plain=True) == pytest.approx([4.0, 4.0])
    assert running_perplexity(second) == pytest.approx([8.0])
    assert [bits_gained(score) for score in SCORES] == pytest.approx([0.0, 1.0, 0.0])


def test_a_line_has_both_costs_in_the_unit_that_is_known():
    first = by_document(SCORES)[0]
    assert document_line("a.txt", first) == "a.txt: 20 tokens, 2.000 -> 1.500 bits/token"
    assert document_line("a.txt", first, bytes_per_token=2.0) == "a.txt: 20 tokens, 1.000 -> 0.750 bits/byte"
    assert document_line("a.txt", PLAIN) == "a.txt: 10 tokens, 2.000 bits/token"
    assert held_out_note(None, 2.0) == ""
    assert held_out_note(LN2 / 10, None) == "; held-out text +0.1000 bits/token"
    assert held_out_note(-LN2 / 10, 2.0) == "; held-out text -0.0500 bits/byte"


def test_the_figure_has_a_line_with_memory_and_a_dashed_one_without_for_every_document():
    _, (above, below) = perplexity_figure(SCORES, ["one", "two"], bytes_per_token=2.0, title="locas")
    drawn = [line for line in above.lines if len(line.get_xdata())]
    assert [(list(line.get_xdata()), line.get_linestyle()) for line in drawn] == [
        ([10, 20], "-"), ([10, 20], "--"), ([4], "-"), ([4], "--"),
    ]  # fmt: skip
    assert list(drawn[0].get_ydata()) == pytest.approx([4.0, 2**1.5])
    assert list(below.lines[0].get_ydata()) == pytest.approx([0.0, 0.5])
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "one",
        "two",
        "with memory",
        "without memory",
    ]
    assert "byte" in below.get_ylabel()
    assert above.get_title() == "locas"


def test_the_figure_has_one_panel_where_nothing_was_compared_and_no_legend_of_many_names():
    _, axes = perplexity_figure(PLAIN, ["one"])
    assert len(axes) == 1
    many = [ChunkScore(document, 0, 0, 4, 1.0, None) for document in range(9)]
    _, (panel,) = perplexity_figure(many, [str(number) for number in range(9)])
    assert panel.get_legend() is None
    assert len(panel.lines) == 9


def test_names_that_matplotlib_would_leave_out_are_in_the_legend():
    _, (panel,) = perplexity_figure(PLAIN, ["_pydecimal.py"])
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["_pydecimal.py"]


class Fails(Stream):
    """Something goes wrong behind the third chunk."""

    def test_dataloader(self):
        for index, batch in enumerate(super().test_dataloader()):
            if index == 3:
                raise RuntimeError("the disk is gone")
            yield batch


def test_what_was_read_before_a_failure_is_written(tmp_path, monkeypatch):
    register_low_rank(monkeypatch)
    lit = module()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer(StreamFigure(), logger=CSVLogger(tmp_path, "run")).test(lit, datamodule=Fails(), verbose=False)
    (table,) = tmp_path.rglob("stream.csv")
    assert len(table.read_text().splitlines()) == 1 + len(lit.stream) >= 3
    assert list(tmp_path.rglob("stream.png"))


def test_the_table_has_a_row_for_every_chunk(tmp_path):
    write_scores(tmp_path / "stream.csv", [*SCORES, ChunkScore(1, 1, 4, 2, 3.0, None)], ["one", "two"])
    rows = list(csv.DictReader((tmp_path / "stream.csv").open()))
    assert [row["name"] for row in rows] == ["one", "one", "two", "two"]
    assert float(rows[1]["loss_sum"]) == pytest.approx(10 * LN2)
    assert rows[3]["plain_loss_sum"] == ""


@pytest.mark.parametrize("memory", ["low_rank", None], ids=["memory", "none"])
def test_a_test_ends_with_lines_a_table_and_a_figure(memory, tmp_path, capsys, monkeypatch):
    register_low_rank(monkeypatch)
    lit = module(memory=memory)
    loggers = [CSVLogger(tmp_path, "run"), TensorBoardLogger(tmp_path, "run")]
    run = trainer(StreamFigure(), logger=loggers)
    run.test(lit, datamodule=Stream(), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("book ")]
    expected = [
        document_line(f"book {number}", own, bytes_per_token=2.0) for number, own in by_document(lit.stream).items()
    ]
    if memory is not None:
        expected = [
            line + held_out_note(lit.held_out_after[number] - lit.held_out_before, 4.0)
            for number, line in enumerate(expected)
        ]
    assert lines == expected
    (table,), (figure,) = list(tmp_path.rglob("stream.csv")), list(tmp_path.rglob("stream.png"))
    assert len(table.read_text().splitlines()) == 1 + len(lit.stream)
    assert figure.stat().st_size > 5000
    assert list(tmp_path.rglob("events.out.*"))


def test_documents_without_names_are_numbered(capsys, monkeypatch):
    register_low_rank(monkeypatch)
    trainer(StreamFigure()).test(module(retention=False), dataloaders=Stream().test_dataloader(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "bits/token" in line] == ["document 0", "document 1"]


def test_another_module_is_refused():
    run = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[StreamFigure()])
    with pytest.raises(ValueError, match="stream of a TestTimeTrainingModule, which CausalLMModule is not"):
        run.test(CausalLMModule(host()), datamodule=Stream(), verbose=False)
