"""Titans: memory as context (MAC), arXiv 2501.00663."""

from collections.abc import Mapping
from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.arch.titans_common import IN_LAYERS, SIZES, memory_choices, with_stable_memory
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.memory_as_context import MemoryAsContext

MAC_CARD = ModelCard(
    name="Titans MAC",
    title="Titans: learning to memorize at test time, memory as context",
    paper="arXiv 2501.00663",
    memory="the weights of a small MLP, a copy per sequence, block and head; attention over the running segment",
    written="every token, with what attention made of it, by one step of gradient descent with momentum and forgetting",
    read="before a segment is attended to, with its tokens as queries; and by every token after its own write",
    fidelity=Fidelity.DESIGN,
    choices={
        "layout": "x + MemoryAsContext(RMSNorm x), then x + SwiGLU(RMSNorm x); segments are linked by the memory alone",
        "sizes": "depth and width of Gated DeltaNet's 170M, 340M and 760M models; the paper gives none",
        "segment_size": "64 tokens; chunks of the memory are no longer, unless the memory option says so",
        "gate": "attention times sigmoid of the memory, both RMS-normalised; then a projection",
        "literal": "off: h and the last read are masked, no token sees its future; on for the printed form",
        "retrieved_positions": "a retrieved token has the position of the token that asked for it",
        "shared_query": "the retrieval asks with the memory's own query projection",
        "residual": "off: the memory is written with attention's output alone, as printed; on in titans_mac_tiny",
        **IN_LAYERS,
        **memory_choices(),
    },
    claims=(
        Claim("better recall beyond the window than attention alone"),
        Claim("400M parameters, 15B tokens: reasoning 48.65, Gated DeltaNet-H2 47.69"),
        Claim("340M parameters, 15B tokens: Wiki perplexity 25.43, Gated DeltaNet 27.01", recipe="titans/mac_340m"),
        Claim("S-NIAH at 16k tokens: 98.4, 97.4 and 95.2; LMM 96.2, 80.2 and 80.6"),
    ),
)


class TitansMAC(CausalLM):
    """Blocks of memory as context and SwiGLU; see ``memzoo.layers.MemoryAsContext``.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        segment_size: Tokens of a segment, which attention sees as a whole. Part of the model.
        num_persistent_tokens: Learned tokens that every segment sees; 0 for none.
        num_heads: Heads of the attention and of the memory; None for one per ``head_dim`` channels.
        head_dim: Width of a head; 64 when neither it nor ``num_heads`` is given.
        rotary_base: Base of the rotary embedding, of the position in the segment; None for no positions.
        qk_norm: RMS-normalise the attention's queries and keys.
        gate: How attention and memory are combined, a form of ``MemoryGate``.
        literal: Compute the printed equations, which show a token the rest of its segment.
        retrieved_positions: Give a retrieved token the position of the token that asked.
        shared_query: Retrieve with the memory's own query projection.
        residual: Write and gate what attention returns plus what it was given.
        memory: Keyword options of ``memzoo.layers.NeuralMemory``, such as ``{"memory_depth": 3}``.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, does not divide another, or an option is unknown.

    Reference:
        Behrouz et al., arXiv 2501.00663, section 4.1.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        segment_size: int = 64,
        num_persistent_tokens: int = 16,
        num_heads: int | None = None,
        head_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        gate: str = "sigmoid_memory",
        literal: bool = False,
        retrieved_positions: bool = True,
        shared_query: bool = True,
        residual: bool = False,
        memory: Mapping[str, Any] | None = None,
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
    ) -> None:
        def mixer() -> MemoryAsContext:
            return MemoryAsContext(
                dim,
                segment_size=segment_size,
                num_persistent_tokens=num_persistent_tokens,
                num_heads=num_heads,
                head_dim=head_dim,
                rotary_base=rotary_base,
                qk_norm=qk_norm,
                gate=gate,
                literal=literal,
                retrieved_positions=retrieved_positions,
                shared_query=shared_query,
                residual=residual,
                memory=memory,
            )

        check_positive("depth", depth)
        super().__init__(
            vocab_size,
            dim,
            [Block(mixer(), SwiGLU(dim, hidden_dim=hidden_dim)) for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )


@register_model(MAC_CARD)
def titans_mac_tiny(**overrides: Any) -> TitansMAC:
    """1.1M parameters on bytes, as many as the other tiny models, in 2 blocks; trains on two CPU cores in minutes.

    Its memory is written with attention's output plus its input. It forgets towards its initial weights and limits its
    gradients, as that of `titans_lmm_tiny` does; what ``memory`` says goes on top of that.
    """
    small: dict[str, Any] = dict(
        vocab_size=256, dim=128, depth=2, hidden_dim=848, num_persistent_tokens=4, residual=True
    )
    return TitansMAC(**small | with_stable_memory(overrides))


@register_model(MAC_CARD)
def titans_mac_170m(**overrides: Any) -> TitansMAC:
    """12 blocks of width 768, 32k tokens: 155M parameters, embeddings tied."""
    return TitansMAC(**SIZES["170m"] | overrides)


@register_model(MAC_CARD)
def titans_mac_340m(**overrides: Any) -> TitansMAC:
    """24 blocks of width 1024, 32k tokens: 496M parameters; the paper's 340M, whose shape it does not give."""
    return TitansMAC(**SIZES["340m"] | overrides)


@register_model(MAC_CARD)
def titans_mac_760m(**overrides: Any) -> TitansMAC:
    """24 blocks of width 1536, 32k tokens: 1082M parameters; the paper's 760M, whose shape it does not give."""
    return TitansMAC(**SIZES["760m"] | overrides)
