"""Stores of tokens outside of a layer's state: what they promise, and what they all do alike."""

import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self, TypeVar

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive

Held = TypeVar("Held")

KEY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Entries:
    """Tokens of one sequence, in the order of their positions.

    Attributes:
        keys: (count, kv_heads, head_dim).
        values: (count, kv_heads, head_dim).
        positions: (count,) int64, where they stand in the sequence.
        scores: (count,), at least float32: how much each is worth storing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All of it, in the order of the attributes."""
        return self.keys, self.values, self.positions, self.scores

    def select(self, index: Tensor | slice) -> "Entries":
        """Return the entries at an index, of a mask or of a slice."""
        return Entries(*(tensor[index] for tensor in self.tensors))

    def like(self, query: Tensor) -> "Entries":
        """Return them on the device of a query, keys and values in its dtype."""
        keys, values, positions, scores = self.tensors
        return Entries(keys.to(query), values.to(query), positions.to(query.device), scores.to(query.device))

    @staticmethod
    def join(parts: "list[Entries]") -> "Entries":
        """Put entries behind one another."""
        return Entries(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))


class MemoryStore(Protocol):
    """Takes the tokens of sequences, and finds those that a query asks for.

    Sequences are positive integers that the store hands out. What was appended becomes visible by commits, each of
    which makes a version: a set of whole appends that never changes again, named by an integer that only grows.

    All entries have the heads and the width of the first, and are held in its dtypes, which may be wider than their
    own; layers of one kind may share a store. It may be used from several threads. ``copy.deepcopy`` gives the store
    itself, and as a context manager it closes itself.
    """

    @property
    def identity(self) -> int:
        """A number below 2**31 that tells it from other stores. A store that is opened again, or copied, keeps it."""
        ...

    def append(self, sequence: int, start: int, entries: Entries) -> int:
        """Add tokens to the end of a sequence.

        Args:
            sequence: Which; 0 begins a new one.
            start: From this position on the tokens are the caller's own; no token of ``entries`` lies before it.
            entries: The tokens; may be none. They are copied.

        Returns:
            The sequence that now holds them. This is ``sequence``, unless something has been appended to that at
            ``start`` or behind it: then a new one, which shares everything before ``start`` with ``sequence`` and
            goes on with ``entries``. So a state may be continued twice, and no branch sees another one's tokens.

        Raises:
            ValueError: An argument does not fit the store, or the store is closed.
            RuntimeError: An earlier append could not be committed; nothing is taken any more.
        """
        ...

    def snapshot(self) -> int:
        """Return the latest committed version."""
        ...

    def query(self, sequence: int, query: Tensor, count: int, *, before: int, version: int | None = None) -> Entries:
        """Find the tokens of a sequence that answer a query best.

        Args:
            sequence: Which.
            query: (kv_heads, head_dim).
            count: How many tokens to return at most.
            before: Nothing at this position or behind it is seen.
            version: Nothing committed later is seen. None for the latest version.

        Returns:
            The tokens with the largest inner products ``(query * key).sum()``, of equal ones the earlier, in the order
            of their positions; on the device of the query, keys and values in its dtype.

        Raises:
            ValueError: An argument does not fit the store, or the store is closed.
        """
        ...

    def flush(self) -> None:
        """Wait until everything appended so far is committed.

        Raises:
            RuntimeError: It could not be.
        """
        ...

    def drop(self, sequences: Iterable[int]) -> None:
        """Delete sequences. What others share with them stays theirs.

        Raises:
            ValueError: One of them is not in the store.
        """
        ...

    def close(self) -> None:
        """Flush, and let go of everything. A closed store takes and gives nothing; closing it again does nothing.

        Raises:
            RuntimeError: Something could not be committed.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """What all entries of a store have in common."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    score_dtype: torch.dtype

    @staticmethod
    def of(entries: Entries) -> "Layout":
        """Read it off entries."""
        _, kv_heads, head_dim = entries.keys.shape
        return Layout(kv_heads, head_dim, entries.keys.dtype, entries.scores.dtype)

    def fits(self, other: "Layout") -> bool:
        """Whether a store of another layout can hold such entries as they are, in dtypes that may be wider."""
        return (self.kv_heads, self.head_dim) == (other.kv_heads, other.head_dim) and all(
            torch.promote_types(own, wider) == wider
            for own, wider in ((self.dtype, other.dtype), (self.score_dtype, other.score_dtype))
        )

    def as_json(self) -> list[int | str]:
        """Return what can be written down as JSON."""
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.score_dtype))
        return [self.kv_heads, self.head_dim, *dtypes]

    @staticmethod
    def from_json(written: "list[Any] | None") -> "Layout | None":
        """Read what was written down, which may be that there is none yet."""
        if written is None:
            return None
        kv_heads, head_dim, dtype, score_dtype = written
        return Layout(kv_heads, head_dim, getattr(torch, dtype), getattr(torch, score_dtype))

    def empty(self) -> Entries:
        """Return no entries."""
        keys = torch.empty(0, self.kv_heads, self.head_dim, dtype=self.dtype, device="cpu")
        return Entries(keys, keys, keys.new_empty(0, dtype=torch.long), keys.new_empty(0, dtype=self.score_dtype))


