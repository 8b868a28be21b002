"""CausalLM: a language model of any blocks, that reads, steps and generates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memzoo.arch.block import Block, ResidualBlock
from memzoo.arch.generation import Step, check_last, check_prompt_mask, generate
from memzoo.layers.errors import check_count, check_positive, check_tokens
from memzoo.layers.norm import RMSNorm
from memzoo.layers.state import MixerState, State
from memzoo.layers.trace import Trace

INITIAL_STD = 0.02
RESIDUAL_OUTPUTS = ("out", "down")  # what layers call the nn.Linear that writes to the residual stream


@dataclass(frozen=True)
class CausalLMState(State):
    """What a CausalLM carries: the mixer state of every block that has one, in their order."""

    blocks: tuple[MixerState, ...]


class CausalLM(nn.Module):
    """Language model: embedding, blocks, norm, head.

    ``logits, state = model(tokens, state=None, *, mask=None, doc_ids=None, trace=None, donate=False)``

    Weights start as in GPT-2. Embedding, head and plain projections (every ``nn.Linear`` without a bias) are drawn with
    a standard deviation of 0.02. Those that write to the residual stream (layers call that one ``out`` or ``down``, or
    name theirs in ``residual_outputs()``) have that over ``sqrt(number of residual branches)``, and a bias of zero if
    any. All else, gates (``nn.Linear`` with a bias), convolutions, a memory's initial weights, stays as its layer drew
    it. Load trained weights after composing.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        blocks: The blocks, of that width, in order. Any mix.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Keep only each block's input for the backward pass and compute the rest again: less memory,
            more time, equal gradients. A number k does so for the first block and every k-th behind it; True is 1.
        norm: Builds the norm before the head from a width; blocks bring their own.

    Attributes:
        name: Name in the registry; None for a model built otherwise.
        config: Constructor arguments of a named architecture; empty for a model composed by hand.

    Shape:
        tokens: (batch, time) integers, time >= 1. mask, doc_ids: (batch, time). Returns logits (batch, time,
        vocab_size) and the state.

    Raises:
        ValueError: No block, or one of another width; ``checkpoint_blocks`` is no whole number >= 0.

    Example:
        >>> import torch
        >>> from memzoo.arch import Block, CausalLM
        >>> from memzoo.layers import NeuralMemory, SlidingWindowAttention, SwiGLU
        >>> mixers = [NeuralMemory(64, num_heads=1), SlidingWindowAttention(64, window=16, num_heads=1)]
        >>> model = CausalLM(256, 64, [Block(mixer, SwiGLU(64)) for mixer in mixers])
        >>> logits, state = model(torch.randint(256, (2, 10)))
        >>> logits.shape
        torch.Size([2, 10, 256])
    """

    block_class: ClassVar[type[ResidualBlock]] = Block
    """What ``blocks`` must be. An architecture with a ``forward_features`` of its own may take others."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        blocks: Iterable[ResidualBlock],
        *,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        norm: Callable[[int], nn.Module] = RMSNorm,
    ) -> None:
        super().__init__()
        check_positive("vocab_size", vocab_size)
        check_positive("dim", dim)
        self.name: str | None = None
        self.config: dict[str, Any] = {}
        self.vocab_size, self.dim = vocab_size, dim
        if checkpoint_blocks not in (False, True):
            check_count("checkpoint_blocks", checkpoint_blocks, "use True for all blocks, k for every k-th")
        self.checkpoint_blocks = checkpoint_blocks
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(dim)
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)
        self._check_blocks()
        self._draw_weights()

    def _check_blocks(self) -> None:
        if not self.blocks:
            raise ValueError("blocks=[] makes no model; pass at least one Block(mixer, ffn)")
        for index, block in enumerate(self.blocks):
            if not isinstance(block, self.block_class):
                raise ValueError(f"blocks[{index}] is a {type(block).__name__}; wrap it: Block(mixer, ffn)")
            if block.dim != self.dim:
                raise ValueError(f"blocks[{index}] has width {block.dim}, the model dim={self.dim}; make them equal")

    def _draw_weights(self) -> None:
        blocks = cast(Iterable[ResidualBlock], self.blocks)
        layers = [layer for block in blocks for layer in (block.mixer, block.ffn) if layer is not None]
        branches = sum(len(residual_outputs(layer)) or 1 for layer in layers)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        for layer in layers:
            self._draw_layer(layer, INITIAL_STD * branches**-0.5)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=INITIAL_STD)

    def _draw_layer(self, layer: nn.Module, residual_std: float) -> None:
        outputs = {id(output) for output in residual_outputs(layer)}
        for module in layer.modules():
            writes = id(module) in outputs
            if isinstance(module, nn.Linear) and (writes or module.bias is None):
                nn.init.normal_(module.weight, std=residual_std if writes else INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CausalLMState:
        """Return the state of ``batch_size`` fresh rows; ``state=None`` stands for it."""
        carrying = self._carrying_blocks()
        return CausalLMState(tuple(block.initial_state(batch_size, device=device, dtype=dtype) for block in carrying))

    def _carrying_blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        last: int | None = None,
        **reads: Any,
    ) -> tuple[Tensor, CausalLMState]:
        """Read a piece of every row's text; arguments that are not named below are those of ``SequenceMixer.forward``.

        Args:
            tokens: The text.
            state: What the last call returned; None starts afresh.
            mask: True at real tokens.
            doc_ids: Documents packed in one row.
            trace: Collects losses and signals.
            donate: Allow the storage of ``state`` to be reused.
            last: Tokens at the end of the call whose logits are wanted, at least 1; None for all. What serves none of
                them is left out: the head and, in most models, the last block's channel layer, which tells ``trace`` of
                these tokens alone.
            **reads: What an architecture's ``forward_features`` takes besides, such as the memories of a bank; so in
                ``prefill`` and ``step``.

        Raises:
            ValueError: A shape or dtype is wrong, a token id is outside the vocabulary, ``state`` is not of this model,
                or ``last`` is no number of tokens that the call has.
        """
        if last is not None:
            check_last(last, tokens)
            reads["last"] = last
        features, state = self.forward_features(
            tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, **reads
        )
        return self.forward_head(features), state

    def forward_features(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        last: int | None = None,
    ) -> tuple[Tensor, CausalLMState]:
        """Return what the head reads, (batch, time, dim), or (batch, last, dim) of the last tokens; and the state."""
        return self.read(tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, last=last)

    def read(
        self,
        tokens: Tensor,
        state: CausalLMState | None,
        *,
        mask: Tensor | None,
        doc_ids: Tensor | None,
        trace: Trace | None,
        donate: bool,
        last: int | None = None,
        options: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[Tensor, CausalLMState]:
        """Do what ``forward_features`` does; ``options`` are further keywords, those of every block."""
        check_tokens("tokens", tokens, self.vocab_size)
        states = self._block_states(state)
        x = self.embed(tokens, states, mask=mask, doc_ids=doc_ids)
        ends: list[MixerState] = []
        for index, start in enumerate(states):
            own = {} if options is None else dict(options[index])
            if last is not None and index + 1 == len(states) and type(self.blocks[index]).forward is Block.forward:
                own["last"] = last
            x, end = self.run_block(index, x, start, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, **own)
            ends.append(end)
        return self.norm(x if last is None else x[:, -last:]), CausalLMState(tuple(ends))

    def embed(
        self, tokens: Tensor, states: Sequence[MixerState | None], *, mask: Tensor | None, doc_ids: Tensor | None
    ) -> Tensor:
        """Return what the first block reads, (batch, time, dim).

        Args:
            tokens: Checked ids.
            states: Of the blocks before the call.
            mask: True at real tokens.
            doc_ids: Documents packed in one row.
        """
        x: Tensor = self.embedding(tokens.long())
        return x

    def run_block(self, index: int, *inputs: Any, trace: Trace | None, donate: bool = False, **options: Any) -> Any:
        """Call a block; one that is to run again in the backward pass (``checkpoint_blocks``) is donated no state.

        Args:
            index: Number of the block.
            *inputs: Tensors and states, as the block takes them.
            trace: The model's.
            donate: Allow the storage of the state among ``inputs`` to be reused.
            **options: Further keywords of the block.
        """
        block, scope = self.blocks[index], None if trace is None else trace.scope(f"blocks.{index}")
        if self.checkpoint_blocks and index % self.checkpoint_blocks == 0 and torch.is_grad_enabled():
            return _checkpointed(block, inputs, scope, options)
        if donate:
            options["donate"] = True
        return block(*inputs, trace=scope, **options)

    def forward_head(self, features: Tensor) -> Tensor:
        """Return the logits of features, (..., dim) -> (..., vocab_size)."""
        return F.linear(features, self.embedding.weight if self.head is None else self.head.weight)

    def prefill(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
        **reads: Any,
    ) -> tuple[Tensor, CausalLMState]:
        """Read a prompt; only the logits after each row's last real token are computed.

        Returns:
            Logits (batch, vocab_size) and the state.

        Raises:
            ValueError: As ``forward``, or a row of ``mask`` has no real token.
        """
        check_prompt_mask(mask, tokens)
        features, state = self.last_features(
            tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, **reads
        )
        return self.forward_head(features[:, 0]), state

    def last_features(
        self,
        tokens: Tensor,
        state: CausalLMState | None = None,
        *,
        mask: Tensor | None = None,
        doc_ids: Tensor | None = None,
        trace: Trace | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, CausalLMState]:
        """Return what the head reads of each row's last real token, (batch, 1, dim), and the state."""
        last = 1 if mask is None else None
        features, state = self.forward_features(
            tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, last=last
        )
        return last_token(features, mask), state

    def step(
        self,
        token: Tensor,
        state: CausalLMState | None = None,
        *,
        trace: Trace | None = None,
        donate: bool = False,
        **reads: Any,
    ) -> tuple[Tensor, CausalLMState]:
        """Read one token a row, (batch,); return logits (batch, vocab_size) and the state.

        Raises:
            ValueError: As ``forward``.
        """
        _check_token(token)
        return self.prefill(token[:, None], state, trace=trace, donate=donate, **reads)

    def check_step(self, token: Tensor, state: CausalLMState | None) -> None:
        """Check the arguments of ``step`` whose values no compiled program looks at; see ``CompiledStep``.

        Raises:
            ValueError: As ``step``.
        """
        _check_token(token)
        check_tokens("token", token[:, None], self.vocab_size)
        self._block_states(state)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Iterable[int] | None = None,
        generator: torch.Generator | None = None,
        state: CausalLMState | None = None,
        mask: Tensor | None = None,
        step: Step | None = None,
    ) -> Iterator[Tensor]:
        """Continue a prompt, yielding one token a row at a time; see ``memzoo.arch.generation.generate``."""
        return generate(
            self,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            generator=generator,
            state=state,
            mask=mask,
            step=step,
        )

    def _block_states(self, state: CausalLMState | None) -> tuple[MixerState | None, ...]:
        carrying = len(self._carrying_blocks())
        if state is None:
            return (None,) * carrying
        if not isinstance(state, CausalLMState):
            raise ValueError(f"state is a {type(state).__name__}; pass what this model returned, or None")
        if len(state.blocks) != carrying:
            raise ValueError(
                f"state is of {len(state.blocks)} blocks, the model has {carrying} that carry one; pass what this "
                f"model returned, or None"
            )
        return state.blocks


