"""What fetched memory blocks add to a layer: hidden units, patches of rank r, keys and values to attend to.

Pretraining with hierarchical memories (arXiv 2510.02375). A batch reads few distinct nodes, each by some of its rows:
every node is multiplied once with the rows that read it. So blocking a node leaves rows that avoid it as they were, to
the bit; where the number of rows that read a node changes, its product may round otherwise. Products of "ffn" and of
patches have the dtype of their factors, those of "kv" are in at least float32, as is what they all add up to.

A loop over nodes, as a batched product would need a copy of the blocks for every row. Measured, decoding one token for
32 rows at 32 leaves (width 512, rows 256, 64 and 16), both take as long on a CPU.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers.banks.fetched import Group, LayerMemories
from memzoo.layers.ops.precision import no_autocast, wider

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def memory_feed_forward(x: Tensor, memories: LayerMemories) -> Tensor:
    """Return what blocks of kind "ffn" add: ``sum_l M3_l (act(M1_l x) * (M2_l x))``.

    With blocks that are not gated, ``sum_l M3_l act(M2_l x)``.

    Args:
        x: What the feed-forward reads.
        memories: Of that layer.

    Shape:
        x: (batch, time, dim). Returns (batch, time, dim), in at least float32.
    """
    activation = ACTIVATIONS[memories.layout.activation]

    def read(rows: Tensor, group: Group) -> Tensor:
        *inner, down = group.slabs
        hidden = activation(F.linear(rows, inner[0]))
        if len(inner) == 2:
            hidden = hidden * F.linear(rows, inner[1])
        return hidden @ down

    return _sum(x, memories.layout.dim, memories, read)


def memory_patch(x: Tensor, memories: LayerMemories, name: str) -> Tensor:
    """Return what blocks of a LoRA kind add to one product: ``scale * sum_l B_l A_l x``.

    Args:
        x: What the patched matrix is multiplied with.
        memories: Of that layer.
        name: Of the matrix, as the layout's slabs call it: "query", "key", "value", "out", "gate", "up" or "down".

    Shape:
        x: (batch, time, n_in). Returns (batch, time, n_out), in at least float32.
    """
    layout = memories.layout
    names = [slab.name for slab in layout.slabs]
    first, second = names.index(f"{name}_in"), names.index(f"{name}_out")

    def read(rows: Tensor, group: Group) -> Tensor:
        return F.linear(rows, group.slabs[first]) @ group.slabs[second]

    return layout.scale * _sum(x, layout.slabs[second].width, memories, read)


def memory_attention(q: Tensor, memories: LayerMemories, *, scale: float | None = None) -> Tensor:
    """Return what queries read of blocks of kind "kv", of all levels in one softmax: ``sum_j softmax_j(q . k_j) v_j``.

    Args:
        q: Queries, without positions.
        memories: Of that layer. A row of the batch that reads none gets zeros.
        scale: Factor of the scores, ``head_dim ** -0.5`` by default.

    Shape:
        q: (batch, time, heads, head_dim). Returns the same, in at least float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, heads = wider(q), (-1, q.shape[-1])
    levels = _levels(memories.groups)
    reads, totals = [], []
    # The softmax over all levels is made of one over each: they are weighed by the sums that they were divided by.
    log_total = q.new_full(q.shape[:3], -torch.inf).transpose(1, 2)
    with no_autocast(q.device):
        for level in levels:
            parts = [_attend(part, group, heads, scale) for part, group in zip(_parts(q, level), level, strict=True)]
            read, total = (torch.cat(every) for every in zip(*parts, strict=True))
            rows = _rows(level)
            seen = torch.logaddexp(_take(log_total, rows), total)
            log_total = seen if rows is None else log_total.index_copy(0, rows, seen)
            reads.append(read)
            totals.append(total)
    y = torch.zeros_like(log_total)[..., None].repeat(1, 1, 1, q.shape[-1])
    for level, read, total in zip(levels, reads, totals, strict=True):
        rows = _rows(level)
        share = (total - _take(log_total, rows)).exp()
        y = _add(y, rows, share[..., None] * read)
    return y.transpose(1, 2)


