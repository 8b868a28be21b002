"""CausalLMModule: the objective, exact validation, carried states, resuming, checkpoints."""

import math
import os
from collections.abc import Sequence
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.lit_modules import CausalLMModule, MuPlusPlus, TextData
from memzoo.lit_modules.metrics import MeanTokenLoss, TokenAccuracy, UnigramEntropy
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens
from memzoo.lit_modules.sharding import shard

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


# The objective


def test_a_target_of_another_document_is_not_counted():
    packed = {"tokens": torch.tensor([[1, 2, 3, 4, 5, 6]]), "doc_ids": torch.tensor([[7, 7, 7, 8, 8, 8]])}
    pieces = NextTokens.of(packed)
    assert pieces.counted.tolist() == [[True, True, False, True, True]]
    assert pieces.doc_ids.tolist() == [[7, 7, 7, 8, 8]]


def test_a_masked_token_is_neither_input_nor_target():
    batch = {"tokens": torch.ones(1, 5, dtype=torch.long), "mask": torch.tensor([[True, True, False, True, True]])}
    assert NextTokens.of(batch).counted.tolist() == [[True, False, False, True]]


def test_labels_are_predicted_in_place_of_the_tokens_where_there_are_any():
    labels = torch.tensor([[5, NOT_SCORED, 7, 8, NOT_SCORED]])
    batch = {"tokens": torch.ones(1, 5, dtype=torch.long), "labels": labels}
    pieces = NextTokens.of(batch)
    assert pieces.counted.tolist() == [[False, True, True, False]]
    assert pieces.targets[pieces.counted].tolist() == [7, 8]
    logits = torch.randn(1, 4, 11)
    expected = -logits.log_softmax(-1)[0, [1, 2], [7, 8]].mean()
    torch.testing.assert_close(pieces.mean(pieces.losses(logits)), expected)
    mask = torch.tensor([[True, True, True, False, True]])
    assert NextTokens.of(batch | {"mask": mask}).counted.tolist() == [[False, True, False, False]]


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"batch\['labels'\] has shape \(2, 4\), batch\['tokens'\] \(2, 5\)"):
        NextTokens.of({"tokens": tokens(2, 5), "labels": tokens(2, 4)})


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_packed_documents_is_that_of_the_documents_alone(name):
    lit, (a, b) = module(name), (tokens(1, 6, seed=1), tokens(1, 4, seed=2))
    packed = {"tokens": torch.cat([a, b], 1), "doc_ids": torch.tensor([[0] * 6 + [1] * 4])}
    seen = Losses()
    trainer(seen).fit(lit, datamodule=Batches([packed]))
    alone = torch.cat([losses_of(lit.model, a), losses_of(lit.model, b)], 1)
    assert seen.seen == pytest.approx([alone.mean().item()], rel=1e-5)


def test_a_batch_without_a_counted_target_costs_nothing():
    pieces = NextTokens.of({"tokens": tokens(1, 3), "mask": torch.zeros(1, 3, dtype=torch.bool)})
    assert pieces.mean(pieces.losses(torch.randn(1, 2, 11))).item() == 0


@pytest.mark.parametrize("batch", [{}, {"tokens": torch.ones(2, 1, dtype=torch.long)}, {"tokens": torch.ones(3)}])
def test_a_batch_without_targets_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch\['tokens'\] has shape"):
        NextTokens.of(batch)


