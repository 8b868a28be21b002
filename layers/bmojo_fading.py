"""The fading tokens that B'MOJO reads: every so many of what a state space gave, some way behind the query."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memzoo.layers.bmojo_parts import Call, Pair, Rings
from memzoo.layers.errors import check_count, check_positive
from memzoo.layers.ops.attention_cache import take
from memzoo.layers.ops.bmojo_attention import Band, Segment

Project = Callable[[Tensor, Tensor], Pair]


@dataclass(frozen=True)
class FadingTokens:
    """Which fading tokens a query sees: j <= i - lag, i - lag - j < span, with ``stride`` a divisor of j + 1.

    Attributes:
        lag: Tokens by which the latest one lies behind the query.
        span: Reach behind that.
        stride: Every how many tokens one is kept.

    Raises:
        ValueError: A number is out of range.
    """

    lag: int
    span: int
    stride: int

    def __post_init__(self) -> None:
        check_count("fading_lag", self.lag, "use 0 for the query's own fading token")
        check_count("fading_span", self.span, "use 0 for none")
        check_positive("fading_stride", self.stride)

    @property
    def slots(self) -> int:
        """Slots of the rings of fading keys and values."""
        return -(-(self.lag + self.span) // self.stride)

    def segment(
        self, fading: Tensor, rings: Rings, call: Call, *, project: Project, query: str, bias: Tensor | None
    ) -> tuple[Segment | Band, Pair]:
        """Return what every block of queries sees, and the rings after the call.

        Args:
            fading: (batch, time, dim) what the state space gave.
            rings: Of keys and values, before the call.
            call: The layout.
            project: Makes keys and values of tokens (batch, time, dim) at positions (batch or 1, time).
            query: Name of the queries.
            bias: Of the segment.
        """
        if self.stride > 1:
            return self._sparse(fading, rings, call, project, query, bias)
        pair = project(fading, call.positions)
        turned = call.turn(rings, pair, self.slots)
        if call.is_step:
            return self._ring(turned, call, query, bias), turned
        span = self._span(call)
        past = self.lag + span - 1
        before = None if call.is_fresh else call.before
        return Band(*call.line_up(rings, pair, past), span, past, before, query, bias), turned

    def _span(self, call: Call) -> int:
        """How far the fading keys of this call can reach."""
        return max(call.reach(self.lag + self.span) - self.lag, 1)

    def _sparse(
        self, fading: Tensor, rings: Rings, call: Call, project: Project, query: str, bias: Tensor | None
    ) -> tuple[Segment, Pair]:
        """``segment`` where tokens are left out: those that are kept are numbered, the m-th is (m + 1) stride - 1."""
        first, stride = call.start // self.stride, self.stride
        positions = (first[:, None] + 1 + torch.arange(-(-call.time // stride), device=fading.device)) * stride - 1
        kept = take(fading, (positions - call.start[:, None]).clamp_max(call.time - 1))
        pair = project(kept, positions)
        turned = call.turn(rings, pair, self.slots, first, call.after // stride - first)
        if call.is_step:
            return self._ring(turned, call, query, bias), turned
        span = self._span(call)
        past = self.lag + span - 1
        ahead = -(-past // stride)
        streams = call.line_up(rings, pair, ahead, first)
        lowest = (call.queries[..., 0] - past) // stride  # number of the first that each block may see
        entry = lowest[..., None] + torch.arange((call.block + span - 2) // stride + 1, device=fading.device)
        index = (entry - first[:, None, None] + ahead).clamp_max(streams[0].shape[1] - 1)
        keys, values = (take(stream, index.flatten(1)).unflatten(1, index.shape[1:]) for stream in streams)
        return Segment(keys, values, self._visible(call, (entry + 1) * stride - 1), query, bias), turned

    def _ring(self, rings: Pair, call: Call, query: str, bias: Tensor | None) -> Segment:
        """What a step sees: the rings as they lie."""
        entry = call.in_ring(self.slots, call.after // self.stride)[:, None]
        keys, values = (ring[:, None] for ring in rings)
        return Segment(keys, values, self._visible(call, (entry + 1) * self.stride - 1), query, bias)

    def _visible(self, call: Call, positions: Tensor) -> Tensor:
        """Which queries see the fading tokens at positions (batch, blocks, count): (batch, blocks, block, count)."""
        behind = call.queries[..., None] - self.lag - positions[:, :, None]
        return (behind >= 0) & (behind < self.span) & (positions >= 0)[:, :, None]
