"""Persistent memory: learned tokens that stand before every sequence (Titans, arXiv 2501.00663, section 3.3)."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_positive
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.ops.memory_arguments import any_row
from memzoo.layers.state import MixerState

AnyMixerState = TypeVar("AnyMixerState", bound=MixerState)


class PersistentMemory(nn.Module):
    """Learned tokens P that do not depend on the input: a layer sees ``[P || x]`` and drops its outputs at P.

    They hold what a task needs whatever the context, and are fixed at test time. How a layer sees them is its own
    matter: attention takes them as keys and values outside its window (``Attention.attend``), a memory with a state
    reads them before a row's first token (``prime``).

    Args:
        dim: Width of a token.
        num_tokens: Number of tokens, N_p. A layer without persistent memory has no such module.

    Raises:
        ValueError: A number is not positive.

    Reference:
        arXiv 2501.00663, section 3.3.

    Note:
        The paper does not say whether the tokens are shared between blocks: here each layer has its own.
    """

    no_weight_decay = ("tokens",)

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("num_tokens", num_tokens)
        self.tokens = nn.Parameter(torch.empty(num_tokens, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tokens as large as normalised tokens are."""
        nn.init.normal_(self.tokens)

    def prime(
        self,
        mixer: SequenceMixer,
        state: AnyMixerState | None,
        batch_size: int,
        *,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[AnyMixerState, Tensor | None]:
        """Let fresh rows of ``mixer`` begin as rows that have read the tokens.

        The tokens are the same for every row, so ``mixer`` reads them once, as a batch of one. Where no row is fresh,
        as while a text is generated, nothing is read; except with gradients, so that every parameter takes part in
        every backward pass.

        Args:
            mixer: Reads the tokens; the position in its state counts them. Its state must be of constant size.
            state: Its state; None if all rows are fresh. Not changed.
            batch_size: Number of rows.
            norm: What the tokens pass through on their way to ``mixer``, if anything.

        Returns:
            The state to go on from, and the outputs at the tokens, (1, num_tokens, dim), or None if they were not read.

        Raises:
            ValueError: ``state`` is not of this mixer.
        """
        if state is not None and not any_row(state.position == 0):
            return state, None
        tokens = self.tokens[None]
        outputs, primed = mixer.mix(
            tokens if norm is None else norm(tokens), None, lengths=None, trace=None, donate=False
        )
        if state is None:
            return primed.map(lambda t: t.expand(batch_size, *t.shape[1:])), outputs
        _check_fit(state, primed, mixer)
        fresh, old = state.position == 0, iter(state.named_tensors().values())
        return primed.map(lambda new: torch.where(fresh.view(-1, *[1] * (new.dim() - 1)), new, next(old))), outputs

    def extra_repr(self) -> str:
        """Number and width of the tokens."""
        num_tokens, dim = self.tokens.shape
        return f"{dim}, num_tokens={num_tokens}"


def _check_fit(state: MixerState, primed: MixerState, mixer: SequenceMixer) -> None:
    given = {name: tuple(tensor.shape[1:]) for name, tensor in state.named_tensors().items()}
    own = {name: tuple(tensor.shape[1:]) for name, tensor in primed.named_tensors().items()}
    if given != own:
        name = min(name for name in given.keys() | own.keys() if given.get(name) != own.get(name))
        raise ValueError(
            f"state holds {name} of shape {given.get(name)}, the one of this {type(mixer).__name__} {own.get(name)}: "
            f"pass what its previous call returned, or None to start afresh"
        )
