"""Causal attention: full or over a sliding window, grouped queries, prefix keys, and a state to continue from.

``torch.nn.functional.scaled_dot_product_attention`` does the work. A sliding window costs O(time * window): queries are
cut into blocks of about a window, and each block meets its own keys and those of the block before.

Keys may have more heads than values. They then come in maps, one behind another, each with a key head for every value
head: map m of the queries attends by map m of the keys to all values, which are kept once. Differential attention has
two. In short, query head i reads key head ``j = i // (heads / key_heads)`` and value head ``j % value_heads``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.attention_cache import append, count_slots, past_slots, take, turn
from memzoo.layers.ops.attention_checks import check_dropout, check_dtypes, check_heads, check_memory, check_queries
from memzoo.layers.ops.backend import check_backend, is_installed, refuse
from memzoo.layers.state import MixerState

BACKENDS = ("torch", "flash_attn")
# Behind a window of 16 tokens, blocks of 16 and 32 take the same time on a CPU, blocks of 64 a third more.
SMALLEST_BLOCK = 32

Prefix = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionState(MixerState):
    """The keys and values that later tokens may look at; slots never written are zero.

    Full attention keeps token ``j`` of a row in slot ``j``, and as many slots as the longest row had tokens. A sliding
    window keeps token ``j`` in slot ``j % window`` of a ring of ``window`` slots.

    Attributes:
        keys: (batch, slots, key_heads, key_dim).
        values: (batch, slots, value_heads, value_dim).
    """

    keys: Tensor
    values: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    prefix: Prefix | None = None,
    state: AttentionState | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    donate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, AttentionState]:
    """Attend from every token to itself and the tokens before it, as far back as the window reaches.

    Args:
        q: Queries. Their heads come in groups of ``heads / key_heads`` neighbours that share a key head.
        k: Keys. Their heads are ``maps * value_heads``, one map behind another; in most layers there is one map.
        v: Values, read by every map.
        window: Keys a query sees, its own among them; None for all.
        prefix: Keys and values that every query sees, without position and outside the window.
        state: What the previous call returned; None starts afresh.
        lengths: Tokens that exist in each row; outputs to their right are arbitrary. None if all exist.
        scale: Factor of the scores, ``key_dim ** -0.5`` by default.
        dropout: Probability with which a key's weight is set to zero for a query; the others grow by
            ``1 / (1 - dropout)``. The state is not touched by it.
        donate: Write into the storage of ``state``, which must not be read afterwards: then a step copies no cache.
            Takes effect where gradients are off.
        backend: ``"torch"``; ``"flash_attn"`` for a fresh call without prefix in half precision on CUDA; ``"auto"``
            takes the latter where it applies, is installed and gains something: windows and ragged rows.

    Shape:
        q: (batch, time, heads, key_dim). k: (batch, time, key_heads, key_dim).
        v: (batch, time, value_heads, value_dim). prefix: as k and v, but (batch or 1, num_prefix, ...).
        lengths: (batch,).
        Returns (batch, time, heads, value_dim) and the state; its ``document`` is handed on as it was.

    Raises:
        ValueError: Shapes, dtypes, window, state or backend do not fit, or ``dropout`` is no probability.
    """
    _check(q, k, v, window, prefix, state, lengths)
    check_dropout("dropout", dropout)
    use_flash = _choose_flash(backend, q, v, window, prefix, state, lengths)
    time = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (_without_padding(x, lengths) for x in (q, k, v))
    end = _remember(k, v, window, state, lengths, donate)
    if use_flash:
        y = _flash(q, k, v, window, lengths, scale, dropout)
    elif state is not None and (window is None or time == 1):
        # The cache holds this call's keys already; nothing in it is out of a query's reach but what comes after it.
        visible = _up_to(state.position, time, end.keys)
        y = _attend(q, end.keys, end.values, visible, prefix, scale, dropout)
    else:
        y = _slide(q, k, v, time if window is None else window, prefix, state, scale, dropout)
    return y, end


def remember(
    k: Tensor,
    v: Tensor,
    *,
    state: AttentionState | None = None,
    lengths: Tensor | None = None,
    donate: bool = False,
) -> AttentionState:
    """Return the state that ``attention`` returns, without attending: for tokens of which no output is wanted.

    Args:
        k: As in ``attention``, without a window, and so the rest.
        v: Values.
        state: What the previous call returned.
        lengths: Tokens that exist in each row.
        donate: Write into the storage of ``state``.

    Raises:
        ValueError: ``lengths`` or ``state`` does not fit.
    """
    check_memory(k, v, None, None, state, lengths)
    return _remember(_without_padding(k, lengths), _without_padding(v, lengths), None, state, lengths, donate)


def shared_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend by queries alone, to keys and values that another layer computed: those of an ``AttentionState``.

    Args:
        q: Queries, of as many heads as in ``attention``.
        keys: Keys of every token so far; maps as in ``attention``.
        values: Values.
        first: Tokens before the first query of each row: query t sees the slots up to ``first + t``. None where the
            queries are of the same tokens as the keys.
        scale: Factor of the scores, ``key_dim ** -0.5`` by default.
        dropout: As in ``attention``.

    Shape:
        q: (rows, time, heads, key_dim). keys: (rows, slots, key_heads, key_dim). values: (rows, slots, value_heads,
        value_dim). first: (rows,). Returns (rows, time, heads, value_dim).

    Raises:
        ValueError: Shapes or dtypes do not fit, or ``dropout`` is no probability.
    """
    check_queries(q)
    check_dropout("dropout", dropout)
    rows, time, heads, key_dim = q.shape
    slots = time if first is None or keys.dim() != 4 else keys.shape[1]
    check_heads("keys", keys, "values", values, (rows, slots, heads, key_dim))
    check_dtypes(q=q, keys=keys, values=values)
    if first is not None and first.shape != (rows,):
        raise ValueError(f"first has shape {tuple(first.shape)}; it must be (rows,) = ({rows},)")
    visible = None if first is None else _up_to(first, time, keys)
    return _attend(q, keys, values, visible, None, key_dim**-0.5 if scale is None else scale, dropout)


