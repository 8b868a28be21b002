"""What Titans claims (arXiv 2501.00663), in miniature: ablations, recall beyond the window, depth of the memory."""

import time
from dataclasses import asdict
from itertools import pairwise
from statistics import correlation, median
from typing import Any

import torch
from recall_training import recalled
from torch import nn

from claims import Check, Claim, ClaimSet, Metrics, Results, Settings, at_least, at_most, beats
from memzoo.arch import TitansLMM, TitansMAC, TitansMAG, TitansMAL, Transformer
from memzoo.lit_modules.data import RecallTask

ARCHITECTURES = {"lmm": TitansLMM, "mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL, "attention": Transformer}
TEST_ANSWERS = 4096  # of each test


def measure(settings: Settings, seed: int) -> Metrics:
    """Train a model and test it, or time it."""
    torch.manual_seed(seed)
    if "lengths" in settings:
        return speed(settings)
    model = build(settings)
    return recalled(model, settings, answers=TEST_ANSWERS, seed=seed)


def build(settings: Settings) -> nn.Module:
    """Build the model of a run."""
    model: nn.Module = ARCHITECTURES[settings["model"]](**settings["options"])
    return model


def shorten(settings: Settings) -> Settings:
    """Leave a run a step of each task, or a single round."""
    return settings | ({"rounds": 1} if "lengths" in settings else {"steps": len(settings["train"])})


# (a), (c): ablations and depth, on episodes of 32 pairs. The memory of width 16 is the only mixer of the only block.

MEMORY: Settings = dict(activation="relu", chunk_size=16, decay_to_init=True, max_gradient_norm=1.0)


def episodes(number: int, pairs: int = 32) -> dict[str, Any]:
    """Return the task of episodes of four tokens a pair, each of which binds the keys anew."""
    return asdict(RecallTask(number * 4 * pairs, pairs, vocab_size=128, episode_length=4 * pairs, power=1.0))


def lmm(**options: Any) -> Settings:
    """Return the settings of a memory, with options of its own."""
    sizes = dict(vocab_size=128, dim=64, depth=1, num_heads=1, head_dim=16, hidden_dim=64)
    return dict(
        model="lmm",
        options=sizes | MEMORY | options,
        train=[episodes(1, 4), episodes(1, 8), episodes(1, 16), episodes(1), episodes(4)],
        test={"1 episode": episodes(1), "4 episodes": episodes(4), "16 episodes": episodes(16)},
        steps=1200,
        tokens=2048,
        learning_rate=5e-3,
    )


EPISODES = {name: f"{name}, {tokens} tokens" for name, tokens in zip(lmm()["test"], (128, 512, 2048), strict=True)}
ABLATION = Claim(
    statement="Forgetting, momentum, a deep memory and the convolution each contribute; without forgetting or a deep "
    "memory, long contexts suffer most (ablation table)",
    test="One block, its only mixer a `NeuralMemory` of width 16, on associative recall in episodes of 32 pairs, keys "
    "bound anew in each; trained on up to 4 episodes, tested on up to 16. Accuracy of the answers, 1/64 by chance. In "
    "one block, nothing but the convolution can bring a key and the value behind it together. Momentum also makes "
    "steps longer, so it is left out a second time at twice the learning rate.",
    variants={
        "full": lmm(),
        "no forgetting": lmm(forgetting=False),
        "no momentum": lmm(momentum=False),
        "no momentum, twice the rate": lmm(momentum=False, max_learning_rate=2 * MEMORY["chunk_size"] ** -0.5),
        "linear memory": lmm(memory_depth=1),
        "no convolution": lmm(conv_width=None),
    },
    columns=EPISODES,
    checks=tuple(
        beats("full", other, "16 episodes")
        for other in (
            "no forgetting",
            "no momentum",
            "no momentum, twice the rate",
            "linear memory",
            "no convolution",
        )
    ),
)
DEPTH = Claim(
    statement="A deeper memory is better (figure of memory depth)",
    test="As above, full, with 1 to 4 layers in the memory. All depths have the same steps and learning rate.",
    variants={f"depth {depth}": lmm() if depth == 2 else lmm(memory_depth=depth) for depth in (1, 2, 3, 4)},
    columns=EPISODES,
    checks=tuple(
        beats(f"depth {deep}", f"depth {shallow}", "16 episodes")
        for deep, shallow in ((2, 1), (3, 1), (4, 1), (3, 2), (4, 3))
    ),
)

# (b): what a window cannot see. Two blocks, so two windows of 8 reach 14 tokens back, less than the gap of 16.

WINDOW = 8
CHANCE = 1 / 16


def gapped(pairs: int, gap: int, stretch: int = 1) -> dict[str, Any]:
    """Return the task of pairs that lie a gap away from their queries, both stretched."""
    length = stretch * (4 * pairs + gap)
    return asdict(RecallTask(length, pairs, vocab_size=32, min_gap=stretch * gap, power=1.0))


def windowed(model: str, **options: Any) -> Settings:
    """Return the settings of a model whose attention sees a window or a segment of 8 tokens."""
    return dict(
        model=model,
        options=dict(vocab_size=32, dim=64, depth=2, num_heads=4, hidden_dim=128) | options,
        # Four pairs at least from the start, and every other task beyond the window: with two, whatever was shown is
        # right half the time, and as long as the window will do, the memory learns nothing.
        train=[gapped(4, 0), gapped(4, 16), gapped(8, 0), gapped(8, 16), gapped(2, 0)],
        test={
            "within": gapped(2, 0),
            "beyond": gapped(8, 16),
            "twice": gapped(8, 16, stretch=2),
            "four times": gapped(8, 16, stretch=4),
        },
        steps=800,
        tokens=2048,
        learning_rate=3e-3,
    )


WITH_MEMORY: Settings = dict(num_persistent_tokens=4, memory=MEMORY | dict(chunk_size=8, num_heads=1, head_dim=16))
BEYOND = ("beyond", "twice", "four times")
RECALL = Claim(
    statement="With a memory, attention over a window recalls what has left the window, beyond the trained length too "
    "(needle in a haystack)",
    test="Two blocks of width 64 with windows or segments of 8 tokens, about 100k parameters each, on associative "
    "recall. Within: 2 pairs, right before their queries. Beyond: 8 pairs, 16 tokens of filler, queries: out of reach "
    "of two windows. All are trained on both and on 4 and 8 pairs with and without the filler, the same batches for "
    "each; tested with rows and gaps of twice and four times the length too. Accuracy of the answers, 1/16 by chance. "
    "MAC writes the sum of the token and what attention makes of it (`residual`).",
    variants={
        "window alone": windowed("attention", window=WINDOW, hidden_dim=184),
        "MAC": windowed("mac", segment_size=WINDOW, residual=True, **WITH_MEMORY),
        "MAG": windowed("mag", window=WINDOW, **WITH_MEMORY),
        "MAL": windowed("mal", window=WINDOW, **WITH_MEMORY),
    },
    columns={
        "within": "within, 8 tokens",
        "beyond": "beyond, 48 tokens",
        "twice": "2x, 96 tokens",
        "four times": "4x, 192 tokens",
    },
    checks=(
        at_least("window alone", ("within",), 0.9),
        at_most("window alone", BEYOND, CHANCE + 0.05),
        *(at_least(name, BEYOND, 0.8) for name in ("MAC", "MAG", "MAL")),
    ),
)

# (c): speed, of the model of (a).


def speed(settings: Settings) -> Metrics:
    """Return the thousands of tokens a second of training steps, for every depth and every length, interleaved."""
    depths, lengths = settings["depths"], settings["lengths"]
    cases = {f"depth {depth}": (depth, lengths[-1]) for depth in depths}
    cases |= {f"length {length}": (2, length) for length in lengths}
    models = {depth: TitansLMM(**settings["options"], memory_depth=depth) for depth in depths}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(settings["rounds"] + 1):
        for name, (depth, length) in cases.items():
            tokens = torch.randint(settings["options"]["vocab_size"], (settings["rows"], length))
            start = time.perf_counter()
            models[depth](tokens)[0].logsumexp(-1).mean().backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: settings["rows"] * length / median(seconds[name][1:]) / 1e3 for name, (_, length) in cases.items()}


