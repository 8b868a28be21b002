"""Ragged rows that start anywhere in a chunk, laid out as whole chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """Where each token sits once a batch of sequences is cut into chunks of one width.

    Chunk borders are multiples of ``chunk_size`` in absolute position, so a row that continues in the middle of a
    chunk has a shorter first one. Every chunk is filled from the left. Shapes depend on shapes alone.

    Attributes:
        time: Tokens a row was given.
        heads: Heads; rows of the grid are (batch, heads).
        chunks: Number of chunks.
        width: Slots of each.
        source: (batch, chunks * width) token in every slot, or None: slot i holds token i.
        slot: (batch, time) slot of every token, likewise.
        real: (chunks, batch * heads, width) bool, slots that hold an existing token; None if all do.
        exists: (batch, time) bool, tokens that exist; None if all do.
        at_border: (batch * heads, 1, 1) bool, rows whose first token begins a chunk; None if all do.
        ends_at_border: The same of the token after the last one; a bool if one answer holds for all rows.
    """

    time: int
    heads: int
    chunks: int
    width: int
    source: Tensor | None
    slot: Tensor | None
    real: Tensor | None
    exists: Tensor | None
    at_border: Tensor | None
    ends_at_border: Tensor | bool

    @staticmethod
    def lay_out(
        batch: int,
        time: int,
        heads: int,
        chunk_size: int,
        position: int | Tensor,
        lengths: Tensor | None,
        device: torch.device,
        width: int | None = None,
    ) -> "ChunkGrid":
        """Lay out ``time`` tokens a row, the first at absolute ``position``.

        The chunks have ``width`` slots, by default no more than they have to: ``chunk_size``, or ``time`` if smaller.
        """
        width = width or min(chunk_size, time)
        tokens = torch.arange(time, device=device)
        exists = None if lengths is None else tokens < lengths[:, None]
        if isinstance(position, int) and position % chunk_size == 0:
            chunks = -(-time // width)
            real = None
            if lengths is not None or chunks * width != time:
                held = torch.arange(chunks * width, device=device) < (time if lengths is None else lengths[:, None])
                real = _rows_of_grid(held.expand(batch, -1), chunks, heads)
            ends = time % chunk_size == 0 if lengths is None else _per_row(lengths % chunk_size == 0, heads)
            return ChunkGrid(time, heads, chunks, width, None, None, real, exists, None, ends)

        phase = torch.as_tensor(position, device=device).expand(batch)[:, None] % chunk_size
        end = time if lengths is None else lengths[:, None]
        most = position % chunk_size if isinstance(position, int) else chunk_size - 1  # of the tokens before a row
        chunks = (most + time - 1) // chunk_size + 1
        chunk = torch.arange(chunks * width, device=device) // width
        within = torch.arange(chunks * width, device=device) % width
        first = (chunk * chunk_size - phase).clamp_min(0)  # first token of each slot's chunk
        source = first + within
        held = (source < (chunk + 1) * chunk_size - phase) & (source < end)
        own_chunk = (phase + tokens) // chunk_size
        slot = own_chunk * width + tokens - (own_chunk * chunk_size - phase).clamp_min(0)
        return ChunkGrid(
            time,
            heads,
            chunks,
            width,
            source.clamp_max(time - 1),
            slot,
            _rows_of_grid(held, chunks, heads),
            exists,
            _per_row(phase[:, 0] == 0, heads),
            _per_row(((phase + end) % chunk_size == 0)[:, 0], heads),
        )

    def cut(self, x: Tensor, before: int = 0) -> Tensor:
        """(batch, before + time, heads, ...) -> (chunks, batch * heads, before + width, ...).

        With ``before``, a chunk is given that many tokens more, those in front of its own.
        """
        x = self._overlap(x, before) if before else self.fill(x)
        x = x.unflatten(1, (self.chunks, before + self.width)).movedim(3, 1).movedim(2, 0)
        return x.flatten(1, 2).contiguous()

    def _overlap(self, x: Tensor, before: int) -> Tensor:
        """(batch, before + time, ...) -> (batch, chunks * (before + width), ...)."""
        within = torch.arange(before + self.width, device=x.device)
        if self.source is None:
            first = torch.arange(self.chunks, device=x.device) * self.width
            return x[:, (first[:, None] + within).flatten().clamp_max(x.shape[1] - 1)]
        index = (self.source[:, :: self.width, None] + within).flatten(1).clamp_max(x.shape[1] - 1)
        index = index.view(*index.shape, *([1] * (x.dim() - 2)))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def fill(self, x: Tensor) -> Tensor:
        """(batch, time, ...) -> (batch, chunks * width, ...): a token in every slot, zeros or any where there is none.

        Where rows begin at a border this is ``x`` itself, or ``x`` with zeros up to the next one.
        """
        if self.source is not None:
            index = self.source.view(*self.source.shape, *([1] * (x.dim() - 2)))
            return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
        if (missing := self.chunks * self.width - self.time) > 0:
            return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
        return x

    def join(self, y: Tensor) -> Tensor:
        """(chunks, batch * heads, width, d) -> (batch, time, heads, d), zeros at tokens that do not exist."""
        return self.drain(y.unflatten(1, (-1, self.heads)).permute(1, 0, 3, 2, 4).flatten(1, 2))

    def drain(self, y: Tensor) -> Tensor:
        """(batch, chunks * width, heads, d) -> (batch, time, heads, d), zeros at tokens that do not exist."""
        if self.slot is not None:
            y = y.gather(1, self.slot[:, :, None, None].expand(-1, -1, *y.shape[2:]))
        else:
            y = y[:, : self.time]
        return y if self.exists is None else y.masked_fill(~self.exists[:, :, None, None], 0)

    @property
    def reached(self) -> Tensor | None:
        """Rows with a token in each chunk, (chunks, batch * heads, 1, 1); None if all have one in every chunk."""
        if self.exists is None and self.at_border is None:
            return None
        assert self.real is not None
        return self.real[:, :, :1, None]


def _rows_of_grid(held: Tensor, chunks: int, heads: int) -> Tensor:
    slots: Tensor = held.unflatten(1, (chunks, -1))
    return slots.transpose(0, 1).repeat_interleave(heads, dim=1)


def _per_row(flag: Tensor, heads: int) -> Tensor:
    return flag.repeat_interleave(heads)[:, None, None]
