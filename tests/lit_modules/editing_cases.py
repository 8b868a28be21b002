"""Facts of a few tokens, an editor that learns whatever it is told, and modules and trainers for both."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.editor import NOT_SCORED, Edit, Editor, EditReport, answer_loss
from memzoo.layers.registry import _ENTRIES, LayerEntry
from memzoo.layers.sites import find_feed_forwards
from memzoo.lit_modules import ModelEditingModule
from memzoo.lit_modules.data.rows import ResumableLoader, RowSampler

SIZES = {"vocab_size": 23, "dim": 16, "depth": 2, "num_heads": 2, "hidden_dim": 24}
PAD = 0


class Dense(Editor):
    """``y + W x`` beside the last feed-forward for all questions alike: it learns, and respects nothing."""

    def __init__(self, host: nn.Module, *, steps: int = 4, learning_rate: float = 0.1) -> None:
        (name, site), *_ = reversed(find_feed_forwards(host).items())
        super().__init__(host, {name: site.module})
        self.weight = nn.Parameter(next(host.parameters()).new_zeros(site.dim, site.dim))
        self.steps, self.learning_rate = steps, learning_rate
        self._install()

    def reset(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.num_edits.zero_()

    def edit(self, edits: Sequence[Edit]) -> EditReport:
        optimizer = torch.optim.SGD([self.weight], self.learning_rate)
        for _ in range(self.steps):
            answers = [(self.answer(edit.inputs, edit.mask, asked=edit.asked), edit.targets) for edit in edits]
            loss = sum(answer_loss(logits, targets) for logits, targets in answers) / len(edits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.weight.grad = None
        self.num_edits += len(edits)
        return EditReport(self.steps, loss.item())

    def _describe(self) -> dict[str, Any]:
        return {"sites": list(self.sites)}

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ self.weight.T


def register_dense(monkeypatch) -> None:
    monkeypatch.setitem(_ENTRIES, "dense", LayerEntry("dense", "side", Dense))


class Facts(pl.LightningDataModule):
    """Questions of 3 to 5 tokens with answers of 1 to ``longest``; a paraphrase has a token more before it."""

    def __init__(self, count: int = 4, *, longest: int = 2, questions_per_batch: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(length: int) -> list[int]:
            return torch.randint(1, SIZES["vocab_size"], (length,), generator=generator).tolist()

        self.edits = [(draw(3 + number % 3), draw(1 + number % longest)) for number in range(count)]
        self.others = [(draw(4), draw(2)) for _ in range(count)]
        self.questions_per_batch = questions_per_batch

    def rows(self, number: int, kind: str) -> tuple[list[int], list[int]]:
        prompt, answer = (self.others if kind == "locality" else self.edits)[number]
        return ([7, *prompt] if kind == "paraphrase" else prompt), answer

    def questions(self, edits: Sequence[int], kind: str) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(edits), self.questions_per_batch):
            chosen = list(edits[start : start + self.questions_per_batch])
            yield padded([self.rows(number, kind) for number in chosen]) | {"index": torch.tensor(chosen)}

    def rows_alone(self, number: int) -> dict[str, Tensor]:
        return padded([self.edits[number]])

    def train_dataloader(self):
        batches = [
            padded([self.edits[number]]) | {"index": torch.tensor([number])} for number in range(len(self.edits))
        ]
        sampler = RowSampler(batches, 1, contiguous=True)
        return ResumableLoader(batches, sampler=sampler, batch_size=None)


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Return questions with their answers as inputs, targets and mask, padded on the right."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    inputs = torch.full((len(rows), longest), PAD)
    targets = torch.full((len(rows), longest), NOT_SCORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        read = [*prompt, *answer[:-1]]
        inputs[row, : len(read)] = torch.tensor(read)
        targets[row, len(prompt) - 1 : len(read)] = torch.tensor(answer)
        mask[row, : len(read)] = True
    return {"inputs": inputs, "targets": targets, "mask": mask}


def host(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return create_model("transformer_tiny", **SIZES).to(dtype)


def module(**options) -> ModelEditingModule:
    return ModelEditingModule(**({"model": host(), "editor": "dense"} | options))


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "accelerator": "cpu", "enable_checkpointing": False}
    quiet["enable_progress_bar"] = False
    return pl.Trainer(**({"max_epochs": 1, **quiet} | options), callbacks=list(callbacks))
