"""B'MOJO, one row, block and token at a time. Slow, and the definition of what is right.

arXiv 2407.06324. With u the input, f = SSM(u) the fading tokens, w the window and b = i // w the block of query i, one
softmax goes over three sets of keys:

    eidetic    (k_s, v_s),    s in E_b, s <= i - w                           tokens that were hard to predict
    fading     (k'_j, v'_j),  j <= i - lag, i - lag - j < span, stride divides j + 1       projections of f_j
    window     (k_j, v_j),    i - w < j <= i                                 the last w tokens

E_b holds at most ``num_eidetic`` of the tokens s < b w: those of the largest scores, of equal ones the earliest. The
score of a token tells how far its target (f, or u) lies from a prediction by the targets before it, or what the delta
rule of the SSM corrected; nothing is differentiated through it. With a ``store``, E_b holds those whose keys have the
largest product with the mean query of block b - 1. The window and the fading set are those of the official code of
B'MOJO-F; the eidetic set is a design that satisfies every published statement.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from memzoo.layers.bmojo import BMojo
from memzoo.layers.matrix_memory import MatrixMemory

TINY = 1e-300


@dataclass(frozen=True)
class Row:
    """What became of one row.

    Attributes:
        scores: That of every token.
        kept: E_b of every block b that was reached, as sorted positions; the last one is what the row ends with.
        attended: What every query saw: by the name of the set, sorted positions.
    """

    scores: list[float]
    kept: list[list[int]]
    attended: list[dict[str, list[int]]]


def bmojo(layer: BMojo, x: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, list[Row]]:
    """What ``layer`` computes for fresh rows, from its parameters and its SSM: outputs (batch, time, dim), and how.

    Outputs past a row's length are zero.
    """
    outputs, rows = [], []
    f = x if layer.ssm is None else layer.ssm(x)[0]
    residual = None
    if layer.eidetic.score == "residual":
        ssm = cast(MatrixMemory, layer.ssm)
        (_, residual), _ = ssm.mix(x, None, lengths=None, trace=None, donate=False, return_innovation=True)
    for b, length in enumerate([x.shape[1]] * len(x) if lengths is None else lengths.tolist()):
        scores = None if residual is None else residual[b].tolist()
        y, row = _row(layer, x[b, :length], f[b, :length], scores)
        outputs.append(torch.stack(y + [x.new_zeros(layer.dim)] * (x.shape[1] - length)))
        rows.append(row)
    return torch.stack(outputs), rows


def visible(layer: BMojo, kept: list[int], i: int) -> dict[str, list[int]]:
    """The positions that query i sees in each set, ``kept`` being the eidetic tokens of its block."""
    fading, latest = layer.fading, i - layer.fading.lag
    return {
        "eidetic": [s for s in kept if s <= i - layer.window],
        "fading": [j for j in range(max(0, latest - fading.span + 1), latest + 1) if (j + 1) % fading.stride == 0],
        "window": [*range(max(0, i - layer.window + 1), i + 1)] if layer.in_context else [],
    }


def keep(layer: BMojo, scores: list[float], before: int) -> list[int]:
    """E of the block that begins at token ``before``: at most ``num_eidetic`` of the tokens so far, sorted."""
    candidates = [s for s in range(before) if layer.eidetic.threshold is None or scores[s] > layer.eidetic.threshold]

    def priority(s: int) -> float:
        return {"fifo": s, "random": -_noise(s)}.get(layer.eidetic.selection, scores[s])

    best = sorted(candidates, key=priority, reverse=True)  # of equals the earlier stays first
    return sorted(best[: layer.num_eidetic])


def fetch(layer: BMojo, scores: list[float], asked: list[Tensor], before: int) -> list[int]:
    """E of the block that begins at token ``before``, of a layer with a store; ``asked``: queries and keys of all."""
    q, k = asked
    candidates = [s for s in range(before) if layer.eidetic.threshold is None or scores[s] > layer.eidetic.threshold]
    block = q.detach()[max(0, before - layer.window) : before].unflatten(1, (layer.num_kv_heads, -1))

    def relevance(s: int) -> float:
        return float(torch.einsum("ignd,gd->", block, k[s].detach()))

    return sorted(sorted(candidates, key=relevance, reverse=True)[: layer.num_eidetic])


def _noise(s: int) -> int:
    """A number that looks random and is decided by position s alone: the 32-bit hash "lowbias32" of s + 1.

    A product alone, as in Knuth's hash, would keep tokens at regular distances, and always the first one.
    """
    s += 1
    for factor, shift in ((0x7FEB352D, 16), (0x846CA68B, 15), (1, 16)):
        s = (s ^ s >> shift) * factor % 2**32
    return s


def _row(layer: BMojo, u: Tensor, f: Tensor, scores: list[float] | None) -> tuple[list[Tensor], Row]:
    """Run one row: u and f are (time, dim), ``scores`` those that the SSM gives."""
    time, w = len(u), layer.window
    if scores is None:
        scores = score(layer, f if layer.target == "fading" else u)

    def heads(project: nn.Module, norm: nn.Module | None, tokens: Tensor) -> Tensor:
        z: Tensor = project(tokens).unflatten(-1, (-1, layer.head_dim))
        return z if norm is None else norm(z)

    q, k = heads(layer.query, layer.query_norm, u), heads(layer.key, layer.key_norm, u)
    v = heads(layer.value, None, u)
    asking = q if layer.eidetic_norm is None else heads(layer.query, layer.eidetic_norm, u)
    starts = range(0, time + 1, w)
    if layer.store is None:
        kept = [keep(layer, scores, start) for start in starts]
    else:
        asked = [asking, k]
        if layer.rotary is not None and layer.eidetic.positions == "true":
            asked = [_turn(z, torch.arange(time), layer.rotary.base) for z in asked]
        kept = [fetch(layer, scores, asked, start) for start in starts]
    attended = [visible(layer, kept[i // w], i) for i in range(time)]
    fading = (
        heads(layer.fading_query or layer.query, layer.fading_query_norm or layer.query_norm, u),
        heads(layer.fading_key or layer.key, layer.fading_key_norm or layer.key_norm, f),
        heads(layer.fading_value or layer.value, None, f),
    )
    sets = {"eidetic": (asking, k, v), "fading": fading, "window": (q, k, v)}
    reads = [_attend(layer, sets, seen, i) for i, seen in enumerate(attended)]
    outputs = [layer.out(read.flatten()) for read in reads]
    if layer.adds_ssm:
        outputs = [y + f_i for y, f_i in zip(outputs, f, strict=True)]
    return outputs, Row(scores, kept, attended)


@torch.no_grad()
def score(layer: BMojo, targets: Tensor) -> list[float]:
    """e_t of every target (time, dim): how far it lies from its prediction."""
    scores = []
    for t, y in enumerate(targets):
        past = [targets[t - m] if t >= m else torch.zeros_like(y) for m in range(1, layer.eidetic.taps + 1)]
        guess = _predict(layer, torch.stack(past))
        if layer.eidetic.warmup_score is not None and t < layer.eidetic.taps:
            e = layer.eidetic.warmup_score
        elif layer.eidetic.score == "norm":
            e = (y - guess).norm() / max(y.norm() + guess.norm(), TINY)
        elif layer.eidetic.score == "l2":
            e = (y - guess).norm()
        else:
            e = 1 - y @ guess / max(y.norm() * guess.norm(), TINY)
        scores.append(float(e))
    return scores


def _predict(layer: BMojo, past: Tensor) -> Tensor:
    """Predict a target from those before it, (taps, dim), the latest first."""
    if callable(layer.eidetic.predictor):
        return layer.eidetic.predictor(past)
    if layer.eidetic.predictor == "previous":
        return past[0]
    if layer.predictor_weight is not None:
        return (layer.predictor_weight * past).sum(0)
    weights = torch.tensor([layer.eidetic.rate**m for m in range(len(past))], dtype=past.dtype)
    return weights @ past / weights.sum()


def _attend(layer: BMojo, sets: dict[str, tuple[Tensor, Tensor, Tensor]], seen: dict[str, list[int]], i: int) -> Tensor:
    """One softmax of query i over all sets: (num_heads, head_dim); zero where nothing is seen."""
    group = layer.num_heads // layer.num_kv_heads
    logits, values = [], []
    for name, (queries, keys, held) in sets.items():
        at = torch.tensor(seen[name], dtype=torch.long)
        q, k, v = queries[i], keys[at].repeat_interleave(group, 1), held[at].repeat_interleave(group, 1)
        if name == "eidetic" and layer.eidetic.positions == "clamp":
            at = at.clamp(min=i - 2 * layer.window)
        if layer.rotary is not None and (name, layer.eidetic.positions) != ("eidetic", "none"):
            q, k = _turn(q[None], torch.tensor([i]), layer.rotary.base)[0], _turn(k, at, layer.rotary.base)
        logit = torch.einsum("hd,jhd->hj", q, k) / math.sqrt(layer.head_dim)
        if layer.segment_bias is not None:
            logit = logit + layer.segment_bias[[*sets].index(name)][:, None]
        logits.append(logit)
        values.append(v)
    if not any(seen.values()):
        return torch.zeros_like(q)
    return torch.einsum("hj,jhd->hd", torch.cat(logits, 1).softmax(1), torch.cat(values))


def _turn(z: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate the heads of z (count, heads, head_dim) to their positions."""
    pairs = z.shape[-1] // 2
    angle = positions[:, None] * base ** (-torch.arange(pairs, dtype=z.dtype) / pairs)
    turned = torch.complex(*z.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


class CompanionSSM:
    """The state model x_{t+1} = A x_t + e_n u_t with A in companion form: ones above the diagonal, a in the last row.

    With a = 0 its state is a delay line of the last n inputs: A is nilpotent, the memory is exact and ends. Any other a
    feeds the state back, so that the same n numbers also fade: x_t holds y_{t-n}, .., y_{t-1} of the recursion
    y_t = u_t + a_1 y_{t-n} + .. + a_n y_{t-1}.

    Args:
        n: Taps.
        a: (n,) the last row of A, the oldest tap first; or one number for all of it.
    """

    def __init__(self, n: int, a: Tensor | float) -> None:
        self.A = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
        self.A[-1] = a

    def __call__(self, u: Tensor) -> Tensor:
        """Run from zero: (time,) inputs -> (time + 1, n) states, x_0 to x_time."""
        states = [torch.zeros(len(self.A), dtype=self.A.dtype)]
        for u_t in u:
            x = self.A @ states[-1]
            x[-1] += u_t
            states.append(x)
        return torch.stack(states)
