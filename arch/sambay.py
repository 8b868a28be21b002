"""SambaY: a decoder whose second half reads memories and keys that its first half computed (arXiv 2507.06607)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from memzoo.arch.block import Block, ResidualBlock
from memzoo.arch.causal_lm import INITIAL_STD, CausalLM, CausalLMState, last_token
from memzoo.arch.registry import record_config
from memzoo.arch.sambay_blocks import ReadingBlock, SharingBlock
from memzoo.arch.sambay_layers import NORMALISED_MEMORIES, Kind, LayerOptions, layer_map
from memzoo.layers.cross_attention import SharedKeys
from memzoo.layers.errors import check_choice, check_positive, check_tokens
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.gated_memory_unit import GatedMemoryUnit
from memzoo.layers.norm import RMSNorm
from memzoo.layers.state import MixerState
from memzoo.layers.trace import Trace

NORMS: dict[str, Callable[..., nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}
Source = Literal["ssm", "attention", "mlp"]
SOURCES = get_args(Source)
BACKENDS = ("auto", "torch")


class SambaY(CausalLM):
    """A self-decoder of state-space layers and windows, one layer of full attention, and a cross-decoder that has
    neither keys nor states of its own.

    With L = ``depth``, layers counted from 0:

    =================== ==================================================================================
    layers              mix by
    =================== ==================================================================================
    0 to L/2            a state-space layer (even) or sliding-window attention (odd); the last is the memory
    L/2 + 1             full attention; its keys and values are shared
    L/2 + 2 to L - 1    a Gated Memory Unit that reads the memory (even), or queries for the shared keys (odd)
    =================== ==================================================================================

    Every layer is followed by SwiGLU. There are no positions unless ``rotary_base`` is given. Only layers 0 to L/2 + 1
    carry a state, and of those only full attention one that grows.

    Since nothing after layer L/2 carries a state but keys and values, ``prefill`` runs the last L/2 - 2 layers, and of
    layer L/2 + 1 the queries and the feed-forward, for each row's last token alone. So it is linear in the prompt, and
    leaves out 3/8 of the layers at depth 8, towards half of them. Logits and state are those of ``forward``.

    What a layer draws its first weights from depends on the seed, its place, and what embedding and head draw first. So
    two variants with one vocabulary, width and ``tie_embeddings``, built from one seed, have equal weights wherever
    they have equal layers, and all their feed-forwards.

    Args:
        vocab_size: Number of token ids.
        depth: Number of layers, a multiple of 4; with a cross-decoder at least 8.
        dim: Width of the residual stream; None for ``aspect_ratio * depth``.
        aspect_ratio: Width over depth.
        num_heads: Query heads; None for ``depth``.
        num_kv_heads: Heads of keys and values; None for ``depth / 4``. Even for differential attention.
        head_dim: Width of a head; heads together need not be as wide as ``dim``.
        window: Keys that a query of sliding-window attention sees, its own among them.
        ssm: State-space layer: ``"mamba"``, ``"mamba2"`` or ``"gated_deltanet"``.
        ssm_options: Keyword options of that layer in place of the authors' sizes, such as ``{"state_dim": 8}``.
        self_pattern: Kinds that the self-decoder repeats: ``"samba"`` (state space, window), ``"ssm"``, ``"window"``,
            ``"attention"`` or ``"local_global"`` (three windows, full attention).
        cross: Kinds that the cross-decoder repeats: ``"gmu+attention"``, ``"attention"`` or ``"gmu"``. None is no
            cross-decoder: the self-decoder's pattern goes over all layers.
        gmu_source: What Gated Memory Units read: the ``"ssm"`` of layer L/2, or of layer L/2 + 1 the heads' reads of
            its ``"attention"`` or the un-activated half of its ``"mlp"``.
        gmu_norm: Normalise the gated memory; ``"auto"`` does for a memory of Mamba-2 or Gated DeltaNet.
        differential: Differential attention in all layers of attention.
        rotary_base: Base of rotary positions in all layers of attention; None for no positions.
        attention_scale: Factor of the scores; None for ``head_dim ** -0.5``. For muP, ``sqrt(base head_dim) /
            head_dim``.
        attention_bias: Biases in the projections of attention.
        hidden_dim: Inner width of SwiGLU; None for ``4 * dim``.
        norm: ``"rmsnorm"`` or ``"layernorm"``.
        norm_eps: Of all norms on the residual stream, and of those within a state-space layer and a Gated Memory Unit.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.
        backend: ``"auto"``, or ``"torch"`` for no other library in any layer.

    Attributes:
        kinds: What each layer mixes by, as ``layer_map`` gives them.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: ``depth`` is not a multiple of 4, or is 4 with a cross-decoder; an option is unknown, a size
            does not divide another, or heads to be paired are odd in number; ``gmu_source`` is given where there are no
            Gated Memory Units, or they are to read a state-space layer and layer L/2 is none.

    Reference:
        Ren et al., arXiv 2507.06607; microsoft/ArchScale.
    """

    block_class = ResidualBlock

    @record_config
    def __init__(
        self,
        vocab_size: int,
        depth: int,
        dim: int | None = None,
        *,
        aspect_ratio: int = 124,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int = 128,
        window: int = 128,
        ssm: str = "mamba",
        ssm_options: Mapping[str, Any] | None = None,
        self_pattern: str = "samba",
        cross: str | None = "gmu+attention",
        gmu_source: str = "ssm",
        gmu_norm: bool | str = "auto",
        differential: bool = False,
        rotary_base: float | None = None,
        attention_scale: float | None = None,
        attention_bias: bool = False,
        hidden_dim: int | None = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
        backend: str = "auto",
    ) -> None:
        kinds = layer_map(depth, self_pattern, cross)
        check_choice("gmu_source", gmu_source, SOURCES)
        if gmu_source != "ssm" and "gmu" not in kinds:
            raise ValueError(
                f"gmu_source={gmu_source!r}, but with cross={cross!r} there are no Gated Memory Units; leave it out, "
                f"or use cross='gmu+attention' or 'gmu'"
            )
        check_choice("gmu_norm", gmu_norm, ("auto", True, False))
        check_choice("norm", norm, NORMS)
        check_choice("backend", backend, BACKENDS)
        check_positive("aspect_ratio", aspect_ratio)
        dim = aspect_ratio * depth if dim is None else dim
        options = LayerOptions(
            dim=dim,
            num_heads=depth if num_heads is None else num_heads,
            num_kv_heads=depth // 4 if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            window=window,
            ssm=ssm,
            ssm_options=ssm_options or {},
            differential=differential,
            rotary_base=rotary_base,
            attention_scale=attention_scale,
            attention_bias=attention_bias,
            norm_eps=norm_eps,
            backend=backend,
        )
        if gmu_norm == "auto":
            gmu_norm = gmu_source == "ssm" and ssm in NORMALISED_MEMORIES
        make_norm = partial(NORMS[norm], eps=norm_eps)
        sharing = None if cross is None else depth // 2 + 1
        source = cast(Source, gmu_source) if "gmu" in kinds else None
        super().__init__(
            vocab_size,
            dim,
            _build_blocks(
                kinds,
                options,
                sharing=sharing,
                source=source,
                gmu_norm=bool(gmu_norm),
                hidden_dim=4 * dim if hidden_dim is None else hidden_dim,
                norm=make_norm,
            ),
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
            norm=make_norm,
        )
        self.kinds = kinds
        self._has_cross_decoder = sharing is not None
        self._memory_layer = depth // 2 if source == "ssm" else None

    def _draw_layer(self, layer: nn.Module, residual_std: float) -> None:
        with _own_stream():
            super()._draw_layer(layer, residual_std)
            for name in ("query", "key", "value"):  # projections as all others, whether attention has biases or not
                projection = getattr(layer, name, None)
                if isinstance(projection, nn.Linear) and projection.bias is not None:
                    nn.init.normal_(projection.weight, std=INITIAL_STD)
                    nn.init.zeros_(projection.bias)

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
        if not self._has_cross_decoder:
            return super().forward_features(
                tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate, last=last
            )
        features, state = self._decode(tokens, state, mask, doc_ids, trace, donate, last_only=False)
        return features if last is None else features[:, -last:], state

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
        """Return what the head reads of each row's last real token, (batch, 1, dim), and the state.

        What comes after layer L/2 is computed for that token alone, but for the shared keys and values.
        """
        if not self._has_cross_decoder:
            return super().last_features(tokens, state, mask=mask, doc_ids=doc_ids, trace=trace, donate=donate)
        return self._decode(tokens, state, mask, doc_ids, trace, donate, last_only=True)

    def _decode(
        self,
        tokens: Tensor,
        state: CausalLMState | None,
        mask: Tensor | None,
        doc_ids: Tensor | None,
        trace: Trace | None,
        donate: bool,
        *,
        last_only: bool,
    ) -> tuple[Tensor, CausalLMState]:
        check_tokens("tokens", tokens, self.vocab_size)
        x = self.embedding(tokens.long())
        *starts, sharing_start = self._block_states(state)
        ends: list[MixerState] = []
        read: dict[Kind, Tensor | SharedKeys] = {}
        options: dict[str, Any] = {"mask": mask, "doc_ids": doc_ids, "trace": trace, "donate": donate}
        for index, start in enumerate(starts):
            if index == self._memory_layer:
                x, end, memory = self.run_block(index, x, start, **options, return_memory=True)
                read["gmu"] = last_token(memory, mask) if last_only else memory
            else:
                x, end = self.run_block(index, x, start, **options)
            ends.append(end)
        x, end, read["cross"], memory = self.run_block(len(starts), x, sharing_start, **options, last_only=last_only)
        ends.append(end)
        if memory is not None:
            read["gmu"] = memory
        for index in range(len(ends), len(self.blocks)):
            x = self.run_block(index, x, read[self.kinds[index]], trace=trace)
        return self.norm(x), CausalLMState(tuple(ends))


def _build_blocks(
    kinds: Sequence[Kind],
    options: LayerOptions,
    *,
    sharing: int | None,
    source: Source | None,
    gmu_norm: bool,
    hidden_dim: int,
    norm: Callable[[int], nn.Module],
) -> list[ResidualBlock]:
    """Return the blocks of a layer map.

    Args:
        kinds: The map.
        options: Of the layers.
        sharing: Number of the block that shares its keys; None for none.
        source: What Gated Memory Units read; None where there are none.
        gmu_norm: Whether they normalise.
        hidden_dim: Inner width of the feed-forwards.
        norm: Builds a norm from a width.
    """
    half = len(kinds) // 2
    if source == "ssm" and kinds[half] != "ssm":
        raise ValueError(
            f"gmu_source='ssm', but layer {half} is of kind {kinds[half]!r}; use gmu_source='attention' or 'mlp', or a "
            f"self_pattern with a state-space layer there"
        )
    blocks: list[ResidualBlock] = []
    for index, kind in enumerate(kinds):
        mixer: Any
        with _own_stream():
            if kind == "gmu":
                giver: Any = blocks[half] if source == "ssm" else blocks[half + 1]
                width = (giver.ffn if source == "mlp" else giver.mixer).memory_dim
                mixer = GatedMemoryUnit(options.dim, width, norm=gmu_norm, norm_eps=options.norm_eps)
            elif kind == "cross":
                mixer = options.cross_attention(index)
            else:
                mixer = options.mixer(kind, index)
        with _own_stream():
            ffn = SwiGLU(options.dim, hidden_dim=hidden_dim)
        if kind in ("gmu", "cross"):
            blocks.append(ReadingBlock(mixer, ffn, norm=norm))
        elif index == sharing:
            blocks.append(SharingBlock(mixer, ffn, memory=None if source == "ssm" else source, norm=norm))
        else:
            blocks.append(Block(mixer, ffn, norm=norm))
    return blocks


@contextmanager
def _own_stream() -> Iterator[None]:
    """Draw inside from a stream that one number of the current one begins; the latter goes on behind that number."""
    device = torch.get_default_device()
    seed = int(torch.randint(2**62, (), device="cpu"))
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
