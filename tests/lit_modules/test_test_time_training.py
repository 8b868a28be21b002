"""TestTimeTrainingModule: prequential scores, a host that stays what it is, what is logged, what is refused."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from memzoo.arch import create_model
from memzoo.arch.hugging_face import HuggingFaceLM
from memzoo.layers import Locas
from memzoo.layers.reference.locas import stream as reference_stream
from memzoo.lit_modules import CausalLMModule, ProgressBar, TestTimeTrainingModule
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.test_time_training import EPS, _Learner
from tests.lit_modules.stream_cases import (
    CHUNK,
    LENGTHS,
    SIZES,
    WINDOW,
    LowRank,
    Stream,
    host,
    losses,
    module,
    plain_losses,
    random_tokens,
    register_low_rank,
    streamed,
    trainer,
)


@pytest.fixture(autouse=True)
def _low_rank(monkeypatch):
    register_low_rank(monkeypatch)


class Memory(Callback):
    """Keeps the memory of a test, and does something after each chunk."""

    def __init__(self, then=None):
        self.then = then

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.memory = pl_module.memory
        if self.then is not None:
            self.then(pl_module, batch_idx)


def chunk_loss(model: nn.Module, batch: dict, state=None, start: int = 0):
    """Sum of a chunk's losses, by hand."""
    tokens, prefix = batch["tokens"], int(batch["prefix"])
    logits, state = model(tokens[:, start:-1], state)
    own = logits[:, prefix - start :]
    return nn.functional.cross_entropy(own[0], tokens[0, prefix + 1 :], reduction="sum"), state


def targets(batch: dict) -> int:
    return batch["tokens"].shape[1] - 1 - int(batch["prefix"])


# Scores


def test_every_token_but_the_first_is_scored_once():
    lit = module(memory=None)
    streamed(lit)
    assert [(score.document, score.chunk, score.position, score.tokens) for score in lit.stream] == [
        (0, 0, 0, 6), (0, 1, 6, 6), (0, 2, 12, 6), (0, 3, 18, 6), (0, 4, 24, 1),
        (1, 0, 0, 6), (1, 1, 6, 6), (1, 2, 12, 2),
    ]  # fmt: skip
    with torch.no_grad():
        expected = [chunk_loss(lit.model, batch)[0].item() for batch in Stream().test_dataloader()]
    assert [score.loss_sum for score in lit.stream] == pytest.approx(expected, rel=1e-12)
    assert {score.plain_loss_sum for score in lit.stream} == {None}


@pytest.mark.parametrize("last", [0, 1, 2])
def test_16_the_score_of_a_chunk_comes_before_every_step_with_it_or_later_ones(monkeypatch, last):
    whole = module()
    streamed(whole)
    step, taken = _Learner.step, []

    def steps_up_to_last(self, loss):
        taken.append(loss)
        if len(taken) <= last:
            step(self, loss)

    monkeypatch.setattr(_Learner, "step", steps_up_to_last)
    cut = module()
    streamed(cut)
    learnt = last + 2  # the first chunk takes no step: this many are scored before the first step that is left out
    assert losses(cut)[:learnt] == losses(whole)[:learnt]
    assert losses(cut)[learnt] != losses(whole)[learnt]


def test_16_a_rate_of_zero_gives_the_scores_without_memory():
    lit = module(memory_learning_rate=0.0)
    streamed(lit)
    assert losses(lit) == plain_losses(lit)
    assert losses(lit, 1) == plain_losses(lit, 1)


