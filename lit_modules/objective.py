"""Next-token prediction: which targets a batch holds, and what each costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.editor import NOT_SCORED as NOT_SCORED


@dataclass(frozen=True)
class NextTokens:
    """The inputs and targets of a batch of token rows.

    Attributes:
        inputs: (batch, time) what the model reads.
        targets: (batch, time) the token after each input, or its label.
        counted: (batch, time) bool, where the target is real, scored and of the same document as its input.
        mask: (batch, time) bool, real inputs; None if all are.
        doc_ids: (batch, time) the inputs' documents; None if each row is one.
    """

    inputs: Tensor
    targets: Tensor
    counted: Tensor
    mask: Tensor | None
    doc_ids: Tensor | None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Self:
        """Split a batch of ``tokens`` (batch, time + 1) with optional ``doc_ids``, ``mask`` and ``labels`` like it.

        Labels are what to predict in place of the tokens themselves, ``NOT_SCORED`` where nothing is.

        Raises:
            ValueError: ``tokens`` is missing or holds no target, or ``labels`` has another shape.
        """
        tokens = batch.get("tokens")
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] < 2:
            shape = None if tokens is None else tuple(tokens.shape)
            raise ValueError(
                f"batch['tokens'] has shape {shape}; it must be (batch, time + 1) with time >= 1: inputs are "
                f"tokens[:, :-1], targets tokens[:, 1:]"
            )
        mask, doc_ids, labels = batch.get("mask"), batch.get("doc_ids"), batch.get("labels", tokens)
        if labels.shape != tokens.shape:
            raise ValueError(
                f"batch['labels'] has shape {tuple(labels.shape)}, batch['tokens'] {tuple(tokens.shape)}; make them "
                f"equal, with {NOT_SCORED} where nothing is predicted"
            )
        inputs, targets = tokens[:, :-1], labels[:, 1:]
        counted = targets != NOT_SCORED
        if mask is not None:
            counted = counted & mask[:, :-1] & mask[:, 1:]
        if doc_ids is not None:
            counted = counted & (doc_ids[:, :-1] == doc_ids[:, 1:])
        return cls(
            inputs,
            targets,
            counted,
            None if mask is None else mask[:, :-1],
            None if doc_ids is None else doc_ids[:, :-1],
        )

    def last(self, count: int) -> Self:
        """Return the inputs and targets of the last tokens of every row."""
        return type(self)(
            self.inputs[:, -count:],
            self.targets[:, -count:],
            self.counted[:, -count:],
            None if self.mask is None else self.mask[:, -count:],
            None if self.doc_ids is None else self.doc_ids[:, -count:],
        )

    def losses(self, logits: Tensor) -> Tensor:
        """Return the negative log-likelihood of every target in nats, (batch, time), at least fp32.

        Args:
            logits: (batch, time, vocabulary).
        """
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), reduction="none").view_as(self.targets)

    def hits(self, logits: Tensor) -> Tensor:
        """Return where the target is the likeliest token, (batch, time) bool.

        Args:
            logits: (batch, time, vocabulary).
        """
        return logits.argmax(-1) == self.targets

    def exact_matches(self, logits: Tensor) -> Tensor:
        """Return which answers are right in all their tokens, (answers,) bool, in the order of the rows.

        An answer is a run of counted targets, with nothing counted right before or after it.

        Args:
            logits: (batch, time, vocabulary).
        """
        starts = self.counted & ~F.pad(self.counted, (1, 0))[:, :-1]
        answer = starts.flatten().cumsum(0)[self.counted.flatten()] - 1
        missed = torch.zeros(int(starts.sum()), device=logits.device)
        return missed.index_add_(0, answer, (~self.hits(logits))[self.counted].float()) == 0

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean over the counted targets, 0 if there are none."""
        return losses.masked_fill(~self.counted, 0).sum() / self.counted.sum().clamp_min(1)