class Reporting(nn.Module):
    """A model whose layers report a loss of their own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens, state=None, *, trace=None, **options):
        if trace is not None:
            trace.scope("router").loss("balance", torch.tensor(3.0))
        return self.model(tokens, state, trace=trace, **options)


def test_losses_that_layers_report_are_added_and_logged():
    torch.manual_seed(0)
    inner, rows, seen = create_model("titans_lmm_tiny", **sizes("titans")), tokens(2, 6), Losses()
    fit = trainer(seen)
    fit.fit(CausalLMModule(Reporting(inner), learning_rate=0.0), datamodule=Batches([{"tokens": rows}]))
    expected = losses_of(inner, rows).mean().item()
    assert seen.seen == pytest.approx([expected + 3], rel=1e-5)
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert fit.callback_metrics["train/router.balance"].item() == 3


# Validation


def test_validation_is_the_mean_over_tokens_of_uneven_batches():
    lit = module()
    batches = [{"tokens": tokens(3, 9, seed=1)}, {"tokens": tokens(1, 5, seed=2)}]
    every = torch.cat([losses_of(lit.model, batch["tokens"]).flatten() for batch in batches]).double()
    (measured,) = trainer().validate(lit, datamodule=Batches(val=batches, size=2.0), verbose=False)
    mean = every.mean().item()
    assert measured["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert measured["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert measured["val/bits_per_byte"] == pytest.approx(mean / math.log(2) / 2, rel=1e-6)
    with torch.no_grad():
        hits = [(lit(b["tokens"][:, :-1])[0].argmax(-1) == b["tokens"][:, 1:]).flatten() for b in batches]
    assert measured["val/accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())


def test_loaders_passed_by_hand_after_a_fit_all_count_though_its_data_module_stays():
    """The trainer keeps the data module, whose main loader is then not among the loaders."""
    lit, fit, data = module(), trainer(), Batches([{"tokens": tokens(2, 5)}])
    data.main_loader = "16"
    fit.fit(lit, datamodule=data)
    assert fit.datamodule is data
    batches = {"a": [{"tokens": tokens(3, 9, seed=1)}], "b": [{"tokens": tokens(2, 5, seed=2)}]}
    losses = {name: losses_of(lit.model, held[0]["tokens"]).flatten() for name, held in batches.items()}
    loaders = {name: torch.utils.data.DataLoader(held, batch_size=None) for name, held in batches.items()}
    for run, stage in ((fit.validate, "val"), (fit.test, "test")):
        [alone] = run(lit, dataloaders=loaders["a"], verbose=False)
        assert alone[f"{stage}/loss"] == pytest.approx(losses["a"].mean().item(), rel=1e-6)
        for given in (loaders, list(loaders.values())):
            parts = run(lit, dataloaders=given, verbose=False)
            measured = {name: value for part in parts for name, value in part.items()}
            every = torch.cat([*losses.values()]).mean().item()
            assert measured[f"{stage}/loss"] == pytest.approx(every, rel=1e-6)
            for name in losses if given is loaders else ():
                assert measured[f"{stage}/{name}/loss"] == pytest.approx(losses[name].mean().item(), rel=1e-6)


def test_testing_measures_what_validation_measures():
    lit, data = module(), Batches(val=[{"tokens": tokens(2, 7)}])
    (val,) = trainer().validate(lit, datamodule=data, verbose=False)
    (test,) = trainer().test(lit, datamodule=data, verbose=False)
    assert {name.removeprefix("val/"): v for name, v in val.items()} == {
        name.removeprefix("test/"): v for name, v in test.items()
    }
    assert "val/bits_per_byte" not in val  # the data module does not say how many bytes a token has


def test_prediction_returns_the_loss_of_every_target():
    lit, rows = module(), tokens(2, 7)
    batch = {"tokens": rows, "doc_ids": torch.tensor([[0] * 7, [0] * 3 + [1] * 4])}
    (predicted,) = trainer().predict(lit, datamodule=Batches(val=[batch]))
    assert predicted["counted"].sum() == 11
    torch.testing.assert_close(predicted["losses"][:1], losses_of(lit.model, rows[:1]))


def test_unigram_entropy_counts_what_is_counted():
    metric = UnigramEntropy(4)
    metric.update(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]), torch.tensor([[True] * 4, [False] * 4]))
    assert metric.compute().item() == 2
    metric.update(torch.tensor([0, 0, 0, 0]), torch.ones(4, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(-(5 / 8) * math.log2(5 / 8) + 3 / 8 * 3)


def test_the_mean_loss_ignores_what_is_not_counted_even_if_it_is_not_a_number():
    metric = MeanTokenLoss()
    metric.update(torch.tensor([1.0, math.nan, 2.0]), torch.tensor([True, False, True]))
    assert metric.compute().item() == 1.5


def test_accuracy_is_the_share_of_what_is_counted():
    metric = TokenAccuracy()
    metric.update(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    metric.update(torch.tensor([[False, False]]), torch.tensor([[True, True]]))
    assert metric.compute().item() == 0.25


# What layers want back


class Outputs(pl.Callback):
    """Remembers what callbacks are given of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen.append(outputs)


class Counting(Reporting):
    """A model whose layers report a statistic."""

    def forward(self, tokens, *args, trace=None, **options):
        if trace is not None:
            trace.scope("blocks.0").statistic("mass", self.model.embedding(tokens).sum())
        return self.model(tokens, *args, trace=trace, **options)


def test_callbacks_find_the_layers_statistics_of_every_batch_beside_its_loss():
    lit, seen = CausalLMModule(Counting(module().model), learning_rate=0.0, warmup_steps=0), Outputs()
    batches = [{"tokens": tokens(2, 6, seed=seed)} for seed in range(3)]
    trainer(seen, accumulate_grad_batches=2).fit(lit, datamodule=Batches(batches))
    for outputs, batch in zip(seen.seen, batches, strict=True):
        mass = lit.model.model.embedding(batch["tokens"][:, :-1]).sum()
        assert outputs.keys() == {"loss", "statistics"}
        assert outputs["statistics"] == {"blocks.0.mass": pytest.approx(mass.item(), rel=1e-5)}
        assert not outputs["statistics"]["blocks.0.mass"].requires_grad


