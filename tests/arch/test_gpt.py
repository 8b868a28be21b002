"""GPT: its equations, its sizes, and positions that are those of a document's tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.arch import GPT, CausalLMState, create_model
from memzoo.layers import FeedForward, MixerState

CONTEXT = 12


def small(**options: Any) -> GPT:
    """A model in float64 with no weight at its first value."""
    torch.manual_seed(0)
    model = GPT(11, 8, 2, **dict(num_heads=2, context=CONTEXT) | options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(time: int, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden_dim", [None, 5, 0])
def test_it_is_the_formula(hidden_dim: int | None) -> None:
    model, x = small(hidden_dim=hidden_dim), tokens(7)
    w = model.state_dict()

    def norm(h: Tensor, name: str) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    h = w["embedding.weight"][x] + w["positions.weight"][:7]
    for block in ("blocks.0", "blocks.1"):
        z = norm(h, f"{block}.mixer_norm")
        heads = (z @ w[f"{block}.mixer.{part}.weight"].T for part in ("query", "key", "value"))
        q, k, v = (x.view(2, 7, 2, 4).transpose(1, 2) for x in heads)
        scores = (q @ k.mT / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{block}.mixer.out.weight"].T
        if hidden_dim != 0:
            hidden = F.gelu(norm(h, f"{block}.ffn_norm") @ w[f"{block}.ffn.up.weight"].T)
            h = h + hidden @ w[f"{block}.ffn.down.weight"].T
    expected = norm(h, "norm") @ w["embedding.weight"].T
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt_tiny", 1_083_648), ("gpt_103m", 103_113_984), ("gpt_103m_deep", 102_988_032)]
)
def test_sizes_are_the_announced_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
    V, d, T, L = model.vocab_size, model.dim, model.context, len(model.blocks)
    hidden = model.blocks[0].ffn.up.out_features
    assert model.num_parameters() == parameters == V * d + T * d + L * (4 * d**2 + 2 * d * hidden + 4 * d) + 2 * d
    large = name != "gpt_tiny"
    assert model.embedding_dropout.p == model.blocks[-1].mixer.dropout == 0.1 * large
    assert T == 1024


def test_options_arrive() -> None:
    model = GPT(11, 8, 1, num_heads=4, hidden_dim=5, attention_dropout=0.2, embedding_dropout=0.3, tie_embeddings=False)
    (block,) = model.blocks
    assert isinstance(block.ffn, FeedForward)
    assert (block.mixer.num_heads, block.mixer.rotary, block.mixer.dropout) == (4, None, 0.2)
    assert (block.ffn.down.in_features, model.embedding_dropout.p) == (5, 0.3)
    assert model.head is not None
    assert model.positions.weight.shape == (1024, 8)
    assert GPT(11, 8, 1, num_heads=2, hidden_dim=0).blocks[0].ffn is None
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert biases == ["blocks.0.mixer_norm.bias", "blocks.0.ffn_norm.bias", "norm.bias"]


def test_every_matrix_starts_alike_at_any_depth() -> None:
    torch.manual_seed(0)
    model = GPT(300, 64, 8, context=300, tie_embeddings=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def positions(model: GPT, x: Tensor, state: CausalLMState | None = None, **grids: Tensor) -> Tensor:
    """The position that every token is given: the rows of ``positions`` that a forward pass looks up."""
    looked_up = []
    handle = model.positions.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]))
    model(x, state, **grids)
    handle.remove()
    return looked_up[0].expand_as(x)


def test_positions_begin_at_zero_and_go_on_in_the_next_call() -> None:
    model, x = small(), tokens(5)
    assert positions(model, x)[1].tolist() == [0, 1, 2, 3, 4]
    _, state = model(x)
    assert positions(model, x, state)[1].tolist() == [5, 6, 7, 8, 9]


def test_masked_tokens_are_not_counted() -> None:
    model, x = small(), tokens(5)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    assert positions(model, x, mask=mask)[mask].tolist() == [0, 1, 2, 0]
    _, state = model(x, mask=mask)
    assert positions(model, x, state).tolist() == [[3, 4, 5, 6, 7], [1, 2, 3, 4, 5]]


def test_positions_restart_with_a_document_and_go_on_in_one_that_continues() -> None:
    model, x = small(), tokens(5)
    doc_ids = torch.tensor([[4, 4, 7, 7, 7], [9, 1, 1, 4, 4]])
    assert positions(model, x, doc_ids=doc_ids).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    _, state = model(x, doc_ids=doc_ids)
    later = torch.tensor([[7, 7, 4, 4, 4], [9, 4, 4, 4, 4]])
    assert positions(model, x, state, doc_ids=later).tolist() == [[3, 4, 0, 1, 2], [0, 0, 1, 2, 3]]
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 1]]).bool()
    assert positions(model, x, state, doc_ids=later, mask=mask)[mask].tolist() == [3, 0, 1, 2, 2, 3, 4]


def test_a_context_can_be_filled_and_a_document_may_begin_behind_it() -> None:
    model, x = small(), tokens(CONTEXT)
    logits, state = model(x)
    assert logits.shape == (2, CONTEXT, 11)
    twice = torch.arange(2 * CONTEXT).expand(2, -1) // CONTEXT
    packed, _ = model(torch.cat((x, x), 1), doc_ids=twice)
    torch.testing.assert_close(packed, torch.cat((logits, logits), 1), rtol=0, atol=1e-12)
    after, _ = model(x, state, doc_ids=torch.full_like(x, 3))  # not the document 0 of the state
    torch.testing.assert_close(after, logits, rtol=0, atol=1e-12)


BEYOND: dict[str, Any] = {
    "fresh": lambda model: model(tokens(CONTEXT + 1)),
    "continued": lambda model: model(tokens(1), model(tokens(CONTEXT))[1]),
    "step": lambda model: model.step(tokens(1)[:, 0], model(tokens(CONTEXT))[1]),
    "masked": lambda model: model(tokens(CONTEXT + 2), mask=torch.tensor([[True] * CONTEXT + [False] + [True]] * 2)),
    "documents": lambda model: model(tokens(CONTEXT + 2), doc_ids=torch.tensor([[1] + [2] * (CONTEXT + 1)] * 2)),
    "prompt": lambda model: model.generate(tokens(CONTEXT + 1), 1),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_token_beyond_the_context_is_refused_before_anything_is_computed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    ran = []
    original = model.run_block
    monkeypatch.setattr(model, "run_block", lambda *inputs, **options: (ran.append(0), original(*inputs, **options))[1])
    message = r"tokens reach position 12, the model has context=12, the last one being 11; pass fewer, .*state=None"
    with pytest.raises(ValueError, match=message):
        BEYOND[case](model)
    assert len(ran) == (2 if case in ("continued", "step") else 0)  # of the call that made the state


def test_a_compiled_model_refuses_it_too() -> None:
    compiled = torch.compile(small(), backend="eager")
    with pytest.raises(ValueError, match="tokens reach position 12, the model has context=12"):
        compiled(tokens(CONTEXT + 1))


@pytest.mark.parametrize("start", [None, 4])
def test_generation_fills_the_context_and_no_more_is_asked_for(start: int | None) -> None:
    model, prompt = small().eval(), tokens(5)
    state = None if start is None else model(tokens(start))[1]
    room = CONTEXT - 5 - (start or 0) + 1
    message = rf"max_new_tokens={room + 1} after {5 + (start or 0)} tokens .*context=12; use max_new_tokens <= {room}, "
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, room + 1, state=state)
    assert len([*model.generate(prompt, room, state=state)]) == room
    mask = torch.ones_like(prompt, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    assert len([*model.generate(prompt, room + 1, state=state, mask=mask)]) == room + 1
    mask[1, 0] = True
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, room + 1, state=state, mask=mask)


def test_other_arguments_of_generate_are_checked_first() -> None:
    with pytest.raises(ValueError, match="tokens holds id 99"):
        small().generate(torch.full((1, CONTEXT + 1), 99), 1)
    with pytest.raises(ValueError, match="state is a MixerState; pass what this model returned"):
        small().generate(tokens(2), 1, state=MixerState(torch.zeros(2), torch.zeros(2)))


def test_a_fresh_text_too_long_is_refused_on_any_device() -> None:
    with torch.device("meta"):
        model = GPT(11, 8, 1, num_heads=2, context=4)
        with pytest.raises(ValueError, match="tokens reach position 4, the model has context=4"):
            model(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize("name", ["attention_dropout", "embedding_dropout"])
def test_dropout_is_of_training_alone(name: str) -> None:
    x = tokens(8)
    plain, model = small().eval(), small(**{name: 0.5})
    assert torch.equal(model.eval()(x)[0], plain(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_checkpointed_blocks_drop_the_same_weights_again() -> None:
    x, gradients = tokens(8), []
    for checkpoint_blocks in (False, True):
        model = small(attention_dropout=0.5, embedding_dropout=0.5, checkpoint_blocks=checkpoint_blocks)
        torch.manual_seed(1)
        model(x)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, computed in zip(*gradients, strict=True):
        assert torch.equal(kept, computed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0}, "depth=0 is not a whole number >= 1"),
        ({"context": 0}, "context=0 is not a whole number >= 1"),
        ({"hidden_dim": -1}, "hidden_dim=-1 is not a whole number >= 1"),
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0 is not a probability in \[0, 1\)"),
        ({"embedding_dropout": -0.1}, r"embedding_dropout=-0.1 is not a probability in \[0, 1\)"),
    ],
)
def test_a_bad_argument_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPT(**dict(vocab_size=11, dim=8, depth=1, num_heads=2) | options)
