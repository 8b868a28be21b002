"""B'MOJO as a language model: blocks of a window, fading tokens and stored tokens, and SwiGLU (arXiv 2407.06324)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from memzoo.arch.block import Block
from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.causal_lm import CausalLM, CausalLMState
from memzoo.arch.hybrid import hybrid_mixers
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.bmojo import BMojo
from memzoo.layers.bmojo_parts import SSMS
from memzoo.layers.bmojo_selection import PREDICTORS
from memzoo.layers.bmojo_state import BMojoState
from memzoo.layers.errors import check_choice
from memzoo.layers.feedforward import SwiGLU
from memzoo.layers.stores import MemoryStore

ATTENTION_OPTIONS = ("num_heads", "head_dim", "num_kv_heads", "rotary_base", "qk_norm", "bias")  # as in B'MOJO
CHOICES = {
    "num_heads": "None: dim / head_dim",
    "head_dim": "None: dim / num_heads, or 64 without either",
    "num_kv_heads": "None: as many as query heads",
    "window": "512: keys of the window, and tokens of a chunk; 32 in the tiny models, 2048 in the official code",
    "ssm": "'mamba2', the official default; also 'mamba' and 'gated_deltanet'",
    "ssm_options": "none",
    "fading_lag": "None: window, as the official code",
    "fading_span": "None: window, as the official code",
    "fading_stride": "1, as the official code; window keeps one summary a chunk",
    "tie_projections": "on, the official default: fading tokens are read through the projections of the window",
    "qk_norm": "on",
    "rotary_base": "10000, at true positions",
    "bias": "off; on for all four projections, where the official default leaves the output without",
    "target": "of the store: 'fading', innovation over the SSM's output; 'input' for the layer's input",
    "predictor": "of the store: 'ema' of the last targets; also 'previous' and a learned 'conv'",
    "predictor_taps": "of the store: 4",
    "predictor_rate": "of the store: 0.5, what a target weighs relative to the one after it",
    "score": "of the store: 'norm', which does not depend on scale; also 'l2', 'cosine', and 'residual': what Gated "
    "DeltaNet itself corrects",
    "warmup_score": "of the store: None, the first tokens, predicted from zeros, are surprising; 0.0 ranks them last",
    "selection": "of the store: 'top_k'; also 'threshold', 'fifo', 'random'",
    "threshold": "of the store: none",
    "eidetic_positions": "of the store: 'true'; 'clamp' for contexts longer than the trained ones; 'none'",
    "in_context": "on",
    "segment_bias": "off",
    "eidetic_dropout": "of the store: 0",
    "eidetic_norm": "of the store: off",
    "ssm_output": "off: the SSM is read as fading tokens alone",
    "the store": "one a layer, which its heads share; old and new tokens compete for it, so that its size is bounded",
    "attention_layers": "none; in the official hybrid every other attention layer is left",
    "attention": "none: heads, positions, norms and biases are those of B'MOJO, where there is attention",
    "hidden_dim": "SwiGLU of 8/3 dim, rounded up to a multiple of 64; 3 dim in the named sizes",
    "tie_embeddings": "on",
}
RECALL = Claim(
    "at equal memory more recall (MQAR) than Mamba and stacked hybrids, as others report its figures", "bmojo/mqar_tiny"
)
BMOJO_CARD = ModelCard(
    name="B'MOJO",
    title="B'MOJO: fading and eidetic memory beside a window, in one softmax",
    paper="arXiv 2407.06324",
    memory="the state of an SSM and its last outputs, a window of keys, and num_eidetic stored tokens a block",
    written="every token into SSM and window; at the end of a chunk, those hardest to predict into the store. The "
    "eidetic part is a design that satisfies every published statement",
    read="every token, by one attention over stored tokens, fading tokens and the window",
    fidelity=Fidelity.DESIGN,
    choices=CHOICES
    | {"num_eidetic": "32 in the named sizes, 16 in the tiny one; the paper has a bound, not known in advance"},
    claims=(
        Claim("perplexity of Transformers and SSMs of equal size up to 1.4B, up to 10% faster to train", "bmojo/1b4"),
        Claim("trained on up to 8K tokens, better inference up to 32K", "bmojo/long_tiny"),
        RECALL,
        Claim("recall rises with num_eidetic, then saturates, as others report its figures", "bmojo/mqar_tiny"),
    ),
)
BMOJO_F_CARD = ModelCard(
    name="B'MOJO-F",
    title="B'MOJO-F: fading memory beside a window, in one softmax",
    paper="arXiv 2407.06324",
    memory="the state of an SSM and its last outputs, and a window of keys a block",
    written="every token",
    read="every token, by one attention over fading tokens and the window",
    fidelity=Fidelity.EXACT,
    choices=CHOICES | {"num_eidetic": "0: nothing is stored"},
    claims=(
        RECALL,
        Claim("half of Qwen3-8B's layers replaced: 71.27 on five groups of short tasks, the Transformer 71.21"),
        Claim("there, decoding 0.88 times as fast as the Transformer at 16K tokens, 1.75 times at 128K"),
    ),
)


class BMojoLM(CausalLM):
    """Blocks of B'MOJO and SwiGLU: ``x + BMojo(norm x)``, ``x + SwiGLU(norm x)``.

    Without stored tokens it is B'MOJO-F. ``predictor="conv"`` learns by losses that the blocks report to ``trace``;
    ``CausalLMModule`` adds them to its own.

    Args:
        vocab_size: Number of token ids.
        dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Query heads; None for ``head_dim`` channels each. Up to ``ssm_output``, see ``BMojo``.
        head_dim: Channels of a head; 64 when neither it nor ``num_heads`` is given.
        num_kv_heads: Heads of keys and values; None for ``num_heads``.
        window: Keys of the window, and tokens of a chunk.
        num_eidetic: Tokens in store, of every block; 0 for B'MOJO-F.
        ssm: ``"mamba2"``, ``"mamba"`` or ``"gated_deltanet"``; every block has its own.
        ssm_options: Keyword options of the SSM.
        fading_lag: Tokens by which the latest fading key lies behind the query; None for ``window``.
        fading_span: Reach of the fading keys behind that; None for ``window``, 0 for none.
        fading_stride: Every how many tokens a fading key is kept.
        tie_projections: Read fading tokens through the projections of the window.
        qk_norm: RMS-normalise queries and keys.
        rotary_base: Base of the rotary angles; None for no positions.
        bias: Add learned biases to queries, keys, values and outputs.
        target: What is predicted: ``"fading"`` tokens or the ``"input"``.
        predictor: ``"ema"``, ``"previous"`` or a learned ``"conv"``.
        predictor_taps: Targets that the predictor sees.
        predictor_rate: What a target weighs in the average, relative to the one after it.
        score: How far a target lies from its prediction: ``"norm"``, ``"l2"`` or ``"cosine"``; or ``"residual"``, what
            Gated DeltaNet as the SSM corrects.
        warmup_score: Score of the first ``predictor_taps`` tokens; None for no rule.
        selection: Who is stored: ``"top_k"``, ``"threshold"``, ``"fifo"`` or ``"random"``.
        threshold: For that selection.
        eidetic_positions: Where stored keys stand: ``"true"``, ``"clamp"`` or ``"none"``.
        in_context: Whether there is a window.
        segment_bias: Learn a bias a head for the logits of each kind of keys.
        eidetic_dropout: Probability that a row's stored tokens are out of sight in a call of training.
        eidetic_norm: Normalise the queries of stored tokens by a gain of their own.
        ssm_output: Add what the SSM gives to what the layer does, with or without fading keys.
        attention_layers: Blocks, counted from 0, that have softmax attention in place of B'MOJO: a hybrid, whose state
            grows with the context. None for none.
        attention: Keyword options of ``memzoo.layers.Attention`` there, such as ``{"num_kv_heads": 2}``. Those that are
            not given are the model's: ``num_heads``, ``head_dim``, ``num_kv_heads``, ``rotary_base``, ``qk_norm``, and
            ``bias``.
        hidden_dim: Inner width of SwiGLU; None for 8/3 ``dim`` rounded up to a multiple of 64.
        tie_embeddings: Read the logits with the embedding matrix.
        checkpoint_blocks: Compute each block again in the backward pass; a number k, every k-th.

    Shape:
        As ``CausalLM``.

    Raises:
        ValueError: A size is not positive or does not divide another, options are unknown or exclude each other,
            ``attention_layers`` names no block of the model, or there is ``attention`` for none.

    Reference:
        Zancato et al., arXiv 2407.06324. B'MOJO-F: awslabs/hybrid-model-factory, ``bmojo_f``.
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
        window: int = 512,
        num_eidetic: int = 0,
        ssm: str = "mamba2",
        ssm_options: Mapping[str, Any] | None = None,
        fading_lag: int | None = None,
        fading_span: int | None = None,
        fading_stride: int = 1,
        tie_projections: bool = True,
        qk_norm: bool = True,
        rotary_base: float | None = 10000.0,
        bias: bool = False,
        target: str = "fading",
        predictor: str = "ema",
        predictor_taps: int = 4,
        predictor_rate: float = 0.5,
        score: str = "norm",
        warmup_score: float | None = None,
        selection: str = "top_k",
        threshold: float | None = None,
        eidetic_positions: str = "true",
        in_context: bool = True,
        segment_bias: bool = False,
        eidetic_dropout: float = 0.0,
        eidetic_norm: bool = False,
        ssm_output: bool = False,
        attention_layers: Sequence[int] | None = None,
        attention: Mapping[str, Any] | None = None,
        hidden_dim: int | None = None,
        tie_embeddings: bool = True,
        checkpoint_blocks: bool | int = False,
    ) -> None:
        # A module or a function would be shared by all blocks, and have no place in a saved configuration.
        check_choice("ssm", ssm, SSMS)
        check_choice("predictor", predictor, PREDICTORS)
        options: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "window": window,
            "num_eidetic": num_eidetic,
            "ssm": ssm,
            "ssm_options": ssm_options,
            "fading_lag": fading_lag,
            "fading_span": fading_span,
            "fading_stride": fading_stride,
            "tie_projections": tie_projections,
            "qk_norm": qk_norm,
            "rotary_base": rotary_base,
            "bias": bias,
            "target": target,
            "predictor": predictor,
            "predictor_taps": predictor_taps,
            "predictor_rate": predictor_rate,
            "score": score,
            "warmup_score": warmup_score,
            "selection": selection,
            "threshold": threshold,
            "eidetic_positions": eidetic_positions,
            "in_context": in_context,
            "segment_bias": segment_bias,
            "eidetic_dropout": eidetic_dropout,
            "eidetic_norm": eidetic_norm,
            "ssm_output": ssm_output,
        }

        mixers = hybrid_mixers(
            depth,
            dim,
            lambda: BMojo(dim, **options),
            attention_layers=attention_layers,
            attention=attention,
            defaults={name: options[name] for name in ATTENTION_OPTIONS},
        )
        super().__init__(
            vocab_size,
            dim,
            [Block(mixer, SwiGLU(dim, hidden_dim=hidden_dim)) for mixer in mixers],
            tie_embeddings=tie_embeddings,
            checkpoint_blocks=checkpoint_blocks,
        )

    def mixers(self) -> list[BMojo]:
        """Return the layers of B'MOJO, block by block; a hybrid's attention is left out."""
        mixers = (block.mixer for block in cast(Iterable[Block], self.blocks))
        return [mixer for mixer in mixers if isinstance(mixer, BMojo)]

    def use_store(self, store: MemoryStore | None) -> None:
        """Let every layer of B'MOJO store tokens outside of its state, from the next sequence on; see ``BMojo``.

        It is meant for inference. A store grows with every fresh row of every call, in training and validation too,
        until ``forget`` or its own end. Documents that ended within a call, packed in a row, leave sequences there that
        no state names: these go with the store alone.

        Args:
            store: One for all layers: each row of each has a sequence of its own there. None for the states.

        Raises:
            ValueError: There is no layer of B'MOJO, they have no stored tokens, or choose them in a way that is not a
                store's; or blocks are computed again in the backward pass, and would store their tokens again.
        """
        mixers = self.mixers()
        if store is not None and not mixers:
            raise ValueError(
                "store is given, but every block has attention in place of B'MOJO; use fewer attention_layers"
            )
        if store is not None and self.checkpoint_blocks:
            raise ValueError(
                f"store is given, but checkpoint_blocks={self.checkpoint_blocks} computes blocks twice, and so would "
                "store tokens twice; use checkpoint_blocks=False"
            )
        for mixer in mixers:
            mixer.store = store

    def forget(self, state: CausalLMState) -> None:
        """Drop what a state's rows have in the store, for all layers of B'MOJO, when no other state goes on with it.

        Raises:
            ValueError: The layers have no store, or the state is another model's or another store's.
        """
        for block, own in zip(self._carrying_blocks(), self._block_states(state), strict=True):
            if isinstance(block.mixer, BMojo):
                block.mixer.forget(cast(BMojoState, own))


