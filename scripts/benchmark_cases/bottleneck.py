"""Benchmarks of the discrete key-value bottleneck at the size of its paper: looking keys up, reading, training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark_cases.case import Case, Variant, Work, missing
from memzoo.layers import DiscreteKeyValueBottleneck, IndexCache
from memzoo.layers.ops.nearest_key import nearest_key

BATCH, DIM, CODEBOOKS, PAIRS, DIM_KEY, CLASSES = 64, 512, 256, 4096, 14, 10
CACHED_SAMPLES = 1024
FULL = "baddbmm over all keys, argmin"
CACHED, UNCACHED = "memzoo, from cached indices", "memzoo, looked up in each step"
PEER = "discrete-key-value-bottleneck-pytorch 0.1.1"
PACKAGE = "discrete_key_value_bottleneck_pytorch"


def lookup() -> Work:
    """Find the nearest key of every head."""
    heads, keys = torch.randn(BATCH, CODEBOOKS, DIM_KEY), torch.randn(CODEBOOKS, PAIRS, DIM_KEY)
    return lambda: nearest_key(heads, keys)


def full_lookup() -> Work:
    """The same by all scores at once."""
    heads, keys = torch.randn(BATCH, CODEBOOKS, DIM_KEY), torch.randn(CODEBOOKS, PAIRS, DIM_KEY)

    def work() -> Tensor:
        lengths = keys.square().sum(-1)[:, None]
        scores = torch.baddbmm(lengths, heads.transpose(0, 1), keys.mT, alpha=-2)
        return scores.argmin(-1)

    return work


def bottleneck() -> DiscreteKeyValueBottleneck:
    """Build ours, with random keys."""
    built = DiscreteKeyValueBottleneck(
        DIM, num_codebooks=CODEBOOKS, num_pairs=PAIRS, dim_key=DIM_KEY, dim_value=CLASSES
    )
    built.freeze_keys()
    return built


def peer() -> torch.nn.Module:
    """Build the peer's of the same size: without ``codebook_dim`` its keys would be as wide as all heads together."""
    from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck as Peer

    built: torch.nn.Module = Peer(
        dim=DIM_KEY,
        dim_embed=DIM,
        num_memories=PAIRS,
        num_memory_codebooks=CODEBOOKS,
        dim_memory=CLASSES,
        codebook_dim=DIM_KEY,
    )
    return built


def read(of_peer: bool) -> Work:
    """Logits of representations, in evaluation."""
    z = torch.randn(BATCH, 1, DIM)
    if of_peer:
        theirs = peer().eval()
        return torch.no_grad()(lambda: theirs(z))
    ours = bottleneck().eval()
    return torch.no_grad()(lambda: ours.vote(ours.lookup(z)))


def learn(cached: bool) -> Work:
    """A step of SGD on a batch, whose indices were kept, or are looked up; gradients are those of what was fetched."""
    ours, z, labels = bottleneck().train(), torch.randn(BATCH, DIM), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.SGD(ours.trainable_parameters(), lr=0.3)
    cache = IndexCache(torch.randint(PAIRS, (CACHED_SAMPLES, CODEBOOKS, 1, 1)), PAIRS, ours.fingerprint())

    def work() -> None:
        indices = cache[torch.randint(CACHED_SAMPLES, (BATCH,))] if cached else ours.lookup(z)
        optimizer.zero_grad()
        F.cross_entropy(ours.vote(indices, sparse=True), labels, label_smoothing=0.1).backward()
        optimizer.step()

    return work


def learn_peer() -> Work:
    """The same of the peer, whose keys move in every step of training."""
    theirs, z, labels = peer().train(), torch.randn(BATCH, 1, DIM), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.SGD([theirs.values], lr=0.3)

    def work() -> None:
        optimizer.zero_grad()
        F.cross_entropy(theirs(z)[:, 0], labels, label_smoothing=0.1).backward()
        optimizer.step()

    return work


SIZES = f"{BATCH} samples, {CODEBOOKS} codebooks of {PAIRS:,} pairs, keys of width {DIM_KEY}"
CASES = [
    Case(
        "bottleneck_lookup",
        "bottleneck",
        f"Nearest key of every head: {SIZES}",
        [Variant("memzoo nearest_key", lookup, BATCH), Variant(FULL, full_lookup, BATCH)],
        note="Tokens are samples, here and below. Beside what is returned, all scores at once are 268 MB; ours stay "
        "within a budget, find the same indices and give squared distances too.",
        targets={FULL: 1 / 1.3},
        most_memory={FULL: 0.04},
    ),
    Case(
        "bottleneck_read",
        "bottleneck",
        f"Logits of representations of width {DIM}, in evaluation: {SIZES}",
        [
            Variant("memzoo", lambda: read(False), BATCH),
            Variant(PEER, lambda: read(True), BATCH, missing=missing(PACKAGE)),
        ],
        note="The peer is given `codebook_dim`, without which its keys are as wide as all heads together, 15 GB.",
        targets={PEER: 3.0},
        most_memory={PEER: 0.2},
    ),
    Case(
        "bottleneck_train",
        "bottleneck",
        f"A step of SGD on the values: {SIZES}",
        [
            Variant(CACHED, lambda: learn(True), BATCH),
            Variant(UNCACHED, lambda: learn(False), BATCH),
            Variant(PEER, learn_peer, BATCH, missing=missing(PACKAGE)),
        ],
        note="Without the encoder, which only the first does without. The peer moves its keys in every such step.",
        targets={UNCACHED: 50.0, PEER: 3.0},
        most_memory={PEER: 0.2},
    ),
]
