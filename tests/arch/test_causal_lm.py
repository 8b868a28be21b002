"""CausalLM: any mix of blocks is one model that streams, packs, forks and leaves its layers' own weights alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import Block, CausalLM, CausalLMState, create_model
from memzoo.layers.attention import Attention, SlidingWindowAttention
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.mixer import SequenceMixer
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.trace import Trace

VOCAB, DIM, TIME = 11, 8, 13
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def mixers() -> list[SequenceMixer]:
    return [
        NeuralMemory(DIM, num_heads=2, chunk_size=4),
        SlidingWindowAttention(DIM, window=3, num_heads=2),
        Attention(DIM, num_heads=2),
    ]


def hybrid(seed: int = 0, **options: Any) -> CausalLM:
    torch.manual_seed(seed)
    blocks = [Block(mixer, SwiGLU(DIM, hidden_dim=12)) for mixer in mixers()]
    return CausalLM(VOCAB, DIM, [*blocks, Block(NeuralMemory(DIM, num_heads=1, chunk_size=4))], **options).double()


@pytest.fixture
def model() -> CausalLM:
    return hybrid()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, TIME), generator=torch.Generator().manual_seed(1))


def test_a_mix_of_blocks_prefills_and_steps_as_it_reads(model: CausalLM, tokens: Tensor) -> None:
    expected, end = model(tokens)
    logits, state = model.prefill(tokens[:, :6])
    torch.testing.assert_close(logits, expected[:, 5], **CLOSE)
    for t in range(6, TIME):
        logits, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, expected[:, t], **CLOSE)
    assert all(torch.equal(block.position, torch.full((3,), TIME)) for block in end.blocks)


def test_a_mix_of_blocks_keeps_packed_documents_apart(model: CausalLM, tokens: Tensor) -> None:
    doc_ids = torch.tensor([0] * 5 + [1] * 8).expand(3, -1)
    packed, _ = model(tokens, doc_ids=doc_ids)
    apart = torch.cat([model(tokens[:, :5])[0], model(tokens[:, 5:])[0]], 1)
    torch.testing.assert_close(packed, apart, **CLOSE)


def test_rows_fork_for_beam_search(model: CausalLM, tokens: Tensor) -> None:
    _, state = model.prefill(tokens)
    beams = torch.tensor([2, 0, 2, 2])
    following = torch.tensor([1, 4, 7, 1])
    logits, _ = model.step(following, state.reorder(beams))
    whole, _ = model(torch.cat([tokens[beams], following[:, None]], 1))
    torch.testing.assert_close(logits, whole[:, -1], **CLOSE)
    assert torch.equal(logits[0], logits[3])
    assert not torch.allclose(logits[0], logits[2])


def test_a_saved_state_goes_on_in_another_process_s_model(model: CausalLM, tokens: Tensor, tmp_path: Path) -> None:
    _, state = model(tokens)
    state.save(tmp_path / "state.safetensors")
    loaded = hybrid().initial_state(1).load(tmp_path / "state.safetensors")
    assert isinstance(loaded, CausalLMState)
    assert torch.equal(model.step(tokens[:, 0], loaded)[0], model.step(tokens[:, 0], state)[0])


def test_prefill_computes_no_logits_but_the_last(
    model: CausalLM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, forward_head = [], model.forward_head
    monkeypatch.setattr(model, "forward_head", lambda x: (shapes.append(tuple(x.shape)), forward_head(x))[1])
    model.prefill(tokens)
    model.prefill(tokens, mask=torch.arange(TIME).expand(3, -1) < 5)
    assert shapes == [(3, DIM), (3, DIM)]


@pytest.mark.parametrize("prefills", [False, True], ids=["last", "prefill"])
def test_the_last_channel_layer_runs_for_the_tokens_that_are_wanted(tokens: Tensor, prefills: bool) -> None:
    model = CausalLM(VOCAB, DIM, [Block(Attention(DIM, num_heads=2), SwiGLU(DIM)) for _ in range(3)])
    seen: list[int] = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda _, inputs, y: seen.append(y.shape[1]))
    if prefills:
        model.prefill(tokens)
    else:
        model(tokens, last=4)
    assert seen == [TIME, TIME, 1 if prefills else 4]


def test_gradients_of_the_last_logits_are_those_of_all(model: CausalLM, tokens: Tensor) -> None:
    expected = torch.autograd.grad(model(tokens)[0][:, -4:].square().sum(), [*model.parameters()])
    got = torch.autograd.grad(model(tokens, last=4)[0].square().sum(), [*model.parameters()])
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


def test_a_masked_prompt_gives_the_logits_of_its_last_real_token(model: CausalLM, tokens: Tensor) -> None:
    mask = torch.ones(3, TIME, dtype=torch.bool)
    mask[0, 9:] = False
    mask[1, :4] = False
    mask[2, ::2] = False
    logits, _ = model.prefill(tokens, mask=mask)
    for row in range(3):
        alone, _ = model.prefill(tokens[row, mask[row]][None])
        torch.testing.assert_close(logits[row], alone[0], **CLOSE)


def test_features_are_what_the_head_reads(model: CausalLM, tokens: Tensor) -> None:
    features, _ = model.forward_features(tokens)
    assert features.shape == (3, TIME, DIM)
    assert torch.equal(model.forward_head(features), model(tokens)[0])


def test_bytes_are_tokens(model: CausalLM, tokens: Tensor) -> None:
    assert torch.equal(model(tokens.to(torch.uint8))[0], model(tokens)[0])


def test_tied_embeddings_are_one_matrix(model: CausalLM, tokens: Tensor) -> None:
    assert model.head is None
    untied = hybrid(tie_embeddings=False)
    assert untied.head.weight.shape == (VOCAB, DIM)
    assert untied.num_parameters() == model.num_parameters() + VOCAB * DIM
    with torch.no_grad():
        model.embedding.weight.mul_(2)
        untied.embedding.weight.mul_(2)
    features = torch.ones(DIM, dtype=torch.float64)
    assert torch.equal(model.forward_head(features), model.embedding.weight.sum(1))
    assert not torch.allclose(untied.forward_head(features), untied.embedding.weight.sum(1))


def test_projections_are_drawn_small_and_all_else_is_left_as_its_layer_drew_it() -> None:
    torch.manual_seed(0)
    blocks = [Block(NeuralMemory(64, num_heads=2), SwiGLU(64)), Block(Attention(64, num_heads=2), SwiGLU(64))]
    drawn = {name: parameter.clone() for name, parameter in nn.ModuleList(blocks).named_parameters()}
    model = CausalLM(1000, 64, blocks, tie_embeddings=False)
    kept = {name for name, before in drawn.items() if torch.equal(model.blocks.get_parameter(name), before)}
    memory = (
        "gates.weight",
        "gates.bias",
        "conv.weight",
        "initial_weights.0",
        "initial_weights.1",
        "output_norm.weight",
    )
    norms = {f"{index}.{name}_norm.weight" for index in range(2) for name in ("mixer", "ffn")}
    assert kept == {f"0.mixer.{name}" for name in memory} | norms
    for name, parameter in model.named_parameters():
        if name.removeprefix("blocks.") not in kept and name != "norm.weight":
            expected = 0.01 if name.endswith(("out.weight", "down.weight")) else 0.02  # four branches
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_block_may_be_used_twice() -> None:
    block = Block(NeuralMemory(64, num_heads=1))
    model = CausalLM(VOCAB, 64, [block, block])
    assert block.mixer.out.weight.std().item() == pytest.approx(0.02 * 2**-0.5, rel=0.05)
    assert model.num_parameters() == VOCAB * 64 + 64 + sum(p.numel() for p in block.parameters())
    _, state = model(torch.zeros(1, 3, dtype=torch.long))
    assert len(state.blocks) == 2


@pytest.mark.parametrize("with_state", [False, True])
def test_checkpointed_blocks_give_equal_logits_gradients_and_traces(tokens: Tensor, with_state: bool) -> None:
    results = []
    for checkpointed in (False, True, 2):
        model = hybrid(checkpoint_blocks=checkpointed)
        trace = Trace()
        start = model(tokens)[1] if with_state else None
        logits, state = model(tokens, start, trace=trace)
        (logits.square().mean() + state.blocks[0].weights[0].sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits, gradients, trace.signals, state.named_tensors()))
    (logits, *plain), *others = results
    for again, *recomputed in others:
        assert torch.equal(logits, again)
        for expected, got in zip(plain, recomputed, strict=True):
            assert expected.keys() == got.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(got[name], tensor, msg=name, **CLOSE)


def test_checkpointed_blocks_keep_less_for_the_backward_pass(tokens: Tensor) -> None:
    def kept(model: CausalLM) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens)
        return sum(sizes)

    assert kept(hybrid(checkpoint_blocks=True)) < kept(hybrid()) / 5


@pytest.mark.parametrize(
    ("every", "recomputed"), [(False, []), (0, []), (True, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])]
)
def test_every_so_many_blocks_run_twice(tokens: Tensor, every: bool | int, recomputed: list[int]) -> None:
    model = hybrid(checkpoint_blocks=every)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.mixer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model(tokens)[0].sum().backward()
    assert sorted(ran) == sorted([0, 1, 2, 3, *recomputed])


@pytest.mark.parametrize("every", [-1, 1.5, "2", None])
def test_checkpoint_blocks_that_is_no_whole_number_is_refused(every: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"checkpoint_blocks={every!r} is not a whole number >= 0; use")):
        hybrid(checkpoint_blocks=every)


def test_checkpointed_blocks_are_not_given_states_they_would_need_again(tokens: Tensor) -> None:
    model = hybrid(checkpoint_blocks=True)
    given = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda _, __, options: given.append(options["donate"]), with_kwargs=True)
    model(tokens, donate=True)
    with torch.no_grad():
        model(tokens, donate=True)
    assert given == [False] * 4 + [True] * 4


def test_traced_names_are_paths_of_modules(model: CausalLM, tokens: Tensor) -> None:
    trace = Trace()
    model(tokens, trace=trace)
    assert {"blocks.0.mixer.theta", "blocks.3.mixer.surprise"} <= trace.signals.keys()


def test_blocks_are_checked() -> None:
    memory = NeuralMemory(DIM, num_heads=2)
    with pytest.raises(ValueError, match=r"blocks=\[\] makes no model"):
        CausalLM(VOCAB, DIM, [])
    with pytest.raises(ValueError, match=r"blocks\[0\] is a NeuralMemory; wrap it: Block\(mixer, ffn\)"):
        CausalLM(VOCAB, DIM, [memory])
    with pytest.raises(ValueError, match=r"blocks\[1\] has width 16, the model dim=8"):
        CausalLM(VOCAB, DIM, [Block(memory), Block(NeuralMemory(16, num_heads=2))])
    with pytest.raises(ValueError, match="vocab_size=0 is not a whole number >= 1"):
        CausalLM(0, DIM, [Block(memory)])


def test_states_are_checked(model: CausalLM, tokens: Tensor) -> None:
    _, state = model(tokens)
    with pytest.raises(ValueError, match="state is a NeuralMemoryState; pass what this model returned"):
        model(tokens, state.blocks[0])
    with pytest.raises(ValueError, match="state is of 3 blocks, the model has 4"):
        model(tokens, CausalLMState(state.blocks[:3]))


def test_depth_is_checked() -> None:
    for name in ("transformer_tiny", "titans_lmm_tiny"):
        with pytest.raises(ValueError, match="depth=0 is not a whole number >= 1"):
            create_model(name, depth=0)
