"""GraphMemoryUpkeep: the temperature's schedule, commits after the optimiser's step, maintenance, several devices."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM
from memzoo.layers import Attention
from memzoo.layers.graph_memory_upkeep import commit, join
from memzoo.layers.trace import Trace
from memzoo.lit_modules import CausalLMModule, GraphMemoryUpkeep
from memzoo.lit_modules.graph_memory import routing_temperature
from memzoo.recipes import recipe_path
from tests.lit_modules.graph_memory_cases import (
    SLOTS,
    STEADY,
    batches,
    cells,
    loader,
    model,
    module,
    trainer,
)

EAGER = {"dead_usage": 1.0, "merge_age": 0}  # every slot is dead at every maintenance


def temperatures(lit: pl.LightningModule) -> set[float]:
    return {round(cell.temperature.item(), 6) for cell in cells(lit)}


class Seen(pl.Callback):
    """What a run looked like, batch by batch and in evaluation; it comes after the upkeep in the list."""

    def __init__(self):
        self.temperatures, self.evaluation, self.ages, self.metrics = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.temperatures.append(temperatures(pl_module))
        self.ages.append(cells(pl_module)[0].age.tolist())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.evaluation.append(temperatures(pl_module))

    on_test_batch_start = on_validation_batch_start


# Temperature


def test_12_the_temperature_falls_from_1_to_a_tenth():
    quarters = [routing_temperature(quarter / 4, 1.0, 0.1) for quarter in range(5)]
    assert quarters == pytest.approx([1.0, 0.439, 0.240, 0.149, 0.1], abs=5e-4)
    assert (quarters[0], quarters[4]) == (1.0, pytest.approx(0.1, rel=1e-12))
    assert routing_temperature(0.5, 1.0, 0.1) == pytest.approx(0.2398, abs=5e-5)
    assert routing_temperature(0.5, 2.0, 0.5) == pytest.approx(2 * 0.25**0.6201145, rel=1e-6)
    steps = [routing_temperature(step / 100, 1.0, 0.1) for step in range(101)]
    assert all(a > b for a, b in itertools.pairwise(steps))


def test_the_temperature_goes_with_the_optimiser_steps_and_evaluation_sees_that_of_the_next():
    lit, seen = module(), Seen()
    run = trainer(GraphMemoryUpkeep(), seen, accumulate_grad_batches=2, val_check_interval=4)
    run.fit(lit, loader(batches(8)), loader(batches(1)))
    expected = [{round(routing_temperature(step / 4, 1.0, 0.1), 6)} for step in range(5)]
    assert seen.temperatures == [expected[batch // 2] for batch in range(8)]
    assert seen.evaluation == [expected[2], expected[4]]
    assert temperatures(lit) == {0.1}
    assert [metrics["train/temperature"] for metrics in seen.metrics] == pytest.approx(
        [one for temperature in seen.temperatures for one in temperature], abs=1e-5
    )


def test_a_schedule_of_its_own_length_stays_at_its_end():
    lit, seen = module(), Seen()
    trainer(GraphMemoryUpkeep(schedule_steps=2), seen).fit(lit, loader(batches(4)))
    assert seen.temperatures == [{1.0}, {round(routing_temperature(0.5, 1.0, 0.1), 6)}, {0.1}, {0.1}]


def test_evaluation_may_have_a_temperature_of_its_own_which_training_does_not_see():
    upkeep, plain = GraphMemoryUpkeep(evaluation_temperature=0.2), GraphMemoryUpkeep()
    runs = []
    for callback in (upkeep, plain):
        lit, seen = module(), Seen()
        run = trainer(callback, seen, val_check_interval=1)
        run.fit(lit, loader(batches(3)), loader(batches(2)))
        runs.append(seen.temperatures)
        assert temperatures(lit) == {0.1}
    assert runs[0] == runs[1]
    lit, seen = module(temperature=0.7), Seen()
    assert upkeep.state_dict()["evaluation_temperature"] == 0.2
    for evaluate in (trainer(upkeep, seen).validate, trainer(upkeep, seen).test):
        evaluate(lit, loader(batches(1)), verbose=False)
    assert seen.evaluation == [{0.2}, {0.2}]
    assert temperatures(lit) == {0.7}


# Commits


def statistics_of(lit: CausalLMModule, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = []
    for batch in rows:
        trace = Trace(signals=False)
        lit.model(batch["tokens"][:, :-1], trace=trace)
        parts.append(trace.statistics)
    return join(parts)


def test_a_commit_follows_every_optimiser_step_with_the_sums_of_its_micro_batches():
    lit, by_hand, rows = module(), module(), batches(4)
    for one in (lit, by_hand):
        one.hparams["learning_rate"] = 0.0  # nothing but the commits changes the parameters
    seen = Seen()
    upkeep = GraphMemoryUpkeep(**STEADY, maintain_every=None)
    trainer(upkeep, seen, accumulate_grad_batches=2).fit(lit, loader(rows))
    for pair in (rows[:2], rows[2:]):
        commit(by_hand.model, statistics_of(by_hand, pair))
    for cell, own, new in zip(cells(lit), cells(by_hand), cells(module()), strict=True):
        torch.testing.assert_close(cell.usage, own.usage)
        torch.testing.assert_close(cell.centroids, own.centroids)
        assert not torch.equal(cell.centroids, new.centroids)
        assert cell.age.tolist() == [2] * SLOTS
    assert [ages[0] for ages in seen.ages] == [0, 0, 1, 1]
    assert "train/graph_reset" not in seen.metrics[-1]


def test_a_rest_of_an_epoch_that_is_stepped_is_committed():
    lit = module()
    trainer(GraphMemoryUpkeep(**STEADY), accumulate_grad_batches=2, max_epochs=2).fit(lit, loader(batches(3)))
    assert cells(lit)[0].age.tolist() == [4] * SLOTS


# Maintenance


def test_maintenance_comes_every_so_many_steps_and_is_counted():
    lit, seen = module(**EAGER), Seen()
    counted = GraphMemoryUpkeep(**STEADY, maintain_every=2)
    trainer(counted, seen, accumulate_grad_batches=2).fit(lit, loader(batches(8)))
    assert [metrics["train/graph_reset"] for metrics in seen.metrics] == [0] * 3 + [12] * 4 + [24]
    assert {metrics["train/graph_merged"] for metrics in seen.metrics} == {0}
    assert counted.counts == {"reset": 24, "merged": 0}
    assert [ages[0] for ages in seen.ages] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("states", ["last", "own"])
def test_slots_are_seeded_with_states_of_the_last_cell_or_of_their_own(states):
    lit, [batch] = module(dead_usage=0.999 / SLOTS), batches(1)
    lit.hparams["learning_rate"] = 0.0
    for cell in cells(lit):
        with torch.no_grad():
            cell.usage[0] = 0  # one dead slot
    own = statistics_of(lit, [batch])
    trainer(GraphMemoryUpkeep(**STEADY, maintain_every=1, states=states)).fit(lit, loader([batch]))
    for index, cell in enumerate(cells(lit)):
        path = f"blocks.{index if states == 'own' else 1}.ffn.states"
        assert nn.functional.cosine_similarity(own[path], cell.centroids[0].detach()[None]).max() > 1 - 1e-5


def test_the_draws_are_of_the_seed_alone():
    def run(seed: int, global_seed: int) -> Tensor:
        lit = module(**EAGER)
        torch.manual_seed(global_seed)
        trainer(GraphMemoryUpkeep(**STEADY, maintain_every=2, seed=seed)).fit(lit, loader(batches(2)))
        return cells(lit)[0].centroids.detach()

    assert torch.equal(run(0, 0), run(0, 1))
    assert not torch.equal(run(0, 0), run(1, 0))


def test_a_run_stopped_and_resumed_equals_one_that_was_not(tmp_path):
    def run(*callbacks, path=None, **options) -> CausalLMModule:
        lit = module(**EAGER)
        upkeep = GraphMemoryUpkeep(maintain_every=1, schedule_steps=6)
        run = trainer(upkeep, *callbacks, max_epochs=-1, accumulate_grad_batches=2, **options)
        run.fit(lit, loader(batches(1) * 10), ckpt_path=path)
        assert upkeep.counts["reset"] == 2 * SLOTS * run.global_step
        return lit

    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2)
    run(keep, max_steps=2, enable_checkpointing=True)
    resumed = run(max_steps=5, path=tmp_path / "mid.ckpt")
    straight = run(max_steps=5)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_resumed_schedule_of_another_length_is_warned_of(tmp_path):
    def run(schedule_steps: int, path: Path | None = None, **flat) -> pl.Trainer:
        upkeep = GraphMemoryUpkeep(schedule_steps=schedule_steps, **flat)
        run = trainer(upkeep, max_epochs=-1, max_steps=2 if path is None else 3)
        run.fit(module(), loader(batches(3)), ckpt_path=path)
        return run

    path = tmp_path / "it.ckpt"
    run(6).save_checkpoint(path)
    message = "falls over 6 optimiser steps, this run's over 9, .*schedule_steps=6 to GraphMemoryUpkeep"
    with pytest.warns(UserWarning, match=message) as given:
        run(9, path)
    assert sum("optimiser steps" in str(one.message) for one in given) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint's temperature")
        run(6, path)
        run(9, path, **STEADY)


# Measures


def test_how_the_slots_are_used_is_logged_where_the_trainer_logs():
    lit, rows, logged = module(dead_usage=0.1), batches(4), []
    cells(lit)[0].usage[0] = 0
    original = lit.log

    def log(name: str, value: Tensor, *rest, **options) -> None:
        logged.append((lit.trainer.global_step, name, float(value)))
        original(name, value, *rest, **options)

    lit.log = log
    trainer(GraphMemoryUpkeep(**STEADY), log_every_n_steps=2).fit(lit, loader(rows))
    names = ("usage_effective", "usage_effective_min", "dead_slots", "gate", "momentum", "edge_entropy")
    measured = [one for one in logged if one[1].removeprefix("train/") in (*names, "centroid_cosine")]
    assert [step for step, *_ in measured] == [2] * 7 + [4] * 7
    trace = Trace()
    lit.model.eval()(rows[0]["tokens"], trace=trace)
    of_cells = {
        name: torch.stack([trace.signals[f"blocks.{index}.ffn.{name}"].float() for index in range(2)])
        for name in ("usage_effective", "dead", "gate", "momentum", "edge_entropy", "centroid_cosine")
    }
    expected = {name: values.mean() for name, values in of_cells.items() if name != "dead"}
    expected |= {"usage_effective_min": of_cells["usage_effective"].min(), "dead_slots": of_cells["dead"].sum()}
    last = {name.removeprefix("train/"): value for _, name, value in measured[7:]}
    assert last == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert of_cells["usage_effective"].min() < of_cells["usage_effective"].mean() < SLOTS
    assert last["dead_slots"] == 1


# Refusals


def test_a_model_without_cells_is_refused():
    lit = CausalLMModule(CausalLM(11, 8, [Block(Attention(8, num_heads=2))]))
    with pytest.raises(ValueError, match="model=CausalLM has no GraphMemoryCell"):
        trainer(GraphMemoryUpkeep()).fit(lit, loader(batches(1)))


def test_a_schedule_without_an_end_is_refused_unless_it_is_flat():
    lit = module()
    endless = {"max_epochs": -1, "max_steps": -1}
    with pytest.raises(ValueError, match=r"temperature_max=1.0 falls to temperature_min=0.1.*schedule_steps"):
        trainer(GraphMemoryUpkeep(), **endless).fit(lit, loader(batches(1)))
    flat = GraphMemoryUpkeep(temperature_max=0.5, temperature_min=0.5)
    trainer(flat, Stop(), **endless).fit(lit, loader(batches(1)))
    assert temperatures(lit) == {0.5}


class Stop(pl.Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


class Bare(CausalLMModule):
    """Returns the loss alone."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


