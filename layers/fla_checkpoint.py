"""Checkpoints of flash-linear-attention, turned into the parameters of this package's layers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memzoo.layers.mixture_of_memories import MixtureOfMemories


def mixture_from_fla(layer: "MixtureOfMemories", state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a layer from those of fla's ``MomAttention``.

    Args:
        layer: Whose options the checkpoint has.
        state_dict: fla's names, without what stands before the layer's.

    Raises:
        ValueError: The layer has options fla lacks, or names or shapes are not those of a layer with its options.
    """
    if layer.rule_name != "gated_deltanet" or layer.conv_place != "bucket":
        raise ValueError(
            f"rule={layer.rule_name!r}, conv={layer.conv_place!r} exist in no fla checkpoint; build the layer with "
            f"rule='gated_deltanet' and conv='bucket'"
        )
    memories = [] if layer.tie_key_values else [f".{m}" for m in range(layer.num_memories)]
    stems = {letter: [f"{letter}_proj{m}.weight" for m in memories] for letter in "kvab"}
    if layer.shared or layer.tie_key_values:
        for letter in "kvab":
            stems[letter].append(f"shared_{letter}.weight")
    names = {
        "router.weight": ["gate.weight"],
        "query.weight": ["q_proj.weight"],
        "rule.decay_log": ["A_log"],
        "rule.step_bias": ["dt_bias"],
        "conv.weight": ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"],
        "norm.weight": ["o_norm.weight"],
        "out.weight": ["o_proj.weight"],
    }
    for m in range(len(stems["k"])):
        names[f"key_value.{m}.weight"] = [stems["k"][m], stems["v"][m]]
        names[f"gates.{m}.weight"] = [stems["a"][m], stems["b"][m]]
    if layer.output_gate is not None:
        names["output_gate.weight"] = ["g_proj.weight"]
    _check_names(state_dict, [name for parts in names.values() for name in parts])
    loaded = {name: _join([state_dict[part] for part in parts]) for name, parts in names.items()}
    for name, own in layer.state_dict().items():
        if loaded[name].shape != own.shape:
            raise ValueError(
                f"state_dict holds {' and '.join(names[name])}, together of shape {tuple(loaded[name].shape)}, but "
                f"{name} of the layer has {tuple(own.shape)}; build the layer as the checkpoint's config says"
            )
    return loaded


def _check_names(state_dict: dict[str, Tensor], expected: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - state_dict.keys()), sorted(state_dict.keys() - set(expected))
    if missing or extra:
        raise ValueError(
            f"state_dict is not that of an fla layer with these options: missing {missing[:3]}, unknown {extra[:3]}; "
            f"build the layer as the checkpoint's config says, and strip what stands before its names"
        )


def _join(parts: list[Tensor]) -> Tensor:
    """Stack along the output axis; the filters of a depthwise convolution, (channels, 1, width), lose their middle."""
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.squeeze(1) if joined.dim() == 3 else joined