@pytest.mark.parametrize("steps", [1, 2])
def test_16_the_stream_is_that_of_the_reference(steps):
    lit = module(steps_per_chunk=steps, memory_warmup_steps=3)
    streamed(lit)
    model = host()
    memory = LowRank(model)
    places = [name.split(".") for name, _ in memory.named_parameters()]
    start = [parameter.detach().clone() for parameter in memory.parameters()]
    moments: dict = {"step": 0}

    def score(leaves, batch):
        memory.enabled = leaves is not None
        for (owner, key), leaf in zip(places, leaves or start, strict=True):
            getattr(memory, owner)._parameters[key] = leaf
        return chunk_loss(model, batch)[0] / targets(batch)

    def update(leaves, gradients):
        moments["step"] += 1
        rate = 0.05 * min(moments["step"] / 3, 1)
        new = []
        for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            first, second = moments.get(index, (0, 0))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[index] = first, second
            bias = (1 - 0.9 ** moments["step"]), (1 - 0.999 ** moments["step"])
            new.append(leaf.detach() - rate * (first / bias[0]) / ((second / bias[1]).sqrt() + EPS))
        return new

    chunks = [batch for batch in Stream().test_dataloader() if batch["document"] == 0]
    expected = reference_stream(score, update, chunks, lambda _: start, steps=steps)
    means = [score.loss_sum / score.tokens for score in lit.stream if score.document == 0]
    assert means == pytest.approx([loss.item() for loss in expected], rel=1e-9)
    assert losses(lit)[2:] != plain_losses(lit)[2:]


def test_a_document_read_twice_is_read_the_same_way():
    book = random_tokens(26, 0)
    lit = module(steps_per_chunk=2)
    streamed(lit, Stream([book, random_tokens(15, 1), book]))
    assert losses(lit, 0) == losses(lit, 2)
    assert losses(lit, 0) != plain_losses(lit, 0)
    assert lit.held_out_after[0] == lit.held_out_after[2] != lit.held_out_after[1]


@pytest.mark.parametrize(("memory", "rate"), [("low_rank", 0.05), ("locas", 0.1), ("temp_lora", 0.01)])
def test_a_stream_that_repeats_itself_is_learnt(memory, rate):
    options = {"memory": memory, "memory_learning_rate": rate, "memory_options": {"rank": 8}, "steps_per_chunk": 2}
    lit = module(model=host(dtype=torch.float32), **options)
    logged = streamed(lit, Stream([torch.arange(10).repeat(12)]))
    assert logged["test/loss"] < 0.98 * logged["test/plain/loss"]
    assert plain_losses(lit)[0] == losses(lit)[0]


@pytest.mark.parametrize("name", ["transformer_tiny", "mom_tiny"])
def test_reused_states_are_those_behind_the_chunk_before(name):
    sizes = {} if name == "transformer_tiny" else {"num_memories": 2, "top_k": 1}
    torch.manual_seed(0)
    options = {"vocab_size": 11, "dim": 16, "depth": 2, "num_heads": 1} | sizes
    model = create_model(name, **options).double().eval()
    lit = module(model=model, reuse_state=2)
    streamed(lit)
    memory, expected, expected_plain = LowRank(model), [], []
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, eps=EPS, weight_decay=0.0)
    state = None
    for index, batch in enumerate(batch for batch in Stream().test_dataloader() if batch["document"] == 0):
        start = 0 if index % 3 == 0 else int(batch["prefix"])
        with torch.no_grad(), memory.disabled():
            plain, beginning = chunk_loss(model, batch, None, 0)
        expected_plain.append(plain.item())
        if index == 0:
            state = beginning
            expected.append(plain.item())
            continue
        optimizer.param_groups[0]["lr"] = 0.05 * min(index / 2, 1)
        loss, after = chunk_loss(model, batch, None if index % 3 == 0 else state, start)
        expected.append(loss.item())
        (loss / targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = after.detach()
    assert losses(lit) == pytest.approx(expected, rel=1e-9)
    assert plain_losses(lit) == pytest.approx(expected_plain, rel=1e-9)
    again = module(model=model)
    streamed(again)
    assert losses(again)[1] != pytest.approx(losses(lit)[1], rel=1e-9), "the prefix was read anew"
    assert again._state is None


@pytest.mark.parametrize("memory", ["locas", "temp_lora"])
def test_with_all_of_a_document_in_the_window_a_reused_state_changes_nothing_but_the_memory(memory):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes)).double()
    data, options = Stream(window=64), {"memory": memory, "memory_options": {"rank": 4}}
    anew, reused = (module(model=HuggingFaceLM.of(llama), reuse_state=count, **options) for count in (0, 10))
    streamed(anew, data)
    streamed(reused, data)
    assert plain_losses(reused) == pytest.approx(plain_losses(anew), rel=1e-9)
    assert losses(reused)[:2] == pytest.approx(losses(anew)[:2], rel=1e-9), "the memory has learnt nothing yet"
    assert losses(reused)[2:] != pytest.approx(losses(anew)[2:], rel=1e-9), "the state is of an older memory"
    assert losses(anew)[2:] != pytest.approx(plain_losses(anew)[2:], rel=1e-9)


