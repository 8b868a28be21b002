import math
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.data import TextData


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of 54 bytes, no two lines alike."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("".join(f"line {i:02d}.{j}: {i * j:05d}\n" for j in range(3)) + "\n\n\n")
    return folder


def small(folder: Path, **options: Any) -> TextData:
    return TextData(folder, **{"sequence_length": 16, "batch_size": 4, "validation_fraction": 0.2} | options)


def targets(loader: Any) -> list[int]:
    return [token for batch in loader for token in batch["tokens"][:, 1:].flatten().tolist()]


def test_default_batches_are_bytes_of_the_standard_library(cache: Path):
    data = TextData()
    batch = next(iter(data.train_dataloader()))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "tokens": ((8, 1025), torch.int64),
        "doc_ids": ((8, 1025), torch.int64),
    }
    assert data.vocab_size == 256
    assert data.bytes_per_token == 1.0
    text = "".join(data.decode(row) for row in batch["tokens"])
    assert " def " in text
    assert [path.is_dir() for path in cache.iterdir() if path.suffix != ".lock"] == [True]
    validation, training = data.validation_rows.num_tokens, data.training_rows.num_tokens
    assert 0.01 < validation / (validation + training) < 0.2


def test_rows_hold_the_files_and_say_which(folder: Path):
    data = small(folder)
    texts = {path.read_text() for path in folder.iterdir()}
    for rows in (data.training_rows, data.validation_rows):
        stream, ids = torch.cat([r["tokens"][:-1] for r in rows]), torch.cat([r["doc_ids"][:-1] for r in rows])
        runs = torch.split(stream, torch.unique_consecutive(ids, return_counts=True)[1].tolist())
        documents = [data.decode(run.tolist()) for run in runs[:-1]]  # the last may be cut by the tail
        assert documents
        assert set(documents) <= texts
        texts -= set(documents)
    assert len(texts) <= 2


def test_an_epoch_has_every_training_token_once_in_shuffled_rows(folder: Path):
    data = small(folder)
    loader = data.train_dataloader()
    first = targets(loader)
    loader.sampler.set_epoch(1)
    second = targets(loader)
    in_order = [token for row in data.training_rows for token in row["tokens"][1:].tolist()]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert len({tuple(first), tuple(second), tuple(in_order)}) == 3
    assert data.training_rows.num_tokens - 1 - len(first) in range(16)
    assert targets(small(folder).train_dataloader()) == first
    assert targets(small(folder, seed=1).train_dataloader()) != first


def test_validation_does_not_depend_on_the_seed_or_on_new_files(folder: Path):
    loaders = [small(folder).val_dataloader(), small(folder, seed=1).test_dataloader()]
    (folder / "zz.txt").write_text("a new document, which sorts behind the others and is not held out 1\n" * 2)
    loaders.append(small(folder).predict_dataloader())
    first, *others = [targets(loader) for loader in loaders]
    assert first
    assert all(other == first for other in others)


def test_contiguous_batches_are_streams_in_both_splits(folder: Path):
    data = small(folder, contiguous=True)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = [batch["tokens"] for batch in loader]
        assert len(batches) > 3
        assert all(len(batch) == 4 for batch in batches)
        for before, after in pairwise(batches):
            assert torch.equal(before[:, -1], after[:, 0])


def test_validation_paths_are_all_validated_on_and_paths_all_trained_on(folder: Path, tmp_path: Path):
    (tmp_path / "held.txt").write_text("held out by hand " * 10)
    data = small(folder, validation_paths=[tmp_path / "held.txt"])
    assert data.validation_rows.num_tokens == 170
    assert data.training_rows.num_tokens == sum(path.stat().st_size for path in folder.iterdir())
    assert data.decode(data.validation_rows[0]["tokens"]).startswith("held out by hand")


