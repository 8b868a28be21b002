"""Graph memory cell: a feed-forward that moves every token through a learned graph of slots.

Graph Memory Transformer, "v7" (arXiv 2604.23862); the equations are those of the official code, src/gmt/model.py.
"""

from collections.abc import Callable, Mapping
from math import isnan
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_dtype, check_number, check_positive, check_width
from memzoo.layers.graph_memory_kept import KeptTables, can_be_marked
from memzoo.layers.graph_memory_losses import all_weights, default_entropy_floor, graph_losses, report_losses
from memzoo.layers.graph_memory_signals import report_signals
from memzoo.layers.graph_memory_slots import (
    Slots,
    advanced_usage,
    check_statistics,
    gather_writes,
    source_mass,
    spread_tokens,
    write,
)
from memzoo.layers.mixer import check_grid
from memzoo.layers.ops.graph_memory import EdgeMode, GraphRouting, GraphTables, graph_tables, movement, route
from memzoo.layers.ops.precision import kept_wide, no_autocast, wide_layer_norm, wider
from memzoo.layers.registry import register_layer
from memzoo.layers.trace import Trace

WriteBack = Literal["off", "deferred", "reference"]
Written = Literal["output", "direction"]


class GraphMemoryCell(nn.Module):
    """Move every token from the slots it is at to slots that it asks for: ``y = gate * LayerNorm(target - source)``.

    A cell owns S slots: centroids C (S, dim) and directed edges E (S, S). A token's source is a softmax of the inverse
    of its cosine distance to the centroids, its target a softmax of where the edges lead from there plus what it asks
    for; ``memzoo.layers.ops.graph_memory`` has the equations. What comes out is the normed movement between the two
    centres, not a value that was stored.

    Centroids are learned by gradient and, with ``write_back``, also drawn towards the mean of the block outputs whose
    likeliest source they are. A forward pass changes nothing: with a trace it reports what ``commit`` needs after the
    optimiser's step, and in every call the five auxiliary losses (``memzoo.layers.graph_memory_losses``) and signals.
    See ``memzoo.layers.graph_memory_upkeep`` for a whole model's temperature, commits and maintenance.

    Args:
        dim: Width of the residual stream.
        num_slots: Slots, S.
        navigation_dim: Width of queries and keys, n.
        distance_floor: Least cosine distance of a token to a centroid.
        gate_init: Logit of the gate; -4 starts close to the identity, -inf is the identity.
        momentum_init: Logit of the momentum m of the write-back, C <- normalize(m C + (1 - m) mean).
        edge_mode: "prob" adds the prior of the edges to the scores as a probability, as the official code does, so that
            the graph changes the log-odds of two targets by at most 1; "logprob" adds its logarithm.
        hops: Steps along the edges.
        channel_gate: A gate a channel in place of one for all.
        write_back: "off"; "deferred": ``commit`` writes what the trace has gathered; "reference": as the official code,
            every forward pass writes at once, in evaluation too, so that results depend on the order of the batches and
            the gradients of ``centroids`` and ``centroid_norm`` are wrong (docs/graph_memory.md).
        written: What "deferred" writes of a token: "output", what its block returns, as the official code; "direction",
            x / |x|, which is what the centroids are compared with. The output holds the movement away from the source
            as well (docs/graph_memory.md).
        temperature: Of the source softmax, at first.
        edge_entropy_floor: Nats that the rows of the transitions should keep; 4 ln(S - 1) / ln 127 by default, the
            official 4 for 128 slots.
        usage_target: Number of slots that should be in use; S / 4 by default.
        loss_weights: Weights of the auxiliary losses ``track``, ``ortho``, ``cluster``, ``edge``, ``contrast``, in
            place of the official ones.
            A loss of weight 0 counts as 0 in the mean over the cells of a model.
        dead_usage: Usage below which maintenance seeds a slot anew.
        merge_cosine: Cosine above which it takes two slots for one.
        merge_age: Commits that both have seen before it does.

    Attributes:
        temperature: Scalar buffer.
        usage: Buffer (S,), running mean of the sources.
        age: Buffer (S,), commits since a slot was seeded.

    Shape:
        x, residual: (batch, time, dim). mask: (batch, time). Returns (batch, time, dim).

    Raises:
        ValueError: An argument is out of its range, or ``x``, ``residual`` or ``mask`` does not fit.

    Reference:
        Zanarini and Ferrari, arXiv 2604.23862; official code Nemesis533/GMT-GraphMemoryTransformer, src/gmt/model.py.

    Note:
        Without gradients in evaluation, what depends on the parameters alone is kept from call to call, and made anew
        when a parameter was changed, replaced or moved. A change through ``parameter.data``, or by a fused optimiser
        behind a pass in evaluation, is not seen until the next ``train()`` or ``eval()``. ``torch.compile`` keeps
        nothing.

        The submodules hold weights, from which the tables are made; they are not called, so hooks on them do not run.
    """

    takes_residual = True
    reached_by_losses = ("momentum",)  # by ``track`` alone

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 128,
        navigation_dim: int = 128,
        distance_floor: float = 0.01,
        gate_init: float = 1.0,
        momentum_init: float = 4.6,
        edge_mode: EdgeMode = "prob",
        hops: int = 1,
        channel_gate: bool = False,
        write_back: WriteBack = "off",
        written: Written = "output",
        temperature: float = 1.0,
        edge_entropy_floor: float | None = None,
        usage_target: float | None = None,
        loss_weights: Mapping[str, float] | None = None,
        dead_usage: float = 1e-3,
        merge_cosine: float = 0.95,
        merge_age: int = 100,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("num_slots", num_slots, "use a whole number >= 2")
        if num_slots == 1:
            raise ValueError("num_slots=1 leaves a token nowhere to go; use a whole number >= 2")
        check_positive("navigation_dim", navigation_dim)
        check_positive("hops", hops)
        check_number("distance_floor", distance_floor)
        check_number("temperature", temperature)
        for name, logit in (("gate_init", gate_init), ("momentum_init", momentum_init)):
            if isnan(logit):
                raise ValueError(f"{name}={logit} is not a number; use the logit of what it should start at")
        check_number("dead_usage", dead_usage, zero=True)
        check_number("merge_cosine", merge_cosine)
        check_number("merge_age", merge_age, zero=True)
        check_choice("edge_mode", edge_mode, get_args(EdgeMode))
        check_choice("write_back", write_back, get_args(WriteBack))
        check_choice("written", written, get_args(Written))
        if written != "output" and write_back != "deferred":
            raise ValueError(
                f"written={written!r} is never written with write_back={write_back!r}; use write_back='deferred', or "
                f"written='output'"
            )
        self.dim, self.num_slots = dim, num_slots
        self.distance_floor, self.edge_mode, self.hops = distance_floor, edge_mode, hops
        self.write_back, self.written = write_back, written
        self.edge_entropy_floor = default_entropy_floor(num_slots) if edge_entropy_floor is None else edge_entropy_floor
        self.usage_target = num_slots / 4 if usage_target is None else usage_target
        check_number("edge_entropy_floor", self.edge_entropy_floor, zero=True)
        check_number("usage_target", self.usage_target, zero=True)
        self.loss_weights = all_weights(loss_weights)
        self.dead_usage, self.merge_cosine, self.merge_age = dead_usage, merge_cosine, merge_age
        self._initial = gate_init, momentum_init, temperature
        self.centroids = nn.Parameter(torch.empty(num_slots, dim))
        self.edges = nn.Parameter(torch.empty(num_slots, num_slots))
        self.query = nn.Linear(dim, navigation_dim, bias=False)
        self.key = nn.Linear(dim, navigation_dim, bias=False)
        self.gate = nn.Parameter(torch.empty(dim if channel_gate else 1))
        # Without the loss that moves it, data parallelism would wait for its gradient.
        self.momentum = nn.Parameter(torch.empty(1), requires_grad=self.loss_weights["track"] > 0)
        self.centroid_norm = nn.LayerNorm(dim)
        self.movement_norm = nn.LayerNorm(dim)
        self.temperature: Tensor
        self.usage: Tensor
        self.age: Tensor
        self.register_buffer("temperature", torch.empty(()))
        self.register_buffer("usage", torch.empty(num_slots))
        self.register_buffer("age", torch.empty(num_slots, dtype=torch.long))
        self._kept: KeptTables | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw centroids on the unit sphere, edges from N(0, 1), projections from N(0, 0.02^2); forget all usage."""
        gate, momentum, temperature = self._initial
        nn.init.normal_(self.centroids)
        with torch.no_grad():
            self.centroids.copy_(F.normalize(self.centroids, dim=-1))
        nn.init.normal_(self.edges)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.normal_(self.key.weight, std=0.02)
        nn.init.constant_(self.gate, gate)
        nn.init.constant_(self.momentum, momentum)
        self.centroid_norm.reset_parameters()
        self.movement_norm.reset_parameters()
        self.temperature.fill_(temperature)
        self.usage.fill_(1 / self.num_slots)
        self.age.zero_()

    # Forward

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """Move every token by itself.

        Args:
            x: The tokens, normed.
            residual: The stream that the output is added to. What is tracked and written is their sum; ``x`` stands in
                for a stream that is not passed.
            mask: True at real tokens; others are in no loss, statistic or write.
            trace: Collects losses, statistics for ``commit`` while training, and signals.
        """
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        if residual is not None:
            check_width("residual", residual, self.dim, like=x)
        check_grid("mask", mask, x, boolean=True)
        tables = self.tables()
        routing = self._route(x, tables)
        moved = movement(routing, tables)
        y = wide_layer_norm(self.movement_norm, moved, torch.sigmoid(wider(self.gate))).to(x.dtype)
        if trace is not None or self.write_back == "reference":
            stream = (x if residual is None else residual).detach() + y.detach()
            if self.write_back == "reference":  # before the losses, as there
                self._write_at_once(routing.source.detach(), stream, mask)
            if trace is not None:
                with no_autocast(x.device):
                    self._report_losses(trace, tables, routing, stream, mask)
                    if self.training:
                        self._report_statistics(trace, routing.source.detach(), x.detach(), stream, mask)
                    if trace.wants_signals:
                        self._report_signals(trace, tables, routing, moved, mask)
        return y

    def route(self, x: Tensor) -> GraphRouting:
        """Return where every token of ``x`` (batch, time, dim) is and where it goes; nothing is reported."""
        check_width("x", x, self.dim)
        check_dtype("x", x, self)
        return self._route(x, self.tables())

    def tables(self) -> GraphTables:
        """Return what depends on the parameters alone."""
        if torch.compiler.is_compiling():
            return self._tables()
        weights = (self.centroids, self.edges, self.query.weight, self.key.weight, *self.centroid_norm.parameters())
        if self.training or torch.is_grad_enabled() or not can_be_marked(weights):
            self._kept = None  # an optimiser may be next, and not all of them let weights count their changes
            return self._tables()
        kept = self._kept
        if kept is None or not kept.are_of(weights):
            self._kept = kept = KeptTables.of(self._tables(), weights)
        return kept.tables

    def _tables(self) -> GraphTables:
        centroids = wide_layer_norm(self.centroid_norm, self.centroids)
        return graph_tables(centroids, self.edges, self.query.weight, self.key.weight)

    def _route(self, x: Tensor, tables: GraphTables) -> GraphRouting:
        return route(
            x,
            tables,
            self.temperature,
            distance_floor=self.distance_floor,
            edge_mode=self.edge_mode,
            hops=self.hops,
        )

    def _momentum(self) -> Tensor:
        return torch.sigmoid(wider(self.momentum)).squeeze(0)

    def _report_losses(
        self, trace: Trace, tables: GraphTables, routing: GraphRouting, stream: Tensor, mask: Tensor | None
    ) -> None:
        losses = graph_losses(
            self.loss_weights,
            tables,
            routing,
            centroids=wider(self.centroids),
            stream=stream,
            mask=mask,
            momentum=self._momentum(),
            entropy_floor=self.edge_entropy_floor,
            usage_target=self.usage_target,
        )
        report_losses(trace, losses)

    def _report_statistics(self, trace: Trace, source: Tensor, x: Tensor, stream: Tensor, mask: Tensor | None) -> None:
        mass, tokens = source_mass(source, mask)
        trace.statistic("source_mass", mass)
        trace.statistic("tokens", tokens)
        trace.statistic("states", spread_tokens(stream, mask, 2 * self.num_slots))
        if self.write_back == "deferred":
            content = stream if self.written == "output" else F.normalize(wider(x), dim=-1)
            sums, counts = gather_writes(source, content, mask)
            trace.statistic("write_sums", sums)
            trace.statistic("write_counts", counts)

    def _report_signals(
        self, trace: Trace, tables: GraphTables, routing: GraphRouting, moved: Tensor, mask: Tensor | None
    ) -> None:
        gate = torch.sigmoid(wider(self.gate))
        report_signals(
            trace,
            routing=routing,
            tables=tables,
            centroids=wider(self.centroids),
            usage=self.usage,
            gate=gate.squeeze(0) if len(gate) == 1 else gate,
            momentum=self._momentum(),
            temperature=self.temperature,
            movement=moved,
            dead_usage=self.dead_usage,
            mask=mask,
        )

    # What changes besides the gradient

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Return what ``commit`` takes: names and shapes."""
        slots = (self.num_slots,)
        writes = {"write_sums": (*slots, self.dim), "write_counts": slots}
        return {"source_mass": slots, "tokens": ()} | (writes if self.write_back == "deferred" else {})

    @torch.no_grad()
    def commit(self, statistics: Mapping[str, Tensor]) -> None:
        """Advance usage and ages, and write back, by what one optimiser step's passes have reported.

        With write_back="reference" each pass has done so, and nothing is left to do.

        Args:
            statistics: ``source_mass`` (S,) and ``tokens`` (), with write_back="deferred" also ``write_sums`` (S, dim)
                and ``write_counts`` (S,), by these names; sums over passes and devices. Others are ignored.

        Raises:
            ValueError: One is missing or has another shape. Nothing is changed then.
        """
        check_statistics(statistics, self.statistics())
        if self.write_back == "reference":
            return
        if self.write_back == "deferred":
            sums, counts = statistics["write_sums"], statistics["write_counts"]
            self.centroids.copy_(write(self.centroids, sums, counts, self._momentum()))
        self.usage.copy_(advanced_usage(self.usage, statistics["source_mass"], statistics["tokens"]))
        self.age += 1

    @torch.no_grad()
    def maintain(self, states: Tensor, generator: torch.Generator) -> dict[str, int]:
        """Seed slots that are not used, and one of every two that have become one, with the directions of tokens.

        Args:
            states: Tokens of the residual stream, (count, dim). Those that have no direction, zero or not finite, are
                left out; without any other nothing is seeded.
            generator: Of the choice among them; on the CPU.

        Returns:
            How many were seeded for either reason: ``reset`` and ``merged``.

        Raises:
            ValueError: ``states`` has another shape.
        """
        slots = Slots.of(self.centroids, self.usage, self.age, states, generator)
        reset, merged = slots.maintain(self.dead_usage, self.merge_cosine, self.merge_age)
        if reset or merged:
            self.centroids.copy_(slots.centroids)
            self.usage.copy_(slots.usage)
            self.age.copy_(slots.age)
        return {"reset": reset, "merged": merged}

    @torch.no_grad()
    def _write_at_once(self, source: Tensor, stream: Tensor, mask: Tensor | None) -> None:
        """Do as the official code, behind the back of autograd."""
        with no_autocast(source.device):
            self.usage.copy_(advanced_usage(self.usage, *source_mass(source, mask)))
            sums, counts = gather_writes(source, stream, mask)
            self.centroids.data.copy_(write(self.centroids, sums, counts, self._momentum()))
        self.age += 1
        self._kept = None

    # What is kept in evaluation

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what evaluation has kept is dropped."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._kept, before = None, (self.usage, self.temperature)
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # In half precision a running mean that moves by a hundredth would stand still.
        self.usage, self.temperature = map(kept_wide, before, (self.usage, self.temperature))
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what evaluation has kept."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Slots, edge mode and write-back."""
        return f"{self.dim}, num_slots={self.num_slots}, edge_mode={self.edge_mode!r}, write_back={self.write_back!r}"


@register_layer("graph_memory_cell", "channel")
def _build(dim: int, **overrides: Any) -> GraphMemoryCell:
    return GraphMemoryCell(dim, **dict(num_slots=6, navigation_dim=5) | overrides)
