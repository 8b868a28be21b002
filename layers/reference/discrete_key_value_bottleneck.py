"""Discrete key-value bottleneck, one sample, codebook and key at a time. Slow, and the definition of what is right.

    h_c = z P_c,    j_c = argmin_j |h_c - k_cj|^2,    values V_c[j_c],    logits = mean_c V_c[j_c]

Discrete Key-Value Bottleneck (arXiv 2207.11240); keys as in ftraeuble/discrete_key_value_bottleneck.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memzoo.layers.reference.nearest_key import nearest_key


def heads(z: Tensor, projection: Tensor | None, codebooks: int) -> Tensor:
    """Cut representations (batch, tokens, dim) into heads (batch, tokens, codebooks, dim_key).

    Args:
        z: Representations.
        projection: (codebooks, dim, dim_key); None to cut ``z`` into pieces.
        codebooks: Number of heads.
    """
    if projection is None:
        width = z.shape[-1] // codebooks
        return torch.stack([z[..., c * width : (c + 1) * width] for c in range(codebooks)], -2)
    return torch.stack([z @ own for own in projection], -2)


def lookup(
    z: Tensor, projection: Tensor | None, keys: Tensor, *, topk: int = 1, allowed: Tensor | None = None
) -> Tensor:
    """Return indices (batch, codebooks, topk, tokens) of representations (batch, tokens, dim)."""
    own = heads(z, projection, len(keys))
    found = torch.zeros(len(z), len(keys), topk, z.shape[1], dtype=torch.int64)
    for b in range(len(z)):
        for n in range(z.shape[1]):
            found[b, :, :, n] = nearest_key(own[b, n], keys, topk=topk, allowed=allowed)[0]
    return found


def vote(values: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return logits (batch, dim_value): the mean over codebooks and real tokens of the values, summed over ``topk``.

    An index of -1 fetches nothing, and a token that fetches nothing is not real.
    """
    batch, codebooks, topk, tokens = indices.shape
    logits = []
    for b in range(batch):
        real = [n for n in range(tokens) if (mask is None or mask[b, n]) and (indices[b, :, :, n] >= 0).any()]
        places = [(c, int(indices[b, c, t, n])) for c in range(codebooks) for t in range(topk) for n in real]
        fetched = [values[c, j] for c, j in places if j >= 0]
        zero = values.new_zeros(values.shape[-1])
        logits.append(sum(fetched, zero) / (codebooks * max(len(real), 1)))
    return torch.stack(logits)


def overlap(a: Tensor, b: Tensor, mask_a: Tensor | None = None, mask_b: Tensor | None = None) -> Tensor:
    """Return the share of comparisons in which two samples find the same pair, (rows of a, rows of b)."""
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i, own in enumerate(a):
        for j, other in enumerate(b):
            real_a = [n for n in range(a.shape[3]) if (mask_a is None or mask_a[i, n]) and (own[..., n] >= 0).any()]
            real_b = [n for n in range(b.shape[3]) if (mask_b is None or mask_b[j, n]) and (other[..., n] >= 0).any()]
            same = 0
            for c in range(a.shape[1]):
                for one in own[c][:, real_a].flatten().tolist():
                    same += sum(one == two and one >= 0 for two in other[c][:, real_b].flatten().tolist())
            found[i, j] = same / max(a.shape[1] * a.shape[2] * b.shape[2] * len(real_a) * len(real_b), 1)
    return found


def key_step(
    keys: Tensor,
    counts: Tensor,
    sums: Tensor,
    heads: Tensor,
    decay: float,
    *,
    consistent: bool,
    draw: Callable[[int, int], int],
    eps: float = 1e-5,
    revival: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move keys towards the heads of a batch; return new keys, N and M.

        N_j <- g N_j + (1 - g) n_j,    M_j <- g M_j + (1 - g) m_j
        S_j = (N_j + eps) / (sum_i N_i + K eps) * sum_i N_i,    k_j <- M_j / S_j

    and where N_j < tau = revival * rows / K, k_j becomes the head of row ``draw(codebook, j)``; if ``consistent``, N_j
    becomes tau and M_j tau k_j.

    Shape:
        keys, sums: (codebooks, pairs, dim_key). counts: (codebooks, pairs). heads: (rows, codebooks, dim_key).
    """
    keys, counts, sums = keys.clone(), counts.clone(), sums.clone()
    nearest = nearest_key(heads, keys)[0][..., 0]
    threshold = revival * len(heads) / keys.shape[1]
    for c in range(len(keys)):
        for j in range(keys.shape[1]):
            won = [heads[row, c] for row in range(len(heads)) if nearest[row, c] == j]
            counts[c, j] = decay * counts[c, j] + (1 - decay) * len(won)
            sums[c, j] = decay * sums[c, j] + (1 - decay) * sum(won, torch.zeros_like(sums[c, j]))
        total = counts[c].sum()
        for j in range(keys.shape[1]):
            smooth = (counts[c, j] + eps) / (total + keys.shape[1] * eps) * total
            keys[c, j] = sums[c, j] / smooth
            if counts[c, j] < threshold:
                keys[c, j] = heads[draw(c, j), c]
                if consistent:
                    counts[c, j], sums[c, j] = threshold, threshold * keys[c, j]
    return keys, counts, sums


def logits_after_step(
    logits: Tensor, own: Tensor, other: Tensor, probabilities: Tensor, target: Tensor, rate: float
) -> Tensor:
    """Return the logits of one sample after a step of SGD on the cross-entropy of another.

        logits' = logits - rate |{c: j_c = j'_c}| / C^2 (softmax - target)

    Args:
        logits: Of the sample, before.
        own: Its indices.
        other: Those of the sample that was trained on.
        probabilities: softmax of the logits of that one.
        target: One-hot, or smoothed.
        rate: Of SGD.

    Shape:
        own, other: (codebooks,). The others: (classes,).
    """
    shared = sum(int(a == b) for a, b in zip(own.tolist(), other.tolist(), strict=True))
    return logits - rate * shared / len(own) ** 2 * (probabilities - target)