# Optimisation


def test_decay_of_all_parameters_is_asked_for():
    def groups(**options) -> list[tuple[str, float]]:
        lit = module(weight_decay=0.2, **options)
        trainer().fit(lit, datamodule=Batches([{"tokens": tokens(2, 6)}]))
        return [(group["name"], group["weight_decay"]) for group in lit.optimizers().param_groups]

    assert groups() == [("matrices", 0.2), ("others", 0.0)]
    assert groups(decay="all") == [("all", 0.2)]


# Truncated backpropagation


def stream(batch: int, pieces: int, time: int) -> tuple[Tensor, list[dict]]:
    rows = tokens(batch, pieces * time + 1)
    return rows, [{"tokens": rows[:, i * time : (i + 1) * time + 1]} for i in range(pieces)]


@pytest.mark.parametrize("name", MODELS)
def test_carried_states_equal_one_long_forward(name):
    lit, seen = module(name, truncated_backpropagation=True), Losses()
    rows, batches = stream(2, pieces=3, time=5)
    trainer(seen, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(
        lit, datamodule=Batches(batches, contiguous=True)
    )
    whole = losses_of(lit.model, rows).unflatten(1, (3, 5)).mean((0, 2)).tolist()
    assert seen.seen == pytest.approx(whole * 2, rel=1e-5)  # the second epoch starts afresh
    alone = [losses_of(lit.model, batch["tokens"]).mean().item() for batch in batches]
    assert seen.seen[1:3] != pytest.approx(alone[1:], rel=1e-5)  # the state matters at all


def test_validation_does_not_disturb_the_carried_state_and_carries_its_own():
    rows, batches = stream(2, pieces=3, time=5)
    quiet, busy = Losses(), Losses()
    trainer(quiet).fit(module(truncated_backpropagation=True), datamodule=Batches(batches, contiguous=True))
    lit = module(truncated_backpropagation=True)
    fit = trainer(busy, val_check_interval=1, num_sanity_val_steps=-1)
    fit.fit(lit, datamodule=Batches(batches, batches, contiguous=True))
    assert busy.seen == quiet.seen
    assert fit.callback_metrics["val/loss"].item() == pytest.approx(losses_of(lit.model, rows).mean().item(), rel=1e-5)


def test_a_batch_of_another_size_starts_afresh():
    lit, seen = module(truncated_backpropagation=True), Losses()
    batches = [{"tokens": tokens(3, 6, seed=1)}, {"tokens": tokens(2, 6, seed=2)}]
    trainer(seen).fit(lit, datamodule=Batches(batches, contiguous=True))
    assert seen.seen == pytest.approx([losses_of(lit.model, b["tokens"]).mean().item() for b in batches], rel=1e-5)


def test_carrying_states_over_unrelated_batches_is_refused():
    with pytest.raises(ValueError, match=r"truncated_backpropagation=True.*contiguous=True"):
        trainer().fit(module(truncated_backpropagation=True), datamodule=Batches([{"tokens": tokens(2, 6)}]))


# Resuming, loading


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.txt").write_text("".join(chr(97 + (i * i + index) % 26) for i in range(300)))
    return folder


@pytest.mark.parametrize("carried", [False, True])
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_one_that_was_not(text, tmp_path, carried):
    def run(*callbacks, path=None, **options) -> CausalLMModule:
        torch.manual_seed(0)
        lit = CausalLMModule(
            "titans_lmm_tiny",
            MEMORY | {"dim": 16, "depth": 1},
            learning_rate=0.01,
            warmup_steps=2,
            schedule_steps=10,
            truncated_backpropagation=carried,
        )
        data = TextData(str(text), sequence_length=16, batch_size=4, cache_dir=tmp_path / "cache", contiguous=carried)
        fit = trainer(*callbacks, max_epochs=-1, **options)
        fit.fit(lit, datamodule=data, ckpt_path=path)
        assert len(data.train_dataloader()) > 7, "this is about the middle of an epoch"
        return lit

    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    run(keep, max_steps=3, enable_checkpointing=True)
    resumed = run(max_steps=7, path=tmp_path / "mid.ckpt")
    straight = run(max_steps=7)
    for (name, a), b in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_of_epochs_resumes_where_it_was_although_its_length_is_asked_for(text, tmp_path):
    """The number of steps needs the loader before the checkpoint's place in it is known."""
    seen = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen[-1].append(batch["tokens"])

    def run(*callbacks, path=None, **options) -> CausalLMModule:
        torch.manual_seed(0)
        lit = CausalLMModule("titans_lmm_tiny", MEMORY | {"dim": 16, "depth": 1}, schedule="constant", warmup_steps=2)
        data = TextData(str(text), sequence_length=16, batch_size=4, cache_dir=tmp_path / "cache")
        seen.append([])
        trainer(Seen(), *callbacks, max_epochs=2, **options).fit(lit, datamodule=data, ckpt_path=path)
        return lit

    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    run(keep, max_steps=3, enable_checkpointing=True)
    resumed, straight = run(path=tmp_path / "mid.ckpt"), run()
    _, rest, whole = seen
    assert len(whole) > 2 * 3 + 2
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))
    for (name, a), b in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_loads_by_itself_where_the_model_has_a_name(tmp_path):
    lit = module(schedule="wsd", betas=(0.8, 0.9))
    fit = trainer(max_steps=1)
    fit.fit(lit, datamodule=Batches([{"tokens": tokens(2, 6)}]))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    assert loaded.hparams == lit.hparams
    rows = tokens(2, 8)
    torch.testing.assert_close(losses_of(loaded.model, rows), losses_of(lit.model, rows), rtol=0, atol=0)