TIMED: Settings = dict(
    depths=[1, 2, 3, 4],
    lengths=[256, 512, 1024, 2048],
    rows=4,
    rounds=5,
    options={key: value for key, value in lmm()["options"].items() if key != "memory_depth"},
)


def falls(results: Results) -> float:
    """Return by how much, in thousands of tokens a second, a layer slows down at least."""
    rates = [results["training step"][f"depth {depth}"] for depth in TIMED["depths"]]
    return min(fast - slow for fast, slow in pairwise(rates))


def costs_linearly(results: Results) -> float:
    """Return by how much the correlation of depth and time exceeds 0.98."""
    times = [1 / results["training step"][f"depth {depth}"] for depth in TIMED["depths"]]
    return correlation(TIMED["depths"], times) - 0.98


def stays_flat(results: Results) -> float:
    """Return by how much less than a quarter the speeds of all lengths differ."""
    rates = [results["training step"][f"length {length}"] for length in TIMED["lengths"]]
    return 0.25 - (max(rates) / min(rates) - 1)


SPEED_TEST = "Forward and backward pass of the full model above, 4 rows, one thread; thousands of tokens a second"
SPEED_OF_DEPTHS = Claim(
    statement="Training throughput falls about linearly with the memory's depth (figure of throughput)",
    test=f"{SPEED_TEST}, at 2048 tokens a row.",
    variants={"training step": TIMED},
    columns={f"depth {depth}": f"depth {depth}" for depth in TIMED["depths"]},
    checks=(
        Check("every further layer makes it slower", falls),
        Check("the time a token takes grows linearly: its correlation with the depth exceeds 0.98", costs_linearly),
    ),
    alone=True,
)
SPEED_OF_LENGTHS = Claim(
    statement="Training throughput does not depend on the length (figure of throughput)",
    test=f"{SPEED_TEST}, at a depth of 2.",
    variants={"training step": TIMED},
    columns={f"length {length}": f"length {length}" for length in TIMED["lengths"]},
    checks=(Check("the fastest length is less than 25% faster than the slowest", stays_flat),),
    alone=True,
)

CLAIMS = ClaimSet(
    paper="Titans, arXiv 2501.00663",
    measure=measure,
    shorten=shorten,
    claims={
        "ablation": ABLATION,
        "depth": DEPTH,
        "window": RECALL,
        "speed_of_depths": SPEED_OF_DEPTHS,
        "speed_of_lengths": SPEED_OF_LENGTHS,
    },
)
