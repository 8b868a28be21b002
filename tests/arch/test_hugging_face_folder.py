"""Models of transformers from a folder: what is loaded, and what is refused before its weights are read."""

import copy
import json
import socket
import sys

import pytest
import torch

from memzoo.arch import HuggingFaceLM
from tests.arch.hugging_face_cases import (
    KINDS,
    VOCABULARY,
    original,
    saved,
    text,
)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> HuggingFaceLM:
    return HuggingFaceLM.of(original(kind))


# Loading


def test_a_folder_gives_the_logits_of_transformers_to_the_bit_without_a_network(kind, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    folder = saved(tmp_path, kind)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, own = HuggingFaceLM(folder).eval(), original(kind, torch.float32)
    with torch.no_grad():
        assert torch.equal(model(text())[0], own(text()).logits)
    assert model.vocab_size == VOCABULARY
    assert model.num_parameters() == own.num_parameters()


def test_names_are_those_of_transformers_after_model(kind):
    own = original(kind)
    model = HuggingFaceLM.of(own)
    assert list(model.state_dict()) == [f"model.{name}" for name in own.state_dict()]
    path = "model.transformer.h.0.mlp" if kind == "gpt2" else "model.model.layers.0.mlp"
    assert model.get_submodule(path) is own.get_submodule(path.removeprefix("model."))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float64", torch.float64)])
def test_weights_come_in_the_dtype_that_was_asked_for(dtype, expected, tmp_path):
    model = HuggingFaceLM(saved(tmp_path, dtype=torch.bfloat16), dtype=dtype, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.model.config._attn_implementation == "eager"


def test_a_loaded_model_is_in_training_mode_and_a_given_one_keeps_its_own(tmp_path):
    assert all(module.training for module in HuggingFaceLM(saved(tmp_path)).modules())
    assert not any(module.training for module in HuggingFaceLM.of(original("llama")).modules())


def test_a_copy_is_another_model(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(text())[0]
        next(other.parameters()).zero_()
        assert torch.equal(model(text())[0], before)
        assert not torch.equal(other(text())[0], before)


def test_a_folder_without_a_causal_model_is_refused_before_its_weights_are_read(tmp_path):
    def refused(message: str, **config) -> None:
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            HuggingFaceLM(tmp_path)

    with pytest.raises(ValueError, match=r"nowhere.* has no config.json"):
        HuggingFaceLM(tmp_path / "nowhere")
    refused("has no config.json")
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    refused("holds no configuration that transformers", model_type="unheard_of")
    refused("holds a T5ForConditionalGeneration", model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused("is an encoder-decoder", model_type="bart", architectures=["BartForCausalLM"], is_encoder_decoder=True)
    refused("holds a BertForMaskedLM", model_type="bert", architectures=["BertForMaskedLM"])
    refused("is an encoder", model_type="bert", architectures=["BertLMHeadModel"])
    refused("holds a LlamaModel", model_type="llama", architectures=["LlamaModel"])
    refused("holds a ViTForImageClassification", model_type="vit", architectures=["ViTForImageClassification"])
    refused("carries LinearAttentionLayer", model_type="mamba", architectures=["MambaForCausalLM"])
    refused("carries a state of its own", model_type="rwkv", architectures=["RwkvForCausalLM"])
    refused("does not hold whole safetensors", model_type="llama", architectures=["LlamaForCausalLM"])
    (tmp_path / "model.safetensors").unlink()
    refused("has no .*safetensors", model_type="llama", architectures=["LlamaForCausalLM"])


def test_missing_weights_are_refused(tmp_path):
    original("llama", torch.float32).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"lacks 1 weights .*lm_head.weight"):
        HuggingFaceLM(tmp_path)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model is a Linear"):
        HuggingFaceLM.of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is a LlamaModel"):
        HuggingFaceLM.of(original("llama").model)


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'memzoo\[hf\]'"):
        HuggingFaceLM(tmp_path)
    with pytest.raises(ValueError, match="dtype='float8'"):
        HuggingFaceLM(tmp_path, dtype="float8")