class Store(ABC):
    """What every store does alike: checks, copies, closing. ``_lock`` orders what changes the store."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._identity = 1 + secrets.randbelow(2**31 - 1)
        self._layout: Layout | None = None
        self._closed = False

    @property
    def identity(self) -> int:
        """See ``MemoryStore``."""
        return self._identity

    @abstractmethod
    def snapshot(self) -> int:
        """See ``MemoryStore``."""

    @abstractmethod
    def close(self) -> None:
        """See ``MemoryStore``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled; take it off the layer "
            f"(layer.store = None), or save layer.state_dict()"
        )

    @property
    def _is_forked(self) -> bool:
        """Whether this is the copy of a store in a forked process: threads and databases do not survive that."""
        return os.getpid() != self._process

    def _check_open(self) -> None:
        if self._is_forked:
            raise ValueError(
                f"this {type(self).__name__} belongs to process {self._process}; open one in this process, of a folder "
                f"with read_only=True"
            )
        if self._closed:
            raise ValueError(f"this {type(self).__name__} is closed; open another one")

    def _known(self, sequence: int, held: Mapping[int, Held]) -> Held:
        found = held.get(sequence)
        if found is None:
            raise ValueError(f"sequence={sequence} is not in the store; begin one with append(0, ...)")
        return found

    def _copy(self, start: int, entries: Entries) -> Entries:
        """Check entries, and return their own copy in host memory."""
        check_entries(start, entries)
        layout = Layout.of(entries)
        if self._layout is None:
            self._layout = layout
        elif not layout.fits(self._layout):
            raise ValueError(f"entries are of {layout}, the store holds {self._layout}; use another store for them")
        dtype, score_dtype = self._layout.dtype, self._layout.score_dtype
        return Entries(
            *(
                tensor.detach().to("cpu", target, copy=True, memory_format=torch.contiguous_format)
                for tensor, target in zip(entries.tensors, (dtype, dtype, torch.long, score_dtype), strict=True)
            )
        )

    def _check_query(self, query: Tensor, count: int, before: int, version: int | None) -> int:
        """Check the arguments of a query, and return the version that it is to see."""
        self._check_open()
        check_positive("count", count)
        if before < 0:
            raise ValueError(f"before={before} is no position; use one >= 0")
        layout = self._layout
        if not query.is_floating_point():
            raise ValueError(f"query has dtype {query.dtype}; it must be floating point, as keys and values will be")
        if layout is not None and query.shape != (layout.kv_heads, layout.head_dim):
            raise ValueError(
                f"query has shape {tuple(query.shape)}; the store holds keys of (kv_heads, head_dim) = "
                f"{layout.kv_heads, layout.head_dim}"
            )
        latest = self.snapshot()
        if version is not None and not 0 <= version <= latest:
            raise ValueError(
                f"version={version} is not committed; the latest is {latest}: use what snapshot() returned"
            )
        return latest if version is None else version


def lasting() -> AbstractContextManager[None]:
    """Make tensors that may be used and written to later: outside of ``torch.inference_mode``, though it may be on."""
    return torch.inference_mode(False)


def end_of(start: int, entries: Entries) -> int:
    """Return the position from which on a sequence goes on behind an append; ``start`` counts as taken."""
    return max(start, int(entries.positions[-1]) if len(entries) else 0) + 1


def check_entries(start: int, entries: Entries) -> None:
    """Require entries that a store can take: shapes, dtypes, positions that rise and lie at ``start`` or behind it.

    Raises:
        ValueError: They are not.
    """
    keys, values, positions, scores = entries.tensors
    if keys.dim() != 3 or 0 in keys.shape[1:] or keys.dtype not in KEY_DTYPES:
        raise ValueError(
            f"entries.keys are {tuple(keys.shape)} of {keys.dtype}; they must be (count, kv_heads, head_dim), of "
            f"float16, bfloat16, float32 or float64"
        )
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"entries.values are {tuple(values.shape)} of {values.dtype}; they must be like entries.keys, "
            f"{tuple(keys.shape)} of {keys.dtype}"
        )
    if positions.shape != keys.shape[:1] or positions.dtype != torch.long:
        raise ValueError(
            f"entries.positions are {tuple(positions.shape)} of {positions.dtype}; they must be ({len(keys)},), int64"
        )
    if scores.shape != keys.shape[:1] or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"entries.scores are {tuple(scores.shape)} of {scores.dtype}; they must be ({len(keys)},), float32 or "
            f"float64"
        )
    if bool(scores.isnan().any()):
        raise ValueError("entries.scores hold NaN, which has no place in an order; look for it in what was scored")
    if start < 0:
        raise ValueError(f"start={start} is no position; use one >= 0")
    if len(positions) and (int(positions[0]) < start or not bool((positions[1:] > positions[:-1]).all())):
        raise ValueError(
            f"entries.positions must rise, from start={start} or behind it, but begin {positions[:8].tolist()}; sort "
            f"the entries"
        )
