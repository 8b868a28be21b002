"""What Mixture-of-Memories claims (arXiv 2502.13685), in miniature, on associative recall."""

from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from recall_training import TEST, recalled

from claims import Check, Claim, ClaimSet, Metrics, Settings, beats
from memzoo.arch import CausalLM, GatedDeltaNetLM, MoM
from memzoo.layers import Trace
from memzoo.lit_modules.data import RecallTask
from memzoo.lit_modules.objective import NextTokens

ARCHITECTURES = {"gated_deltanet": GatedDeltaNetLM, "mom": MoM}
TEST_ANSWERS = 4096  # of each test
TEST_ROWS = 64  # on which the load is measured
WIDTH = 8  # of keys and values
VOCABULARY = 64  # with 256, learning starts so late in some runs that seeds differ more than models


def measure(settings: Settings, seed: int) -> Metrics:
    """Train a model and test it."""
    torch.manual_seed(seed)
    model = build(settings)
    metrics = recalled(model, settings, answers=TEST_ANSWERS, seed=seed)
    if settings["options"].get("num_memories", 1) > 1:
        metrics["load entropy"] = load_entropy(model, RecallTask(**settings["test"][HARDEST]), seed)
    return metrics


def build(settings: Settings) -> CausalLM:
    """Build the model of a run."""
    model: CausalLM = ARCHITECTURES[settings["model"]](**settings["options"])
    return model


@torch.no_grad()
def load_entropy(model: CausalLM, task: RecallTask, seed: int) -> float:
    """Return the entropy of how tokens spread over the memories of a block, over its maximum, averaged over blocks."""
    trace = Trace()
    model(NextTokens.of(task.rows(TEST_ROWS, (seed, TEST))).inputs, trace=trace)
    return mean(value.item() for name, value in trace.signals.items() if name.endswith(".load_entropy"))


def shorten(settings: Settings) -> Settings:
    """Leave a run a step of each task."""
    return settings | {"steps": len(settings["train"])}


# Two blocks. Two heads of 8 x 8 a memory hold fewer associations than the 16 that are asked for.


def recall(pairs: int) -> dict[str, Any]:
    """Return the task of so many pairs, in rows as short as can be."""
    return asdict(RecallTask(4 * pairs, pairs, vocab_size=VOCABULARY))


def recalling(model: str, **options: Any) -> Settings:
    """Return the settings of a model, with options of its own."""
    sizes = dict(vocab_size=VOCABULARY, dim=64, depth=2, hidden_dim=64, num_heads=2, head_dim=WIDTH, chunk_size=16)
    return dict(
        model=model,
        options=sizes | options,
        train=[recall(2), recall(4), recall(8), recall(16)],
        test={f"{pairs} pairs": recall(pairs) for pairs in (4, 8, 16)},
        steps=1000,
        tokens=2048,
        learning_rate=5e-3,
    )


def mom(num_memories: int, top_k: int, **options: Any) -> Settings:
    """Return the settings of a mixture of memories, with options of its own."""
    return recalling("mom", num_memories=num_memories, top_k=top_k, **options)


COLUMNS = {name: name for name in recalling("mom")["test"]}
HARDEST = "16 pairs"
SETTING = (
    "Two blocks of width 64, whose memories have two heads with keys and values of width 8; multi-query associative "
    "recall of 2 to 16 pairs among 64 tokens, in rows of four tokens a pair. Accuracy of the answers, 1/32 by chance"
)
SEVERAL = Claim(
    statement="Several small memories recall more than one, and more than one that is as large as what a token uses of "
    "them (recall benchmarks; expansion of memory)",
    test=f"{SETTING}. MoM has 4 memories, of which a token uses 2, and a shared one; one state is a Gated DeltaNet of "
    "the same widths, the wide state has values of three times the width. A memory's short convolution sees the tokens "
    "that went to it; before routing, it sees them all, so that a value meets its key. "
    "Widths are equal, parameters are not: MoM has about half more than one state, the wide one a third.",
    variants={
        "one state": recalling("gated_deltanet"),
        "one wide state": recalling("gated_deltanet", value_dim=3 * WIDTH),
        "MoM": mom(4, 2),
        "MoM, convolution before routing": mom(4, 2, conv="input"),
    },
    columns=COLUMNS,
    checks=tuple(beats("MoM", other, HARDEST) for other in ("one state", "one wide state")),
)
NUMBER = Claim(
    statement="At a fixed ratio of used memories, more memories help (figure of scaling)",
    test="As above, with a shared memory, and half of the others used by a token; of a single one, all of it.",
    variants={"1 memory": mom(1, 1)} | {f"{number} memories": mom(number, number // 2) for number in (2, 4, 8)},
    columns=COLUMNS,
    checks=(
        beats("2 memories", "1 memory", HARDEST),
        beats("4 memories", "2 memories", HARDEST),
        beats("8 memories", "4 memories", HARDEST),
    ),
)
SHARED = Claim(
    statement="The shared memory helps (ablation table)",
    test="As above, with 4 memories of which a token uses 2.",
    variants={"MoM": mom(4, 2), "no shared memory": mom(4, 2, shared=False)},
    columns=COLUMNS,
    checks=(beats("MoM", "no shared memory", HARDEST),),
)
BALANCE = Claim(
    statement="The balance loss helps, and spreads the load (ablation table; figure of the load)",
    test="As above, with the balance loss per layer times 0.01, and without. The load entropy is that of the shares of "
    "tokens the memories of a block get, over its maximum.",
    variants={"MoM": mom(4, 2), "no balance loss": mom(4, 2, balance=None)},
    columns=COLUMNS | {"load entropy": "load entropy"},
    checks=(
        beats("MoM", "no balance loss", HARDEST),
        Check(
            "the load entropy of MoM exceeds that of no balance loss",
            lambda results: results["MoM"]["load entropy"] - results["no balance loss"]["load entropy"],
        ),
    ),
)

CLAIMS = ClaimSet(
    paper="Mixture-of-Memories, arXiv 2502.13685",
    measure=measure,
    shorten=shorten,
    claims={"several": SEVERAL, "number": NUMBER, "shared": SHARED, "balance": BALANCE},
)
