"""MemoryBankModule: what is trained, and what is measured."""

import os
from collections.abc import Sequence

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from memzoo.layers.banks.fetched import Fetched
from memzoo.layers.banks.layout import Node
from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.memory_bank import MemoryBank
from memzoo.lit_modules import CausalLMModule, MemoryBankModule, MuPlusPlus
from tests.lit_modules.bank_module_cases import (
    BRANCHING,
    ROWS,
    SIZES,
    Batches,
    Outputs,
    batch,
    blocks,
    loss_of,
    model,
    module,
    trainer,
    tree,
    weights,
)
from tests.lit_modules.processes import run_two

# What is trained


def test_03_a_frozen_anchor_stays_to_the_bit_while_blocks_on_the_paths_move():
    lit = module(mode="frozen")
    before = weights(lit)
    trainer().fit(lit, datamodule=Batches([batch(0, 1), batch(0, 1, seed=1)]))
    assert all(torch.equal(weight, before[name]) for name, weight in lit.model.named_parameters())
    assert all(weight.grad is None for weight in lit.model.parameters())
    assert lit.bank.written() == [Node(1, 0), Node(2, 0), Node(2, 1)]


@pytest.mark.parametrize("mode", ["frozen", "cotrain"])
def test_a_frozen_anchor_evaluates_while_it_trains_its_bank(mode):
    lit, seen = module(mode=mode), []
    lit.model.register_forward_pre_hook(lambda own, _: seen.append((torch.is_grad_enabled(), own.training)))
    trainer(max_epochs=2).fit(lit, datamodule=Batches([batch(0)], [batch(0)]))
    assert [training for trains, training in seen if trains] == [mode == "cotrain"] * 2
    assert lit.train().model.training == (mode == "cotrain")


@pytest.mark.parametrize("mode", ["cotrain", "scratch"])
def test_other_modes_train_both_by_the_same_schedule(mode):
    lit = module(mode=mode, memory_learning_rate=0.5, schedule="cosine", schedule_steps=4, generic_probability=0.0)
    before = weights(lit)
    fit = trainer()
    fit.fit(lit, datamodule=Batches([batch(0), batch(3)]))
    assert not any(torch.equal(weight, before[name]) for name, weight in lit.model.named_parameters())
    assert lit.bank.written() == [Node(1, 0), Node(1, 1), Node(2, 0), Node(2, 3)]
    matrices, others, memory = fit.optimizers[0].param_groups
    assert memory["name"] == "memory"
    assert memory["lr"] == pytest.approx(10 * matrices["lr"]) == pytest.approx(10 * others["lr"])
    assert matrices["lr"] < 0.05


def test_the_rates_and_decays_of_the_modes_are_the_paper_s():
    chosen = {
        mode: MemoryBankModule(model(), rows=ROWS, mode=mode).hparams for mode in ("frozen", "cotrain", "scratch")
    }
    rates = {mode: (own["learning_rate"], own["weight_decay"]) for mode, own in chosen.items()}
    assert rates == {"frozen": (1e-4, 1e-3), "cotrain": (1e-4, 1e-3), "scratch": (1e-3, 0.1)}


def test_only_the_chosen_blocks_are_trained_and_batches_without_them_change_nothing():
    lit, seen = module(mode="frozen", only=[(2, 3)]), Outputs()
    trainer(seen).fit(lit, datamodule=Batches([batch(0), batch(3), batch(1)]))
    assert lit.bank.written() == [Node(2, 3)]
    assert [bool(outputs) for outputs in seen.seen] == [False, True, False]


def test_accumulated_batches_equal_one_of_all_their_rows():
    def fit(batches: list[dict], steps: int) -> MemoryBankModule:
        lit = module(generic_probability=0.0)
        trainer(accumulate_grad_batches=steps).fit(lit, datamodule=Batches(batches))
        return lit

    whole, parts = batch(0, 1, 3, 0), [batch(0, 1, 3, 0)] * 2
    halves = [{name: own[rows] for name, own in whole.items()} for rows in (slice(2), slice(2, 4))]
    one, two = fit([whole], 1), fit(halves, 2)
    torch.testing.assert_close(blocks(one.bank), blocks(two.bank), rtol=1e-3, atol=1e-4)
    assert fit(parts, 2).bank.written() == one.bank.written()


def test_the_trainer_clips_the_gradients_of_blocks():
    def step(**options) -> float:
        lit = module(mode="frozen", weight_decay=0.0)
        trainer(**options).fit(lit, datamodule=Batches([batch(0)]))
        return (lit.bank.block_of(1, 0) - lit.bank.layout.initial_block(Node(1, 0), 0)).abs().max().item()

    assert step() == pytest.approx(0.05, rel=1e-3)
    assert step(gradient_clip_val=1e-9) < 0.01  # below the epsilon of AdamW


