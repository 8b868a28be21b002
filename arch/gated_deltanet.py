"""Gated DeltaNet: the baseline with one matrix memory a head (arXiv 2412.06464)."""

from typing import Any

from memzoo.arch.block import Block
from memzoo.arch.card import Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.errors import check_positive
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.gated_deltanet import GatedDeltaNet

CARD = ModelCard(
    name="Gated DeltaNet",
    title="Gated Delta Networks: a matrix memory that the delta rule corrects and a gate clears",
    paper="arXiv 2412.06464",
    memory="a matrix per sequence, block and head",
    written="every token, by the gated delta rule",
    read="every token, right after it was written",
    fidelity=Fidelity.DESIGN,
    choices={
        "num_heads": "None: heads of head_dim",
        "head_dim": "64",
        "value_dim": "None: head_dim; the paper's models have twice that",
        "num_value_heads": "None: num_heads",
        "negative_eigenvalues": "off: beta in (0, 1)",
        "conv_width": "4, with SiLU, over queries, keys and values",
        "output_gate": "on: what is read is normalised, then multiplied by SiLU of a projection",
        "norm_eps": "1e-6",
        "chunk_size": "64; changes the speed alone",
        "hidden_dim": "SwiGLU of 8/3 dim, rounded up to a multiple of 64",
        "tie_embeddings": "on",
    },
)


class GatedDeltaNetLM(CausalLM):
    """Blocks of Gated DeltaNet and SwiGLU: the one-memory model to compare a mixture of memories with.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Heads of queries and keys; None for ``head_dim`` channels each.
        head_dim: Channels of a query or key; 64 when neither it nor ``num_heads`` is given.
        value_dim: Channels of a value; None for ``head_dim``.
        num_value_heads: Memories; None for ``num_heads``.
        negative_eigenvalues: Double beta, so that a write may turn a direction around.
        conv_width: Of the causal convolution on queries, keys and values; None for none.
        output_gate: Gate what is read.
        norm_eps: Of the norm of what is read.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        backend: Of the recurrence, see ``GatedDeltaNet``.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, or does not divide another.

    Reference:
        Yang, Kautz and Hatamizadeh, arXiv 2412.06464, section 3.4.
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
        value_dim: int | None = None,
        num_value_heads: int | None = None,
        negative_eigenvalues: bool = False,
        conv_width: int | None = 4,
        output_gate: bool = True,
        norm_eps: float = 1e-6,
        chunk_size: int = 64,
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        backend: str = "auto",
    ) -> None:
        def memory() -> GatedDeltaNet:
            return GatedDeltaNet(
                dim,
                num_heads=num_heads,
                head_dim=head_dim,
                value_dim=value_dim,
                num_value_heads=num_value_heads,
                negative_eigenvalues=negative_eigenvalues,
                conv_width=conv_width,
                output_gate=output_gate,
                norm_eps=norm_eps,
                chunk_size=chunk_size,
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


@register_model(CARD)
def gated_deltanet_tiny(**overrides: Any) -> GatedDeltaNetLM:
    """1.1M parameters on bytes, as many as `mom_tiny`; trains on two CPU cores in minutes."""
    small = dict(vocab_size=256, dim=128, depth=4, num_heads=2, head_dim=32, hidden_dim=576)
    return GatedDeltaNetLM(**small | overrides)


@register_model(CARD)
def gated_deltanet_340m(**overrides: Any) -> GatedDeltaNetLM:
    """24 blocks of width 1024, 32k tokens: `mom_340m` with one memory, 310M parameters."""
    sizes = dict(vocab_size=32000, dim=1024, depth=24, num_heads=4, head_dim=256, hidden_dim=2048)
    return GatedDeltaNetLM(**sizes | overrides)
