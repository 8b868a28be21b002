"""What B'MOJO claims (arXiv 2407.06324), in miniature: recall, what the stored tokens are worth, and longer texts."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from math import log
from typing import Any, cast

import torch
from recall_training import fit, recalled
from torch import Tensor
from torch.nn import functional as F

from claims import Check, Claim, ClaimSet, Metrics, Settings, beats
from memzoo.arch import Block, BMojoLM, CausalLM
from memzoo.layers import Mamba2, SlidingWindowAttention, SwiGLU
from memzoo.lit_modules.data import RecallTask, TextData
from memzoo.lit_modules.objective import NextTokens

TEST_ANSWERS = 4096  # of each test


def measure(settings: Settings, seed: int) -> Metrics:
    """Train a model and test it, on recall or on text."""
    torch.manual_seed(seed)
    model = build(settings)
    if "lengths" in settings:
        return read(model, settings, seed)
    return recalled(model, settings, answers=TEST_ANSWERS, seed=seed)


def build(settings: Settings) -> CausalLM:
    """Build the model of a run: B'MOJO with some options, or blocks of Mamba-2, alone or with windows in between."""
    sizes, options = settings["sizes"], settings["options"]
    if settings["model"] == "bmojo":
        return BMojoLM(**sizes, **options)
    dim, windows = sizes["dim"], options.get("windows", 0)
    ssm = {name: value for name, value in options.items() if name != "windows"}
    blocks = []
    for index in range(sizes["depth"]):
        attends = windows and index % 2
        mixer = window_of(dim, windows) if attends else Mamba2(dim, **ssm)
        blocks.append(Block(mixer, SwiGLU(dim, hidden_dim=sizes["hidden_dim"])))
    return CausalLM(sizes["vocab_size"], dim, blocks)


def window_of(dim: int, window: int) -> SlidingWindowAttention:
    """Build the attention of a stacked hybrid, like that of B'MOJO."""
    return SlidingWindowAttention(dim, num_heads=2, window=window, qk_norm=True)


def costs(settings: Settings) -> str:
    """Say how many parameters a model has, and numbers a block of its state."""
    with torch.device("meta"):
        model = build(settings)
    held = [tensor.numel() for tensor in model.initial_state(1).named_tensors().values() if tensor.is_floating_point()]
    return f"{model.num_parameters():,} and {sum(held) // settings['sizes']['depth']:,}"


def listed(variants: Mapping[str, Settings]) -> str:
    """Say so of several models."""
    return "; ".join(f"{name} {costs(settings)}" for name, settings in variants.items())


def shorten(settings: Settings) -> Settings:
    """Leave a run a step of each task."""
    return settings | ({"steps": 1, "test_bytes": 1} if "lengths" in settings else {"steps": len(settings["train"])})


# (a), (b), (c): recall. But in the easiest rows, the pairs leave every window before a key is asked for.

VOCABULARY = 64
WINDOW = 8
HARDEST = "8 pairs"


def recall(length: int, pairs: int, gap: int) -> dict[str, Any]:
    """Return the task of so many pairs in rows of a length, asked for behind a gap of one filler token, repeated."""
    return asdict(RecallTask(length, pairs, vocab_size=VOCABULARY, min_gap=gap, power=1.0))


def recalling(model: str, **options: Any) -> Settings:
    """Return the settings of a model, with options of its own."""
    return dict(
        model=model,
        sizes=dict(vocab_size=VOCABULARY, dim=64, depth=2, hidden_dim=64),
        options=options,
        train=[recall(32, 2, 4), recall(64, 4, 16), recall(128, 8, 16)],
        test={"4 pairs": recall(64, 4, 16), HARDEST: recall(128, 8, 16)},
        steps=2000,
        tokens=2048,
        learning_rate=3e-3,
    )


SSM: dict[str, Any] = dict(head_dim=32, state_dim=8, chunk_size=16)


def bmojo(**options: Any) -> Settings:
    """Return the settings of B'MOJO, with options of its own."""
    return recalling("bmojo", **dict(num_heads=2, window=WINDOW, ssm_options=SSM) | options)


def eidetic(size: int, **options: Any) -> Settings:
    """Return the settings of B'MOJO with so many stored tokens."""
    return bmojo(num_eidetic=size, **options)


