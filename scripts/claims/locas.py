"""What Locas claims (arXiv 2602.05085), in miniature: gains on unseen books, what is retained, size and time."""

import logging
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from quiet_trainer import quiet
from torch.utils.data import DataLoader, Subset

from claims import Check, Claim, ClaimSet, Metrics, Settings
from memzoo.arch import CausalLM
from memzoo.lit_modules import BookStreamData, CausalLMModule, TestTimeTrainingModule

HOST: Settings = dict(model="transformer_tiny", steps=700, learning_rate=3e-3)
BOOKS = 3  # to test on, the longest files of the standard library; as many more to choose settings on
TOKENS, TIMED_TOKENS = 4096, 2048  # of the beginning of each book
ROUNDS = 9


def measure(settings: Settings, seed: int) -> Metrics:
    """Stream books through a trained host with a memory beside it, or time that beside scoring alone."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    host = trained_host(**settings["host"], seed=seed)
    if "rounds" in settings:
        return timed(host, settings, seed)
    first, *others = settings["candidates"]
    if not others:
        return gained(host, first, settings["tokens"], seed)
    scores = [gained(host, chosen, settings["tokens"], seed, tuning=True)["bits"] for chosen in settings["candidates"]]
    best = settings["candidates"][scores.index(min(scores))]
    chosen = {"rate": best["rate"], "scale": best["options"].get("tau") or best["options"].get("alpha") or 0.0}
    return gained(host, best, settings["tokens"], seed) | chosen


@lru_cache(maxsize=1)
def trained_host(*, model: str, steps: int, learning_rate: float, seed: int) -> CausalLM:
    """Return a model trained on the standard library's sources without the books; runs of a seed share it."""
    torch.manual_seed(seed)
    module = CausalLMModule(model, learning_rate=learning_rate, warmup_steps=60)
    trainer = quiet(max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, limit_val_batches=0)
    trainer.fit(module, books(2, seed))
    host: CausalLM = module.model
    return host.eval()


class Books(BookStreamData):
    """The first books, to test on, or the others, to choose settings on."""

    tuning = False

    def test_dataloader(self) -> Any:
        """Return the loader of half of the books."""
        numbers = range(BOOKS, 2 * BOOKS) if self.tuning else range(BOOKS)
        return DataLoader(Subset(self.chunks, [i for number in numbers for i in self.chunks.chunks_of(number)]))


def books(tokens: int, seed: int, *, tuning: bool = False) -> Books:
    """Return the data: the standard library, its longest files as books."""
    data = Books(
        num_books=2 * BOOKS,
        max_book_tokens=tokens + 1,
        sequence_length=256,
        batch_size=4,
        pack_documents=False,
        chunk_length=128,
        window=256,
        held_out=32,
        seed=seed,
    )
    data.tuning = tuning
    return data


def gained(host: CausalLM, chosen: Settings, tokens: int, seed: int, *, tuning: bool = False) -> Metrics:
    """Return what a memory gains on the books, what it costs on other text, and its size, in bits a byte."""
    compares = chosen["memory"] is not None and not tuning
    data = books(tokens, seed, tuning=tuning)
    module = stream(host, chosen, data, seed, compare=compares, retention=compares)
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    bits, size = found["test/bits_per_byte"], found["test/memory_parameters"] / 1000
    if not compares:
        return {"bits": bits, "thousand parameters": size}
    before, after = (found[f"test/held_out/{name}_bits_per_byte"] for name in ("before", "after"))
    gain = found["test/plain/bits_per_byte"] - bits
    return {"bits": bits, "gain": gain, "cost": after - before, "thousand parameters": size}


def timed(host: CausalLM, settings: Settings, seed: int) -> Metrics:
    """Return how much longer the steps of reading take with a memory than without, over interleaved rounds."""
    data = books(settings["tokens"], seed)
    [chosen] = settings["candidates"]
    seconds: dict[str, list[float]] = {"alone": [], "with": []}
    for round_number in range(settings["rounds"] + 1):
        for name, own in (("alone", chosen | {"memory": None, "options": {}}), ("with", chosen)):
            steps = Steps()
            stream(host, own, data, seed, steps, compare=False, retention=False)
            if round_number:  # the first warms up
                seconds[name].append(steps.seconds)
    return {"time": median(seconds["with"]) / median(seconds["alone"])}


