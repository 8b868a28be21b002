"""TestTimeTrainingModule: prequential scores, and a host that stays what it is."""

import pytest
import torch
from torch import nn

from memzoo.arch import create_model
from memzoo.arch.hugging_face import HuggingFaceLM
from memzoo.layers.reference.locas import stream as reference_stream
from memzoo.lit_modules.chunk_reader import ChunkReader
from memzoo.lit_modules.memory_learner import EPS, MemoryLearner
from memzoo.lit_modules.objective import NextTokens
from memzoo.lit_modules.stream import Chunk
from tests.lit_modules.stream_cases import (
    CHUNK,
    LowRank,
    Memory,
    Stream,
    host,
    losses,
    module,
    plain_losses,
    random_tokens,
    register_low_rank,
    streamed,
    targets,
    trainer,
)


@pytest.fixture(autouse=True)
def _low_rank(monkeypatch):
    register_low_rank(monkeypatch)


def chunk_loss(model: nn.Module, batch: dict, state=None, start: int = 0):
    """Sum of a chunk's losses, by hand."""
    tokens, prefix = batch["tokens"], int(batch["prefix"])
    logits, state = model(tokens[:, start:-1], state)
    own = logits[:, prefix - start :]
    return nn.functional.cross_entropy(own[0], tokens[0, prefix + 1 :], reduction="sum"), state


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


class ReadsAll(nn.Module):
    """A model that cannot be asked for its last logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.vocab_size = model, model.vocab_size

    def forward(self, tokens, state=None, *, mask=None, doc_ids=None):
        return self.model(tokens, state, mask=mask, doc_ids=doc_ids)


def test_only_the_logits_of_a_chunk_are_computed_and_nothing_changes_by_that(monkeypatch):
    lit, other = module(retention=False), module(retention=False, model=ReadsAll(host()))
    seen: list[int] = []
    head = lit.model.forward_head
    monkeypatch.setattr(lit.model, "forward_head", lambda x: (seen.append(x.shape[1]), head(x))[1])
    streamed(lit)
    assert max(seen) == CHUNK
    streamed(other)
    assert losses(lit) == pytest.approx(losses(other), rel=1e-12)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_16_the_score_of_a_chunk_comes_before_every_step_with_it_or_later_ones(monkeypatch, last):
    whole = module()
    streamed(whole)
    step, taken = MemoryLearner.step, []

    def steps_up_to_last(self, loss):
        taken.append(loss)
        if len(taken) <= last:
            step(self, loss)

    monkeypatch.setattr(MemoryLearner, "step", steps_up_to_last)
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
    assert again._reader is None


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["transformer_tiny", "mom_tiny"])
def test_without_prefix_gradient_the_prefix_is_given(monkeypatch, name, steps):
    sizes = {} if name == "transformer_tiny" else {"num_memories": 2, "top_k": 1}
    torch.manual_seed(0)
    model = create_model(name, vocab_size=11, dim=16, depth=2, num_heads=1, **sizes).double().eval()
    lit, rows = module(model=model, prefix_gradient=False, steps_per_chunk=steps), []
    beside = LowRank.beside
    monkeypatch.setattr(LowRank, "beside", lambda self, index, x, y: (_note(rows, x), beside(self, index, x, y))[1])
    streamed(lit)
    assert set(rows) <= set(range(1, CHUNK + 1)), "a graph is kept of the chunk alone"
    memory, expected = LowRank(model), []
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, eps=EPS, weight_decay=0.0)
    taken = 0
    for index, batch in enumerate(batch for batch in Stream().test_dataloader() if batch["document"] == 0):
        prefix = int(batch["prefix"])
        for step in range(steps if index else 1):
            state = None
            if prefix:
                with torch.no_grad():
                    _, state = model(batch["tokens"][:, :prefix])
            loss, _ = chunk_loss(model, batch, state, prefix)
            expected += [loss.item()] if step == 0 else []
            if index:
                taken += 1
                optimizer.param_groups[0]["lr"] = 0.05 * min(taken / 2, 1)
                (loss / targets(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
    memory.detach()
    assert losses(lit) == pytest.approx(expected, rel=1e-9)
    whole = module(model=model, steps_per_chunk=steps)
    streamed(whole)
    assert losses(whole)[:2] == pytest.approx(losses(lit)[:2], rel=1e-12), "a score does not depend on the gradient"
    assert losses(whole)[2:] != pytest.approx(losses(lit)[2:], rel=1e-6)
    assert plain_losses(whole) == plain_losses(lit)


def _note(rows: list[int], x) -> None:
    if torch.is_grad_enabled():
        rows.append(x.shape[1])


def test_without_prefix_gradient_a_model_of_transformers_reads_the_same():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes)).double()
    options = {"memory": "locas", "memory_options": {"rank": 4}, "memory_learning_rate": 0.0}
    whole, given = (module(model=HuggingFaceLM.of(llama), prefix_gradient=p, **options) for p in (True, False))
    streamed(whole)
    streamed(given)
    assert losses(given) == pytest.approx(losses(whole), rel=1e-9)
    learns = module(model=HuggingFaceLM.of(llama), prefix_gradient=False, **(options | {"memory_learning_rate": 0.05}))
    streamed(learns)
    assert losses(learns)[2:] != pytest.approx(losses(given)[2:], rel=1e-6)


def test_without_prefix_gradient_casts_that_autocast_keeps_do_not_hide_the_memory():
    model = host(dtype=torch.float32)
    memory = LowRank(model)
    chunks = list(Stream().test_dataloader())
    with torch.autocast("cpu", torch.bfloat16):
        _, of_chunk, _ = ChunkReader(model, reuse_state=0, prefix_gradient=False).read(Chunk.of(chunks[1]))
    of_chunk.sum().backward()
    assert all(parameter.grad is not None for parameter in memory.parameters())


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
