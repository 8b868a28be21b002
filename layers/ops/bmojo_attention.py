"""One softmax over several sets of keys, block of queries by block: what B'MOJO reads with.

Queries are cut into blocks of neighbours. The keys that a block may see lie in segments: the tokens that were stored,
the fading tokens, the window. Each brings the keys of every block and says which query sees which of them;
``scaled_dot_product_attention`` then meets all blocks of all rows at once, but for the first ones of fresh rows, which
have fewer keys. Nothing loops over tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.attention_cache import take

EVEN = 8
"""Fused kernels want widths that are multiples of it."""


@dataclass(frozen=True)
class Segment:
    """Keys that the queries of a block may see, beside those of other segments.

    Attributes:
        keys: (batch, blocks, count, kv_heads, head_dim).
        values: (batch, blocks, count, kv_heads, head_dim).
        visible: (batch or 1, blocks or 1, queries, count) bool.
        query: Name of the queries that meet these keys.
        bias: (heads,) added to the logits of all its keys; None for zero.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    query: str
    bias: Tensor | None = None

    def part(self, start: int, stop: int, block: int) -> "Segment":
        """That of some blocks."""
        blocks = slice(start, stop) if self.visible.shape[1] > 1 else slice(None)
        keys, values = self.keys[:, start:stop], self.values[:, start:stop]
        return Segment(keys, values, self.visible[:, blocks], self.query, self.bias)