COLUMNS = {name: name for name in recalling("bmojo")["test"]}
SETTING = (
    "Two blocks of width 64 with windows of 8 tokens and, for the state space, Mamba-2 with 8 numbers a channel; "
    "multi-query associative recall of 2 to 8 pairs among 64 tokens, in rows of up to 128 tokens filled with one "
    "constant token, 4 and 8 pairs asked for at least 16 tokens behind the last one. 2000 steps of 2048 tokens at "
    "3e-3. Accuracy of the answers, 1/32 by chance, and 1/4 and 1/8 for one of the values of the row"
)
ORDERED = {
    "sliding window": bmojo(fading_span=0),
    "Mamba-2": recalling("ssm", **SSM),
    "Mamba-2, as many numbers": recalling("ssm", **SSM | {"state_dim": 48}),
    "Mamba-2, then a window": recalling("ssm", **SSM, windows=2 * WINDOW),
    "B'MOJO-F": eidetic(0),
    "B'MOJO-F, no lag": eidetic(0, fading_lag=0, tie_projections=False),
    "B'MOJO": eidetic(16),
}
ORDER = Claim(
    statement="At equal memory more recall (MQAR) than Mamba and stacked hybrids, by B'MOJO and by B'MOJO-F, as others "
    "report the paper's figures",
    test=f"{SETTING}. B'MOJO stores 16 tokens. Mamba-2 is a second time with about as many numbers as that, 48 a "
    "channel; the stacked hybrid has a window of 16 in its second block. B'MOJO-F is a second time without the "
    "official lag, so that a query also reads the output of the state space at its own place, and with projections of "
    f"its own for fading tokens. Parameters, and numbers that a block keeps for a row: {listed(ORDERED)}.",
    variants=ORDERED,
    columns=COLUMNS,
    checks=(
        beats("Mamba-2", "sliding window", HARDEST),
        beats("B'MOJO-F", "Mamba-2", HARDEST),
        beats("B'MOJO-F, no lag", "Mamba-2", HARDEST),
        beats("B'MOJO", "B'MOJO-F", HARDEST),
        beats("B'MOJO", "Mamba-2", HARDEST),
        beats("B'MOJO", "Mamba-2, as many numbers", HARDEST),
        beats("B'MOJO", "Mamba-2, then a window", HARDEST),
    ),
)
SIZE = Claim(
    statement="Recall rises with the eidetic memory, then saturates, as others report the paper's figures",
    test="As above, B'MOJO with 0 to 32 stored tokens. The 8 pairs are 16 tokens.",
    variants={f"{size} stored tokens": eidetic(size) for size in (0, 4, 8, 16, 32)},
    columns=COLUMNS,
    checks=(
        beats("8 stored tokens", "0 stored tokens", HARDEST),
        beats("16 stored tokens", "8 stored tokens", HARDEST),
        Check(
            "from 16 to 32 stored tokens it rises by less than half as much as from 8 to 16",
            lambda results: (
                0.5 * (results["16 stored tokens"][HARDEST] - results["8 stored tokens"][HARDEST])
                - (results["32 stored tokens"][HARDEST] - results["16 stored tokens"][HARDEST])
            ),
        ),
    ),
)
SELECTION = Claim(
    statement="Tokens that are hard to predict are the ones to store (innovation test)",
    test="As above, B'MOJO with 16 stored tokens, chosen by innovation; at random, by a hash of the position that is "
    "the same for all rows and seeds; as the latest ones, which cannot hold the pairs, since they are asked for later; "
    "or as the first ones, which are the pairs, since every row begins with them: what a perfect choice is worth.",
    variants={
        "innovation": eidetic(16),
        "random": eidetic(16, selection="random"),
        "latest": eidetic(16, selection="fifo"),
        "first": eidetic(16, predictor_taps=16, warmup_score=9.0),
    },
    columns=COLUMNS,
    checks=(beats("innovation", "random", HARDEST), beats("innovation", "latest", HARDEST)),
)

# (d): text, four times as long as what the models were trained on.

LENGTH = 256
LENGTHS = (LENGTH, 2 * LENGTH, 4 * LENGTH)
BEHIND, ALONE = "behind 768 tokens", "the same, behind none"
TEXT_SSM: dict[str, Any] = dict(expansion=1, head_dim=32, state_dim=32)


def reading(model: str, **options: Any) -> Settings:
    """Return the settings of a model of text, with options of its own."""
    return dict(
        model=model,
        sizes=dict(vocab_size=256, dim=128, depth=4, hidden_dim=360),
        options=options,
        lengths=list(LENGTHS),
        steps=700,
        rows=4,
        learning_rate=3e-3,
        test_bytes=2**17,  # the same for every length
    )


