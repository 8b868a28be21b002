"""Cases for tests of ROME: editors beside tiny hosts, edits of them, and what their site reads and says."""

from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers import Rome
from memzoo.layers.editor import NOT_SCORED, Edit
from tests.layers.side_hosts import HOSTS, make_host, read

KINDS = ["ours", "llama", "gpt2", "vit"]


def attach(name: str, host: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> Rome:
    """An editor beside a host of any kind; of an image the class token has the key."""
    options = {"token": "first" if HOSTS[name].images else "last"} | options
    return Rome.attach(make_host(name, dtype) if host is None else host, **options)


def edit_of(inputs: Tensor, answer: int, **more: Any) -> Edit:
    """Say one token after each question, or one class of each image."""
    if inputs.is_floating_point():
        return Edit(inputs, torch.full((len(inputs),), answer), **more)
    targets = torch.full_like(inputs, NOT_SCORED)
    targets[:, -1] = answer
    return Edit(inputs, targets, **more)


def answers(host: nn.Module, inputs: Tensor) -> list[int]:
    """What the host says behind each question, or of each image."""
    logits = read(host, inputs)
    return (logits if logits.dim() == 2 else logits[:, -1]).argmax(-1).tolist()  # type: ignore[no-any-return]


def site_call(editor: Rome, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the site reads and says in a call of the host, with what the editor adds."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = editor.host.get_submodule(editor.sites[0])
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    read(editor.host, inputs)
    handle.remove()
    return seen[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
