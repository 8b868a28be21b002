"""Benchmarks of the neural memory, alone and against titans-pytorch's."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_cases.case import Case, Variant, Work, missing, mixer, train, train_function
from benchmark_cases.products import layer_products, memory_products, online_products
from memzoo.layers import NeuralMemory
from memzoo.layers.ops import cpp_library
from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.ops.neural_memory_online import neural_memory_online
from memzoo.layers.reference.neural_memory import neural_memory as neural_memory_loop

MEMORY = {"head_dim": 64, "depth": 2, "expansion": 2, "chunk_size": 64}
EXACT = "titans-pytorch 0.5.5, exact (chunk 1, batch 64)"
EXACT_SHORT = f"{EXACT}, 64 tokens"
CHUNKED = "titans-pytorch 0.5.5, gates a chunk (chunk 64, batch 64)"
DEFAULT = "titans-pytorch 0.5.5, default (chunk 64, base never moves)"


def scan_inputs(
    batch: int,
    time: int,
    heads: int,
    *,
    depth: int = 2,
    head_dim: int = 64,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return q, k, v of ``dtype``, theta, eta, alpha and the weights of every memory layer."""
    q, k, v = (torch.randn(batch, time, heads, head_dim, device=device) for _ in range(3))
    q, k, v = (nn.functional.normalize(t, dim=-1).to(dtype) for t in (q, k, v))
    gates = [torch.rand(batch, time, heads, device=device) * 0.1 for _ in range(3)]
    widths = [head_dim, *[2 * head_dim] * (depth - 1), head_dim]
    weights = [torch.randn(batch, heads, a, b, device=device) / a**0.5 for a, b in pairwise(widths)]
    return [q, k, v, *gates, *weights]


def scan(function: Callable[..., tuple[Any, ...]], inputs: list[Tensor], **options: int) -> Work:
    """Forward and backward of a memory op or its loop."""
    return train_function(lambda *t: function(*t[:6], t[6:], **options)[0], inputs)


def _ours(batch: int, time: int, heads: int) -> list[Variant]:
    """Return layer and op, in C++ and in torch."""
    dim, tokens = 64 * heads, batch * time
    layer, op = "memzoo NeuralMemory (per-token gates, conv)", "memzoo ops.neural_memory alone"

    def train_layer(backend: str) -> Work:
        return train(NeuralMemory(dim, num_heads=heads, chunk_size=64, backend=backend), batch, time, dim)

    def train_op(backend: str) -> Work:
        return train_function(
            lambda *t: neural_memory(*t[:6], t[6:], chunk_size=64, backend=backend)[0], scan_inputs(batch, time, heads)
        )

    of_layer, of_op = (count(batch, time, heads, **MEMORY) for count in (layer_products, memory_products))
    absent = cpp_library.obstacle()
    return [
        Variant(f"{layer}, C++", lambda: train_layer("cpp"), tokens, of_layer, missing=absent),
        Variant(f"{op}, C++", lambda: train_op("cpp"), tokens, of_op, missing=absent),
        Variant(layer, lambda: train_layer("torch"), tokens, of_layer),
        Variant(op, lambda: train_op("torch"), tokens, of_op),
    ]


