"""Lessons of ROME: the key of an edit, and the value that makes the host answer it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.editor import Edit, answer_loss
from memzoo.layers.ops.precision import wider
from memzoo.layers.rome_solve import write_directions

if TYPE_CHECKING:
    from memzoo.layers.rome import Rome


@dataclass(frozen=True)
class Seen:
    """What a site read and said in one call.

    Attributes:
        x: (rows, tokens, width).
        y: (rows, tokens, dim).
    """

    x: Tensor
    y: Tensor

    def key_tokens(self, site: str, counted: Tensor | None, token: str) -> Tensor:
        """Return the token of each row that has the key, (rows, tokens) bool: of those that count the last, or first.

        Raises:
            ValueError: The site does not read a row of tokens for each row that the host reads, or not those that are
                counted.
        """
        if self.x.dim() != 3 or (counted is not None and counted.shape != self.x.shape[:2]):
            said = "" if counted is None else f" where the tokens that count have shape {tuple(counted.shape)}"
            mask = "pass a mask of the tokens that it reads, or " if self.x.dim() == 3 else ""
            raise ValueError(
                f"site {site!r} reads a tensor of shape {tuple(self.x.shape)}{said}, so that key tokens are not known; "
                f"{mask}attach to a site that reads (rows, tokens, width)"
            )
        if counted is None:
            counted = self.x.new_ones(self.x.shape[:2], dtype=torch.bool)
        counted = counted.to(self.x.device)
        number = counted.int().cumsum(1)
        return counted & (number == (1 if token == "first" else number[:, -1:]))


@dataclass(frozen=True)
class Learnt:
    """What is to be written for an edit.

    Attributes:
        key: (width,) float64.
        value: (dim,) what is to be added where the key is read.
        steps: Of the optimiser.
        loss: Of the answer, where it was measured last.
    """

    key: Tensor
    value: Tensor
    steps: int
    loss: float


def check_counted(name: str, inputs: Tensor, mask: Tensor | None) -> None:
    """Require a mask (rows, tokens) of what the host reads, of which each row counts a token; or None.

    Raises:
        ValueError: It is none.
    """
    if mask is None:
        return
    tokens = not inputs.is_floating_point()  # how many an image has, the site says
    if (
        mask.dtype != torch.bool
        or mask.dim() != 2
        or (mask.shape != inputs.shape if tokens else len(mask) != len(inputs))
    ):
        raise ValueError(
            f"{name} of dtype {mask.dtype} and shape {tuple(mask.shape)} says not which tokens of inputs of shape "
            f"{tuple(inputs.shape)} count; pass (rows, tokens) bool"
        )
    if not bool(mask.any(1).all()):
        raise ValueError(f"{name} counts no token of row {mask.any(1).int().argmin().item()}; leave that row out")


def learn(editor: "Rome", edit: Edit) -> Learnt:
    """Find the key of an edit and the value to add there; only what lies above the site runs in every step.

    Raises:
        ValueError: As ``Rome.edit``.
    """
    options = editor.options
    run, calls = partial(editor.answer, edit.inputs, edit.mask, asked=edit.asked), editor.replay()
    with torch.no_grad(), calls.record():
        seen = editor.see(run)
    counted = edit.asked if edit.asked is None or edit.subject is None else edit.asked & edit.subject
    place = seen.key_tokens(editor.sites[0], counted, options.token)
    key, said = seen.x[place].double().mean(0), wider(seen.y[place]).mean(0)
    length = float(said.norm())
    if not length or not math.isfinite(length):
        raise ValueError(
            f"what site {editor.sites[0]!r} says at the key token has the length {length}, which values are measured "
            f"by; attach to another"
        )
    value = torch.zeros_like(said, dtype=editor.changes.values.dtype).requires_grad_()
    [direction] = write_directions(key[None], options.ridge, editor.changes.covariance_factor).to(value)
    divergence = _divergence(editor, edit, direction)
    optimizer, steps, loss = torch.optim.Adam([value], lr=options.learning_rate), 0, math.inf
    for _ in range(options.max_steps):
        with torch.enable_grad():
            with calls.replay(), editor.trying(lambda x: place[..., None] * value):
                answer = answer_loss(run(), edit.targets)
            others = divergence(value) + options.weight_decay * value.norm() / length**2
        loss, total = float(answer.detach()), float((answer + others).detach())
        if not math.isfinite(total):
            raise ValueError(f"the loss of an edit is {total}; lower learning_rate={options.learning_rate}")
        if loss < options.stop_loss:
            break
        gradient = _gradient(answer, value)
        if not steps and not gradient.any():  # of the answer alone: that of the divergence at 0 is rounding, seldom 0
            raise ValueError(
                f"no target depends on what site {editor.sites[0]!r} says at the key token (token={options.token!r}); "
                f"use token='first' for a class token, or a lower site"
            )
        value.grad = gradient + _gradient(others, value)
        optimizer.step()
        steps += 1
        with torch.no_grad():
            value.mul_((options.clamp * length / value.norm()).clamp(max=1))
    return Learnt(key, value.detach(), steps, loss)


def _gradient(loss: Tensor, value: Tensor) -> Tensor:
    """Return the gradient of a loss in a value: 0 where the loss has nothing of it."""
    if not loss.requires_grad:
        return torch.zeros_like(value)
    (gradient,) = torch.autograd.grad(loss, value, materialize_grads=True)
    return gradient


def _divergence(editor: "Rome", edit: Edit, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how much what is said to unrelated questions changes with a value, in nats a question, weighted."""
    weight = editor.options.kl_weight
    if edit.unrelated is None or not weight:
        return lambda value: value.new_zeros(())
    run, calls = partial(editor.answer, edit.unrelated, edit.unrelated_mask), editor.replay()
    with torch.no_grad(), calls.record():
        before = _at_the_end(run(), edit.unrelated_mask)

    def divergence(value: Tensor) -> Tensor:
        with calls.replay(), editor.trying(lambda x: (x.to(direction.dtype) @ direction)[..., None] * value):
            after = _at_the_end(run(), edit.unrelated_mask)
        return weight * F.kl_div(before, after, log_target=True, reduction="batchmean")

    return divergence


def _at_the_end(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return log-probabilities at the last real token of each row, or those of an image's classes."""
    if logits.dim() == 3:
        rows = torch.arange(len(logits), device=logits.device)
        end = -1 if mask is None else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        logits = logits[rows, end]
    return wider(logits).log_softmax(-1)