@dataclass(frozen=True)
class Band:
    """Neighbouring keys, of which every query sees ``span``: query i the entries i, .., i + span - 1 of a stream.

    Attributes:
        keys: (batch, entries, kv_heads, head_dim).
        values: (batch, entries, kv_heads, head_dim).
        span: Keys of a query.
        past: Entries that came before the call.
        before: (batch,) tokens before the call, so that an entry that lies before all of them is not seen. None for
            fresh rows: none of the ``past`` exists.
        query: As in ``Segment``, and so ``bias``.
        bias: Of the segment.
    """

    keys: Tensor
    values: Tensor
    span: int
    past: int
    before: Tensor | None
    query: str
    bias: Tensor | None = None

    def early(self, block: int) -> int:
        """Blocks of fresh rows that reach back before all tokens."""
        return -(-self.past // block) if self.before is None else 0

    def part(self, start: int, stop: int, block: int) -> Segment:
        """That of some blocks: of fresh rows one, without the keys that do not exist, or several for which all do."""
        width = block + self.span - 1
        absent = min(max(self.past - start * block, 0), width) if self.before is None else 0
        device = self.keys.device
        ahead = torch.arange(absent, width, device=device) - torch.arange(block, device=device)[:, None]
        visible = ((ahead >= 0) & (ahead < self.span))[None, None]
        if self.before is not None:
            first = torch.arange(start, stop, device=device)[:, None] * block - self.past
            position = self.before[:, None, None] + first + torch.arange(width, device=device)
            visible = visible & (position >= 0)[:, :, None]
        keys, values = (
            _slide(stream[:, start * block + absent :], stop - start, block, width - absent)
            for stream in (self.keys, self.values)
        )
        return Segment(keys, values, visible, self.query, self.bias)


def _slide(stream: Tensor, blocks: int, step: int, width: int) -> Tensor:
    """(batch, entries, heads, d) -> (batch, blocks, width, heads, d), a block every ``step``; zeros behind the end."""
    missing = (blocks - 1) * step + width - stream.shape[1]
    if missing > 0:
        stream = F.pad(stream, (0, 0, 0, 0, 0, missing))
    if blocks == 1:
        return stream[:, None, :width]
    return stream.unfold(1, width, step)[:, :blocks].movedim(-1, 2)


def joint_attention(
    queries: Mapping[str, Tensor], segments: Sequence[Segment | Band], *, block: int, scale: float, sees_one: bool
) -> Tensor:
    """Attend from every query to all segments, in one softmax.

    Args:
        queries: By name, those that the segments ask for.
        segments: At least one; for the blocks in order, the last one as long as the others.
        block: Queries of a block.
        scale: Factor of the scores.
        sees_one: Every query is known to see a key. One that sees none reads zero, and its gradient is zero.

    Shape:
        queries: (batch, time, heads, head_dim). Returns the same.
    """
    time = next(iter(queries.values())).shape[1]
    blocks = -(-time // block)
    early = min(max(segment.early(block) if isinstance(segment, Band) else 0 for segment in segments), blocks)
    borders = [*range(early), *sorted({early, blocks})]
    cut = {name: _cut(q, blocks, block) for name, q in queries.items()}
    reads = []
    for start, stop in pairwise(borders):
        own = {name: q[:, start:stop] for name, q in cut.items()}
        reads.append(_read(own, [segment.part(start, stop, block) for segment in segments], scale, sees_one))
    y = reads[0] if len(reads) == 1 else torch.cat(reads, 1)
    return y.flatten(1, 2)[:, :time]


def _cut(x: Tensor, blocks: int, block: int) -> Tensor:
    """(batch, time, heads, d) -> (batch, blocks, block, heads, d), zeros behind the end."""
    missing = blocks * block - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    cut: Tensor = x.unflatten(1, (blocks, block))
    return cut


def _read(queries: Mapping[str, Tensor], segments: Sequence[Segment], scale: float, sees_one: bool) -> Tensor:
    """Attend in all blocks at once: (batch, blocks, block, heads, head_dim), like the queries.

    Where segments have queries of their own, or biases, channels tell them apart: a key is zero in those of the queries
    that it does not meet, and one in that of its bias. It stays one call, on wider heads.
    """
    names = list(dict.fromkeys(segment.query for segment in segments))
    q, keys = [queries[name] for name in names], [segment.keys for segment in segments]
    head_dim = q[0].shape[-1]
    if len(names) > 1:
        places = [names.index(segment.query) * head_dim for segment in segments]
        room = (len(names) - 1) * head_dim
        keys = [F.pad(k, (place, room - place)) for k, place in zip(keys, places, strict=True)]
    if any(segment.bias is not None for segment in segments):
        zero = q[0].new_zeros(q[0].shape[-2])
        biases = torch.stack([zero if segment.bias is None else segment.bias for segment in segments], -1) / scale
        fill = -(head_dim * len(names) + len(segments)) % EVEN
        q.append(F.pad(biases.to(zero.dtype), (0, fill)).expand(*q[0].shape[:-1], -1))
        one = F.pad(torch.eye(len(segments), dtype=zero.dtype, device=zero.device), (0, fill))
        keys = [torch.cat((k, row.expand(*k.shape[:-1], -1)), -1) for k, row in zip(keys, one, strict=True)]
    k, v = torch.cat(keys, 2), torch.cat([segment.values for segment in segments], 2)
    if k.shape[2] == 0:
        return torch.zeros_like(q[0])
    masks = [segment.visible for segment in segments]
    # Rows of SDPA are blocks of rows: a mask is one of all, or one of each.
    grid = (1, 1) if all(mask.shape[:2] == (1, 1) for mask in masks) else k.shape[:2]
    visible = torch.cat([mask.expand(*grid, -1, -1) for mask in masks], -1).flatten(0, 1)
    blind = None if sees_one else ~visible.any(-1, keepdim=True)
    if blind is not None:
        visible = visible | blind
    if k.shape[-1] > head_dim:
        v = F.pad(v, (0, k.shape[-1] - head_dim))  # flash kernels want values as wide as keys
    rows = torch.cat(q, -1) if len(q) > 1 else q[0]
    y = _attend(rows.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), visible, scale)[..., :head_dim]
    if blind is not None:
        y = y.masked_fill(blind[..., None], 0)
    read: Tensor = y.unflatten(0, k.shape[:2])
    return read


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of (rows, time, heads, d); ``visible`` is (rows or 1, queries, keys)."""
    count, (time, heads), kv_heads = len(q), q.shape[1:3], k.shape[2]
    # A group's queries become rows of one head, as in ops.attention: no key is repeated.
    group = heads // kv_heads
    q = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3) if group > 1 else q.transpose(1, 2)
    mask = (visible.repeat(1, group, 1) if group > 1 else visible)[:, None]
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    if group == 1:
        return y.transpose(1, 2)
    return y.reshape(count, kv_heads, group, time, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def line_up(ring: Tensor | None, new: Tensor, past: int, before: Tensor) -> Tensor:
    """Put the last ``past`` entries of a ring, oldest first, in front of the new ones; zeros where there are none.

    Args:
        ring: (batch, slots, heads, d), slots >= past; entry j of a row is in slot j % slots. None: there was nothing.
        new: (batch, time, heads, d).
        past: Entries to put in front.
        before: (batch,) entries that came before the new ones.
    """
    if ring is None:
        return F.pad(new, (0, 0, 0, 0, past, 0))
    entry = before[:, None] + torch.arange(-past, 0, device=new.device)
    return torch.cat((take(ring, entry % ring.shape[1]).to(new.dtype), new), dim=1)