# The memory and its host


def test_03_only_the_memory_gets_gradients_and_the_host_stays_what_it_is(monkeypatch):
    model = host()
    model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen = []

    def look(self):
        seen.append([parameter.grad is None for parameter in model.parameters()])

    monkeypatch.setattr(LowRank, "constrain", look)
    lit = module(model=model, memory_weight_decay=0.1)
    gradients = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *_: (gradients.append([p.grad for g in self.param_groups for p in g["params"]]), step(self))[1],
    )
    streamed(lit)
    assert len(seen) == len(gradients) == 6
    assert all(all(row) for row in seen)
    assert all(gradient is not None for row in gradients for gradient in row)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_a_document_starts_with_a_reset_and_every_step_ends_with_the_constraint():
    watch = Memory()
    lit = module(steps_per_chunk=2)
    trainer(watch).test(lit, datamodule=Stream(), verbose=False)
    documents = [["reset", f"memorize {(1, CHUNK)}", *["constrain"] * 2 * (chunks - 1)] for chunks in (5, 3)]
    assert watch.memory.calls == ["reset", *documents[0], *documents[1]]
    assert lit.memory is None
    assert not watch.memory.is_attached


def test_a_failed_test_gives_the_host_back():
    def fail(lit, index):
        if index == 2:
            assert lit.memory.is_attached
            raise RuntimeError("the end of the world")

    lit, watch = module(), Memory(fail)
    with pytest.raises(RuntimeError, match="the end of the world"):
        trainer(watch).test(lit, datamodule=Stream(), verbose=False)
    assert lit.memory is None
    assert not watch.memory.is_attached
    assert all(parameter.requires_grad for parameter in lit.model.parameters())


def test_without_steps_the_memory_stays_as_it_was_filled():
    watch = Memory()
    lit = module(steps_per_chunk=0)
    trainer(watch).test(lit, datamodule=Stream(), verbose=False)
    assert "constrain" not in watch.memory.calls
    assert losses(lit) == plain_losses(lit)


def test_dropout_is_off_in_what_is_scored_and_on_in_further_steps(monkeypatch):
    beside, modes = LowRank.beside, []

    def look(self, index, x, y):
        if index == 0:
            modes.append(self.training)
        return beside(self, index, x, y)

    monkeypatch.setattr(LowRank, "beside", look)
    streamed(module(steps_per_chunk=3, retention=False))
    assert modes == [False, True, True] * 6, "of two documents, 4 and 2 chunks behind the first"


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def look(self, *_):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    streamed(module(memory_max_gradient_norm=1e-3))
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)


def test_steps_under_autocast_read_the_weights_of_the_step_before():
    lit = module(model=host(dtype=torch.float32), steps_per_chunk=2)
    streamed(lit, precision="bf16-mixed")
    model, expected = host(dtype=torch.float32), []
    memory = LowRank(model)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, eps=EPS, weight_decay=0.0)
    for batch in Stream([random_tokens(26, 0)]).test_dataloader():
        pieces = NextTokens.of(batch)
        for step in range(2 if expected else 1):
            with torch.autocast("cpu", torch.bfloat16):
                sums = pieces.losses(model(pieces.inputs)[0])
            if step == 0:
                expected.append(sums.double().sum().item())
            if len(expected) > 1:
                optimizer.param_groups[0]["lr"] = 0.05 if len(expected) > 2 or step else 0.025
                pieces.mean(sums).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert losses(lit) == pytest.approx(expected, rel=1e-5)


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
