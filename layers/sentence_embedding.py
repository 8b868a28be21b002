"""Texts as vectors by a trained sentence encoder, of the `sentence-transformers` library.

Pretraining with hierarchical memories (arXiv 2510.02375) clusters by all-MiniLM-L6-v2 (width 384).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from memzoo.layers.errors import check_positive


class SentenceEmbedder:
    """Embed texts by a sentence encoder.

    The encoder reads the beginning of a text: all-MiniLM-L6-v2 the first 256 word pieces, so of a window of 2,048
    tokens about an eighth. ``max_length`` tells how many.

    Args:
        model: Name on the Hugging Face hub, downloaded once, or a local folder.
        device: To compute on; None leaves it to the library. Embeddings are on the CPU.
        batch_size: Texts at a time.

    Raises:
        ValueError: The library is missing, or the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        *,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        check_positive("batch_size", batch_size)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"model={model!r} needs the sentence-transformers package; pip install 'memzoo[embed]', or use "
                f"HashedNgrams()"
            ) from error
        try:
            self._encoder = SentenceTransformer(model, device=device)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={model!r} cannot be loaded ({error}); pass the name of a sentence encoder and be online the "
                f"first time, or the folder of a saved one"
            ) from error
        self.model = model
        self.batch_size = batch_size

    @property
    def max_length(self) -> int | None:
        """Word pieces of a text that are read; None if all are."""
        length: int | None = self._encoder.max_seq_length
        return length

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the settings (pooling, normalisation, prompts), with the length read, in words.

        The tokeniser is not part of it.
        """
        encoder = self._encoder
        parts: list[Any] = [
            (type(part).__name__, getattr(part, "get_config_dict", dict)()) for part in encoder.children()
        ]
        settings = {name: getattr(encoder, name, None) for name in ("prompts", "default_prompt_name", "truncate_dim")}
        digest = hashlib.sha256(json.dumps([parts, settings], sort_keys=True, default=str).encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return f"sentence encoder, {self.max_length} word pieces, {digest.hexdigest()}"

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed every text.

        Shape:
            Returns (len(texts), width), float32; (0, width) for no texts.

        Raises:
            ValueError: ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts={texts[:40]!r} is one string; pass a list of them: [text]")
        embedded: Tensor = self._encoder.encode(
            list(texts) or [""], batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        # The library computes in inference mode; a copy is free of it.
        return embedded[: len(texts)].to("cpu", torch.float32, copy=True)
