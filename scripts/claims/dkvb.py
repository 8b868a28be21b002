"""What the discrete key-value bottleneck claims, in miniature: what is left of a stream of digits at its end.

Discrete Key-Value Bottleneck (arXiv 2207.11240). Each run goes through `ClassIncrementalModule`, as a user's would.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from claims import Check, Claim, ClaimSet, Metrics, Settings, at_least, at_most
from memzoo.arch import DKVBClassifier, FrozenClassifier, create_model
from memzoo.lit_modules import (
    ClassIncrementalModule,
    ClassStreamData,
    ContinualEval,
    ElasticWeightConsolidation,
    Replay,
    TaskBoundary,
)
from memzoo.lit_modules.continual_figures import trace_scalars
from memzoo.lit_modules.continual_metrics import average_accuracy, learning_accuracy
from memzoo.lit_modules.data.relabel import load_digits

SEEDS, PIXELS = 5, 64
STRATEGIES = {"replay": Replay, "ewc": ElasticWeightConsolidation}


def measure(settings: Settings, seed: int) -> Metrics:
    """Train a classifier on a stream, and ask it for all classes at the end."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(seed)
    data, model = digits(settings, seed), classifier(settings)
    if settings["key_classes"] is not None:
        give_keys(model, data, settings)
    strategy = None
    if settings["strategy"] is not None:
        strategy = STRATEGIES[settings["strategy"]["name"]](**settings["strategy"]["options"], seed=seed)
    module = ClassIncrementalModule(
        model,
        learning_rate=settings["learning_rate"],
        optimizer=settings["optimizer"],
        label_smoothing=settings["label_smoothing"],
        train_logits=settings["train_logits"],
        strategy=strategy,
        precompute=settings.get("precompute", True),
        key_options=dict(settings["keys"], seed=seed) if isinstance(model, DKVBClassifier) else None,
    )
    measured = ContinualEval(every_n_steps=settings["trace"], samples=None)
    trainer(data, settings["clip"], TaskBoundary(), measured).fit(module, data)
    matrix = measured.matrix[: data.num_tasks]
    sizes = torch.tensor([data.task_size(task, "test") for task in range(data.num_tasks)])
    found = {"accuracy": average_accuracy(matrix, sizes=sizes), "learnt": learning_accuracy(matrix)}
    if isinstance(model, DKVBClassifier):
        found["used"] = 1 - model.bottleneck.fraction_unused
    if settings["trace"] is not None:
        scalars = trace_scalars(measured.trace, measured.window)
        found |= {name: scalars[f"{name}_accuracy"] for name in ("minimum", "worst_case")}
    return found


def digits(settings: Settings, seed: int) -> ClassStreamData:
    """Return scikit-learn's digits, from 0 to 1, as five pairs of classes or as one task."""
    images, labels = load_digits()
    return ClassStreamData(
        (images + 1) / 2,
        labels,
        num_tasks=settings["tasks"],
        epochs_per_task=settings["epochs"],
        batch_size=settings["batch_size"],
        validation=0.0,
        test=0.25,
        seed=seed,
    )


def classifier(settings: Settings) -> Any:
    """Return the model, over one of three encoders that need nothing but the digits."""
    encoder, width = settings["encoder"]
    options = {} if encoder == "pixels" else {"input_dim": PIXELS}
    if settings["model"] == "dkvb":
        own = dict(encoder=encoder, feature_dim=width, encoder_options=options)
        return create_model("dkvb_digits", **own, **settings["sizes"])
    classes = 0 if settings["model"] == "analytic" else 10
    own = {"analytic": dict(hidden=1024)}.get(settings["model"])
    return FrozenClassifier(
        encoder, classes, feature_dim=width, encoder_options=options, head=settings["model"], head_options=own
    )


def give_keys(model: DKVBClassifier, data: ClassStreamData, settings: Settings) -> None:
    """Fit the encoder to all inputs, as elsewhere, but set the keys from the first classes of the stream alone."""
    model.encoder.fit(data.unlabelled())
    kept: list[Tensor] = []
    for task in range(data.num_tasks):
        for batch in data.task_loader("train", task):
            known = torch.isin(batch["labels"], torch.tensor(data.class_order[: settings["key_classes"]]))
            kept.append(batch["inputs"][known])
    model.initialize_keys(list(torch.cat(kept).split(256)), **settings["keys"])


def trainer(data: ClassStreamData, clip: float | None, *callbacks: Callback) -> Trainer:
    """Return a trainer that says and keeps nothing."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|no `val_dataloader`|no logger configured).*")
    return Trainer(
        max_epochs=data.num_tasks * data.epochs_per_task,
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=clip,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def shorten(settings: Settings) -> Settings:
    """Leave a run a pass or two over a few digits' worth of steps."""
    return settings | {"epochs": 1, "batch_size": 512, "keys": settings["keys"] | {"epochs": 1}}


