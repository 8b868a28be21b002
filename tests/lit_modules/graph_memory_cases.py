"""Small models of graph memories, their data and trainers, for the tests of their training."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from memzoo.arch import Block, CausalLM
from memzoo.layers import Attention
from memzoo.layers.graph_memory_cell import GraphMemoryCell
from memzoo.layers.graph_memory_upkeep import graph_memory_cells
from memzoo.lit_modules import CausalLMModule

SLOTS = 6
STEADY = {"temperature_max": 1.0, "temperature_min": 1.0}


def model(**cell) -> CausalLM:
    torch.manual_seed(0)
    cell = {"num_slots": SLOTS, "navigation_dim": 4, "write_back": "deferred"} | cell
    blocks = [Block(Attention(8, num_heads=2), GraphMemoryCell(8, **cell)) for _ in range(2)]
    return CausalLM(11, 8, blocks)


def module(**cell) -> CausalLMModule:
    return CausalLMModule(model(**cell), learning_rate=0.01, warmup_steps=0, schedule_steps=10)


def batches(count: int, rows: int = 4) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(11, (rows, 6), generator=draw)} for _ in range(count)]


def loader(rows: list[dict[str, Tensor]]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(rows, batch_size=None)


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(callbacks=list(callbacks), **quiet, **options)


def cells(lit: CausalLMModule) -> list[GraphMemoryCell]:
    return list(graph_memory_cells(lit.model).values())
