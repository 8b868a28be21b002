"""What differential attention does around plain attention: pair the heads, subtract their maps, normalise."""

from math import exp

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_multiple
from memzoo.layers.norm import RMSNorm
from memzoo.layers.ops.precision import wider


class DifferentialRead(nn.Module):
    """Turn the reads of two attention maps into one: ``(1 - lam0) RMSNorm(P1 V - lam P2 V)``.

    Heads 2h and 2h + 1 of queries, keys and values make a pair. With P1 the attention of the even heads, P2 that of the
    odd ones, and V = [v_2h | v_2h+1], as wide as two heads:

        lam  = exp(<q1, k1>) - exp(<q2, k2>) + lam0,   lam0 = 0.8 - 0.6 exp(-0.3 layer_index)

    with learned vectors q1, q2 (``lambda_query``) and k1, k2 (``lambda_key``), one set a layer.

    Args:
        num_heads: Query heads, even.
        num_kv_heads: Heads of keys and values, even.
        head_dim: Width of a head.
        layer_index: The layer's place in the model, from 0; sets lam0.
        eps: Of the norm.

    Shape:
        reads: (batch, time, num_heads, 2 head_dim), as ``ops.attention`` returns them from ``split`` queries and keys:
        P1 V of all pairs, then P2 V. Returns (batch, time, num_heads * head_dim), the halves of a pair side by side.

    Raises:
        ValueError: A number of heads is odd, or ``layer_index`` is negative.

    Reference:
        Ye et al., arXiv 2410.05258, in the form of SambaY (arXiv 2507.06607).
    """

    no_weight_decay = ("lambda_query", "lambda_key")

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, *, layer_index: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        check_multiple("num_heads", num_heads, 2)
        check_multiple("num_kv_heads", num_kv_heads, 2)
        if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 0:
            raise ValueError(f"layer_index={layer_index!r} is not a whole number >= 0; count layers from 0")
        self.layer_index = layer_index
        self.head_dim = head_dim
        self.first_lambda = 0.8 - 0.6 * exp(-0.3 * layer_index)
        self.lambda_query = nn.Parameter(torch.empty(2, head_dim))
        self.lambda_key = nn.Parameter(torch.empty(2, head_dim))
        self.norm = RMSNorm(2 * head_dim, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors of lam with a standard deviation of 0.1."""
        nn.init.normal_(self.lambda_query, std=0.1)
        nn.init.normal_(self.lambda_key, std=0.1)

    def split(self, x: Tensor) -> Tensor:
        """(..., heads * head_dim) queries or keys -> (..., heads, head_dim), even heads before odd ones."""
        heads: Tensor = x.unflatten(-1, (-1, 2, self.head_dim)).transpose(-3, -2).flatten(-3, -2)
        return heads

    def forward(self, reads: Tensor) -> Tensor:
        """Subtract the second map's reads from the first's; in at least float32, since what is left may be small."""
        first, second = wider(reads).chunk(2, dim=-2)
        y: Tensor = self.norm(first - self.current_lambda() * second) * (1 - self.first_lambda)
        return y.flatten(-2).to(reads.dtype)

    def current_lambda(self) -> Tensor:
        """Lam, a scalar in at least float32."""
        even, odd = (wider(self.lambda_query) * wider(self.lambda_key)).sum(-1).exp().unbind()
        current: Tensor = even - odd + self.first_lambda
        return current

    def extra_repr(self) -> str:
        """Index of the layer."""
        return f"layer_index={self.layer_index}"
