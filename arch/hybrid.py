"""Hybrids: which blocks of a model have softmax attention in place of its own mixer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memzoo.layers.attention import Attention
from memzoo.layers.errors import check_positive
from memzoo.layers.mixer import SequenceMixer


def hybrid_mixers(
    depth: int,
    dim: int,
    build: Callable[[], SequenceMixer],
    *,
    attention_layers: Sequence[int] | None,
    attention: Mapping[str, Any] | None,
    defaults: Mapping[str, Any] | None = None,
) -> list[SequenceMixer]:
    """Build the mixers of a model, block by block.

    Args:
        depth: Number of blocks.
        dim: Width of the residual stream.
        build: Makes the mixer of a block.
        attention_layers: Blocks, counted from 0, that have attention instead. None for none.
        attention: Keyword options of ``memzoo.layers.Attention`` there.
        defaults: What these are laid over.

    Raises:
        ValueError: ``depth`` is not positive, ``attention_layers`` names no block of the model, or there is
            ``attention`` for none.
    """
    check_positive("depth", depth)
    attends = set(attention_layers or ())
    if not attends <= set(range(depth)):
        raise ValueError(f"attention_layers={attention_layers} are not all blocks; use numbers from 0 to {depth - 1}")
    if attention is not None and not attends:
        raise ValueError(f"attention={attention} is used by no block; name its blocks in attention_layers")
    options = {**(defaults or {}), **(attention or {})}
    return [Attention(dim, **options) if index in attends else build() for index in range(depth)]
