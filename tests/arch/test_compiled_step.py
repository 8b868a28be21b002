"""A compiled step reads what the model's own step reads, for whoever calls it, and refuses what it cannot do."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.arch import CompiledStep, create_model
from memzoo.arch.compiled_step import check_compiler
from memzoo.layers.banks.fetched import Fetched

SMALL = {"depth": 1, "dim": 8, "vocab_size": 11, "num_heads": 2, "hidden_dim": 8, "chunk_size": 3}
PROMPT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("titans_lmm_tiny", **SMALL | options).double()


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def as_written() -> Iterator[None]:
    """Compile nothing: for what the programs do not matter to."""
    with torch.compiler.set_stance("force_eager"):
        yield


def assert_same(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any], **tolerance: float) -> None:
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    torch.testing.assert_close(actual[1].named_tensors(), expected[1].named_tensors(), **tolerance)


def test_tokens_go_on_from_a_prompt_or_afresh_as_without_it():
    model = small()
    step = CompiledStep(model, backend="eager")
    _, start = model.prefill(PROMPT)  # one token into its second chunk
    for state in (start, None):
        expected = state
        for token in PROMPT.T:
            (logits, state), (wanted, expected) = step(token, state, donate=True), model.step(token, expected)
            assert_same((logits, state), (wanted, expected))
            assert not logits.requires_grad


@pytest.mark.usefixtures("as_written")
def test_a_state_is_left_as_it_was():
    model = small()
    step = CompiledStep(model, backend="eager")
    _, first = model.prefill(PROMPT)
    _, second = step(PROMPT[:, 0], first, donate=True)
    for state in (first, second):
        kept = state.clone()
        step(PROMPT[:, 1], state, donate=True)
        assert all(torch.equal(a, b) for a, b in zip(*(s.named_tensors().values() for s in (state, kept)), strict=True))


def test_one_program_serves_all_tokens_and_streams():
    model, programs = small(), []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        programs.append(graph)
        return graph.forward

    step = CompiledStep(model, backend=counting)
    for prompt in (PROMPT, PROMPT[:, :2], PROMPT.repeat(1, 3)):
        assert len(list(model.generate(prompt, 5, step=step))) == 5
    assert len(programs) == 1
    list(model.generate(PROMPT[:1], 5, step=step))  # another batch size
    assert len(programs) == 2


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("options", [{}, {"stop": [3, 4, 5]}])
def test_generation_draws_the_same_tokens(options):
    model = small()
    with_step, without = (
        list(model.generate(PROMPT, 9, generator=torch.Generator().manual_seed(1), step=step, **options))
        for step in (CompiledStep(model, backend="eager"), None)
    )
    assert torch.equal(torch.stack(with_step), torch.stack(without))


def test_a_reader_of_memories_is_compiled_with_them():
    torch.manual_seed(0)
    model = create_model("hier_memory_tiny", depth=1, dim=16, hidden_dim=16, num_heads=2, head_dim=4).double()
    layout = model.layout((4, 2), branching=2, dtype=torch.float64)
    blocks = {level: torch.randn(layout.block_shape(level), dtype=torch.float64) for level in layout.levels}

    def fetch() -> Fetched:
        return Fetched.of(layout, torch.tensor([[0, 1], [1, 2]]), lambda node: blocks[node.level])

    reader = model.reading(fetch())
    step = CompiledStep(reader, backend="eager")
    _, state = reader.prefill(PROMPT)
    assert_same(step(PROMPT[:, 0], state), reader.step(PROMPT[:, 0], state))
    assert not torch.allclose(step(PROMPT[:, 0], state)[0], model.step(PROMPT[:, 0], state)[0])
    assert len(list(reader.generate(PROMPT, 2, step=step))) == 2
    assert len(list(model.generate(PROMPT, 2, memories=reader.memories, step=step))) == 2
    with pytest.raises(ValueError, match="reroute changes them: pass one of the two"):
        reader.generate(PROMPT, 2, step=step, reroute=lambda text: None)
    for unread in (model, model.reading(fetch())):
        with pytest.raises(ValueError, match="or of one that reads other memories"):
            unread.generate(PROMPT, 2, step=step)


def learn(model: Any) -> None:
    with torch.no_grad():
        model.norm.weight.mul_(2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a step of learning": learn,
    "loaded": lambda model: model.load_state_dict(small().state_dict()),
    "loaded in their place": lambda model: model.load_state_dict(small().state_dict(), assign=True),
    "cast": lambda model: model.float(),
    "a new parameter": lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.ones(8))),
    "a new part": lambda model: setattr(model.blocks[0], "ffn", None),
    "a hook": lambda model: model.norm.register_forward_hook(lambda module, inputs, y: 2 * y),
    "another mode": lambda model: model.eval(),
}


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_refused(change):
    model = small()
    step = CompiledStep(model, backend="eager")
    _, state = step(PROMPT[:, 0])
    step(PROMPT[:, 1], state)
    CHANGES[change](model)
    with pytest.raises(ValueError, match=r"have changed since .* make a new CompiledStep"):
        step(PROMPT[:, 1], state.clone())
    assert_same(CompiledStep(model, backend="eager")(PROMPT[:, 0]), model.step(PROMPT[:, 0]))


@pytest.mark.usefixtures("as_written")
def test_weights_that_change_amid_a_stream_are_refused():
    model = small()
    step = CompiledStep(model, backend="eager")
    _, state = step(PROMPT[:, 0])
    learn(model)
    with pytest.raises(ValueError, match="have changed"):
        step(PROMPT[:, 1], state)


def test_a_first_call_that_fails_counts_as_the_first():
    model = small()
    step = CompiledStep(model, backend=lambda graph, inputs: lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(PROMPT[:, 0])
    learn(model)
    with pytest.raises(ValueError, match="have changed"):
        step(PROMPT[:, 0])


def test_two_models_of_one_shape_have_their_own_programs():
    for model in (small(), small(loss_scale=3.0)):
        step = CompiledStep(model, backend="eager")
        _, state = model.prefill(PROMPT)
        assert_same(step(PROMPT[:, 0], state), model.step(PROMPT[:, 0], state))


def test_a_state_of_any_strides_runs_the_one_program():
    model, programs = small(), []
    step = CompiledStep(model, backend=lambda graph, _: programs.append(graph) or graph.forward)
    _, state = model.prefill(PROMPT)
    turned = state.map(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))
    for start in (state, turned):
        assert_same(step(PROMPT[:, 0], start), model.step(PROMPT[:, 0], state))
    assert len(programs) == 1


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (PROMPT, "token has shape"),
        (torch.tensor(3), "token has shape"),
        (torch.tensor([1, 11]), "token"),
        (torch.tensor([1, -1]), "token"),
        (torch.tensor([1.0, 2.0]), "token"),
        (torch.tensor([1, 2, 3]), "state has 2 rows, x has batch 3"),
    ],
)
def test_wrong_arguments_are_what_they_are_without_it(token, message):
    model = small()
    _, state = model.prefill(PROMPT)
    for step in (model.step, CompiledStep(model, backend="eager")):
        with pytest.raises(ValueError, match=message):
            step(token, state)
        with pytest.raises(ValueError, match="state is a tuple"):
            step(PROMPT[:, 0], (state,))


def test_a_token_beyond_the_context_is_refused():
    model = create_model("gpt_tiny", depth=1, dim=8, num_heads=2, hidden_dim=8, context=4)
    _, state = model.prefill(PROMPT)
    with pytest.raises(ValueError, match="tokens reach position 4, the model has context=4"):
        CompiledStep(model, backend="eager")(PROMPT[:, 0], state)


@pytest.mark.usefixtures("as_written")
def test_generation_refuses_the_step_of_another_model():
    model, other = small(), small()
    with pytest.raises(ValueError, match="step was compiled of another model"):
        model.generate(PROMPT, 2, step=CompiledStep(other, backend="eager"))


def test_a_step_that_depends_on_the_data_is_refused_in_one_line():
    model = create_model("mom_tiny", depth=1, dim=16, hidden_dim=16)
    with pytest.raises(ValueError, match="the step of this MoM cannot be compiled; generate without"):
        CompiledStep(model, backend="eager")(PROMPT[:, 0])


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="model is a Linear; pass a CausalLM"):
        CompiledStep(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="literal=True and reads whole segments"):
        CompiledStep(create_model("titans_mac_tiny", depth=1, literal=True))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*install one"):
        CompiledStep(small())
    with pytest.raises(ValueError, match="CXX"):
        check_compiler()
    CompiledStep(small(), backend="eager")


COMPILED = ["titans_mac_tiny", "titans_mag_tiny", "titans_lmm_tiny", "transformer_tiny", "gpt_tiny", "mamba2_tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code_reads_what_the_model_reads(name):
    torch.manual_seed(0)
    model = create_model(name)
    step = CompiledStep(model)
    _, state = model.prefill(PROMPT)
    own, other = state, state
    for token in torch.randint(11, (70, 2)):  # beyond a segment of MAC
        (logits, own), (wanted, other) = step(token, own), model.step(token, other)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(logits, CompiledStep(create_model(name))(token)[0], atol=1e-2)  # another's own weights


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_compiled_too():
    model = small().float().cuda()
    tokens = PROMPT.cuda()
    _, state = model.prefill(tokens)
    assert_same(CompiledStep(model)(tokens[:, 0], state), model.step(tokens[:, 0], state), rtol=1e-3, atol=1e-4)