def test_a_checkpoint_of_a_module_loads_into_a_module(tmp_path):
    lit = CausalLMModule(create_model("titans_lmm_tiny", **sizes("titans")))
    fit = trainer(max_steps=1)
    fit.fit(lit, datamodule=Batches([{"tokens": tokens(2, 6)}]))
    fit.save_checkpoint(tmp_path / "it.ckpt")
    other = create_model("titans_lmm_tiny", **sizes("titans"))
    loaded = CausalLMModule.load_from_checkpoint(tmp_path / "it.ckpt", model=other)
    torch.testing.assert_close(loaded.model.state_dict(), lit.model.state_dict(), rtol=0, atol=0)


# Sharding


@pytest.fixture
def process_group():
    """Leave nothing of a distributed run behind: the group, its environment, the threads that a launcher sets."""
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield
        torch.distributed.destroy_process_group()
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["titans_lmm_tiny", "sambay_tiny"])
def test_sharded_training_equals_plain_training(name, tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    batches = [{"tokens": tokens(2, 9, seed=seed)} for seed in range(3)]

    def fit(**options) -> tuple[list[float], pl.Trainer]:
        seen = Losses()
        run = trainer(seen, gradient_clip_val=0.5, use_distributed_sampler=False, **options)
        run.fit(module(name, learning_rate=0.01), datamodule=Batches(batches))
        return seen.seen, run

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    sharded, run = fit(strategy=strategy, devices=1)
    assert isinstance(run.lightning_module.model.blocks[0], torch.distributed.fsdp.FSDPModule)
    assert sharded == pytest.approx(fit()[0], rel=1e-6)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    one_device = CausalLMModule.load_from_checkpoint(tmp_path / "whole.ckpt", weights_only=True).model
    prompt = tokens(1, 3)
    greedy = [torch.cat(list(m.generate(prompt, 5, temperature=0))) for m in (run.lightning_module.model, one_device)]
    assert torch.equal(*greedy)


def test_tensor_parallelism_is_refused():
    class Mesh(dict):
        def size(self):
            return 2

    with pytest.raises(ValueError, match="tensor_parallel_size=2 is not supported"):
        shard(module().model, Mesh(tensor_parallel=Mesh(), data_parallel=Mesh()))


# Refusals


def test_overrides_beside_a_module_are_refused():
    with pytest.raises(ValueError, match=r"overrides=.*only apply to a model given by name"):
        CausalLMModule(nn.Linear(1, 1), {"depth": 2})


def test_mup_beside_a_decay_of_all_parameters_is_refused():
    with pytest.raises(ValueError, match=r"decay='all' is not muP\+\+'s.*leave decay or mup out"):
        module("transformer_tiny", decay="all", mup=MuPlusPlus(base_dim=16, base_depth=1))


def test_an_unknown_model_or_override_is_refused():
    with pytest.raises(ValueError, match="did you mean 'titans_lmm_tiny'"):
        CausalLMModule("titans_lmm_tini")
    with pytest.raises(ValueError, match="did you mean depth"):
        CausalLMModule("titans_lmm_tiny", {"detph": 2})


def test_a_model_with_too_few_token_ids_is_refused(text, tmp_path):
    data = TextData(str(text), sequence_length=16, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"vocab_size=11 of the model is less than the data's 256.*'vocab_size': 256"):
        trainer().fit(module(), datamodule=data)


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match="schedule='cosine' needs an end"):
        trainer(max_epochs=-1, max_steps=-1).fit(module(), datamodule=Batches([{"tokens": tokens(2, 6)}]))
