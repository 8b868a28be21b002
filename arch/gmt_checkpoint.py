"""Checkpoints of the official Graph Memory Transformer, turned into the parameters of this package's model.

The names are those of src/gmt/model.py in Nemesis533/GMT-GraphMemoryTransformer.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memzoo.arch.graph_memory_transformer import GraphMemoryTransformer

COMPILED = "_orig_mod."  # put before every name by torch.compile
MODEL_NAMES = {
    "embed.weight": "embedding.weight",
    "pos_embed.weight": "positions.weight",
    "norm_final.weight": "norm.weight",
    "norm_final.bias": "norm.bias",
}
BLOCK_NAMES = {
    "attn.out_proj.weight": "mixer.out.weight",
    "cell.C": "ffn.centroids",
    "cell.E": "ffn.edges",
    "cell.gate": "ffn.gate",
    "cell.write_momentum": "ffn.momentum",
    "cell.Q_proj.weight": "ffn.query.weight",
    "cell.K_proj.weight": "ffn.key.weight",
    "cell.usage": "ffn.usage",
    "cell.centroid_age": "ffn.age",
}
NORMS = {
    "ln1": "mixer_norm",
    "ln2": "ffn_norm",
    "cell.norm_C": "ffn.centroid_norm",
    "cell.norm_disp": "ffn.movement_norm",
}
BLOCK_NAMES |= {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in NORMS.items() for part in ("weight", "bias")}
QUERY_KEY_VALUE = "attn.qkv.weight"
TEMPERATURE = "temp"
EMBEDDING, HEAD = "embed.weight", "lm_head.weight"
DIAGONAL = "cell.diag_mask"  # a constant
BUFFERS = (TEMPERATURE, "cell.usage", "cell.centroid_age")
WRAPPERS = ("model", "state_dict")  # names under which a checkpoint has its weights
SHOWN = 3  # names of an error


def from_gmt_checkpoint(model: "GraphMemoryTransformer", state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of a model from that of the official code's ``GMTV7``, to load it.

    Args:
        model: Whose options the checkpoint has.
        state_dict: Names and shapes as there, also of a compiled model; or a checkpoint that has them under
            ``"model"``, as what the official trainer saves, or ``"state_dict"``. With tied embeddings either of
            ``embed.weight`` and ``lm_head.weight`` will do. Buffers may be missing: then the model keeps its own.

    Raises:
        ValueError: Names or shapes are not those of a model with its options.
    """
    wrapper = next((name for name in WRAPPERS if isinstance(state_dict.get(name), Mapping)), None)
    weights: Mapping[str, Tensor] = state_dict if wrapper is None else state_dict[wrapper]
    given = {name.removeprefix(COMPILED): value for name, value in weights.items()}
    tied = model.head is None
    if tied:
        head = given.pop(HEAD, None)
        if head is not None and not torch.equal(head, given.setdefault(EMBEDDING, head)):
            raise ValueError(f"{HEAD} is not the embeddings; build the model with tie_embeddings=False")
    names = _names(len(model.blocks), tied=tied)
    _check_names(given, names)
    own = model.state_dict()
    loaded: dict[str, Tensor] = dict(own)
    for theirs, ours in names.items():
        if theirs in given and ours:
            loaded |= zip(ours, _parts(given[theirs], [own[name] for name in ours], theirs), strict=True)
    return loaded


def _parts(value: Tensor, own: list[Tensor], name: str) -> list[Tensor]:
    """Return what an official tensor is for each of the tensors that it fills.

    Raises:
        ValueError: It has another shape than they.
    """
    if name.endswith(QUERY_KEY_VALUE):
        expected = (sum(len(part) for part in own), *own[0].shape[1:])
        split = list(value.split([len(part) for part in own])) if value.shape == expected else []
    else:
        expected = tuple(own[0].shape)
        one_number = value.numel() == own[0].numel() == 1  # () there, perhaps (1,) here
        split = [value.reshape(expected)] * len(own) if one_number or value.shape == expected else []
    if not split:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} in the checkpoint, {expected} in the model; build the model with "
            f"the options of the checkpoint"
        )
    return split


def _names(depth: int, *, tied: bool) -> dict[str, list[str]]:
    """Return the official names -> those of this package: several where a tensor is split or shared, none unused."""
    names = {theirs: [ours] for theirs, ours in MODEL_NAMES.items()}
    names[TEMPERATURE] = [f"blocks.{index}.ffn.temperature" for index in range(depth)]
    if not tied:
        names[HEAD] = ["head.weight"]
    for index in range(depth):
        block = f"blocks.{index}."
        names |= {block + theirs: [block + ours] for theirs, ours in BLOCK_NAMES.items()} | {block + DIAGONAL: []}
        names[block + QUERY_KEY_VALUE] = [f"{block}mixer.{part}.weight" for part in ("query", "key", "value")]
    return names


def _check_names(given: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> None:
    needed = {name for name, ours in names.items() if ours and not name.endswith(BUFFERS)}
    missing, unknown = sorted(needed - given.keys()), sorted(given.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"state_dict is not that of an official GMT with these options: {_listed(missing)} missing, "
            f"{_listed(unknown)} unknown; build the model with the options of the checkpoint"
        )


def _listed(names: list[str]) -> str:
    """Return how many names there are, and the first few."""
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} names ({shown})" if names else "none"