def _without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Put zeros to the right of every row's end: what lies there may be NaN, and 0 * NaN would spread it."""
    if lengths is None:
        return x
    outside = torch.arange(x.shape[1], device=x.device)[:, None, None] >= lengths[:, None, None, None]
    return x.masked_fill(outside, 0)


def _remember(
    k: Tensor, v: Tensor, window: int | None, state: AttentionState | None, lengths: Tensor | None, donate: bool
) -> AttentionState:
    """State after a call."""
    batch, time = k.shape[:2]
    old: tuple[Tensor | None, Tensor | None] = (None, None)
    if state is None:
        before = document = torch.zeros(batch, dtype=torch.long, device=k.device)
    else:
        before, document = state.position, state.document
        old = state.keys.to(k.dtype), state.values.to(v.dtype)
    after = before + (time if lengths is None else lengths)
    if window is None:
        slots = count_slots(0 if state is None else state.keys.shape[1], time, after, lengths)
        keys, values = (append(cache, x, before, slots, donate) for cache, x in zip(old, (k, v), strict=True))
    else:
        keys, values = (turn(ring, x, window, before, lengths, donate) for ring, x in zip(old, (k, v), strict=True))
    return AttentionState(after, document, keys, values)


def _up_to(first: Tensor, time: int, keys: Tensor) -> Tensor:
    """(rows, 1, time, slots) bool: the slots up to each query's own, ``first + t``."""
    latest = first[:, None] + torch.arange(time, device=keys.device)
    return torch.arange(keys.shape[1], device=keys.device) <= latest[:, None, :, None]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    prefix: Prefix | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Softmax attention; ``visible`` broadcasts to (batch, 1, queries, keys), None is causal."""
    time, maps = q.shape[1], k.shape[2] // v.shape[2]
    if prefix is not None:
        if visible is None:
            visible = _band(time, 0, time, q.device)
        visible = F.pad(visible, (prefix[0].shape[1], 0), value=True)
        k, v = (
            torch.cat((p.to(x.dtype).repeat_interleave(x.shape[0] // max(p.shape[0], 1), 0), x), dim=1)
            for p, x in zip(prefix, (k, v), strict=True)
        )
    # Flash kernels, that of the CPU among them, want values as wide as keys. Measured there, for twice the width: two
    # reads of halves take a quarter of the time of the general way over 2048 queries, and a third in a step over 16384.
    width, value_dim = q.shape[-1], v.shape[-1]
    # Two reads would drop other weights from either half.
    halve = width < value_dim <= 2 * width and (visible is None or q.device.type == "cpu") and not dropout
    pieces = v.split(width, dim=-1) if halve else (v,)
    if maps == len(pieces) == 1:
        return _read(q, k, v, visible, scale, dropout)
    pairs = zip(q.chunk(maps, dim=2), k.chunk(maps, dim=2), strict=True)
    reads = [[_read(queries, keys, piece, visible, scale, dropout) for piece in pieces] for queries, keys in pairs]
    return torch.cat([torch.cat(row, dim=-1) for row in reads], dim=2)


def _read(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Softmax attention of one map."""
    time, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if visible is None:
        grouped = heads != kv_heads
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=grouped)
    elif heads == kv_heads:
        y = F.scaled_dot_product_attention(q, k, v, visible, dropout, scale=scale)
    else:
        # A group's queries become rows of one head: no key is repeated, and no kernel must know groups and masks both.
        # Measured on a CPU: a step over 4096 keys in groups of 4 takes a third of the time of enable_gqa.
        group = heads // kv_heads
        rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
        visible = visible.repeat(*([1] * (visible.dim() - 2)), group, 1)
        y = F.scaled_dot_product_attention(rows, k, v, visible, dropout, scale=scale)
        y = y.unflatten(2, (group, time)).flatten(1, 2)
    return y.transpose(1, 2)


