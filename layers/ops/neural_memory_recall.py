"""A neural memory that is only asked: M(W; q), nothing written."""

import torch
from torch import Tensor

from memzoo.layers.ops.activations import ACTIVATIONS
from memzoo.layers.ops.memory_arguments import Weights
from memzoo.layers.ops.neural_memory_norm import normalise
from memzoo.layers.ops.precision import no_autocast


def recall(q: Tensor, weights: Weights, activation: str, norm: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return what the memory answers, in at least float32.

    Args:
        q: Queries.
        weights: One matrix a memory layer.
        activation: Between the layers.
        norm: Gain and bias of the LayerNorm of a memory ``x + LayerNorm(MLP(x))``; None for a plain MLP.

    Shape:
        q: (batch, time, heads, head_dim). weights: (batch, heads, d_in, d_out). norm: (heads, head_dim) each. Returns
        the shape of q.
    """
    value = ACTIVATIONS[activation].value
    with no_autocast(q.device):
        y = q.transpose(1, 2).to(torch.promote_types(q.dtype, weights[0].dtype))
        asked = y
        for i, w in enumerate(weights):
            y = (value(y) if i else y) @ w
        if norm is not None:
            gain, bias = norm
            normal, _ = normalise(y)
            y = asked + normal * gain[:, None] + bias[:, None]
    return y.transpose(1, 2)
