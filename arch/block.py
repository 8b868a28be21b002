"""Block: a sequence mixer and a channel layer on a residual stream, each behind a norm."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.layers.banks.fetched import LayerMemories
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.norm import RMSNorm
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


class ResidualBlock(nn.Module):
    """The parts of every block: what mixes, what transforms every token by itself, and a norm before each.

    A subclass writes ``forward``. What a call carries on to the next one is up to ``Block``.

    Args:
        mixer: Reads the normed stream, and maybe more; has a ``dim``.
        ffn: Channel layer, ``y = ffn(x, trace=None)``; None leaves that half out. One that says ``takes_residual`` is
            shown the stream that its output is added to, and which tokens are real:
            ``ffn(x, residual=stream, mask=mask, trace=None)``. One that says ``takes_memories`` is handed those of a
            memory bank where there are any: ``ffn(x, memories=memories, trace=None)``.
        norm: Builds a norm from a width.
        normed: Whether the mixer gets the stream normed.
    """

    dim: int

    def __init__(
        self,
        mixer: nn.Module,
        ffn: nn.Module | None = None,
        *,
        norm: Callable[[int], nn.Module] = RMSNorm,
        normed: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim = cast(int, mixer.dim)
        self.mixer_norm = norm(dim) if normed else nn.Identity()
        self.mixer = mixer
        self.ffn_norm = None if ffn is None else norm(dim)
        self.ffn = ffn

    def feed_forward(self, x: Tensor, trace: Trace | None) -> Tensor:
        """Run the second half: ``x + ffn(norm(x))``."""
        fed = self.fed(x, trace)
        return x if fed is None else x + fed

    def fed(
        self, x: Tensor, trace: Trace | None, *, mask: Tensor | None = None, memories: LayerMemories | None = None
    ) -> Tensor | None:
        """Return what the second half adds to the stream, ``ffn(norm(x))``; None without a channel layer."""
        if self.ffn is None or self.ffn_norm is None:
            return None
        options: dict[str, Any] = {"residual": x, "mask": mask} if getattr(self.ffn, "takes_residual", False) else {}
        options |= taken_memories(self.ffn, memories)
        y: Tensor = self.ffn(self.ffn_norm(x), trace=None if trace is None else trace.scope("ffn"), **options)
        return y


def taken_memories(layer: nn.Module, memories: LayerMemories | None) -> dict[str, LayerMemories]:
    """Return the keyword that hands memories to a layer, if there are any and it takes them."""
    return {"memories": memories} if memories is not None and getattr(layer, "takes_memories", False) else {}


def report_update(name: str, y: Tensor, trace: Trace | None) -> None:
    """Report how much half a block adds to the stream: the Euclidean norm of every token's ``y``, (batch, time)."""
    if trace is not None and trace.wants_signals:
        wide = torch.promote_types(y.dtype, torch.float32)
        trace.signal(name, torch.linalg.vector_norm(y, dim=-1, dtype=wide))


class Block(ResidualBlock):
    """Pre-norm residual block: ``x + mixer(norm(x))``, then ``x + ffn(norm(x))``.

    Any mixer and any channel layer of the catalog fit. A trace that wants signals gets how much either half adds,
    ``mixer_update`` and ``ffn_update``. A mixer that says ``reads_residual`` norms the residual stream
    itself, so it gets ``x`` as it is. The memories of a bank go to the halves that say ``takes_memories``.

    Args:
        mixer: Mixes along time; its ``dim`` is the block's.
        ffn: Channel layer, ``y = ffn(x, trace=None)``; None leaves that half out.
        norm: Builds a norm from a width.

    Shape:
        x: (batch, time, dim). mask, doc_ids: (batch, time). Returns (batch, time, dim) and the mixer's state.
    """

    mixer: SequenceMixer

    def __init__(
        self, mixer: SequenceMixer, ffn: nn.Module | None = None, *, norm: Callable[[int], nn.Module] = RMSNorm
    ) -> None:
        super().__init__(mixer, ffn, norm=norm, normed=not mixer.reads_residual)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Return the mixer's state of ``batch_size`` fresh rows."""
        return self.mixer.initial_state(batch_size, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        return_memory: bool = False,
        memories: LayerMemories | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, Any] | tuple[Tensor, Any, Tensor]:
        """Run both halves; other arguments and what is returned are those of ``SequenceMixer.forward``.

        Args:
            x: The residual stream.
            state: Of the mixer.
            mask: True at real tokens.
            doc_ids: Documents packed in one row.
            trace: Collects losses and signals.
            donate: Allow the storage of ``state`` to be reused.
            return_memory: Return what the mixer read too.
            memories: What this block reads of a memory bank, a part for every row of ``x``; None for nothing.
            last: Tokens at the end that are wanted; the channel layer runs for these alone. None for all.
        """
        mixer_trace = None if trace is None else trace.scope("mixer")
        wanted: dict[str, Any] = {"return_memory": True} if return_memory else {}
        wanted |= taken_memories(self.mixer, memories)
        mixed, *rest = self.mixer(
            self.mixer_norm(x), state, mask=mask, doc_ids=doc_ids, trace=mixer_trace, donate=donate, **wanted
        )
        report_update("mixer_update", mixed, trace)
        x = x + mixed
        if last is not None:
            x, mask = x[:, -last:], None if mask is None else mask[:, -last:]
        fed = self.fed(x, trace, mask=mask, memories=memories)
        if fed is not None:
            report_update("ffn_update", fed, trace)
            x = x + fed
        return x, *rest
