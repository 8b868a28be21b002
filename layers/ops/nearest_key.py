"""Nearest key: for each query the keys of its codebook that are nearest, without a score for every pair in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_positive
from memzoo.layers.ops.precision import no_autocast, wider

CHUNK_BYTES = 5_000_000  # with what the allocator adds less than 10 MB, and hardly slower than more
GROUP = 32  # neighbouring keys of which the matrix product gives the least score alone


def nearest_key(
    queries: Tensor,
    keys: Tensor,
    *,
    topk: int = 1,
    allowed: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Find the keys nearest to each query, in the codebook of that query, by squared Euclidean distance.

    Two steps, over blocks of codebooks, queries and keys. A matrix product scores keys by ``|k|^2 - 2 q.k``, less the
    mean of the codebook, and of every 32 keys the least score is kept. Then distances are computed as
    ``sum_d (q_d - k_d)^2`` for the keys of every group that may hold one of the nearest: of the ``topk + 1`` with the
    least scores, and where rounding cannot tell more groups apart, of all of these. So what is returned is not rounded
    as the product rounds: it is what these sums say of all keys, the same for every ``chunk_bytes`` and number of
    queries, zero at a key, and of equally near keys the lowest. Of a query whose distances are infinite or NaN it is
    some key.

    It is computed in at least float32, under autocast and where matrix products are in TF32 too; float64 stays. Nothing
    is differentiated. In a compiled or exported graph it is one node, ``memzoo::nearest_key``, for any number of
    queries.

    Args:
        queries: One for each codebook.
        keys: Of each codebook.
        topk: How many keys to return.
        allowed: Which keys may be returned; a codebook that allows none allows all. One that allows fewer than
            ``topk`` returns -1 after them, for no key, at distance infinity.
        chunk_bytes: Roughly the memory it takes beside inputs and outputs. The default keeps blocks in the cache of a
            CPU; a GPU is quicker with more.

    Shape:
        queries: (..., codebooks, dim_key). keys: (codebooks, pairs, dim_key). allowed: (codebooks, pairs) bool.
        Returns indices (..., codebooks, topk), int64, and squared distances (..., codebooks, topk), nearest first.

    Raises:
        ValueError: A shape or dtype does not fit, or ``topk`` or ``chunk_bytes`` is out of range.

    Reference:
        Loop twin: ``memzoo.layers.reference.nearest_key``.
    """
    check_nearest_key(queries, keys, topk, allowed)
    check_positive("chunk_bytes", chunk_bytes, "use a whole number of bytes >= 1")
    queries, keys = wider(queries.detach()), wider(keys.detach())
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    lead, (codebooks, _, dim_key) = queries.shape[:-2], keys.shape
    flat = queries.to(dtype).reshape(-1, codebooks, dim_key)
    find = _as_one_node if torch.compiler.is_compiling() else _find
    indices, distances = find(flat, keys.to(dtype), allowed, topk, chunk_bytes)
    return indices.view(*lead, codebooks, topk), distances.view(*lead, codebooks, topk)


def check_nearest_key(queries: Tensor, keys: Tensor, topk: int, allowed: Tensor | None) -> None:
    """Require arguments that fit, as ``nearest_key`` says."""
    if keys.dim() != 3 or not keys.is_floating_point() or 0 in keys.shape:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}; it must be floating point, "
            f"(codebooks, pairs, dim_key), and not empty"
        )
    codebooks, pairs, dim_key = keys.shape
    if queries.dim() < 2 or queries.shape[-2:] != (codebooks, dim_key) or not queries.is_floating_point():
        raise ValueError(
            f"queries has shape {tuple(queries.shape)} and dtype {queries.dtype}; for keys of shape "
            f"{tuple(keys.shape)} it must be floating point, (..., {codebooks}, {dim_key})"
        )
    check_positive("topk", topk)
    if topk > pairs:
        raise ValueError(f"topk={topk} is more than the pairs={pairs} of a codebook; use topk <= {pairs}")
    if allowed is not None and (allowed.shape != (codebooks, pairs) or allowed.dtype != torch.bool):
        raise ValueError(
            f"allowed has shape {tuple(allowed.shape)} and dtype {allowed.dtype}; it must be bool, "
            f"{(codebooks, pairs)}: which pairs may be returned"
        )


