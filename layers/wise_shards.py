"""Shards of WISE: finished ones, and the side memories that they were merged into."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.layers.ties import ties
from memzoo.layers.wise_options import WiseOptions

PENDING = -1  # the memory of a shard that is not merged yet
OLD_WEIGHT = 0.6  # of a memory whose shards are gone, when others are merged into it; EasyEdit's


class GrowingBuffers(nn.Module):
    """A module whose buffers have as many rows as they need: those of what is loaded decide.

    What has rows is replaced and never written, but by loading: who keeps the buffers keeps what they held.
    """

    def fit(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Give the buffers that are named these shapes; zeros, in new tensors."""
        for name, buffer in self.named_buffers(recurse=False):
            if name in shapes and tuple(buffer.shape) != tuple(shapes[name]):
                setattr(self, name, buffer.new_zeros(*shapes[name]))

    def keep(self, names: Sequence[str], rows: Tensor) -> None:
        """Leave only some rows of some buffers."""
        for name in names:
            setattr(self, name, self.get_buffer(name)[rows])

    def append(self, **rows: Tensor) -> None:
        """Add one row to each of the named buffers."""
        for name, row in rows.items():
            buffer = self.get_buffer(name)
            setattr(self, name, torch.cat([buffer, row.detach().to(buffer)[None]]))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        found = {
            name.removeprefix(prefix): tensor.shape
            for name, tensor in state_dict.items()
            if name[: len(prefix)] == prefix
        }
        self.fit(found)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class WiseShards(GrowingBuffers):
    """Finished shards and merged memories; each a change of the main matrix, dense.

    A shard is kept from when it is finished until it is merged, and beyond as ``keep_shards`` says: all shards of a
    memory or none.

    Args:
        options: Of the editor.
        like: The open shard: its shape, dtype and device.

    Attributes:
        shards: (shards, out, in) the finished shards that are kept.
        shard_id: (shards,) their numbers.
        shard_threshold: (shards,) their thresholds.
        shard_edits: (shards,) how many edits are in each.
        shard_memory: (shards,) the number of the memory that each was merged into, or ``PENDING``.
        memories: (memories, out, in) side memories.
        memory_id: (memories,) their numbers.
        memory_threshold: (memories,) their thresholds.
        merges: How often shards were merged.
    """

    shards: Tensor
    shard_id: Tensor
    shard_threshold: Tensor
    shard_edits: Tensor
    shard_memory: Tensor
    memories: Tensor
    memory_id: Tensor
    memory_threshold: Tensor
    merges: Tensor

    def __init__(self, options: WiseOptions, like: Tensor) -> None:
        super().__init__()
        self.options = options
        self._num_pending = 0  # known without asking the device, and to a compiled host
        number: Any = {"dtype": torch.int64, "device": like.device}
        for name in ("shards", "memories"):
            self.register_buffer(name, like.new_zeros(0, *like.shape))
        for name in ("shard_threshold", "memory_threshold"):
            self.register_buffer(name, like.new_zeros(0))
        for name in ("shard_id", "shard_edits", "shard_memory", "memory_id"):
            self.register_buffer(name, torch.zeros(0, **number))
        self.register_buffer("merges", torch.zeros((), **number))

    def clear(self) -> None:
        """Forget all."""
        self.fit({name: (0, *buffer.shape[1:]) for name, buffer in self.named_buffers() if buffer.dim()})
        self.merges.zero_()
        self.note()

    def add(self, delta: Tensor, number: Tensor, *, threshold: Tensor, edits: Tensor) -> None:
        """Keep a finished shard."""
        pending = torch.tensor(PENDING)
        self.append(shards=delta, shard_id=number, shard_threshold=threshold, shard_edits=edits, shard_memory=pending)
        self.note()

    @property
    def pending(self) -> Tensor:
        """(shards,) bool, those that are not merged yet: the last ones."""
        return self.shard_memory == PENDING

    def next_id(self) -> int:
        """Return the number of the next shard: ``merges * shards_per_merge`` and its place, the first that is free."""
        first = int(self.merges) * self.options.shards_per_merge
        taken = set(self.shard_id[self.pending].tolist())
        return next(number for number in range(first, first + self.options.shards_per_merge) if number not in taken)

    def sides(self) -> tuple[list[Tensor], Tensor]:
        """Return what is read beside the main matrix: memories, then shards that are not merged yet; and thresholds."""
        first = len(self.shards) - self._num_pending
        thresholds = torch.cat([self.memory_threshold, self.shard_threshold[first:]])
        return [*self.memories, *self.shards[first:]], thresholds

    @property
    def is_full(self) -> bool:
        """Whether as many shards are finished as are merged at a time."""
        return self._num_pending >= self.options.shards_per_merge

    def merge(self) -> int:
        """Merge the pending shards; return the number of the memory that they are in now."""
        merging, mode = self.pending, self.options.mode
        memory = int(self.merges) if mode == "retrieve" or not len(self.memories) else int(self.memory_id[0])
        whole, own = self.memory_id == memory, self.shard_memory == memory
        blended = bool(whole.any()) and (not bool(own.any()) or int((own | merging).sum()) > self.options.keep_shards)
        if blended:
            self._set(memory, *self._blend(self.memories[whole], self.memory_threshold[whole], merging))
        else:
            self._set(memory, *self._merge(own | merging))
        self.shard_memory = torch.where(merging, memory, self.shard_memory)
        self.merges += 1
        self._drop(memory if blended else None)
        self.note()
        return memory

    def rollback(self, shard: int) -> int:
        """Forget a shard: its memory is then what merging the others gives. Return how many edits it had.

        Raises:
            ValueError: It is not kept.
        """
        if shard not in self.shard_id.tolist():
            raise ValueError(
                f"shard={shard} is not kept, only {self.shard_id.tolist()} and the open one; merged shards are dropped "
                f"when they are more than keep_shards={self.options.keep_shards}"
            )
        place = self.shard_id.tolist().index(shard)
        edits, memory = int(self.shard_edits[place]), int(self.shard_memory[place])
        self._keep_shards(self.shard_id != shard)
        if memory != PENDING:
            self._rebuild(memory)
        self.note()
        return edits

    def lower(self, memory: int, threshold: Tensor) -> None:
        """Lower the threshold of a memory to what was measured, if that is less."""
        own = self.memory_id == memory
        self.memory_threshold = torch.where(own, self.memory_threshold.minimum(threshold), self.memory_threshold)

    # Parts

    def note(self) -> None:
        """Note how many shards are pending, once that changed."""
        self._num_pending = int(self.pending.sum())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.note()

    def _rebuild(self, memory: int) -> None:
        """Make a memory of all its shards, with equal weights; without any it is gone."""
        own = self.shard_memory == memory
        if bool(own.any()):
            self._set(memory, *self._merge(own))
        else:
            self.keep(["memories", "memory_id", "memory_threshold"], self.memory_id != memory)

    def _merge(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what some shards make with equal weights, and its threshold."""
        deltas = [*self.shards[rows]]
        whole = ties(deltas, [1 / len(deltas)] * len(deltas), density=self.options.density)
        return whole, self.shard_threshold[rows].min()

    def _blend(self, memory: Tensor, threshold: Tensor, merging: Tensor) -> tuple[Tensor, Tensor]:
        """Return what shards make with a memory whose own shards are not all kept, (1, out, in), and its threshold."""
        deltas = [*self.shards[merging]]
        weights = [OLD_WEIGHT, *[(1 - OLD_WEIGHT) / len(deltas)] * len(deltas)]
        densities = [1.0, *[self.options.density] * len(deltas)]  # what was merged is not trimmed again
        whole = ties([*memory, *deltas], weights, density=densities)
        return whole, threshold.minimum(self.shard_threshold[merging].min())

    def _set(self, memory: int, delta: Tensor, threshold: Tensor) -> None:
        """Give a memory what it is from now on; a new one if there is none of that number. Nothing is written."""
        own = self.memory_id == memory
        if not bool(own.any()):
            self.append(memories=delta, memory_id=torch.tensor(memory), memory_threshold=threshold)
            return
        self.memories = self.memories.index_copy(0, own.nonzero().flatten(), delta[None])
        self.memory_threshold = torch.where(own, threshold, self.memory_threshold)

    def _drop(self, memory: int | None) -> None:
        """Drop the shards of one memory, then those of the oldest ones until as few are merged as may be kept."""
        if memory is not None:
            self._keep_shards(self.shard_memory != memory)
        while len(merged := self.shard_memory[~self.pending]) > self.options.keep_shards:
            self._keep_shards(self.shard_memory != merged.min())

    def _keep_shards(self, rows: Tensor) -> None:
        self.keep(["shards", "shard_id", "shard_threshold", "shard_edits", "shard_memory"], rows)