class Steps(Callback):
    """Adds up the time of all steps of a test, without what is around them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_test_batch_start(self, *_: Any) -> None:
        """Start a step."""
        self.start = time.perf_counter()

    def on_test_batch_end(self, *_: Any) -> None:
        """End it."""
        self.seconds += time.perf_counter() - self.start


def stream(
    host: CausalLM, chosen: Settings, data: Books, seed: int, *callbacks: Callback, **options: Any
) -> TestTimeTrainingModule:
    """Read books, and return the module that did."""
    own = {} if chosen["memory"] is None else {"seed": seed}
    module = TestTimeTrainingModule(
        host,
        memory=chosen["memory"],
        memory_options=chosen["options"] | own,
        memory_learning_rate=chosen["rate"],
        steps_per_chunk=chosen["steps"],
        prefix_gradient=chosen.get("prefix_gradient", True),
        **options,
    )
    quiet(callbacks=list(callbacks), inference_mode=False).test(module, data, verbose=False)
    return module


def shorten(settings: Settings) -> Settings:
    """Leave a run a host of a single step and a few chunks."""
    rounds = {"rounds": 1} if "rounds" in settings else {}
    candidates = settings["candidates"][:2]
    short = {"host": settings["host"] | {"steps": 1}, "tokens": 300, "candidates": candidates}
    return settings | short | rounds


# What is compared: a memory has candidates of two settings, as many for each kind.


def memory(kind: str | None, rate: float, *, steps: int = 1, prefix_gradient: bool = True, **options: Any) -> Settings:
    """Return a candidate; a default that came later is left out, so that its stored runs stay those of the setting."""
    later = {} if prefix_gradient else {"prefix_gradient": False}
    return dict(memory=kind, rate=rate, options=options, steps=steps) | later


def run(candidates: Sequence[Settings], **options: Any) -> Settings:
    """Return the settings of a run that chooses among candidates."""
    return dict(host=HOST, candidates=list(candidates), tokens=TOKENS) | options


RATES, TAUS = (1e-2, 2e-2, 5e-2), (None, 0.25)
LORA_RATES = (1e-3, 3e-3, 1e-2)


def locas(rank: int, *, taus: Sequence[float | None] = TAUS, **options: Any) -> Settings:
    """Return the settings of Locas; a tau of None is the paper's. The options are those of ``memory``."""
    scaled = [{} if tau is None else {"tau": tau} for tau in taus]
    return run([memory("locas", rate, rank=rank, **scale, **options) for rate in RATES for scale in scaled])


def temp_lora(rank: int) -> Settings:
    """Return the settings of TempLoRA: alpha over rank is 1, as in its script, or as the default of 64 makes it."""
    alphas = (float(rank), 64.0)
    return run([memory("temp_lora", rate, rank=rank, alpha=alpha) for rate in LORA_RATES for alpha in alphas])


SETTING = (
    "`transformer_tiny` (1.1M parameters), trained for 700 steps on the Python standard library's sources without its "
    f"six longest files, reads the first {TOKENS:,} bytes of the three longest: chunks of 128 bytes in windows of 256, "
    "one step of AdamW with each. Gain is how many bits a byte fewer these take than without memory, cost how many "
    "more the host then takes for held-out text (32,768 bytes from all of it), the mean over books. The learning rate "
    "is chosen, for each seed, among three on as many bytes of the other three"
)
PAPERS = "the paper's tau"
GIVEN = "the prefix given"
COLUMNS = {
    "bits": "bits a byte",
    "gain": "gain",
    "cost": "cost on other text",
    "thousand parameters": "thousand parameters",
    "rate": "learning rate",
    "scale": "tau or alpha (0: the paper's tau)",
}


def gains(variant: str) -> Check:
    """A memory makes the books likelier."""
    return Check(f"{variant} beats no memory", lambda results: results[variant]["gain"])


def gains_more(better: str, worse: str, margin: float = 0.0) -> Check:
    """One memory gains more than another, seed by seed."""
    by = f" by more than {margin:g} bits a byte" if margin else ""
    return Check(
        f"{better} gains more than {worse}{by}",
        lambda results: results[better]["gain"] - results[worse]["gain"] - margin,
    )


def costs_less(better: str, worse: str) -> Check:
    """One memory costs less on other text than another."""
    return Check(f"{better} costs less than {worse}", lambda results: results[worse]["cost"] - results[better]["cost"])


STREAM = Claim(
    statement="A memory trained while reading beats none; Locas gains as much as TempLoRA with far fewer parameters, "
    "and costs less on other text; width helps (PG-19, MMLU)",
    test=f"{SETTING}, and with it the factor of what is read: of Locas the paper's tau, the mean length of the host's "
    "values over the number of slots, with which no memory says more than one slot of the host would, or 0.25; of "
    "TempLoRA, beside all linear layers, an alpha of its rank or of 64. Ranks 2 and 8 have as many parameters as 16 "
    f"and 64 slots. With {GIVEN}, no gradient flows through what the model made of a window's prefix.",
    variants={
        "no memory": run([memory(None, 0.0)]),
        "TempLoRA, rank 2": temp_lora(2),
        "TempLoRA, rank 8": temp_lora(8),
        **{f"Locas, {rank} slots": locas(rank) for rank in (4, 16, 64)},
        **{f"Locas, {rank} slots, {PAPERS}": locas(rank, taus=(None,)) for rank in (4, 64)},
        **{f"Locas, {rank} slots, {GIVEN}": locas(rank, prefix_gradient=False) for rank in (16, 64)},
    },
    columns=COLUMNS,
    checks=(
        gains("TempLoRA, rank 8"),
        gains("Locas, 4 slots"),
        gains(f"Locas, 4 slots, {PAPERS}"),
        gains_more("Locas, 64 slots", "Locas, 4 slots"),
        gains_more(f"Locas, 64 slots, {PAPERS}", f"Locas, 4 slots, {PAPERS}"),
        gains_more("Locas, 16 slots", "TempLoRA, rank 8"),
        gains_more("Locas, 16 slots", "TempLoRA, rank 2"),
        costs_less("Locas, 16 slots", "TempLoRA, rank 2"),
        gains_more("Locas, 64 slots", "TempLoRA, rank 8"),
        costs_less("Locas, 64 slots", "TempLoRA, rank 8"),
        gains_more(f"Locas, 64 slots, {PAPERS}", "TempLoRA, rank 8"),
        costs_less(f"Locas, 64 slots, {PAPERS}", "TempLoRA, rank 8"),
        gains(f"Locas, 16 slots, {GIVEN}"),
        gains_more(f"Locas, 16 slots, {GIVEN}", "TempLoRA, rank 2"),
        gains_more(f"Locas, 64 slots, {GIVEN}", "TempLoRA, rank 8"),
    ),
)