# What is compared

ENCODERS = {"PCA-32": ["pca", 32], "pixels": ["pixels", PIXELS], "random ReLU": ["random_relu", 256]}
FIVE = 5  # classes whose inputs some keys are from


def run(model: str, encoder: str = "PCA-32", **options: Any) -> Settings:
    """Return the settings of a run: five pairs of classes, 50 passes over each."""
    chosen = dict(
        model=model,
        encoder=ENCODERS[encoder],
        sizes={},
        keys={},
        key_classes=None,
        tasks=5,
        epochs=50,
        batch_size=256,
        learning_rate=5.0,
        optimizer="sgd",
        clip=1.0,
        label_smoothing=0.1,
        train_logits="all",
        strategy=None,
        trace=None,
    )
    return chosen | options


def dkvb(encoder: str = "PCA-32", **options: Any) -> Settings:
    """Return the settings of the bottleneck; keys from 10 passes."""
    return run("dkvb", encoder, **options)


def probe(model: str = "linear", encoder: str = "PCA-32", **options: Any) -> Settings:
    """Return the settings of a probe of the same encoder."""
    return run(model, encoder, **dict(learning_rate=0.3) | options)


def analytic(encoder: str = "PCA-32", **options: Any) -> Settings:
    """Return the settings of ridge regression on 1,024 random features, learnt without gradients in one pass."""
    return run("analytic", encoder, **dict(epochs=1, clip=None) | options)


def strategy(name: str, **options: Any) -> Settings:
    """Return the settings of what keeps a probe from forgetting."""
    return {"name": name, "options": options}


def above(variant: str, bound: float) -> Check:
    """A variant's accuracy reaches a bound."""
    return at_least(variant, ("accuracy",), bound)


def ahead(better: str, worse: str, by: float, metric: str = "accuracy") -> Check:
    """One variant has more of a metric than another, by a margin that may be negative."""
    words = f"{better} is ahead of {worse} by {by:g}" if by >= 0 else f"{better} is within {-by:g} of {worse}, or above"
    return Check(
        f"{words} ({metric})" if metric != "accuracy" else words,
        lambda results: results[better][metric] - results[worse][metric] - by,
    )


def table(rows: Mapping[str, Settings], *probed: str) -> dict[str, Settings]:
    """Return variants: some, then linear probes of encoders in the stream, then of all classes at once."""
    stream = {f"linear probe, {name}": probe(encoder=name) for name in probed}
    joint = {f"linear probe, {name}, all at once": probe(encoder=name, tasks=1) for name in probed}
    return {**rows, **stream, **joint}


SETTING = (
    "scikit-learn's 1,797 digits of 8 x 8 pixels in five pairs of classes, in an order drawn by seed, a quarter of "
    "each class to test on; no task is told, neither in training nor when asked. Frozen encoders that need nothing "
    "else: the pixels, 32 principal components fitted without labels, or 256 random ReLU features. 64 codebooks of 128 "
    "pairs, keys of width 8"
)
COLUMNS = {
    "accuracy": "accuracy on all ten after the last pair",
    "learnt": "accuracy on a pair right after it",
    "used": "share of pairs fetched",
}

STREAM = Claim(
    statement="The bottleneck forgets less than probes of the same encoder, without task boundaries (class-incremental "
    "CIFAR10)",
    test=f"{SETTING}; SGD at a rate of 5 and a batch of 256, label smoothing 0.1, gradients clipped to 1, 50 passes "
    "over each pair. Probes at a rate of 0.3, or as is said. Replay keeps 200 samples, EWC has a strength of 100; both "
    "of them and the perceptron read pixels. The analytic classifier sees each sample once.",
    variants=table(
        {
            **{f"DKVB, {name}": dkvb(name) for name in ENCODERS},
            "DKVB, PCA-32, all at once": dkvb(tasks=1),
            "DKVB, PCA-32, SGD at 0.3": dkvb(learning_rate=0.3),
            "DKVB, PCA-32, no label smoothing": dkvb(label_smoothing=0.0),
            "DKVB, PCA-32, no clipping": dkvb(clip=None),
            "DKVB, PCA-32, unused pairs masked": dkvb(
                sizes={"bottleneck_options": {"mask_unused": True}}, precompute=False
            ),
            "DKVB, PCA-32, Adam at 0.01": dkvb(optimizer="adam", learning_rate=0.01),
            "DKVB, PCA-32, each sample once, batches of 10": dkvb(epochs=1, batch_size=10),
            "DKVB, PCA-32, 1 codebook of 256, keys of 32": dkvb(sizes=dict(num_codebooks=1, num_pairs=256, dim_key=32)),
            "DKVB, PCA-32, 4 codebooks of 256": dkvb(sizes=dict(num_codebooks=4, num_pairs=256)),
            "analytic classifier, pixels": analytic("pixels"),
            "analytic classifier, PCA-32": analytic(),
            "perceptron": probe("mlp", "pixels"),
            "perceptron, replay": probe("mlp", "pixels", strategy=strategy("replay", capacity=200)),
            "perceptron, EWC": probe("mlp", "pixels", strategy=strategy("ewc", strength=100.0)),
            "linear probe, PCA-32, Adam at 0.001": probe(optimizer="adam", learning_rate=1e-3),
        },
        *ENCODERS,
    ),
    columns=COLUMNS,
    checks=(
        above("DKVB, PCA-32", 0.93),
        at_most("linear probe, pixels", ("accuracy",), 0.30),
        ahead("DKVB, PCA-32", "linear probe, pixels", 0.5),
        ahead("DKVB, pixels", "linear probe, pixels", 0.5),
        ahead("DKVB, PCA-32", "linear probe, PCA-32", 0.0),
        ahead("DKVB, PCA-32", "linear probe, PCA-32, Adam at 0.001", 0.0),
        ahead("DKVB, PCA-32", "DKVB, PCA-32, all at once", -0.03),
        ahead("DKVB, PCA-32", "perceptron, replay", 0.0),
        ahead("DKVB, PCA-32", "analytic classifier, PCA-32", 0.0),
    ),
)

