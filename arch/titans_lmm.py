"""Titans: neural long-term memory as the only sequence mixer (LMM), arXiv 2501.00663."""

from dataclasses import replace
from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.arch.titans_common import MEMORY_CHOICES, SIZES, STABLE_MEMORY
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.neural_memory import NeuralMemory

LMM_CARD = ModelCard(
    name="Titans LMM",
    title="Titans: learning to memorize at test time, long-term memory alone",
    paper="arXiv 2501.00663",
    memory="the weights of a small MLP, one private copy per sequence, block and head",
    written="every token, by one step of gradient descent with momentum and forgetting on ‖M(k) - v‖²",
    read="every token, right after it was written: y = M(q)",
    fidelity=Fidelity.DESIGN,
    choices={
        "layout": "x + NeuralMemory(RMSNorm x), then x + SwiGLU(RMSNorm x), as in Llama; no positions",
        "sizes": "depth and width of Gated DeltaNet's 170M, 340M and 760M models; the paper gives none",
        "num_heads": "None: heads of head_dim; 1 is the paper's single memory of full width",
        "head_dim": "64",
        **MEMORY_CHOICES,
        "hidden_dim": "SwiGLU of 8/3 dim, rounded up to a multiple of 64",
        "tie_embeddings": "on",
    },
    claims=(
        Claim("lower perplexity than a Transformer of equal size and tokens", recipe="titans/lmm_tiny"),
        Claim("340M parameters, 15B tokens: Wiki perplexity 26.18, Transformer++ 31.52", recipe="titans/lmm_340m"),
    ),
)


class TitansLMM(CausalLM):
    """Blocks of neural memory and SwiGLU, no attention: ``x + NeuralMemory(norm x)``, ``x + SwiGLU(norm x)``.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Memories of a block; None for one per ``head_dim`` channels.
        head_dim: Channels of a memory; 64 when neither it nor ``num_heads`` is given.
        memory_depth: Layers of the memory MLP.
        memory_expansion: Its hidden width over ``head_dim``.
        chunk_size: Tokens whose gradients are taken at the same weights. Part of the model, not of its speed alone.
        activation: Between the memory's layers.
        momentum: Carry past surprise on.
        forgetting: Let the memory decay.
        conv_width: Of the causal convolutions on queries, keys and values; None for none.
        max_learning_rate: Upper bound of the memory's learning rate; None for ``chunk_size ** -0.5``.
        loss_scale: Factor of the memory's gradient; 2 for the paper's squared error without the half.
        read: ``"post"`` reads after a token's own write, ``"pre"`` before.
        output_gate: Gate what is read.
        output_norm: Normalise what is read.
        decay_to_init: Forget towards the initial weights instead of zero.
        max_gradient_norm: Clip each token's gradient; None for no clipping.
        residual_norm: A residual and a LayerNorm around the memory MLP.
        gate_groups: Groups of a linear memory's channels with gates of their own.
        lookahead_values: Store each value under the key of the token before.
        implicit_step: Solve the steps of a linear memory instead of following their gradients.
        objective_window: Tokens whose losses each step of the memory descends.
        checkpoint_chunks: Recompute the memory in the backward pass, so many chunks at a time; None keeps everything.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        backend: Implementation of the memory, see ``memzoo.layers.ops.neural_memory``.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, does not divide another, or an option is unknown.

    Reference:
        Behrouz et al., arXiv 2501.00663, sections 3 and 4.3.
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
        memory_depth: int = 2,
        memory_expansion: float = 2.0,
        chunk_size: int = 64,
        activation: str = "silu",
        momentum: bool = True,
        forgetting: bool = True,
        conv_width: int | None = 4,
        max_learning_rate: float | None = None,
        loss_scale: float = 1.0,
        read: str = "post",
        output_gate: bool = True,
        output_norm: bool = True,
        decay_to_init: bool = False,
        max_gradient_norm: float | None = None,
        residual_norm: bool = False,
        gate_groups: int = 1,
        lookahead_values: bool = False,
        implicit_step: bool = False,
        objective_window: int = 1,
        checkpoint_chunks: int | None = None,
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        backend: str = "auto",
    ) -> None:
        def memory() -> NeuralMemory:
            return NeuralMemory(
                dim,
                num_heads=num_heads,
                head_dim=head_dim,
                memory_depth=memory_depth,
                memory_expansion=memory_expansion,
                chunk_size=chunk_size,
                activation=activation,
                momentum=momentum,
                forgetting=forgetting,
                conv_width=conv_width,
                max_learning_rate=max_learning_rate,
                loss_scale=loss_scale,
                read=read,
                output_gate=output_gate,
                output_norm=output_norm,
                decay_to_init=decay_to_init,
                max_gradient_norm=max_gradient_norm,
                residual_norm=residual_norm,
                gate_groups=gate_groups,
                lookahead_values=lookahead_values,
                implicit_step=implicit_step,
                objective_window=objective_window,
                checkpoint_chunks=checkpoint_chunks,
                backend=backend,
            )

        check_positive("depth", depth)
        super().__init__(
            vocab_size,
            dim,
            [Block(memory(), SwiGLU(dim, hidden_dim=hidden_dim)) for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )


@register_model(LMM_CARD)
def titans_lmm_tiny(**overrides: Any) -> TitansLMM:
    """1.1M parameters on bytes, as many as `transformer_tiny`; trains on two CPU cores in minutes.

    Forgets towards its initial weights and limits the memory's gradients: without the first its memory fades to nothing
    beyond the trained length, without the second it can diverge there.
    """
    return TitansLMM(**dict(vocab_size=256, dim=128, depth=4) | STABLE_MEMORY | overrides)


@register_model(LMM_CARD)
def titans_lmm_170m(**overrides: Any) -> TitansLMM:
    """12 blocks of width 768, 32k tokens: the smallest of the paper's sizes (119M parameters, embeddings tied)."""
    return TitansLMM(**SIZES["170m"] | overrides)


