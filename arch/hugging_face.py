"""HuggingFaceLM: a causal language model of transformers, with the call of the models here."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from memzoo.arch.generation import check_last, check_prompt_mask, generate
from memzoo.arch.hugging_face_folder import check_model, empty_cache, load_folder, transformers_library
from memzoo.layers.errors import check_choice, check_tokens
from memzoo.layers.mixer import check_grid
from memzoo.layers.state import State
from memzoo.layers.trace import Trace

Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
AttentionName = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class KeysValues(State):
    """What one attention layer keeps.

    Attributes:
        keys: (batch, time, heads, dim), of a sliding window its last positions only.
        values: Like it.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class HuggingFaceState(State):
    """What a HuggingFaceLM carries.

    Attributes:
        mask: (batch, past) bool, the real tokens of all that was read.
        layers: Of each layer; None where a layer keeps nothing, as it reads another one's.
    """

    mask: Tensor
    layers: tuple[KeysValues | None, ...]


class HuggingFaceLM(nn.Module):
    """A causal language model of transformers, loaded from a folder on this machine. Nothing is ever downloaded.

    ``logits, state = model(tokens, state=None, *, mask=None, doc_ids=None, trace=None, donate=False)``

    It takes the place of a ``CausalLM`` in the Lightning modules, in generation and under a side memory. The model
    itself is the submodule ``model``: names of layers and weights are those of transformers after ``model.``. Like
    every new module it is in training mode: call ``eval()`` before scoring, for dropout.

    Positions are counted over real tokens, so that a row gives the same logits wherever it is padded.

    Args:
        folder: Holds ``config.json`` and safetensors, as ``save_pretrained`` of transformers writes them.
        dtype: Of the weights; "auto" is what they were saved in.
        attention: "sdpa", PyTorch's fused attention, or "eager". For others wrap a model of your own: ``of``.

    Attributes:
        model: The model of transformers.
        vocab_size: Number of token ids.
        context: Number of positions that it has learned embeddings of, as GPT-2 has; None if it computes them.

    Shape:
        tokens: (batch, time) integers, time >= 1. mask: (batch, time). Returns logits (batch, time, vocab_size) and
        the state.

    Raises:
        ValueError: transformers is not installed, the folder does not hold a causal language model with its weights,
            or its layers carry something else than keys and values.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = HuggingFaceLM.of(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)))
        >>> logits, state = model(torch.randint(64, (2, 10)))
        >>> logits.shape
        torch.Size([2, 10, 64])
    """

    vocab_size: int

    def __init__(self, folder: str | Path, *, dtype: Precision = "auto", attention: AttentionName = "sdpa") -> None:
        check_choice("dtype", dtype, get_args(Precision))
        check_choice("attention", attention, get_args(AttentionName))
        self._hold(load_folder(Path(folder), dtype, attention).train())

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Wrap a model of transformers that is in memory already; it is not copied.

        Raises:
            ValueError: It is no causal language model of transformers, or its layers carry something else than keys
                and values.
        """
        from_here = transformers_library()
        if not isinstance(model, from_here.PreTrainedModel) or not model.can_generate():
            raise ValueError(
                f"model is a {type(model).__name__}, no causal language model of transformers; pass one such as "
                f"LlamaForCausalLM"
            )
        check_model(model.config, type(model), f"model={type(model).__name__}")
        own = cls.__new__(cls)
        own._hold(model)
        return own

    def _hold(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        config = cast(Any, model).config
        self.vocab_size = config.get_text_config(decoder=True).vocab_size
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        layers = empty_cache(config).layers
        self._depth = len(layers)
        self._slides = any(getattr(layer, "is_sliding", False) for layer in layers)
        self.context = _position_table(model)

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HuggingFaceState:
        """Return the state of ``batch_size`` fresh rows; ``state=None`` stands for it.

        The model reads a token to show what its layers keep.
        """
        own = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        with torch.no_grad(), torch.random.fork_rng([own] if own.type == "cuda" else []):
            cache = empty_cache(self.model.config)
            self.model(torch.zeros(1, 1, dtype=torch.long, device=own), past_key_values=cache, use_cache=True)
        shown = _state_of(cache, torch.ones(1, 1, dtype=torch.bool, device=own))
        return shown.map(lambda t: t[:, :0].repeat_interleave(batch_size, 0)).to(device, dtype)

    def forward(
        self,
        tokens: Tensor,
        state: HuggingFaceState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        last: int | None = None,
    ) -> tuple[Tensor, HuggingFaceState | None]:
        """Read a piece of every row's text.

        Args:
            tokens: The tokens.
            state: What a previous call returned; None starts afresh. Never changed.
            mask: True at real tokens. A masked token changes no output of another one.
            doc_ids: Not supported.
            trace: Nothing is reported to it.
            donate: Changes nothing here.
            last: Tokens at the end of the call whose logits are wanted, at least 1; None for all.

        Returns:
            The logits and the state. With activation checkpointing, in training mode, these models keep no state: None.

        Raises:
            ValueError: A shape or dtype is wrong, a token id is outside the vocabulary, ``last`` is no number of tokens
                that the call has, the positions exceed the model's table of them, ``doc_ids`` is given, ``state`` is
                not of this model or cannot be read under activation checkpointing, or masked tokens lie between real
                ones in a model with a sliding window.
        """
        if last is None:
            return self._read(tokens, state, mask, doc_ids)
        check_last(last, tokens)
        logits, end = self._read(tokens, state, mask, doc_ids, **self._keeping(last))
        return logits[:, -last:], end

    def _keeping(self, last: int) -> dict[str, int]:
        """Options of a model that computes the logits of the last tokens alone, if it can."""
        return {"logits_to_keep": last} if "logits_to_keep" in self._takes else {}

    def _read(
        self,
        tokens: Tensor,
        state: HuggingFaceState | None,
        mask: Tensor | None,
        doc_ids: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, HuggingFaceState | None]:
        self._check_call(tokens, state, mask, doc_ids)
        config = cast(Any, self.model).config
        given: dict[str, Any] = {}
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if state is not None:
            real = torch.cat([state.mask, real], 1)
        if state is not None or mask is not None:  # else the model's own: all tokens real, positions from 0
            given["attention_mask"] = real.long()
            if "position_ids" in self._takes:
                given["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        self._check_places(real)
        if self.training and self._is_checkpointed():
            if state is not None:
                raise ValueError(
                    "state cannot be read under activation checkpointing, which drops keys and values; call "
                    "model.model.activation_checkpointing_disable(), or pass state=None"
                )
            return self.model(tokens.long(), use_cache=False, **given, **options).logits, None
        cache = empty_cache(config) if state is None else _cache_of(state, config)
        logits = self.model(tokens.long(), past_key_values=cache, use_cache=True, **given, **options).logits
        return logits, _state_of(cache, real)

    def prefill(
        self,
        tokens: Tensor,
        state: HuggingFaceState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, HuggingFaceState | None]:
        """Read a prompt; only the logits after each row's last real token are computed.

        Returns:
            Logits (batch, vocab_size) and the state, whose rows are padded on the left.

        Raises:
            ValueError: As ``forward``, or a row of ``mask`` has no real token.
        """
        check_prompt_mask(mask, tokens)
        if mask is not None:  # real tokens to the right: the last one is then in the last place, and no gap is left
            order = mask.long().argsort(dim=1, stable=True)
            tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        logits, state = self._read(tokens, state, mask, doc_ids, **self._keeping(1))
        return logits[:, -1], state

    def step(
        self,
        token: Tensor,
        state: HuggingFaceState | None = None,
        *,
        trace: Trace | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, HuggingFaceState | None]:
        """Read one token a row, (batch,); return logits (batch, vocab_size) and the state.

        Raises:
            ValueError: As ``forward``.
        """
        if token.dim() != 1:
            raise ValueError(f"token has shape {tuple(token.shape)}; step reads one a row, (batch,): use prefill")
        return self.prefill(token[:, None], state)

    def generate(self, tokens: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continue a prompt, yielding one token a row at a time; see ``memzoo.arch.generation.generate``."""
        return generate(self, tokens, max_new_tokens, **sampling)

    def _is_checkpointed(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def _check_call(
        self, tokens: Tensor, state: HuggingFaceState | None, mask: Tensor | None, doc_ids: Tensor | None
    ) -> None:
        check_tokens("tokens", tokens, self.vocab_size)
        check_grid("mask", mask, tokens, boolean=True)
        if doc_ids is not None:
            raise ValueError(
                f"doc_ids of shape {tuple(doc_ids.shape)} cannot be kept apart by a model of transformers; put a "
                f"document in each row, or let them see each other: pack_documents=False of TextData"
            )
        if state is None:
            return
        if not isinstance(state, HuggingFaceState) or len(state.layers) != self._depth:
            raise ValueError(
                f"state is a {type(state).__name__} that this model of {self._depth} layers did not return; pass what "
                f"its previous call returned, or None to start afresh"
            )
        if state.batch_size != len(tokens):
            raise ValueError(
                f"state has {state.batch_size} rows, tokens has batch {len(tokens)}; use state.reorder(index) to match "
                f"them, or state=None to start afresh"
            )

    def _check_places(self, real: Tensor) -> None:
        """Check the real tokens of the past and the call."""
        limit = self.context
        if limit is not None and real.shape[1] > limit:
            raise ValueError(
                f"tokens reach position {real.shape[1]}, but the model has a table of {limit}; read shorter pieces, "
                f"each from state=None"
            )
        if self._slides:
            gap = ~real & (real.cumsum(1) > 0)
            if (real & (gap.cumsum(1) > 0)).any():
                raise ValueError(
                    "mask leaves masked tokens between real ones, where a sliding window would count them; pad rows on "
                    "the left, and only before their first token"
                )


def _cache_of(state: HuggingFaceState, config: Any) -> Any:
    """Return a cache of transformers that holds a state; what it is given is put into new tensors."""
    cache = empty_cache(config)
    for layer, kept in zip(cache.layers, state.layers, strict=True):
        if kept is not None:
            keys, values = kept.keys.transpose(1, 2), kept.values.transpose(1, 2)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length = state.mask.shape[1]
    return cache


def _state_of(cache: Any, mask: Tensor) -> HuggingFaceState:
    kept = [None if layer.keys is None else (layer.keys, layer.values) for layer in cache.layers]
    return HuggingFaceState(
        mask, tuple(None if pair is None else KeysValues(*(t.transpose(1, 2) for t in pair)) for pair in kept)
    )


def _position_table(model: Any) -> int | None:
    """Return how many positions a model has learned embeddings of, as GPT-2 has; None if it computes them."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = {m for m in model.modules() if isinstance(m, nn.Embedding)} - {model.get_input_embeddings()}
    # OPT's table has two rows more.
    return limit if limit is not None and any(0 <= m.num_embeddings - limit <= 2 for m in tables) else None
