"""The gated delta rule, one token at a time. Slow, and the definition of what is right.

A matrix memory S that corrects what it holds under a key instead of adding to it. For every head of every sequence,
with a its log decay, beta its step size and row vectors:

    S <- diag(exp(a)) S                  forget; a is one number, or one a key channel
    S <- S + k^T beta (v - k S)          replace the share beta of what the key recalls by the value
    y  = scale q S                       read, after the write

DeltaNet has no decay (arXiv 2406.06484), Gated DeltaNet a number a token (2412.06464), Kimi Delta Attention a number a
token and key channel (2510.26692).
"""

from typing import Literal, overload

from torch import Tensor

from memzoo.layers.reference.linear_recurrence import scan


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_residual: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_residual: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_residual: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Teach a memory that fades to recall every value by its key, and read it after each lesson.

    Args:
        q: What is asked.
        k: What is stored under; of unit length or shorter, or the memory may diverge.
        v: What is stored.
        beta: Share of the error that is corrected, in [0, 1]; up to 2 for negative eigenvalues.
        log_decay: a <= 0; by default nothing is forgotten.
        state: S before the first token; zeros by default.
        chunk_size: Of the op; without effect here.
        scale: Of the queries; ``K ** -0.5`` by default.
        lengths: Tokens that exist in each row, all by default; outputs past them are zero.
        cu_seqlens: Where each of the N sequences in the one row begins, and where the last one ends.
        backend: Of the op; without effect here.
        return_residual: Return a third thing, the error v - k S that every token found and its write took a share of;
            zero past ``lengths``, detached, in the dtype of the state.

    Shape:
        q, k: (batch, time, heads, K). v: (batch, time, value_heads, V); value head h uses query and key head
        h // (value_heads // heads). beta: (batch, time, value_heads). log_decay: (batch, time, value_heads) or
        (batch, time, value_heads, K). state: (batch or N, value_heads, K, V). lengths: (batch,). cu_seqlens: (N + 1,).
        Returns y (batch, time, value_heads, V) and the state after the last token of every row or sequence, with
        ``return_residual`` also the errors, shaped like y.
    """

    def correct(S: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        S = a.exp() * S
        error = v - k @ S
        return S + k.mT @ (beta * error), error

    def correct_and_read(S: Tensor, a: Tensor, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        S, _ = correct(S, a, q, *others)
        return S, q @ S

    y, end = scan(correct_and_read, q, k, v, beta, log_decay, state, scale, lengths, cu_seqlens)
    if not return_residual:
        return y, end
    errors, _ = scan(correct, q, k, v.to(end.dtype), beta, log_decay, state, scale, lengths, cu_seqlens)
    return y, end, errors.detach()
