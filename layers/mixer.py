"""SequenceMixer: the contract every causal memory keeps, with masks and packed documents handled once for all."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memzoo.layers.errors import check_dtype, check_width
from memzoo.layers.packing import Ragged, left_align, split_documents
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace


class SequenceMixer(nn.Module, ABC):
    """A causal layer over (batch, time, dim) that carries a state.

    ``y, state = mixer(x, state=None, *, mask=None, doc_ids=None, trace=None, donate=False)``

    A subclass writes ``initial_state`` and ``mix``; the latter sees rows that begin at the left, of given lengths, and
    is called by ``forward`` after masks and documents have been unpacked. A subclass with a faster way to do that
    overrides ``forward``.

    Args:
        dim: Width of ``x`` and ``y``.
    """

    state_class: ClassVar[type[MixerState]] = MixerState
    """What ``initial_state`` and ``forward`` return."""

    reads_residual: ClassVar[bool] = False
    """Whether ``x`` is to be the residual stream as it is: the mixer norms it itself. ``Block`` then puts no norm."""

    native_segments: ClassVar[bool] = False
    """Whether ``mix`` takes ``cu_seqlens``. Documents then come to it end to end, instead of in padded rows."""

    memory_dim: int | None = None
    """Width of what ``return_memory`` gives: what the mixer read before it gated and projected it. None for nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @property
    def gives_innovation(self) -> bool:
        """Whether ``mix`` takes ``return_innovation``: then it returns a last thing beside the outputs.

        That is how much every token changes the memory beyond what it foresaw, (batch, time); see ``MatrixMemory``.
        """
        return False

    @abstractmethod
    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Return the state of ``batch_size`` fresh rows, zeros by convention.

        Args:
            batch_size: Rows.
            device: Where; the parameters' device by default.
            dtype: Of the inputs to come; recurrent parts are kept in at least float32. The parameters' by default.
        """

    @abstractmethod
    def mix(
        self, x: Tensor, state: MixerState | None, *, lengths: Tensor | None, trace: Trace | None, donate: bool
    ) -> tuple[Any, Any]:
        """Mix rows that begin at the left.

        With ``native_segments``, ``mix`` takes one more keyword, ``cu_seqlens: Tensor | None = None``: (rows + 1,)
        integers, the borders of rows that lie end to end in an ``x`` of batch 1. ``state`` then has a row for each of
        them, also for those of no token, and ``lengths`` is None. With a ``memory_dim``, it takes
        ``return_memory: bool = False``, and then returns a pair of outputs and memory in place of the outputs.

        Args:
            x: (batch, time, dim).
            state: What earlier calls left; None for fresh rows. Not changed unless ``donate``.
            lengths: (batch,) tokens that exist in each row; what lies to their right must change neither the outputs
                before them nor the returned state, and outputs there are arbitrary. None if all exist.
            trace: Where to report, or None.
            donate: The caller gives ``state`` away; its storage may be reused.

        Returns:
            The outputs (batch, time, dim) and the new state. ``position`` must be advanced; ``document`` is kept by
            ``forward``.
        """

    @overload
    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        return_memory: Literal[False] = False,
    ) -> tuple[Tensor, Any]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        return_memory: Literal[True],
    ) -> tuple[Tensor, Any, Tensor]: ...

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
    ) -> tuple[Tensor, Any] | tuple[Tensor, Any, Tensor]:
        """Mix a piece of every row's sequence.

        Args:
            x: The tokens.
            state: The state a previous call returned; None starts afresh. Never changed in place unless ``donate``.
            mask: True at real tokens. A masked token leaves the state bit-identical and its output is zero.
            doc_ids: Documents packed in one row: a run of equal ids is one document, seen by no other. The first one
                continues ``state`` if it carries the same id as the last token of the previous call.
            trace: Collects losses and signals.
            donate: Allow the storage of ``state`` to be reused; it must not be read afterwards.
            return_memory: Return a third thing, what the mixer read for every token before it gated and projected it:
                what ``GatedMemoryUnit`` takes.

        Shape:
            x: (batch, time, dim), time >= 1. mask, doc_ids: (batch, time). Returns (batch, time, dim) and the state,
            with ``return_memory`` also (batch, time, memory_dim).

        Raises:
            ValueError: A shape or dtype is wrong, ``state`` is of another layer or has another batch size, or the mixer
                has no memory to return.
        """
        self.check_call(x, state, mask, doc_ids)
        if return_memory and self.memory_dim is None:
            raise ValueError(
                f"return_memory=True, but {type(self).__name__} has no memory to return; use a layer with a memory_dim"
            )
        options: dict[str, Any] = {"return_memory": True} if return_memory else {}
        rows, start = self.unpack(state, mask, doc_ids)
        if rows is None:
            y, end = self.mix(x, state, lengths=None, trace=trace, donate=donate, **options)
        else:
            own = None if trace is None else Trace(signals=trace.wants_signals)
            options |= {"lengths": rows.lengths, "trace": own, "donate": False}
            if rows.cu_seqlens is not None:
                options |= {"lengths": None, "cu_seqlens": rows.cu_seqlens}
            y, end = self.mix(rows.gather(x), start, **options)
            y = tree_map(rows.scatter, y)
            end = self.pack(end, state, rows, has_documents=doc_ids is not None)
            if trace is not None and own is not None:
                _report(own, trace, rows)
        if trace is not None and trace.wants_signals:
            self.report_state(end, trace)
        return (y[0], end, y[1]) if return_memory else (y, end)

    def check_call(self, x: Tensor, state: MixerState | None, mask: Tensor | None, doc_ids: Tensor | None) -> None:
        """Check the arguments of ``forward``.

        Raises:
            ValueError: A shape or dtype is wrong, or ``state`` is of another layer or has another batch size.
        """
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        check_grid("mask", mask, x, boolean=True)
        check_grid("doc_ids", doc_ids, x, boolean=False)
        if state is not None and not isinstance(state, self.state_class):
            raise ValueError(
                f"state is a {type(state).__name__}, {type(self).__name__} carries {self.state_class.__name__}; "
                f"pass what its previous call returned, or None to start afresh"
            )
        if state is not None and state.position.shape[0] != x.shape[0]:
            raise ValueError(
                f"state has {state.position.shape[0]} rows, x has batch {x.shape[0]}; "
                f"use state.reorder(index) to match them, or state=None to start afresh"
            )

    def unpack(
        self, state: MixerState | None, mask: Tensor | None, doc_ids: Tensor | None
    ) -> tuple[Ragged | None, Any]:
        """Turn masks and documents into rows that begin at the left, and return them with the state of each row.

        Without either, there is nothing to do: rows are None and the state is as it came.
        """
        if doc_ids is not None:
            rows = split_documents(doc_ids.long(), mask, end_to_end=self.native_segments)
            if state is None:
                return rows, None
            start = state.reorder(rows.owner)
            same = (start.document == rows.document) | (rows.lengths == 0)
            return rows, start.reset(~(rows.first_document & same))
        return (None if mask is None else left_align(mask)), state

    def pack(self, end: Any, state: MixerState | None, rows: Ragged, *, has_documents: bool) -> Any:
        """Turn the state of unpacked rows into that of the batch: of each of its rows, the last document's."""
        end = end.reset(end.position == 0)  # a row that has seen no token is fresh, and fresh is zero
        if not has_documents:
            return end
        end = end.reorder(rows.last)
        document = rows.document[rows.last]
        if state is not None:
            document = torch.where(rows.lengths[rows.last] > 0, document, state.document)
        return replace(end, document=document)

    def report_state(self, state: Any, trace: Trace) -> None:
        """Report signals of the state after a call, a row for each of the batch. Called where signals are wanted.

        What ``mix`` reports is of its own rows, which may be documents.
        """


