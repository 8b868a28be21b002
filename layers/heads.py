"""How many heads, how wide: one rule for every layer that has some."""

from memzoo.layers.errors import check_divisible, check_positive

DEFAULT_HEAD_DIM = 64


def resolve_heads(dim: int, num_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Return number and width of heads: each follows from the other and ``dim``; 64 wide if neither is given.

    Raises:
        ValueError: A number is not positive, or ``dim`` does not divide.
    """
    check_positive("dim", dim)
    if num_heads is not None and head_dim is not None:
        check_positive("num_heads", num_heads)
        check_positive("head_dim", head_dim)
        return num_heads, head_dim
    if num_heads is not None:
        check_divisible("dim", dim, "num_heads", num_heads)
        return num_heads, dim // num_heads
    head_dim = DEFAULT_HEAD_DIM if head_dim is None else head_dim
    check_divisible("dim", dim, "head_dim", head_dim)
    return dim // head_dim, head_dim
