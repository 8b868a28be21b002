"""Cases for tests of GRACE: codebooks beside tiny hosts, edits of them, and what they hold."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers import Grace
from memzoo.layers.editor import NOT_SCORED, Edit
from tests.layers.side_hosts import HOSTS, make_host, read


def attach(name: str, host: nn.Module | None = None, **options: Any) -> Grace:
    """A codebook beside a host of any kind; of an image its class token asks."""
    options = {"steps": 8, "token": "first" if HOSTS[name].images else "last", "radius": 1e-3} | options
    return Grace.attach(make_host(name) if host is None else host, **options)


def edit_of(inputs: Tensor, *answer: int, label: Any = None) -> Edit:
    """What is to be answered to one question: tokens behind it, or the class of an image."""
    if inputs.is_floating_point():
        return Edit(inputs, torch.tensor(answer), label=label)
    told = torch.tensor([answer[:-1]], dtype=torch.int64)
    targets = torch.cat([torch.full_like(inputs, NOT_SCORED), told], 1)
    targets[0, inputs.shape[1] - 1 :] = torch.tensor(answer)
    return Edit(torch.cat([inputs, told], 1), targets, label=label)


def site_call(grace: Grace, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer beside which the codebook is reads and returns, the codebook included."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = grace.host.get_submodule(grace.sites[0])
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    read(grace.host, inputs)
    handle.remove()
    return seen[0]


def tables(grace: Grace) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in grace.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], *but: str) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)
