"""What ROME solves: the covariance of what a matrix reads, and the directions that write at some keys."""

import torch
from torch import Tensor


class MeanSquare:
    """A running mean of ``k k^T`` in float64, one batch of keys at a time.

    Attributes:
        count: Of keys so far.
        mean: (width, width).
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, keys: Tensor) -> None:
        """Take in keys (number, width)."""
        if not len(keys):
            return
        self.count += len(keys)
        keys = keys.to(self.mean)
        self.mean.addmm_(keys.T, keys, beta=1 - len(keys) / self.count, alpha=1 / self.count)

    def factor(self) -> Tensor:
        """Return the lower factor of Cholesky of the mean.

        Raises:
            ValueError: It is not finite, or has no inverse.
        """
        if not self.mean.isfinite().all():
            raise ValueError(f"the covariance of {self.count} keys is not finite; see what the host makes of batches")
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(self.mean)
        pivots = factor.diagonal().square()
        rounding = torch.finfo(torch.float64).eps * len(pivots)
        if int(failed) or float(pivots.min()) <= rounding * float(self.mean.diagonal().max()):
            raise ValueError(
                f"the covariance of {self.count} keys of width {len(pivots)} has no inverse; pass batches of more, and "
                f"more varied, texts"
            )
        return factor


def write_directions(keys: Tensor, ridge: float, factor: Tensor) -> Tensor:
    """Return ``K^T (ridge C + K K^T)^-1`` for keys that are the columns of ``K``, solved for in float64.

    It is computed as ``(ridge + K^T C^-1 K)^-1 K^T C^-1``, of as many equations as keys. With a ridge of 0 it is the
    least change that writes at all keys; of one key ``k`` then ROME's ``(C^-1 k)^T / (k^T C^-1 k)``.

    Args:
        keys: (keys, width).
        ridge: Weight of the covariance.
        factor: Of Cholesky, (width, width), or (0, 0) for the identity.

    Returns:
        (keys, width).

    Raises:
        ValueError: One of the keys is zero, so that no change writes there.
    """
    keys = keys.double()
    whitened = keys if not len(factor) else torch.cholesky_solve(keys.T, factor).T
    gram = keys @ whitened.T
    if not bool((gram.diagonal() > 0).all()):
        raise ValueError("a key is zero, or not finite: the site reads nothing there; attach to another, or token=")
    gram.diagonal().add_(ridge)
    directions: Tensor = torch.linalg.solve(gram, whitened)
    return directions
