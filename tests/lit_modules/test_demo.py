"""The demo, from the recipe as it is: shortened here, in full when slow tests are asked for."""

import json
from pathlib import Path

import pytest

from memzoo.lit_modules.cli import main
from memzoo.recipes import read_reference

RECIPE = "titans/mac_tiny.yaml"
SHORT = [
    *("--data.paths", "text.txt", "--data.cache_dir", "cache", "--data.sequence_length", "32"),
    *("--trainer.max_steps", "30", "--trainer.val_check_interval", "15"),
    *("--model.learning_rate", "0.02", "--model.warmup_steps", "2"),
    *("--model.overrides.dim", "32", "--model.overrides.depth", "1", "--model.overrides.num_heads", "1"),
]


def run(capsys, *options: str) -> tuple[Path, str]:
    """Run the recipe in the working folder; return the run's folder and what was printed."""
    assert main(["fit", "--config", RECIPE, *options]) == 0
    (folder,) = Path("runs/titans_mac_tiny").iterdir()
    return folder, capsys.readouterr().out


def test_the_demo_leaves_everything_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("def f(x):\n    return x\n" * 400)
    folder, printed = run(capsys, *SHORT)
    names = {path.name.partition(".tfevents")[0] for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "events.out", "loss.png", "summary.json", "checkpoints"} <= names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    outcome = json.loads((folder / "summary.json").read_text())
    assert outcome["steps"] == 30
    assert outcome["val_bits_per_byte"] < outcome["unigram_bits_per_byte"]
    lines = printed.splitlines()
    assert lines[-2] == "---", "the sample ends"
    assert "--- sample after 30 steps ---" in lines
    assert lines[lines.index("--- sample after 30 steps ---") + 1].startswith("def ")
    assert lines[-1].startswith("titans_mac_tiny: ")
    assert "transformer_tiny's" in lines[-1]
    assert main(["generate", "--checkpoint", str(folder / "checkpoints" / "best.ckpt"), "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    saved = str(folder / "config.yaml")
    assert main(["validate", "--config", saved, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]) == 0


@pytest.mark.slow
def test_the_demo_reaches_what_was_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, printed = run(capsys)
    outcome, recorded = json.loads((folder / "summary.json").read_text()), read_reference("titans/mac_tiny")
    assert outcome["tokens"] == recorded["tokens"]
    assert outcome["val_bits_per_byte"] == pytest.approx(recorded["val_bits_per_byte"], rel=0.05)
    assert "the same tokens" in printed.splitlines()[-1]
