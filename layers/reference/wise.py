"""WISE, one entry, one token and one sample at a time. Slow, and the definition of what is right.

WISE (arXiv 2405.14768). A host's feed-forward reads its value matrix W with the activations a of its slots; side
memories are changes D_j of that matrix, W' = W + D_j. Matrices are (d, m), as ``nn.Linear`` keeps them.

    Delta_j(x) = mean over the counted tokens of |D_j a_t|                  how much a memory has to say about a sample
    y_t = W a_t + D_j a_t with j = argmax_j Delta_j(x) if Delta_j(x) > eps_j, else W a_t
    L_a = max(0, Delta(x_i) - alpha) + max(0, beta - Delta(x_e)) + max(0, gamma - (Delta(x_e) - Delta(x_i)))
    D <- D - eta (M * dL/dD),   L = -log P(y_e | x_e) + L_a,   eps = min over edits of Delta(x_e)

What is computed keeps the dtype it is given: float64, to be the truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

BELOW = 1 - 1e-6  # of a threshold: an edit that lies on it is answered by the memory


@dataclass(frozen=True)
class SiteEdit:
    """An edit as the value matrix sees it.

    Attributes:
        inputs: Activations of the edit's rows, (rows, time, m).
        counted: (rows, time) bool, the tokens that decide how much a memory has to say.
        unrelated: Activations of rows that must not be touched, (rows, time, m).
        unrelated_counted: Those of them that count.
        loss: What the layers above make of the matrix's output (rows, time, d): ``-log P(y_e | x_e)``.
    """

    inputs: Tensor
    counted: Tensor
    unrelated: Tensor
    unrelated_counted: Tensor
    loss: Callable[[Tensor], Tensor]


@dataclass
class Side:
    """A change of the matrix.

    Attributes:
        delta: (d, m).
        threshold: What a sample's indicator must exceed.
    """

    delta: Tensor
    threshold: float = math.inf


@dataclass
class Memories:
    """What a stream of edits has left.

    Attributes:
        merged: One for each full set of shards, or one for all.
        shards: Full, and not merged yet.
        current: The shard that edits go to.
        parts: Every full shard so far.
    """

    current: Side
    merged: list[Side] = field(default_factory=list)
    shards: list[Side] = field(default_factory=list)
    parts: list[Side] = field(default_factory=list)

    @property
    def sides(self) -> list[Side]:
        """All that a sample is shown to."""
        return [*self.merged, *self.shards, self.current]


# Reading


def token_indicator(a: Tensor, delta: Tensor) -> Tensor:
    """Return ``|D a|`` of one token, a scalar; a bias of the matrix cancels out.

    Shape:
        a: (m,). delta: (d, m).
    """
    length: Tensor = torch.stack([row @ a for row in delta]).norm()
    return length


def activated_indicator(
    a: Tensor, delta: Tensor, weight: Tensor, activation: Activation, bias: Tensor | float = 0.0
) -> Tensor:
    """Return ``|act((W + D) a + b) - act(W a + b)|`` of one token, what EasyEdit computes.

    Shape:
        a: (m,). delta, weight: (d, m). bias: (d,).
    """
    main = torch.stack([row @ a for row in weight]) + bias
    side = torch.stack([row @ a for row in weight + delta]) + bias
    length: Tensor = (activation(side) - activation(main)).norm()
    return length


def reduce_tokens(indicators: Tensor, counted: Tensor, kind: str = "mean") -> Tensor:
    """Return one number for a sample: the "mean", the "max" or the "last" of its counted tokens.

    "easyedit" is the mean of up to 100 tokens, and the maximum of more.

    Shape:
        indicators, counted: (time,). Returns a scalar.
    """
    real: list[Tensor] = [indicator for indicator, counts in zip(indicators, counted, strict=True) if counts]
    if kind == "last":
        return real[-1]
    if kind == "max" or (kind == "easyedit" and len(real) > 100):
        return torch.stack(real).max()
    return torch.stack(real).sum() / len(real)


def indicator(a: Tensor, counted: Tensor, delta: Tensor, kind: str = "mean") -> Tensor:
    """Return Delta of every sample.

    Shape:
        a: (samples, time, m). counted: (samples, time). delta: (d, m). Returns (samples,).
    """
    samples = []
    for sample, counts in zip(a, counted, strict=True):
        samples.append(reduce_tokens(torch.stack([token_indicator(token, delta) for token in sample]), counts, kind))
    return torch.stack(samples)


def route(indicators: Sequence[float], thresholds: Sequence[float], ratio: float = 1.0) -> int | None:
    """Choose who answers a sample: the memory with the most to say, of equal ones the first, if that is enough.

    Args:
        indicators: Of the sample, by memory.
        thresholds: Of the memories.
        ratio: Of the thresholds; 1 in the paper.

    Returns:
        Its number; None for the host alone.
    """
    best = max(range(len(indicators)), key=lambda j: indicators[j], default=None)
    if best is None or not indicators[best] > ratio * BELOW * thresholds[best]:
        return None
    return best


def read(a: Tensor, counted: Tensor, y: Tensor, sides: Sequence[Side], ratio: float = 1.0) -> Tensor:
    """Return what becomes of the host's output, every sample by itself.

    Shape:
        a: (samples, time, m). counted: (samples, time). y: (samples, time, d), ``W a + b``. Returns the same.
    """
    samples = []
    for s in range(len(a)):
        said = [float(indicator(a[s : s + 1], counted[s : s + 1], side.delta)) for side in sides]
        chosen = route(said, [side.threshold for side in sides], ratio)
        if chosen is None:
            samples.append(y[s])
        else:
            samples.append(torch.stack([out + sides[chosen].delta @ t for out, t in zip(y[s], a[s], strict=True)]))
    return torch.stack(samples)


# Editing


def routing_loss(edit: Tensor, unrelated: Tensor, margins: tuple[float, float, float]) -> Tensor:
    """Return L_a of one edit and one unrelated sample, from their indicators; a scalar.

    Args:
        edit: Delta(x_e), at least beta if all is well.
        unrelated: Delta(x_i), at most alpha.
        margins: alpha, beta, gamma.
    """
    alpha, beta, gamma = margins
    return (unrelated - alpha).relu() + (beta - edit).relu() + (gamma - (edit - unrelated)).relu()


def mean_routing_loss(edits: Tensor, unrelated: Tensor, margins: tuple[float, float, float]) -> Tensor:
    """Return the mean of L_a over every pair of an edit's rows (rows,) and unrelated ones (rows,)."""
    return torch.stack([routing_loss(e, i, margins) for e in edits for i in unrelated]).mean()


