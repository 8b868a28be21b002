"""Keys of a discrete key-value bottleneck from heads without labels, before anything is learnt; then they are frozen.

With n_j heads of a batch nearest to key j and m_j their sum, N and M running means of both (decay g), by codebook:

    N_j <- g N_j + (1 - g) n_j,    M_j <- g M_j + (1 - g) m_j
    S_j = (N_j + eps) / (sum_i N_i + K eps) * sum_i N_i,    k_j <- M_j / S_j

A key whose N_j falls below a tenth of what it would be if all were used alike is moved to a head of the batch.
Discrete Key-Value Bottleneck (arXiv 2207.11240); ftraeuble/discrete_key_value_bottleneck, key_value_bottleneck/core.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.ops.nearest_key import CHUNK_BYTES, nearest_key

KeyMethod = Literal["ema", "ema_official", "sample", "kmeans", "random"]
EPS = 1e-5
REVIVAL = 0.1  # of the number of heads a key would get if all were used alike

Heads = Callable[[], Iterable[Tensor]]  # begins a pass over heads (rows, codebooks, dim_key)


@dataclass
class KeyStatistics:
    """Keys that are being initialised, and what they were made of. Changed in place by ``ema_update``.

    Attributes:
        keys: (codebooks, pairs, dim_key).
        counts: (codebooks, pairs), N.
        sums: (codebooks, pairs, dim_key), M.
    """

    keys: Tensor
    counts: Tensor
    sums: Tensor


def find_keys(
    heads: Heads,
    like: Tensor,
    *,
    method: KeyMethod,
    epochs: int,
    decay: float,
    seed: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return keys for a codebook each.

    "ema" starts from heads of the first batches, with N = 1 and M = k, and a revived key starts anew with N = tau and
    M = tau k. "ema_official" starts from k = M ~ N(0, 1), N = 0, and revives k alone, as the published code; it needs
    many updates, as a key without a head moves to M / eps first. "sample" draws heads without replacement, from one
    pass. "kmeans" is scikit-learn's, for at most ``epochs`` iterations over all heads at once, which it keeps in
    memory. "random" draws N(0, 1) and reads no head.

    Where ``torch.distributed`` is initialised, every rank calls it with its share of the data and gets the same keys:
    n_j and m_j are summed over ranks, and what is drawn is that of rank 0. All ranks must have as many batches.

    Args:
        heads: Begins another pass.
        like: (codebooks, pairs, dim_key), gives shape, dtype and device.
        method: As above.
        epochs: Passes of "ema" and "ema_official".
        decay: g, of the same.
        seed: Of everything drawn.
        chunk_bytes: Of ``nearest_key``.

    Raises:
        ValueError: An argument is out of range, there is no head, or too few for "kmeans".
    """
    check_key_options(method, epochs, decay)
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return _from_rank_0(torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device))
    if method == "sample":
        return _from_rank_0(sample_heads(heads(), like, generator))
    if method == "kmeans":
        return _from_rank_0(_kmeans(heads(), like, epochs, seed))
    if method == "ema":
        keys = _from_rank_0(_first_heads(heads(), like, generator))
        state = KeyStatistics(keys, torch.ones_like(keys[..., 0]), keys.clone())
    else:
        keys = _from_rank_0(torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device))
        state = KeyStatistics(keys, torch.zeros_like(keys[..., 0]), keys.clone())
    seen = 0
    for _ in range(epochs):
        for batch in heads():
            consistent = method == "ema"
            ema_update(state, batch, decay, generator, consistent=consistent, chunk_bytes=chunk_bytes)
            seen += len(batch)
    _check_any(seen)
    return state.keys