def check_grid(name: str, grid: Tensor | None, x: Tensor, *, boolean: bool) -> None:
    """Require a (batch, time) tensor of booleans or of integers, like the input ``x`` (batch, time, ...).

    Raises:
        ValueError: Shape or dtype is wrong.
    """
    if grid is None:
        return
    if grid.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(grid.shape)}; it must be (batch, time) = {tuple(x.shape[:2])}")
    is_boolean = grid.dtype == torch.bool
    if boolean and not is_boolean:
        raise ValueError(f"{name} has dtype {grid.dtype}; it must be bool, True at real tokens: use {name} != 0")
    if not boolean and (is_boolean or grid.is_floating_point()):
        raise ValueError(f"{name} has dtype {grid.dtype}; document ids are integers: use {name}.long()")


def counters(
    state: MixerState | None, x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (position before, position after, document), each (rows,) int64, for a call of ``mix``."""
    batch, time = x.shape[:2]
    if cu_seqlens is not None:
        lengths, batch = cu_seqlens.diff(), len(cu_seqlens) - 1
    if state is None:
        before = torch.zeros(batch, dtype=torch.long, device=x.device)
        document = torch.zeros(batch, dtype=torch.long, device=x.device)
    else:
        before, document = state.position, state.document
    return before, before + (time if lengths is None else lengths), document


def _report(own: Trace, trace: Trace, rows: Ragged) -> None:
    """Hand on what a layer reported on unpacked rows, per-token signals put back in their places."""

    def in_place(signal: Tensor) -> Tensor:
        per_token = signal.shape[:2] == rows.index.shape
        return rows.scatter(signal) if per_token else signal

    trace.merge(own, in_place)
