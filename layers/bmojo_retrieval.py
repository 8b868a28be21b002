"""B'MOJO with its stored tokens outside of the state: written where a chunk ends, fetched for the next one.

A design after the paper's "in-storage" memory, retrieval from an asynchronously updated memory (arXiv 2407.06324).
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from memzoo.layers.bmojo_parts import Call, Pair, Turn
from memzoo.layers.bmojo_selection import Chunks, Kept
from memzoo.layers.bmojo_state import BMojoState
from memzoo.layers.stores import Entries, MemoryStore

Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Retrieval:
    """What is in sight of a chunk: tokens that a store found for the queries of the chunk before.

    Attributes:
        store: Takes the tokens of every chunk that ends.
        size: Tokens that are fetched for a chunk.
        chunk: Tokens of a chunk.
        threshold: Tokens with a score up to it are not stored; None for all.
        queries: (batch, time, heads, head_dim) of the call.
        turn: Rotates keys (..., heads, d) by positions (...), where the store is to hold keys that are not rotated.
    """

    store: MemoryStore
    size: int
    chunk: int
    threshold: float | None
    queries: Tensor
    turn: Turn | None

    @torch.no_grad()
    def run(
        self, chunks: Chunks, kept: Kept, streams: Pair, past: int, state: BMojoState | None, call: Call
    ) -> tuple[Kept, Pair, Fields]:
        """Store every chunk that ends in this call, and fetch for the next one.

        Args:
            chunks: The tokens.
            kept: What is in sight before them.
            streams: Keys and values, as in ``EideticMemory.choose``.
            past: As there.
            state: Before the call.
            call: Its layout.

        Returns:
            What was in sight during every chunk of the call and after it, as ``EideticMemory.choose`` does.
        """
        sums = self._sums(chunks, streams[0].shape[2], state, call)
        sequences = [0] * len(sums) if state is None else numbers(self.store, cast(Tensor, state.eidetic_sequence))
        in_sight = [(kept, self._held(streams, state))]
        ends, firsts, befores = chunks.ended.tolist(), chunks.first.tolist(), call.before.tolist()
        for number in range(chunks.ended.shape[1]):
            kept, (keys, values) = in_sight[-1]
            if not any(ended[number] for ended in ends):
                in_sight.append(in_sight[-1])
                continue
            kept, keys, values = kept.map(Tensor.clone), keys.clone(), values.clone()
            for row, first in enumerate(firsts):
                if ends[row][number]:
                    start = (first + number) * self.chunk
                    place = 0 if call.is_step else start - befores[row] + past  # a step's rings are in order
                    own = row, slice(place, place + self.chunk)
                    at = row, number
                    entries = self._admitted(
                        streams[0][own].detach(), streams[1][own].detach(), chunks.positions[at], chunks.scores[at]
                    )
                    sequences[row] = self.store.append(sequences[row], start, entries)
                    found = self._fetch(sequences[row], (sums[at] / self.chunk).to(keys.dtype), start + self.chunk)
                    _fill(kept, (keys, values), row, found)
            in_sight.append((kept, (keys, values)))
        last = call.after // self.chunk - chunks.first
        fields = {
            "eidetic_sequence": names(self.store, sequences, sums.device),
            "eidetic_queries": sums[torch.arange(len(sums), device=sums.device), last],
        }
        pairs = torch.stack([keys for _, (keys, _) in in_sight], 1), torch.stack([v for _, (_, v) in in_sight], 1)
        return Kept.stack([kept for kept, _ in in_sight]), pairs, fields

    def _fetch(self, sequence: int, query: Tensor, before: int) -> Entries:
        """Find what the next chunk is to see, by a query (kv_heads, head_dim)."""
        found = self.store.query(sequence, query, self.size, before=before, version=self.store.snapshot())
        return found if self.turn is None else replace(found, keys=self.turn(found.keys, found.positions))

    def _sums(self, chunks: Chunks, kv_heads: int, state: BMojoState | None, call: Call) -> Tensor:
        """Sum the queries of every chunk, means over the heads of a group, in at least float32.

        Shape:
            Returns (batch, chunks + 1, kv_heads, head_dim).
        """
        queries = self.queries.to(torch.promote_types(self.queries.dtype, torch.float32))
        wide = call.blank(queries.unflatten(2, (kv_heads, -1)).mean(3).flatten(2))
        sums = wide.new_zeros(*chunks.scores.shape[:2], wide.shape[-1])
        if state is not None:
            sums[:, 0] = cast(Tensor, state.eidetic_queries).flatten(1)
        number = (call.positions // self.chunk - chunks.first[:, None]).expand(wide.shape[:2])
        sums.scatter_add_(1, number[..., None].expand_as(wide), wide)
        by_head: Tensor = sums.unflatten(-1, (kv_heads, -1))
        return by_head

    def _held(self, streams: Pair, state: BMojoState | None) -> Pair:
        """Keys and values of what is in sight when the call begins."""
        like = streams[0]
        if state is None:
            empty = like.new_zeros(len(like), self.size, *like.shape[2:])
            return empty, empty
        return cast(Tensor, state.eidetic_keys).to(like.dtype), cast(Tensor, state.eidetic_values).to(like.dtype)

    def _admitted(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor) -> Entries:
        """Leave out what the threshold does."""
        if self.turn is not None:
            keys = self.turn(keys, -positions)
        entries = keys, values, positions, scores
        if self.threshold is not None:
            chosen = scores > self.threshold
            entries = keys[chosen], values[chosen], positions[chosen], scores[chosen]
        return Entries(*entries)


def names(store: MemoryStore, sequences: list[int], device: torch.device) -> Tensor:
    """Return what a state calls sequences of a store, (batch,) and 0 for none: another store's are called otherwise."""
    called = [store.identity << 32 | sequence if sequence else 0 for sequence in sequences]
    return torch.tensor(called, dtype=torch.long, device=device)


def numbers(store: MemoryStore, named: Tensor) -> list[int]:
    """Return the sequences of a store by what a state calls them, ``names`` reversed.

    Raises:
        ValueError: They are another store's.
    """
    given: list[int] = named.tolist()
    if any(name and name >> 32 != store.identity for name in given):
        raise ValueError(
            f"state.eidetic_sequence={given} is of another store; pass the store that the state began with, or "
            f"state=None to start afresh"
        )
    return [name % 2**32 for name in given]


def _fill(kept: Kept, held: Pair, row: int, found: Entries) -> None:
    """Put what was found into the slots of a row, zeros behind it."""
    count = len(found.positions)
    for slots, new in zip(
        (kept.positions, kept.scores, *held), (found.positions, found.scores, found.keys, found.values), strict=True
    ):
        slots[row, :count] = new
        slots[row, count:] = 0
    kept.slots[row] = -1
    kept.exists[row] = torch.arange(kept.exists.shape[1], device=kept.exists.device) < count