def test_blocks_train_under_autocast_and_in_half_precision():
    for precision in ("bf16-mixed", "bf16-true"):
        lit = module(generic_probability=0.0, bank_dtype="bfloat16")
        fit = trainer(precision=precision)
        fit.fit(lit, datamodule=Batches([batch(0)], [batch(0)]))
        assert lit.bank.written() == [Node(1, 0), Node(2, 0)]
        assert fit.optimizers[0].state_dict()["memory"]["blocks"]["1.0"]["master"].dtype == torch.float32


# Generic blocks


class Reading(nn.Module):
    """A model that remembers what it is given to read."""

    vocab_size = 11

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(11)), []
        self.layout = model().layout

    def forward(self, tokens, state=None, *, memories=None, **_):
        self.seen.append(memories)
        return self.weight.expand(*tokens.shape, 11) + sum(block.sum() for block in memories.blocks), state


class Wide(Batches):
    """Batches whose tree has 16 children a node, as the paper's."""

    def __init__(self, train):
        super().__init__(train)
        generator = torch.Generator().manual_seed(0)
        self.tree = ClusterTree([torch.randn(16**level, 4, generator=generator) for level in (1, 2)])


def generic_rows(seen: Sequence[Fetched], branching: int) -> list[int]:
    """Count the rows of each batch that read generic blocks."""
    found = []
    for memories in seen:
        held = dict(zip(memories.nodes, memories.readers, strict=True))
        assert (Node(1, branching) in held) == (Node(2, branching**2) in held), "all of a path, or nothing"
        readers = held.get(Node(1, branching), [])
        found.append(memories.batch_size if readers is None else len(readers))
    return found


def test_17_a_seventeenth_of_the_rows_read_generic_blocks_by_default():
    def counts(seed: int) -> list[int]:
        lit = module(model=Reading(), rows=(1, 1), learning_rate=0.0, seed=seed)
        trainer(limit_val_batches=0).fit(lit, datamodule=Wide([batch(*[0] * 1000)] * 17))
        return generic_rows(lit.model.seen, 16)

    draws, share = 17_000, 1 / 17
    assert abs(sum(counts(0)) - draws * share) < 3 * (draws * share * (1 - share)) ** 0.5
    assert len(set(counts(0))) > 5
    assert counts(0) == counts(0) != counts(1)