def _find(queries: Tensor, keys: Tensor, allowed: Tensor | None, topk: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Go over blocks of queries (rows, codebooks, dim_key) and of codebooks."""
    rows, codebooks, dim_key = queries.shape
    pairs, size = keys.shape[1], queries.element_size()
    groups = -(-pairs // GROUP)
    indices = queries.new_empty(rows, codebooks, topk, dtype=torch.int64)
    distances = queries.new_empty(rows, codebooks, topk)
    if allowed is not None:
        allowed = allowed | ~allowed.any(1, keepdim=True)
    # The steps follow one another, so each may have half of the memory. One query of one codebook takes two numbers a
    # group in step 1, and the candidates' keys in step 2; a codebook takes three copies of its keys and, in blocks, a
    # score for every query.
    room = chunk_bytes // 2 // size
    own = min(topk + 1, groups) * GROUP * dim_key + 2 * groups
    rows_at_once = max(1, min(rows, room // own))
    codebooks_at_once = max(1, min(codebooks, room // (own * rows_at_once)))
    scores = room - codebooks_at_once * (3 * pairs * dim_key + groups * rows_at_once)
    keys_at_once = max(1, scores // (codebooks_at_once * rows_at_once * GROUP)) * GROUP
    with no_autocast(queries.device), _whole_float32():
        for first in range(0, codebooks, codebooks_at_once):
            here = slice(first, first + codebooks_at_once)
            own_allowed = None if allowed is None else allowed[here]
            for row in range(0, rows, rows_at_once):
                part = slice(row, row + rows_at_once)
                heads = queries[part, here].transpose(0, 1)
                found = _find_block(heads, keys[here], own_allowed, topk, keys_at_once, room)
                indices[part, here], distances[part, here] = (tensor.transpose(0, 1) for tensor in found)
    return indices, distances


def _find_block(
    queries: Tensor, keys: Tensor, allowed: Tensor | None, topk: int, keys_at_once: int, room: int
) -> tuple[Tensor, Tensor]:
    """Find the nearest keys of queries (codebooks, rows, dim_key)."""
    codebooks, pairs, dim_key = keys.shape
    groups = -(-pairs // GROUP)
    least, number = None, torch.arange(groups, device=keys.device)
    candidates = number.expand(codebooks, queries.shape[1], groups)
    if groups > topk + 1:
        least, doubt = _least_scores(queries, keys, allowed, keys_at_once)
        candidates, doubtful = _candidates(least, doubt, topk)
    if pairs % GROUP:
        keys = F.pad(keys, (0, 0, 0, groups * GROUP - pairs))
        real = torch.arange(groups * GROUP, device=keys.device) < pairs
        allowed = real.expand(codebooks, -1) if allowed is None else F.pad(allowed, (0, groups * GROUP - pairs))
    grouped = keys.view(codebooks, groups, GROUP, dim_key)
    codebook = torch.arange(codebooks, device=keys.device)[:, None].expand(queries.shape[:2])
    indices, distances = _nearest_of(queries, grouped, allowed, codebook, candidates, topk)
    if least is None:
        return indices, distances
    c, row = (doubtful > topk + 1).nonzero(as_tuple=True)
    if len(c):
        width = int(doubtful.amax())
        step = max(1, room // (width * GROUP * dim_key))
        for some, own in zip(c.split(step), row.split(step), strict=True):
            more = least[some, :, own].topk(width, 1, largest=False)[1].sort(1)[0]
            found = _nearest_of(queries[some, own], grouped, allowed, some, more, topk)
            indices[some, own], distances[some, own] = found
    return indices, distances


def _nearest_of(
    queries: Tensor, keys: Tensor, allowed: Tensor | None, codebook: Tensor, candidates: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Measure queries (..., dim_key) of codebooks (...) against all keys of groups (..., groups), ascending."""
    pairs = keys.shape[1] * GROUP
    near = keys[codebook[..., None], candidates]
    distances = near.sub_(queries[..., None, None, :]).square_().sum(-1)
    if allowed is not None:
        distances.masked_fill_(~allowed.reshape(keys.shape[:3])[codebook[..., None], candidates], torch.inf)
    distances = distances.flatten(-2)
    place = distances.argmin(-1, keepdim=True) if topk == 1 else distances.sort(dim=-1, stable=True)[1][..., :topk]
    found = candidates.gather(-1, place // GROUP) * GROUP + place % GROUP
    distances = distances.gather(-1, place)
    if allowed is None:
        return found, distances
    last = pairs - 1 - allowed.flip(1).to(torch.uint8).argmax(1)  # of NaN nothing is nearest, but padding is no key
    none = torch.arange(topk, device=keys.device) >= allowed.sum(1)[codebook][..., None]
    found = found.minimum(last[codebook][..., None]).masked_fill_(none, -1)
    return found, distances.masked_fill_(none, torch.inf)


def _least_scores(queries: Tensor, keys: Tensor, allowed: Tensor | None, keys_at_once: int) -> tuple[Tensor, Tensor]:
    """Return the least score of every group (codebooks, groups, rows), and by how much rounding may change the order.

    What is within doubt (codebooks, 1, rows) of another may be as near.
    """
    codebooks, pairs, dim_key = keys.shape
    middle = keys.mean(1, keepdim=True)  # far from zero, scores would differ by rounding alone
    factor = (queries - middle).mul_(-2).transpose(1, 2)
    centred = keys - middle
    norms = centred.square().sum(-1, keepdim=True)
    widest = norms.amax(1, keepdim=True)
    if allowed is not None:
        norms.masked_fill_(~allowed[..., None], torch.inf)
    least = keys.new_empty(codebooks, -(-pairs // GROUP), queries.shape[1])
    for start in range(0, pairs, keys_at_once):
        block = slice(start, start + keys_at_once)
        scores = torch.baddbmm(norms[:, block], centred[:, block], factor)
        here = least[:, start // GROUP :]
        whole = scores.shape[1] // GROUP
        grouped = scores[:, : whole * GROUP].reshape(codebooks, whole, GROUP, scores.shape[2])
        here[:, :whole] = grouped.amin(2)
        if scores.shape[1] % GROUP:
            here[:, whole] = scores[:, whole * GROUP :].amin(1)
    # A score has dim_key + 4 roundings of eps / 2, two are compared, and the sums of step 2 are as rounded.
    unit = 2 * (dim_key + 4) * torch.finfo(keys.dtype).eps
    return least, unit * (factor.norm(dim=1, keepdim=True) / 2 + widest.sqrt()).square()


def _candidates(least: Tensor, doubt: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the ``topk + 1`` groups of the least scores (codebooks, rows, topk + 1), ascending.

    And how many may hold one of the nearest keys (codebooks, rows): with more than that, they are not enough.
    """
    order, left = [], least
    for rank in range(topk + 1):
        value, group = left.min(1, keepdim=True)
        order.append(group)
        if rank == topk - 1:
            bound = value + doubt
        if rank < topk:
            left = left.scatter(1, group, torch.inf)
    doubtful = ((least <= bound) & least.isfinite()).sum(1)
    return torch.cat(order, 1).sort(1)[0].transpose(1, 2), doubtful


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Multiply matrices of float32 in float32: doubt is that of its rounding, not of TF32's or bfloat16's."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


# Whether rows are in doubt is read from the device, which a CUDA graph cannot.
@torch.library.custom_op("memzoo::nearest_key", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _as_one_node(
    queries: Tensor, keys: Tensor, allowed: Tensor | None, topk: int, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """Hide the loops from the compiler: their number depends on the sizes."""
    return _find(queries, keys, allowed, topk, chunk_bytes)


@_as_one_node.register_fake
def _(queries: Tensor, keys: Tensor, allowed: Tensor | None, topk: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], topk)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape)
