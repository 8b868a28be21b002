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
HEAD = "lm_head.weight"
DIAGONAL = "cell.diag_mask"  # a constant


def from_gmt_checkpoint(model: "GraphMemoryTransformer", state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of a model from that of the official code's ``GMTV7``, to load it.

    Args:
        model: Whose options the checkpoint has.
        state_dict: Names and shapes as there, also of a compiled model; or what the official trainer saves, which has
            them under ``"model"``. With tied embeddings ``lm_head.weight`` may be missing, and so may the constants.

    Raises:
        ValueError: Names or shapes are not those of a model with its options.
    """
    weights: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    rest = {name.removeprefix(COMPILED): value for name, value in weights.items()}
    own: dict[str, Tensor] = {}
    for index in range(len(model.blocks)):
        rest.pop(f"blocks.{index}.{DIAGONAL}", None)
    head = rest.pop(HEAD, None) if model.head is None else None
    names = _names(len(model.blocks), tied=model.head is None)
    _check_names(rest, names)
    for theirs, ours in names.items():
        parts = rest[theirs].chunk(len(ours)) if theirs.endswith(QUERY_KEY_VALUE) else [rest[theirs]] * len(ours)
        own |= dict(zip(ours, parts, strict=False))
    for name, value in model.state_dict().items():
        if name not in own or own[name].shape != value.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "no rows"
            raise ValueError(
                f"{name} has {found} in the checkpoint, {tuple(value.shape)} in the model; build the model with the "
                f"options of the checkpoint"
            )
    if head is not None and not torch.equal(head, own["embedding.weight"]):
        raise ValueError(f"{HEAD} is not the embeddings; build the model with tie_embeddings=False")
    return own


def _names(depth: int, *, tied: bool) -> dict[str, list[str]]:
    """Return the official names -> those of this package, several where a tensor is split or shared."""
    names = {theirs: [ours] for theirs, ours in MODEL_NAMES.items()}
    names[TEMPERATURE] = [f"blocks.{index}.ffn.temperature" for index in range(depth)]
    if not tied:
        names[HEAD] = ["head.weight"]
    for index in range(depth):
        block = f"blocks.{index}."
        names |= {block + theirs: [block + ours] for theirs, ours in BLOCK_NAMES.items()}
        names[block + QUERY_KEY_VALUE] = [f"{block}mixer.{part}.weight" for part in ("query", "key", "value")]
    return names


def _check_names(state_dict: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    missing, extra = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"state_dict is not that of an official GMT with these options: missing {missing[:3]}, unknown "
            f"{extra[:3]}; build the model with the options of the checkpoint"
        )
