"""The recurrences by flash-linear-attention's Triton kernels (fla-core), on CUDA.

Its ops differ in the names and the order of their arguments, so all are called by keyword. States are key first, in
float32; gates are in log space and come ready, as here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.ops.backend import is_installed, refuse
from memzoo.layers.ops.precision import no_autocast

LARGEST_KEY = 256
SMALLEST_HEAD = 16
"""Width of keys and values: narrower products do not compile in half precision, nor does odd width train everywhere."""
FORGETS_ALL = -100.0
"""A log decay that leaves nothing in float32; the kernels take differences of sums, which are NaN for -inf."""


def choose_fla(backend: str, q: Tensor, v: Tensor) -> bool:
    """Return whether fla is to be used for these queries and values.

    Its kernels are for half precision: some refuse float32, others compute its products in TF32.

    Raises:
        ValueError: It was asked for and does not apply.
    """
    obstacle = _obstacle(q, v)
    if obstacle and backend == "fla":
        refuse("fla", obstacle)
    return backend != "torch" and not obstacle and is_installed("fla")


def _obstacle(q: Tensor, v: Tensor) -> str:
    if q.device.type != "cuda":
        return f"q is on {q.device}; move the inputs to CUDA"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q has dtype {q.dtype}; cast q, k, v to bfloat16"
    if q.shape[-1] > LARGEST_KEY:
        return f"q has key width {q.shape[-1]}; use at most {LARGEST_KEY}"
    for name, width in (("q has key", q.shape[-1]), ("v has value", v.shape[-1])):
        if width < SMALLEST_HEAD or width % 2:
            return f"{name} width {width}; use an even one of at least {SMALLEST_HEAD}"
    return ""


def recur_by_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence; the arguments are those of ``delta_rule``, heads of q and k repeated, no segment empty."""
    options: dict[str, Any] = {"scale": scale, "initial_state": state.float(), "output_final_state": True}
    if log_decay is not None:
        options["g"] = log_decay.float().clamp_min(FORGETS_ALL)
    if beta is not None:
        options["beta"] = beta.to(q.dtype)
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens.to(q.device, torch.long)
    with no_autocast(q.device):
        y, state = _operation(beta, log_decay)(q=q, k=k, v=v, **options)
    return y.to(v.dtype), state


def _operation(beta: Tensor | None, log_decay: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the op for these gates; imported late, since fla needs Triton."""
    per_channel = log_decay is not None and log_decay.dim() == 4
    if beta is None and per_channel:
        from fla.ops.gla import chunk_gla as operation
    elif beta is None:
        from fla.ops.simple_gla import chunk_simple_gla as operation
    elif per_channel:
        from fla.ops.kda import chunk_kda as operation
    elif log_decay is not None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as operation
    else:
        from fla.ops.delta_rule import chunk_delta_rule as operation
    return operation  # type: ignore[no-any-return]