MARGIN = 0.005
PUBLISHED_RATE = 4e-3
STARTS = {
    "top-k clones": "topk",
    "bottom-k clones": "bottomk",
    "random clones": "random_clone",
    "what was read": "activation",
    "Gaussian": "gaussian",
}


def started(init: str) -> dict[str, str]:
    """Return the option of an initialisation; the default is left out, so that its run is that of the first claim."""
    return {} if init == "topk" else {"init": init}


INIT = Claim(
    statement="Clones of the host's slots are better to begin with than Gaussian ones; which clones matters little "
    "(ablation of the initialisation)",
    test=f"As above, 16 slots: with the paper's tau and its learning rate of {PUBLISHED_RATE:g}, and with a tau of "
    "0.25 and the rate chosen for each initialisation. Nothing is claimed of top-k against random clones.",
    variants={
        **{
            f"{name}, as published": run([memory("locas", PUBLISHED_RATE, rank=16, **started(init))])
            for name, init in STARTS.items()
        },
        **{name: locas(16, taus=(0.25,), **started(init)) for name, init in STARTS.items()},
    },
    columns={name: COLUMNS[name] for name in ("gain", "cost", "rate")},
    checks=(
        gains_more("top-k clones, as published", "Gaussian, as published", MARGIN),
        gains_more("top-k clones, as published", "what was read, as published"),
        gains_more("top-k clones", "Gaussian", MARGIN),
        gains_more("top-k clones", "what was read"),
    ),
)


def timing(kind: str, rank: int, **options: Any) -> Settings:
    """Have a memory timed."""
    return run([memory(kind, 1e-3, rank=rank, **options)], rounds=ROUNDS, tokens=TIMED_TOKENS)


def at_most_times(variant: str, bound: float) -> Check:
    """Reading and learning takes at most so many times as long as reading."""
    return Check(f"{variant} takes at most {bound:g} times as long", lambda results: bound - results[variant]["time"])


def faster(quick: str, slow: str) -> Check:
    """One memory takes less time than another."""
    return Check(f"{quick} takes less time than {slow}", lambda results: results[slow]["time"] - results[quick]["time"])


TIME = Claim(
    statement="Locas takes 1.4 to 1.8 times as long as plain inference, TempLoRA 4.7 times",
    test=f"The steps alone, over the first {TIMED_TOKENS:,} bytes of three books beside those of scoring alone: "
    f"medians of {ROUNDS} interleaved rounds on one thread. Of the host's feed-forwards 4 slots are a share of 1/128, "
    "about the published one (64 of 6,144), 16 are 1/32 and 64 are 1/8. TempLoRA also with two steps a chunk, the "
    f"first of which shares the reading that is scored; its script reads a third time. With {GIVEN}, as above, the "
    "backward pass runs over the chunk, which is half of the window; calling so small a host twice costs as much as "
    "that saves (not so at width 384: `docs/BENCHMARKS.md`).",
    variants={
        **{f"Locas, {rank} slots": timing("locas", rank) for rank in (4, 16, 64)},
        **{f"Locas, {rank} slots, {GIVEN}": timing("locas", rank, prefix_gradient=False) for rank in (16, 64)},
        "TempLoRA, rank 8": timing("temp_lora", 8),
        "TempLoRA, rank 8, two steps": timing("temp_lora", 8, steps=2),
    },
    columns={"time": "time of scoring alone"},
    checks=(
        at_most_times("Locas, 4 slots", 2.2),
        at_most_times("Locas, 16 slots", 2.2),
        at_most_times("Locas, 64 slots", 2.2),
        at_most_times(f"Locas, 16 slots, {GIVEN}", 2.2),
        at_most_times(f"Locas, 64 slots, {GIVEN}", 2.2),
        faster("Locas, 64 slots", "TempLoRA, rank 8"),
        faster("Locas, 64 slots", "TempLoRA, rank 8, two steps"),
    ),
    alone=True,
)

CLAIMS = ClaimSet(
    paper="Locas (arXiv 2602.05085)",
    measure=measure,
    shorten=shorten,
    claims={"stream": STREAM, "init": INIT, "time": TIME},
)
