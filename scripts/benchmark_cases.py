"""What `benchmark.py` measures: each case a set of variants that do the same job, ours, the loop and the peers."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memzoo.layers import Attention, NeuralMemory, SlidingWindowAttention
from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.reference.neural_memory import neural_memory as neural_memory_loop

Work = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """One implementation.

    Attributes:
        name: As it stands in the table.
        build: Makes the model and its input, returns the function to time.
        tokens: Tokens one call processes.
        flops: Matrix-product FLOPs one call needs, counted on paper; None where nobody counted.
        missing: Why it cannot run here; None if it can.
    """

    name: str
    build: Callable[[], Work]
    tokens: int
    flops: float | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Case:
    """Variants that are compared with the first of them, or, for ``growth``, lengths of one variant.

    Attributes:
        name: Unique; `--cases` matches it.
        title: Heading of its table.
        variants: The first is ours.
        growth: Variants are lengths in increasing order: fit an exponent of time over tokens.
        targets: Least ratio of ours to a variant's tokens/s, by the variant's name.
        most_memory: Largest part of a variant's peak extra memory that ours may take, by the variant's name.
        least_share: Least share of the measured matmul rate for every variant with ``flops``, or None.
    """

    name: str
    title: str
    variants: list[Variant]
    growth: bool = False
    targets: dict[str, float] = field(default_factory=dict)
    most_memory: dict[str, float] = field(default_factory=dict)
    least_share: float | None = None


def neural_memory_flops(
    batch: int, time: int, heads: int, head_dim: int, *, depth: int, expansion: int, chunk_size: int
) -> float:
    """Matrix-product FLOPs of a memory's forward and backward pass, projections aside.

    Forward, a token and head: keys 2 P, errors 2 (P - d_0 d_1), updates 4 P, reads 4 P, inside the chunk 2 C A, where
    P is the memory's weights and A the sum of its layers' widths in and out. The backward pass needs twice that.
    """
    widths = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
    pairs = list(itertools.pairwise(widths))
    weights = sum(a * b for a, b in pairs)
    inner = weights - widths[0] * widths[1]
    forward = 10 * weights + 2 * inner + 2 * chunk_size * sum(a + b for a, b in pairs)
    return 3.0 * batch * time * heads * forward


def layer_flops(batch: int, time: int, heads: int, **memory: int) -> float:
    """The same of the whole layer: with the q, k, v, gate and output projections, 5 dim^2 weights."""
    dim = heads * memory["head_dim"]
    projections = 6.0 * batch * time * 5 * dim * dim
    return projections + neural_memory_flops(batch, time, heads, **memory)


MEMORY = {"head_dim": 64, "depth": 2, "expansion": 2, "chunk_size": 64}


def _trained(layer: nn.Module, batch: int, time: int, dim: int) -> Work:
    """Forward and backward of a layer that returns (y, state)."""
    x = torch.randn(batch, time, dim, requires_grad=True)
    grad = torch.randn(batch, time, dim)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].backward(grad)

    return work


def _ours(batch: int, time: int, heads: int) -> Variant:
    dim = 64 * heads
    return Variant(
        "memzoo NeuralMemory (per-token gates, conv)",
        lambda: _trained(NeuralMemory(dim, num_heads=heads, chunk_size=64), batch, time, dim),
        batch * time,
        layer_flops(batch, time, heads, **MEMORY),
    )


def _scan_inputs(batch: int, time: int, heads: int) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = (nn.functional.normalize(torch.randn(batch, time, heads, 64), dim=-1) for _ in range(3))
    theta, eta, alpha = (torch.rand(batch, time, heads) * 0.1 for _ in range(3))
    weights = [torch.randn(batch, heads, 64, 128) / 8, torch.randn(batch, heads, 128, 64) / 11]
    return [t.requires_grad_() for t in (q, k, v, theta, eta, alpha)], [w.requires_grad_() for w in weights]


def _scan(function: Callable[..., tuple[Tensor, ...]], batch: int, time: int, heads: int) -> Work:
    inputs, weights = _scan_inputs(batch, time, heads)
    grad = torch.randn(batch, time, heads, 64)

    def work() -> None:
        y = function(*inputs, tuple(weights), chunk_size=64)[0]
        torch.autograd.grad(y, [*inputs, *weights], grad)

    return work


def _op(batch: int, time: int, heads: int) -> Variant:
    flops = neural_memory_flops(batch, time, heads, **MEMORY)
    return Variant(
        "memzoo ops.neural_memory alone", lambda: _scan(neural_memory, batch, time, heads), batch * time, flops
    )


def _loop(batch: int, time: int, heads: int) -> Variant:
    """The loop's cost is that of its tokens, so it runs on few of them."""
    return Variant(
        f"memzoo reference loop ({batch} x {time} tokens, scan alone)",
        lambda: _scan(neural_memory_loop, batch, time, heads),
        batch * time,
    )


