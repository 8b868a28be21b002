"""Benchmarks of what blocks do to single tokens, beside the same in plain operators."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark_cases.case import Case, Variant, Work, train_function
from memzoo.layers.ops.elementwise import rms_norm, rotate_halves, silu_product

BATCH, TIME, DIM, HIDDEN, HEADS = 2, 1024, 384, 1024, 6
TOKENS = BATCH * TIME
PLAIN = "plain operators"
EPS = 1e-6


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as it is mostly written."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as it is mostly written."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as PyTorch has it."""
    return F.rms_norm(x, weight.shape, weight, EPS)


def normalise(function: Callable[[Tensor, Tensor], Tensor]) -> Work:
    """Normalise tokens."""
    return train_function(function, [torch.randn(BATCH, TIME, DIM), torch.ones(DIM)])


def gate(function: Callable[[Tensor, Tensor], Tensor]) -> Work:
    """Gate what is as wide as a feed-forward."""
    return train_function(function, [*torch.randn(2, BATCH, TIME, HIDDEN)])


def rotate(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    """Rotate heads."""
    angle = torch.rand(TIME, 1, DIM // HEADS // 2)
    cos, sin = angle.cos(), angle.sin()
    return train_function(lambda x: function(x, cos, sin), [torch.randn(BATCH, TIME, HEADS, DIM // HEADS)])


CASES = [
    Case(
        "rms_norm",
        "elementwise",
        f"RMSNorm: {TOKENS} tokens of width {DIM}; forward and backward",
        [
            Variant("memzoo", lambda: normalise(lambda x, weight: rms_norm(x, weight, EPS)), TOKENS),
            Variant(PLAIN, lambda: normalise(plain_norm), TOKENS),
            Variant("torch F.rms_norm", lambda: normalise(torch_norm), TOKENS),
        ],
    ),
    Case(
        "silu_product",
        "elementwise",
        f"Gated product of a SwiGLU: {TOKENS} tokens of width {HIDDEN}; forward and backward",
        [
            Variant("memzoo", lambda: gate(silu_product), TOKENS),
            Variant(PLAIN, lambda: gate(lambda gate, x: F.silu(gate) * x), TOKENS),
        ],
        note="Nothing is kept but what was given: a third less than the plain operators keep.",
    ),
    Case(
        "rotate_halves",
        "elementwise",
        f"Rotary embedding: {TOKENS} tokens, {HEADS} heads of width {DIM // HEADS}; forward and backward",
        [
            Variant("memzoo", lambda: rotate(rotate_halves), TOKENS),
            Variant(PLAIN, lambda: rotate(plain_rotation), TOKENS),
        ],
    ),
]
