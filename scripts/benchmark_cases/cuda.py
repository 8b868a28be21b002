"""Benchmarks of the neural memory on a CUDA device, against flash-linear-attention's Gated DeltaNet."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmark_cases.case import Case, Product, Variant, Work, missing, train_function
from benchmark_cases.neural_memory import scan_inputs
from benchmark_cases.products import memory_products, online_products
from memzoo.layers.ops.neural_memory import neural_memory
from memzoo.layers.ops.neural_memory_online import neural_memory_online

FLA = "fla chunk_gated_delta_rule"
NOTE = """\
Inputs q, k, v in bfloat16, gates and memory in float32, which is also what ours multiplies in (TF32 where it says so);
fla multiplies in bfloat16. Gated DeltaNet is the linear memory without momentum whose base moves with every token:
"no momentum" computes its function."""
Function = Callable[..., tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]


def fla_inputs(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor) -> list[Tensor]:
    """Return q, k, v, log decay and step of Gated DeltaNet for the gates of a memory without momentum."""
    kept = 1 - alpha
    return [q, k, (kept[..., None] * v).to(v.dtype), kept.log(), theta / kept]


def gated_delta_rule(*inputs: Tensor) -> Tensor:
    """Gated DeltaNet by fla, of what ``fla_inputs`` returns."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    y: Tensor = chunk_gated_delta_rule(*inputs, scale=1.0)[0]
    return y


def compiled_memory(backend: str = "inductor") -> Function:
    """Return ``ops.neural_memory`` compiled as one graph, without what was compiled of it before for other shapes."""
    torch.compiler.reset()
    return torch.compile(neural_memory, fullgraph=True, dynamic=False, backend=backend)


def chunk_by_chunk(step: Function, chunk_size: int, *tensors: Tensor) -> Tensor:
    """Call a (compiled) op once a chunk, handing on weights and momentum."""
    tokens, weights, momentum = tensors[:6], tensors[6:], None
    reads = []
    for begin, end in pairwise(range(0, tokens[0].shape[1] + 1, chunk_size)):
        y, weights, momentum = step(*(t[:, begin:end] for t in tokens), weights, momentum, chunk_size=chunk_size)
        reads.append(y)
    return torch.cat(reads, 1)


def in_tf32(work: Work) -> Work:
    """Let float32 products round their factors to TF32 while ``work`` runs."""

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            work()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def cases(
    batch: int = 8,
    time: int = 4096,
    heads: int = 16,
    *,
    head_dim: int = 64,
    chunk: int = 64,
    device: str = "cuda",
    backend: str = "inductor",
) -> list[Case]:
    """A linear and a deep memory beside Gated DeltaNet."""
    absent = None if device == "cpu" or torch.cuda.is_available() else "needs a CUDA device"
    sizes = f"batch {batch}, {time} tokens, {heads} heads, d = {head_dim}, chunk {chunk}; forward and backward"

    def inputs(depth: int) -> list[Tensor]:
        return scan_inputs(batch, time, heads, depth=depth, head_dim=head_dim, device=device, dtype=torch.bfloat16)

    def in_chunks(depth: int, kernels: str = "torch") -> Work:
        return train_function(
            lambda *t: neural_memory(*t[:6], t[6:], chunk_size=chunk, backend=kernels)[0], inputs(depth)
        )

    def compiled(depth: int) -> Work:
        step = compiled_memory(backend)
        return train_function(lambda *t: chunk_by_chunk(step, chunk, *t), inputs(depth))

    def online() -> Work:
        return train_function(lambda *t: neural_memory_online(*t[:6], t[6:], chunk_size=chunk)[0], inputs(1))

    def online_without_momentum() -> Work:
        def run(*t: Tensor) -> Tensor:
            return neural_memory_online(*t[:4], None, t[4], t[5:], chunk_size=chunk)[0]

        q, k, v, theta, _, alpha, weight = inputs(1)
        return train_function(run, [q, k, v, theta, alpha, weight])

    def kernels_of(library: str) -> str | None:
        return absent or (missing(library) if device == "cuda" else "its kernels need a CUDA device")

    def fla() -> Work:
        q, k, v, theta, _, alpha, _ = inputs(1)
        return train_function(gated_delta_rule, fla_inputs(q, k, v, theta, alpha))

    def variant(name: str, build: Callable[[], Work], products: tuple[Product, ...] = ()) -> Variant:
        return Variant(name, build, batch * time, products, absent)

    def in_depth(depth: int, *more: Variant) -> list[Variant]:
        products = memory_products(batch, time, heads, head_dim=head_dim, depth=depth, expansion=2, chunk_size=chunk)
        name, work = "ops.neural_memory, TF32, Triton", lambda: in_tf32(in_chunks(depth, "triton"))
        triton = Variant(name, work, batch * time, products, missing=kernels_of("triton"))
        return [
            variant("ops.neural_memory, TF32", lambda: in_tf32(in_chunks(depth)), products),
            variant("ops.neural_memory, float32", lambda: in_chunks(depth), products),
            variant("ops.neural_memory, TF32, compiled, a call a chunk", lambda: in_tf32(compiled(depth)), products),
            *([triton] if depth == 2 else []),  # its kernels are for two layers
            *more,
            Variant(FLA, fla, batch * time, missing=kernels_of("fla")),
        ]

    solved = online_products(batch, time, heads, head_dim=head_dim, chunk_size=chunk)
    linear = in_depth(
        1,
        variant("ops.neural_memory_online, TF32", lambda: in_tf32(online()), solved),
        variant("ops.neural_memory_online, TF32, no momentum", lambda: in_tf32(online_without_momentum())),
    )
    shared: dict[str, Any] = dict(note=NOTE, targets={FLA: 1 / 3}, device=device)  # at most three times slower
    return [
        Case("cuda_linear_memory", "cuda", f"On CUDA, linear memory: {sizes}", linear, **shared),
        Case("cuda_deep_memory", "cuda", f"On CUDA, memory of two layers, h = 2d: {sizes}", in_depth(2), **shared),
    ]


CASES = cases()
