"""MemoryReader: a model together with the memories it reads, for whatever reads, steps or generates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from memzoo.arch.causal_lm import CausalLMState
from memzoo.arch.generation import Decoder, generate
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.errors import check_positive

if TYPE_CHECKING:
    from memzoo.arch.hierarchical_memory import HierarchicalMemoryLM

Reroute = Callable[[Tensor], Fetched | None]


@dataclass(frozen=True)
class MemoryReader:
    """A model that reads the same memories in every call: route once, on the prompt.

    ``reader = model.reading(bank.fetch(bank.route(embeddings)))``

    Row i of every batch reads the memories that were fetched for row i. Rows that are repeated or put into another
    order, as by a beam search, need a reader of their own: ``model.reading(bank.fetch(paths[index]))``. A block that
    several rows read is fetched once.

    Attributes:
        model: Its weights and methods.
        memories: What every row reads.
    """

    model: "HierarchicalMemoryLM"
    memories: Fetched

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    def forward(
        self, tokens: Tensor, state: CausalLMState | None = None, **options: Any
    ) -> tuple[Tensor, CausalLMState]:
        """Read a piece of every row's text, as ``CausalLM.forward`` does, with its keywords."""
        logits, state = self.model(tokens, state, memories=self.memories, **options)
        return logits, state

    __call__ = forward

    def prefill(
        self, tokens: Tensor, state: CausalLMState | None = None, **options: Any
    ) -> tuple[Tensor, CausalLMState]:
        """Read a prompt, as ``CausalLM.prefill`` does, with its keywords."""
        return self.model.prefill(tokens, state, memories=self.memories, **options)

    def step(self, token: Tensor, state: CausalLMState | None = None, **options: Any) -> tuple[Tensor, CausalLMState]:
        """Read one token a row, as ``CausalLM.step`` does, with its keywords."""
        return self.model.step(token, state, memories=self.memories, **options)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        reroute: Reroute | None = None,
        every: int = 64,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Continue a prompt, yielding one token a row at a time; see ``memzoo.arch.generation.generate``.

        Args:
            tokens: The prompt.
            max_new_tokens: Most tokens to yield.
            reroute: Shown the prompt and what was generated, (batch, time), with the padding of the prompt; returns
                the memories to read from the newest of these tokens on, or None to go on with the same ones. When to
                change is up to it: ``bank.tree.route(embeddings, keep=paths, margin=0.1)`` leaves a node only for one
                that is clearly nearer. Keys and values of earlier tokens stay as they were computed, so the cache stays
                valid. Where ``state`` is given, the text that it holds is not shown.
            every: Generated tokens between two calls of ``reroute``.
            **sampling: As there, such as ``temperature`` and ``stop``.

        Raises:
            ValueError: As there, ``every`` is not positive, or ``step`` is given with ``reroute``.
        """
        check_positive("every", every)
        if reroute is not None and sampling.get("step") is not None:
            raise ValueError("step reads the memories it was made with, and reroute changes them: pass one of the two")
        decoder = self if reroute is None else _Rerouted(self, tokens, reroute, every)
        return generate(cast(Decoder, decoder), tokens, max_new_tokens, **sampling)


class _Rerouted:
    """A decoder whose memories change on the way."""

    def __init__(self, reader: MemoryReader, prompt: Tensor, reroute: Reroute, every: int) -> None:
        self.vocab_size = reader.vocab_size
        self.prefill = reader.prefill
        self._reader, self._reroute, self._every = reader, reroute, every
        self._prompt, self._seen = prompt, list[Tensor]()

    def step(self, token: Tensor, state: CausalLMState, *, donate: bool = False) -> tuple[Tensor, CausalLMState]:
        self._seen.append(token)
        if len(self._seen) % self._every == 0:
            memories = self._reroute(torch.cat([self._prompt, torch.stack(self._seen, 1)], 1))
            if memories is not None:
                self._reader = replace(self._reader, memories=memories)
        return self._reader.step(token, state, donate=donate)
