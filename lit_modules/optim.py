"""Optimiser groups by role: matrices are decayed; vectors, embeddings and what a layer excludes are not."""

from typing import Any, Literal, get_args

from torch import nn

from memzoo.layers.errors import check_choice

Decay = Literal["matrices", "all"]


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay = "matrices") -> list[dict[str, Any]]:
    """Split the trainable parameters into "matrices", decayed, and "others", not decayed.

    A parameter is not decayed if it has fewer than two axes (norms, biases), if it is the weight of an ``nn.Embedding``
    (a tied output projection included), or if a layer lists it: ``no_weight_decay``, an attribute of any module, holds
    names of its own parameters or submodules (a neural memory's initial weights and gates).

    Args:
        model: Whose parameters to split.
        weight_decay: Of the matrices.
        decay: "all" decays every parameter alike, one group "all", as some papers train.

    Returns:
        One or two groups for ``torch.optim``, each parameter once, with a ``name`` for logs.

    Raises:
        ValueError: A name in ``no_weight_decay`` is no parameter of its layer, nothing is trainable, or ``decay`` is
            unknown.
    """
    check_choice("decay", decay, get_args(Decay))
    excluded = undecayed(model) if decay == "matrices" else set()
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if id(parameter) in excluded else matrices).append(parameter)
    if not matrices and not others:
        raise ValueError(f"model={type(model).__name__} has no trainable parameter; unfreeze some of them")
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "name": decay},
        {"params": others, "weight_decay": 0.0, "name": "others"},
    ]
    return [group for group in groups if group["params"]]


def undecayed(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that ``parameter_groups`` does not decay, trainable or not."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {id(p) for p in model.parameters() if p.dim() < 2} | embeddings | listed(model)


def listed(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that the layers of a model list in ``no_weight_decay``."""
    found: set[int] = set()
    for path, module in model.named_modules():
        for name in getattr(module, "no_weight_decay", ()):
            own = [id(p) for n, p in module.named_parameters() if n == name or n.startswith(f"{name}.")]
            if not own:
                raise ValueError(
                    f"no_weight_decay of {path or type(model).__name__!r} lists {name!r}, none of its parameters; "
                    f"use a name from its named_parameters()"
                )
            found.update(own)
    return found
