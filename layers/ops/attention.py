"""Causal attention: full or over a sliding window, grouped queries, prefix keys, and a state to continue from.

``torch.nn.functional.scaled_dot_product_attention`` does the work. A sliding window costs O(time * window): queries are
cut into blocks of about a window, and each block meets its own keys and those of the block before.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.ops.backend import check_backend, is_installed
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
        keys: (batch, slots, kv_heads, key_dim).
        values: (batch, slots, kv_heads, value_dim).
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
    donate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, AttentionState]:
    """Attend from every token to itself and the tokens before it, as far back as the window reaches.

    Args:
        q: Queries. Their heads come in groups of ``heads / kv_heads`` neighbours that share a key head.
        k: Keys.
        v: Values.
        window: Keys a query sees, its own among them; None for all.
        prefix: Keys and values that every query sees, without position and outside the window.
        state: What the previous call returned; None starts afresh.
        lengths: Tokens that exist in each row; outputs to their right are arbitrary. None if all exist.
        scale: Factor of the scores, ``key_dim ** -0.5`` by default.
        donate: Write into the storage of ``state``, which must not be read afterwards: then a step copies no cache.
            Takes effect where gradients are off.
        backend: ``"torch"``; ``"flash_attn"`` for a fresh call without prefix in half precision on CUDA; ``"auto"``
            takes the latter where it applies, is installed and gains something: windows and ragged rows.

    Shape:
        q: (batch, time, heads, key_dim). k: (batch, time, kv_heads, key_dim). v: (batch, time, kv_heads, value_dim).
        prefix: (batch or 1, num_prefix, kv_heads, key_dim or value_dim). lengths: (batch,).
        Returns (batch, time, heads, value_dim) and the state; its ``document`` is handed on as it was.

    Raises:
        ValueError: Shapes, dtypes, window, state or backend do not fit.
    """
    _check(q, k, v, window, prefix, state, lengths)
    use_flash = _choose_flash(backend, q, v, window, prefix, state, lengths)
    batch, time, _, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    if lengths is not None:  # what lies to the right of a row's end may be NaN, and 0 * NaN would spread it
        outside = torch.arange(time, device=q.device)[:, None, None] >= lengths[:, None, None, None]
        q, k, v = (x.masked_fill(outside, 0) for x in (q, k, v))
    if state is None:
        before = document = torch.zeros(batch, dtype=torch.long, device=q.device)
    else:
        before, document = state.position, state.document
        state = replace(state, keys=state.keys.to(k.dtype), values=state.values.to(v.dtype))
    after = before + (time if lengths is None else lengths)
    old_keys, old_values = (None, None) if state is None else (state.keys, state.values)
    if window is None:
        slots = _count_slots(0 if state is None else state.keys.shape[1], time, after, lengths)
        keys = _append(old_keys, k, before, slots, donate)
        values = _append(old_values, v, before, slots, donate)
    else:
        keys = _turn(old_keys, k, window, before, lengths, donate)
        values = _turn(old_values, v, window, before, lengths, donate)

    if use_flash:
        y = _flash(q, k, v, window, lengths, scale)
    elif state is not None and (window is None or time == 1):
        # The cache holds this call's keys already; nothing in it is out of a query's reach but what comes after it.
        latest = before[:, None] + torch.arange(time, device=q.device)
        visible = torch.arange(keys.shape[1], device=q.device) <= latest[:, None, :, None]
        y = _attend(q, keys, values, visible, prefix, scale)
    else:
        y = _slide(q, k, v, time if window is None else window, prefix, state, scale)
    return y, AttentionState(after, document, keys, values)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, prefix: Prefix | None, scale: float) -> Tensor:
    """Softmax attention; ``visible`` broadcasts to (batch, 1, queries, keys), None is causal."""
    time, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if prefix is not None:
        if visible is None:
            visible = _band(time, 0, time, q.device)
        visible = F.pad(visible, (prefix[0].shape[1], 0), value=True)
        k, v = (
            torch.cat((p.to(x.dtype).repeat_interleave(x.shape[0] // p.shape[0], 0), x), dim=1)
            for p, x in zip(prefix, (k, v), strict=True)
        )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if visible is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
    elif heads == kv_heads:
        y = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
    else:
        # A group's queries become rows of one head: no key is repeated, and no kernel must know groups and masks both.
        # Measured on a CPU: a step over 4096 keys in groups of 4 takes a third of the time of enable_gqa.
        group = heads // kv_heads
        rows = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
        visible = visible.repeat(*([1] * (visible.dim() - 2)), group, 1)
        y = F.scaled_dot_product_attention(rows, k, v, visible, scale=scale).unflatten(2, (group, time)).flatten(1, 2)
    return y.transpose(1, 2)


def _slide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    prefix: Prefix | None,
    state: AttentionState | None,
    scale: float,
) -> Tensor:
    """Sliding-window attention in blocks: the first one meets the state, every other its left neighbour."""
    batch, time = q.shape[:2]
    block = max(window, SMALLEST_BLOCK)
    first = min(time, block)
    keys, values = k[:, :first], v[:, :first]
    visible = None
    if state is not None:
        past, exists = _past(state)
        keys, values = (
            torch.cat((_take(ring, past), x), dim=1) for ring, x in ((state.keys, keys), (state.values, values))
        )
        visible = _band(first, window - 1, window, q.device) & F.pad(exists, (0, first), value=True)[:, None, None]
    elif first > window:
        visible = _band(first, 0, window, q.device)
    y = _attend(q[:, :first], keys, values, visible, prefix, scale)
    if time == first:
        return y

    count = -(-(time - first) // block)  # blocks after the first, the last one padded
    fill = first + count * block - time
    queries = F.pad(q[:, first:], (0, 0, 0, 0, 0, fill)).unflatten(1, (count, block)).flatten(0, 1)
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (count + 1, block)) for x in (k, v))
    keys, values = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (keys, values))
    rest = _attend(queries, keys, values, _band(block, block, window, q.device), prefix, scale)
    rest = rest.unflatten(0, (batch, count)).flatten(1, 2)
    return torch.cat((y, rest[:, : time - first]), dim=1)


def _band(queries: int, past: int, window: int, device: torch.device) -> Tensor:
    """(queries, past + queries) bool: key ``past + i`` belongs to query ``i``, which sees the last ``window`` keys."""
    distance = torch.arange(past, past + queries, device=device)[:, None] - torch.arange(past + queries, device=device)
    return (distance >= 0) & (distance < window)


def _past(state: AttentionState) -> tuple[Tensor, Tensor]:
    """Ring slots of the ``window - 1`` tokens before the next one, oldest first, and which of them exist."""
    window = state.keys.shape[1]
    token = state.position[:, None] + torch.arange(1 - window, 0, device=state.position.device)
    return token % window, token >= 0


def _turn(
    ring: Tensor | None, new: Tensor, window: int, before: Tensor, lengths: Tensor | None, donate: bool
) -> Tensor:
    """Ring after the call: slot ``s`` holds the latest token ``j`` with ``j % window == s``, if any."""
    time = new.shape[1]
    if ring is not None and time == 1 and lengths is None:  # a step of every row: one slot changes
        ring = ring if donate and _may_write(ring) else ring.clone()
        return ring.scatter_(1, (before % window)[:, None, None, None].expand_as(new), new)
    latest = (before + (time if lengths is None else lengths) - 1)[:, None]
    token = latest - (latest - torch.arange(window, device=new.device)) % window
    index = token - before[:, None]  # into `new`; what is negative was absorbed before
    taken, absorbed = _take(new, index.clamp_min(0)), (index < 0)[..., None, None]
    return taken.masked_fill(absorbed, 0) if ring is None else torch.where(absorbed, ring, taken)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take slots (batch, count) of every row. Whole slots: five times as fast as ``take_along_dim`` on a CPU."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _append(cache: Tensor | None, new: Tensor, before: Tensor, slots: int, donate: bool) -> Tensor:
    """Cache after the call: token ``before + t`` of every row in the slot of that number."""
    time = new.shape[1]
    if cache is None:
        # Of a view into longer rows a copy: the room behind its rows is somebody else's, and `_extend` would take it.
        own = new.clone(memory_format=torch.contiguous_format) if new.stride(0) > time * new.stride(1) else new
        return own[:, :slots]
    if donate and _may_write(cache):
        cache = _extend(cache, cache.shape[1] + time)
    else:
        cache = torch.cat((cache, torch.zeros_like(new)), dim=1)
    index = before[:, None] + torch.arange(time, device=new.device)
    return cache.scatter_(1, index[..., None, None].expand_as(new), new)[:, :slots]


def _count_slots(old: int, time: int, after: Tensor, lengths: Tensor | None) -> int:
    """Slots of a cache after the call, those of its longest row (read from the device only where rows are ragged)."""
    if lengths is None or torch.compiler.is_compiling():
        return old + time
    return max(old, int(after.max()))


def _extend(cache: Tensor, slots: int) -> Tensor:
    """Lengthen the rows of a cache within its storage, or, if that is full, within a copy with room for as many again.

    The shape of a cache says what is used, its strides what is reserved: that costs no wait for the device.
    """
    batch, used, heads, dim = cache.shape
    row, step = cache.stride(0), heads * dim
    end = cache.storage_offset() + (batch - 1) * row + slots * step
    has_room = slots * step <= row and end * cache.element_size() <= cache.untyped_storage().nbytes()
    if not has_room or cache.stride()[1:] != (step, dim, 1):
        reserved = cache.new_zeros(batch, max(2 * used, slots), heads, dim)
        reserved[:, :used] = cache
        cache = reserved
    return cache.as_strided((batch, slots, heads, dim), cache.stride())


def _may_write(cache: Tensor) -> bool:
    """Return whether a donated cache can be written in place; autograd, inference tensors and compilers forbid it."""
    frozen = cache.is_inference() and not torch.is_inference_mode_enabled()
    return not (torch.is_grad_enabled() or frozen or torch.compiler.is_compiling())


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
        raise ValueError(f"backend='flash_attn' does not apply: {obstacle}, or use backend='auto'")
    return obstacle is None


def _flash_runs_on(device: torch.device) -> bool:
    """Whether flash-attn is installed and the device is of a generation it runs on, Ampere or later."""
    return device.type == "cuda" and is_installed("flash_attn") and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths: Tensor | None, scale: float) -> Tensor:
    """Fresh attention by flash-attn; ragged rows are packed end to end, so that padding costs nothing."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    reach = (-1, -1) if window is None else (window - 1, 0)  # keys to the left and right, the query's own not counted
    if lengths is None:
        y: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
        return y
    time = q.shape[1]
    inside = torch.arange(time, device=q.device) < lengths[:, None]
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    queries, keys, values = q[inside], k[inside], v[inside]
    if not queries.shape[0]:
        return torch.zeros_like(q)
    packed = flash_attn_varlen_func(
        queries, keys, values, ends, ends, time, time, softmax_scale=scale, causal=True, window_size=reach
    )
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
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, time, heads, key_dim) with time >= 1")
    batch, time, heads, key_dim = q.shape
    grouped = k.dim() == 4 and k.shape[2] > 0 and heads % k.shape[2] == 0
    if not grouped or (*k.shape[:2], k.shape[3]) != (batch, time, key_dim):
        raise ValueError(
            f"k has shape {tuple(k.shape)}; it must be (batch, time, kv_heads, key_dim) = "
            f"({batch}, {time}, a divisor of {heads}, {key_dim}) to match q"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be (*{tuple(k.shape[:3])}, value_dim) to match k")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be (batch,) = ({batch},)")
    for name, given, x in zip(("keys", "values"), prefix or (), (k, v), strict=False):
        if given.dim() != 4 or given.shape[0] not in (1, batch) or given.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"prefix {name} have shape {tuple(given.shape)}; they must be "
                f"(1 or {batch}, num_prefix, {x.shape[2]}, {x.shape[3]})"
            )
    for name, given, x in (("keys", state.keys, k), ("values", state.values, v)) if state is not None else ():
        slots = given.shape[1] if window is None else window
        expected = (batch, slots, *x.shape[2:])
        if given.shape != expected:
            raise ValueError(
                f"state {name} have shape {tuple(given.shape)}; they must be {expected}: "
                f"pass the state that a call with the same heads and window={window} returned, or None to start afresh"
            )


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
