"""Titans: memory as gate (MAG), arXiv 2501.00663."""

from collections.abc import Mapping
from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.arch.titans_common import IN_LAYERS, SIZES, memory_choices, with_stable_memory
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.memory_as_gate import MemoryAsGate

MAG_CARD = ModelCard(
    name="Titans MAG",
    title="Titans: learning to memorize at test time, memory as gate",
    paper="arXiv 2501.00663",
    memory="the weights of a small MLP, one private copy per sequence, block and head; beside it a window of tokens",
    written="every token, by one step of gradient descent with momentum and forgetting on ‖M(k) - v‖²",
    read="every token, right after it was written: it gates the output of sliding-window attention",
    fidelity=Fidelity.DESIGN,
    choices={
        "layout": "x + MemoryAsGate(RMSNorm x), then x + SwiGLU(RMSNorm x); the memory reads the persistent tokens too",
        "sizes": "depth and width of Gated DeltaNet's 170M, 340M and 760M models; the paper gives none",
        "window": "512 tokens",
        "num_kv_heads": "as many as query heads",
        "gate": "attention times sigmoid of the memory, both RMS-normalised; then a projection",
        **IN_LAYERS,
        **memory_choices(),
    },
    claims=(
        Claim("better recall beyond the window than attention alone"),
        Claim("760M parameters, 30B tokens: Wiki perplexity 18.61, Gated DeltaNet-H2 19.88"),
        Claim("340M parameters, 15B tokens: Wiki perplexity 25.07, Gated DeltaNet 27.01", recipe="titans/mag_340m"),
    ),
)


class TitansMAG(CausalLM):
    """Blocks of memory as gate and SwiGLU; see ``memzoo.layers.MemoryAsGate``.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        window: Tokens a query sees, its own among them.
        num_persistent_tokens: Learned tokens in front of every sequence; 0 for none.
        num_heads: Heads of the attention and of the memory; None for one per ``head_dim`` channels.
        head_dim: Width of a head; 64 when neither it nor ``num_heads`` is given.
        num_kv_heads: Heads of the attention's keys and values; None for as many as of queries.
        rotary_base: Base of the rotary embedding; None for no positions.
        qk_norm: RMS-normalise the attention's queries and keys.
        gate: How attention and memory are combined, a form of ``MemoryGate``.
        memory: Keyword options of ``memzoo.layers.NeuralMemory``, such as ``{"memory_depth": 3}``.
        backend: Of the attention: "auto", "torch" or "flash_attn".
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, does not divide another, or an option is unknown.

    Reference:
        Behrouz et al., arXiv 2501.00663, section 4.2.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        window: int = 512,
        num_persistent_tokens: int = 16,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        gate: str = "sigmoid_memory",
        memory: Mapping[str, Any] | None = None,
        backend: str = "auto",
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
    ) -> None:
        def mixer() -> MemoryAsGate:
            return MemoryAsGate(
                dim,
                window=window,
                num_persistent_tokens=num_persistent_tokens,
                num_heads=num_heads,
                head_dim=head_dim,
                num_kv_heads=num_kv_heads,
                rotary_base=rotary_base,
                qk_norm=qk_norm,
                gate=gate,
                memory=memory,
                backend=backend,
            )

        check_positive("depth", depth)
        super().__init__(
            vocab_size,
            dim,
            [Block(mixer(), SwiGLU(dim, hidden_dim=hidden_dim)) for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )


@register_model(MAG_CARD)
def titans_mag_tiny(**overrides: Any) -> TitansMAG:
    """1.1M parameters on bytes, as many as the other tiny models, in 2 blocks; trains on two CPU cores in minutes.

    Its memory forgets towards its initial weights and limits its gradients, as that of `titans_lmm_tiny` does; what
    ``memory`` says goes on top of that.
    """
    small: dict[str, Any] = dict(vocab_size=256, dim=128, depth=2, hidden_dim=848, window=64, num_persistent_tokens=4)
    return TitansMAG(**small | with_stable_memory(overrides))


@register_model(MAG_CARD)
def titans_mag_170m(**overrides: Any) -> TitansMAG:
    """12 blocks of width 768, 32k tokens: 155M parameters, embeddings tied."""
    return TitansMAG(**SIZES["170m"] | overrides)


@register_model(MAG_CARD)
def titans_mag_340m(**overrides: Any) -> TitansMAG:
    """24 blocks of width 1024, 32k tokens: 496M parameters; the paper's 340M, whose shape it does not give."""
    return TitansMAG(**SIZES["340m"] | overrides)


@register_model(MAG_CARD)
def titans_mag_760m(**overrides: Any) -> TitansMAG:
    """24 blocks of width 1536, 32k tokens: 1082M parameters; the paper's 760M, whose shape it does not give."""
    return TitansMAG(**SIZES["760m"] | overrides)
