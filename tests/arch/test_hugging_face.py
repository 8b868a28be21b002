"""HuggingFaceLM: transformers' own logits behind the call of the models here."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor

from memzoo.arch import HuggingFaceLM, HuggingFaceState, generate
from memzoo.lit_modules import CausalLMModule
from memzoo.lit_modules.cli import main
from tests.arch.hugging_face_cases import (
    KINDS,
    VOCABULARY,
    WIDTHS,
    WINDOW,
    original,
    saved,
    text,
    transformers,
)

WIDTHS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> HuggingFaceLM:
    return HuggingFaceLM.of(original(kind))


def test_the_logits_of_the_last_tokens_alone(model):
    with torch.no_grad():
        logits, _ = model(text())
        last, _ = model(text(), last=3)
    torch.testing.assert_close(last, logits[:, -3:])
    with pytest.raises(ValueError, match=r"last=0 is no number of tokens at the end of 17; use 1 to 17"):
        model(text(), last=0)


# The state


@pytest.mark.parametrize("cuts", [(1, 5, 3, 8), (7, 1, 1, 1, 7), (16, 1)])
def test_streaming_equals_one_call(model, cuts):
    with torch.no_grad():
        whole, end = model(text())
        pieces, state = [], None
        for piece in text().split(cuts, 1):
            logits, state = model(piece, state)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    for name, tensor in state.named_tensors().items():
        torch.testing.assert_close(tensor, end.named_tensors()[name], rtol=0, atol=1e-12)


def test_streaming_equals_the_cache_of_transformers_to_the_bit(kind):
    own = original(kind, torch.float32)
    model, state, cache = HuggingFaceLM.of(own), None, None
    with torch.no_grad():
        for piece in text().split((7, 1, 9), 1):
            logits, state = model(piece, state)
            theirs = own(piece, past_key_values=cache, use_cache=True)
            cache = theirs.past_key_values
            assert torch.equal(logits, theirs.logits)


OTHERS = {
    "OPTConfig": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "GPTNeoXConfig": {"intermediate_size": 24},
    "Gemma4TextConfig": {  # the last two layers read the keys and values of the first two
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "head_dim": 4,
        "global_head_dim": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_stream_too(name):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    own = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, **OTHERS[name])).eval()
    model, state, pieces = HuggingFaceLM.of(own), None, []
    with torch.no_grad():
        for piece in text().split((5, 1, 8, 3), 1):
            logits, state = model(piece, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), own(text()).logits, rtol=0, atol=1e-5)
    assert sum(layer is None for layer in state.layers) == OTHERS[name].get("num_kv_shared_layers", 0)
    assert state.detach().clone().nbytes == state.nbytes


def test_a_passed_state_is_never_changed(model):
    with torch.no_grad():
        _, state = model(text(time=9))
        before = state.clone()
        one, _ = model(text(seed=1), state)
        model(text(time=1, seed=2), state, donate=True)
        again, _ = model(text(seed=1), state)
    assert torch.equal(one, again)
    now = state.named_tensors()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.named_tensors().items())


def test_a_sliding_window_keeps_its_own_positions_only():
    with torch.no_grad():
        _, state = HuggingFaceLM.of(original("gemma3"))(text())
    assert [layer.keys.shape for layer in state.layers] == [(2, WINDOW - 1, 2, 4), (2, 17, 2, 4)]
    assert state.nbytes == 2 * 17 + 2 * 8 * 2 * 2 * 4 * (WINDOW - 1 + 17)


def test_rows_of_a_state_can_be_reordered_and_started_afresh(model):
    with torch.no_grad():
        _, state = model(text(time=4))
        after, _ = model(text(seed=1), state)
        swapped, _ = model(text(seed=1)[[1, 0]], state.reorder([1, 0]))
        reset, _ = model(text(seed=1), state.reset([0]))
        fresh, _ = model(text(seed=1))
    torch.testing.assert_close(swapped, after[[1, 0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(reset, torch.stack([fresh[0], after[1]]), rtol=0, atol=1e-12)


def test_the_initial_state_is_fresh_and_takes_a_saved_one(model, tmp_path):
    model.train()
    draws = torch.get_rng_state()
    start = model.initial_state(2)
    assert torch.equal(torch.get_rng_state(), draws)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(text(), start)[0], model(text())[0], rtol=0, atol=1e-12)
        _, state = model(text())
    state.save(tmp_path / "state")
    loaded = start.load(tmp_path / "state").named_tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.named_tensors().items())


def test_detaching_cuts_the_graph_and_not_detaching_does_not(model):
    _, state = model(text(time=6))
    cut = state.detach()
    assert not any(tensor.requires_grad for tensor in cut.named_tensors().values())
    for start, reached in ((cut, False), (state, True)):
        first = state.layers[0].keys
        logits, _ = model(text(time=6, seed=1), start)
        (gradient,) = torch.autograd.grad(logits.sum(), first, retain_graph=True, allow_unused=True)
        assert (gradient is not None) == reached
    model(text(time=6, seed=1), cut)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Masks


def padded(left: int, right: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a text of eight tokens amid others that are masked, in a row, and its mask."""
    tokens = torch.cat([text(1, left, seed + 1), text(1, 8), text(1, right, seed + 2)], 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, left : left + 8] = True
    return tokens, mask


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (7, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_tokens_change_no_other_output(kind, left, right, attention):
    # The eager softmax is in float32, where the mask of a float64 score is minus infinity.
    dtype, atol = (torch.float64, 1e-12) if attention == "sdpa" else (torch.float32, 1e-5)
    own = original(kind, dtype)
    own.set_attn_implementation(attention)
    model = HuggingFaceLM.of(own)
    tokens, mask = padded(left, right, seed=3)
    tokens, mask = tokens.repeat(2, 1), mask.repeat(2, 1)
    tokens[1], mask[1] = text(1, tokens.shape[1], 9), True
    logits, _ = model(tokens, mask=mask)
    torch.testing.assert_close(logits[0, mask[0]], model(text(1, 8))[0][0], rtol=0, atol=atol)
    torch.testing.assert_close(logits[1], model(tokens[1:])[0][0], rtol=0, atol=atol)
    logits[mask].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (7, 2)])
