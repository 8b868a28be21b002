"""What pretraining with hierarchical memories claims (arXiv 2510.02375), in miniature."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from claims import Check, Claim, ClaimSet, Metrics, Results, Settings
from memzoo.arch import HierarchicalMemoryLM, create_model
from memzoo.layers import MemoryBank
from memzoo.lit_modules.bank_optimizer import BankAdamW
from memzoo.lit_modules.data import TopicData
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.optim import parameter_groups
from memzoo.lit_modules.schedule import make_scheduler

BUCKETS = ("common", "frequent", "middle", "rare")
FETCHED, GENERIC, WRONG, NONE = READINGS = ("fetched", "generic", "wrong path", "none")
BLOCKED = ("common", "rare")  # buckets that are asked for while subtrees are blocked


def measure(settings: Settings, seed: int) -> Metrics:
    """Train an anchor, then a bank of memories, with it or alone, and return what is known of the facts."""
    torch.manual_seed(seed)
    data = TopicData(**settings["data"], seed=seed)
    sizes = settings["sizes"] | {"vocab_size": data.vocab_size}
    model = cast(HierarchicalMemoryLM, create_model("hier_memory_tiny", **sizes))
    batches = cycled(data)
    train(model, None, batches, settings, steps=settings["alone"], seed=seed)
    asked = {bucket: Asked.of(data, bucket) for bucket in BUCKETS}
    if not settings["together"]:
        return readings(model.eval(), None, asked, seed)
    layout = model.layout(settings["rows"], branching=data.branching, dtype=torch.float32)
    bank = MemoryBank.create(data.tree, layout, seed=seed)
    model.requires_grad_(not settings["frozen"])
    train(model, bank, batches, settings, steps=settings["together"], seed=seed)
    return readings(model.eval(), bank, asked, seed) | blocking(model, bank, {name: asked[name] for name in BLOCKED})


# Training


def cycled(data: TopicData) -> Iterator[Mapping[str, Tensor]]:
    """Yield the batches of one epoch after another."""
    loader, epoch = cast(Any, data.train_dataloader()), 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(
    model: HierarchicalMemoryLM,
    bank: MemoryBank | None,
    batches: Iterator[Mapping[str, Tensor]],
    settings: Settings,
    *,
    steps: int,
    seed: int,
) -> None:
    """Train a model, unless it is frozen, and the blocks of a bank on the next batches: warm-up, then a cosine.

    One row in ``branching + 1`` reads the generic blocks.
    """
    if not steps:
        return
    optimizer = make_optimizer(model, bank, settings)
    scheduler = make_scheduler(optimizer, "cosine", warmup_steps=min(settings["warmup"], steps), max_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows, given = next(batches), {}
        if isinstance(optimizer, BankAdamW):
            paths, layout = rows["paths"], optimizer.bank.layout
            generic = torch.rand(len(paths), 1, generator=generator) < 1 / (layout.branching + 1)
            given["memories"] = optimizer.fetch(optimizer.bank.generic_paths(len(paths)).where(generic, paths))
        batch = NextTokens.of(rows)
        logits, _ = model(batch.inputs, mask=batch.mask, doc_ids=batch.doc_ids, **given)
        optimizer.zero_grad()
        batch.mean(batch.losses(logits)).backward()
        nn.utils.clip_grad_norm_([own for group in optimizer.param_groups for own in group["params"]], 1.0)
        optimizer.step()
        scheduler.step()


def make_optimizer(model: HierarchicalMemoryLM, bank: MemoryBank | None, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimiser of a model, of a bank if the model is frozen, or of both."""
    trained = any(own.requires_grad for own in model.parameters())
    groups = parameter_groups(model, settings["weight_decay"]) if trained else []
    options: dict[str, Any] = dict(lr=settings["learning_rate"], betas=(0.9, 0.95))
    if bank is None:
        return torch.optim.AdamW(groups, **options)
    options |= dict(memory_lr=settings["memory_learning_rate"], memory_weight_decay=settings["memory_weight_decay"])
    return BankAdamW(groups, bank, **options)


