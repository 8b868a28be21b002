"""Delta rule: a matrix memory in which every token corrects what its key recalls."""

from typing import Literal, overload

from torch import Tensor

from memzoo.layers.ops.recurrence import check_recurrence, recur


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
    """Decay a matrix, move what every token's key recalls towards its value, and read it after each.

    Row by row, with a_t the log decay:

        S' = exp(a_t) S_{t-1},    S_t = S' + k_t^T beta_t (v_t - k_t S'),    y_t = scale q_t S_t

    Without decay this is DeltaNet, with one per head Gated DeltaNet, with one per channel of the key Kimi Delta
    Attention. Keys are taken as they come; they should have unit length (then beta = 1 replaces what a key recalls, and
    beta in [0, 2] is stable). Computed chunk by chunk, in the widest dtype of float32 and the inputs.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        beta: Share of the error that is corrected.
        log_decay: Logarithm of what a step keeps of the memory, <= 0, and -inf where it forgets all; None for keeping
            everything.
        state: The memory before the first token; zeros by default. Not changed.
        chunk_size: Tokens computed in parallel, rounded up to a power of two. Changes speed only.
        scale: Factor of the queries; ``K ** -0.5`` by default.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        cu_seqlens: Where segments begin that follow one another in a single row, and where the last one ends:
            0 = first <= ... <= last = time. Each has a memory of its own; an empty one keeps it.
        backend: "torch", "fla" or "auto", which takes fla where it is installed and the inputs are on CUDA, in half
            precision, K and V even and at least 16, K at most 256.
        return_residual: Return a third thing, the error v_t - k_t S' of every token, whose share beta_t is written.
            Zero past ``lengths``; detached, so no gradient flows through it; in the dtype of the state. The recurrence
            has it at hand, but fla's kernels keep theirs to themselves: "auto" takes torch.

    Shape:
        q, k: (batch, time, heads, K). v, y: (batch, time, value heads, V); value heads are a multiple of heads, and
        neighbours share a key. beta: (batch, time, value heads). log_decay: the same, or (batch, time, value heads, K).
        state: (rows, value heads, K, V), a row for each of the batch or each segment. lengths: (batch,).
        cu_seqlens: (segments + 1,). Returns y and the state after the last token, with ``return_residual`` also the
        errors, shaped like y.

    Raises:
        ValueError: A shape or dtype does not fit, ``lengths`` and ``cu_seqlens`` are both given, or the backend is
            unknown, missing or without errors to return.

    Reference:
        arXiv 2406.06484 (DeltaNet and the parallel form), 2412.06464 (Gated DeltaNet), 2510.26692 (Kimi Delta
        Attention). Loop twin: ``memzoo.layers.reference.delta_rule``.
    """
    check_recurrence(q, k, v, beta, log_decay, state, chunk_size, lengths, cu_seqlens, backend)
    if not return_residual:
        return recur(q, k, v, beta, log_decay, state, chunk_size, scale, lengths, cu_seqlens, backend)
    if backend == "fla":
        raise ValueError(
            "return_residual=True asks for errors that the kernels of backend='fla' keep to themselves; use "
            "backend='torch' or 'auto'"
        )
    errors: list[Tensor] = []
    y, end = recur(q, k, v, beta, log_decay, state, chunk_size, scale, lengths, cu_seqlens, "torch", errors)
    return y, end, errors[0]
