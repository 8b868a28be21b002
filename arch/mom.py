"""MoM: blocks of Mixture-of-Memories and SwiGLU (arXiv 2502.13685)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM
from memzoo.arch.hybrid import hybrid_mixers
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.fla_checkpoint import mixture_from_fla
from memzoo.layers.mixture_of_memories import MixtureOfMemories

CARD = ModelCard(
    name="MoM",
    title="Mixture-of-Memories: several matrix memories, of which every token uses a few",
    paper="arXiv 2502.13685",
    memory="num_memories matrices per sequence, block and head, and a shared one",
    written="every token, into its top_k memories and the shared one, by the gated delta rule",
    read="every token, right after it was written, from the same memories, weighted by the router",
    fidelity=Fidelity.DESIGN,
    choices={
        "num_memories": "4, as the released models",
        "top_k": "2",
        "shared": "on: its read is added with weight 1",
        "rule": "Gated DeltaNet; its write strength also scales what is erased, which the paper's table leaves out",
        "rule_options": "none",
        "num_heads": "None: heads of head_dim; the released models have 4",
        "head_dim": "64; 256 in the released models",
        "value_dim": "None: head_dim",
        "num_value_heads": "None: num_heads",
        "renormalize": "on: the weights of a token's memories sum to 1",
        "conv": "'bucket': each memory convolves its own tokens, as the released code; 'input' convolves before "
        "routing, so that all memories are asked with one query, as in the paper's equations",
        "conv_width": "4, with SiLU",
        "shared parameters": "a block's memories share queries, convolution, decay_log and step_bias; keys, values "
        "and gates are each memory's own, as in the released code",
        "balance": "'layer': the Switch loss of every layer, averaged; the released code pools the tokens of all "
        "layers, or takes renormalised weights sequence by sequence",
        "balance_weight": "0.01, as the released configurations; the paper's ablation is best at 0.001",
        "tie_key_values": "off",
        "output_gate": "on: what is read is normalised per head, then multiplied by SiLU of a projection",
        "norm_eps": "1e-6, as the released models",
        "chunk_size": "64; changes the speed alone",
        "attention_layers": "none; in the paper's hybrid one in eight",
        "attention": "none: heads of 64 with rotary positions, where there is attention",
        "hidden_dim": "SwiGLU of 8/3 dim, rounded up to a multiple of 64; the released models' in the named sizes",
        "tie_embeddings": "on, as the released 340M configuration; the paper counts parameters untied",
    },
    claims=(
        Claim("several small memories recall more than one wide one of equal activated size", recipe="mom/mqar_tiny"),
        Claim("340M parameters, 15B tokens: recall 28.16, Gated DeltaNet 24.78", recipe="mom/340m"),
    ),
    routed=True,
    skips={"it_compiles_as_one_graph": "how many tokens a memory gets decides the shapes of its products"},
)


class MoM(CausalLM):
    """Blocks of memories behind a router and SwiGLU: ``x + MixtureOfMemories(norm x)``, ``x + SwiGLU(norm x)``.

    Training adds ``trace.losses["balance"]`` to the loss, as ``CausalLMModule`` does.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_memories: Memories of a block, the shared one not counted.
        top_k: Memories a token goes to.
        shared: Have a shared memory.
        rule: How a memory is written, see ``MixtureOfMemories``.
        rule_options: Arguments of the rule that only it has.
        num_heads: Heads of queries and keys; None for ``head_dim`` channels each.
        head_dim: Channels of a query or key; 64 when neither it nor ``num_heads`` is given.
        value_dim: Channels of a value; None for ``head_dim``.
        num_value_heads: Matrices of a memory; None for ``num_heads``.
        renormalize: Let the weights of a token's memories sum to 1.
        conv: ``"bucket"``, ``"input"`` or None: what the short convolution sees.
        conv_width: Its width.
        balance: Auxiliary loss: ``"layer"``, ``"pooled"``, ``"layer_sequence"`` or None.
        balance_weight: Its factor.
        tie_key_values: Let all memories of a block share one projection to keys, values and gates.
        output_gate: Gate what is read.
        norm_eps: Of the norm of what is read.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        attention_layers: Blocks, counted from 0, that have softmax attention in place of memories: a hybrid, whose
            state grows with the context. None for none.
        attention: Keyword options of ``memzoo.layers.Attention`` there, such as ``{"num_heads": 16}``.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        backend: Of the recurrence, see ``MixtureOfMemories``.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive, does not divide another, an option is unknown, ``attention_layers`` names
            no block of the model, or there is ``attention`` for none.

    Reference:
        Du et al., arXiv 2502.13685, section 3 and appendix F.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        rule: str = "gated_deltanet",
        rule_options: Mapping[str, Any] | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_value_heads: int | None = None,
        renormalize: bool = True,
        conv: str | None = "bucket",
        conv_width: int = 4,
        balance: str | None = "layer",
        balance_weight: float = 0.01,
        tie_key_values: bool = False,
        output_gate: bool = True,
        norm_eps: float = 1e-6,
        chunk_size: int = 64,
        attention_layers: Sequence[int] | None = None,
        attention: Mapping[str, Any] | None = None,
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        backend: str = "auto",
    ) -> None:
        def memories() -> MixtureOfMemories:
            return MixtureOfMemories(
                dim,
                num_memories=num_memories,
                top_k=top_k,
                shared=shared,
                rule=rule,
                rule_options=dict(rule_options or {}),
                num_heads=num_heads,
                head_dim=head_dim,
                value_dim=value_dim,
                num_value_heads=num_value_heads,
                renormalize=renormalize,
                conv=conv,
                conv_width=conv_width,
                balance=balance,
                balance_weight=balance_weight,
                tie_key_values=tie_key_values,
                output_gate=output_gate,
                norm_eps=norm_eps,
                chunk_size=chunk_size,
                backend=backend,
            )

        mixers = hybrid_mixers(depth, dim, memories, attention_layers=attention_layers, attention=attention)
        super().__init__(
            vocab_size,
            dim,
            [Block(mixer, SwiGLU(dim, hidden_dim=hidden_dim)) for mixer in mixers],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )

    def mixtures(self) -> list[MixtureOfMemories]:
        """Return the mixtures of memories, block by block; a hybrid's attention is left out."""
        mixers = (block.mixer for block in cast(Iterable[Block], self.blocks))
        return [mixer for mixer in mixers if isinstance(mixer, MixtureOfMemories)]

    def num_activated_parameters(self) -> int:
        """Return the number of parameters that a token meets: all but those of the memories it does not go to."""
        idle = 0
        for mixer in self.mixtures():
            if not mixer.tie_key_values:
                own = (mixer.key_value[0], *(mixer.gates or ())[:1])
                parameters = sum(parameter.numel() for part in own for parameter in part.parameters())
                idle += (mixer.num_memories - mixer.top_k) * parameters
        return self.num_parameters() - idle

    def load_fla_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of flash-linear-attention's ``MomForCausalLM``, names and shapes as there.

        Args:
            state_dict: Of a model with these options; with tied embeddings ``lm_head.weight`` may be missing.

        Raises:
            ValueError: The model has options fla lacks, or names or shapes are not those of a model with these options.
                Nothing is loaded then.
        """
        mixtures, tied = self.mixtures(), self.head is None
        if len(mixtures) < len(self.blocks):
            raise ValueError(
                f"attention_layers={self.config.get('attention_layers')} exist in no fla checkpoint of MoM; build the "
                f"model without"
            )
        rest, own = dict(state_dict), dict[str, Tensor]()
        for index, mixer in enumerate(mixtures):
            prefix = f"model.layers.{index}.attn."
            layer = {name.removeprefix(prefix): rest.pop(name) for name in state_dict if name.startswith(prefix)}
            own |= {f"blocks.{index}.mixer.{name}": value for name, value in mixture_from_fla(mixer, layer).items()}
        head = rest.pop("lm_head.weight", None) if tied else None
        names = fla_names(len(mixtures), tied=tied)
        missing, extra = sorted(names.keys() - rest.keys()), sorted(rest.keys() - names.keys())
        if missing or extra:
            raise ValueError(
                f"state_dict is not that of an fla model with these options: missing {missing[:3]}, unknown "
                f"{extra[:3]}; build the model as the checkpoint's config says"
            )
        own |= {names[name]: value for name, value in rest.items()}
        for name, parameter in self.state_dict().items():
            if own[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(own[name].shape)} in the checkpoint, {tuple(parameter.shape)} in the "
                    f"model; build the model as the checkpoint's config says"
                )
        if head is not None and not torch.equal(head, own["embedding.weight"]):
            raise ValueError("lm_head.weight is not the embeddings; build the model with tie_embeddings=False")
        self.load_state_dict(own)


def fla_names(depth: int, *, tied: bool) -> dict[str, str]:
    """Return the names outside the mixtures of memories: fla's -> this package's."""
    names = {"model.embeddings.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    if not tied:
        names["lm_head.weight"] = "head.weight"
    parts = {"attn_norm": "mixer_norm", "mlp_norm": "ffn_norm"}
    parts |= {f"mlp.{part}_proj": f"ffn.{part}" for part in ("gate", "up", "down")}
    for index in range(depth):
        names |= {f"model.layers.{index}.{a}.weight": f"blocks.{index}.{b}.weight" for a, b in parts.items()}
    return names


@register_model(CARD)
def mom_tiny(**overrides: Any) -> MoM:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    small = dict(vocab_size=256, dim=128, depth=4, num_heads=2, head_dim=32, hidden_dim=400)
    return MoM(**small | overrides)


@register_model(CARD)
def mom_340m(**overrides: Any) -> MoM:
    """24 blocks of width 1024, 32k tokens: 512M parameters; of 545M with a head of its own a token uses 444M."""
    sizes = dict(vocab_size=32000, dim=1024, depth=24, num_heads=4, head_dim=256, hidden_dim=2048)
    return MoM(**sizes | overrides)


@register_model(CARD)
def mom_1b3(**overrides: Any) -> MoM:
    """24 blocks of width 2048, 32k tokens: 1.55B parameters, the paper's 1.3B."""
    sizes = dict(vocab_size=32000, dim=2048, depth=24, num_heads=4, head_dim=256, hidden_dim=5632)
    return MoM(**sizes | overrides)