def _check_token(token: Tensor) -> None:
    if token.dim() != 1:
        raise ValueError(f"token has shape {tuple(token.shape)}; step reads one a row, (batch,): use prefill")


def residual_outputs(layer: nn.Module) -> list[nn.Linear]:
    """Return what writes to the residual stream: what the layer says, or its projection of a usual name."""
    declared = getattr(layer, "residual_outputs", None)
    if declared is not None:
        return list(declared())
    named = [getattr(layer, name, None) for name in RESIDUAL_OUTPUTS]
    return [output for output in named if isinstance(output, nn.Linear)]


def last_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return each row's last real token, (batch, time, width) -> (batch, 1, width)."""
    if mask is None:
        return x[:, -1:]
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).amax(1)
    return x[torch.arange(len(last), device=last.device), last][:, None]


def _checkpointed(block: nn.Module, inputs: tuple[Any, ...], trace: Trace | None, options: dict[str, Any]) -> Any:
    """Run a block so that the backward pass computes it again; it reports once."""

    def run(*inputs: Any) -> tuple[Any, Trace | None]:
        own = None if trace is None else Trace(signals=trace.wants_signals)
        return block(*inputs, trace=own, **options), own

    result, own = checkpoint(run, *inputs, use_reentrant=False)
    if trace is not None and own is not None:
        trace.merge(own)
    return result
