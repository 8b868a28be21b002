"""Titans' neural long-term memory, one token at a time. Slow, and the definition of what is right.

arXiv 2501.00663, section 3. A memory M is a small MLP whose weights W are trained while the sequence is read; every
head of every row owns one. For its token t, with S the surprise, A the anchor (zero in the paper), c the loss scale:

    W_b <- W   if t begins a chunk                  the base, where gradients are taken
    g   =  d/dW_b  c/2 ||M(W_b; k_t) - v_t||^2
    S   <- eta_t S - theta_t g                      past and momentary surprise, eq. 10
    W   <- A + (1 - alpha_t) (W - A) + S            forgetting, eq. 13
    y_t =  M(W; q_t)                                read after the write

With a window of w tokens (the Omega rule, arXiv 2505.23735, eq. 9) g is the sum of these gradients over the last w
tokens, each times its share gamma, all at the base of token t.

No derivative is written by hand, no two memories share an operation, and outer gradients flow through the inner ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]  # a matrix a layer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": lambda x: x,
}


@dataclass
class Memory:
    """The memory of one head of one row. W, S, W_b, A: a (d_in, d_out) matrix a layer. The options are the op's."""

    W: Weights
    S: Weights
    W_b: Weights
    A: Weights
    position: int
    chunk_size: int
    activation: str
    loss_scale: float
    read: str
    max_gradient_norm: float | None
    norm: tuple[Tensor, Tensor] | None
    window: int = 1
    seen: list[tuple[Tensor, Tensor, Tensor | float]] = field(default_factory=list)  # k, v, gamma of tokens before

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | float,
        alpha: Tensor,
        gamma: Tensor | float = 1.0,
    ) -> Tensor:
        """Absorb one token and return what its query reads. q, k, v are vectors, the others scalars."""
        if self.position % self.chunk_size == 0:
            self.W_b = self.W
        y_before = self.recall(self.W, q)
        self.seen = [*self.seen, (k, v, gamma)][-self.window :]
        shares = [[gamma * layer for layer in self.gradient(k, v)] for k, v, gamma in self.seen]
        g = [torch.stack(layer).sum(0) for layer in zip(*shares, strict=True)]
        self.S = tuple(eta * S - theta * g for S, g in zip(self.S, g, strict=True))
        self.W = tuple(A + (1 - alpha) * (W - A) + S for W, S, A in zip(self.W, self.S, self.A, strict=True))
        self.position += 1
        return y_before if self.read == "pre" else self.recall(self.W, q)

    def recall(self, W: Weights, x: Tensor) -> Tensor:
        """M(W; x), or x + LayerNorm(M(W; x)) with a residual and a norm around the MLP."""
        z = x
        for layer in W[:-1]:
            z = ACTIVATIONS[self.activation](z @ layer)
        z = z @ W[-1]
        return z if self.norm is None else x + F.layer_norm(z, z.shape, *self.norm, eps=1e-6)

    def gradient(self, k: Tensor, v: Tensor) -> Weights:
        """The derivative of the loss at the base, its norm over all layers limited if asked, dropped if not finite."""

        def loss(W: Weights) -> Tensor:
            return self.loss_scale / 2 * (self.recall(W, k) - v).square().sum()

        g: Weights = torch.func.grad(loss)(self.W_b)
        if self.max_gradient_norm is None:
            return g
        squared = torch.cat([layer.flatten() for layer in g]).square().sum()
        if not squared.isfinite():
            return tuple(torch.zeros_like(layer) for layer in g)
        norm = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)
        return tuple(layer * (self.max_gradient_norm / norm.clamp_min(self.max_gradient_norm)) for layer in g)

    @property
    def base(self) -> Weights:
        """W_b, or W where the next token begins a chunk."""
        return self.W if self.position % self.chunk_size == 0 else self.W_b


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int,
    activation: str = "silu",
    loss_scale: float = 1.0,
    read: str = "post",
    position: int | Tensor = 0,
    base: Weights | None = None,
    anchor: Weights | None = None,
    max_gradient_norm: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    window: int = 1,
    gamma: Tensor | None = None,
    recent: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Weights, Weights]:
    """``neural_memory_scan`` without the base: returns y, weights, momentum."""
    y, weights, momentum, _ = neural_memory_scan(
        q, k, v, theta, eta, alpha, weights, momentum,
        chunk_size=chunk_size, activation=activation, loss_scale=loss_scale, read=read, position=position, base=base,
        anchor=anchor, max_gradient_norm=max_gradient_norm, norm=norm, window=window, gamma=gamma, recent=recent,
        lengths=lengths,
    )  # fmt: skip
    return y, weights, momentum


