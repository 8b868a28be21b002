"""Slots that become part of a host's feed-forwards, and leave them again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.side_slots import SideSlots
from memzoo.layers.sites import Setting, configure, declare_width, recognise


@dataclass(frozen=True)
class AppendedSlots:
    """What was added to a host.

    Attributes:
        sites: Feed-forwards, how many slots were added to each, and the width with them.
        settings: What the host's configuration said before.
    """

    sites: Sequence[tuple[FeedForwardSite, int, int]]
    settings: list[Setting]

    def remove(self) -> None:
        """Take it off again.

        Raises:
            ValueError: The slots are not the last of a feed-forward; nothing is changed.
        """
        for site, _, width in self.sites:
            if site.width != width:
                raise ValueError(
                    f"unmerge() of a memory whose slots are not the last of {site.name!r}, which had {width} with them "
                    f"and has {site.width}; unmerge() the memory that was merged after this one first"
                )
        for site, added, _ in self.sites:
            site.remove(added)
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
    """
    appended: list[tuple[FeedForwardSite, int, int]] = []
    grown = dict[int, int]()  # widths before, and what is added to them
    for site, slots in beside:
        read = {name: tensor if row is None else tensor[row] for name, tensor in slots.effective().items()}
        read = {name: _pad(tensor, -(site.width + slots.slots) % multiple_of) for name, tensor in read.items()}
        added = grown[site.width] = len(read["key"])
        site.append(
            read["key"],
            (slots.tau * read["value"]).T,
            gate=read.get("gate"),
            up_bias=read.get("key_bias"),
            gate_bias=read.get("gate_bias"),
        )
        appended.append((site, added, site.width))
    own = {id(site.module) for site, _ in beside}
    for name, module in host.named_modules():
        parts = recognise(module)
        if parts is None or id(module) in own:
            continue
        other = FeedForwardSite(name, module, parts)
        if added := grown.get(other.width, 0):
            zeros = other.up_weight.new_zeros(added, other.dim)
            other.append(zeros, zeros.T, gate=zeros if other.gated else None)
            appended.append((other, added, other.width))
    widths = {site.width for site, _ in beside}
    settings = declare_width(host, widths.pop(), of={*grown}) if len(widths) == 1 else []
    return AppendedSlots(appended, settings)


def _pad(tensor: Tensor, extra: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])])