def test_a_padded_prompt_goes_on_as_an_unpadded_one(model, left, right):
    tokens, mask = padded(left, right, seed=3)
    with torch.no_grad():
        last, state = model.prefill(tokens, mask=mask)
        expected, plain = model.prefill(text(1, 8))
        torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)
        for token in text(1, 4, 7).unbind(1):
            last, state = model.step(token, state)
            expected, plain = model.step(token, plain)
            torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)


def test_a_gap_in_the_past_is_not_seen_and_is_refused_where_a_window_would_count_it(kind, model):
    tokens, mask = padded(0, 3, seed=3)
    with torch.no_grad():
        _, state = model(tokens, mask=mask)
        if kind in ("mistral", "gemma3"):
            with pytest.raises(ValueError, match="mask leaves masked tokens between real ones"):
                model(text(1, 4, 7), state)
            return
        logits, _ = model(text(1, 4, 7), state)
        expected, _ = model(torch.cat([text(1, 8), text(1, 4, 7)], 1))
    torch.testing.assert_close(logits, expected[:, 8:], rtol=0, atol=1e-12)


# Generation


def test_greedy_generation_equals_that_of_transformers(kind):
    own = original(kind)
    left, mask = text(2, 8), torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 12}
    theirs = own.generate(left, attention_mask=mask.long(), max_new_tokens=12, **options)[:, 8:]
    model = HuggingFaceLM.of(own)
    assert torch.equal(torch.stack(list(model.generate(left, 12, temperature=0, mask=mask)), 1), theirs)
    _, state = model.prefill(left[:, :5], mask=mask[:, :5])
    continued = generate(model, left[:, 5:], 12, temperature=0, state=state)
    assert torch.equal(torch.stack(list(continued), 1), theirs)