def _build(overrides: dict[str, Any], **sizes: Any) -> BMojoLM:
    return BMojoLM(**sizes | overrides)


TINY: dict[str, Any] = dict(
    vocab_size=256,
    dim=128,
    depth=4,
    num_heads=4,
    window=32,
    ssm_options={"expansion": 1, "state_dim": 32},
    hidden_dim=360,
)
SIZES: dict[str, dict[str, Any]] = {
    "130m": dict(vocab_size=50280, dim=768, depth=8, hidden_dim=2304),
    "370m": dict(vocab_size=50280, dim=1024, depth=16, hidden_dim=3072),
    "1b4": dict(vocab_size=50280, dim=2048, depth=16, hidden_dim=6144),
}


@register_model(BMOJO_CARD)
def bmojo_tiny(**overrides: Any) -> BMojoLM:
    """1.1M parameters on bytes, as many as the other tiny models; trains on two CPU cores in minutes."""
    return _build(overrides, **TINY, num_eidetic=16)


@register_model(BMOJO_CARD)
def bmojo_130m(**overrides: Any) -> BMojoLM:
    """8 blocks of width 768, 50k tokens, a window of 512 and 32 stored tokens: 130M parameters."""
    return _build(overrides, **SIZES["130m"], num_eidetic=32)


