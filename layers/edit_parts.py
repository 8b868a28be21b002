"""What editors share: where they stand by default, and that they act while they learn."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.sites import find_feed_forwards


def find_edit_site(model: nn.Module, site: str | None) -> FeedForwardSite:
    """Return a feed-forward of a model; by default that of layer ``round(0.84 * layers) - 1``, as 26 of 32 from 0.

    Raises:
        ValueError: As ``find_feed_forwards``.
    """
    found = [*find_feed_forwards(model, None if site is None else [site]).values()]
    return found[0] if site is not None else found[round(0.84 * len(found)) - 1]


def value_name(site: FeedForwardSite) -> str:
    """Return the name in the host of the layer whose matrix holds the values of a feed-forward."""
    return f"{site.name}.{site.parts.down}" if site.name else site.parts.down


@contextmanager
def acting(memory: SideMemory) -> Iterator[None]:
    """Have a memory enabled inside, and after it what it was."""
    before, memory.enabled = memory.enabled, True
    try:
        yield
    finally:
        memory.enabled = before
