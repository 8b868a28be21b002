"""Coefficients of a neural memory's chunks from their gates, in C++; see ``neural_memory_tables`` for what they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.cpp_library import load
from memzoo.layers.ops.once_differentiable import once_differentiable


class CppCoefficients(torch.autograd.Function):
    """``mix, read, write, transition`` of gates (n, R, C): the fields of ``ChunkInputs`` after q, k, v, n in front.

    Args:
        theta: Step sizes.
        eta: Momentum gates; zeros without momentum.
        keep: 1 - alpha.
        apply: 1 at tokens that exist, else 0; None if all do.
        blocks: Carried blocks, two with momentum.
        shift: 1 to read after the token is written, 0 before.
    """

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eta: Tensor, keep: Tensor, apply: Tensor | None, blocks: int, shift: int
    ) -> tuple[Tensor, ...]:
        gates = [t.contiguous() for t in (theta, eta, keep, apply) if t is not None]
        ctx.save_for_backward(*gates)
        ctx.shift = shift
        return tuple(coefficients(gates, blocks, shift))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = coefficients_gradients(ctx.saved_tensors, ctx.shift, [g.contiguous() for g in grads])
        return *given, None, None, None


@torch.library.custom_op("memzoo::neural_memory_coefficients", mutates_args=())
def coefficients(gates: Sequence[Tensor], blocks: int, shift: int) -> list[Tensor]:
    """Compute the coefficients; one operation to a compiler."""
    load("neural_memory")
    results: list[Tensor] = _coefficients(gates, blocks, shift)
    torch.ops.memzoo_cpp.gate_tables(gates, shift, results)
    return results


@coefficients.register_fake
def _coefficients(gates: Sequence[Tensor], blocks: int, shift: int) -> list[Tensor]:
    chunks, rows, size = gates[0].shape
    return [
        gates[0].new_empty(chunks, rows, size, size),
        gates[0].new_empty(chunks, blocks, rows, size, 1),
        gates[0].new_empty(chunks, blocks, rows, size, 1),
        gates[0].new_empty(chunks, blocks, blocks, rows, 1, 1),
    ]


@torch.library.custom_op("memzoo::neural_memory_coefficients_gradients", mutates_args=())
def coefficients_gradients(gates: Sequence[Tensor], shift: int, grads: Sequence[Tensor]) -> list[Tensor]:
    """Take gradients of the coefficients back to theta, eta and keep; one operation to a compiler."""
    load("neural_memory")
    results: list[Tensor] = _gradients(gates, shift, grads)
    torch.ops.memzoo_cpp.gate_tables_gradients(gates, shift, grads, results)
    return results


@coefficients_gradients.register_fake
def _gradients(gates: Sequence[Tensor], shift: int, grads: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gate) for gate in gates[:3]]
