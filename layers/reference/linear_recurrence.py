"""The linear recurrence, one token at a time. Slow, and the definition of what is right.

A matrix memory S that fades and is added to. For every head of every sequence, with a its log decay and row vectors:

    S <- diag(exp(a)) S     forget; a is one number, or one a key channel
    S <- S + k^T v          write
    y  = scale q S          read, after the write

Linear attention has no decay (arXiv 2006.16236), RetNet one constant a head (2307.08621), Mamba-2's SSD a number a
token (2405.21060), Gated Linear Attention a number a token and key channel (2312.06635).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from memzoo.layers.ops.memory_arguments import working_dtype


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write every value under its key into a memory that fades, and read it after each write.

    Args:
        q: What is asked.
        k: What is stored under.
        v: What is stored.
        log_decay: a <= 0; by default nothing is forgotten.
        state: S before the first token; zeros by default.
        chunk_size: Of the op; without effect here.
        scale: Of the queries; ``K ** -0.5`` by default.
        lengths: Tokens that exist in each row, all by default; outputs past them are zero.
        cu_seqlens: Where each of the N sequences in the one row begins, and where the last one ends.
        backend: Of the op; without effect here.

    Shape:
        q, k: (batch, time, heads, K). v: (batch, time, value_heads, V); value head h uses query and key head
        h // (value_heads // heads). log_decay: (batch, time, value_heads) or (batch, time, value_heads, K).
        state: (batch or N, value_heads, K, V). lengths: (batch,). cu_seqlens: (N + 1,).
        Returns y (batch, time, value_heads, V) and the state after the last token of every row or sequence.
    """

    def step(S: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        S = a.exp() * S
        S = S + k.mT @ v
        return S, q @ S

    return scan(step, q, k, v, None, log_decay, state, scale, lengths, cu_seqlens)


def scan(
    step: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Take ``S, y = step(S, a, q, k, v[, beta])`` token after token, through every sequence from its own state.

    A step has all value heads as its batch. S is (heads, K, V), a a column (heads, K or 1, 1), the others are rows:
    q and k (heads, 1, K), v (heads, 1, V), beta (heads, 1, 1).
    """
    batch, time, value_heads, _ = v.shape
    dtype = working_dtype(*(x for x in (q, k, v, beta, log_decay, state) if x is not None))
    q, k = (x.to(dtype).repeat_interleave(value_heads // x.shape[2], dim=2) for x in (q, k))
    a = torch.zeros_like(v[..., 0]) if log_decay is None else log_decay
    a = a[..., None, None] if a.dim() == 3 else a[..., None]
    scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    inputs = [a, *(x[..., None, :] for x in (scaled, k, v))] + ([] if beta is None else [beta[..., None, None]])

    if cu_seqlens is not None:
        sequences = [(0, slice(*span)) for span in pairwise(cu_seqlens.tolist())]
    else:
        sequences = [
            (row, slice(end)) for row, end in enumerate([time] * batch if lengths is None else lengths.tolist())
        ]
    if state is None:
        state = torch.zeros(len(sequences), value_heads, k.shape[-1], v.shape[-1], device=v.device)

    outputs: list[list[Tensor]] = [[] for _ in range(batch)]
    states = []
    for (row, tokens), S in zip(sequences, state.to(dtype), strict=True):
        for vectors in zip(*(x[row, tokens].to(dtype).unbind() for x in inputs), strict=True):
            S, y = step(S, *vectors)
            outputs[row].append(y[:, 0].to(v.dtype))
        states.append(S)
    nothing = v.new_zeros(v.shape[2:])
    rows = [torch.stack(row + [nothing] * (time - len(row))) for row in outputs]
    return torch.stack(rows), torch.stack(states)
