"""MemoryFigure: what it reads, says and draws."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memzoo.lit_modules import MemoryFigure
from memzoo.lit_modules.memory_figures import accuracy_figure, read_accuracies
from tests.lit_modules.bank_module_cases import Batches, batch, module

NAMED = {
    "val/accuracy": 0.5,
    "val/generic/accuracy": 0.25,
    "val/anchor/accuracy": 0.125,
    "val/rare/accuracy": 0.75,
    "val/rare/generic/accuracy": 0.5,
    "val/rare/anchor/accuracy": 0.0,
    "val/rare/loss": 3.0,
}


def test_named_loaders_are_read_or_else_all_data():
    rare = {"fetched blocks": 0.75, "generic blocks": 0.5, "no memory": 0.0}
    assert read_accuracies(NAMED) == {"rare": rare}
    plain = {name: value for name, value in NAMED.items() if "rare" not in name}
    assert read_accuracies(plain) == {"all": {"fetched blocks": 0.5, "generic blocks": 0.25, "no memory": 0.125}}
    assert read_accuracies({"val/accuracy": 0.5}) == {}


def test_a_group_of_bars_for_each_loader():
    _, axes = accuracy_figure(read_accuracies(NAMED) | {"common": dict.fromkeys(read_accuracies(NAMED)["rare"], 1.0)})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rare", "common"]
    assert [bar.get_height() for bars in axes.containers for bar in bars] == [0.75, 1.0, 0.5, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("val", [True, False])
def test_a_fit_ends_with_a_figure_if_it_was_validated(val, tmp_path, capsys):
    loggers = [CSVLogger(tmp_path, "run"), TensorBoardLogger(tmp_path, "run")]
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = pl.Trainer(max_epochs=1, accelerator="cpu", logger=loggers, callbacks=[MemoryFigure()], **options)
    rows = batch(0, 3)
    fit.fit(module(), datamodule=Batches([rows], val=[rows] if val else []))
    drawn = list(tmp_path.rglob("memories.png"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all: right with fetched blocks")]
    assert len(drawn) == len(said) == int(val)
    if val:
        assert drawn[0].stat().st_size > 5000
        assert f"{float(fit.callback_metrics['val/anchor/accuracy']):.1%}" in said[0].rpartition("no memory ")[2]


def test_a_module_that_compares_nothing_is_refused(tmp_path):
    fit = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[MemoryFigure()], enable_checkpointing=False
    )
    with pytest.raises(ValueError, match=r"MemoryBankModule does not measure; use MemoryBankModule\(compare=True\)"):
        fit.fit(module(compare=False), datamodule=Batches([batch(0, 3)]))