@register_model(BMOJO_CARD)
def bmojo_370m(**overrides: Any) -> BMojoLM:
    """16 blocks of width 1024, 50k tokens, a window of 512 and 32 stored tokens: 370M parameters."""
    return _build(overrides, **SIZES["370m"], num_eidetic=32)


@register_model(BMOJO_CARD)
def bmojo_1b4(**overrides: Any) -> BMojoLM:
    """16 blocks of width 2048, 50k tokens, a window of 512 and 32 stored tokens: 1.4B parameters."""
    return _build(overrides, **SIZES["1b4"], num_eidetic=32)


@register_model(BMOJO_F_CARD)
def bmojo_f_tiny(**overrides: Any) -> BMojoLM:
    """`bmojo_tiny` without stored tokens."""
    return _build(overrides, **TINY)


@register_model(BMOJO_F_CARD)
def bmojo_f_130m(**overrides: Any) -> BMojoLM:
    """`bmojo_130m` without stored tokens."""
    return _build(overrides, **SIZES["130m"])


@register_model(BMOJO_F_CARD)
def bmojo_f_370m(**overrides: Any) -> BMojoLM:
    """`bmojo_370m` without stored tokens."""
    return _build(overrides, **SIZES["370m"])


@register_model(BMOJO_F_CARD)
def bmojo_f_1b4(**overrides: Any) -> BMojoLM:
    """`bmojo_1b4` without stored tokens: the largest size of the paper."""
    return _build(overrides, **SIZES["1b4"])