KEYS = Claim(
    statement="Keys are set once, without labels, and what they are set from matters (ablation of the initialisation)",
    test=f"{SETTING}; training as above. EMA by batches of 256: ours starts from sampled heads with statistics that "
    "agree, the published code from N(0, 1) with counts of zero. Some keys are from the inputs of the first five "
    "classes of the stream alone.",
    variants={
        "EMA, 1 pass": dkvb(keys={"epochs": 1}),
        "EMA, 10 passes": dkvb(),
        "EMA, 50 passes": dkvb(keys={"epochs": 50}),
        "published EMA, 1 pass": dkvb(keys={"method": "ema_official", "epochs": 1}),
        **{f"published EMA, {n} passes": dkvb(keys={"method": "ema_official", "epochs": n}) for n in (10, 50)},
        "sampled heads": dkvb(keys={"method": "sample"}),
        "k-means": dkvb(keys={"method": "kmeans"}),
        "sampled heads of five classes": dkvb(keys={"method": "sample"}, key_classes=FIVE),
        "EMA, 10 passes, five classes": dkvb(key_classes=FIVE),
        "N(0, 1)": dkvb(keys={"method": "random"}),
    },
    columns=COLUMNS,
    checks=(
        above("EMA, 10 passes", 0.93),
        above("sampled heads", 0.93),
        ahead("EMA, 1 pass", "published EMA, 1 pass", 0.0),
        ahead("EMA, 10 passes", "N(0, 1)", 0.0),
        ahead("EMA, 10 passes", "sampled heads of five classes", 0.0),
    ),
)

EVERY = dict(epochs=20, batch_size=64, trace=1)
GAP = Claim(
    statement="A local memory has almost no stability gap: accuracy on a task does not drop while the next is learnt",
    test=f"{SETTING}; 20 passes over each pair in batches of 64, all pairs so far asked for after every update (rho = "
    "1, all test samples). Minimum: the least accuracy on a pair after it was left, mean over pairs (min-ACC); worst "
    "case: that and the accuracy on the present pair, weighted by tasks (WC-ACC, arXiv 2205.13452).",
    variants={
        "DKVB, PCA-32": dkvb(**EVERY),
        "DKVB, pixels": dkvb("pixels", **EVERY),
        "linear probe, PCA-32": probe(**EVERY),
        "linear probe, pixels": probe(encoder="pixels", **EVERY),
        "perceptron, replay": probe("mlp", "pixels", strategy=strategy("replay", capacity=200), **EVERY),
        "analytic classifier, PCA-32": analytic(batch_size=64, trace=1),
    },
    columns={"accuracy": COLUMNS["accuracy"], "minimum": "minimum", "worst_case": "worst case"},
    checks=(
        at_least("DKVB, PCA-32", ("minimum", "worst_case"), 0.9),
        ahead("DKVB, PCA-32", "linear probe, PCA-32", 0.1, "minimum"),
        ahead("DKVB, PCA-32", "linear probe, PCA-32", 0.1, "worst_case"),
        ahead("DKVB, PCA-32", "perceptron, replay", 0.0, "minimum"),
    ),
)

CLAIMS = ClaimSet(
    paper="Discrete Key-Value Bottleneck (arXiv 2207.11240)",
    measure=measure,
    shorten=shorten,
    claims={"stream": STREAM, "keys": KEYS, "gap": GAP},
    seeds=SEEDS,
)
