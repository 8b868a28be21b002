"""A small MemoryBankModule, and batches for it."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.layers.banks.layout import Node
from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.memory_bank import MemoryBank
from memzoo.lit_modules import MemoryBankModule

ROWS, BRANCHING = (3, 2), 2
SIZES = {"vocab_size": 11, "dim": 8, "depth": 1, "num_heads": 1, "hidden_dim": 16}


def tree(seed: int = 0) -> ClusterTree:
    generator = torch.Generator().manual_seed(seed)
    return ClusterTree([torch.randn(BRANCHING**level, 4, generator=generator) for level in (1, 2)])


class Batches(pl.LightningDataModule):
    """Given batches, in order, and the tree of their paths."""

    def __init__(self, train: Sequence[dict] = (), val: Sequence[dict] | dict[str, Sequence[dict]] = ()):
        super().__init__()
        self.train, self.val, self.tree = train, val, tree()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=None)

    def val_dataloader(self):
        if isinstance(self.val, dict):
            return {name: torch.utils.data.DataLoader(own, batch_size=None) for name, own in self.val.items()}
        return torch.utils.data.DataLoader(self.val, batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


class Outputs(pl.Callback):
    """Remembers what every training step has returned."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen.append(outputs)


def trainer(*callbacks, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(callbacks=list(callbacks), **quiet, **options)


def batch(*leaves: int, seed: int = 0) -> dict[str, Tensor]:
    """A row for each leaf of the tree."""
    tokens = torch.randint(11, (len(leaves), 7), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "paths": torch.tensor([[leaf // BRANCHING, leaf] for leaf in leaves])}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("hier_memory_tiny", **SIZES)


def module(**options) -> MemoryBankModule:
    options = {"rows": ROWS, "bank_dtype": "float32", "learning_rate": 0.05, "schedule": "constant"} | options
    return MemoryBankModule(options.pop("model", None) or model(), **({"warmup_steps": 0} | options))


def weights(lit: MemoryBankModule) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in lit.model.named_parameters()}


def blocks(bank: MemoryBank) -> dict[Node, Tensor]:
    return {node: bank.block_of(*node).clone() for node in bank.written()}


def loss_of(lit: MemoryBankModule, rows: dict[str, Tensor], paths: Tensor | None) -> float:
    memories = None if paths is None else lit.bank.fetch(paths)
    with torch.no_grad():
        logits, _ = lit(rows["tokens"][:, :-1], memories=memories)
    return nn.functional.cross_entropy(logits.mT, rows["tokens"][:, 1:]).item()
