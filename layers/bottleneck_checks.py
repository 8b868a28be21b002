"""Checks of what a discrete key-value bottleneck is given."""

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive


def check_sizes(dim: int, num_codebooks: int, num_pairs: int, dim_key: int, topk: int, chunk_bytes: int) -> None:
    """Require whole numbers >= 1, and no more nearest keys than there are.

    Raises:
        ValueError: One is out of range.
    """
    sizes = {"dim": dim, "num_codebooks": num_codebooks, "num_pairs": num_pairs, "dim_key": dim_key}
    for name, size in (sizes | {"topk": topk, "chunk_bytes": chunk_bytes}).items():
        check_positive(name, size)
    if topk > num_pairs:
        raise ValueError(f"topk={topk} is more than num_pairs={num_pairs}; use topk <= {num_pairs}")


def check_representation(z: Tensor, mask: Tensor | None, dim: int, name: str = "z") -> tuple[Tensor, Tensor | None]:
    """Return ``z`` as (batch, tokens, dim), with the mask if it fits.

    Raises:
        ValueError: Rank, width or dtype of ``z`` is wrong, or the mask does not cover its tokens.
    """
    if z.dim() not in (2, 3) or z.shape[-1] != dim or (z.dim() == 3 and not z.shape[1]):
        raise ValueError(
            f"{name} has shape {tuple(z.shape)}; it must be (batch, {dim}) or (batch, tokens, {dim}), tokens >= 1"
        )
    if not z.is_floating_point():
        raise ValueError(f"{name} has dtype {z.dtype}; it must be floating point: encode the input first")
    tokens = z[:, None] if z.dim() == 2 else z
    if mask is not None:
        check_mask(mask, tokens.shape[:2])
    return tokens, mask


def check_indices(indices: Tensor, num_codebooks: int, mask: Tensor | None = None) -> None:
    """Require what ``lookup`` returns, and a mask of its tokens.

    Raises:
        ValueError: Rank, codebooks or dtype is wrong, or the mask does not fit.
    """
    integer = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.dim() != 4 or indices.shape[1] != num_codebooks or not integer:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}; it must hold integers, (batch, "
            f"{num_codebooks}, topk, tokens), as lookup returns them"
        )
    if mask is not None:
        check_mask(mask, (len(indices), indices.shape[3]))


def is_fetched(indices: Tensor, mask: Tensor | None) -> Tensor:
    """Return where indices are of a pair and of a real token, bool."""
    return indices >= 0 if mask is None else (indices >= 0) & mask[:, None, None]


def masked_to_zero(z: Tensor, mask: Tensor | None) -> Tensor:
    """Replace masked tokens by zeros: padding may hold anything."""
    return z if mask is None else z.masked_fill(~mask[..., None], 0)


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Require a mask (batch, tokens) bool.

    Raises:
        ValueError: It is none.
    """
    if tuple(mask.shape) != tuple(shape) or mask.dtype != torch.bool:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be bool, (batch, tokens) = "
            f"{tuple(shape)}, True at real tokens"
        )