# Questions


@dataclass(frozen=True)
class Asked:
    """Questions for facts.

    Attributes:
        tokens: (questions, time + 1); the last is the value.
        paths: (questions, depth) where their words lead.
        embeddings: (questions, width) of their words.
    """

    tokens: Tensor
    paths: Tensor
    embeddings: Tensor

    @classmethod
    def of(cls, data: TopicData, bucket: str) -> Self:
        """Return the test's questions for the facts of a bucket."""
        rows = data.questions("test", bucket)
        batch = rows[range(len(rows))]
        return cls(batch["tokens"], batch["paths"], data.embed(batch["tokens"]))

    def where(self, chosen: Tensor) -> Self:
        """Return some of the questions."""
        return type(self)(self.tokens[chosen], self.paths[chosen], self.embeddings[chosen])

    def hits(self, logits: Tensor) -> Tensor:
        """Return which questions are answered, (questions,) zeros and ones."""
        return (logits.argmax(-1) == self.tokens[:, -1]).double()


@torch.no_grad()
def answers(model: HierarchicalMemoryLM, bank: MemoryBank | None, asked: Asked, paths: Tensor) -> Tensor:
    """Return the logits of the values, (questions, vocabulary), with the blocks on some paths, or none."""
    memories = None if bank is None else bank.fetch(paths)
    features, _ = model.forward_features(asked.tokens[:, :-1], memories=memories)
    return model.forward_head(features[:, -1])


def readings(model: HierarchicalMemoryLM, bank: MemoryBank | None, asked: Mapping[str, Asked], seed: int) -> Metrics:
    """Return the share of each bucket that is known with fetched, generic and wrong blocks, and with none."""
    metrics: Metrics = {}
    for bucket, own in asked.items():
        read = {NONE: answers(model, None, own, own.paths)}
        if bank is not None:
            paths = {
                FETCHED: own.paths,
                GENERIC: bank.generic_paths(len(own.paths)),
                WRONG: wrong_paths(own.paths, seed),
            }
            read |= {reading: answers(model, bank, own, path) for reading, path in paths.items()}
        metrics |= {f"{bucket}, {reading}": float(own.hits(logits).mean()) for reading, logits in read.items()}
    return metrics


def wrong_paths(paths: Tensor, seed: int) -> Tensor:
    """Give every row the path of another, drawn among those that share no node with its own."""
    strangers = (paths[:, :1] != paths[:, 0]).double()
    drawn = torch.multinomial(strangers, 1, generator=torch.Generator().manual_seed(seed))
    return paths[drawn.squeeze(-1)]


def blocking(model: HierarchicalMemoryLM, bank: MemoryBank, asked: Mapping[str, Asked]) -> Metrics:
    """Block each subtree of the root in turn, and return what is known of its own facts and of all others.

    Blocked nodes are omitted, or passed over in favour of the next nearest ("rerouted"). Beside that, the largest
    changes of a logit: of the others' answers meanwhile, and of the subtree's own once it is free again.
    """
    hits: dict[str, list[Tensor]] = {}
    changes: dict[str, float] = {}

    def read(asked: Asked, *, reroute: bool = False) -> Tensor:
        return answers(model, bank, asked, bank.route(asked.embeddings, reroute=reroute))

    for bucket, every in asked.items():
        for node in every.paths[:, 0].unique().tolist():
            inside = every.paths[:, 0] == node
            own, others = every.where(inside), every.where(~inside)
            own_before, others_before = read(own), read(others)
            bank.block(1, node, subtree=True)
            omitted, rerouted, others_after = read(own), read(own, reroute=True), read(others, reroute=True)
            bank.unblock(1, node, subtree=True)
            for name, which, logits in (
                ("own", own, own_before),
                ("own, omitted", own, omitted),
                ("own, rerouted", own, rerouted),
                ("others", others, others_before),
                ("others, blocked", others, others_after),
            ):
                hits.setdefault(f"{bucket}, {name}", []).append(which.hits(logits))
            for name, after, before in (("others", others_after, others_before), ("unblocked", read(own), own_before)):
                changes[name] = max(changes.get(name, 0.0), float((after - before).abs().max()))
    metrics = {name: float(torch.cat(found).mean()) for name, found in hits.items()}
    return metrics | {f"change of {name}": value for name, value in changes.items()}


