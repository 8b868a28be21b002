"""Mamba and Mamba-2 as language models: blocks of a state space, and nothing else (arXiv 2312.00752, 2405.21060)."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import INITIAL_STD, CausalLM
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.mamba import Mamba
from memzoo.layers.mamba2 import Mamba2
from memzoo.layers.mamba_checkpoint import from_mamba_checkpoint
from memzoo.layers.norm import RMSNorm

CHOICES = {
    "ssm": "'mamba' or 'mamba2', by the name of the model",
    "state_dim": "16 by default; 128 in Mamba-2",
    "conv_width": "4, with SiLU",
    "expansion": "2",
    "step_range": "[0.001, 0.1], from which the first steps are drawn, log-uniformly",
    "step_floor": "1e-4",
    "inner_dim": "Mamba: expansion times dim",
    "step_rank": "Mamba: dim / 16, rounded up, by default",
    "step_scale": "Mamba: 1",
    "projection_norm": "Mamba: off; Jamba has it",
    "num_heads": "Mamba-2: expansion times dim / head_dim",
    "head_dim": "Mamba-2: 64",
    "num_groups": "Mamba-2: 1, all heads share what is written with and read with",
    "step_limit": "Mamba-2: none",
    "chunk_size": "32 by default; 64 in Mamba-2; changes the speed alone",
    "norm_eps": "1e-5, as the released models",
    "tie_embeddings": "on, as the released models",
    "initial weights": "as the official code: embeddings with a standard deviation of 0.02, output projections over "
    "the square root of depth, all other projections as torch draws them",
}
MAMBA_CARD = ModelCard(
    name="Mamba",
    title="Mamba: selective state spaces",
    paper="arXiv 2312.00752",
    memory="state_dim numbers per sequence, block and channel",
    written="every token, with a step of its own for every channel; a long step also forgets",
    read="every token, right after it was written",
    fidelity=Fidelity.EXACT,
    choices=CHOICES,
    claims=(Claim("at equal size the loss of a strong Transformer, with a state that does not grow"),),
)
MAMBA2_CARD = ModelCard(
    name="Mamba-2",
    title="Mamba-2: state-space duality",
    paper="arXiv 2405.21060",
    memory="a matrix per sequence, block and head",
    written="every token, with a step of its own for every head; a long step also forgets",
    read="every token, right after it was written",
    fidelity=Fidelity.EXACT,
    choices=CHOICES,
    claims=(Claim("better than Mamba at equal size, with an eight times larger state, and faster to train"),),
)
LAYERS: dict[str, type[Mamba] | type[Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}


class MambaLM(CausalLM):
    """Blocks of a state space without feed-forward: ``x + Mamba(norm x)``.

    Weights start as in the official code: embeddings with a standard deviation of 0.02, what writes to the residual
    stream over ``sqrt(depth)``, all else as its layer draws it.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        ssm: ``"mamba"`` or ``"mamba2"``: the layer. What follows up to ``chunk_size`` are its options; None for the
            layer's own default, and for those that it does not have.
        state_dim: Numbers that a channel remembers.
        conv_width: Taps of the convolution.
        expansion: Channels for each of ``dim``.
        step_range: Between which the first steps are drawn.
        step_floor: What they are raised to if they are below.
        inner_dim: Channels; of Mamba alone, as the next three.
        step_rank: Rank of the projection to steps.
        step_scale: Factor of its first weights.
        projection_norm: Normalise what steps, writes and reads are made of, as Jamba does.
        num_heads: Heads; of Mamba-2 alone, as the next three.
        head_dim: Channels of a head.
        num_groups: Groups of heads that share what they write with and read with.
        step_limit: Between which all steps are kept.
        chunk_size: Tokens that the recurrence takes at once; changes its speed only.
        norm_eps: Of all norms but those of ``projection_norm``.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        backend: Of the recurrence, see ``Mamba`` and ``Mamba2``.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive or does not divide another, ``ssm`` is unknown, or an option is the other
            layer's.

    Reference:
        Gu and Dao, arXiv 2312.00752, section 3.4; Dao and Gu, arXiv 2405.21060, section 7.
    """

    @record_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        ssm: str = "mamba",
        state_dim: int | None = None,
        conv_width: int | None = None,
        expansion: int | None = None,
        step_range: Sequence[float] | None = None,
        step_floor: float | None = None,
        inner_dim: int | None = None,
        step_rank: int | None = None,
        step_scale: float | None = None,
        projection_norm: bool | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        num_groups: int | None = None,
        step_limit: Sequence[float] | None = None,
        chunk_size: int | None = None,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        backend: str = "auto",
    ) -> None:
        options = _options_of(
            ssm,
            state_dim=state_dim,
            conv_width=conv_width,
            expansion=expansion,
            step_range=step_range,
            step_floor=step_floor,
            inner_dim=inner_dim,
            step_rank=step_rank,
            step_scale=step_scale,
            projection_norm=projection_norm,
            num_heads=num_heads,
            head_dim=head_dim,
            num_groups=num_groups,
            step_limit=step_limit,
            chunk_size=chunk_size,
        )
        if ssm == "mamba2":
            options["norm_eps"] = norm_eps
        check_positive("depth", depth)
        norm = partial(RMSNorm, eps=norm_eps)
        super().__init__(
            vocab_size,
            dim,
            [Block(LAYERS[ssm](dim, backend=backend, **options), norm=norm) for _ in range(depth)],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
            norm=norm,
        )

    def _draw_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        with torch.no_grad():
            for mixer in self.mixers():
                mixer.out.weight.div_(len(self.blocks) ** 0.5)

    def mixers(self) -> list[Mamba | Mamba2]:
        """Return the state spaces, block by block."""
        return [cast(Mamba | Mamba2, block.mixer) for block in cast(Iterable[Block], self.blocks)]

    def load_mamba_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of mamba-ssm's ``MambaLMHeadModel`` or of transformers' ``Mamba[2]ForCausalLM``.

        Args:
            state_dict: Of a model with these options, names and shapes as in either; with tied embeddings
                ``lm_head.weight`` may be missing. ``vocab_size`` is that of the weights, which may be padded.

        Raises:
            ValueError: Names or shapes are not those of a model with these options. Nothing is loaded then.
        """
        tied, rest, own = self.head is None, dict(state_dict), dict[str, Tensor]()
        for index, mixer in enumerate(self.mixers()):
            prefix = f"backbone.layers.{index}.mixer."
            layer = {name.removeprefix(prefix): rest.pop(name) for name in state_dict if name.startswith(prefix)}
            own |= {f"blocks.{index}.mixer.{name}": x for name, x in from_mamba_checkpoint(mixer, layer).items()}
        head = rest.pop("lm_head.weight", None) if tied else None
        names = _names(len(self.blocks), tied=tied, plural="backbone.embeddings.weight" in rest)
        missing, extra = sorted(names.keys() - rest.keys()), sorted(rest.keys() - names.keys())
        if missing or extra:
            raise ValueError(
                f"state_dict is not that of a {self.config.get('ssm', 'mamba')} model with these options: missing "
                f"{missing[:3]}, unknown {extra[:3]}; build the model as the checkpoint's config says"
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


def _options_of(ssm: str, **options: Any) -> dict[str, Any]:
    """Return the options that are given, all of which must be the layer's."""
    check_choice("ssm", ssm, LAYERS)
    known = inspect.signature(LAYERS[ssm]).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}={value!r} is no option of ssm={ssm!r}; leave it out, or use the other ssm")
    return given


