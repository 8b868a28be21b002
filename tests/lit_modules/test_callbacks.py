"""Callbacks, the progress bar, figures, and checkpoints that survive being killed."""

import io
import json
import os
from collections import OrderedDict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memzoo.lit_modules import (
    AtomicCheckpointIO,
    CausalLMModule,
    LossFigure,
    ProgressBar,
    SampleText,
    Summary,
    TextData,
    Throughput,
)
from memzoo.lit_modules.callbacks import summary_line
from memzoo.lit_modules.checkpoint import check_checkpoint
from memzoo.lit_modules.cli import main
from memzoo.lit_modules.data.book_stream import BookChunks
from memzoo.lit_modules.figures import Curve, loss_figure
from tests.lit_modules.processes import run_two

TEXT = "".join(chr(97 + (i * i) % 26) for i in range(1200))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return TextData(
        str(tmp_path / "text.txt"),
        sequence_length=16,
        batch_size=4,
        validation_fraction=0.2,
        cache_dir=tmp_path / "cache",
    )


def module() -> CausalLMModule:
    torch.manual_seed(0)
    return CausalLMModule("titans_lmm_tiny", {"dim": 16, "depth": 1, "num_heads": 1}, warmup_steps=1)


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "accelerator": "cpu", "enable_checkpointing": False}
    if not any(isinstance(callback, ProgressBar) for callback in callbacks):
        quiet["enable_progress_bar"] = False
    defaults = {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | defaults | {"num_sanity_val_steps": 0} | options))


# Throughput


def test_throughput_counts_targets_and_goes_on_after_a_resume(data, tmp_path):
    first = Throughput()
    run = trainer(first)
    run.fit(module(), datamodule=data)
    assert first.tokens == 4 * 4 * 16
    assert run.callback_metrics["train/tokens"].item() == first.tokens
    assert run.callback_metrics["train/tokens_per_second"].item() > 0
    assert run.callback_metrics["train/tokens_per_second_overall"].item() > 0
    run.save_checkpoint(tmp_path / "it.ckpt")
    second = Throughput()
    trainer(second, max_steps=6).fit(module(), datamodule=data, ckpt_path=tmp_path / "it.ckpt")
    assert second.tokens == 6 * 4 * 16


