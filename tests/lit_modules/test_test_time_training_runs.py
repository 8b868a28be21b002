"""TestTimeTrainingModule: what a test logs, what it keeps, what is refused."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from memzoo.arch import create_model
from memzoo.layers import Locas
from memzoo.lit_modules import CausalLMModule, ProgressBar, TestTimeTrainingModule
from memzoo.lit_modules.objective import NextTokens
from tests.lit_modules.stream_cases import (
    CHUNK,
    LENGTHS,
    SIZES,
    WINDOW,
    LowRank,
    Memory,
    Stream,
    host,
    losses,
    module,
    plain_losses,
    register_low_rank,
    streamed,
    trainer,
)


@pytest.fixture(autouse=True)
def _low_rank(monkeypatch):
    register_low_rank(monkeypatch)


# What is logged


def test_means_are_over_all_tokens_and_the_biased_perplexity_is_over_chunks():
    lit = module()
    logged = streamed(lit)
    tokens = sum(LENGTHS) - len(LENGTHS)
    for prefix, sums in (("test/", losses), ("test/plain/", plain_losses)):
        own = [*sums(lit, 0), *sums(lit, 1)]
        mean = sum(own) / tokens
        biased = sum(s.tokens * math.exp(loss / s.tokens) for s, loss in zip(lit.stream, own, strict=True)) / tokens
        assert logged[f"{prefix}loss"] == pytest.approx(mean, rel=1e-6)
        assert logged[f"{prefix}bits_per_byte"] == pytest.approx(mean / math.log(2) / 2.0, rel=1e-6)
        assert logged[f"{prefix}perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
        assert logged[f"{prefix}perplexity_of_chunks"] == pytest.approx(biased, rel=1e-6)
        assert biased > math.exp(mean) * 1.001
    assert logged["test/memory_parameters"] == 2 * (2 * 16 + 16 * 2)


def test_retention_is_the_loss_on_held_out_text_before_and_after_each_document():
    states, memories = [], []

    def look(lit, index):
        memories.append([parameter.detach().clone() for parameter in lit.memory.parameters()])

    lit = module()
    run = trainer(Memory(look))
    run.test(lit, datamodule=Stream(), verbose=False)
    memory = LowRank(lit.model)
    for parameters in (list(memory.parameters()), memories[4], memories[7]):  # plain, behind either document
        with torch.no_grad():
            for own, value in zip(memory.parameters(), parameters, strict=True):
                own.copy_(value)
            total = count = 0
            for batch in Stream().held_out_batches():
                logits, _ = lit.model(batch["tokens"][:, :-1])
                targets = batch["tokens"][:, 1:]
                total += nn.functional.cross_entropy(logits.mT, targets, reduction="sum").item()
                count += targets.numel()
            states.append(total / count)
    memory.detach()
    before, *after = states
    assert lit.held_out_before == pytest.approx(before, rel=1e-12)
    assert lit.held_out_after == pytest.approx(dict(enumerate(after)), rel=1e-12)
    mean = sum(after) / 2
    logged = run.callback_metrics
    assert logged["test/held_out/before"].item() == pytest.approx(before, rel=1e-6)
    assert logged["test/held_out/after"].item() == pytest.approx(mean, rel=1e-6)
    assert logged["test/held_out/after_bits_per_byte"].item() == pytest.approx(mean / math.log(2) / 4.0, rel=1e-6)


def test_the_progress_bar_shows_bits_with_and_without_memory(capsys):
    lit = module()
    run = trainer(ProgressBar(line_seconds=0), enable_progress_bar=True)
    run.test(lit, datamodule=Stream(), verbose=False)
    bits = [sum(loss(lit)[:2]) / (12 * math.log(2) * 2.0) for loss in (losses, plain_losses)]
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("testing 12/39 [")
    assert second.endswith(f", bits/byte {bits[0]:.2f} (plain {bits[1]:.2f})]")


def test_nothing_is_measured_that_is_not_asked_for():
    lit = module(compare=False, retention=False)
    calls = []
    lit.model.register_forward_hook(lambda *_: calls.append(1))
    logged = streamed(lit)
    assert not any("plain" in name or "held_out" in name for name in logged)
    assert {score.plain_loss_sum for score in lit.stream} == {None}
    assert len(calls) == 8, "a chunk is read once"
    data = Stream()
    del data.test_bytes_per_token
    assert "test/bits_per_byte" not in streamed(module(), data)


def test_without_memory_the_same_loop_scores_plainly():
    lit, compared = module(memory=None), module()
    logged, both = streamed(lit, inference_mode=True), streamed(compared)
    assert losses(lit) == plain_losses(compared)
    assert logged["test/loss"] == both["test/plain/loss"]
    assert logged["test/memory_parameters"] == 0
    assert not any("plain" in name or "held_out" in name for name in logged)


# Fits and files


def test_a_fit_trains_the_host_as_ever_and_its_checkpoint_is_streamed(tmp_path):
    options = {"warmup_steps": 1, "schedule": "constant"}
    lit, other = module(**options), CausalLMModule(host(), **options)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    saved = ModelCheckpoint(tmp_path, filename="last")
    for own in (lit, other):
        trainer(*([saved] if own is lit else []), **(saving if own is lit else {})).fit(own, datamodule=Stream())
    assert all(torch.equal(a, b) for a, b in zip(lit.state_dict().values(), other.state_dict().values(), strict=True))
    path = tmp_path / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["memory"] == "low_rank"
    assert stored["state_dict"].keys() == other.state_dict().keys()
    fresh = module(**options)
    trainer().test(fresh, datamodule=Stream(), ckpt_path=path, verbose=False)
    streamed(lit)
    assert losses(fresh) == losses(lit)
    again = TestTimeTrainingModule.load_from_checkpoint(path, model=host(), weights_only=True)
    assert again.hparams["memory_learning_rate"] == 0.05


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "low_rnk"}, "memory='low_rnk' is not one of .*did you mean 'low_rank'"),
        ({"memory": None, "memory_options": {"rank": 2}}, "memory_options=.* are of a memory, but memory=None"),
        (
            {"memory": "locas", "memory_options": {"rank": 4, "batch_size": 2}},
            "memory_options: batch_size=2 .* one row",
        ),
        ({"memory_options": {"rnk": 2}}, "memory_options={'rnk': 2} are not those of memory='low_rank'.*'rnk'"),
        ({"memory_learning_rate": -1.0}, "memory_learning_rate=-1.0 is not a finite number >= 0"),
        ({"memory_weight_decay": -1.0}, "memory_weight_decay=-1.0 is not a finite number >= 0"),
        ({"memory_betas": (0.9, 1.0)}, r"memory_betas=\(0.9, 1.0\) are not two numbers"),
        ({"memory_max_gradient_norm": 0.0}, "memory_max_gradient_norm=0.0 is not a finite number > 0"),
        ({"memory_warmup_steps": -1}, "memory_warmup_steps=-1 is not a whole number >= 0"),
        ({"steps_per_chunk": 0.5}, "steps_per_chunk=0.5 is not a whole number >= 0"),
        ({"reuse_state": -1}, "reuse_state=-1 is not a whole number >= 0"),
        ({"prefix_gradient": "no"}, "prefix_gradient='no'"),
        ({"model": nn.Linear(2, 2)}, "feed-forward"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_making_a_module_leaves_no_trace_on_the_host():
    model = host()
    module(model=model)
    assert not any(own._forward_hooks for own in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Unprepared(Stream):
    def prepare_data(self):
        raise AssertionError("data were prepared for a test that cannot be")


def test_a_trainer_in_inference_mode_is_refused_before_data_are_prepared():
    with pytest.raises(ValueError, match=r"inference_mode=True.*use Trainer\(inference_mode=False\)"):
        streamed(module(), Unprepared(), inference_mode=True)


def test_weights_that_nobody_trained_are_pointed_out():
    named = TestTimeTrainingModule("transformer_tiny", dict(SIZES), memory="low_rank", retention=False)
    with pytest.warns(UserWarning, match="model='transformer_tiny' is streamed with the weights it was drawn with"):
        streamed(named)


def test_a_model_without_room_for_what_is_read_in_one_piece_is_refused():
    model = create_model("gpt_tiny", **SIZES | {"context": 20})
    data = Stream(window=WINDOW)
    data.window, data.chunk_length = WINDOW, CHUNK
    with pytest.raises(ValueError, match=rf"window={WINDOW} and reuse_state=2 have the model read 22 tokens"):
        streamed(module(model=model, reuse_state=2), data)
    streamed(module(model=model, reuse_state=1), data)


def test_what_each_document_has_left_is_kept_if_asked(tmp_path):
    model = host()
    lit = module(model=model, memory="locas", memory_options={"rank": 4}, memory_folder=str(tmp_path / "kept"))
    streamed(lit)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0.safetensors", "1.safetensors"]
    memory = Locas.attach(model, rank=4)
    memory.load(tmp_path / "kept" / "1.safetensors")
    batch = NextTokens.of(next(iter(Stream().held_out_batches())))
    with torch.no_grad():
        loss = batch.mean(batch.losses(model(batch.inputs)[0]))
    assert loss.item() == pytest.approx(lit.held_out_after[1], rel=0.2)


def test_retention_needs_held_out_text():
    loader = Stream().test_dataloader()
    with pytest.raises(ValueError, match=r"held_out_batches\(\), which NoneType lacks; use BookStreamData, or reten"):
        trainer().test(module(), dataloaders=loader, verbose=False)
    lit = module(retention=False)
    trainer().test(lit, dataloaders=loader, verbose=False)
    assert len(lit.stream) == 8


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda rows: [{"tokens": rows[0]["tokens"]}], "batch has .*, no 'labels'; use data that streams documents"),
        (lambda rows: [rows[0], rows[2]], r"batch\['chunk'\]=2 of document 0 comes after chunk 0 of document 0"),
        (lambda rows: [rows[0], rows[6]], r"batch\['chunk'\]=1 of document 1 comes after chunk 0 of document 0"),
        (lambda rows: [rows[1]], r"batch\['chunk'\]=1 of document 0 comes after nothing"),
        (lambda rows: [{k: v.repeat(2, 1) if v.dim() == 2 else v for k, v in rows[0].items()}], "a stream has one row"),
    ],
    ids=["no labels", "a gap", "another document", "the middle", "two rows"],
)
def test_what_is_no_stream_is_refused(batches, message):
    rows = list(Stream().test_dataloader())
    with pytest.raises(ValueError, match=message):
        trainer().test(module(retention=False), dataloaders=DataLoader(batches(rows), batch_size=None), verbose=False)
