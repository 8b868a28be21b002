"""Learning-rate schedules: the factor of the peak rate at every optimiser step."""

import math
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memzoo.layers.errors import check_choice, check_positive

ScheduleName = Literal["cosine", "wsd", "constant"]


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, final_fraction: float = 0.1) -> float:
    """Rise linearly for ``warmup_steps``, then fall along half a cosine to ``final_fraction`` at ``max_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, *, warmup_steps: int, max_steps: int, decay_steps: int, final_fraction: float = 0.1
) -> float:
    """Rise linearly for ``warmup_steps``, stay, and fall linearly to ``final_fraction`` in the last ``decay_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(max((step - (max_steps - decay_steps)) / decay_steps, 0.0), 1.0)
    return 1 - (1 - final_fraction) * progress


def warmup_constant(step: int, *, warmup_steps: int) -> float:
    """Rise linearly for ``warmup_steps``, then stay."""
    return min((step + 1) / max(warmup_steps, 1), 1.0)


def make_scheduler(
    optimizer: Optimizer,
    name: ScheduleName,
    *,
    warmup_steps: int,
    max_steps: int,
    decay_steps: int | None = None,
    final_fraction: float = 0.1,
) -> LambdaLR:
    """Return the named schedule over an optimiser's own learning rates.

    Args:
        optimizer: Its learning rates are the peak.
        name: "cosine"; "wsd" (warm-up, stable, decay; arXiv 2404.06395); "constant" after the warm-up.
        warmup_steps: Steps to the peak; 0 starts there.
        max_steps: Step at which the rate has reached its end.
        decay_steps: Length of the decay of "wsd"; a fifth of ``max_steps`` by default.
        final_fraction: Rate at the end, as a fraction of the peak.

    Raises:
        ValueError: An argument is out of its range, or the phases are longer than ``max_steps``.
    """
    check_choice("schedule", name, ("cosine", "wsd", "constant"))
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} is negative; use 0 for none")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction={final_fraction} is not within [0, 1]; it is a fraction of the peak rate")
    if name == "constant":
        return LambdaLR(optimizer, partial(warmup_constant, warmup_steps=warmup_steps))
    check_positive("max_steps", max_steps)
    if name == "cosine":
        decay = partial(warmup_cosine, warmup_steps=warmup_steps, max_steps=max_steps, final_fraction=final_fraction)
        return LambdaLR(optimizer, decay)
    decay_steps = max(max_steps // 5, 1) if decay_steps is None else decay_steps
    check_positive("decay_steps", decay_steps)
    if warmup_steps + decay_steps > max_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} together exceed max_steps={max_steps}; "
            f"shorten one of them"
        )
    return LambdaLR(
        optimizer,
        partial(
            warmup_stable_decay,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
            decay_steps=decay_steps,
            final_fraction=final_fraction,
        ),
    )