class Generic(pl.Callback):
    """Remembers in which steps the generic blocks moved."""

    def __init__(self):
        self.moved, self.last = [], {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = {node: pl_module.bank.block_of(*node).clone() for node in (Node(1, 16), Node(2, 256))}
        self.moved.append([not torch.equal(block, self.last.get(node, block)) for node, block in now.items()])
        self.last = now


def test_17_generic_blocks_move_in_the_steps_that_read_them_and_no_others():
    lit, seen = module(model=Reading(), rows=(1, 1)), Generic()
    trainer(seen, limit_val_batches=0).fit(lit, datamodule=Wide([batch(0, 1)] * 60))
    read = [count > 0 for count in generic_rows(lit.model.seen, 16)]
    assert 2 <= sum(read) <= 20
    assert seen.moved[1:] == [[own, own] for own in read[1:]]


@pytest.mark.parametrize(("probability", "expected"), [(0.0, [(1, 0), (2, 0)]), (1.0, [(1, 2), (2, 4)])])
def test_17_a_row_moves_its_blocks_or_the_generic_ones(probability, expected):
    lit = module(generic_probability=probability)
    trainer().fit(lit, datamodule=Batches([batch(0)]))
    assert lit.bank.written() == expected


def test_the_draws_depend_on_the_place_of_a_batch_alone():
    lit, other = (module(model=Reading(), learning_rate=0.0, generic_probability=0.5) for _ in range(2))
    trainer(max_epochs=2, limit_val_batches=0).fit(lit, datamodule=Batches([batch(*[0] * 50)] * 4))
    uneven = [batch(*[0] * 50), batch(*[0] * 7)] + [batch(*[0] * 50)] * 2
    trainer(max_epochs=2, limit_val_batches=0, accumulate_grad_batches=2).fit(other, datamodule=Batches(uneven))
    straight, beside = (generic_rows(each.model.seen, BRANCHING) for each in (lit, other))
    same = [place for place in range(8) if place % 4 != 1]
    assert [straight[place] for place in same] == [beside[place] for place in same]
    assert len(set(straight)) > 4


def test_a_frozen_model_reads_no_generic_blocks_in_training_unless_asked_to():
    for options, expected in (({}, False), ({"generic_probability": 1.0}, True)):
        lit = module(mode="frozen", **options)
        trainer().fit(lit, datamodule=Batches([batch(0, 1, 2, 3)] * 5))
        assert (Node(1, BRANCHING) in lit.bank.written()) == expected


# Measuring


def test_validation_measures_fetched_generic_and_no_blocks():
    lit, rows = module(generic_probability=0.5), batch(0, 3)
    fit = trainer()
    fit.fit(lit, datamodule=Batches([batch(0, 1, 2, 3)] * 10))
    (measured,) = fit.validate(lit, datamodule=Batches(val=[rows]), verbose=False)
    losses = {name.removesuffix("loss"): loss for name, loss in measured.items() if name.endswith("loss")}
    expected = {"val/": rows["paths"], "val/generic/": lit.bank.generic_paths(2), "val/anchor/": None}
    assert losses == {name: pytest.approx(loss_of(lit, rows, paths), rel=1e-5) for name, paths in expected.items()}
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_named_loaders_are_compared_each():
    lit = module(rows=ROWS)
    parts = Batches(val={"a": [batch(0)], "b": [batch(3, seed=1)]})
    measured = {
        name: own for part in trainer().test(lit, datamodule=parts, verbose=False) for name, own in part.items()
    }
    readings = [f"test/{loader}{reading}loss" for loader in ("", "a/", "b/") for reading in ("", "generic/", "anchor/")]
    assert {name for name in measured if name.endswith("loss")} == {*readings}
    assert measured["test/b/anchor/loss"] == pytest.approx(loss_of(lit, batch(3, seed=1), None), rel=1e-5)


def test_without_comparison_only_what_is_fetched_is_measured():
    (measured,) = trainer().validate(module(compare=False), datamodule=Batches(val=[batch(0)]), verbose=False)
    assert {*measured} == {"val/loss", "val/accuracy", "val/perplexity"}


def test_prediction_reads_what_is_fetched():
    lit, rows = module(generic_probability=0.0), batch(0)
    fit = trainer()
    fit.fit(lit, datamodule=Batches([rows] * 3))
    (predicted,) = fit.predict(lit, datamodule=Batches(val=[rows]))
    assert predicted["losses"].mean().item() == pytest.approx(loss_of(lit, rows, rows["paths"]), rel=1e-5)


# The anchor


def test_the_anchor_begins_with_the_weights_of_a_run(tmp_path):
    anchor = CausalLMModule("hier_memory_tiny", SIZES, learning_rate=0.1)
    fit = trainer()
    fit.fit(anchor, datamodule=Batches([batch(0)]))
    fit.save_checkpoint(path := str(tmp_path / "anchor.ckpt"))
    lit = MemoryBankModule("hier_memory_tiny", SIZES, rows=ROWS, mode="frozen", anchor_checkpoint=path)
    fit = trainer()
    fit.fit(lit, datamodule=Batches([batch(0)]))
    torch.testing.assert_close(lit.model.state_dict(), anchor.model.state_dict(), rtol=0, atol=0)
    fit.save_checkpoint(tmp_path / "it.ckpt")
    (tmp_path / "anchor.ckpt").unlink()
    loaded = MemoryBankModule.load_from_checkpoint(tmp_path / "it.ckpt")
    trainer().fit(loaded, datamodule=Batches([batch(0)]))  # frozen by name, but not random
    torch.testing.assert_close(loaded.model.state_dict(), anchor.model.state_dict(), rtol=0, atol=0)


def test_an_anchor_of_another_model_is_refused(tmp_path):
    fit = trainer()
    fit.fit(CausalLMModule("hier_memory_tiny", SIZES | {"dim": 4}), datamodule=Batches([batch(0)]))
    fit.save_checkpoint(path := str(tmp_path / "anchor.ckpt"))
    with pytest.raises(ValueError, match=r"anchor_checkpoint=.*is of another model"):
        MemoryBankModule("hier_memory_tiny", SIZES, rows=ROWS, anchor_checkpoint=path)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "thaw"}, "mode='thaw'"),
        ({"generic_probability": 1.5}, r"generic_probability=1.5 is no probability"),
        (
            {"mode": "scratch", "anchor_checkpoint": "a.ckpt"},
            r"mode='scratch' starts without anchor_checkpoint='a.ckpt'",
        ),
        ({"truncated_backpropagation": True}, "truncated_backpropagation=True carries states"),
        ({"mup": MuPlusPlus(8, 1)}, r"mup=MuPlusPlus\(base_dim=8.* has no learning rate for blocks"),
        ({"anchor_checkpoint": "a.ckpt"}, r"anchor_checkpoint='a.ckpt' does not exist"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryBankModule(model(), rows=ROWS, **options)


def test_a_bank_beside_what_one_is_made_of_is_refused():
    bank = MemoryBank.create(tree(), model().layout(ROWS, branching=BRANCHING))
    with pytest.raises(ValueError, match=r"rows=\(3, 2\), bank_path=None are of a bank to make"):
        module(bank=bank)


def test_data_and_bank_that_do_not_fit_are_refused(tmp_path):
    data = Batches([batch(0)])
    with pytest.raises(ValueError, match=r"bank=None is made of rows=None and the data module's tree"):
        trainer().fit(module(rows=None), datamodule=data)
    other = MemoryBank.create(tree(seed=1), model().layout(ROWS, branching=BRANCHING))
    with pytest.raises(ValueError, match=r"is for a tree with fingerprint.*use the data that the bank was made for"):
        trainer().fit(module(rows=None, bank=other), datamodule=data)
    with pytest.raises(ValueError, match=r"batch has \['tokens'\], no 'paths'"):
        trainer().fit(module(), datamodule=Batches([{"tokens": batch(0)["tokens"]}]))
    MemoryBank.create(tree(), model().layout((1, 1), branching=BRANCHING), path=tmp_path / "bank").close()
    with pytest.raises(ValueError, match=r"bank_path=.*holds a bank with layout=.*use another folder"):
        trainer().fit(module(bank_path=str(tmp_path / "bank")), datamodule=data)
    MemoryBank.create(
        tree(), model().layout(ROWS, branching=BRANCHING, dtype=torch.float32), path=tmp_path / "it"
    ).close()
    for options, name in (({"seed": 7}, "seed=0, asked for is 7"), ({}, "tree=.*, asked for is")):
        data.tree = tree(seed=0 if options else 1)
        with pytest.raises(ValueError, match=f"holds a bank with {name}.*use another folder"):
            trainer().fit(module(bank_path=str(tmp_path / "it"), **options), datamodule=data)


def test_two_ways_to_clip_are_refused():
    with pytest.raises(ValueError, match=r"clip_per_subtree=1.0 is instead of the trainer's gradient_clip_val=0.5"):
        trainer(gradient_clip_val=0.5).fit(module(clip_per_subtree=1.0), datamodule=Batches([batch(0)]))
    trainer(gradient_clip_val=0.0).fit(module(clip_per_subtree=1.0), datamodule=Batches([batch(0)]))


@pytest.mark.parametrize("name", ["generic", "anchor"])
def test_a_loader_is_not_named_as_a_comparison(name):
    data = Batches(val={name: [batch(0)], "other": [batch(0)]})
    with pytest.raises(ValueError, match=f"has a loader named '{name}'.*or use compare=False"):
        trainer().validate(module(), datamodule=data, verbose=False)
    (measured, _) = trainer().validate(module(compare=False), datamodule=data, verbose=False)
    assert f"val/{name}/loss" in measured


def test_random_weights_are_not_frozen():
    lit = MemoryBankModule("hier_memory_tiny", SIZES, rows=ROWS, mode="frozen")
    with pytest.raises(ValueError, match=r"mode='frozen' keeps a model.*random weights; pass anchor_checkpoint"):
        trainer().fit(lit, datamodule=Batches([batch(0)]))


# Several devices


def part(folder: str) -> None:
    """Be one of two replicas that train on the same batches, of which each reads rows of its own."""
    rank = int(os.environ["RANK"])
    leaves = [([0], [1]), ([0, 1], [3]), ([2], [2, 3, 0]), ([0], [1, 1])]  # as many rows as there happen to be
    own = [batch(*both[rank], seed=step) for step, both in enumerate(leaves)]
    lit = module(generic_probability=0.3)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "limit_val_batches": 0}
    trainer(gradient_clip_val=0.1, **options).fit(lit, datamodule=Batches(own))
    torch.save([weights(lit), [*blocks(lit.bank).values()]], f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match=r"mode='frozen' leaves 2 devices nothing to share.*merge"):
        trainer(**options).fit(module(mode="frozen"), datamodule=Batches(own))
    with pytest.raises(ValueError, match=r"bank_path=.*is for one process that trains, not 2"):
        trainer(**options).fit(module(bank_path=f"{folder}/bank"), datamodule=Batches(own))


@pytest.mark.slow
def test_two_replicas_stay_equal_to_the_bit(tmp_path):
    run_two(part, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(one[1]) >= 6
    torch.testing.assert_close(one, two, rtol=0, atol=0)
