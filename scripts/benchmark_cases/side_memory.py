"""Benchmarks of side memories: reading a chunk and learning it, beside reading it alone."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmark_cases.case import Case, Variant, Work
from memzoo.arch import Transformer
from memzoo.layers import Locas, SwiGLU, TempLoRA
from memzoo.layers.reference import locas as reference
from memzoo.layers.side_memory import SideMemory

VOCABULARY, DIM, DEPTH, HIDDEN = 4096, 384, 6, 1024
WINDOW, CHUNK = 1024, 512
LOOP_TOKENS, RANK = 4, 64
ALONE = "scoring alone"


def host() -> Transformer:
    """Build the model that a memory is attached to."""
    return Transformer(VOCABULARY, DIM, DEPTH, num_heads=6, hidden_dim=HIDDEN).eval()


def score_alone() -> Work:
    """Read a window and take the loss of its chunk."""
    model, tokens = host().requires_grad_(False), torch.randint(VOCABULARY, (1, WINDOW + 1))
    return torch.no_grad()(lambda: loss(model, tokens))


def loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a window's last tokens."""
    logits, _ = model(tokens[:, :-1], last=CHUNK)
    return F.cross_entropy(logits[0], tokens[0, -CHUNK:])


def loss_of_chunk(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Return the same with a graph of the chunk alone: what is read of the prefix is given."""
    prefix = WINDOW - CHUNK
    with torch.no_grad():
        _, state = model(tokens[:, :prefix], last=1)
    logits, _ = model(tokens[:, prefix:-1], state)
    return F.cross_entropy(logits[0], tokens[0, -CHUNK:])


def learn(
    attach: Callable[[Transformer], SideMemory],
    epochs: int | None = None,
    objective: Callable[[Transformer, torch.Tensor], torch.Tensor] = loss,
) -> Work:
    """Read a window with a memory, take the loss of its chunk, and update the memory by it.

    Args:
        attach: Attaches the memory.
        epochs: Readings to learn from, after one that scores; None learns from the reading that scores.
        objective: The loss of a window.
    """
    model, tokens = host(), torch.randint(VOCABULARY, (1, WINDOW + 1))
    memory = attach(model)
    if isinstance(memory, Locas):
        memory.memorize(tokens)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def work() -> None:
        if epochs is not None:
            with torch.no_grad():
                objective(model, tokens)
        for _ in range(epochs or 1):
            objective(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def locas(rank: int, *, prefix_gradient: bool = True) -> Work:
    """Learn with Locas."""
    return learn(lambda model: Locas.attach(model, rank=rank), objective=loss if prefix_gradient else loss_of_chunk)


def temp_lora(rank: int, epochs: int | None = None) -> Work:
    """Learn with TempLoRA."""
    return learn(lambda model: TempLoRA.attach(model, rank=rank, dropout=0.0), epochs)


def beside(tokens: int) -> Work:
    """A feed-forward with slots beside it."""
    feed_forward, x = SwiGLU(DIM, hidden_dim=HIDDEN), torch.randn(1, tokens, DIM)
    memory = Locas.attach(feed_forward, rank=RANK, init="gaussian")
    memory.memorize(x)
    return torch.no_grad()(lambda: feed_forward(x))


def plain(tokens: int) -> Work:
    """The same without."""
    feed_forward, x = SwiGLU(DIM, hidden_dim=HIDDEN), torch.randn(1, tokens, DIM)
    return torch.no_grad()(lambda: feed_forward(x))


def loop(tokens: int) -> Work:
    """The same as the loop over tokens and slots."""
    feed_forward, x = SwiGLU(DIM, hidden_dim=HIDDEN), torch.randn(1, tokens, DIM)
    gate, key, value = torch.randn(3, RANK, DIM)
    tau = reference.slot_scale(feed_forward.down.weight, RANK)

    @torch.no_grad()
    def work() -> None:
        feed_forward(x) + reference.side_feed_forward(x, gate, key, value, F.silu, tau)

    return work


CASES = [
    Case(
        "side_memory_stream",
        "side_memory",
        f"Reading a window of {WINDOW} tokens and learning its last {CHUNK}: {DEPTH} blocks of width {DIM}",
        [
            Variant("memzoo Locas, rank 16", lambda: locas(16), CHUNK),
            Variant("memzoo Locas, rank 64", lambda: locas(64), CHUNK),
            Variant("memzoo TempLoRA, rank 16", lambda: temp_lora(16), CHUNK),
            Variant("memzoo TempLoRA, rank 64", lambda: temp_lora(64), CHUNK),
            Variant("memzoo TempLoRA, rank 64, scored, then two epochs", lambda: temp_lora(64, 2), CHUNK),
            Variant(ALONE, score_alone, CHUNK),
        ],
        note="Tokens are those of the chunk. By arithmetic the backward pass of a frozen model costs as much as its "
        "forward pass, so that learning takes twice as long as scoring; but of attention, whose scores it computes "
        "again, it has five products where the forward pass has two. Temp-LoRA's script scores a chunk and then trains "
        "two epochs on it.",
        targets={ALONE: 1 / 2.2},
    ),
    Case(
        "side_memory_stream_of_chunk",
        "side_memory",
        f"Reading a window of {WINDOW} tokens and learning its last {CHUNK}, the prefix given: {DEPTH} blocks of width "
        f"{DIM}",
        [
            Variant("memzoo Locas, rank 16", lambda: locas(16, prefix_gradient=False), CHUNK),
            Variant("memzoo Locas, rank 64", lambda: locas(64, prefix_gradient=False), CHUNK),
            Variant(ALONE, score_alone, CHUNK),
        ],
        note="With `prefix_gradient=False`: the prefix is read without a graph, the chunk from the state behind it. By "
        "arithmetic the backward pass then costs as much as the forward pass over the chunk, half of the window.",
        targets={ALONE: 1 / 2.2},
    ),
    Case(
        "side_memory_read",
        "side_memory",
        f"A feed-forward of width {DIM} with {HIDDEN} slots, and {RANK} beside it, in evaluation",
        [
            Variant("memzoo Locas", lambda: beside(WINDOW), WINDOW),
            Variant("the feed-forward alone", lambda: plain(WINDOW), WINDOW),
            Variant(f"memzoo reference loop, {LOOP_TOKENS} tokens", lambda: loop(LOOP_TOKENS), LOOP_TOKENS),
        ],
        note=f"By arithmetic the slots cost {RANK / HIDDEN:.0%} of the feed-forward.",
        has_memory=False,
    ),
]