def _slide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    prefix: Prefix | None,
    state: AttentionState | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Sliding-window attention in blocks: the first one meets the state, every other its left neighbour."""
    batch, time = q.shape[:2]
    block = max(window, SMALLEST_BLOCK)
    first = min(time, block)
    keys, values = k[:, :first], v[:, :first]
    visible = None
    if state is not None:
        past, exists = past_slots(state.keys.shape[1], state.position)
        keys, values = (
            torch.cat((take(ring, past).to(x.dtype), x), dim=1)
            for ring, x in ((state.keys, keys), (state.values, values))
        )
        visible = _band(first, window - 1, window, q.device) & F.pad(exists, (0, first), value=True)[:, None, None]
    elif first > window:
        visible = _band(first, 0, window, q.device)
    y = _attend(q[:, :first], keys, values, visible, prefix, scale, dropout)
    if time == first:
        return y

    count = -(-(time - first) // block)  # blocks after the first, the last one padded
    fill = first + count * block - time
    queries = F.pad(q[:, first:], (0, 0, 0, 0, 0, fill)).unflatten(1, (count, block)).flatten(0, 1)
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (count + 1, block)) for x in (k, v))
    keys, values = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (keys, values))
    rest = _attend(queries, keys, values, _band(block, block, window, q.device), prefix, scale, dropout)
    rest = rest.unflatten(0, (batch, count)).flatten(1, 2)
    return torch.cat((y, rest[:, : time - first]), dim=1)


def _band(queries: int, past: int, window: int, device: torch.device) -> Tensor:
    """(queries, past + queries) bool: key ``past + i`` belongs to query ``i``, which sees the last ``window`` keys."""
    distance = torch.arange(past, past + queries, device=device)[:, None] - torch.arange(past + queries, device=device)
    return (distance >= 0) & (distance < window)


def _choose_flash(
    backend: str,
    q: Tensor,
    v: Tensor,
    window: int | None,
    prefix: Prefix | None,
    state: AttentionState | None,
    lengths: Tensor | None,
) -> bool:
    """Return whether flash-attn is to be used.

    Raises:
        ValueError: It was asked for and cannot be.
    """
    # Full attention of equal rows reaches a flash kernel through PyTorch itself; ragged packing does not compile.
    gains = (window is not None or lengths is not None) and not torch.compiler.is_compiling()
    if backend == "torch" or (backend == "auto" and not (gains and _flash_runs_on(q.device))):
        return False
    check_backend(backend, BACKENDS)
    obstacles = {
        f"q is on {q.device.type}; move it to a CUDA device": not q.is_cuda,
        f"q has dtype {q.dtype}; cast to float16 or bfloat16": q.dtype not in (torch.float16, torch.bfloat16),
        f"key_dim={q.shape[-1]} and value_dim={v.shape[-1]}; it needs equal ones up to 256": (
            q.shape[-1] != v.shape[-1] or q.shape[-1] > 256
        ),
        "prefix is given; pass prefix=None": prefix is not None,
        "state is given; pass state=None": state is not None,
    }
    obstacle = next((words for words, holds in obstacles.items() if holds), None)
    if obstacle is not None and backend != "auto":
        refuse("flash_attn", obstacle)
    return obstacle is None


def _flash_runs_on(device: torch.device) -> bool:
    """Whether flash-attn is installed and the device is of a generation it runs on, Ampere or later."""
    return device.type == "cuda" and is_installed("flash_attn") and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Fresh attention by flash-attn; ragged rows are packed end to end, so that padding costs nothing."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if k.shape[2] > v.shape[2]:  # a map a group of heads: the kernel wants a value head for every key head
        v = v.repeat(1, 1, k.shape[2] // v.shape[2], 1)
    reach = (-1, -1) if window is None else (window - 1, 0)  # keys to the left and right, the query's own not counted
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True, "window_size": reach}
    if lengths is None:
        y: Tensor = flash_attn_func(q, k, v, **options)
        return y
    time = q.shape[1]
    inside = torch.arange(time, device=q.device) < lengths[:, None]
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    queries, keys, values = q[inside], k[inside], v[inside]
    if not queries.shape[0]:
        return torch.zeros_like(q)
    packed = flash_attn_varlen_func(queries, keys, values, ends, ends, time, time, **options)
    return torch.zeros_like(q).masked_scatter(inside[..., None, None], packed)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: Prefix | None,
    state: AttentionState | None,
    lengths: Tensor | None,
) -> None:
    check_window(window)
    check_queries(q)
    check_heads("k", k, "v", v, tuple(q.shape))
    check_dtypes(q=q, k=k, v=v)
    check_memory(k, v, window, prefix, state, lengths)


def check_window(window: int | None) -> None:
    """Require a window of at least one key, or None.

    Raises:
        ValueError: It keeps no keys.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(
            f"window={window!r} keeps no keys; it counts the token itself, so use window >= 1 "
            f"(window=None for full attention)"
        )
