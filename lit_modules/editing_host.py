"""The model of a run, to be edited."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.lit_modules.checkpoint import check_checkpoint


def read_host(
    path: str, model: str | nn.Module | None, overrides: dict[str, Any] | None
) -> tuple[str | nn.Module, dict[str, Any] | None, dict[str, Tensor]]:
    """Return the model of a run, the arguments it was built with, and its weights.

    Raises:
        ValueError: It is no run of a ``CausalLMModule``, of another model than that named, or it names none.
    """
    check_checkpoint("checkpoint", path)
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = {
        name.removeprefix("model."): own for name, own in stored["state_dict"].items() if name.startswith("model.")
    }
    if isinstance(model, nn.Module):
        return model, overrides, weights
    chosen = stored.get("hyper_parameters", {})
    named = chosen.get("model")
    if model is None and not isinstance(named, str):
        raise ValueError(f"checkpoint={path!r} does not name its model; pass the model too")
    if model is not None and named is not None and model != named:
        raise ValueError(f"checkpoint={path!r} holds a {named}, not a model={model!r}; leave the model out")
    return model or named, {**(chosen.get("overrides") or {}), **(overrides or {})}, weights


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Give a model the weights of a run.

    Raises:
        ValueError: They are of another model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint={path!r} is of another model ({str(error).splitlines()[0]}); pass the one that it holds"
        ) from error
