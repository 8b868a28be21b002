"""RecallData: rows are what the paper says they are, and Lightning sees the same ones every time."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from memzoo.arch import create_model
from memzoo.lit_modules import CausalLMModule, RecallData
from memzoo.lit_modules.data.recall import RecallTask
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens

SMALL = {"train_sizes": [(16, 2)], "vocab_size": 32, "train_rows": 40, "val_rows": 10, "batch_size": 8}


def queries(row: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Return the position of every query of a row and what is to be answered."""
    labels = row["labels"].tolist()
    return [(t - 1, answer) for t, answer in enumerate(labels) if answer != NOT_SCORED]


def rows(task: RecallTask, count: int = 50, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    drawn = task.rows(count, seed)
    for tokens, labels in zip(drawn["tokens"], drawn["labels"], strict=True):
        yield {"tokens": tokens, "labels": labels}


# A row

TASKS = [
    RecallTask(vocab_size=32),
    RecallTask(33, 4, vocab_size=16, num_updates=4, min_gap=9),
    RecallTask(64, 4, vocab_size=18, num_updates=2, filler="random", power=1.0),
    RecallTask(72, 3, vocab_size=16, num_updates=1, episode_length=18, filler="random"),
]


@pytest.mark.parametrize("task", TASKS)
def test_a_dictionary_of_what_was_read_answers_every_query(task: RecallTask):
    length, bound = task.episode_length or task.sequence_length, 2 * (task.num_pairs + task.num_updates)
    for row in rows(task):
        tokens, asked = row["tokens"].tolist(), queries(row)
        assert len(tokens) == task.sequence_length + 1
        assert len(asked) == task.num_pairs * task.sequence_length // length
        for position, answer in asked:
            start = position - position % length
            assert position >= start + bound, "the pairs come first"
            memory = dict(zip(tokens[start : start + bound : 2], tokens[start + 1 : start + bound : 2], strict=True))
            assert memory[tokens[position]] == answer


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_are_apart_and_come_once(task: RecallTask):
    length, half = task.episode_length or task.sequence_length, task.vocab_size // 2
    bound = 2 * (task.num_pairs + task.num_updates)
    for row in rows(task):
        for episode in row["tokens"][:-1].split(length):
            keys, values = episode[:bound:2].tolist(), episode[1:bound:2].tolist()
            assert all(0 < key < half <= value < task.vocab_size for key, value in zip(keys, values, strict=True))
            assert len(set(keys[: task.num_pairs])) == task.num_pairs
            assert set(keys[task.num_pairs :]) <= set(keys[: task.num_pairs])
            assert len(set(keys[task.num_pairs :])) == task.num_updates
            assert len(set(values)) == len(values)


def test_an_answer_is_not_shown():
    for row in rows(RecallTask(vocab_size=32)):
        assert all(row["tokens"][position + 1] != answer for position, answer in queries(row))


def test_every_key_and_value_is_drawn_equally_often():
    tokens = RecallTask(24, 6, vocab_size=20).rows(9000, 0)["tokens"]
    for drawn, choices in ((tokens[:, 0:12:2], range(1, 10)), (tokens[:, 1:12:2], range(10, 20))):
        shares = torch.bincount(drawn.flatten(), minlength=20)[list(choices)] / drawn.numel()
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(choices)), rtol=0.05, atol=0)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_the_first_query_is_drawn_from_a_power_law_over_every_second_place(power: float):
    task = RecallTask(32, 1, vocab_size=32, min_gap=10, power=power)
    places = torch.tensor([position for row in rows(task, 20_000) for position, _ in queries(row)])
    offset = places - (2 + task.min_gap)
    assert (offset % 2 == 0).all()
    expected = torch.arange(1, 11, dtype=torch.float64) ** (power - 1)
    measured = torch.bincount(offset // 2, minlength=10) / len(offset)
    torch.testing.assert_close(measured.double(), expected / expected.sum(), rtol=0, atol=0.015)


def test_queries_of_a_row_have_places_of_their_own_among_all_that_there_are():
    assert {len(queries(row)) for row in rows(RecallTask(16, 4, vocab_size=16))} == {4}  # as many as there are places
    [gapped] = {min(queries(row))[0] for row in rows(RecallTask(37, 4, vocab_size=16, min_gap=20))}
    assert gapped == 8 + 20


@pytest.mark.parametrize("filler", ["zero", "random"])
def test_filler_is_zero_or_any_token(filler: str):
    rest = torch.cat([row["tokens"][2:-1] for row in rows(RecallTask(64, 1, vocab_size=8, filler=filler), 100)])
    counts = torch.bincount(rest, minlength=8) / len(rest)
    if filler == "zero":
        assert counts[0] == pytest.approx(61 / 62)
    else:
        torch.testing.assert_close(counts, torch.full((8,), 1 / 8), atol=0.02, rtol=0)


def test_the_gap_is_what_a_stack_of_windows_cannot_bridge():
    """Inputs at the pairs have no influence on the logits at any query; with a gap one shorter they have."""

    def influence(min_gap: int) -> float:
        torch.manual_seed(0)
        model = windowed(window=5, depth=2)
        task = RecallTask(8 + min_gap, 2, vocab_size=16, min_gap=min_gap)  # as many places as queries
        tokens, first = task.rows(1, 0)["tokens"][:, :-1], 4 + min_gap
        other = tokens.clone()
        other[:, :4] = tokens[:, :4] % 15 + 1
        return (model(tokens)[0] - model(other)[0])[0, first].abs().max().item()

    assert influence(2 * (5 - 1)) == 0
    assert influence(2 * (5 - 1) - 1) > 0


def windowed(*, window: int, depth: int) -> torch.nn.Module:
    return create_model("transformer_tiny", vocab_size=16, dim=16, depth=depth, num_heads=1, window=window).double()


# Splits


def batches(loader: Any) -> list[Tensor]:
    return [torch.stack([batch["tokens"], batch["labels"]]) for batch in loader]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rows_depend_on_the_seed_alone():
    def first_epoch(**options: Any) -> list[Tensor]:
        return batches(RecallData(**SMALL | options).train_dataloader())

    assert equal(first_epoch(), first_epoch())
    assert equal(first_epoch(), first_epoch(num_workers=1))
    assert not equal(first_epoch(), first_epoch(seed=1))


def test_an_epoch_has_the_same_batches_in_another_order():
    loader = RecallData(**SMALL).train_dataloader()
    first = batches(loader)
    loader.sampler.set_epoch(1)
    second = batches(loader)
    assert [len(batch[0]) for batch in first] == [8] * 5
    assert not equal(first, second)
    assert all(any(torch.equal(a, b) for b in second) for a in first)


def test_no_row_is_in_two_splits():
    data = RecallData([(16, 2)], vocab_size=512, train_rows=3000, val_rows=3000)
    loaders = (data.train_dataloader(), data.val_dataloader()["16x2"], data.test_dataloader()["16x2"])
    splits = [{tuple(row) for batch in loader for row in batch["tokens"].tolist()} for loader in loaders]
    assert [len(split) for split in splits] == [3000] * 3
    assert len(set.union(*splits)) == 9000


def test_sizes_are_mixed_in_training_and_apart_in_validation():
    data = RecallData([(16, 2), (32, 4)], [(64, 4), (64, 8)], train_rows=[32, 20], val_rows=10, batch_size=8)
    shapes = [tuple(batch["tokens"].shape) for batch in data.train_dataloader()]
    assert sorted(shapes) == [(4, 33), *[(8, 17)] * 4, *[(8, 33)] * 2]
    assert shapes != sorted(shapes)
    loaders = data.val_dataloader()
    assert list(loaders) == ["64x4", "64x8"]
    for pairs, loader in zip((4, 8), loaders.values(), strict=True):
        assert [len(batch["tokens"]) for batch in loader] == [8, 2]
        assert all(NextTokens.of(batch).counted.sum(1).eq(pairs).all() for batch in loader)


def test_a_validation_size_has_the_same_rows_beside_others_as_alone():
    beside = RecallData(**SMALL, val_sizes=[(32, 4), (16, 2)]).val_dataloader()["16x2"]
    assert equal(batches(beside), batches(RecallData(**SMALL).val_dataloader()["16x2"]))


def test_the_mixture_of_the_docstring_is_zoology_s():
    [code] = re.findall(r"RecallData\(\n.*?\n +\)", inspect.getdoc(RecallData), re.DOTALL)
    data = eval(code)
    assert list(data.train_tasks) == ["64x4", "128x8", "256x16", "256x32", "256x64"]
    assert data.train_rows == [100_000, 20_000, 20_000, 20_000, 20_000]
    assert list(data.val_tasks) == ["64x4", "64x8", "64x16", "128x32", "256x64", "512x128", "1024x256"]
    assert (data.val_rows, data.batch_size) == (1000, 256)
    for size, task in data.val_tasks.items():
        length, pairs = map(int, size.split("x"))
        assert task == RecallTask(length, pairs, vocab_size=8192, power=0.01, filler="random")
        assert NextTokens.of(task.rows(2, 0)).counted.sum(1).eq(pairs).all()


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16)])
def test_the_defaults_are_zoology_s_figure_2(length: int, pairs: int):
    data = RecallData([(length, pairs)])
    [task] = data.train_tasks.values()
    assert task == RecallTask(length, pairs, vocab_size=8192, power=0.01, filler="zero", min_gap=0, num_updates=0)
    assert (data.train_rows, data.val_rows) == ([100_000], 3_000)
    assert (task.rows(2, 0)["tokens"][:, : 2 * pairs : 2] < 4096).all()