def test_a_training_step_without_statistics_is_refused():
    with pytest.raises(ValueError, match=r"outputs=\['loss'\].*Bare has no statistics.*'statistics'"):
        trainer(GraphMemoryUpkeep()).fit(Bare(model()), loader(batches(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_max": 0}, "temperature_max=0"),
        ({"temperature_min": -0.1}, "temperature_min=-0.1"),
        ({"evaluation_temperature": 0.0}, "evaluation_temperature=0.0"),
        ({"schedule_steps": 0}, "schedule_steps=0"),
        ({"maintain_every": 0}, "maintain_every=0.*None for no maintenance"),
        ({"states": "first"}, "states='first'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GraphMemoryUpkeep(**options)


# The recipe


def callbacks(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    listed = recipe["trainer"]["callbacks"]
    return {one["class_path"].rpartition(".")[2]: one.get("init_args", {}) for one in listed}


def test_the_base_recipe_trains_as_the_official_code():
    recipe = yaml.safe_load(recipe_path("gmt/base").read_text())
    model, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    official = dict(learning_rate=3e-4, weight_decay=0.1, decay="all", betas=[0.9, 0.95])
    official |= dict(schedule="cosine", warmup_steps=2000, final_fraction=0.0)
    assert model == official | {"model": "gmt_base", "overrides": {"cell": {"write_back": "deferred"}}}
    assert (data["batch_size"], data["sequence_length"], data["pack_documents"]) == (8, 1024, False)
    assert (trainer["max_epochs"], trainer["accumulate_grad_batches"], trainer["limit_val_batches"]) == (2, 33, 512)
    assert (trainer["precision"], trainer["gradient_clip_val"]) == ("bf16-mixed", 1.0)
    upkeep = dict(temperature_max=1.0, temperature_min=0.1, maintain_every=110, states="last")
    assert callbacks(recipe)["GraphMemoryUpkeep"] == upkeep


def test_the_base_recipe_and_its_dense_baseline_see_the_same_tokens_and_validate_after_whole_steps():
    gmt, gpt = (yaml.safe_load(recipe_path(f"gmt/{name}").read_text()) for name in ("base", "gpt_103m"))
    assert gmt["trainer"]["val_check_interval"] % gmt["trainer"]["accumulate_grad_batches"] == 0
    models = [recipe["model"]["init_args"] for recipe in (gmt, gpt)]
    assert (models[1].pop("model"), models[0].pop("model")) == ("gpt_103m", "gmt_base")
    del models[0]["overrides"]
    named = callbacks(gmt), callbacks(gpt)
    del named[0]["GraphMemoryUpkeep"]
    assert named[0] == named[1]
    for recipe in (gmt, gpt):
        del recipe["trainer"]["callbacks"], recipe["trainer"]["logger"]
    assert gmt == gpt