def _loop(batch: int, time: int, heads: int) -> Variant:
    """The loop's cost is that of its tokens, so it runs on few of them."""
    return Variant(
        f"memzoo reference loop ({batch} x {time} tokens, scan alone)",
        lambda: scan(neural_memory_loop, scan_inputs(batch, time, heads), chunk_size=64),
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
        return train(unit_keys(layer), batch, time, 64 * heads)

    return Variant(name, build, batch * time, missing=missing("titans_pytorch"))


def unit_keys(peer: nn.Module) -> nn.Module:
    """Set the gains of titans-pytorch's query and key norms so that what they return has unit length."""
    for name, gamma in peer.named_parameters():
        if name.endswith(("q_norm.gamma", "k_norm.gamma")):
            nn.init.constant_(gamma, gamma.shape[-1] ** -0.5 - 1)
    return peer


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


def online(batch: int = 4, time: int = 1024, heads: int = 4, *, head_dim: int = 64, chunk: int = 64) -> Case:
    """A linear memory whose gradient base moves with every token: solved in chunks, or taken token by token."""

    def inputs() -> list[Tensor]:
        return scan_inputs(batch, time, heads, depth=1, head_dim=head_dim)

    tokens = batch * time
    frozen = memory_products(batch, time, heads, head_dim=head_dim, depth=1, expansion=1, chunk_size=chunk)
    solved = online_products(batch, time, heads, head_dim=head_dim, chunk_size=chunk)
    return Case(
        "neural_memory_online",
        "online",
        f"Linear memory, gradient base moving with every token: batch {batch}, {time} tokens, {heads} heads, "
        f"d = {head_dim}; forward and backward",
        [
            Variant(
                f"ops.neural_memory_online, {chunk} tokens at once",
                lambda: scan(neural_memory_online, inputs(), chunk_size=chunk),
                tokens,
                solved,
            ),
            Variant("ops.neural_memory, chunk_size=1", lambda: scan(neural_memory, inputs(), chunk_size=1), tokens),
            Variant(
                f"ops.neural_memory, chunk_size={chunk}",
                lambda: scan(neural_memory, inputs(), chunk_size=chunk),
                tokens,
                frozen,
            ),
        ],
        note=f"The first two compute the same function. The third, whose base moves every {chunk} tokens, is another "
        f"model: what the same parallelism costs without the triangular solve, which counts as no FLOPs.",
    )


def depths(batch: int = 2, time: int = 1024, heads: int = 4, *, head_dim: int = 64, chunk: int = 64) -> Case:
    """Cost of the memory's depth."""
    dim = heads * head_dim

    def variant(depth: int) -> Variant:
        memory = dict(head_dim=head_dim, depth=depth, expansion=2, chunk_size=chunk)
        return Variant(
            f"NeuralMemory, memory_depth={depth}",
            lambda: train(NeuralMemory(dim, num_heads=heads, memory_depth=depth, chunk_size=chunk), batch, time, dim),
            batch * time,
            layer_products(batch, time, heads, **memory),
        )

    return Case(
        "neural_memory_depth",
        "depth",
        f"Neural memory, growth with its depth: batch {batch}, {time} tokens, {heads} heads, d = {head_dim}, "
        f"h = {2 * head_dim}; forward and backward",
        [variant(depth) for depth in (1, 2, 3, 4)],
        note="A memory of one layer is a d x d matrix, every further layer brings d x h or h x h more.",
        axis="depth",
        has_memory=False,
    )


def checkpoints(time: int = 8192, *, dim: int = 128, every: tuple[int, ...] = (16, 4)) -> Case:
    """Memory and time of recomputing chunks in the backward pass."""

    def variant(chunks: int | None) -> Variant:
        return Variant(
            f"NeuralMemory, checkpoint_chunks={chunks}",
            lambda: train(NeuralMemory(dim, num_heads=2, checkpoint_chunks=chunks), 1, time, dim),
            time,
        )

    return Case(
        "neural_memory_checkpoints",
        "checkpoint",
        f"Neural memory, chunks computed again in the backward pass: {time} tokens, width {dim}; forward and backward",
        [variant(chunks) for chunks in (*every, None)],
        note="The gradients are equal. Peak memory is that of the whole layer, projections and gates included.",
    )


CASES = [
    Case(
        "neural_memory_single_head",
        "neural_memory",
        "Neural memory, one head: batch 2, 1024 tokens, d = 64, two layers, h = 128; forward and backward",
        [
            *_ours(2, 1024, 1),
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
        "neural_memory",
        "Neural memory, four heads: batch 8, 1024 tokens, d = 64, two layers, h = 128; forward and backward",
        [
            *_ours(8, 1024, 4),
            # At 1024 tokens the exact mode would need about 29 GB; its cost is that of its tokens.
            _titans_pytorch(EXACT_SHORT, 8, 64, 4, chunk=1, base_every=64),
            _titans_pytorch(CHUNKED, 8, 1024, 4, chunk=64, base_every=64),
            _titans_pytorch(DEFAULT, 8, 1024, 4, chunk=64, base_every=None),
        ],
        note="C++: backend='cpp'. The count is of full products. Of those inside a chunk, a fifth of the scan's, C++ "
        "passes over the masked half, and computes half of the forward pass once more in the backward pass; its "
        "own products of small matrices run faster than the large one that the rate is measured by. With torch the "
        "products take two thirds of a call, at two thirds of the rate that they have with their operands in cache; "
        "between them a chunk passes 20 times forward and 84 times backward over tensors of up to 1 MB, with what else "
        "is in use more than a core's cache of 1 MB holds.",
        targets={EXACT_SHORT: 1.0, CHUNKED: 1.0, DEFAULT: 1.0},
        least_share=0.7,
    ),
    Case(
        "neural_memory_growth",
        "neural_memory",
        "Neural memory, growth with length at chunk 64; forward and backward",
        [mixer("NeuralMemory", lambda: NeuralMemory(128), time) for time in (1024, 2048, 4096, 8192, 16384)],
        axis="length",
    ),
    Case(
        "neural_memory_step",
        "neural_memory",
        "Neural memory, one step of decoding after a context",
        [_step(context) for context in (64, 1024, 16384)],
        axis="context",
        has_memory=False,
    ),
    online(),
    depths(),
    Case(
        "neural_memory_depth_growth",
        "depth",
        "Neural memory of four layers, growth with length at chunk 64; forward and backward",
        [
            mixer("NeuralMemory, memory_depth=4", lambda: NeuralMemory(128, memory_depth=4), time)
            for time in (1024, 2048, 4096, 8192)
        ],
        axis="length",
    ),
    checkpoints(),
]