def shorten(settings: Settings) -> Settings:
    """Leave a run a step of each part, on few documents."""
    few = {"num_topics": 8, "facts_per_topic": 16, "train_documents": 128, "max_questions": 16}
    steps = {name: min(1, settings[name]) for name in ("alone", "together")}
    return settings | steps | {"data": settings["data"] | few}


# Settings

DATA: Settings = dict(
    num_topics=64,
    facts_per_topic=128,
    num_common_facts=16,
    num_values=256,
    words_per_topic=3,
    num_statements=8,
    branching=4,
    depth=3,
    train_documents=16384,
    documents_per_row=4,
    batch_size=32,
    max_questions=1024,
)
TRAINING: Settings = dict(
    data=DATA,
    sizes=dict(dim=64, depth=2, num_heads=2, hidden_dim=192),
    learning_rate=3e-3,
    weight_decay=0.1,
    memory_learning_rate=1e-2,
    memory_weight_decay=1e-3,
    warmup=30,
)
STEPS = 256  # two epochs


def trained(*, alone: int = 0, together: int = 0, frozen: bool = False, rows: Sequence[int] = (32, 16, 8)) -> Settings:
    """Return the settings of a run whose anchor is trained alone, and then with memories."""
    return TRAINING | dict(alone=alone, together=together, frozen=frozen, rows=list(rows))


