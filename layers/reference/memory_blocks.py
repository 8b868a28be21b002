"""What fetched memory blocks add to a layer, one sequence, one token and one level at a time.

Slow, and the definition of what is right. Pretraining with hierarchical memories (arXiv 2510.02375). A token x of a
sequence whose path has, in this layer, the matrices M1_l, M2_l (r_l, d) and M3_l (d, r_l) at level l:

    ffn    sum_l M3_l ( act(M1_l x) * (M2_l x) )         sum_l M3_l act(M2_l x) where nothing is gated
    lora   scale * sum_l B_l (A_l x)                     added to W x, for each of the patched matrices
    kv     sum_j softmax_j( scale q . k_j ) v_j          j runs over the keys of all levels; head by head
"""

import math

import torch
from torch import Tensor

from memzoo.layers.banks.fetched import LayerMemories


def memory_feed_forward(x: Tensor, memories: LayerMemories) -> Tensor:
    """Return what blocks of kind "ffn" add, (batch, time, dim)."""
    act = ACTIVATIONS[memories.layout.activation]

    def token(x: Tensor, levels: list[dict[str, Tensor]]) -> Tensor:
        y = torch.zeros_like(x)
        for level in levels:
            up = level["up"] @ x
            hidden = act(level["gate"] @ x) * up if memories.layout.gated else act(up)
            y = y + level["down"].T @ hidden  # kept transposed
        return y

    return torch.stack([torch.stack([token(t, _path(memories, b)) for t in row]) for b, row in enumerate(x)])


def memory_patch(x: Tensor, memories: LayerMemories, name: str) -> Tensor:
    """Return what blocks of a LoRA kind add to the product of one matrix with x, (batch, time, n_out)."""
    width = next(slab.width for slab in memories.layout.slabs if slab.name == f"{name}_out")

    def token(x: Tensor, levels: list[dict[str, Tensor]]) -> Tensor:
        y = x.new_zeros(width)
        for level in levels:
            A, B = level[f"{name}_in"], level[f"{name}_out"].T  # B is kept transposed
            y = y + memories.layout.scale * (B @ (A @ x))
        return y

    return torch.stack([torch.stack([token(t, _path(memories, b)) for t in row]) for b, row in enumerate(x)])


def memory_attention(q: Tensor, memories: LayerMemories, *, scale: float | None = None) -> Tensor:
    """Return what queries (batch, time, heads, head_dim) read of blocks of kind "kv"."""
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale

    def read(query: Tensor, head: int, levels: list[dict[str, Tensor]]) -> Tensor:
        own = slice(head * head_dim, (head + 1) * head_dim)
        if not levels:
            return torch.zeros_like(query)
        keys = torch.cat([level["key"][:, own] for level in levels])
        values = torch.cat([level["value"][:, own] for level in levels])
        return (scale * keys @ query).softmax(0) @ values

    rows = []
    for b, row in enumerate(q):
        levels = _path(memories, b)
        rows.append(torch.stack([torch.stack([read(head, h, levels) for h, head in enumerate(t)]) for t in row]))
    return torch.stack(rows)


def _path(memories: LayerMemories, row: int) -> list[dict[str, Tensor]]:
    """Return the matrices on the path of one row of the batch, by name, one entry a level."""
    names = [slab.name for slab in memories.layout.slabs]
    own = [group for group in memories.groups if group.rows is None or row in group.rows.tolist()]
    return [dict(zip(names, group.slabs, strict=True)) for group in own]


def _silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def _gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def _relu(z: Tensor) -> Tensor:
    return z.clamp(min=0)


ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu}
