"""A small memory, books and modules to stream them through."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from memzoo.arch import create_model
from memzoo.layers.registry import _ENTRIES, LayerEntry
from memzoo.layers.side_memory import SideMemory
from memzoo.layers.sites import find_feed_forwards
from memzoo.lit_modules import TestTimeTrainingModule
from memzoo.lit_modules.data.book_stream import BookChunks

SIZES = {"vocab_size": 11, "dim": 16, "depth": 2, "num_heads": 1, "hidden_dim": 24}
CHUNK, WINDOW = 6, 10
LENGTHS = (26, 15)  # tokens of the books: chunks of 6, 6, 6, 6 and 1 targets, and of 6, 6 and 2


class LowRank(SideMemory):
    """``y + B A dropout(x)`` beside every feed-forward: the least that learns. It remembers how it was called."""

    def __init__(self, host: nn.Module, *, rank: int = 2, dropout: float = 0.0) -> None:
        sites = {name: site.module for name, site in find_feed_forwards(host).items()}
        super().__init__(host, sites)
        like = next(host.parameters())
        dim = find_feed_forwards(host)[self.sites[0]].dim
        self.down = nn.ParameterList(like.new_zeros(rank, dim) for _ in sites)
        self.up = nn.ParameterList(like.new_zeros(dim, rank) for _ in sites)
        self.dropout = dropout
        self.calls: list[str] = []
        self.reset()
        self._install()

    def reset(self) -> None:
        self.calls.append("reset")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for down, up in zip(self.down, self.up, strict=True):
                down.copy_(torch.randn(down.shape, generator=generator))
                up.zero_()

    def memorize(self, inputs: Tensor) -> None:
        self.calls.append(f"memorize {tuple(inputs.shape)}")

    def constrain(self) -> None:
        self.calls.append("constrain")

    def beside(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(F.linear(x, self.down[index]), self.up[index])


def register_low_rank(monkeypatch) -> None:
    monkeypatch.setitem(_ENTRIES, "low_rank", LayerEntry("low_rank", "side", LowRank))


class Stream(pl.LightningDataModule):
    """Books of random tokens, or those given; with held-out batches."""

    def __init__(self, books: Sequence[Tensor] | None = None, *, window: int = WINDOW, chunk: int = CHUNK) -> None:
        super().__init__()
        self.books = [random_tokens(length, seed) for seed, length in enumerate(LENGTHS)] if books is None else books
        self.chunks = BookChunks(self.books, chunk_length=chunk, window=window)
        self.book_names = [f"book {number}" for number in range(len(self.books))]
        self.test_tokens = self.chunks.num_targets
        self.test_bytes_per_token, self.bytes_per_token = 2.0, 4.0

    def held_out_batches(self) -> list[dict[str, Tensor]]:
        return [{"tokens": random_tokens(3 * 9, 7).view(3, 9)}, {"tokens": random_tokens(8, 8).view(1, 8)}]

    def train_dataloader(self):
        return DataLoader([batch["tokens"][0] for batch in self.held_out_batches()], collate_fn=_rows)

    def test_dataloader(self):
        return DataLoader(self.chunks)


def _rows(rows):
    return {"tokens": torch.stack(rows)}


def random_tokens(length: int, seed: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


def host(name: str = "transformer_tiny", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **SIZES).to(dtype)


def module(**options) -> TestTimeTrainingModule:
    defaults = {"model": host(), "memory": "low_rank", "memory_learning_rate": 0.05}
    return TestTimeTrainingModule(**(defaults | options))


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "accelerator": "cpu", "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "inference_mode": False, "max_epochs": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


def streamed(lit: TestTimeTrainingModule, data: Stream | None = None, **options) -> dict[str, float]:
    """Test a module; what it has logged."""
    run = trainer(**options)
    run.test(lit, datamodule=Stream() if data is None else data, verbose=False)
    return {name: value.item() for name, value in run.callback_metrics.items()}


def losses(lit: TestTimeTrainingModule, document: int = 0) -> list[float]:
    return [score.loss_sum for score in lit.stream if score.document == document]


def plain_losses(lit: TestTimeTrainingModule, document: int = 0) -> list[float]:
    return [score.plain_loss_sum for score in lit.stream if score.document == document]


class Memory(pl.Callback):
    """Keeps the memory of a test, and does something after each chunk."""

    def __init__(self, then=None):
        self.then = then

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.memory = pl_module.memory
        if self.then is not None:
            self.then(pl_module, batch_idx)


def targets(batch: dict) -> int:
    return batch["tokens"].shape[1] - 1 - int(batch["prefix"])