def neural_memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor,
    weights: Weights,
    momentum: Weights | None = None,
    *,
    chunk_size: int,
    activation: str = "silu",
    loss_scale: float = 1.0,
    read: str = "post",
    position: int | Tensor = 0,
    base: Weights | None = None,
    anchor: Weights | None = None,
    max_gradient_norm: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    window: int = 1,
    gamma: Tensor | None = None,
    recent: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """Train every memory on its keys and values while its queries read it.

    Args:
        q: What is asked.
        k: What is stored under.
        v: What is stored.
        theta: Step size, the share of the momentary surprise.
        eta: Share of the past surprise that is kept; None for a memory without momentum.
        alpha: Share of the memory that is forgotten.
        weights: W.
        momentum: S; zero by default.
        chunk_size: Tokens that share a base. Part of the model.
        activation: Between the layers of the memory: "silu", "gelu" (exact), "relu" or "identity".
        loss_scale: c; 2 in the paper's main text, 1 in its appendix.
        read: "post" reads after the token's own write, "pre" before it.
        position: Tokens absorbed before, for all rows or one number a row; says where in a chunk the call begins.
        base: W_b of the chunk that an earlier call began; W by default.
        anchor: A, what forgetting decays towards; zero by default.
        max_gradient_norm: g, all layers together, is scaled down to this Frobenius norm; if its square is not finite
            the token writes nothing.
        norm: Gain and bias of a LayerNorm in the memory, M(x) = x + LayerNorm(MLP(x)); none by default.
        window: Tokens whose losses a step descends, its own the last.
        gamma: Share of each token's loss; 1 by default.
        recent: k, v and gamma of the window - 1 tokens before; none by default.
        lengths: Tokens that exist in each row, all by default; outputs behind them are zero.

    Shape:
        q, k: (batch, time, heads, d_0). v: (batch, time, heads, d_L). theta, eta, alpha, gamma: (batch, time, heads).
        Layer l of weights, momentum, base, anchor: (batch, heads, d_{l-1}, d_l). gain, bias: (heads, d_L). recent: as
        k, v, gamma, of window - 1 tokens. position, lengths: (batch,).

    Returns:
        y (batch, time, heads, d_L), weights, momentum (empty without ``eta``), base (at a chunk's end, the weights).
    """
    batch, time, heads, _ = q.shape
    starts = [position] * batch if isinstance(position, int) else position.tolist()
    ends = [time] * batch if lengths is None else lengths.tolist()
    zeros = tuple(torch.zeros_like(layer) for layer in weights)
    states = weights, momentum or zeros, base or weights, anchor or zeros
    memories, y = [], []
    for row in range(batch):
        for head in range(heads):
            W, S, W_b, A = (tuple(layer[row, head] for layer in state) for state in states)
            own_norm = None if norm is None else (norm[0][head], norm[1][head])
            seen = [] if recent is None else list(zip(*(x[row, :, head] for x in recent), strict=True))
            memory = Memory(
                W, S, W_b, A, starts[row], chunk_size, activation, loss_scale, read, max_gradient_norm, own_norm,
                window, seen,
            )  # fmt: skip
            for t in range(time):
                q_t, k_t, v_t, theta_t, alpha_t = (x[row, t, head] for x in (q, k, v, theta, alpha))
                eta_t = 0.0 if eta is None else eta[row, t, head]
                gamma_t = 1.0 if gamma is None else gamma[row, t, head]
                token = q_t, k_t, v_t, theta_t, eta_t, alpha_t, gamma_t
                y.append(memory.step(*token) if t < ends[row] else torch.zeros_like(v_t))
            memories.append(memory)

    def join(states: list[Weights]) -> Weights:
        return tuple(torch.stack(layer).view(batch, heads, *layer[0].shape) for layer in zip(*states, strict=True))

    return (
        torch.stack(y).view(batch, heads, time, -1).transpose(1, 2),
        join([memory.W for memory in memories]),
        () if eta is None else join([memory.S for memory in memories]),
        join([memory.base for memory in memories]),
    )
