"""The gated delta rule, one token at a time. Slow, and the definition of what is right.

A matrix memory S that corrects what it holds under a key instead of adding to it. For every head of every sequence,
with a its log decay, beta its step size and row vectors:

    S <- diag(exp(a)) S                  forget; a is one number, or one a key channel
    S <- S + k^T beta (v - k S)          replace the share beta of what the key recalls by the value
    y  = scale q S                       read, after the write

DeltaNet has no decay (arXiv 2406.06484), Gated DeltaNet a number a token (2412.06464), Kimi Delta Attention a number a
token and key channel (2510.26692).
"""

from torch import Tensor

from memzoo.layers.reference.linear_recurrence import scan


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
) -> tuple[Tensor, Tensor]:
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

    Shape:
        q, k: (batch, time, heads, K). v: (batch, time, value_heads, V); value head h uses query and key head
        h // (value_heads // heads). beta: (batch, time, value_heads). log_decay: (batch, time, value_heads) or
        (batch, time, value_heads, K). state: (batch or N, value_heads, K, V). lengths: (batch,). cu_seqlens: (N + 1,).
        Returns y (batch, time, value_heads, V) and the state after the last token of every row or sequence.
    """

    def step(S: Tensor, a: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        S = a.exp() * S
        S = S + k.mT @ (beta * (v - k @ S))
        return S, q @ S

    return scan(step, q, k, v, beta, log_decay, state, scale, lengths, cu_seqlens)
