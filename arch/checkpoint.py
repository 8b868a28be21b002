"""Saved models: a folder with ``config.json`` (what to build) and ``model.safetensors`` (its weights)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memzoo.arch.registry import check_arguments, find_architecture

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Save a model of a registered architecture, each file whole or not at all.

    Args:
        model: Built by ``create_model`` or by the architecture's class.
        directory: Folder to write to; made if missing.

    Returns:
        The folder.

    Raises:
        ValueError: The model does not know its own configuration, or one of its arguments has no JSON form.
    """
    architecture = type(model).__name__
    config = getattr(model, "config", None)
    if not config or find_architecture(architecture) is not type(model):
        raise ValueError(
            f"model is a {architecture} that cannot be built again from a file; decorate its __init__ with "
            f"record_config and register it, or save model.state_dict() and the code that builds it"
        )
    description = {"architecture": architecture, "name": getattr(model, "name", None), "config": config}
    try:
        text = json.dumps(description, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"model.config={config!r} has no JSON form ({error}); use plain values") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(weights, partial[WEIGHTS])
        partial[CONFIG].write_text(text)
        for name, path in partial.items():
            path.replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder


def from_pretrained(directory: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """Build the model that ``save_pretrained`` saved, bit for bit and in the dtype it was saved in.

    Raises:
        ValueError: The folder does not hold a saved model, or its architecture is not registered.
    """
    folder = Path(directory)
    architecture, name, config = _read_config(folder)
    weights = _read_weights(folder / WEIGHTS, str(device))
    check_arguments(str(folder / CONFIG), architecture, config)
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away; leave the caller's randomness alone
        model: Any = architecture(**config)
    _check_weights(model, weights, folder / WEIGHTS)
    model.to(device).load_state_dict(weights, assign=True)
    model.name = name
    return model


def _read_config(folder: Path) -> tuple[type[nn.Module], str | None, dict[str, Any]]:
    path = folder / CONFIG
    try:
        stored = json.loads(path.read_text())
        return find_architecture(stored["architecture"]), stored["name"], dict(stored["config"])
    except FileNotFoundError as error:
        raise ValueError(f"directory={str(folder)!r} has no {CONFIG}; write one with save_pretrained") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not describe a model ({error!r}); save the model again") from error


def _read_weights(path: Path, device: str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=device)
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} is missing; save the model again with save_pretrained") from error
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file ({error}); save the model again") from error


def _check_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in own.keys() | stored.keys() if own.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{str(path)!r} does not fit {CONFIG} beside it: {len(wrong)} tensors differ, first {name!r}: "
            f"{stored.get(name, 'missing')} in the file, {own.get(name, 'unknown')} in the model"
        )