def _titans_pytorch(name: str, batch: int, time: int, heads: int, *, chunk: int, base_every: int | None) -> Variant:
    """titans-pytorch 0.5.5 with the paper's memory: no residual norm, summed loss, SiLU, unit keys."""

    def build() -> Work:
        from titans_pytorch import MemoryMLP
        from titans_pytorch import NeuralMemory as PeerMemory

        layer = PeerMemory(
            64 * heads,
            heads=heads,
            dim_head=64,
            chunk_size=chunk,
            batch_size=base_every,
            model=MemoryMLP(64, depth=2, expansion_factor=2.0),
            mem_model_norm_add_residual=False,
            pre_rmsnorm=False,
            momentum=True,
            activation=nn.SiLU(),
            qk_rmsnorm=True,
            default_step_transform_max_lr=64**-0.5,
            store_memory_loss_fn=lambda predicted, target: (predicted - target).pow(2).sum(-1),
        )
        return _trained(layer, batch, time, 64 * heads)

    installed = importlib.util.find_spec("titans_pytorch") is not None
    return Variant(name, build, batch * time, missing=None if installed else "titans-pytorch is not installed")


def _step(context: int) -> Variant:
    """One token after a context, without gradient."""

    def build() -> Work:
        layer = NeuralMemory(256, num_heads=4).eval()
        with torch.no_grad():
            _, state = layer(torch.randn(1, context, 256))
        token = torch.randn(1, 1, 256)

        @torch.no_grad()
        def work() -> None:
            layer(token, state)

        return work

    return Variant(f"step after {context} tokens", build, 1)


def _mixer(name: str, build: Callable[[], nn.Module], time: int) -> Variant:
    return Variant(f"{name}, {time} tokens", lambda: _trained(build(), 1, time, 128), time)


EXACT = "titans-pytorch 0.5.5, exact (chunk 1, batch 64)"
CHUNKED = "titans-pytorch 0.5.5, gates a chunk (chunk 64, batch 64)"
DEFAULT = "titans-pytorch 0.5.5, default (chunk 64, base never moves)"

CASES = [
    Case(
        "neural_memory_single_head",
        "Neural memory, one head: batch 2, 1024 tokens, d = 64, two layers, h = 128; forward and backward",
        [
            _ours(2, 1024, 1),
            _op(2, 1024, 1),
            _loop(2, 64, 1),
            _titans_pytorch(EXACT, 2, 1024, 1, chunk=1, base_every=64),
            _titans_pytorch(CHUNKED, 2, 1024, 1, chunk=64, base_every=64),
            _titans_pytorch(DEFAULT, 2, 1024, 1, chunk=64, base_every=None),
        ],
        targets={EXACT: 40.0, CHUNKED: 2.0},
        most_memory={EXACT: 0.1},
    ),
    Case(
        "neural_memory_four_heads",
        "Neural memory, four heads: batch 8, 1024 tokens, d = 64, two layers, h = 128; forward and backward",
        [
            _ours(8, 1024, 4),
            _op(8, 1024, 4),
            # At 1024 tokens the exact mode would need about 29 GB; its cost is that of its tokens.
            _titans_pytorch(f"{EXACT}, 128 tokens", 8, 128, 4, chunk=1, base_every=64),
            _titans_pytorch(CHUNKED, 8, 1024, 4, chunk=64, base_every=64),
            _titans_pytorch(DEFAULT, 8, 1024, 4, chunk=64, base_every=None),
        ],
        targets={f"{EXACT}, 128 tokens": 1.0, CHUNKED: 1.0, DEFAULT: 1.0},
        least_share=0.7,
    ),
    Case(
        "neural_memory_growth",
        "Neural memory, growth with length at chunk 64; forward and backward",
        [_mixer("NeuralMemory", lambda: NeuralMemory(128), time) for time in (1024, 2048, 4096, 8192, 16384)],
        growth=True,
    ),
    Case(
        "neural_memory_step",
        "Neural memory, one step of decoding after a context",
        [_step(context) for context in (64, 1024, 16384)],
        growth=True,
    ),
    Case(
        "sliding_window_growth",
        "Sliding-window attention, window 256, growth with length; forward and backward",
        [
            _mixer("SlidingWindowAttention", lambda: SlidingWindowAttention(128, window=256), time)
            for time in (1024, 2048, 4096, 8192)
        ],
        growth=True,
    ),
    Case(
        "sliding_window_against_full",
        "Sliding-window attention, window 256, against full attention, 8192 tokens; forward and backward",
        [
            _mixer("SlidingWindowAttention", lambda: SlidingWindowAttention(128, window=256), 8192),
            _mixer("Attention", lambda: Attention(128), 8192),
        ],
    ),
]