def test_throughput_measures_the_last_steps_alone(data, monkeypatch):
    clock = iter(range(0, 10_000, 2))  # each look at the clock is two seconds after the last
    monkeypatch.setattr("memzoo.lit_modules.callbacks.time.monotonic", lambda: next(clock))
    run = trainer(Throughput(window=2), val_check_interval=4, limit_val_batches=0)
    run.fit(module(), datamodule=data)
    assert run.callback_metrics["train/tokens_per_second"].item() == 4 * 16 / 2


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_loss_bits_speed_and_time_left_in_one_line(data, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    trainer(Throughput(), ProgressBar(bar_seconds=0)).fit(module(), datamodule=data)
    shown = screen.getvalue()
    assert shown.count("\n") == 1, "one bar, left once at the end"
    last = shown.rstrip().rsplit("\r", 1)[-1]
    for word in ("training|", " 4/4 [", "<00:00", "loss ", "bits/byte ", "val ", "tokens/s "):
        assert word in last
    assert "validating 1/" in shown


def test_where_there_is_no_terminal_there_are_lines_and_no_control_characters(data, capsys):
    trainer(Throughput(), ProgressBar(line_seconds=0)).fit(module(), datamodule=data)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training 1/4 [")
    assert lines[-1].startswith("training 4/4 [")
    assert ", val " in lines[-1]
    assert not any("\r" in line or "\x1b" in line for line in lines)
    assert len(lines) == len(set(lines))


def test_no_line_is_shown_before_its_time(data, capsys):
    trainer(ProgressBar(line_seconds=3600)).fit(module(), datamodule=data)
    steps = [line.split(" [")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(set(steps)) == ["training 2/4", "training 4/4"]  # after each validation and at the end


@pytest.mark.parametrize(("command", "word"), [("validate", "validating"), ("test", "testing"), ("predict", "predict")])
def test_evaluation_has_a_bar_of_its_own(data, capsys, command, word):
    getattr(trainer(ProgressBar(line_seconds=0)), command)(module(), datamodule=data)
    assert f"{word}" in capsys.readouterr().out


def test_a_stream_is_counted_in_tokens(capsys):
    trainer(ProgressBar(line_seconds=0)).test(lit := StreamModule(), datamodule=Books(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" [")[0] for line in lines[:4]] == [f"testing {done}/15" for done in (6, 12, 13, 15)]
    assert lines[0].endswith(", so far so good]")
    trainer(ProgressBar(line_seconds=0), limit_test_batches=2).test(lit, datamodule=Books(), verbose=False)
    assert capsys.readouterr().out.startswith("testing 1/2 ["), "batches, where not all of them are read"


class Books(pl.LightningDataModule):
    """Two streamed books, of 14 and 3 tokens."""

    test_tokens = 15

    def test_dataloader(self):
        return torch.utils.data.DataLoader(BookChunks([range(14), range(3)], chunk_length=6, window=8))


class StreamModule(pl.LightningModule):
    def test_step(self, batch, batch_idx):
        return {"note": "so far so good"}


def test_a_disabled_bar_is_silent(data, capsys):
    bar = ProgressBar(line_seconds=0)
    bar.disable()
    trainer(bar).fit(module(), datamodule=data)
    assert capsys.readouterr().out == ""


# Samples


def test_the_sample_is_seeded_and_leaves_training_alone(data, capsys):
    def weights(*callbacks):
        lit = module()
        trainer(*callbacks).fit(lit, datamodule=data)
        return lit.state_dict() | {"randomness": torch.get_rng_state()}

    plain = weights()
    sampled = weights(SampleText("ab", max_new_tokens=8, every_validation=True))
    torch.testing.assert_close(sampled, plain, rtol=0, atol=0)
    first = capsys.readouterr().out
    assert [line for line in first.splitlines() if "sample after" in line] == [
        "--- sample after 2 steps ---",
        "--- sample after 4 steps ---",
    ]
    weights(SampleText("ab", max_new_tokens=8, every_validation=True))
    assert capsys.readouterr().out == first


def test_sampling_leaves_the_mode_of_the_module(data):
    lit, sampler = module(), SampleText("ab", max_new_tokens=1)
    run = trainer(sampler)
    run.fit(lit, datamodule=data)
    for mode in (True, False):
        lit.train(mode)
        sampler.sample(run, lit)
        assert lit.training is mode


def test_a_sample_needs_a_prompt_and_a_tokenizer(data):
    with pytest.raises(ValueError, match="prompt=''"):
        SampleText("")
    plain = pl.LightningDataModule()
    plain.train_dataloader = data.train_dataloader
    with pytest.raises(ValueError, match="SampleText needs encode"):
        trainer(SampleText(), val_check_interval=1).fit(module(), datamodule=plain)


def positions(context: int) -> CausalLMModule:
    overrides = {"dim": 16, "depth": 1, "num_heads": 1, "context": context}
    return CausalLMModule("gpt_tiny", overrides, warmup_steps=1)


@pytest.mark.parametrize(("prompt", "new"), [("ab", 15), ("a" * 15, 2), ("a" * 16, 1)])
def test_a_sample_is_as_long_as_the_context_allows(data, prompt, new):
    sampler, lit = SampleText(prompt, max_new_tokens=99), positions(16)
    lit.model.generate = lambda tokens, count, generate=lit.model.generate, **options: (
        counts.append(count),
        generate(tokens, count, **options),
    )[1]
    counts = []
    trainer(sampler).fit(lit, datamodule=data)
    assert counts == [new]
    sampler.max_new_tokens = 1
    sampler.sample(lit.trainer, lit)
    assert counts == [new, 1]


def test_a_prompt_without_room_is_refused_before_training(data):
    lit = positions(16)
    with pytest.raises(ValueError, match=r"prompt='a+' has 17 tokens, the model has context=16, .*shorter prompt"):
        trainer(SampleText("a" * 17)).fit(lit, datamodule=data)
    assert lit.trainer.global_step == 0


# Several devices


def fit_recipe(folder: Path) -> None:
    """Train by a recipe, with all its callbacks, a model that is small."""
    sizes = [f"--model.overrides.{name}" for name in ("dim=8", "depth=1", "num_heads=1", "num_slots=4", "context=32")]
    data = [f"--data.{name}" for name in ("paths=text.txt", "cache_dir=cache", "sequence_length=32", "batch_size=2")]
    steps = [f"--trainer.{name}" for name in ("max_steps=2", "val_check_interval=1", "limit_val_batches=1")]
    devices = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    os.chdir(folder)
    arguments = [*sizes, *data, *steps, *devices, "--trainer.log_every_n_steps=1"]
    assert main(["fit", "--config", "gmt/tiny.yaml", *arguments]) == 0


@pytest.mark.slow  # starts two processes
def test_a_recipe_comes_to_its_end_on_two_devices(tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 100)
    run_two(fit_recipe, tmp_path)
    [summary] = (tmp_path / "runs").rglob("summary.json")
    outcome = json.loads(summary.read_text())
    assert (outcome["steps"], outcome["tokens"]) == (2, 2 * 2 * 2 * 32)
    assert {file.name for file in summary.parent.iterdir()} >= {"loss.png", "metrics.csv"}


# Summary, figure

OUTCOME = {
    "model": "ours",
    "steps": 3,
    "tokens": 2_000_000,
    "val_bits_per_byte": 1.8,
    "unigram_bits_per_byte": 4.5,
}
BASELINE = OUTCOME | {"model": "theirs", "val_bits_per_byte": 2.0}


def test_the_summary_is_one_line_that_compares():
    assert summary_line(OUTCOME) == ("ours: 1.800 bits/byte on validation after 2,000,000 tokens; unigrams need 4.500")
    assert summary_line(OUTCOME, BASELINE).endswith("; 10.0% below theirs's 2.000 after the same tokens")
    other = BASELINE | {"tokens": 1_000_000, "val_bits_per_byte": 1.6, "unigram_bits_per_byte": 4.6}
    assert summary_line(OUTCOME, other).endswith(
        "; 12.5% above theirs's 1.600 after 1,000,000 tokens, recorded on another text"
    )


def test_a_run_leaves_its_summary_and_its_figure(data, tmp_path, capsys):
    loggers = [CSVLogger(tmp_path, "run", version=0), TensorBoardLogger(tmp_path, "run", version=0)]
    run = trainer(Throughput(), LossFigure(), Summary(), logger=loggers, log_every_n_steps=1)
    run.fit(module(), datamodule=data)
    folder = tmp_path / "run" / "version_0"
    outcome = json.loads((folder / "summary.json").read_text())
    assert outcome["model"] == "titans_lmm_tiny"
    assert outcome["tokens"] == 4 * 4 * 16
    assert outcome["val_bits_per_byte"] == run.callback_metrics["val/bits_per_byte"].item()
    held_out = data.validation_rows
    targets = torch.cat([held_out[i]["tokens"][1:] for i in range(len(held_out))])
    frequency = targets.bincount().double() / len(targets)
    entropy = -(frequency * frequency.clamp_min(1e-30).log2()).sum().item()
    assert outcome["unigram_bits_per_byte"] == pytest.approx(entropy, rel=1e-6)
    assert summary_line(outcome) in capsys.readouterr().out
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    validation = Curve.read(folder / "metrics.csv", "val/bits_per_byte")
    assert validation.tokens == [2 * 4 * 16, 4 * 4 * 16]
    assert validation.values[-1] == pytest.approx(outcome["val_bits_per_byte"])
    assert Curve.read(folder / "metrics.csv", "never/logged").values == []


def test_a_figure_needs_a_csv_log(data):
    with pytest.raises(ValueError, match="LossFigure draws from the CSV log"):
        trainer(LossFigure()).fit(module(), datamodule=data)


def test_an_unrecorded_reference_is_refused():
    with pytest.raises(ValueError, match="recipe='titans/lmm_340m' has no recorded outcome"):
        Summary("titans/lmm_340m")
    with pytest.raises(ValueError, match="did you mean 'transformer/tiny'"):
        LossFigure("transformer/tinny")


def test_the_loss_figure_has_both_curves_and_every_level():
    figure, axes = loss_figure(
        Curve([1e6, 2e6], [3.0, 2.0]), Curve([2e6], [2.1]), levels={"unigrams": 4.5, "baseline": 2.2}, title="it"
    )
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training batches", "validation", "unigrams: 4.500", "baseline: 2.200"]
    assert axes.get_title() == "it"
    assert figure.axes == [axes]


# Checkpoints


class Probe:
    """Looks, from inside a save that is pickling it, at what a kill at this moment would leave."""

    def __init__(self, look):
        self.look = look

    def __reduce__(self):
        self.look()
        return OrderedDict, ()  # which loading allows


def test_at_every_moment_of_a_save_the_last_checkpoint_is_whole(tmp_path, monkeypatch):
    path, writer, found = tmp_path / "last.ckpt", AtomicCheckpointIO(), []

    def look(*_):
        found.append(torch.load(path, weights_only=True)["step"])

    writer.save_checkpoint({"step": 1, "weight": torch.ones(100)}, path)
    monkeypatch.setattr("memzoo.lit_modules.checkpoint.os.fsync", look)  # all is written, not yet renamed
    writer.save_checkpoint({"step": 2, "weight": torch.zeros(100), "probe": Probe(look)}, path)
    assert found == [1, 1]
    assert torch.load(path, weights_only=True)["step"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_save_left_is_overwritten(tmp_path):
    (tmp_path / "last.ckpt.partial").write_text("half a checkpoint")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_missing_or_broken_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ckpt_path='.*no.ckpt' does not exist"):
        check_checkpoint("ckpt_path", str(tmp_path / "no.ckpt"))
    broken = tmp_path / "broken.ckpt"
    torch.save({"weight": torch.ones(1000)}, broken)
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        check_checkpoint("ckpt_path", str(broken))
    broken.write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        check_checkpoint("ckpt_path", str(broken))
