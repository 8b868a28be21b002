"""Titans: neural long-term memory as the only sequence mixer (LMM), arXiv 2501.00663."""

from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
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
        "memory_depth": "2 layers; the paper tries 1 to 4",
        "memory_expansion": "hidden width of 2 head_dim; plain MLP, no bias, no norm, no residual",
        "activation": "SiLU between the memory's layers",
        "chunk_size": "64 tokens share the weights their gradients are taken at; part of the model",
        "conv_width": "causal depthwise convolution of width 4 after the q, k and v projections; None for none",
        "momentum": "eta = sigmoid of a token's linear gate, a scalar per head, bias 0; False is the paper's ablation",
        "forgetting": "alpha = sigmoid of a token's linear gate, a scalar per head, bias -4; False is the ablation",
        "max_learning_rate": "theta = max_learning_rate * sigmoid of a linear gate; None for chunk_size ** -0.5",
        "loss_scale": "1: gradients of ‖M(k) - v‖² / 2; 2 is the main text's loss",
        "read": "'post', after the token's own write; 'pre' reads before it",
        "output_norm": "RMSNorm over the read-outs of all heads",
        "output_gate": "the read-out is multiplied by SiLU of a linear gate, before the output projection",
        "initial weights": "learned per head, variance 1 / fan-in (zero at a depth of 1); initial momentum zero",
        "decay_to_init": "off: forgetting decays to zero, where a deep memory is dead; on in titans_lmm_tiny",
        "max_gradient_norm": "off; 1.0 in titans_lmm_tiny, which bounds every step of the memory",
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
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass.
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
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool = False,
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
    stable = dict(decay_to_init=True, max_gradient_norm=1.0)
    return TitansLMM(**dict(vocab_size=256, dim=128, depth=4) | stable | overrides)


@register_model(LMM_CARD)
def titans_lmm_170m(**overrides: Any) -> TitansLMM:
    """12 blocks of width 768, 32k tokens: the smallest of the paper's sizes (119M parameters, embeddings tied)."""
    return TitansLMM(**dict(vocab_size=32000, dim=768, depth=12) | overrides)


@register_model(LMM_CARD)
def titans_lmm_340m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1024, 32k tokens: 369M parameters."""
    return TitansLMM(**dict(vocab_size=32000, dim=1024, depth=24) | overrides)


@register_model(LMM_CARD)
def titans_lmm_760m(**overrides: Any) -> TitansLMM:
    """24 blocks of width 1536, 32k tokens: 798M parameters."""
    return TitansLMM(**dict(vocab_size=32000, dim=1536, depth=24) | overrides)