ALONE, SCRATCH, COTRAINED, FROZEN = "anchor alone", "from scratch", "co-trained", "frozen anchor"
RUNS = {
    ALONE: trained(alone=STEPS),
    SCRATCH: trained(together=STEPS),
    COTRAINED: trained(alone=STEPS // 2, together=STEPS // 2),
    FROZEN: trained(alone=STEPS // 2, together=STEPS // 2, frozen=True),
}


@dataclass(frozen=True)
class Row:
    """What one reading of one run knows."""

    variant: str
    reading: str

    def __str__(self) -> str:
        return f"{self.variant} ({self.reading})"


def known(row: Row, bucket: str) -> Callable[[Results], float]:
    """Return what reads the share of a bucket that is known."""
    return lambda results: results[row.variant][f"{bucket}, {row.reading}"]


def knows_more(better: Row, worse: Row, bucket: str, by: float = 0.01) -> Check:
    """One reading knows more facts of a bucket than another, by more than a share, seed by seed."""
    more, less = known(better, bucket), known(worse, bucket)
    return Check(
        f"{bucket} facts: {better} knows more than {worse}, by more than {by:g}",
        lambda results: more(results) - less(results) - by,
    )


def knows_fewer(row: Row, other: Row, bucket: str) -> Check:
    """A reading knows fewer facts of a bucket than another."""
    one, two = known(row, bucket), known(other, bucket)
    return Check(f"{bucket} facts: {row} knows fewer than {other}", lambda results: two(results) - one(results))


def knows_as_much(row: Row, other: Row, bucket: str, within: float = 0.02) -> Check:
    """Two readings know about the same share of a bucket."""
    one, two = known(row, bucket), known(other, bucket)
    return Check(
        f"{bucket} facts: {row} knows as much as {other}, within {within:g}",
        lambda results: within - abs(one(results) - two(results)),
    )


def same_to_the_bit(variant: str, metric: str, what: str) -> Check:
    """Nothing changed: the margin is 1e-9 then, and below 0 for the least change of a logit that shows."""
    return Check(f"{variant}: {what} to the bit", lambda results: 1e-9 - results[variant][metric])


def loses(variant: str, how: str, by: float) -> Check:
    """A blocked subtree's rare facts are lost."""
    return Check(
        f"{variant}: of a subtree's rare facts more than {by:g} are lost where it is {how}",
        lambda results: results[variant]["rare, own"] - results[variant][f"rare, own, {how}"] - by,
    )


def keeps_common(variant: str, how: str, within: float = 0.02) -> Check:
    """A blocked subtree's documents still know the common facts."""
    return Check(
        f"{variant}: a subtree's documents know the common facts, within {within:g}, where it is {how}",
        lambda results: within + results[variant][f"common, own, {how}"] - results[variant]["common, own"],
    )


def columns(buckets: Iterable[str], readings: Iterable[str]) -> dict[str, str]:
    """Return the columns of what some readings know of some buckets."""
    return {name: name for name in (f"{bucket}, {reading}" for bucket in buckets for reading in readings)}


NO_MEMORIES = Row(ALONE, NONE)
FREQUENCY = Claim(
    statement="Memories hold the long tail: fetched ones know more rare facts than generic ones of the same size, and "
    "these more than the anchor; common facts are known to all",
    test="TopicData: 64 topics with 128 facts of 8 bits each, and 16 common facts, in 16384 documents that are read "
    "twice: 256 batches of 32 rows of 96 tokens. An epoch tells a common fact 2180 times, a middle one 23, a rare one "
    "(6592 of 8208) 5. Anchor: two blocks of width 64, 147,008 parameters. Bank: k = 4, p = 3, r = (32, 16, 8), "
    "344,064 numbers, 21,504 of which a document fetches; one row in five reads the generic blocks. From scratch: both "
    "are trained in all steps. Frozen anchor: the anchor in the first half, then the bank alone. Anchor alone: without "
    "a bank, in all steps. A column says which facts, and which blocks are read. 1024 questions each, behind words "
    "drawn anew; common facts are answered by all, so that their equality sits at its ceiling. Learning rates are the "
    "recipe's: 3e-3, the bank's 1e-2. Facts, sizes and steps were chosen by trial, among three settings, with a seed "
    "that is not among these. In the paper the generic blocks are above the anchor "
    "as it was before (35.7% of specific knowledge against 34.1%), and from scratch they are not (33.8%).",
    variants={name: RUNS[name] for name in (ALONE, SCRATCH, FROZEN)},
    columns=columns(("rare", "middle", "common"), (FETCHED, GENERIC, NONE)),
    checks=(
        knows_more(Row(SCRATCH, FETCHED), Row(SCRATCH, GENERIC), "rare"),
        knows_more(Row(SCRATCH, GENERIC), NO_MEMORIES, "rare"),
        knows_more(Row(SCRATCH, FETCHED), NO_MEMORIES, "rare"),
        knows_as_much(Row(SCRATCH, FETCHED), Row(SCRATCH, GENERIC), "common"),
        knows_as_much(Row(SCRATCH, FETCHED), NO_MEMORIES, "common"),
        knows_more(Row(FROZEN, FETCHED), Row(FROZEN, GENERIC), "rare"),
        knows_more(Row(FROZEN, GENERIC), Row(FROZEN, NONE), "rare"),
        knows_as_much(Row(FROZEN, FETCHED), Row(FROZEN, NONE), "common"),
    ),
)

PATHS = Claim(
    statement="What counts is that the blocks fit: those of a wrong path are no better than generic ones",
    test="The same runs. A wrong path is that of another question, drawn among those that share no node with the right "
    "one.",
    variants={name: RUNS[name] for name in (SCRATCH, FROZEN)},
    columns=columns(("rare", "middle"), READINGS),
    checks=tuple(
        knows_fewer(Row(variant, WRONG), Row(variant, GENERIC), bucket)
        for variant in (SCRATCH, FROZEN)
        for bucket in ("rare", "middle")
    ),
)

BLOCKING = Claim(
    statement="Blocking the part of the bank that fits a topic takes its facts away, and no others",
    test="The same runs. Each of the four subtrees of the root is blocked in turn, all its nodes. Own: the questions "
    "whose words lead there, which then read nothing (omitted), or the path of the next nearest nodes that are free "
    "(rerouted). Others: all other questions, routed around what is blocked. Change: the largest of a logit, of the "
    "others' answers meanwhile, and of the subtree's own after it was unblocked. A change of nothing has a margin of "
    "1e-9.",
    variants={name: RUNS[name] for name in (SCRATCH, FROZEN)},
    columns={
        "rare, own": "rare",
        "rare, own, omitted": "rare, omitted",
        "rare, own, rerouted": "rare, rerouted",
        "common, own": "common",
        "common, own, omitted": "common, omitted",
        "common, own, rerouted": "common, rerouted",
        "rare, others": "others' rare",
        "rare, others, blocked": "others' rare, blocked",
        "change of others": "change of others",
        "change of unblocked": "change of unblocked",
    },
    checks=tuple(
        check
        for variant in (SCRATCH, FROZEN)
        for check in (
            loses(variant, "omitted", 0.1),
            loses(variant, "rerouted", 0.1),
            keeps_common(variant, "omitted"),
            keeps_common(variant, "rerouted"),
            same_to_the_bit(variant, "change of others", "all other answers stay as they were"),
            same_to_the_bit(variant, "change of unblocked", "unblocking brings a subtree's answers back"),
        )
    ),
)

REGIMES = Claim(
    statement="Training the anchor together with its memories is better than keeping it frozen, and than training both "
    "from scratch",
    test='As above, all runs on as many tokens. "Co-trained" trains the anchor for the first half, and then both. The '
    'reading "none" of the frozen anchor is the anchor as it is before the second half. The paper has 40.3% of '
    "specific knowledge with a co-trained anchor, 39.2% with a frozen one, 39.6% from scratch on as many tokens, 34.1% "
    "with the anchor before.",
    variants=RUNS,
    columns=columns(("rare", "middle"), (FETCHED, GENERIC, NONE)) | columns(("common",), (FETCHED,)),
    checks=(
        knows_more(Row(COTRAINED, FETCHED), Row(FROZEN, FETCHED), "rare"),
        knows_more(Row(COTRAINED, GENERIC), Row(FROZEN, GENERIC), "rare"),
        knows_as_much(Row(COTRAINED, FETCHED), Row(FROZEN, FETCHED), "common"),
        knows_more(Row(COTRAINED, FETCHED), Row(SCRATCH, FETCHED), "rare"),
        knows_more(Row(COTRAINED, GENERIC), Row(FROZEN, NONE), "rare"),
        knows_more(Row(COTRAINED, FETCHED), NO_MEMORIES, "rare"),
        knows_more(Row(FROZEN, FETCHED), NO_MEMORIES, "rare"),
    ),
)

SINGLE, SINGLE_ROWS = "level", 48
LEVELS = {
    f"{SINGLE} {level}": trained(
        alone=STEPS // 2, together=STEPS // 2, frozen=True, rows=[SINGLE_ROWS * (level == own) for own in (1, 2, 3)]
    )
    for level in (1, 2, 3)
}
DEPTH = Claim(
    statement="Of a fetch of the same size, deeper nodes are worth more, for more of them make a larger bank",
    test="As above, with a frozen anchor; 48 rows of one level alone, which are 18,432 numbers fetched. The banks have "
    "four blocks, 16, or 64.",
    variants=LEVELS,
    columns=columns(("rare", "middle"), (FETCHED, GENERIC)) | columns(("common",), (FETCHED,)),
    checks=tuple(
        knows_more(Row(deeper, FETCHED), Row(coarser, FETCHED), "rare") for coarser, deeper in pairwise(LEVELS)
    ),
)

CLAIMS = ClaimSet(
    paper="Pretraining with hierarchical memories, arXiv 2510.02375",
    measure=measure,
    shorten=shorten,
    claims={"frequency": FREQUENCY, "paths": PATHS, "blocking": BLOCKING, "regimes": REGIMES, "depth": DEPTH},
)
