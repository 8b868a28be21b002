"""What attention requires of its arguments: every message names the argument, its value and the remedy."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from memzoo.layers.ops.attention import AttentionState, Prefix


def check_dropout(name: str, value: float) -> None:
    """Require a probability of dropping that leaves something.

    Raises:
        ValueError: It is outside [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not a probability in [0, 1); use 0 to drop nothing")


def check_queries(q: Tensor) -> None:
    """Require queries of four axes and at least one token.

    Raises:
        ValueError: They have others.
    """
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, time, heads, key_dim) with time >= 1")


def check_heads(key_name: str, k: Tensor, value_name: str, v: Tensor, expected: tuple[int, ...]) -> None:
    """Check keys against the (batch, time, heads, key_dim) of queries, and values against the keys.

    Raises:
        ValueError: They do not fit.
    """
    batch, time, heads, key_dim = expected
    grouped = k.dim() == 4 and k.shape[2] > 0 and heads % k.shape[2] == 0
    if not grouped or (*k.shape[:2], k.shape[3]) != (batch, time, key_dim):
        raise ValueError(
            f"{key_name} has shape {tuple(k.shape)}; it must be (batch, time, key_heads, key_dim) = "
            f"({batch}, {time}, a divisor of {heads}, {key_dim}) to match q"
        )
    in_maps = v.dim() == 4 and v.shape[2] > 0 and k.shape[2] % v.shape[2] == 0
    if not in_maps or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{value_name} has shape {tuple(v.shape)}; it must be ({batch}, {time}, a divisor of {k.shape[2]}, "
            f"value_dim) to match {key_name}"
        )


def check_dtypes(**tensors: Tensor) -> None:
    """Require tensors of one dtype.

    Raises:
        ValueError: They have several.
    """
    dtypes = [x.dtype for x in tensors.values()]
    if len({*dtypes}) > 1:
        raise ValueError(f"{', '.join(tensors)} have dtypes {', '.join(map(str, dtypes))}; cast them to one")


def check_memory(
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: "Prefix | None",
    state: "AttentionState | None",
    lengths: Tensor | None,
) -> None:
    """Check what a call is given beside its tokens.

    Raises:
        ValueError: ``lengths``, ``prefix`` or ``state`` does not fit.
    """
    batch = k.shape[0]
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
