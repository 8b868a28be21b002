"""A stream of documents: its chunks, and what they have cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from memzoo.lit_modules.metrics import SUM_DTYPE
from memzoo.lit_modules.objective import NextTokens


@dataclass(frozen=True)
class ChunkScore:
    """What one chunk of a document has cost.

    Attributes:
        document: Number of the document.
        chunk: Number of the chunk in it.
        position: Tokens of the document scored before it.
        tokens: Scored in it.
        loss_sum: Nats, with the memory as the chunks before have left it. The first chunk has no memory yet.
        plain_loss_sum: Nats without memory; None if that was not measured.
    """

    document: int
    chunk: int
    position: int
    tokens: int
    loss_sum: float
    plain_loss_sum: float | None

    def terms(self) -> Tensor:
        """Return what adds up to all means, (5,): tokens; the loss, and the chunk's perplexity times its tokens.

        The last two are there twice, with memory and without, where they are 0 if that was not measured.
        """
        sums = torch.tensor([self.loss_sum, self.plain_loss_sum or 0.0], dtype=SUM_DTYPE)
        perplexities = self.tokens * (sums / self.tokens).exp()
        return torch.cat([sums.new_tensor([self.tokens]), torch.stack([sums, perplexities], dim=1).flatten()])


@dataclass(frozen=True)
class Chunk:
    """A batch of the stream: ``prefix`` inputs that were scored before, then those of the chunk."""

    tokens: Tensor
    labels: Tensor
    document: int
    number: int
    position: int
    prefix: int

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Self:
        """Read a batch.

        Raises:
            ValueError: It is no chunk of a document.
        """
        names = ("document", "chunk", "position", "prefix")
        missing = [name for name in ("tokens", "labels", *names) if name not in batch]
        if missing:
            raise ValueError(
                f"batch has {sorted(batch)}, no {missing[0]!r}; use data that streams documents, such as BookStreamData"
            )
        if len(batch["tokens"]) != 1:
            raise ValueError(
                f"batch['tokens'] has shape {tuple(batch['tokens'].shape)}; a stream has one row, for there is one "
                f"memory: use batches of one chunk"
            )
        document, number, position, prefix = torch.cat([batch[name] for name in names]).tolist()
        return cls(batch["tokens"], batch["labels"], document, number, position, prefix)

    def pieces(self, start: int = 0) -> NextTokens:
        """Return inputs and targets from an input on."""
        return NextTokens.of({"tokens": self.tokens[:, start:], "labels": self.labels[:, start:]})

    @property
    def inputs(self) -> Tensor:
        """What the model reads, with the prefix."""
        return self.tokens[:, :-1]

    @property
    def scored(self) -> int:
        """Number of targets."""
        return self.inputs.shape[1] - self.prefix