# With Lightning


def trainer(tmp_path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **quiet, **options)


def module(seed: int = 0, **options: Any) -> CausalLMModule:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "dim": 16, "depth": 1, "num_heads": 1, "chunk_size": 4}
    return CausalLMModule("titans_lmm_tiny", sizes, **{"warmup_steps": 1} | options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_validation_measures_every_size_and_all_together(tmp_path: Path):
    lit, data = module(), RecallData(**SMALL, val_sizes=[(16, 2), (32, 4)])
    measured, again = trainer(tmp_path).validate(lit, datamodule=data, verbose=False)  # one for each loader
    assert measured == again
    assert set(measured) == {
        f"val/{size}{metric}" for size in ("", "16x2/", "32x4/") for metric in ("loss", "perplexity", "accuracy")
    }
    losses, hits = {}, {}
    for name, loader in data.val_dataloader().items():
        pieces = [NextTokens.of(batch) for batch in loader]
        with torch.no_grad():
            logits = [lit(piece.inputs)[0] for piece in pieces]
        losses[name] = torch.cat([p.losses(x)[p.counted] for p, x in zip(pieces, logits, strict=True)])
        hits[name] = torch.cat([p.hits(x)[p.counted] for p, x in zip(pieces, logits, strict=True)]).double()
        assert measured[f"val/{name}/loss"] == pytest.approx(losses[name].mean().item(), rel=1e-5)
        assert measured[f"val/{name}/accuracy"] == pytest.approx(hits[name].mean().item())
    assert measured["val/loss"] == pytest.approx(torch.cat(list(losses.values())).mean().item(), rel=1e-5)
    assert measured["val/accuracy"] == pytest.approx(torch.cat(list(hits.values())).mean().item())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_answers_are_learned_from(tmp_path: Path):
    """What the model is trained to predict at other places may be anything: the gradients are the same."""
    [batch] = RecallData(**SMALL | {"train_rows": 8}).train_dataloader()
    pieces, model = NextTokens.of(batch), module().model
    logits = model(pieces.inputs)[0].detach().requires_grad_()
    pieces.mean(pieces.losses(logits)).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, batch["labels"][:, 1:] != NOT_SCORED)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path):
    def run(steps: int, path: Path | None = None, *callbacks: pl.Callback) -> CausalLMModule:
        lit = module(schedule_steps=7)
        fit = trainer(tmp_path, *callbacks, max_steps=steps, max_epochs=-1, enable_checkpointing=bool(callbacks))
        fit.fit(lit, datamodule=RecallData(**SMALL), ckpt_path=path)
        return lit

    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    run(3, None, keep)
    resumed, straight = run(7, tmp_path / "mid.ckpt"), run(7)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_stage_runs_and_a_checkpoint_rebuilds_the_data(tmp_path: Path):
    data, lit = RecallData(**SMALL, val_sizes=[(16, 2), (32, 4)], filler="random"), module()
    fit = trainer(tmp_path, overfit_batches=2, max_epochs=1)
    fit.fit(lit, datamodule=data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert fit.test(lit, datamodule=data, verbose=False)[0]["test/32x4/loss"] > 0
    predicted = trainer(tmp_path).predict(lit, datamodule=data)
    assert [len(loader) for loader in predicted] == [2, 2]
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = RecallData.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.train_tasks, again.val_tasks, again.batch_size) == (data.train_tasks, data.val_tasks, 8)


