"""TrainedRun: the temperature at which graph memories read."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from memzoo.lit_modules import CausalLMModule, ClassIncrementalModule
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.trained_run import TrainedRun

GRAPH = ("gmt_tiny", dict(dim=16, depth=2, num_heads=2, num_slots=6, navigation_dim=4, context=32))
DENSE = ("gpt_tiny", dict(dim=16, depth=1, num_heads=2, context=32))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMZOO_TRACEBACK", raising=False)


def save(name: str, overrides: dict, callbacks: dict | None = None) -> None:
    torch.manual_seed(0)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(CausalLMModule(name, overrides))
    trainer.save_checkpoint("run.ckpt")
    if callbacks is not None:
        stored = torch.load("run.ckpt", weights_only=True)
        torch.save(stored | {"callbacks": callbacks}, "run.ckpt")


def temperatures(**options) -> list[float]:
    cells = TrainedRun.find("run.ckpt", **options).load().cells()
    return [pytest.approx(cell.temperature.item()) for cell in cells]


def test_the_temperature_is_the_chosen_one_else_that_of_evaluation_else_the_stored_one():
    save(*GRAPH)
    assert temperatures() == [1.0, 1.0]
    assert temperatures(routing_temperature=0.2) == [0.2, 0.2]
    save(*GRAPH, callbacks={"GraphMemoryUpkeep": {"evaluation_temperature": 0.1}})
    assert temperatures() == [0.1, 0.1]
    assert temperatures(routing_temperature=0.2) == [0.2, 0.2]
    for upkeep in ({"evaluation_temperature": None}, {}):
        save(*GRAPH, callbacks={"GraphMemoryUpkeep": upkeep})
        assert temperatures() == [1.0, 1.0]


def test_both_commands_read_at_the_chosen_temperature(monkeypatch, capsys):
    save(*GRAPH)
    at = []
    load = TrainedRun.load

    def loaded(run):
        model = load(run)
        at.extend(cell.temperature.item() for cell in model.cells())
        return model

    monkeypatch.setattr(TrainedRun, "load", loaded)
    monkeypatch.setattr("memzoo.lit_modules.inspect_cli._figures", lambda reading, trained: {})
    command = ["--checkpoint", "run.ckpt", "--prompt", "ab", "--routing_temperature", "0.25"]
    assert main(["inspect", *command]) == 0
    assert main(["generate", *command, "--max_new_tokens", "2"]) == 0
    assert at == [0.25] * 4
    assert "blocks.0.ffn.temperature,scalar,0.25," in Path("inspection/signals.csv").read_text()


@pytest.mark.parametrize("command", ["inspect", "generate"])
@pytest.mark.parametrize(
    ("model", "temperature", "message"),
    [
        (GRAPH, "0", "routing_temperature=0.0"),
        (GRAPH, "-1", "routing_temperature=-1.0"),
        (DENSE, "0.1", "routing_temperature=0.1 is of graph memory cells, and model='gpt_tiny' has none; leave it out"),
    ],
)
def test_a_temperature_that_cannot_be_is_one_line(capsys, monkeypatch, command, model, temperature, message):
    save(*model)
    capsys.readouterr()
    monkeypatch.setattr(CausalLMModule, "load_from_checkpoint", None)
    options = ["--checkpoint", "run.ckpt", "--prompt", "a", f"--routing_temperature={temperature}"]
    assert main([command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_the_checkpoint_of_a_classifier_is_refused_in_one_line(command, capsys):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(ClassIncrementalModule("dkvb_digits", {"num_codebooks": 2}))
    trainer.save_checkpoint("run.ckpt")
    capsys.readouterr()
    assert main([command, "--checkpoint", "run.ckpt", "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of model='dkvb_digits', whose task is classification, and has no text to read or write" in line
