"""Training with graph memories on several devices: equal replicas, equal shards, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from memzoo.lit_modules import GraphMemoryUpkeep
from tests.lit_modules.graph_memory_cases import SLOTS, STEADY, batches, cells, loader, module, trainer
from tests.lit_modules.processes import run_two

# Several devices


class Replica(pl.Callback):
    """Saves what a process has before the last step and after it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            self.save(pl_module, f"{trainer.global_rank}.before.pt")

    def on_train_end(self, trainer, pl_module):
        self.save(pl_module, f"{trainer.global_rank}.after.pt")

    def save(self, pl_module, name):
        state = pl_module.model.state_dict()
        whole = {path: value.full_tensor() if isinstance(value, DTensor) else value for path, value in state.items()}
        torch.save(whole, self.folder / name)


class Shares(pl.LightningDataModule):
    """The rows of every batch that are a process's own."""

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return loader([{"tokens": batch["tokens"].chunk(world)[rank]} for batch in batches(4)])


def train(folder: Path, cell: dict | None = None, maintain_every: int | None = 4, **options) -> None:
    """Train four steps, the last of which ends with a slot of each cell seeded if there is maintenance."""
    # The cluster loss is the one that is no mean over tokens.
    lit = module(dead_usage=0.1, loss_weights={"cluster": 0.0}, **cell or {})
    for one in cells(lit):
        one.usage[0] = 0
    upkeep = GraphMemoryUpkeep(**STEADY, maintain_every=maintain_every)
    run = trainer(upkeep, Replica(folder), use_distributed_sampler=False, log_every_n_steps=1, **options)
    run.fit(lit, datamodule=Shares())


SHARDED = {"cell": {"write_back": "off"}, "maintain_every": None}


def train_two(folder: Path) -> None:
    """Be one of two processes that train with replicas, then with shards."""
    train(folder / "replicas", devices=2, strategy="ddp")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    train(folder / "shards", devices=2, strategy=strategy, **SHARDED)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes have saved."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("replicas", "shards"):
        (folder / name).mkdir()
    run_two(train_two, folder)
    return folder


def saved(folder: Path, when: str) -> list[dict[str, Tensor]]:
    return [torch.load(path) for path in sorted(folder.glob(f"*.{when}.pt"))]


@pytest.mark.slow  # starts two processes
def test_two_processes_equal_each_other_and_one_that_reads_the_rows_of_both(two, tmp_path):
    before, after = saved(two / "replicas", "before"), saved(two / "replicas", "after")
    for first, second in (before, after):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    train(tmp_path)
    torch.testing.assert_close(before[:1], saved(tmp_path, "before"), rtol=1e-4, atol=1e-6)
    assert after[0]["blocks.0.ffn.age"].tolist() == [0] + [4] * (SLOTS - 1)


@pytest.mark.slow
def test_two_processes_that_share_the_parameters_equal_one_that_has_all(two, tmp_path):
    first, second = saved(two / "shards", "after")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    train(tmp_path, **SHARDED)
    torch.testing.assert_close([first], saved(tmp_path, "after"), rtol=1e-4, atol=1e-6)
    assert first["blocks.0.ffn.age"].tolist() == [4] * SLOTS


def set_up(world_size: int, strategy: type, maintain_every: int | None = None, **cell) -> None:
    run = SimpleNamespace(world_size=world_size, strategy=strategy.__new__(strategy))
    GraphMemoryUpkeep(maintain_every=maintain_every).setup(run, module(**cell), "fit")


def test_a_strategy_that_shards_is_refused_where_slots_are_changed_whole():
    set_up(2, ModelParallelStrategy, write_back="off")
    for options, words in (
        ({"maintain_every": 3, "write_back": "off"}, "maintain_every=3"),
        ({"write_back": "deferred"}, "write_back='deferred'"),
        ({"maintain_every": 3}, "maintain_every=3 and write_back='deferred'"),
    ):
        with pytest.raises(ValueError, match=f"ModelParallelStrategy shards the centroids, which {words} .*'ddp'"):
            set_up(2, ModelParallelStrategy, **options)
    with pytest.raises(ValueError, match=r"strategy=FSDPStrategy is not supported.*strategy='ddp'"):
        set_up(1, FSDPStrategy, write_back="off")


def test_the_reference_write_back_is_refused_on_several_devices():
    with pytest.raises(ValueError, match=r"write_back='reference'.*2 replicas of DDPStrategy.*'deferred'"):
        set_up(2, DDPStrategy, write_back="reference")
    set_up(1, SingleDeviceStrategy, write_back="reference")
    set_up(2, DDPStrategy)
