"""How a model reads the chunks of a document: each behind its prefix, or from the state that the last one left."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.stream import Chunk


class ChunkReader:
    """Reads chunks in their order.

    Args:
        model: With the interface of ``memzoo.arch.CausalLM``.
        reuse_state: Chunks that go on from the state behind the chunk before, between two that read their prefix.
        prefix_gradient: Whether a gradient reaches back into what was made of the prefix. If not, the prefix is read
            without one, then the chunk from the state behind it.
    """

    def __init__(self, model: nn.Module, *, reuse_state: int, prefix_gradient: bool) -> None:
        self._model, self._reuse_state, self._prefix_gradient = model, reuse_state, prefix_gradient
        self._state: Any = None  # behind the chunk before
        self._takes_last = "last" in signature(model.forward).parameters

    def start(self) -> None:
        """Forget the document before."""
        self._state = None

    def read(self, chunk: Chunk, *, afresh: bool = False) -> tuple[NextTokens, Tensor, Any]:
        """Return a chunk's targets, their losses and the state behind it.

        Args:
            chunk: To read.
            afresh: From its prefix, whether or not there is a state to go on from.
        """
        afresh = afresh or chunk.number % (self._reuse_state + 1) == 0
        if afresh and chunk.prefix and not self._prefix_gradient and torch.is_grad_enabled():
            with torch.no_grad():
                _, state = self._call(chunk.inputs[:, : chunk.prefix], None, last=1)
            afresh = False
        else:
            state = None if afresh else self._state
        pieces = chunk.pieces(0 if afresh else chunk.prefix)
        logits, state = self._call(pieces.inputs, state, last=chunk.scored)
        pieces = pieces.last(logits.shape[1])
        return pieces, pieces.losses(logits), state

    def keep(self, state: Any) -> None:
        """Go on from a state with the next chunk that does not read its prefix."""
        if self._reuse_state > 0:
            self._state = state.detach()

    def _call(self, tokens: Tensor, state: Any, *, last: int) -> tuple[Tensor, Any]:
        """Read tokens; a model that can leaves out what serves none of the last ones."""
        wanted = {"last": last} if self._takes_last and last < tokens.shape[1] else {}
        logits, state = self._model(tokens, state, **wanted)
        return logits, state
