"""Cases for tests of WISE: editors beside tiny hosts, edits of them, and what the matrix reads, seen from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers import Wise
from memzoo.layers.editor import NOT_SCORED, Edit, answer_loss
from memzoo.layers.feed_forward_site import is_conv1d
from memzoo.layers.reference.wise import SiteEdit
from tests.layers.side_hosts import HOSTS, VOCAB_SIZE, WIDTH, make_host, make_inputs, read

EDITED = ["ours", "llama", "phi3", "gpt2", "vit"]
every_host = pytest.mark.parametrize("name", EDITED)
EXACT = {"rtol": 1e-10, "atol": 1e-10}
QUICK = {"max_steps": 6, "edits_per_shard": 2, "learning_rate": 0.1, "mask_ratio": 0.5}
SHORT = {"max_steps": 2, "edits_per_shard": 1}
PROMPT = 4  # tokens of a question


def attach(name: str = "ours", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Wise, Tensor]:
    """Return a host, an editor of it, and what it can read."""
    host = make_host(name, dtype)
    return host, Wise.attach(host, **QUICK | options), make_inputs(name, dtype=dtype)


def make_edit(seed: int = 0, name: str = "ours", dtype: torch.dtype = torch.float64, rows: int = 2) -> Edit:
    """A question in several wordings, its answer of two tokens or a class, and a question that is unrelated."""
    generator = torch.Generator().manual_seed(seed)
    if HOSTS[name].images:
        images = torch.randn(rows + 1, 3, 8, 8, generator=generator).to(dtype)
        return Edit(images[:rows], torch.full((rows,), seed % 5), unrelated=images[rows:])
    tokens = torch.randint(2, VOCAB_SIZE - 1, (rows + 1, PROMPT + 1), generator=generator)
    targets = torch.full((rows, PROMPT + 1), NOT_SCORED)
    targets[:, PROMPT - 1 :] = torch.randint(2, VOCAB_SIZE - 1, (2,), generator=generator)
    tokens[:rows, PROMPT:] = targets[:, PROMPT - 1 : -1]
    return Edit(tokens[:rows], targets, unrelated=tokens[rows:])


def matrix(editor: Wise) -> Tensor:
    """The matrix that the editor is beside, (out, in)."""
    weight: Tensor = editor.down.weight.detach()
    return weight.T if is_conv1d(editor.down) else weight


def down_of(editor: Wise) -> Any:
    """What the host calls in the place of the layer of that matrix."""
    return editor.host.get_submodule(editor.sites[0])


@contextmanager
def site_inputs(editor: Wise) -> Iterator[list[Tensor]]:
    """Collect what the matrix reads in the calls inside."""
    seen: list[Tensor] = []
    handle = down_of(editor).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def activations(editor: Wise, inputs: Tensor) -> Tensor:
    with site_inputs(editor) as seen, editor.disabled():
        read(editor.host, inputs)
    return seen[0]


def on_paper(editor: Wise, edit: Edit) -> SiteEdit:
    """The edit as the matrix alone sees it; what is above it is the host."""
    assert edit.unrelated is not None
    a, unrelated, down = activations(editor, edit.inputs), activations(editor, edit.unrelated), down_of(editor)
    bias = 0 if down.bias is None else down.bias.detach()

    def loss(y: Tensor) -> Tensor:
        handle = down.register_forward_hook(lambda *_: y + bias)
        try:
            with editor.disabled():
                return answer_loss(read(editor.host, edit.inputs), edit.targets)
        finally:
            handle.remove()

    every = torch.ones(a.shape[:2], dtype=torch.bool)
    counted = every if edit.asked is None else edit.asked
    return SiteEdit(a, counted, unrelated, torch.ones(unrelated.shape[:2], dtype=torch.bool), loss)


@torch.no_grad()
def hand_made(editor: Wise, *thresholds: float, seed: int = 3) -> list[Tensor]:
    """Give an editor of mode "retrieve" a side memory for each threshold, and an open shard for the last one."""
    generator = torch.Generator().manual_seed(seed)
    # Each reads some slots much more than others, so that they respond to different inputs.
    deltas = [
        (torch.randn(editor.delta.shape, generator=generator) * torch.rand(WIDTH, generator=generator) ** 6)
        for _ in thresholds
    ]
    deltas = [delta.to(editor.delta) for delta in deltas]
    for number, (delta, threshold) in enumerate(zip(deltas[:-1], thresholds, strict=False)):
        editor.shards.append(memories=delta, memory_id=torch.tensor(number), memory_threshold=torch.tensor(threshold))
    editor.delta.copy_(deltas[-1])
    editor.threshold.fill_(thresholds[-1])
    return deltas


def state(editor: Wise) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in editor.state_dict().items()}


def same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [*actual] == [*expected]
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different, f"{different} differ"


def learn(editor: Wise, *seeds: int) -> Wise:
    for seed in seeds:
        editor.edit([make_edit(seed)])
    return editor
