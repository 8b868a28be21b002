"""State-space duality: the recurrence of Mamba-2, in chunks of matrix products."""

from torch import Tensor

from memzoo.layers.errors import check_positive
from memzoo.layers.ops.backend import check_backend
from memzoo.layers.ops.linear_recurrence import linear_recurrence
from memzoo.layers.ops.mamba_kernels import choose_dual, dual_by_kernel
from memzoo.layers.ops.memory_arguments import blank_behind, working_dtype
from memzoo.layers.ops.precision import no_autocast
from memzoo.layers.ops.recurrence_fla import choose_fla
from memzoo.layers.ops.segment_grid import check_ragged

BACKENDS = ("torch", "fla", "mamba_ssm")


def state_space_dual(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Let every head's matrix decay by one rate, add the outer product of B and dt x to it, and read it with C.

    Head by head, with row vectors and a step dt a token:

        h_t = exp(dt_t A) h_{t-1} + B_t^T (dt_t x_t),    y_t = C_t h_t + D x_t

    It is linear attention with C for queries, B for keys, dt x for values and a decay of exp(dt A), and is computed as
    such, by ``linear_recurrence``.

    Args:
        x: Inputs.
        dt: Steps, >= 0; a token with dt = 0 leaves the state as it is.
        A: Rate, <= 0, of what a step forgets, one a head.
        B: What a token writes with; head h has group ``h // (heads / groups)``.
        C: What a token reads with, likewise.
        D: Weight of the input itself, one a head; None for none.
        state: The state before the first token; zeros by default. Not changed.
        chunk_size: Tokens computed in parallel, rounded up to a power of two. Changes speed only.
        lengths: Tokens that exist in each row, from the left; all by default. Outputs past them are zero.
        cu_seqlens: Where segments begin that follow one another in a single row, and where the last one ends:
            0 = first <= ... <= last = time. Each has a state of its own; an empty one keeps it.
        backend: "torch", "fla", "mamba_ssm" or "auto", which takes mamba-ssm, else fla, where they are installed and
            the inputs are on CUDA and in half precision: the former without ``lengths`` and ``cu_seqlens``, outside of
            ``torch.compile``. One token takes no kernel. Asked for by name, mamba-ssm takes float32 too, whose
            products Triton may round to TF32.

    Shape:
        x, y: (batch, time, heads, P). dt: (batch, time, heads). A, D: (heads,). B, C: (batch, time, groups, N). state:
        (rows, heads, N, P), a row for each of the batch or each segment. lengths: (batch,). cu_seqlens: (segments +
        1,). Returns y, in the dtype of x, and the state after the last token.

    Raises:
        ValueError: A shape or dtype does not fit, ``lengths`` and ``cu_seqlens`` are both given, or the backend is
            unknown, missing or does not apply.

    Reference:
        Dao and Gu, arXiv 2405.21060, section 6. Loop twin: ``memzoo.layers.reference.state_space_dual``.
    """
    _check(x, dt, A, B, C, D, state, chunk_size, lengths, cu_seqlens, backend)
    dtype = working_dtype(x, dt, A, B, C, *(t for t in (D, state) if t is not None))
    with no_autocast(x.device):
        inputs, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
        whole = lengths is None and cu_seqlens is None
        if x.shape[1] > 1 and choose_dual(backend, x, whole=whole):
            y, state = dual_by_kernel(x, dt, A, B, C, None if state is None else state.to(dtype), chunk_size)
        else:
            inputs, dt = blank_behind(lengths, inputs, dt)
            products = x.dtype if choose_fla(backend, C, x) else dtype  # fla's kernels take half precision alone
            y, state = linear_recurrence(
                C.to(products),
                B.to(products),
                (inputs * dt[..., None]).to(products),
                dt * A,
                state,
                chunk_size=chunk_size,
                scale=1.0,
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                backend="torch" if backend == "mamba_ssm" else backend,
            )
        if D is not None:
            y = y + D.to(dtype)[:, None] * inputs
    return y.to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> None:
    if x.dim() != 4 or not all(x.shape) or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating point, (batch, time, heads, P), "
            f"time >= 1 and no axis empty"
        )
    batch, time, heads, width = x.shape
    if dt.shape != x.shape[:3] or not dt.is_floating_point():
        raise ValueError(
            f"dt has shape {tuple(dt.shape)} and dtype {dt.dtype}; it must be (batch, time, heads) = "
            f"{tuple(x.shape[:3])}"
        )
    for name, part in (("A", A), ("D", D)):
        if part is not None and (part.shape != (heads,) or not part.is_floating_point()):
            raise ValueError(
                f"{name} has shape {tuple(part.shape)} and dtype {part.dtype}; it must be (heads,) = ({heads},)"
            )
    check_ragged("x", x, lengths, cu_seqlens)
    grouped = B.dim() == 4 and B.shape[:2] == x.shape[:2] and all(B.shape) and heads % B.shape[2] == 0
    if not grouped or not B.is_floating_point():
        raise ValueError(
            f"B has shape {tuple(B.shape)} and dtype {B.dtype}; it must be floating point, (batch, time, groups, N) = "
            f"({batch}, {time}, a divisor of {heads}, any)"
        )
    if C.shape != B.shape or not C.is_floating_point():
        raise ValueError(f"C has shape {tuple(C.shape)} and dtype {C.dtype}; it must match B, {tuple(B.shape)}")
    expected = (batch if cu_seqlens is None else len(cu_seqlens) - 1, heads, B.shape[3], width)
    if state is not None and (state.shape != expected or not state.is_floating_point()):
        raise ValueError(
            f"state has shape {tuple(state.shape)} and dtype {state.dtype}; it must be floating point, (rows, heads, "
            f"N, P) = {expected}: pass what the previous call returned, or None"
        )
    check_positive("chunk_size", chunk_size)
    check_backend(backend, BACKENDS)
