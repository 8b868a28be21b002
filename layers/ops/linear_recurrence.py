"""Linear recurrence: a matrix memory that every token adds to, and that decays."""

from torch import Tensor

from memzoo.layers.ops.recurrence import check_recurrence, recur


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
    """Decay a matrix, add every token's outer product of key and value, and read it after each.

    Row by row, with a_t the log decay:

        S_t = exp(a_t) S_{t-1} + k_t^T v_t,    y_t = scale q_t S_t

    Without decay this is linear attention, with one per head RetNet and Mamba-2 (SSD), with one per channel of the key
    gated linear attention. Computed chunk by chunk, in the widest dtype of float32 and the inputs.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
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

    Shape:
        q, k: (batch, time, heads, K). v, y: (batch, time, value heads, V); value heads are a multiple of heads, and
        neighbours share a key. log_decay: (batch, time, value heads) or (batch, time, value heads, K). state: (rows,
        value heads, K, V), a row for each of the batch or each segment. lengths: (batch,). cu_seqlens: (segments + 1,).
        Returns y and the state after the last token.

    Raises:
        ValueError: A shape or dtype does not fit, ``lengths`` and ``cu_seqlens`` are both given, or the backend is
            unknown or missing.

    Reference:
        arXiv 2006.16236 (linear attention), 2307.08621 (RetNet), 2405.21060 (SSD), 2312.06635 (gated linear
        attention). Loop twin: ``memzoo.layers.reference.linear_recurrence``.
    """
    check_recurrence(q, k, v, None, log_decay, state, chunk_size, lengths, cu_seqlens, backend)
    return recur(q, k, v, None, log_decay, state, chunk_size, scale, lengths, cu_seqlens, backend)
