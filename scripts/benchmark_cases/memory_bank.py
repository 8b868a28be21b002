"""Benchmarks of feed-forwards with fetched memories: at the widths of the paper's 160M model, one layer of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmark_cases.case import Case, Product, Variant, Work
from memzoo.layers import BankLayout, MemoryFeedForward, SwiGLU
from memzoo.layers.banks.fetched import Fetched, LayerMemories
from memzoo.layers.reference import memory_blocks as reference

DIM, HIDDEN, ROWS = 512, 2048, (256, 64, 16)
TOKENS, LOOP_TOKENS, BATCH = 1024, 2, 8
ADD, CONCAT, ANCHOR, LOOP = "memzoo MemoryFeedForward, add", "concat", "the feed-forward alone", "memzoo reference loop"
READ = sum(ROWS)


def memories(paths: Tensor) -> LayerMemories:
    """Return random blocks of one layer for some paths."""
    layout = BankLayout(1, DIM, ROWS, dtype=torch.float32)
    fetched = Fetched.of(layout, paths, lambda node: 0.02 * torch.randn(layout.block_shape(node.level)))
    return fetched.layers()[0]


def read(run: Callable[[Tensor], object], batch: int, time: int) -> Work:
    """Forward in evaluation."""
    x = torch.randn(batch, time, DIM)

    @torch.no_grad()
    def work() -> None:
        run(x)

    return work


def layer(mode: str, batch: int, time: int, *, with_memories: bool = True, distinct: bool = False) -> Work:
    """A feed-forward in some mode, reading one path, or one for each row."""
    feed_forward = MemoryFeedForward(SwiGLU(DIM, hidden_dim=HIDDEN), mode=mode).eval()  # type: ignore[arg-type]
    rows = torch.arange(batch) if distinct else torch.zeros(batch, dtype=torch.int64)
    own = memories(torch.stack([rows, rows, rows], -1)) if with_memories else None
    return read(lambda x: feed_forward(x, own), batch, time)


def loop(time: int) -> Work:
    """The feed-forward and the loop over tokens and levels."""
    feed_forward, own = SwiGLU(DIM, hidden_dim=HIDDEN).eval(), memories(torch.zeros(1, 3, dtype=torch.int64))
    return read(lambda x: feed_forward(x) + reference.memory_feed_forward(x, own), 1, time)


def products(tokens: int) -> tuple[Product, ...]:
    """Return the products of the feed-forward, and those of the memories."""
    own = (Product(1, tokens, DIM, HIDDEN, count=2), Product(1, tokens, HIDDEN, DIM))
    added = [(Product(1, tokens, DIM, r, count=2), Product(1, tokens, r, DIM)) for r in ROWS]
    return (*own, *(product for pair in added for product in pair))


SIZES = f"width {DIM}, {HIDDEN} hidden units and {ROWS} more"
CASES = [
    Case(
        "memory_bank_read",
        "memory_bank",
        f"Feed-forward with memories, {TOKENS} tokens of one path in evaluation: {SIZES}",
        [
            Variant(ADD, lambda: layer("add", 1, TOKENS), TOKENS, products(TOKENS)),
            Variant(CONCAT, lambda: layer("concat", 1, TOKENS), TOKENS),
            Variant(ANCHOR, lambda: layer("add", 1, TOKENS, with_memories=False), TOKENS),
            Variant(f"{LOOP}, {LOOP_TOKENS} tokens", lambda: loop(LOOP_TOKENS), LOOP_TOKENS),
        ],
        note=f"By arithmetic, memories cost {READ / HIDDEN:.0%} of the feed-forward's own products.",
        least_share=0.5,
    ),
    Case(
        "memory_bank_step",
        "memory_bank",
        f"Feed-forward with memories, a token of one path in evaluation: {SIZES}",
        [
            Variant(ADD, lambda: layer("add", 1, 1), 1),
            Variant(CONCAT, lambda: layer("concat", 1, 1), 1),
            Variant(ANCHOR, lambda: layer("add", 1, 1, with_memories=False), 1),
        ],
        has_memory=False,
    ),
    Case(
        "memory_bank_mixed",
        "memory_bank",
        f"Feed-forward with memories, {BATCH} rows of 32 tokens in evaluation: {SIZES}",
        [
            Variant(f"{ADD}, a path for each", lambda: layer("add", BATCH, 32, distinct=True), 32 * BATCH),
            Variant("one path for all", lambda: layer("add", BATCH, 32), 32 * BATCH),
            Variant(ANCHOR, lambda: layer("add", BATCH, 32, with_memories=False), 32 * BATCH),
        ],
        has_memory=False,
    ),
]