def test_rows_of_other_lengths_hold_the_validation_text_from_its_beginning(folder: Path):
    data, plain = small(folder, val_sequence_lengths=[32, 96]), small(folder)
    loaders = data.val_dataloader()
    assert list(loaders) == ["16", "32", "96"]
    assert targets(loaders["16"]) == targets(plain.val_dataloader())
    assert targets(data.train_dataloader()) == targets(plain.train_dataloader())
    first = {name: next(iter(loader))["tokens"] for name, loader in loaders.items()}
    assert {name: tuple(x.shape) for name, x in first.items()} == {"16": (4, 17), "32": (2, 33), "96": (1, 97)}
    text = targets(loaders["16"])
    for loader in loaders.values():
        read = targets(loader)
        assert len(read) > 96
        assert read[: len(text)] == text[: len(read)]
    assert data.main_loader == "16"
    assert plain.main_loader is None


def test_a_length_is_validated_on_once_and_contiguously_if_asked(folder: Path):
    data = small(folder, val_sequence_lengths=[32, 16], contiguous=True)
    assert list(data.val_dataloader()) == ["16", "32"]
    before, after, *_ = (batch["tokens"] for batch in data.val_dataloader()["32"])
    assert torch.equal(before[:, -1], after[:, 0])


def test_no_other_length_is_one_loader(folder: Path):
    data = small(folder, val_sequence_lengths=[])
    assert targets(data.val_dataloader()) == targets(small(folder).val_dataloader())
    assert data.val_sequence_lengths is data.main_loader is data.hparams["val_sequence_lengths"] is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prediction_is_of_the_trained_length_alone(folder: Path, tmp_path: Path):
    data = small(folder, val_sequence_lengths=[32])
    predicted = trainer(tmp_path).predict(Recorder(), datamodule=data)
    expected = [batch["tokens"] for batch in small(folder).predict_dataloader()]
    assert predicted is not None
    assert all(torch.equal(*pair) for pair in zip(predicted, expected, strict=True))


