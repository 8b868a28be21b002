"""Feed-forwards with memories, their tokens and blocks, for tests of MemoryFeedForward."""

import torch
from torch import Tensor

from memzoo.layers import FeedForward, MemoryFeedForward, SwiGLU
from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import BankLayout, Node

EXACT = {"rtol": 0, "atol": 1e-10}
DIM, HIDDEN = 6, 10
SAME = torch.tensor([[0, 1, 2]] * 3)
MIXED = torch.tensor([[0, 1, 2], [0, 0, 2], [1, 3, 7]])
FORMS = {
    "swiglu": (lambda: SwiGLU(DIM, hidden_dim=HIDDEN), {"gated": True, "activation": "silu"}),
    "gelu": (lambda: FeedForward(DIM, hidden_dim=HIDDEN, bias=True), {"gated": False, "activation": "gelu"}),
}


def fetch(paths: Tensor = SAME, *, seed: int = 0, dtype=torch.float64, fresh: bool = False, **options) -> Fetched:
    """Random blocks of one layer, each drawn for its node; or ``fresh`` ones, as nodes start."""
    sizes = dict(rows=(3, 2, 1), branching=2, hidden_dim=HIDDEN, dtype=dtype)
    layout = BankLayout(1, DIM, **sizes | options)

    def block(node: Node) -> Tensor:
        if fresh:
            return layout.initial_block(node, seed).to(dtype)
        generator = torch.Generator().manual_seed(1000 * node.level + node.node + seed)
        return torch.randn(layout.block_shape(node.level), generator=generator, dtype=torch.float64).to(dtype)

    return Fetched.of(layout, paths, block)


def tokens(batch: int = 3, time: int = 4, dtype=torch.float64) -> Tensor:
    return torch.randn(batch, time, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def layer(form: str = "swiglu", mode: str = "add") -> MemoryFeedForward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MemoryFeedForward(FORMS[form][0](), mode=mode).double()
