"""Attached memories: what does not fit a host or a call is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from memzoo.layers import AttachedMemories, FeedForward, SwiGLU
from memzoo.layers.banks.layout import BankLayout
from tests.layers.attached_memories_cases import Odd, Stack, fetch, inputs, layout_of, stack


def other_layout(**changes: Any) -> Callable[[AttachedMemories], Any]:
    sizes = {"num_layers": 3, "dim": 8, "rows": (4, 2), "branching": 2} | changes
    return lambda memories: memories.reading(fetch(BankLayout(**sizes))).__enter__()


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "layers": (other_layout(num_layers=2), "num_layers=2, this model needs num_layers=3; fetch from a bank of"),
    "width": (other_layout(dim=16), "dim=16, this model needs dim=8"),
    "gate": (other_layout(gated=False), "gated=False, this model needs gated=True"),
    "activation": (other_layout(activation="relu"), "activation='relu', this model needs activation='silu'"),
    "kind": (other_layout(kind="lora_ffn", hidden_dim=9), "kind='lora_ffn', this model needs kind='ffn'"),
    "detached": (lambda memories: (memories.detach(), other_layout()(memories)), "were detached; use AttachedMemories"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_memories_that_do_not_fit_are_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(AttachedMemories.attach(stack()))


def test_a_batch_of_another_size_is_refused() -> None:
    host = stack()
    memories = AttachedMemories.attach(host)
    with memories.reading(fetch(layout_of(memories))), pytest.raises(ValueError, match=r"batch 2, .* batch_size=3"):
        host(inputs(2))


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: AttachedMemories.attach(nn.Linear(2, 2)), r"model=Linear has no feed-forward .* sites="),
    "no sites": (lambda: AttachedMemories.attach(stack(), sites=[]), r"sites=\[\] are not names"),
    "unknown": (lambda: AttachedMemories.attach(stack(), sites=["layers.3"]), r"sites=\['layers.3'\] are not names"),
    "twice": (lambda: AttachedMemories.attach(stack(), sites=["layers.0"] * 2), "each once"),
    "unstated": (
        lambda: AttachedMemories.attach(Stack(Odd()), sites=["layers.0"], dim=8, gated=False),
        "activation=None is not known of site 'layers.0'; state it",
    ),
    "widths": (
        lambda: AttachedMemories.attach(Stack(SwiGLU(8), SwiGLU(16))),
        "'layers.0' has dim=8, 'layers.1' has dim=16",
    ),
    "kinds": (lambda: AttachedMemories.attach(Stack(SwiGLU(8), FeedForward(8))), "activation='silu', .*'gelu'"),
    "dim": (lambda: AttachedMemories.attach(stack(), dim=0), "dim=0 is not a whole number"),
    "activation": (lambda: AttachedMemories.attach(stack(), activation="sulu"), "did you mean 'silu'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_host_that_does_not_fit_is_refused(case: str) -> None:
    call, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message):
        call()
