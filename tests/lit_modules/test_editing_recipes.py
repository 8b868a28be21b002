"""The recipes of model editing: a host is taught facts and edited, and a model of transformers from a folder is."""

import csv
import json
from pathlib import Path

import pytest
import torch

from memzoo.layers import Wise
from memzoo.layers.editor import Edit
from memzoo.lit_modules.cli import main

FEW = ["--data.num_facts", "40", "--data.num_edits", "4"]


def test_the_checkpoint_of_a_host_is_edited_and_figures_are_drawn(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--model.overrides", "{vocab_size: 512, dim: 32, depth: 2, num_heads: 2, hidden_dim: 48}"]
    steps = ["--trainer.max_steps", "150", "--trainer.limit_val_batches", "1", "--data.batch_size", "16"]
    assert main(["fit", "--config", "wise/facts_host.yaml", *FEW, *sizes, *steps]) == 0
    [checkpoint] = tmp_path.rglob("last.ckpt")
    chosen = ["--model.checkpoint", str(checkpoint), "--model.editor_options.max_steps", "3"]
    assert main(["fit", "--config", "wise/facts_tiny.yaml", *FEW, *chosen]) == 0
    assert "reliability" in capsys.readouterr().out
    assert {"editing.png", "routing.png"} <= {path.name for path in tmp_path.rglob("*.png")}
    [table] = tmp_path.rglob("edits.csv")
    assert len([*csv.DictReader(table.open())]) == 4


def test_a_model_of_transformers_is_edited_with_the_rows_of_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers: extra hf")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2, vocab_size=256)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    rows = [
        {
            "prompt": f"the capital of {name} is",
            "target": target,
            "paraphrases": [f"{name} is ruled from"],
            "locality": [{"prompt": f"the river of {name} is", "answer": "blue"}],
        }
        for name, target in (("oria", "ulm"), ("esia", "bonn"))
    ]
    (tmp_path / "edits.json").write_text("\n".join(map(json.dumps, rows)))
    others = {"prompt": "x", "target": "y", "loc": "the lake of oria is", "loc_ans": "deep"}
    (tmp_path / "unrelated.json").write_text(json.dumps(others))
    words = ["--model.model.init_args.folder", "llama", "--data.path", "edits.json", "--data.tokenizer", "bytes"]
    words += ["--model.editor_options.max_steps", "2"]
    seen: list[Edit] = []
    learn = Wise.edit
    monkeypatch.setattr(Wise, "edit", lambda self, edits: (seen.extend(edits), learn(self, edits))[1])
    assert main(["fit", "--config", "wise/hf_facts.yaml", *words]) == 0
    assert [(len(edit.inputs), edit.unrelated is not None) for edit in seen] == [(11, True)] * 2  # ten prefixes
    assert "locality" in capsys.readouterr().out
    assert [*tmp_path.rglob("editing.png")]
