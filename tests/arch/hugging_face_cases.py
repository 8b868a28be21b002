"""Small models of transformers, saved where they are asked for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
VOCABULARY = 64
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
WINDOW = 5
KINDS = ("llama", "gpt2", "qwen3", "mistral", "gemma3")


def config_of(kind: str):
    if kind == "llama":
        return transformers.LlamaConfig(**WIDTHS)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    if kind == "qwen3":
        return transformers.Qwen3Config(**WIDTHS)
    if kind == "mistral":
        return transformers.MistralConfig(**WIDTHS, sliding_window=WINDOW)
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(**WIDTHS, sliding_window=WINDOW, layer_types=layers)


def original(kind: str, dtype: torch.dtype = torch.float64):
    """Return a random model of transformers, in evaluation mode."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_of(kind)).to(dtype).eval()


def text(batch: int = 2, time: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    original(kind, dtype).save_pretrained(folder)
    return folder
