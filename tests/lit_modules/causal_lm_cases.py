"""Cases for tests of CausalLMModule: tiny models, batches, and trainers that say nothing."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from memzoo.lit_modules import CausalLMModule

SIZES = {"vocab_size": 11, "dim": 16, "depth": 1}
SAMBAY = {"depth": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "window": 4, "hidden_dim": 24}
MODELS = ("titans_lmm_tiny", "transformer_tiny")
MEMORY = {"chunk_size": 4, "num_heads": 1}


def sizes(name: str) -> dict:
    if "sambay" in name:
        return SIZES | SAMBAY
    return SIZES | (MEMORY if "titans" in name else {"num_heads": 1})


class Batches(pl.LightningDataModule):
    """Given batches for training and validation, in order."""

    def __init__(self, train: Sequence[dict] = (), val: Sequence[dict] = (), *, contiguous: bool = False, size=None):
        super().__init__()
        self.train, self.val, self.contiguous = train, val, contiguous
        if size is not None:
            self.bytes_per_token = size

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


class Losses(pl.Callback):
    """Remembers the loss of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen.append(outputs["loss"].item())


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(callbacks=list(callbacks), **quiet, **options)


def tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(seed))


def module(name: str = "titans_lmm_tiny", **options) -> CausalLMModule:
    torch.manual_seed(0)
    return CausalLMModule(name, sizes(name), **({"learning_rate": 0.0, "warmup_steps": 0} | options))


def losses_of(model: nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        logits, _ = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none")