@torch.no_grad()
def ema_update(
    state: KeyStatistics,
    heads: Tensor,
    decay: float,
    generator: torch.Generator,
    *,
    consistent: bool = True,
    eps: float = EPS,
    revival: float = REVIVAL,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Move keys towards the heads (rows, codebooks, dim_key) of one batch; the equations are those of the file.

    Args:
        state: Changed in place.
        heads: Of one batch; with ``torch.distributed``, of this rank.
        decay: g.
        generator: On the CPU; draws the heads that revived keys are moved to.
        consistent: Give a revived key N = tau and M = tau k; the published code leaves both as they were.
        eps: Of S.
        revival: ``tau = revival * rows / pairs``; 0 for none.
        chunk_bytes: Of ``nearest_key``.
    """
    codebooks, pairs, _ = state.keys.shape
    index = nearest_key(heads, state.keys, chunk_bytes=chunk_bytes)[0][..., 0]
    flat = (index + torch.arange(codebooks, device=index.device) * pairs).flatten()
    rows = torch.tensor(float(len(heads)), dtype=torch.float64, device=heads.device)
    counts = torch.bincount(flat, minlength=codebooks * pairs).view(codebooks, pairs).to(state.counts)
    sums = torch.zeros_like(state.sums).flatten(0, 1).index_add_(0, flat, heads.flatten(0, 1)).view_as(state.sums)
    for tensor in (rows, counts, sums):
        sum_over_ranks(tensor)
    state.counts.lerp_(counts, 1 - decay)
    state.sums.lerp_(sums, 1 - decay)
    total = state.counts.sum(1, keepdim=True)
    smooth = (state.counts + eps) / (total + pairs * eps) * total
    state.keys.copy_(state.sums / smooth[..., None])
    threshold = revival * float(rows) / pairs
    codebook, pair = (state.counts < threshold).nonzero(as_tuple=True)
    if len(pair):
        drawn = torch.randint(max(len(heads), 1), pair.shape, generator=generator).to(heads.device)
        moved = _from_rank_0(heads[drawn, codebook])
        state.keys[codebook, pair] = moved
        if consistent:
            state.counts[codebook, pair] = threshold
            state.sums[codebook, pair] = threshold * moved


def sample_heads(heads: Iterable[Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw heads for each codebook (codebooks, pairs, dim_key), without replacement if there are enough.

    A number is drawn for every head and codebook, and those with the least stay: one pass, any number of heads.
    """
    codebooks, pairs, _ = like.shape
    kept, numbers, seen = like[:, :0], torch.zeros(codebooks, 0, device=like.device), 0
    for batch in heads:
        seen += len(batch)
        drawn = torch.rand(codebooks, len(batch), generator=generator).to(like.device)
        numbers, kept = torch.cat([numbers, drawn], 1), torch.cat([kept, batch.transpose(0, 1).to(like)], 1)
        if numbers.shape[1] > pairs:
            numbers, place = numbers.topk(pairs, largest=False, sorted=False)
            kept = kept.gather(1, place[..., None].expand(-1, -1, kept.shape[2]))
    _check_any(seen)
    if seen < pairs:
        more = torch.randint(seen, (codebooks, pairs - seen), generator=generator).to(like.device)
        kept = torch.cat([kept, kept.gather(1, more[..., None].expand(-1, -1, kept.shape[2]))], 1)
    return kept.contiguous()


def check_key_options(method: str, epochs: int, decay: float) -> None:
    """Require what ``find_keys`` takes.

    Raises:
        ValueError: An option is out of range.
    """
    check_choice("method", method, get_args(KeyMethod))
    check_positive("epochs", epochs)
    check_number("decay", decay, zero=True)
    if decay >= 1:
        raise ValueError(f"decay={decay!r} keeps keys where they are; use decay < 1")


def _first_heads(heads: Iterable[Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Sample from as many of the first batches as it takes to have a head for every pair."""
    batches, seen = [], 0
    for batch in heads:
        batches.append(batch)
        seen += len(batch)
        if seen >= like.shape[1]:
            break
    return sample_heads(batches, like, generator)


def _kmeans(heads: Iterable[Tensor], like: Tensor, iterations: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ValueError("method='kmeans' needs scikit-learn: pip install 'memzoo[digits]'") from error

    batches = [batch.cpu() for batch in heads]
    _check_any(sum(map(len, batches)))
    points, pairs = torch.cat(batches).transpose(0, 1), like.shape[1]
    if points.shape[1] < pairs:
        raise ValueError(f"method='kmeans' has {points.shape[1]} heads for num_pairs={pairs}; give as many, or more")
    keys = [
        KMeans(pairs, n_init=1, max_iter=iterations, random_state=seed + number).fit(own.numpy()).cluster_centers_
        for number, own in enumerate(points)
    ]
    return torch.stack([torch.from_numpy(own) for own in keys]).to(like)


def _check_any(seen: int) -> None:
    if not seen:
        raise ValueError("batches hold no vector to find keys for; give at least one, and a mask that leaves one")


def spread() -> bool:
    """Return whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> None:
    """Add up what each rank has, in place."""
    if spread():
        dist.all_reduce(tensor)


def _from_rank_0(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    if spread():
        dist.broadcast(tensor, 0)
    return tensor


def mean_and_scale(batches: Iterable[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (dim,) of vectors (rows, dim), over all ranks, in float64; 1 where it is 0.

    Raises:
        ValueError: There is no vector.
    """
    moments: Tensor | None = None
    for batch in batches:
        wide = batch.double()
        own = torch.cat([wide.new_full((1,), len(wide)), wide.sum(0), wide.square().sum(0)])
        moments = own if moments is None else moments + own
    _check_any(0 if moments is None else int(moments[0]))
    assert moments is not None
    sum_over_ranks(moments)
    count, sums, squares = moments.split([1, dim, dim])
    mean = sums / count
    scale = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean, torch.where(scale > 1e-6 * mean.abs().clamp(min=1e-6), scale, 1.0)
