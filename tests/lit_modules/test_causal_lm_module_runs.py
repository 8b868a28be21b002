"""CausalLMModule: carried states, resuming, checkpoints, sharding, refusals."""

import os
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from memzoo.arch import create_model
from memzoo.lit_modules import CausalLMModule, MuPlusPlus, TextData
from memzoo.lit_modules.sharding import shard
from tests.lit_modules.causal_lm_cases import MEMORY, MODELS, Batches, Losses, losses_of, module, sizes, tokens, trainer

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
