"""Benchmarks of the graph memory cell against the feed-forward it replaces, and against its equations as printed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark_cases.case import Case, Product, Variant, Work
from memzoo.layers import FeedForward, GraphMemoryCell, Trace

DIM, SLOTS, TOKENS = 768, 128, 2048
FEED_FORWARD, PRINTED, LOOP = "memzoo FeedForward, fourfold", "the equations as printed", "memzoo reference loop"
LOOP_TOKENS = 1


class Printed(GraphMemoryCell):
    """The cell with every product of its equations as it stands there, in matrices."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        """Return y, without reports."""
        centroids = self.centroid_norm(self.centroids)
        similarity = F.normalize(x, dim=-1) @ F.normalize(centroids, dim=-1).mT
        source = ((1 / (1 - similarity).clamp(min=self.distance_floor)) / self.temperature).softmax(-1)
        diagonal = torch.eye(self.num_slots, dtype=torch.bool)
        prior = source @ self.edges.masked_fill(diagonal, -torch.inf).softmax(-1)
        scores = self.query(x) @ self.key(centroids).mT / self.query.out_features**0.5
        target = (prior + scores).softmax(-1)
        moved = self.movement_norm(target @ centroids - source @ centroids)
        return torch.sigmoid(self.gate) * moved


class Loop(GraphMemoryCell):
    """The cell on the loop over its tokens and slots."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        """Return y, without reports."""
        from memzoo.layers.reference.graph_memory import graph_memory

        centroids = self.centroid_norm(self.centroids)
        moved, _ = graph_memory(x, centroids, self.edges, self.query.weight, self.key.weight, self.temperature)
        return torch.sigmoid(self.gate) * self.movement_norm(moved)


def products(tokens: int) -> tuple[Product, ...]:
    """Return the products of the cell's forward and backward pass, and of the tables of its parameters."""
    return (
        Product(1, tokens, DIM, 2 * SLOTS),  # similarities and scores
        Product(1, tokens, 2 * SLOTS, DIM),  # their backward, of tokens
        Product(1, DIM, tokens, 2 * SLOTS),  # and of tables
        Product(1, tokens, SLOTS, SLOTS, count=2),  # prior; its backward
        Product(1, SLOTS, tokens, SLOTS),
        Product(1, tokens, SLOTS, DIM),  # movement
        Product(1, tokens, DIM, SLOTS),  # its backward
        Product(1, SLOTS, tokens, DIM),
        Product(1, SLOTS, DIM, SLOTS, count=3),  # keys, their part of the projection, the backward of both
        Product(1, DIM, SLOTS, SLOTS, count=3),
    )


def trained(build: Callable[[], nn.Module], tokens: int, *, traced: bool = False) -> Work:
    """Forward and backward; with the losses and statistics that training asks for if ``traced``."""
    layer, x = build(), torch.randn(1, tokens, DIM, requires_grad=True)
    grad = torch.randn(1, tokens, DIM)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        if not traced:
            layer(x).backward(grad)
            return
        trace = Trace(signals=False)
        y = layer(x, trace=trace)
        torch.autograd.backward([y, *trace.losses.values()], [grad, *map(torch.ones_like, trace.losses.values())])

    return work


def read(build: Callable[[], nn.Module], tokens: int, *, kept: bool = True) -> Work:
    """Forward in evaluation; ``kept`` says whether the tables of the parameters may be kept from call to call."""
    layer, x = build().eval(), torch.randn(1, tokens, DIM)

    @torch.no_grad()
    def work() -> None:
        if not kept:
            layer.eval()  # drops them
        layer(x)

    return work


def cell() -> nn.Module:
    """Build a cell of the base model."""
    return GraphMemoryCell(DIM, num_slots=SLOTS, navigation_dim=SLOTS)


CASES = [
    Case(
        "graph_memory",
        "graph_memory",
        f"Graph memory cell: {TOKENS} tokens, width {DIM}, {SLOTS} slots; forward and backward",
        [
            Variant("memzoo GraphMemoryCell", lambda: trained(cell, TOKENS), TOKENS, products(TOKENS)),
            Variant(FEED_FORWARD, lambda: trained(lambda: FeedForward(DIM), TOKENS), TOKENS),
            Variant(PRINTED, lambda: trained(lambda: Printed(DIM), TOKENS), TOKENS),
            Variant("with losses and statistics", lambda: trained(cell, TOKENS, traced=True), TOKENS),
            Variant(f"{LOOP}, {LOOP_TOKENS} token", lambda: trained(lambda: Loop(DIM), LOOP_TOKENS), LOOP_TOKENS),
        ],
        note="The floor is the time that the counted products take at the measured matmul rate.",
        targets={FEED_FORWARD: 1.0, PRINTED: 1.0, f"{LOOP}, {LOOP_TOKENS} token": 20.0},
        least_share=0.5,
    ),
    Case(
        "graph_memory_read",
        "graph_memory",
        f"Graph memory cell in evaluation: {TOKENS} tokens, width {DIM}, {SLOTS} slots",
        [
            Variant("memzoo GraphMemoryCell", lambda: read(cell, TOKENS), TOKENS),
            Variant(FEED_FORWARD, lambda: read(lambda: FeedForward(DIM), TOKENS), TOKENS),
            Variant(PRINTED, lambda: read(lambda: Printed(DIM), TOKENS), TOKENS),
        ],
        targets={FEED_FORWARD: 1.0, PRINTED: 1.0},
    ),
    Case(
        "graph_memory_step",
        "graph_memory",
        f"Graph memory cell in evaluation, one token: width {DIM}, {SLOTS} slots",
        [
            Variant("memzoo GraphMemoryCell", lambda: read(cell, 1), 1),
            Variant("its tables made anew", lambda: read(cell, 1, kept=False), 1),
            Variant(FEED_FORWARD, lambda: read(lambda: FeedForward(DIM), 1), 1),
            Variant(PRINTED, lambda: read(lambda: Printed(DIM), 1), 1),
        ],
        targets={"its tables made anew": 2.0, FEED_FORWARD: 1.0},
        has_memory=False,
    ),
]
