"""Where the tokens of one call of B'MOJO stand, in blocks of queries and in rings; checks of its options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.errors import check_choice
from memzoo.layers.gated_deltanet import GatedDeltaNet
from memzoo.layers.mamba import Mamba
from memzoo.layers.mamba2 import Mamba2
from memzoo.layers.mixer import SequenceMixer, counters
from memzoo.layers.ops.attention_cache import turn
from memzoo.layers.ops.bmojo_attention import line_up
from memzoo.layers.state import MixerState

SSMS: dict[str, type[SequenceMixer]] = {"mamba2": Mamba2, "mamba": Mamba, "gated_deltanet": GatedDeltaNet}

Pair = tuple[Tensor, Tensor]
Rings = tuple[Tensor | None, Tensor | None]
Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """The layout of a call.

    Attributes:
        before: (batch,) tokens that each row had absorbed.
        after: (batch,) the same after the call.
        document: (batch,) ids, as in the state.
        start: (batch or 1,) ``before``, once for all rows where all are fresh.
        time: Tokens of a row.
        lengths: (batch,) tokens that exist; None if all do.
        is_fresh: No row has absorbed anything.
        block: Queries of a block.
        blocks: Their number.
        donate: The storage of the state may be reused.
    """

    before: Tensor
    after: Tensor
    document: Tensor
    start: Tensor
    time: int
    lengths: Tensor | None
    is_fresh: bool
    block: int
    blocks: int
    donate: bool

    @staticmethod
    def of(x: Tensor, state: MixerState | None, lengths: Tensor | None, *, block: int, donate: bool) -> "Call":
        """Lay out a call on ``x`` (batch, time, dim)."""
        before, after, document = counters(state, x, lengths)
        start, time = before[:1] if state is None else before, x.shape[1]
        return Call(before, after, document, start, time, lengths, state is None, block, -(-time // block), donate)

    @property
    def positions(self) -> Tensor:
        """(batch or 1, time) of the tokens."""
        return self.start[:, None] + torch.arange(self.time, device=self.start.device)

    @property
    def is_step(self) -> bool:
        """Whether one token continues every row: it reads the rings as they lie, the token's own keys among them."""
        return self.time == 1 and not self.is_fresh

    @property
    def queries(self) -> Tensor:
        """(batch or 1, blocks, block) positions of the queries, those behind the end counted on."""
        count = torch.arange(self.blocks * self.block, device=self.start.device)
        return (self.start[:, None] + count).view(-1, self.blocks, self.block)

    def blank(self, x: Tensor) -> Tensor:
        """Put zeros where no token exists: what lies there may be NaN, and 0 * NaN would spread it."""
        if self.lengths is None:
            return x
        outside = torch.arange(self.time, device=x.device) >= self.lengths[:, None]
        return x.masked_fill(outside[..., None], 0)

    def reach(self, span: int) -> int:
        """How many tokens back, its own among them, a query may find anything within ``span``."""
        return min(span, self.time) if self.is_fresh else span

    def turn(
        self, rings: Rings, pair: Pair, slots: int, first: Tensor | None = None, counts: Tensor | None = None
    ) -> Pair:
        """Return rings of ``slots`` with new keys and values; of every token, or ``counts`` behind ``first`` others."""
        first, counts = (self.start, self.lengths) if first is None else (first, counts)
        keys, values = (
            turn(None if ring is None else ring.to(new.dtype), new, slots, first, counts, self.donate)
            for ring, new in zip(rings, pair, strict=True)
        )
        return keys, values

    def line_up(self, rings: Rings, pair: Pair, past: int, first: Tensor | None = None) -> Pair:
        """Return keys and values in order, those of the ``past`` entries before the call in front."""
        first = self.start if first is None else first
        keys, values = (line_up(ring, new, past, first) for ring, new in zip(rings, pair, strict=True))
        return keys, values

    def in_ring(self, slots: int, count: Tensor) -> Tensor:
        """(batch, slots): the entry in every slot of a ring that took ``count`` of them; negative if there is none."""
        latest = (count - 1)[:, None]
        entry: Tensor = latest - (latest - torch.arange(slots, device=count.device)) % slots
        return entry


def build_ssm(dim: int, ssm: str | SequenceMixer, options: Mapping[str, Any] | None) -> SequenceMixer:
    """Build the named SSM, or take the one that is given.

    Raises:
        ValueError: The name is unknown, or a given one has another width or is to be given options.
    """
    if isinstance(ssm, SequenceMixer):
        if options:
            raise ValueError(f"ssm_options={dict(options)!r} are for an ssm by name; set them where ssm is built")
        if ssm.dim != dim:
            raise ValueError(f"ssm is of width {ssm.dim}, the layer of dim={dim}; build both of one width")
        return ssm
    if not isinstance(ssm, str):
        raise ValueError(f"ssm is a {type(ssm).__name__}; use a SequenceMixer, or one of {', '.join(map(repr, SSMS))}")
    check_choice("ssm", ssm, SSMS)
    return SSMS[ssm](dim, **(options or {}))


def check_innovation(ssm: SequenceMixer | None) -> None:
    """Require an SSM that says what it corrects with every token.

    Raises:
        ValueError: There is none, or it does not.
    """
    if ssm is None or not ssm.gives_innovation:
        raise ValueError(
            f"score='residual' is what a delta rule corrects, but the SSM is a {type(ssm).__name__}; use "
            f"ssm='gated_deltanet' with fading_span >= 1 or ssm_output=True, or another score"
        )


def check_segments(
    *,
    eidetic: bool,
    fading: bool,
    window: bool,
    scored: bool,
    segment_bias: bool,
    tie_projections: bool,
    eidetic_norm: bool,
) -> None:
    """Require kinds of keys that make sense together.

    Raises:
        ValueError: There are none at all, or an option is about a kind that is left out.
    """
    if eidetic and not scored:
        raise ValueError(
            "fading_span=0 leaves an SSM that nothing trains, and target='fading' asks it for scores; use "
            "target='input', fading_span >= 1 or ssm_output=True"
        )
    if segment_bias and eidetic + fading + window < 2:
        raise ValueError("segment_bias=True tells one kind of keys from none; use segment_bias=False")
    if not (eidetic or fading or window):
        raise ValueError("in_context=False leaves nothing to see; use fading_span >= 1 or num_eidetic >= 1")
    if not tie_projections and not (fading and (window or eidetic)):
        raise ValueError(
            "tie_projections=False, but one kind of keys is left out; use tie_projections=True: nothing is shared"
        )
    if eidetic_norm and not (eidetic and (window or (fading and tie_projections))):
        raise ValueError(
            "eidetic_norm=True sets the queries of stored tokens apart, but there are none or no others; use "
            "eidetic_norm=False"
        )