def test_so_many_batches_are_the_same_text_if_the_lengths_divide_a_batch(folder: Path):
    """What ``limit_val_batches`` cuts off: less is left of lengths that do not divide it, more of longer ones."""
    loaders = small(folder, val_sequence_lengths=[32, 64, 24, 96]).val_dataloader()
    read = {name: targets(islice(loader, 2)) for name, loader in loaders.items()}
    assert read["16"] == read["32"] == read["64"]
    assert {name: len(text) for name, text in read.items()} == {"16": 128, "32": 128, "64": 128, "24": 96, "96": 192}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_metrics_are_those_of_the_trained_length(folder: Path, tmp_path: Path):
    module = CausalLMModule("transformer_tiny", {"dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 16})
    runner = trainer(tmp_path)
    for stage, run in (("val", runner.validate), ("test", runner.test)):
        [plain] = run(module, datamodule=small(folder), verbose=False)
        several = run(module, datamodule=small(folder, val_sequence_lengths=[64]), verbose=False)
        measured = {name: value for part in several for name, value in part.items()}
        names = {"loss", "accuracy", "perplexity", "bits_per_byte"}
        assert {*plain} == {f"{stage}/{name}" for name in names}
        assert {*measured} == {*plain} | {f"{stage}/{length}/{name}" for length in (16, 64) for name in names}
        for name, value in plain.items():
            assert measured[name] == measured[name.replace("/", "/16/")] == value
        assert measured[f"{stage}/64/loss"] != measured[f"{stage}/loss"]


def test_documents_need_not_be_packed(folder: Path):
    assert set(next(iter(small(folder, pack_documents=False).train_dataloader()))) == {"tokens"}


def test_bytes_per_token_of_a_trained_tokenizer(folder: Path, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in sorted(folder.iterdir())], vocab_size=300, show_progress=False)
    tokenizer.save(str(tmp_path / "bpe.json"))
    data = small(folder, tokenizer=tmp_path / "bpe.json")
    documents = data.validation_rows.cache.documents
    chosen = {i for row in data.validation_rows for i in row["doc_ids"].tolist()}
    sizes = sum(documents[i].bytes for i in chosen), sum(documents[i].tokens for i in chosen)
    assert data.bytes_per_token == pytest.approx(sizes[0] / sizes[1])
    assert data.bytes_per_token > 1.5
    assert data.decode(data.encode("line 07.1")) == "line 07.1"
    assert 256 < data.vocab_size <= 300
    assert max(targets(data.train_dataloader())) < data.vocab_size


def test_workers_deliver_the_same_batches(folder: Path):
    assert targets(small(folder, num_workers=2).train_dataloader()) == targets(small(folder).train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 is not between 0 and 1"),
        ({"validation_fraction": 1}, "validation_fraction=1 is not between 0 and 1"),
        ({"validation_fraction": math.nan}, "validation_fraction=nan is not between 0 and 1"),
        ({"val_sequence_lengths": [32, 0]}, "val_sequence_lengths=0"),
        ({"val_sequence_lengths": 512}, r"val_sequence_lengths=512 is no list; use \[512\]"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"tokenizer": "no.json"}, r"tokenizer='no\.json' is no file"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TextData(**options)


def test_too_little_text_says_how_much_there_is(folder: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("x" * 40)
    with pytest.raises(
        ValueError, match=r"sequence_length=100 needs 101 tokens in the training split.* 0 of 40; lower"
    ):
        TextData(tmp_path / "short.txt", sequence_length=100).setup()
    with pytest.raises(ValueError, match=r"needs 31 tokens in the training split, which holds 9 of 40"):
        TextData(tmp_path / "short.txt", sequence_length=30).setup()
    with pytest.raises(ValueError, match=r"sequence_length=50 needs 51 tokens in the validation split, which holds 40"):
        small(folder, sequence_length=50, validation_paths=tmp_path / "short.txt").setup()
    with pytest.raises(ValueError, match=r"val_sequence_lengths=\[32, 64\] needs 65 tokens in the validation .* 40 of"):
        small(folder, val_sequence_lengths=[32, 64], validation_paths=tmp_path / "short.txt").setup()
    TextData(tmp_path / "short.txt", sequence_length=19).setup()


def test_fewer_long_rows_than_devices_are_not_blamed_on_the_trained_length(folder: Path):
    def on_devices(**options: Any) -> TextData:
        data = small(folder, contiguous=True, **options)
        data.trainer = SimpleNamespace(
            world_size=1, overfit_batches=0, distributed_sampler_kwargs={"num_replicas": 4, "rank": 0}
        )
        return data

    held = small(folder).validation_rows.num_tokens
    named = (
        rf"val_sequence_lengths=\[32, {held - 1}\] and .* 1 rows of {held - 1} meet 4 devices; lower val_sequence_le"
    )
    with pytest.raises(ValueError, match=named):
        on_devices(val_sequence_lengths=[32, held - 1]).val_dataloader()
    with pytest.raises(ValueError, match="1 rows meet 4 devices; lower sequence_length"):
        on_devices(sequence_length=held - 1, val_sequence_lengths=[32]).val_dataloader()


def test_bad_text_leaves_no_cache(folder: Path, cache: Path):
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match=r"image\.png is not text"):
        small(folder).prepare_data()
    assert not cache.exists()
    small(folder, suffixes=".txt").prepare_data()


def test_cache_dir_is_used_before_the_environment(folder: Path, tmp_path: Path, cache: Path):
    small(folder, cache_dir=tmp_path / "mine").prepare_data()
    assert (tmp_path / "mine").exists()
    assert not cache.exists()


def test_changed_files_are_read_again_on_the_next_run(folder: Path):
    data = small(folder)
    before = data.training_rows.num_tokens + data.validation_rows.num_tokens
    (folder / "00.txt").write_text("changed")
    data.prepare_data()
    data.setup()
    assert data.training_rows.num_tokens + data.validation_rows.num_tokens == before - 54 + 7


def test_the_command_line_sets_every_kind_of_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    assert parser.parse_args(["--data.paths", "a.txt"]).data.paths == "a.txt"
    given = {"paths": '["a", "b/**/*.md"]', "suffixes": '[".md"]', "contiguous": "true"}
    given |= {"val_sequence_lengths": "[512, 1024]"}
    parsed = parser.parse_args([f"--data.{name}={value}" for name, value in given.items()])
    assert parsed.data.paths == ["a", "b/**/*.md"]
    assert parsed.data.suffixes == [".md"]
    assert parsed.data.contiguous is True
    assert parsed.data.val_sequence_lengths == [512, 1024]


class Recorder(pl.LightningModule):
    """Learns nothing; remembers the first targets of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["tokens"][:, :5].flatten().tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert batch["tokens"].shape[1] == 17

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["tokens"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, **quiet | {"enable_checkpointing": False} | options)


def run(
    data: TextData, tmp_path: Path, ckpt_path: Path | None = None, **options: Any
) -> tuple[pl.Trainer, list[list[int]]]:
    module, runner = Recorder(), trainer(tmp_path, **options)
    runner.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return runner, module.seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("by", "contiguous", "num_workers"),
    [("steps", False, 0), ("epochs", False, 0), ("steps", True, 0), ("epochs", False, 1)],
)
def test_a_resumed_run_sees_the_batches_it_would_have_seen(
    by: str, contiguous: bool, num_workers: int, folder: Path, tmp_path: Path
):
    def limit(steps: int) -> dict[str, int]:
        return {"max_steps": steps} if by == "steps" else {"max_epochs": 3}

    def data() -> TextData:
        return small(folder, batch_size=16, contiguous=contiguous, num_workers=num_workers)

    per_epoch = len(data().train_dataloader())
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, whole = run(data(), tmp_path, callbacks=[saver], enable_checkpointing=True, **limit(3 * per_epoch))
    assert len(whole) == 3 * per_epoch
    for step in (1, per_epoch - 1, per_epoch, per_epoch + 1, 3 * per_epoch - 1):
        _, rest = run(data(), tmp_path, tmp_path / f"step={step}.ckpt", **limit(3 * per_epoch))
        assert rest == whole[step:], step


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_with_the_next(folder: Path, tmp_path: Path):
    _, whole = run(small(folder), tmp_path, max_epochs=3)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    _, seen = run(small(folder), tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    _, rest = run(small(folder), tmp_path, tmp_path / "end.ckpt", max_epochs=3)
    assert seen + rest == whole


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("contiguous", [False, True])
def test_every_stage_of_a_trainer_runs(contiguous: bool, folder: Path, tmp_path: Path):
    data, module, runner = (
        small(folder, contiguous=contiguous),
        Recorder(),
        trainer(tmp_path, overfit_batches=2, max_epochs=2),
    )
    runner.fit(module, datamodule=data)
    assert isinstance(runner.train_dataloader.sampler, SequentialSampler)
    assert module.seen[:2] == module.seen[2:]
    runner = trainer(tmp_path)
    runner.validate(module, datamodule=data, verbose=False)
    runner.test(module, datamodule=data, verbose=False)
    predicted = runner.predict(module, datamodule=data)
    assert predicted is not None
    assert torch.equal(torch.cat(predicted), torch.cat([batch["tokens"] for batch in data.val_dataloader()]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_rebuilds_the_data_without_unpickling_classes(folder: Path, tmp_path: Path):
    runner, _ = run(small(folder, tokenizer=Path("bytes"), cache_dir=tmp_path / "mine"), tmp_path, max_steps=1)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    data = TextData.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (data.paths, data.batch_size, data.cache_dir) == ([str(folder)], 4, tmp_path / "mine")
