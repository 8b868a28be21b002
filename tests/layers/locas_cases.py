"""Cases for tests of Locas: memories on tiny hosts, slots with something to say, hosts that compute as on paper."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import Locas
from memzoo.layers.feed_forward_site import FeedForwardSite
from memzoo.layers.reference import locas as reference
from memzoo.layers.side_slots import SideSlots
from memzoo.layers.sites import find_feed_forwards
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

RANK = 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_host = pytest.mark.parametrize("name", HOSTS)
plain_host = pytest.mark.parametrize("name", [name for name, kind in HOSTS.items() if not kind.gated])
BIASED = "gpt2"  # the host of tests that need one without a gate
GATED = "ours"


def attach(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Locas, Tensor]:
    """Return a host, an empty memory of it, and what it can read."""
    host = make_host(name, dtype)
    return host, Locas.attach(host, **{"rank": RANK} | options), make_inputs(name, dtype=dtype)


def slots_of(memory: Locas) -> list[SideSlots]:
    return list(memory.slots)  # type: ignore[arg-type]


def sites_of(memory: Locas) -> list[FeedForwardSite]:
    return list(find_feed_forwards(memory.host, memory.sites).values())


def vectors_of(slots: SideSlots) -> list[nn.Parameter]:
    return [vectors for vectors in (slots.key, slots.value, slots.gate) if vectors is not None]


@torch.no_grad()
def teach(memory: Locas, *, longest: float = 3.0, seed: int = 5) -> None:
    """Give every slot of a memorised memory something to say: vectors of random lengths, none near one.

    Where clones begin, at length one, clipping has a kink, and its gradient there is anything between two.

    Args:
        memory: To be changed.
        longest: Of every other vector; the rest are below one.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for slots in memory.slots:
        for parameter in slots.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > slots.rows.dim():
                length = 0.3 + 0.5 * torch.rand(slots.rows.shape, generator=generator, dtype=torch.float64)
                length[..., ::2] = longest
                drawn = drawn / drawn.norm(dim=-1, keepdim=True) * length[..., None]
            parameter.copy_(drawn)


@contextmanager
def on_paper(memory: Locas, *, side: bool = True) -> Iterator[None]:
    """Let every feed-forward of the host compute token by token and slot by slot, with the memory's slots beside it.

    The memory has no part in it but its parameters, which gradients reach as they are.
    """

    def forward(site: FeedForwardSite, slots: SideSlots) -> Callable[[Tensor], Tensor]:
        up, down, gate = site.up_weight.detach(), site.down_weight.detach(), site.gate_weight
        biases = site.up_bias, site.gate_bias
        tau = reference.slot_scale(down, slots.slots)

        def call(x: Tensor, **_: Any) -> Tensor:
            y = torch.stack([reference.feed_forward(row, gate, up, down.T, site.activation, *biases) for row in x])
            y = y if site.down.bias is None else y + site.down.bias
            if not side:
                return y
            vectors = slots.gate, slots.key, slots.value
            return y + reference.side_feed_forward(x, *vectors, site.activation, tau, slots.key_bias, slots.gate_bias)

        return call

    with ExitStack() as stack:
        stack.enter_context(memory.disabled())
        for site, slots in zip(sites_of(memory), memory.slots, strict=True):
            stack.enter_context(patch.object(site.module, "forward", forward(site, slots)))
        yield


def gradients(memory: Locas, inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return the gradient of a function of the logits by every parameter of the memory, by name."""
    named = dict(memory.named_parameters())
    logits = read(memory.host, inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad((logits * weights.to(logits)).sum(), list(named.values()), **options)
    return dict(zip(named, found, strict=True))


@contextmanager
def recorded(memory: Locas, part: str) -> Iterator[dict[str, Tensor]]:
    """Keep what each feed-forward of the host read ("input"), computed inside ("hidden") or returned ("output")."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, site: FeedForwardSite) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = {"input": inputs[0], "hidden": site.hidden(inputs[0]), "output": output}[part].detach()

        return hook

    sites = sites_of(memory)
    handles = [site.module.register_forward_hook(keep(site.name, site)) for site in sites]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