def test_the_command_line_sets_every_kind_of_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(RecallData, "data")
    words = ["--data.train_sizes", "[[64, 4], [128, 8]]", "--data.train_rows", "[100, 50]", "--data.val_sizes"]
    parsed = parser.parse_args([*words, "[[256, 4]]", "--data.filler", "random", "--data.episode_length", "64"])
    data = RecallData(**parsed.data.as_dict())
    assert list(data.train_tasks) == ["64x4", "128x8"]
    assert data.val_tasks == {"256x4": RecallTask(256, 4, episode_length=64, filler="random")}


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 15}, r"sequence_length=15 is too short for num_pairs=4 and num_updates=0.*at least 16"),
        ({"sequence_length": 64, "min_gap": 60}, r"min_gap=60; use at least 76"),
        ({"sequence_length": 64, "episode_length": 8}, "episode_length=8 is too short"),
        ({"sequence_length": 64, "episode_length": 24}, "sequence_length=64 is not divisible by episode_length=24"),
        ({"vocab_size": 9}, r"vocab_size=9 has too few keys or values for num_pairs=4.*at least 10"),
        ({"vocab_size": 10, "num_updates": 2}, "vocab_size=10 has too few.*at least 12"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"num_updates": 5}, r"num_updates=5 is not within \[0, num_pairs=4\]"),
        ({"min_gap": -1}, "min_gap=-1 is negative"),
        ({"power": 0.0}, r"power=0\.0 is not positive"),
        ({"power": float("nan")}, "power=nan is not positive"),
        ({"filler": "noise"}, "filler='noise' is not one of 'zero', 'random'"),
    ],
)
def test_a_task_that_cannot_be_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RecallTask(**options)


@pytest.mark.parametrize("vocab_size", [10, 11])
def test_the_least_vocabulary_is_enough(vocab_size: int):
    assert set(RecallTask(vocab_size=vocab_size).rows(20, 0)["tokens"].unique().tolist()) <= set(range(vocab_size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sizes": []}, r"train_sizes=\[\] names no size"),
        ({"val_sizes": [(64, 4), (64, 4)]}, r"val_sizes=.* names no size, or one twice"),
        ({"val_sizes": [(64, 32)]}, "sequence_length=64 is too short"),
        ({"train_rows": [10, 10]}, r"train_rows=\[10, 10\] does not match 1 train_sizes"),
        ({"train_rows": 0}, "train_rows=0"),
        ({"val_rows": 0}, "val_rows=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1 is negative"),
        ({"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RecallData(**options)