def read(model: CausalLM, settings: Settings, seed: int) -> Metrics:
    """Train a model on rows of text, and return its bits per byte on rows of every length, of the same held-out text.

    The last quarters of the longest rows, at places that training never showed, are rows of their own at the trained
    length: "behind 768 tokens" and "the same, behind none".
    """
    shortest, *longer = settings["lengths"]
    data = TextData(
        sequence_length=shortest,
        batch_size=settings["rows"],
        pack_documents=False,
        val_sequence_lengths=longer,
        seed=seed,
    )
    batches = map(NextTokens.of, islice(data.train_dataloader(), settings["steps"]))
    fit(model, batches, steps=settings["steps"], learning_rate=settings["learning_rate"])
    loaders = cast(dict[str, Any], data.val_dataloader())
    found = {length: bits(model, loaders[str(length)], settings["test_bytes"]) for length in settings["lengths"]}
    metrics = {f"{length} tokens": float(every.mean()) for length, every in found.items()}
    fold = longer[-1] // shortest
    metrics[BEHIND] = float(found[longer[-1]][:, -shortest:].mean())
    metrics[ALONE] = float(found[shortest][fold - 1 :: fold].mean())
    return metrics


@torch.no_grad()
def bits(model: CausalLM, loader: Iterable[Mapping[str, Tensor]], count: int) -> Tensor:
    """Return the bits of every byte of the first ``count`` or so, in rows."""
    rows: list[Tensor] = []
    for batch in map(NextTokens.of, loader):
        logits, _ = model(batch.inputs)
        rows.append(F.cross_entropy(logits.movedim(-1, 1), batch.targets, reduction="none") / log(2))
        if sum(map(Tensor.numel, rows)) >= count:
            break
    return torch.cat(rows)


def lower(better: str, worse: str) -> Check:
    """One variant needs fewer bits than another at places that training never showed, seed by seed."""
    return Check(
        f"{better} needs fewer bits per byte than {worse}, {BEHIND}",
        lambda results: results[worse][BEHIND] - results[better][BEHIND],
    )


def profits(variant: str) -> Check:
    """A variant needs fewer bits for the same bytes where it has read more before them than in training."""
    return Check(
        f"{variant} needs fewer bits per byte {BEHIND} than for the same bytes behind none",
        lambda results: results[variant][ALONE] - results[variant][BEHIND],
    )


def text_bmojo(**options: Any) -> Settings:
    """Return the settings of B'MOJO as a model of text, with options of its own."""
    return reading("bmojo", **dict(num_heads=4, window=32, ssm_options=TEXT_SSM) | options)


READERS = {
    "sliding window": text_bmojo(fading_span=0),
    "sliding window, twice as wide": text_bmojo(fading_span=0, window=64),
    "full attention": text_bmojo(fading_span=0, window=LENGTHS[-1]),
    "Mamba-2": reading("ssm", **TEXT_SSM | {"expansion": 2}),
    "B'MOJO-F": text_bmojo(),
    "B'MOJO": text_bmojo(num_eidetic=16, eidetic_positions="clamp"),
}
LONGER = Claim(
    statement="Trained on up to 8K tokens, better inference up to 32K",
    test="Four blocks of width 128, windows of 32 tokens, Mamba-2 with 32 numbers a channel, on the bytes of Python's "
    "standard library: 700 steps of 4 rows of 256 bytes. Bits per byte of the same held-out text, cut into rows of up "
    "to four times that length; then those of the last quarters of the longest rows, and those of the same bytes as "
    "rows of their own. B'MOJO stores 16 tokens a block, whose distance is clipped to twice the window. Parameters, "
    f"and numbers that a block keeps for a row: {listed(READERS)}.",
    variants=READERS,
    columns={f"{length} tokens": f"rows of {length}" for length in LENGTHS} | {name: name for name in (BEHIND, ALONE)},
    checks=(
        *(lower("B'MOJO", other) for other in READERS if not other.startswith("B'MOJO")),
        *(lower("B'MOJO-F", other) for other in READERS if not other.startswith("B'MOJO")),
        profits("B'MOJO"),
        profits("B'MOJO-F"),
    ),
)

CLAIMS = ClaimSet(
    paper="B'MOJO, arXiv 2407.06324",
    measure=measure,
    shorten=shorten,
    claims={"order": ORDER, "size": SIZE, "selection": SELECTION, "longer": LONGER},
)
