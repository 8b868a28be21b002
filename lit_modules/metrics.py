"""Metrics of language modelling, exact over batches of any size and over devices."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

# Sums of a whole validation are kept in float64; Apple's devices have none.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class _TokenMean(Metric):
    """The sum over all counted tokens divided by their number, which the mean of batch means is not."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor, counted: Tensor) -> None:
        """Add the values at which ``counted`` is True; both of one shape."""
        self.total += values.to(SUM_DTYPE).masked_fill(~counted, 0).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        """Return the mean; NaN if nothing was counted."""
        return self.total / self.count


class MeanTokenLoss(_TokenMean):
    """Mean negative log-likelihood per counted token, in nats; updated with the losses of all tokens.

    Example:
        >>> metric = MeanTokenLoss()
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]))
        >>> metric.update(torch.tensor([[9.0, 9.0]]), torch.tensor([[True, False]]))
        >>> float(metric.compute())
        4.0
    """

    higher_is_better = False


class TokenAccuracy(_TokenMean):
    """Share of counted tokens that were the likeliest; updated with whether each token was.

    Example:
        >>> metric = TokenAccuracy()
        >>> metric.update(torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]]))
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = True


class ExactMatch(_TokenMean):
    """Share of answers that were right in all their tokens; updated with whether each answer was.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(torch.tensor([True, False]), torch.tensor([True, True]))
        >>> float(metric.compute())
        0.5
    """

    higher_is_better = True


class UnigramEntropy(Metric):
    """Entropy of the frequencies of counted tokens, in bits per token: what a model without context could reach.

    Args:
        vocab_size: Ids are in ``[0, vocab_size)``.

    Example:
        >>> metric = UnigramEntropy(4)
        >>> metric.update(torch.tensor([[0, 1, 0, 1]]), torch.ones(1, 4, dtype=torch.bool))
        >>> float(metric.compute())
        1.0
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.add_state("counts", torch.zeros(vocab_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, counted: Tensor) -> None:
        """Add the tokens at which ``counted`` is True; both of one shape."""
        self.counts += torch.bincount(tokens[counted], minlength=self.vocab_size)

    def compute(self) -> Tensor:
        """Return the entropy; 0 if nothing was counted."""
        frequency = self.counts.to(SUM_DTYPE) / self.counts.sum().clamp_min(1)
        nats: Tensor = torch.special.entr(frequency).sum()
        return nats / math.log(2)
