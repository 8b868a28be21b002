"""Inverses of unit lower triangular matrices, many small ones at once."""

from torch import Tensor


def inverse_of_unit_lower(strict: Tensor) -> Tensor:
    """Return ``(1 + strict)^-1`` for matrices that are zero on and above the diagonal; what stands there is not read.

    Inverses of diagonal blocks are merged pair by pair, [[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']]: products of
    whole batches, where a triangular solver takes one matrix after another, and as accurate as substitution.

    Shape:
        strict: (..., size, size), size a power of two. Returns the same.
    """
    size = strict.shape[-1]
    inverse = strict.new_ones(*strict.shape[:-2], size, 1, 1)  # of all diagonal blocks: (..., blocks, span, span)
    span = 1
    while span < size:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = corners(strict, span)
        product = corner if span == 1 else second @ (corner @ first)
        inverse = inverse.new_zeros(*first.shape[:-2], 2 * span, 2 * span)
        inverse[..., :span, :span] = first
        inverse[..., span:, span:] = second
        inverse[..., span:, :span] = -product
        span *= 2
    return inverse[..., 0, :, :]


def corners(square: Tensor, span: int) -> Tensor:
    """View the blocks left below the diagonal between neighbours of ``span`` rows: (..., pairs, span, span)."""
    blocks = square.unflatten(-1, (-1, 2, span)).unflatten(-4, (-1, 2, span))  # (..., pairs, 2, span, pairs, 2, span)
    below: Tensor = blocks[..., 1, :, :, 0, :]
    return below.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
