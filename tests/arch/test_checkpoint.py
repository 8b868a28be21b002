"""Saved models come back bit for bit, or say why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo.arch import Block, CausalLM, Transformer, checkpoint, create_model, from_pretrained, save_pretrained
from memzoo.layers.neural_memory import NeuralMemory

SMALL: dict[str, dict[str, Any]] = {
    "transformer_tiny": {"vocab_size": 10, "dim": 16, "depth": 2},
    "titans_lmm_tiny": {"vocab_size": 10, "dim": 16, "depth": 2, "num_heads": 2, "chunk_size": 4},
}
TOKENS = torch.arange(9)[None]


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return create_model(request.param, **SMALL[request.param])


def test_a_model_comes_back_bit_for_bit(model: Any, tmp_path: Path) -> None:
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = from_pretrained(tmp_path / "new" / "folder")
    assert type(loaded) is type(model)
    assert (loaded.name, loaded.config) == (model.name, model.config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_the_folder_holds_a_readable_configuration_and_safetensors(model: Any, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architecture": type(model).__name__,
        "name": model.name,
        "config": model.config,
    }


def test_the_dtype_is_kept(model: Any, tmp_path: Path) -> None:
    save_pretrained(model.bfloat16(), tmp_path)
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_model_built_from_its_class_is_saved_too(tie_embeddings: bool, tmp_path: Path) -> None:
    model = Transformer(10, 16, 1, num_heads=2, tie_embeddings=tie_embeddings)
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    assert loaded.name is None
    assert (loaded.head is None) == tie_embeddings
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])


def test_loading_leaves_the_caller_s_randomness_alone(model: Any, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_save_leaves_the_old_model_and_nothing_else(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(model, tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(weights: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_model_that_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is a CausalLM that cannot be built again from a file"):
        save_pretrained(CausalLM(10, 8, [Block(NeuralMemory(8, num_heads=1))]), tmp_path / "out")

    class Mine(Transformer):
        pass

    with pytest.raises(ValueError, match=r"architecture='Mine' is not one of .*Transformer"):
        save_pretrained(Mine(10, 16, 1, num_heads=2), tmp_path / "out")
    model = Transformer(10, 16, 1, num_heads=2)
    model.config["extra"] = {1, 2}
    with pytest.raises(ValueError, match=r"has no JSON form .*; use plain values"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder: Path, how: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    match how:
        case "no folder":
            config.unlink(), weights.unlink(), folder.rmdir()
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no json":
            config.write_text("{")
        case "no text":
            config.write_bytes(b"\xff\xfe")
        case "not a mapping":
            config.write_text("[]")
        case "other architecture":
            edit(folder, architecture="Perceptron")
        case "other argument":
            edit(folder, config={"widht": 3})
        case "other sizes":
            edit(folder, config={"vocab_size": 10, "dim": 16, "depth": 3, "num_heads": 2, "hidden_dim": 12})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", r"has no config.json; write one with save_pretrained"),
        ("no weights", r"model.safetensors' is missing; save the model again"),
        ("cut weights", r"model.safetensors' is not a whole safetensors file"),
        ("no json", r"config.json' does not describe a model"),
        ("no text", r"config.json' does not describe a model"),
        ("not a mapping", r"config.json' does not describe a model"),
        ("other architecture", r"architecture='Perceptron' is not one of"),
        ("other argument", r"takes no argument widht=3"),
        ("other sizes", r"15 tensors differ, first 'blocks.0.ffn.down.weight': \(16, 8\) in the file, \(16, 12\)"),
    ],
)
def test_a_spoiled_folder_is_refused(how: str, message: str, tmp_path: Path) -> None:
    folder = save_pretrained(Transformer(10, 16, 2, num_heads=2, hidden_dim=8), tmp_path / "model")
    spoil(folder, how)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)
