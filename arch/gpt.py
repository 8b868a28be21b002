"""GPT: the dense baseline with learned positions, LayerNorm and GELU, as in GPT-2 (Radford et al., 2019)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.arch.block import Block
from memzoo.arch.card import Fidelity, ModelCard
from memzoo.arch.causal_lm import INITIAL_STD, CausalLM, CausalLMState
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.attention import Attention
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import FeedForward
from memzoo.layers.ops.attention_checks import check_dropout
from memzoo.layers.state import MixerState

CHOICES = {
    "num_heads": "None: dim / 64",
    "context": "1024 positions, learned; a document's tokens are counted from its first one, across calls",
    "attention_dropout": "0; 0.1 in the large sizes; by train() and eval(), where the official code of GMT goes by "
    "whether gradients are on",
    "embedding_dropout": "0; 0.1 in the large sizes",
    "tie_embeddings": "on",
    "initial weights": "as the official code of GMT: matrices and embeddings with a standard deviation of 0.02, also "
    "those that write to the residual stream",
}
CARD = ModelCard(
    name="GPT",
    title="Decoder-only Transformer with learned positions, LayerNorm and GELU",
    paper="arXiv 2604.23862",
    memory="the keys and values of every past token, up to `context`",
    written="every token",
    read="every token, by softmax attention",
    fidelity=Fidelity.DESIGN,
    choices=CHOICES
    | {
        "hidden_dim": "None: 4 dim; 0 for attention alone",
        "the baseline's shape": "the paper says 103.0M parameters and no more: 9 blocks of width 4 dim have 103.1M, 16 "
        "blocks of width 1050 have 103.0M",
        "the biases": "none but those of the LayerNorms, as the official code, where GPT-2 has some",
    },
    state_size="grows",
)


class GPT(CausalLM):
    """Blocks of attention and a feed-forward, tokens told apart by learned absolute positions.

    A token's position is how many tokens of its document come before it: documents packed in one row begin at 0 each,
    masked tokens are not counted, and a call that continues a state goes on counting. There are ``context`` of them. A
    token beyond is refused, and nothing is forgotten to make room: start afresh with ``state=None``, or build the model
    with a larger ``context``. (Where the tokens lie on another device than the CPU and rows may differ, they are not
    read for that; the device's own embedding kernel asserts it. Under ``torch.compile`` with ``fullgraph=True`` a text
    too long is refused by ``torch._dynamo.exc.Unsupported``, "Observed exception", for a graph cannot raise.)

    Every matrix and embedding starts with a standard deviation of 0.02, also those that write to the residual stream.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Heads of attention; None for heads of 64 channels.
        context: Number of positions.
        hidden_dim: Inner width of the feed-forward; None for ``4 * dim``, 0 for no feed-forward at all.
        attention_dropout: Probability with which a weight of attention is dropped in training.
        embedding_dropout: Probability with which a channel of an embedded token is dropped in training.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive or does not divide another, or a dropout is no probability.

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3; as the dense baseline
        of arXiv 2604.23862.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        context: int = 1024,
        hidden_dim: int | None = None,
        attention_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
    ) -> None:
        def feed_forward() -> nn.Module | None:
            return None if hidden_dim == 0 else FeedForward(dim, hidden_dim=hidden_dim)

        self._build(
            vocab_size,
            dim,
            depth,
            feed_forward,
            num_heads=num_heads,
            context=context,
            attention_dropout=attention_dropout,
            embedding_dropout=embedding_dropout,
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )

    def _build(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        channel: Callable[[], nn.Module | None],
        *,
        num_heads: int | None,
        context: int,
        attention_dropout: float,
        embedding_dropout: float,
        tie_embeddings: bool,
        checkpoint_blocks: bool | int,
    ) -> None:
        """Be the model whose blocks have ``channel()`` for a channel layer: for ``__init__``, also of a subclass."""
        check_positive("depth", depth)
        check_positive("context", context)
        check_dropout("attention_dropout", attention_dropout)
        check_dropout("embedding_dropout", embedding_dropout)

        def block() -> Block:
            attention = Attention(dim, num_heads=num_heads, rotary_base=None, dropout=attention_dropout)
            return Block(attention, channel(), norm=nn.LayerNorm)

        super().__init__(
            vocab_size,
            dim,
            [block() for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
            norm=nn.LayerNorm,
        )
        self.context = context
        self.positions = nn.Embedding(context, dim)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        nn.init.normal_(self.positions.weight, std=INITIAL_STD)

    def _draw_layer(self, layer: nn.Module, residual_std: float) -> None:
        super()._draw_layer(layer, INITIAL_STD)

    def embed(
        self, tokens: Tensor, states: Sequence[MixerState | None], *, mask: Tensor | None, doc_ids: Tensor | None
    ) -> Tensor:
        """Return what the first block reads, (batch, time, dim): tokens at their positions.

        Raises:
            ValueError: A token stands beyond the last position, or an argument does not fit.
        """
        x = super().embed(tokens, states, mask=mask, doc_ids=doc_ids)
        x = x + self.positions(self._positions(x, states[0], mask, doc_ids))
        dropped: Tensor = self.embedding_dropout(x)
        return dropped

    def _positions(self, x: Tensor, state: MixerState | None, mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        """Position of every token in its document, as the first block counts: (time,), or (batch, time) if rows differ.

        Masked tokens stand at 0.
        """
        mixer = self._carrying_blocks()[0].mixer
        mixer.check_call(x, state, mask, doc_ids)
        counters = None if state is None else MixerState(state.position, state.document)
        rows, start = mixer.unpack(counters, mask, doc_ids)
        positions = torch.arange(x.shape[1] if rows is None else rows.index.shape[1], device=x.device)
        if rows is None and start is None:
            self._check_last(x.shape[1] - 1)
            return positions
        if start is not None:
            positions = start.position[:, None] + positions
        if rows is not None:
            positions = rows.scatter(positions.expand_as(rows.index))
        if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
            self._check_last(int(positions.max()))
        return positions

    def check_step(self, token: Tensor, state: CausalLMState | None) -> None:
        """Check also that the token has a position within the context."""
        super().check_step(token, state)
        if state is not None and token.device.type == "cpu":
            self._check_last(int(state.blocks[0].position.max()))

    def _check_last(self, position: int) -> None:
        if position >= self.context:
            raise ValueError(
                f"tokens reach position {position}, the model has context={self.context}, the last one being "
                f"{self.context - 1}; pass fewer, start afresh with state=None, or build it with a larger context"
            )

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        state: CausalLMState | None = None,
        mask: Tensor | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Continue a prompt as ``CausalLM.generate`` does, within the context.

        There are positions for ``context`` tokens, and all but the last new one are read. More are refused before the
        first one is drawn, also where a stop token might have come in time.

        Raises:
            ValueError: As there, or ``max_new_tokens`` leads beyond the context.
        """
        stream = super().generate(tokens, max_new_tokens, state=state, mask=mask, **sampling)
        real = torch.tensor(tokens.shape[1]) if mask is None else mask.sum(1)
        before = self._block_states(state)[0]
        read = int((real if before is None else real + before.position).max())
        self._check_last(read - 1)
        room = self.context - read + 1
        if max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after {read} tokens lead beyond context={self.context}; use "
                f"max_new_tokens <= {room}, a shorter prompt, or a model with a larger context"
            )
        return stream


@register_model(CARD)
def gpt_tiny(**overrides: Any) -> GPT:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    return GPT(**dict(vocab_size=256, dim=128, depth=4, num_heads=4, hidden_dim=640) | overrides)


@register_model(CARD)
def gpt_103m(**overrides: Any) -> GPT:
    """9 blocks of width 768, GPT-2's tokens: 103.1M parameters, a baseline of GMT of the size that its paper says."""
    return _large(overrides, depth=9, hidden_dim=3072)


@register_model(CARD)
def gpt_103m_deep(**overrides: Any) -> GPT:
    """16 blocks of width 768, as many as GMT's, with a narrow feed-forward: 103.0M parameters."""
    return _large(overrides, depth=16, hidden_dim=1050)


def _large(overrides: dict[str, Any], **sizes: int) -> GPT:
    dropouts = {"attention_dropout": 0.1, "embedding_dropout": 0.1}
    return GPT(**dict(vocab_size=50257, dim=768, num_heads=12) | dropouts | sizes | overrides)
