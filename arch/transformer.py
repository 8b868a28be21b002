"""Transformer: the baseline, a Llama-like decoder (arXiv 2302.13971)."""

from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.attention import Attention, SlidingWindowAttention
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.mixer import SequenceMixer

CARD = ModelCard(
    name="Transformer",
    title="Decoder-only Transformer with rotary positions, RMSNorm and SwiGLU",
    paper="arXiv 2302.13971",
    memory="the keys and values of every past token, or of the last `window` of them",
    written="every token",
    read="every token, by softmax attention",
    fidelity=Fidelity.DESIGN,
    choices={
        "num_heads": "None: dim / head_dim",
        "head_dim": "None: dim / num_heads, or 64 without either",
        "num_kv_heads": "None: as many as query heads; fewer share keys and values (grouped queries)",
        "window": "None: full causal attention; a number of keys, the token's own included, otherwise",
        "rotary_base": "10000",
        "qk_norm": "off",
        "hidden_dim": "8/3 dim, rounded up to a multiple of 64",
        "tie_embeddings": "on, where Llama has a head of its own; False for that",
    },
    state_size="grows",
)


class Transformer(CausalLM):
    """Blocks of attention and SwiGLU: the model to compare a memory with.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Query heads; None for ``head_dim`` channels each.
        head_dim: Channels of a head; 64 when neither it nor ``num_heads`` is given.
        num_kv_heads: Key and value heads; None for ``num_heads``.
        window: Keys a token attends to, its own included; None for all.
        rotary_base: Base of the rotary angles; None for no positions.
        qk_norm: RMS-normalise queries and keys.
        backend: Of the attention: "auto", "torch" or "flash_attn".
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, does not divide another, or the backend is missing.

    Reference:
        Touvron et al., arXiv 2302.13971, section 2.2.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        window: int | None = None,
        rotary_base: float | None = 10000.0,
        qk_norm: bool = False,
        backend: str = "auto",
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
    ) -> None:
        options: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "rotary_base": rotary_base,
            "qk_norm": qk_norm,
            "backend": backend,
        }

        def attention() -> SequenceMixer:
            if window is None:
                return Attention(dim, **options)
            return SlidingWindowAttention(dim, window=window, **options)

        check_positive("depth", depth)
        super().__init__(
            vocab_size,
            dim,
            [Block(attention(), SwiGLU(dim, hidden_dim=hidden_dim)) for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )


@register_model(CARD)
def transformer_tiny(**overrides: Any) -> Transformer:
    """1.1M parameters on bytes, as many as `titans_lmm_tiny`; trains on two CPU cores in minutes."""
    return Transformer(**dict(vocab_size=256, dim=128, depth=4, num_heads=4, hidden_dim=512) | overrides)


@register_model(CARD)
def transformer_170m(**overrides: Any) -> Transformer:
    """12 blocks of width 768, 32k tokens: the smallest of the Titans paper's sizes (110M, embeddings tied)."""
    return Transformer(**dict(vocab_size=32000, dim=768, depth=12) | overrides)


@register_model(CARD)
def transformer_340m(**overrides: Any) -> Transformer:
    """24 blocks of width 1024, 32k tokens: 336M parameters."""
    return Transformer(**dict(vocab_size=32000, dim=1024, depth=24) | overrides)


@register_model(CARD)
def transformer_760m(**overrides: Any) -> Transformer:
    """24 blocks of width 1536, 32k tokens: 729M parameters."""
    return Transformer(**dict(vocab_size=32000, dim=1536, depth=24) | overrides)