def step(delta: Tensor, gradient: Tensor, mask: Tensor, lr: float, limit: float = math.inf) -> Tensor:
    """Return ``D - eta (M * g)``, no entry beyond ``limit``; what the mask leaves out is not touched.

    Shape:
        delta, gradient, mask: (d, m). Returns the same.
    """
    moved = delta.clone()
    for i, j in mask.nonzero().tolist():
        moved[i, j] = min(max(float(delta[i, j] - lr * gradient[i, j]), -limit), limit)
    return moved


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Merge changes entry by entry: trim, elect a sign, take the mean of what agrees.

    Shape:
        deltas[i]: (d, m). Returns the same.
    """
    kept = []
    for delta in deltas:
        sizes = sorted((abs(x) for x in delta.flatten().tolist()), reverse=True)
        smallest = sizes[max(1, round(density * len(sizes))) - 1]
        kept.append([x if abs(x) >= smallest else 0.0 for x in delta.flatten().tolist()])
    merged = []
    for entries in zip(*kept, strict=True):
        positive = sum(w * x for w, x in zip(weights, entries, strict=True)) >= 0
        agree = [(w, x) for w, x in zip(weights, entries, strict=True) if (x > 0 if positive else x < 0)]
        merged.append(sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return torch.tensor(merged, dtype=deltas[0].dtype).view(deltas[0].shape)


def learn(
    delta: Tensor,
    weight: Tensor,
    edit: SiteEdit,
    mask: Tensor,
    *,
    steps: int,
    lr: float,
    margins: tuple[float, float, float],
    limit: float = math.inf,
) -> Tensor:
    """Train a change on one edit: every row of it is answered by the memory, whatever its indicator says.

    Shape:
        delta, weight, mask: (d, m). Returns the same.
    """
    for _ in range(steps):
        leaf = delta.detach().requires_grad_()
        answered = torch.stack([torch.stack([(weight + leaf) @ token for token in row]) for row in edit.inputs])
        said = indicator(edit.inputs, edit.counted, leaf)
        unrelated = indicator(edit.unrelated, edit.unrelated_counted, leaf)
        loss = edit.loss(answered) + mean_routing_loss(said, unrelated, margins)
        (gradient,) = torch.autograd.grad(loss, leaf)
        delta = step(delta, gradient, mask, lr, limit)
    return delta


def stream(
    weight: Tensor,
    edits: Sequence[SiteEdit],
    masks: Sequence[Tensor],
    *,
    shard_size: int,
    shards: int,
    steps: int,
    lr: float,
    margins: tuple[float, float, float],
    density: float,
    retrieve: bool = False,
    limit: float = math.inf,
) -> Memories:
    """Learn edits one after another.

    An edit is learnt in the current shard, and may lower its threshold. A full shard is put aside, and the next one
    starts from nothing with a mask of its own. When there are ``shards`` of them they are merged, with equal weights
    and the lowest of their thresholds: to a further memory if ``retrieve``, else, with every shard before them, to
    the only one.

    Args:
        weight: W.
        edits: In order.
        masks: Of each shard in order.
        shard_size: Edits of a shard.
        shards: To be merged, k.
        steps: Of an edit.
        lr: eta.
        margins: alpha, beta, gamma.
        density: Of the merge.
        retrieve: Keep every merged memory.
        limit: Of every entry.
    """
    memories, number = Memories(Side(torch.zeros_like(weight))), 0
    for count, edit in enumerate(edits, start=1):
        side = memories.current
        side.delta = learn(side.delta, weight, edit, masks[number], steps=steps, lr=lr, margins=margins, limit=limit)
        side.threshold = min(side.threshold, *indicator(edit.inputs, edit.counted, side.delta).tolist())
        if count % shard_size:
            continue
        number += 1
        memories.shards.append(side)
        memories.parts.append(side)
        memories.current = Side(torch.zeros_like(weight))
        if len(memories.shards) == shards:
            parts = memories.shards if retrieve else memories.parts
            merged = ties([part.delta for part in parts], [1 / len(parts)] * len(parts), density)
            whole = Side(merged, min(part.threshold for part in parts))
            memories.merged = [*memories.merged, whole] if retrieve else [whole]
            memories.shards = []
    return memories
