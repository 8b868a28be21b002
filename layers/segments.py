"""Segments: rows of tokens, each row at its own place in a segment, cut where segments end."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Segments:
    """How the tokens of a call are dealt to segments of ``size`` tokens.

    A segment has slots, one a token. A row that continues within a segment fills it from the slot it had reached; all
    later segments are filled from slot 0. Shapes depend on shapes alone.

    Attributes:
        size: Tokens of a whole segment.
        slots: For every segment the slots of the tokens it was dealt: (width,), or (batch, width) where rows differ.
        counts: For every segment how many of these tokens exist, (batch,); None if all do.
        begins: For every segment which rows begin it in this call, (batch,) bool; None if all do.
        source: (batch, segments, width) token dealt to every place; None if they are dealt in order.
        place: (batch, time) place of every token in the flattened (segments, width), likewise.
    """

    size: int
    slots: tuple[Tensor, ...]
    counts: tuple[Tensor | None, ...]
    begins: tuple[Tensor | None, ...]
    source: Tensor | None
    place: Tensor | None

    @staticmethod
    def lay_out(x: Tensor, size: int, before: Tensor | None, lengths: Tensor | None) -> "Segments":
        """Deal out the tokens of ``x`` (batch, time, ...).

        Args:
            x: The tokens.
            size: Tokens of a segment.
            before: (batch,) tokens that came before; None where every row begins a segment.
            lengths: (batch,) tokens that exist, from the left; None if all do.
        """
        time, tokens = x.shape[1], torch.arange(x.shape[1], device=x.device)
        width = min(time, size)
        if before is None:
            starts = range(0, time, size)
            slots = [tokens[: min(size, time - start)] for start in starts]
            counts = tuple(None if lengths is None else (lengths - start).clamp(0, size) for start in starts)
            begins = tuple(None if count is None else count > 0 for count in counts)
            return Segments(size, tuple(slots), counts, begins, None, None)

        phase = before % size
        if time == 1:  # a step: one token, in order
            at_border = phase == 0 if lengths is None else (phase == 0) & (lengths > 0)
            return Segments(size, (phase[:, None],), (lengths,), (at_border,), None, None)
        number = (size + time - 2) // size + 1  # segments that a row at the end of its own one reaches
        borders = torch.arange(number + 1, device=x.device) * size - phase[:, None]
        first = borders[:, :-1].clamp_min(0)
        end = torch.full_like(phase, time) if lengths is None else lengths
        held = (torch.minimum(borders[:, 1:], end[:, None]) - first).clamp_min(0)
        own = (phase[:, None] + tokens) // size
        return Segments(
            size,
            (phase[:, None] + tokens[:width], *[tokens[:width]] * (number - 1)),
            held.unbind(1),
            tuple((held > 0).logical_and(borders[:, :-1] >= 0).unbind(1)),
            (first[..., None] + tokens[:width]).clamp_max(time - 1),
            own * width + tokens - first.gather(1, own),
        )

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, time, ...) -> the tokens of every segment (batch, width, ...), those that exist at the left."""
        if self.source is None:
            return torch.split(x, self.size, 1)
        return x[torch.arange(x.shape[0], device=x.device)[:, None, None], self.source].unbind(1)

    def join(self, pieces: list[Tensor]) -> Tensor:
        """Undo ``cut``: (batch, time, ...); arbitrary at tokens that do not exist."""
        if self.place is None:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        y = torch.stack(pieces, 1).flatten(1, 2)
        return y[torch.arange(y.shape[0], device=y.device)[:, None], self.place]

    def put(self, cache: Tensor | None, new: Tensor, segment: int) -> Tensor:
        """Return the cache (batch, size, ...) with the tokens of one segment in their slots; None is all zeros."""
        slots, count = self.slots[segment], self.counts[segment]
        batch, width = new.shape[:2]
        if slots.dim() == 1 and count is None:
            if width == self.size:
                return new
            rest = new.new_zeros(batch, self.size - width, *new.shape[2:]) if cache is None else cache[:, width:]
            return torch.cat((new, rest), 1)
        token = torch.arange(self.size, device=new.device) - slots[..., :1]  # in each slot
        inside = (token >= 0) & (token < (width if count is None else count[:, None]))
        if width > 1:
            new = new[torch.arange(batch, device=new.device)[:, None], token.clamp(0, width - 1)]
        old = new.new_zeros(batch, self.size, *new.shape[2:]) if cache is None else cache
        return torch.where(inside.view(*inside.shape, *[1] * (new.dim() - 2)), new, old)


def visible_keys(slots: Tensor, segment_size: int, num_persistent_tokens: int) -> Tensor:
    """Return which keys of [P || h || S] a token of S sees in the causal form: all of P, h and S up to itself.

    Args:
        slots: Where in their segment the tokens stand.
        segment_size: Slots of h, and of S.
        num_persistent_tokens: Tokens of P.

    Shape:
        slots: (queries,), or (batch, queries) where rows differ. Returns bool (queries, N_p + 2 segment_size), or
        (batch, 1, queries, N_p + 2 segment_size).
    """
    reached = torch.arange(segment_size, device=slots.device) <= slots[..., None]
    visible = F.pad(torch.cat((reached, reached), -1), (num_persistent_tokens, 0), value=True)
    return visible if slots.dim() == 1 else visible[:, None]
