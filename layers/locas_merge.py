"""Slots that become part of a host's feed-forwards, and leave them again."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memzoo.layers.feed_forward_site import FeedForwardSite, is_plain_linear
from memzoo.layers.side_record import memories_of
from memzoo.layers.side_slots import SideSlots
from memzoo.layers.sites import Setting, check_matrices, configure, declare_width, recognise


@dataclass(frozen=True)
class AppendedSlots:
    """What was added to a host.

    Attributes:
        host: The model.
        sites: Feed-forwards, how many slots were added to each, and the width with them.
        settings: What the host's configuration said before.
    """

    host: nn.Module
    sites: Sequence[tuple[FeedForwardSite, int, int]]
    settings: list[Setting]

    def remove(self) -> None:
        """Take it off again.

        Raises:
            ValueError: The slots are not the last of a feed-forward, or a memory was attached that stands on one of its
                layers; nothing is changed.
        """
        for site, _, width in self.sites:
            if site.width != width:
                raise ValueError(
                    f"unmerge() of a memory whose slots are not the last of {site.name!r}, which had {width} with them "
                    f"and has {site.width}; unmerge() the memory that was merged after this one first"
                )
        _check_standing("unmerge", self.host, [site for site, _, _ in self.sites])
        for site, layers in [(site, site.removed(added)) for site, added, _ in self.sites]:
            site.assign(layers)
        configure(self.settings)


@torch.no_grad()
def append_slots(
    host: nn.Module,
    beside: Sequence[tuple[FeedForwardSite, SideSlots]],
    *,
    row: int | None = None,
    multiple_of: int = 1,
) -> AppendedSlots:
    """Append slots to the feed-forwards that they are beside.

    Other feed-forwards of the host that were as wide get as many slots of zeros, which return nothing, as a
    configuration knows one width.

    Args:
        host: The model, for the other feed-forwards and the configuration.
        beside: Feed-forwards and slots.
        row: Of slots that each row of a batch has of its own, those of this row.
        multiple_of: Add slots of zeros until the width is a multiple of this.

    Raises:
        ValueError: The matrices of another feed-forward that is to become as wide cannot be grown, or a memory stands
            on a layer that would grow; nothing is changed.
    """
    read, grown = list[dict[str, Tensor]](), dict[int, int]()  # slots; widths before, and what is added to them
    for site, slots in beside:
        own = {name: tensor if row is None else tensor[row] for name, tensor in slots.effective().items()}
        own = {name: _pad(tensor, -(site.width + slots.slots) % multiple_of) for name, tensor in own.items()}
        read.append(own)
        grown[site.width] = len(own["key"])
    others = _others(host, {site.module for site, _ in beside}, grown.keys())
    _check_standing("merge", host, [*(site for site, _ in beside), *others])
    new = []  # all of it before anything is changed
    for (site, slots), own in zip(beside, read, strict=True):
        biases = {"up_bias": own.get("key_bias"), "gate_bias": own.get("gate_bias")}
        new.append((site, site.appended(own["key"], (slots.tau * own["value"]).T, gate=own.get("gate"), **biases)))
    for site in others:
        zeros = site.up_weight.new_zeros(grown[site.width], site.dim)
        new.append((site, site.appended(zeros, zeros.T, gate=zeros if site.gated else None)))
    appended = [(site, grown[site.width], site.width + grown[site.width]) for site, _ in new]
    for site, layers in new:
        site.assign(layers)
    widths = {site.width for site, _ in beside}
    settings = declare_width(host, widths.pop(), of={*grown}) if len(widths) == 1 else []
    return AppendedSlots(host, appended, settings)


def _others(host: nn.Module, own: AbstractSet[nn.Module], widths: AbstractSet[int]) -> list[FeedForwardSite]:
    """Return the other feed-forwards of a host that are of one of these widths."""
    others = {}
    for name, module in host.named_modules():
        if module not in own and (parts := recognise(module)) is not None:
            site = FeedForwardSite(name, module, parts)
            if (site.width if is_plain_linear(site.down) else getattr(site.down, "in_features", None)) in widths:
                others[name] = site
    try:
        check_matrices(host, others)
    except ValueError as error:
        raise ValueError(
            f"merge() makes all feed-forwards of a width wider, as a configuration knows one, and cannot here: {error}"
        ) from error
    return list(others.values())


def _check_standing(call: str, host: nn.Module, sites: Iterable[FeedForwardSite]) -> None:
    """Require that no memory is beside a layer whose size would change."""
    layers = {layer: site.name for site in sites for layer in site.layers}
    for memory in memories_of(host):
        for layer in memory.modules_beside:
            if layer in layers and not memory.is_merged:
                remedy = "merge() or detach()" if call == "merge" else "detach()"
                raise ValueError(
                    f"{call}() would change the size of a layer of {layers[layer]!r} that a {type(memory).__name__} "
                    f"is beside; {remedy} that one first"
                )


def _pad(tensor: Tensor, extra: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])])
