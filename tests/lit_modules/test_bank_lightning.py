"""MemoryBankModule: runs that stop and go on, checkpoints, banks on disk, and subtrees that are trained apart."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from memzoo.arch import create_model
from memzoo.layers.banks.layout import Node
from memzoo.layers.memory_bank import MemoryBank
from memzoo.lit_modules import MemoryBankModule, TopicData
from tests.lit_modules.bank_module_cases import (
    BRANCHING,
    ROWS,
    SIZES,
    Batches,
    batch,
    blocks,
    loss_of,
    model,
    module,
    trainer,
    tree,
    weights,
)

TOPICS = {"num_topics": 4, "facts_per_topic": 8, "num_common_facts": 2, "num_values": 16, "words_per_topic": 4}
TOPICS |= {"num_common_words": 4, "context_words": 4, "num_statements": 2, "train_documents": 48, "depth": 2}


# Stopping, going on


def topics(folder=None, **options) -> tuple[MemoryBankModule, TopicData]:
    torch.manual_seed(0)
    data = TopicData(**TOPICS, branching=2, batch_size=2, documents_per_row=2)
    overrides = SIZES | {"vocab_size": data.vocab_size}
    options = {"bank_path": None if folder is None else str(folder), "compare": False} | options
    lit = module(model=create_model("hier_memory_tiny", **overrides), bank_dtype="bfloat16", **options)
    return lit, data


def run(folder, *callbacks, path=None, steps: int, **options) -> MemoryBankModule:
    lit, data = topics(folder)
    fit = trainer(*callbacks, max_epochs=-1, max_steps=steps, limit_val_batches=0, **options)
    fit.fit(lit, datamodule=data, ckpt_path=path)
    assert len(data.train_dataloader()) > 8, "this is about the middle of an epoch"
    return lit


class KilledError(Exception):
    """Ends a run from within."""


class Kill(pl.Callback):
    """Ends a run after some steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_run_killed_in_mid_epoch_and_resumed_equals_one_that_was_not(place, tmp_path):
    folder, other = (None, None) if place == "memory" else (tmp_path / "bank", tmp_path / "other")
    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    lit, data = topics(folder)
    with pytest.raises(KilledError):
        trainer(keep, Kill(5), max_epochs=-1, enable_checkpointing=True).fit(lit, datamodule=data)
    if folder is None:
        assert len(lit.bank.written()) > 3
    else:
        assert lit.bank is None, "a run that failed lets go of its bank"
        with MemoryBank.open(folder) as kept:
            assert kept.written() == [], "nothing is committed before the end"
    resumed, straight = run(folder, path=tmp_path / "mid.ckpt", steps=8), run(other, steps=8)
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)
    banks = [lit.bank or MemoryBank.open(lit.hparams.bank_path, read_only=True) for lit in (resumed, straight)]
    assert len(banks[0].written()) > 3
    torch.testing.assert_close(*map(blocks, banks), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_run_goes_on_and_is_evaluated_where_blocks_were_deleted(place, tmp_path):
    folder = None if place == "memory" else str(tmp_path / "bank")
    lit, fit, rows = module(generic_probability=0.0, bank_path=folder), trainer(), batch(0, 3)
    fit.fit(lit, datamodule=Batches([rows] * 2))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    bank = lit.bank or MemoryBank.open(folder)
    bank.delete(1, 0)
    if folder is not None:
        bank.close()
    options = {"bank_path": folder} if folder is not None else {"bank": bank, "rows": None}
    again = module(generic_probability=0.0, **options)
    (measured,) = trainer().test(again, datamodule=Batches(val=[rows]), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert measured["test/loss"] != measured["test/anchor/loss"]
    more = trainer(max_epochs=2)
    more.fit(again, datamodule=Batches([rows] * 2), ckpt_path=tmp_path / "it.ckpt")
    assert more.global_step == 4
    assert more.optimizers[0].touched == [Node(1, 1), Node(2, 0), Node(2, 3)]
    with pytest.raises(ValueError, match="was deleted"):
        (again.bank or MemoryBank.open(folder, read_only=True)).block_of(1, 0)


def test_a_checkpoint_is_evaluated_with_its_blocks(tmp_path):
    lit, rows = module(generic_probability=0.0), batch(0, 3)
    fit = trainer()
    fit.fit(lit, datamodule=Batches([rows] * 3))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    expected = pytest.approx(loss_of(lit, rows, rows["paths"]), rel=1e-5)
    fresh, data = module(), Batches(val=[rows])
    (measured,) = trainer().validate(fresh, datamodule=data, ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert measured["val/loss"] == expected
    loaded = MemoryBankModule.load_from_checkpoint(tmp_path / "it.ckpt", model=model(seed=1))
    (measured,) = trainer().validate(loaded, datamodule=data, verbose=False)
    assert measured["val/loss"] == expected
    assert loaded.hparams == lit.hparams


def test_a_read_only_bank_is_evaluated_as_it_is(tmp_path):
    rows, data = batch(0), Batches(val=[batch(0)])
    lit, fit = module(generic_probability=0.0), trainer()
    fit.fit(lit, datamodule=Batches([rows] * 3))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    with lit.bank.copy_to(tmp_path / "bank") as copy:
        copy.put({node: 2 * block for node, block in blocks(copy).items()})
        copy.commit()
    with MemoryBank.open(tmp_path / "bank", read_only=True) as bank:
        reader = module(rows=None, bank=bank)
        (measured,) = trainer().validate(reader, datamodule=data, ckpt_path=tmp_path / "it.ckpt", verbose=False)
        assert reader.bank is bank
        assert measured["val/loss"] == pytest.approx(loss_of(reader, rows, rows["paths"]), rel=1e-5)
        assert measured["val/loss"] != pytest.approx(loss_of(lit, rows, rows["paths"]), rel=1e-5)


def test_a_checkpoint_loads_by_itself_where_the_model_has_a_name(tmp_path):
    lit = MemoryBankModule("hier_memory_tiny", SIZES, rows=ROWS, only=[(1, 0)])
    fit = trainer()
    fit.fit(lit, datamodule=Batches([batch(0)]))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    loaded = MemoryBankModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert loaded.hparams == lit.hparams
    torch.testing.assert_close(weights(loaded), weights(lit), rtol=0, atol=0)


# Banks on disk


def test_a_bank_on_disk_is_open_while_the_trainer_runs(tmp_path):
    """So that the next module, in the same process too, may open it, and a checkpoint may be written behind a fit."""
    path, rows = str(tmp_path / "bank"), batch(0, 3)
    lit, fit = module(generic_probability=0.0, bank_path=path), trainer()
    fit.fit(lit, datamodule=Batches([rows] * 3))
    assert lit.bank is None
    fit.save_checkpoint(tmp_path / "it.ckpt")
    with MemoryBank.open(path) as bank:
        assert bank.written() == [Node(1, 0), Node(1, 1), Node(2, 0), Node(2, 3)]
        lit.bank = bank
        expected = pytest.approx(loss_of(lit, rows, rows["paths"]), rel=1e-5)
        lit.bank = None
        for _ in range(2):  # beside the one who writes
            (measured,) = fit.validate(lit, datamodule=Batches(val=[rows]), verbose=False)
            assert measured["val/loss"] == expected
    second = module(generic_probability=0.0, bank_path=path)
    trainer().fit(second, datamodule=Batches([rows]))
    assert second.bank is None


def test_a_checkpoint_is_evaluated_with_its_blocks_beside_a_bank_on_disk(tmp_path):
    """The blocks of a checkpoint of a fit that goes on, or was killed, are not in the folder."""
    path, rows = str(tmp_path / "bank"), batch(0, 3)
    lit, fit = module(generic_probability=0.0), trainer()
    fit.fit(lit, datamodule=Batches([rows] * 3))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    expected = pytest.approx(loss_of(lit, rows, rows["paths"]), rel=1e-5)
    half = pytest.approx(loss_of(lit, rows, torch.where(rows["paths"] == 1, 2, rows["paths"])), rel=1e-5)
    MemoryBank.create(tree(), lit.bank.layout, path=path).close()
    loaded = MemoryBankModule.load_from_checkpoint(tmp_path / "it.ckpt", model=model(seed=1), bank_path=path)
    for _ in range(2):
        (measured,) = trainer().validate(loaded, datamodule=Batches(val=[rows]), verbose=False)
        assert measured["val/loss"] == expected
    with MemoryBank.open(path) as bank:
        assert bank.written() == []
        bank.block(1, 1)
    (measured,) = trainer().validate(loaded, datamodule=Batches(val=[rows]), verbose=False)
    assert measured["val/loss"] == half
    assert measured["val/loss"] != expected
    trainer().fit(loaded, datamodule=Batches([batch(1)]))
    with MemoryBank.open(path) as bank:
        assert bank.written() == sorted([*lit.bank.written(), Node(2, 1)])


@pytest.mark.parametrize("exists", [False, True])
def test_a_dry_run_commits_nothing(exists, tmp_path):
    path = tmp_path / "bank"
    if exists:
        layout = model().layout(ROWS, branching=BRANCHING, dtype=torch.float32)
        MemoryBank.create(tree(), layout, path=path).close()
    lit = module(bank_path=str(path))
    trainer(fast_dev_run=True).fit(lit, datamodule=Batches([batch(0)], [batch(0)]))
    assert lit.bank is None
    assert path.exists() == exists
    if exists:
        assert MemoryBank.open(path, read_only=True).written() == []


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_a_bank_that_is_not_there_is_not_evaluated(run, tmp_path):
    with pytest.raises(ValueError, match=r"bank_path=.*does not exist.*fit the module first"):
        getattr(trainer(), run)(module(bank_path=str(tmp_path / "bank")), datamodule=Batches(val=[batch(0)]))
    assert not (tmp_path / "bank").exists()


# Subtrees apart


def test_13_subtrees_that_are_trained_apart_and_merged_equal_one_training_of_all():
    """Of a frozen model on batches of one subtree each, with a constant rate, and no gradients clipped together."""

    def fit(within=None) -> MemoryBank:
        data = TopicData(**TOPICS, branching=2, batch_size=2, documents_per_row=2, level=1, within=within)
        lit = module(model=create_model("hier_memory_tiny", **SIZES | {"vocab_size": data.vocab_size}), mode="frozen")
        lit.model.load_state_dict(weights_of)
        trainer(max_epochs=2, limit_val_batches=0).fit(lit, datamodule=data)
        return lit.bank

    torch.manual_seed(0)
    size = TopicData(**TOPICS, branching=2).vocab_size
    weights_of = create_model("hier_memory_tiny", **SIZES | {"vocab_size": size}).state_dict()
    joint, parts = fit(), {subtree: fit((1, subtree)) for subtree in range(2)}
    merged = MemoryBank.create(joint.tree, joint.layout)
    merged.merge(parts)
    assert {node.level for node in joint.written()} == {1, 2}
    assert len(joint.written()) >= 4
    torch.testing.assert_close(blocks(merged), blocks(joint), rtol=0, atol=0)
    assert all(len(part.written()) < len(joint.written()) for part in parts.values())