# Training


def batch() -> dict[str, Tensor]:
    rows = text(2, 12)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[1, 9:] = False
    return {"tokens": rows, "mask": mask}


def fit(model: HuggingFaceLM, **options) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)
    data = pl.LightningDataModule()
    data.contiguous = True
    data.train_dataloader = lambda: torch.utils.data.DataLoader([batch(), batch()], batch_size=None)
    trainer.fit(CausalLMModule(model, warmup_steps=0, **options), data)


def test_every_weight_trains_in_the_module_for_language_models(kind, tmp_path):
    model = HuggingFaceLM(saved(tmp_path, kind), dtype="float32")
    before = copy.deepcopy(model.state_dict())
    fit(model)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_stream_trains_across_detached_states():
    fit(HuggingFaceLM.of(original("llama", torch.float32).train()), truncated_backpropagation=True)


def test_activation_checkpointing_gives_the_same_gradients_and_no_state():
    model = HuggingFaceLM.of(original("llama").train())
    logits, state = model(text())
    logits.square().sum().backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.model.activation_checkpointing_enable()
    logits, none = model(text())
    logits.square().sum().backward()
    assert none is None
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with pytest.raises(ValueError, match="activation_checkpointing_disable"):
        model(text(), state)


def test_the_command_line_trains_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WIDTHS | {"vocab_size": 300})
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    Path("text.txt").write_text("def f(x):\n    return x\n" * 60)
    data = {"paths": "text.txt", "cache_dir": "cache", "sequence_length": 16, "batch_size": 4}
    data |= {"validation_fraction": 0.2, "pack_documents": False}
    lm = {"class_path": "memzoo.arch.HuggingFaceLM", "init_args": {"folder": "llama", "attention": "eager"}}
    module = {"class_path": "memzoo.lit_modules.CausalLMModule", "init_args": {"model": lm, "warmup_steps": 1}}
    trainer = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_model_summary": False}
    trainer |= {"enable_progress_bar": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    settings = {"model": module, "data": {"class_path": "memzoo.lit_modules.TextData", "init_args": data}}
    Path("config.yaml").write_text(yaml.safe_dump(settings | {"trainer": trainer}))
    assert main(["fit", "--config", "config.yaml"]) == 0
    settings["data"]["init_args"]["pack_documents"] = True
    Path("config.yaml").write_text(yaml.safe_dump(settings | {"trainer": trainer}))
    assert main(["fit", "--config", "config.yaml"]) == 2


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(text() + VOCABULARY), "tokens holds id"),
        (lambda m: m(text()[0]), "two axes"),
        (lambda m: m(text(), mask=torch.ones(2, 17)), "must be bool"),
        (lambda m: m(text(), doc_ids=torch.zeros(2, 17, dtype=torch.long)), "pack_documents=False"),
        (lambda m: m(text(3), m(text())[1]), "state has 2 rows"),
        (lambda m: m(text(), HuggingFaceState(torch.ones(2, 1, dtype=torch.bool), ())), "did not return"),
        (lambda m: m.step(text()), "use prefill"),
        (lambda m: m.prefill(text(), mask=torch.zeros(2, 17, dtype=torch.bool)), "no real token in row 0"),
    ],
    ids=["vocabulary", "axes", "mask", "documents", "rows", "state", "step", "empty"],
)
def test_a_bad_call_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(HuggingFaceLM.of(original("llama")))


def test_positions_beyond_a_learned_table_are_refused_and_computed_ones_are_not():
    with pytest.raises(ValueError, match="a table of 64"):
        HuggingFaceLM.of(original("gpt2"))(text(1, 65))
    HuggingFaceLM.of(original("llama"))(text(1, 65))
