"""Mixture-of-Memories, one token at a time. Slow, and the definition of what is right.

arXiv 2502.13685, equations 3-8, with what its released code adds: short convolution, shared memory, norm and gate of
the output. Every row owns M memories, each a matrix S_m a head. For its token x, with m running over the k memories of
the largest x W_r, p = softmax(x W_r), and w their p over its sum:

    q_m, k_m, v_m = silu(conv_m(x W_q, x W_k^m, x W_v^m))       conv_m sees the tokens that chose m and no other
    S_m <- exp(a_m) S_m                                         forget
    S_m <- S_m + k_m^T u,  u = beta_m (v_m - k_m S_m) or v_m    write: the delta rule, or added
    y    = sum_m w_m q_m S_m / sqrt(K)  [+ q_s S_s / sqrt(K)]   read, after the write

The output is W_o (norm(y) * silu(x W_g)). The shared memory S_s is one more that every token chooses, with w = 1. A
memory that a token did not choose is not touched: not its state, not its convolution, not its gates.

Where q is the same for all memories, because x is convolved and not q, k and v, one may as well mix the memories and
ask once, q (sum_m w_m S_m) (equation 7): ``query_after_mixing``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Read = tuple[Tensor | float, Tensor, Tensor]  # weight, query (heads, K), state (heads, K, V)


@dataclass(frozen=True)
class Mixture:
    """One layer's weights and functions. Functions take single tokens: no batch, no time.

    Attributes:
        router: W_r, (M, dim).
        query: W_q, (heads * K, dim).
        key_value: [W_k | W_v] of every memory, the shared one last, (heads * K + value_heads * V, dim).
        raw_gates: Of every memory: x (dim,) -> what ``gates`` takes. Empty for a rule without gates.
        gates: raw -> beta (value_heads,), None to add; a (value_heads,) or (value_heads, K), None to keep everything.
        prepare: q, k (heads, K), position -> both, of unit length, in features or rotated.
        output: y (value_heads, V), x (dim,) -> (dim,).
        heads: Of queries and keys; value head h uses head h // (value_heads // heads).
        value_heads: Matrices of a memory.
        top_k: Memories a token.
        shared: Whether the last memory is the shared one.
        renormalize: Whether w is p over the sum of the top k, or p itself.
        filters: Of the convolution, (channels, width); None for none.
        place: What is convolved: "bucket" for [q | k | v] in each memory, "input" for x before routing and projections.
        activation: Follows the convolution, or the projection to [q | k | v] if there is none.
        normalizer: Linear attention's: every value has a one behind it, and what is read is divided by that column.
    """

    router: Tensor
    query: Tensor
    key_value: tuple[Tensor, ...]
    raw_gates: tuple[Callable[[Tensor], Tensor], ...]
    gates: Callable[[Tensor | None], tuple[Tensor | None, Tensor | None]]
    prepare: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    output: Callable[[Tensor, Tensor], Tensor]
    heads: int
    value_heads: int
    top_k: int
    shared: bool
    renormalize: bool
    filters: Tensor | None
    place: str | None
    activation: Callable[[Tensor], Tensor]
    normalizer: bool


@dataclass
class Window:
    """The convolution of one stream of tokens: the ``width - 1`` inputs before the next one."""

    filters: Tensor
    activation: Callable[[Tensor], Tensor]
    seen: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        channels, width = self.filters.shape
        self.seen = [self.filters.new_zeros(channels)] * (width - 1)

    def step(self, x: Tensor) -> Tensor:
        """Convolve the next token, (channels,)."""
        taps = torch.stack([*self.seen, x], 1)
        self.seen = [*self.seen, x][1:]
        return self.activation((self.filters * taps).sum(1))


@dataclass
class Memory:
    """One memory of one row: its matrices S (value_heads, K, V), its convolution, how many tokens chose it."""

    mixture: Mixture
    number: int
    S: Tensor
    window: Window | None
    tokens_seen: int = 0

    def write(self, x: Tensor, position: int) -> Tensor:
        """Store the token x (dim,) and return its query, (value_heads, K)."""
        mixture, group = self.mixture, self.mixture.value_heads // self.mixture.heads
        channels = torch.cat((mixture.query @ x, mixture.key_value[self.number] @ x))
        if self.window is not None:
            channels = self.window.step(channels)
        elif mixture.filters is None:
            channels = mixture.activation(channels)
        inner = len(mixture.query)
        q, k = (part.view(mixture.heads, -1) for part in channels[: 2 * inner].split(inner))
        q, k = (part.repeat_interleave(group, 0) for part in mixture.prepare(q, k, position))
        v = channels[2 * inner :].view(mixture.value_heads, -1)
        v = F.pad(v, (0, 1), value=1.0) if mixture.normalizer else v
        beta, a = mixture.gates(mixture.raw_gates[self.number](x) if mixture.raw_gates else None)
        if a is not None:
            self.S = a.view(mixture.value_heads, -1, 1).exp() * self.S
        u = v if beta is None else beta[:, None] * (v - recall(k, self.S))
        self.S = self.S + k[:, :, None] * u[:, None, :]
        self.tokens_seen += 1
        return q / math.sqrt(q.shape[1])


class Result(NamedTuple):
    """What a layer returns.

    Attributes:
        y: (batch, time, dim).
        memories: (batch, M + shared, value_heads, K, V).
        tails: The last inputs of the convolutions, (batch, M + shared, or 1 of x, width - 1, channels); None for none.
        tokens_seen: (batch, M).
    """

    y: Tensor
    memories: Tensor
    tails: Tensor | None
    tokens_seen: Tensor


def mixture_of_memories(x: Tensor, mixture: Mixture) -> Result:
    """Ask every memory that a token chose, each with its own query, then mix the answers.

    Args:
        x: (batch, time, dim).
        mixture: The layer.
    """

    def answer(w: Tensor | float, q: Tensor, S: Tensor) -> Tensor:
        y = recall(q, S)
        return w * (y[:, :-1] / (y[:, -1:] + 1e-10) if mixture.normalizer else y)

    return _mix(x, mixture, lambda reads: torch.stack([answer(*read) for read in reads]).sum(0))


def query_after_mixing(x: Tensor, mixture: Mixture) -> Result:
    """Mix the memories that a token chose, then ask the mixture. No convolution in the memories, no normalizer.

    Args:
        x: (batch, time, dim).
        mixture: The layer.
    """

    def answer(reads: list[Read]) -> Tensor:
        queries = [q for _, q, _ in reads]
        assert all(torch.equal(q, queries[0]) for q in queries), "the memories are asked different things"
        return recall(queries[0], torch.stack([w * S for w, _, S in reads]).sum(0))

    return _mix(x, mixture, answer)


def recall(q: Tensor, S: Tensor) -> Tensor:
    """Return q S of every head: (heads, K), (heads, K, V) -> (heads, V)."""
    return (q[:, :, None] * S).sum(1)


def route(x: Tensor, mixture: Mixture) -> list[tuple[Tensor | float, int]]:
    """Return weight and number of every memory that the token x (dim,) reads and writes."""
    z = mixture.router @ x
    p = z.softmax(0)
    chosen = sorted(range(len(z)), key=lambda m: z[m].item(), reverse=True)[: mixture.top_k]  # p may round to zeros
    total = torch.stack([p[m] for m in chosen]).sum() if mixture.renormalize else 1.0
    routed: list[tuple[Tensor | float, int]] = [(p[m] / total, m) for m in chosen]
    return [*routed, (1.0, len(p))] if mixture.shared else routed


def _mix(x: Tensor, mixture: Mixture, answer: Callable[[list[Read]], Tensor]) -> Result:
    inner, heads = len(mixture.query), mixture.value_heads
    values = len(mixture.key_value[0]) - inner
    empty = x.new_zeros(heads, inner // mixture.heads, values // heads + mixture.normalizer)
    filters, activation = mixture.filters, mixture.activation

    def window(place: str) -> Window | None:
        return Window(filters, activation) if filters is not None and mixture.place == place else None

    outputs, states, tails, counts = [], [], [], []
    for row in x:
        memories = [Memory(mixture, m, empty, window("bucket")) for m in range(len(mixture.key_value))]
        first = window("input")
        for position, token in enumerate(row):
            z = token if first is None else first.step(token)
            reads: list[Read] = []
            for w, m in route(z, mixture):
                q = memories[m].write(z, position)
                reads.append((w, q, memories[m].S))
            outputs.append(mixture.output(answer(reads), token))
        windows = [w for w in (first, *(memory.window for memory in memories)) if w is not None]
        states.append(torch.stack([memory.S for memory in memories]))
        tails += [torch.stack([torch.stack(w.seen) for w in windows])] if windows else []
        counts.append([memory.tokens_seen for memory in memories])
    return Result(
        torch.stack(outputs).view_as(x),
        torch.stack(states),
        torch.stack(tails) if tails else None,
        torch.tensor(counts)[:, : len(mixture.router)],
    )
