"""Train small models on tasks of recall: the plain loop that claim sets share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.layers import Trace
from memzoo.lit_modules.data import PhoneBookTask, RecallTask
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.optim import parameter_groups
from memzoo.lit_modules.schedule import make_scheduler

Task = RecallTask | PhoneBookTask
EMBEDDING_STD = 0.2
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
CURRICULUM = 0.5  # share of the steps after which all tasks are in use
TRAIN, TEST = 0, 1  # first number of the rows' seeds


def widen(model: nn.Module) -> None:
    """Draw what the catalog draws with a standard deviation of 0.02 as wide as a narrow model needs it.

    Projections get a variance of 1 / fan-in, as 0.02 gives them at a width of 2500. Values that are 20 times
    too small hardly show beside what a memory of another initial scale answers anyway, and learning starts late.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                module.weight.mul_(module.in_features**-0.5 / 0.02)
            elif isinstance(module, nn.Embedding):
                module.weight.mul_(EMBEDDING_STD / 0.02)


def train(model: nn.Module, tasks: Sequence[Task], *, steps: int, tokens: int, learning_rate: float, seed: int) -> None:
    """Train on tasks in turn; the later ones, harder, join in one after another. The layers' own losses are added.

    Args:
        model: With the interface of ``CausalLM``.
        tasks: From easy to hard. Without the easy ones, small models do not find out what is asked.
        steps: Optimiser steps, as in ``fit``.
        tokens: Of a batch, about.
        learning_rate: At its peak.
        seed: Of the rows.
    """

    def batch(step: int) -> NextTokens:
        in_use = min(len(tasks), 1 + int(len(tasks) * step / (CURRICULUM * steps)))
        task = tasks[step % in_use]
        return NextTokens.of(task.rows(max(1, tokens // task.sequence_length), (seed, TRAIN, step)))

    fit(model, map(batch, range(steps)), steps=steps, learning_rate=learning_rate)


def fit(
    model: nn.Module,
    batches: Iterable[NextTokens],
    *,
    steps: int,
    learning_rate: float,
    after: Callable[[int, Trace, float], None] = lambda step, trace, norm: None,
) -> None:
    """Train on batches, a step each: AdamW, 50 steps of warm-up, then a cosine; the layers' own losses are added.

    ``after`` is called after every step with its number, from 1, its trace, and the norm of its gradient.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=learning_rate, betas=(0.9, 0.95))
    scheduler = make_scheduler(optimizer, "cosine", warmup_steps=WARMUP_STEPS, max_steps=steps)
    for step, batch in enumerate(batches, 1):
        trace = Trace(signals=False)
        logits, _ = model(batch.inputs, trace=trace)
        loss = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted]) + sum(trace.losses.values())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        after(step, trace, float(norm))


def recalled(model: nn.Module, settings: Mapping[str, Any], *, answers: int, seed: int) -> dict[str, float]:
    """Widen and train a model on recall as the settings of a run say, and return its accuracy in every test.

    Args:
        model: With the interface of ``CausalLM``.
        settings: ``train``, a list of the arguments of ``RecallTask``; ``test``, the same by name; ``steps``,
            ``tokens`` and ``learning_rate``, as in ``train``.
        answers: Of each test, about.
        seed: Of the rows.
    """
    widen(model)
    options = {name: settings[name] for name in ("steps", "tokens", "learning_rate")}
    train(model, [RecallTask(**task) for task in settings["train"]], **options, seed=seed)
    tests = {name: RecallTask(**task) for name, task in settings["test"].items()}
    return {name: accuracy(model, task, answers=answers, seed=seed) for name, task in tests.items()}


def accuracy(model: nn.Module, task: Task, *, answers: int, seed: int) -> float:
    """Return the share of the tokens of about so many answers that a model has right, in rows it was not trained on."""
    batch, logits = _tested(model, task, answers, seed)
    return float(batch.hits(logits)[batch.counted].double().mean())


def exact_match(model: nn.Module, task: Task, *, answers: int, seed: int) -> float:
    """Return the share of about so many answers that a model has right in all tokens, in rows as those of accuracy."""
    batch, logits = _tested(model, task, answers, seed)
    return float(batch.exact_matches(logits).double().mean())


@torch.no_grad()
def _tested(model: nn.Module, task: Task, answers: int, seed: int) -> tuple[NextTokens, Tensor]:
    """Return test rows with about so many answers, and a model's logits of them."""
    batch = NextTokens.of(task.rows(max(1, answers // task.num_queries), (seed, TEST)))
    return batch, model(batch.inputs)[0]
