"""The recipes of test-time training: a host is trained, then reads books, and a model of transformers from a folder."""

from pathlib import Path

import pytest
import torch

from memzoo.lit_modules.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    (tmp_path / "book.txt").write_text("the cat sat on the mat, " * 40)
    return tmp_path


def test_the_checkpoint_of_a_fit_reads_a_book_and_draws_what_the_memory_gained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.paths", "text.txt", "--data.books", "book.txt", "--data.cache_dir", "cache"]
    data += ["--data.sequence_length", "64", "--data.batch_size", "2", "--data.held_out", "1"]
    data += ["--model.overrides", "{dim: 32, depth: 2, num_heads: 2, hidden_dim: 48}"]
    steps = ["--trainer.max_steps=125", "--trainer.limit_val_batches=1"]  # up to the first checkpoint
    assert main(["fit", "--config", "locas/stream_tiny.yaml", *data, *steps]) == 0
    [checkpoint] = folder.rglob("last.ckpt")
    chosen = ["--ckpt_path", str(checkpoint), "--data.chunk_length", "64", "--data.window", "128"]
    assert main(["test", "--config", "locas/stream_tiny.yaml", *data, *chosen]) == 0
    said = capsys.readouterr().out
    assert "book.txt" in said
    [picture] = folder.rglob("stream.png")
    [table] = folder.rglob("stream.csv")
    assert picture.stat().st_size > 10_000
    assert len(table.read_text().splitlines()) == 1 + 15  # 959 targets in chunks of 64


def test_a_model_of_transformers_is_read_from_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers: extra hf")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, vocab_size=256)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    words = ["--model.init_args.model.init_args.folder", "llama", "--data.books", "book.txt"]
    words += ["--data.tokenizer", "bytes", "--data.paths", "text.txt", "--data.cache_dir", "cache"]
    words += ["--data.chunk_length", "64", "--data.window", "128", "--data.sequence_length", "64"]
    assert main(["test", "--config", "locas/hf_stream.yaml", *words]) == 0
    assert "test/held_out/after" in capsys.readouterr().out
    assert [*folder.rglob("stream.png")]