def _attend(q: Tensor, group: Group, heads: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Read one node: (readers, heads, time, head_dim), and the logarithm of what its softmax was divided by."""
    keys, values = (wider(slab).unflatten(-1, heads) for slab in group.slabs)
    scores = scale * torch.einsum("bthd,rhd->bhtr", q, keys)
    return torch.einsum("bhtr,rhd->bhtd", scores.softmax(-1), values), scores.logsumexp(-1)


def patched(
    linear: nn.Linear, x: Tensor, memories: LayerMemories, name: str, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``linear(x)`` with the patch of a LoRA kind: ``(W + scale * sum_l B_l A_l) x``.

    Args:
        linear: Whose matrix is patched.
        x: What it reads.
        memories: Of that layer.
        name: As in ``memory_patch``.
        dtype: To round the sum to, if it is wider than that of ``linear(x)``.

    Shape:
        x: (batch, time, in_features). Returns (batch, time, out_features).

    Raises:
        ValueError: The patch is for a matrix of another shape.
    """
    n_in, n_out = (slab.width for slab in memories.layout.slabs if slab.name in (f"{name}_in", f"{name}_out"))
    if (n_in, n_out) != (linear.in_features, linear.out_features):
        raise ValueError(
            f"memories patch a {name!r} matrix from {n_in} to {n_out} channels, the layer's goes from "
            f"{linear.in_features} to {linear.out_features}; give the bank the layout of this model"
        )
    y: Tensor = linear(x)
    return (y + memory_patch(x, memories, name)).to(y.dtype if dtype is None else torch.promote_types(y.dtype, dtype))


def check_memories(memories: LayerMemories, x: Tensor) -> None:
    """Require memories that were fetched for this input.

    Raises:
        ValueError: Axes, width, batch size, device or dtype differ; dtypes may under autocast.
    """
    dim = memories.layout.dim
    if x.dim() != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; memories are read by (batch, time, {dim}), where each row of the batch has "
            f"a path of its own: call the layer, or attach to one, before tokens are flattened"
        )
    if x.shape[-1] != dim:
        raise ValueError(
            f"x has width {x.shape[-1]}, memories are of a bank with dim={dim}; use a bank whose layout has the width "
            f"of this layer"
        )
    if len(x) != memories.batch_size:
        raise ValueError(
            f"x has batch {len(x)}, memories were fetched for batch_size={memories.batch_size}; fetch them with one "
            f"path for each row of x"
        )
    if not memories.groups:
        return
    blocks = memories.groups[0].slabs[0]
    if blocks.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x has dtype {x.dtype}, the fetched blocks have {blocks.dtype}; use bank.fetch(paths, dtype={x.dtype}) or "
            f"fetched.to(dtype={x.dtype})"
        )
    if blocks.device != x.device:
        raise ValueError(
            f"x is on {x.device}, the fetched blocks are on {blocks.device}; use bank.fetch(paths, device="
            f"'{x.device}') or fetched.to('{x.device}')"
        )


def _sum(x: Tensor, width: int, memories: LayerMemories, read: Callable[[Tensor, Group], Tensor]) -> Tensor:
    """Add up what each node gives the rows that read it, coarse levels first."""
    y = x.new_zeros(*x.shape[:-1], width, dtype=torch.promote_types(x.dtype, torch.float32))
    for level in _levels(memories.groups):
        parts = [read(part, group) for part, group in zip(_parts(x, level), level, strict=True)]
        y = _add(y, _rows(level), parts[0] if len(parts) == 1 else torch.cat(parts))
    return y


def _levels(groups: Iterable[Group]) -> list[list[Group]]:
    """Split groups by level: rows that read one node of a level read no other."""
    levels: dict[int, list[Group]] = {}
    for group in groups:
        levels.setdefault(group.level, []).append(group)
    return list(levels.values())


def _rows(level: Sequence[Group]) -> Tensor | None:
    """Return the rows that read a level, group by group; None where all read one node."""
    rows = [group.rows for group in level if group.rows is not None]
    return torch.cat(rows) if rows else None


def _parts(x: Tensor, level: Sequence[Group]) -> Sequence[Tensor]:
    """Return what each group of a level reads of x, gathered at once: one gradient of the size of x a level.

    Each is copied to where storage begins, as products may round by the alignment of their factors.
    """
    rows = _rows(level)
    if rows is None:
        return [x]
    sizes = [len(group.rows) for group in level if group.rows is not None]
    return [part.clone() for part in x.index_select(0, rows).split(sizes)]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(y: Tensor, rows: Tensor | None, part: Tensor) -> Tensor:
    """Add to some rows, none of them twice: so the order does not matter, and the sum is the same every time."""
    return y + part if rows is None else y.index_add(0, rows, part.to(y.dtype))
