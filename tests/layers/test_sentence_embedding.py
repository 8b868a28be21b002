"""Sentence encoders as embedders, with a stand-in for the optional library."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import ClusterTree, SentenceEmbedder


class Encoder(nn.Module):
    """What `sentence_transformers.SentenceTransformer` is to us: counts letters, in inference mode."""

    max_seq_length = 4

    def __init__(self, name: str, device: str | None = None) -> None:
        super().__init__()
        if name == "missing":
            raise OSError("no such model")
        self.name, self.asked_device = name, device
        self.calls: list[dict[str, Any]] = []
        self.weight = nn.Parameter(torch.ones(3))

    @torch.inference_mode()
    def encode(self, texts: list[str], **options: Any) -> Tensor:
        self.calls.append({"texts": texts} | options)
        return torch.tensor([[text.count(letter) for letter in "abc"] for text in texts]).half() * self.weight.half()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("sentence_transformers")
    stub.SentenceTransformer = Encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", stub)


@pytest.mark.usefixtures("library")
def test_texts_go_to_the_library_and_come_back_as_float32_that_autograd_takes() -> None:
    embedder = SentenceEmbedder("some/folder", device="cpu", batch_size=7)
    rows = embedder.embed(("aab", "c"))
    assert rows.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert rows.dtype == torch.float32
    assert not rows.is_inference()
    encoder = embedder._encoder
    assert (encoder.name, encoder.asked_device, embedder.max_length) == ("some/folder", "cpu", 4)
    assert encoder.calls == [
        {"texts": ["aab", "c"], "batch_size": 7, "convert_to_tensor": True, "show_progress_bar": False}
    ]
    assert ClusterTree.fit(rows, branching=2, depth=1).route(rows).shape == (2, 1)


@pytest.mark.usefixtures("library")
def test_the_default_is_the_papers_encoder() -> None:
    assert SentenceEmbedder()._encoder.name == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.usefixtures("library")
def test_the_fingerprint_is_that_of_weights_and_length() -> None:
    first, same, longer, other = (SentenceEmbedder(name) for name in "abcd")
    longer._encoder.max_seq_length = 5
    other._encoder.weight.data[1] = 2
    assert first.fingerprint == same.fingerprint
    assert len({first.fingerprint, longer.fingerprint, other.fingerprint}) == 3


class Pooling(nn.Module):
    """A part of an encoder without weights."""

    mode = "mean"

    def get_config_dict(self) -> dict[str, Any]:
        return {"pooling_mode": self.mode}


@pytest.mark.usefixtures("library")
def test_the_fingerprint_is_that_of_the_settings_too() -> None:
    embedders = [SentenceEmbedder(name) for name in "abcde"]
    first, same, pooled, normalised, prompted = (embedder._encoder for embedder in embedders)
    for encoder in (first, same, pooled, normalised, prompted):
        encoder.pooling = Pooling()
    pooled.pooling.mode = "cls"
    normalised.normalise = nn.Identity()
    prompted.prompts = {"query": "query: "}
    assert embedders[0].fingerprint == embedders[1].fingerprint
    assert len({embedder.fingerprint for embedder in embedders}) == 4


@pytest.mark.usefixtures("library")
def test_no_texts_have_embeddings_of_the_width() -> None:
    rows = SentenceEmbedder().embed([])
    assert rows.shape == (0, 3)
    assert rows.dtype == torch.float32


@pytest.mark.usefixtures("library")
def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model='missing' cannot be loaded \(no such model\); pass the name"):
        SentenceEmbedder("missing")
    with pytest.raises(ValueError, match=r"batch_size=0 is not a whole number >= 1"):
        SentenceEmbedder(batch_size=0)
    with pytest.raises(ValueError, match=r"texts='one text' is one string; pass a list"):
        SentenceEmbedder().embed("one text")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"needs the sentence-transformers package; pip install 'memzoo\[embed\]'"):
        SentenceEmbedder()