@register_model(LMM_CARD)
def titans_lmm_340m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1024, 32k tokens: 369M parameters."""
    return TitansLMM(**SIZES["340m"] | overrides)


@register_model(LMM_CARD)
def titans_lmm_760m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1536, 32k tokens: 798M parameters."""
    return TitansLMM(**SIZES["760m"] | overrides)


ONLINE_CARD = replace(
    LMM_CARD,
    name="Titans linear, online",
    title="Titans: a matrix as memory, every gradient taken where the last token's step ended",
    memory="a matrix per sequence, block and head: the delta rule with momentum and forgetting",
    choices={
        **LMM_CARD.choices,
        "memory_depth": "1: the memory is a matrix",
        "chunk_size": "1: no two tokens share a gradient base; 32 tokens are solved at once, exactly but for rounding",
        "decay_to_init": "off: forgetting decays to zero, which is no dead point of a matrix",
        "max_gradient_norm": "off: a limit would need the errors one after the other",
        "max_learning_rate": "1: for keys of unit length any step up to (2 - alpha) (1 + eta) is stable",
    },
    claims=(),
)
ONLINE = dict(memory_depth=1, chunk_size=1)


@register_model(ONLINE_CARD)
def titans_linear_online_tiny(**overrides: Any) -> TitansLMM:
    """1.1M parameters on bytes, as many as the other tiny models."""
    return TitansLMM(**dict(vocab_size=256, dim=128, depth=4, hidden_dim=448) | ONLINE | overrides)


@register_model(ONLINE_CARD)
def titans_linear_online_170m(**overrides: Any) -> TitansLMM:
    """12 blocks of width 768, 32k tokens: 118M parameters."""
    return TitansLMM(**SIZES["170m"] | ONLINE | overrides)


@register_model(ONLINE_CARD)
def titans_linear_online_340m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1024, 32k tokens: 365M parameters."""
    return TitansLMM(**SIZES["340m"] | ONLINE | overrides)


@register_model(ONLINE_CARD)
def titans_linear_online_760m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1536, 32k tokens: 791M parameters."""
    return TitansLMM(**SIZES["760m"] | ONLINE | overrides)