def _names(depth: int, *, tied: bool, plural: bool) -> dict[str, str]:
    """Return the names outside the state spaces: the checkpoint's -> this package's; only the embeddings' differ."""
    names = {f"backbone.embedding{'s' * plural}.weight": "embedding.weight", "backbone.norm_f.weight": "norm.weight"}
    if not tied:
        names["lm_head.weight"] = "head.weight"
    names |= {f"backbone.layers.{index}.norm.weight": f"blocks.{index}.mixer_norm.weight" for index in range(depth)}
    return names


def _build(overrides: dict[str, Any], **sizes: Any) -> MambaLM:
    return MambaLM(**sizes | overrides)


@register_model(MAMBA_CARD)
def mamba_tiny(**overrides: Any) -> MambaLM:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    return _build(overrides, vocab_size=256, dim=192, depth=4, step_rank=20, chunk_size=16)


@register_model(MAMBA_CARD)
def mamba_130m(**overrides: Any) -> MambaLM:
    """24 blocks of width 768, as the released model of that name: 129M parameters."""
    return _build(overrides, vocab_size=50280, dim=768, depth=24)


@register_model(MAMBA_CARD)
def mamba_370m(**overrides: Any) -> MambaLM:
    """48 blocks of width 1024, as the released model of that name: 372M parameters."""
    return _build(overrides, vocab_size=50280, dim=1024, depth=48)


@register_model(MAMBA_CARD)
def mamba_790m(**overrides: Any) -> MambaLM:
    """48 blocks of width 1536, as the released model of that name: 793M parameters."""
    return _build(overrides, vocab_size=50280, dim=1536, depth=48)


@register_model(MAMBA_CARD)
def mamba_1b4(**overrides: Any) -> MambaLM:
    """48 blocks of width 2048, as the released mamba-1.4b: 1.37B parameters."""
    return _build(overrides, vocab_size=50280, dim=2048, depth=48)


@register_model(MAMBA_CARD)
def mamba_2b8(**overrides: Any) -> MambaLM:
    """64 blocks of width 2560, as the released mamba-2.8b: 2.77B parameters."""
    return _build(overrides, vocab_size=50280, dim=2560, depth=64)


@register_model(MAMBA2_CARD)
def mamba2_tiny(**overrides: Any) -> MambaLM:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    return _build(overrides, vocab_size=256, dim=192, depth=4, ssm="mamba2", state_dim=80, chunk_size=64)


@register_model(MAMBA2_CARD)
def mamba2_130m(**overrides: Any) -> MambaLM:
    """24 blocks of width 768, as the released model of that name: 129M parameters."""
    return _build(overrides, vocab_size=50288, dim=768, depth=24, ssm="mamba2")


@register_model(MAMBA2_CARD)
def mamba2_370m(**overrides: Any) -> MambaLM:
    """48 blocks of width 1024, as the released model of that name: 368M parameters."""
    return _build(overrides, vocab_size=50288, dim=1024, depth=48, ssm="mamba2")


@register_model(MAMBA2_CARD)
def mamba2_780m(**overrides: Any) -> MambaLM:
    """48 blocks of width 1536, as the released model of that name: 780M parameters."""
    return _build(overrides, vocab_size=50288, dim=1536, depth=48, ssm="mamba2")


@register_model(MAMBA2_CARD)
def mamba2_1b3(**overrides: Any) -> MambaLM:
    """48 blocks of width 2048, as the released mamba2-1.3b: 1.34B parameters."""
    return _build(overrides, vocab_size=50288, dim=2048, depth=48, ssm="mamba2")


@register_model(MAMBA2_CARD)
def mamba2_2b7(**overrides: Any) -> MambaLM:
    """64 blocks of width 2560, as the released mamba2-2.7b: 2.70B parameters."""
    return _build(overrides, vocab_size=50288, dim=2560, depth=64, ssm="mamba2")
