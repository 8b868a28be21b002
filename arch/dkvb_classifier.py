"""DKVBClassifier: a frozen encoder, a discrete key-value bottleneck, and a vote; the values are all that learns.

Discrete Key-Value Bottleneck, arXiv 2207.11240; for text, arXiv 2412.08528.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memzoo.arch.card import Claim, Fidelity, ModelCard
from memzoo.arch.encoders import masked_mean
from memzoo.arch.frozen_classifier import FrozenClassifier, Inputs, build_head, grown, pairs
from memzoo.arch.registry import record_config, register_model
from memzoo.layers.discrete_key_value_bottleneck import DiscreteKeyValueBottleneck
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.index_cache import IndexCache

Decoder = Literal["vote", "linear", "mlp"]
Pool = Literal["before", "after"]


class DKVBClassifier(FrozenClassifier):
    """A frozen encoder's features snap to keys; the values behind these are the logits, or a decoder's input.

    Before it can be called its keys are set: ``initialize_keys(batches)``, from inputs without labels. ``encode`` gives
    the indices of the pairs that are fetched, ``decode`` what their values say.

    With "vote" the values are all there is to train, and a step on one class leaves what another class does not share
    with it as it is, to the bit, under an optimiser that does (see ``DiscreteKeyValueBottleneck``). "linear" and "mlp"
    read the values of all codebooks side by side. Such a decoder is kept as it is, as the paper's; it is to be trained
    on other data first. ``train_decoder=True`` trains it in the stream, which changes every answer with each step, and
    warns of that.

    Args:
        encoder: As in ``FrozenClassifier``.
        num_classes: Classes.
        feature_dim: Width of the encoder's features, where it does not know it.
        encoder_options: Further arguments of a named encoder.
        decoder: "vote", "linear" or "mlp".
        hidden_dim: Of decoder "mlp".
        train_decoder: Train the decoder too.
        pool: Of features with tokens: "after" looks up each token and takes the mean over what they fetch; "before"
            looks up the mean.
        sparse: Give the values sparse gradients, for ``torch.optim.SparseAdam``; with decoder "vote".
        num_codebooks: As in ``DiscreteKeyValueBottleneck``, as the two below.
        num_pairs: Keys and values of a codebook.
        dim_key: Width of the heads.
        dim_value: Width of the values; the number of classes for "vote", 10 for a decoder, by default.
        bottleneck_options: Further arguments of ``DiscreteKeyValueBottleneck``. With ``mask_unused`` codes depend on
            what was trained and are not to be kept.
        save_encoder: As in ``FrozenClassifier``, with all that is said there of checkpoints.

    Attributes:
        bottleneck: The ``DiscreteKeyValueBottleneck``.
        head: The decoder, ``nn.Identity`` for "vote".

    Shape:
        inputs: (batch, ...). mask: (batch, tokens) bool, for text, with a real token in each row. Codes: (batch,
        num_codebooks, topk, tokens), -1 at masked tokens and where a codebook has fewer pairs left. Returns logits
        (batch, classes).

    Raises:
        ValueError: An argument is out of range or does not go with another, or keys are not set.

    Reference:
        ftraeuble/experiments_discrete_key_value_bottleneck; for text, drndr/dkvb_nlp, whose padding is part of the
        mean: here it is not.

    Example:
        >>> import torch
        >>> from memzoo.arch import create_model
        >>> model, images = create_model("dkvb_digits"), torch.rand(300, 1, 8, 8)
        >>> model.initialize_keys([images])
        >>> codes = model.encode(images)
        >>> codes.shape, model.decode(codes).shape
        (torch.Size([300, 64, 1, 1]), torch.Size([300, 10]))
    """

    @record_config
    def __init__(
        self,
        encoder: str | nn.Module,
        num_classes: int,
        *,
        feature_dim: int | None = None,
        encoder_options: Mapping[str, Any] | None = None,
        decoder: Decoder = "vote",
        hidden_dim: int = 128,
        train_decoder: bool = False,
        pool: Pool = "after",
        sparse: bool = False,
        num_codebooks: int = 256,
        num_pairs: int = 4096,
        dim_key: int = 14,
        dim_value: int | None = None,
        bottleneck_options: Mapping[str, Any] | None = None,
        save_encoder: bool = False,
    ) -> None:
        check_choice("decoder", decoder, get_args(Decoder))
        check_choice("pool", pool, get_args(Pool))
        check_positive("num_classes", num_classes)
        check_positive("num_codebooks", num_codebooks)
        votes = decoder == "vote"
        if votes and dim_value not in (None, num_classes):
            raise ValueError(
                f"dim_value={dim_value}, but the values are the logits with decoder='vote'; use {num_classes} or None"
            )
        if votes and train_decoder:
            raise ValueError("train_decoder=True, but decoder='vote' has nothing to train; use 'linear' or 'mlp'")
        if sparse and not votes:
            raise ValueError(f"sparse=True needs decoder='vote', not {decoder!r}, whose values have dense gradients")
        width = num_classes if votes else 10 if dim_value is None else dim_value
        own = {"hidden_dim": hidden_dim} if decoder == "mlp" else None
        head = nn.Identity() if votes else build_head(decoder, num_codebooks * width, num_classes, own)
        super().__init__(
            encoder,
            num_classes,
            feature_dim=feature_dim,
            encoder_options=encoder_options,
            head=head,
            save_encoder=save_encoder,
        )
        self.bottleneck = DiscreteKeyValueBottleneck(
            self.encoder.feature_dim,
            num_codebooks=num_codebooks,
            num_pairs=num_pairs,
            dim_key=dim_key,
            dim_value=width,
            **dict(bottleneck_options or {}),
        )
        self.decoder: Decoder = decoder
        self.pool, self.sparse = pool, sparse
        self.train_decoder = train_decoder
        self.head.requires_grad_(train_decoder)
        if train_decoder:
            warnings.warn(
                f"train_decoder=True: every step moves the decoder {decoder!r}, and with it the answers to all inputs, "
                f"those of earlier tasks too; train it on other data and call freeze_decoder(), or use decoder='vote'",
                stacklevel=3,
            )

    # What is constant

    @torch.no_grad()
    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the indices of the pairs that inputs fetch, (batch, num_codebooks, topk, tokens), -1 where none."""
        z, mask = self._vectors(inputs, mask)
        return self.bottleneck.lookup(z, mask=mask)

    @property
    def codes_are_constant(self) -> bool:
        """Whether codes may be kept; with ``mask_unused`` they depend on what was trained."""
        return not self.bottleneck.mask_unused

    def fingerprint(self) -> str:
        """Return SHA-256 of all that ``encode`` depends on: encoder, pooling, projection and keys."""
        parts = (super().fingerprint(), self.pool, self.bottleneck.fingerprint())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def needs_keys(self) -> bool:
        """Whether ``initialize_keys`` must be called before the model can."""
        return self.bottleneck.stage != 2 or super().needs_keys

    def initialize_keys(self, batches: Iterable[Inputs], *, keep: bool = True, **options: Any) -> None:
        """Set the keys, and fit the encoder before if it is one that is fitted; from inputs, without labels.

        Args:
            batches: Of inputs; of text, pairs of tokens and mask. Gone through again and again.
            keep: Encode them once and keep the features in memory; False encodes them anew in each pass.
            **options: Of ``DiscreteKeyValueBottleneck.initialize_keys``: ``method``, ``epochs``, ``seed`` and so on.

        Raises:
            ValueError: Keys are set already and ``force`` is not, or ``batches`` or an option does not fit.
        """
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches={type(batches).__name__} can be gone through once; give a list, or an object whose __iter__ "
                f"begins again"
            )
        super().initialize_keys(batches)
        encoded = _Encoded(self, batches)
        self.bottleneck.initialize_keys(list(encoded) if keep else encoded, **options)

    def cache_indices(self, batches: Iterable[Inputs]) -> IndexCache:
        """Return the indices of all inputs, kept in as few bytes as hold them, with the model's fingerprint.

        Training then takes ``decode(cache[samples])`` alone.

        Raises:
            ValueError: Indices are no constants, or inputs have masked tokens.
        """
        if not self.codes_are_constant:
            raise ValueError("mask_unused=True makes indices depend on what was trained; use mask_unused=False")
        found = [self.encode(inputs, mask).to("cpu", torch.int32) for inputs, mask in pairs(batches)]
        if any(bool((one[:, :, 0] < 0).any()) for one in found):
            raise ValueError("batches have masked tokens, which have no index; use pool='before', or keep encode()'s")
        return IndexCache(torch.cat(found), self.bottleneck.num_pairs, self.fingerprint())

    # What learns

    def decode(self, codes: Tensor) -> Tensor:
        """Return logits (batch, classes) of indices, over their real tokens."""
        if self.decoder == "vote":
            return self.bottleneck.vote(codes, sparse=self.sparse)
        values = self.bottleneck.read(codes).sum(2).movedim(2, 1).flatten(2)  # (batch, tokens, codebooks * width)
        # A single token is never masked: a row without a real token is refused.
        logits: Tensor = self.head(masked_mean(values, codes[:, 0, 0] >= 0 if codes.shape[3] > 1 else None))
        return logits

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what an optimiser is to be given: the values, and the decoder's parameters if it is trained."""
        return [*self.bottleneck.trainable_parameters(), *(self.head.parameters() if self.train_decoder else ())]

    def freeze_decoder(self) -> None:
        """Keep the decoder as it is from now on."""
        self.train_decoder = False
        self.head.requires_grad_(False)
        if self.config:
            self.config = dict(self.config) | {"train_decoder": False}

    def grow_classes(self, number: int) -> None:
        """Add so many classes, with values of zero or decoder weights of zero.

        The other logits stay: with "vote" to the bit, with a decoder up to the rounding of a wider product. Parameters
        are others then: give them to a new optimiser.
        """
        check_positive("number", number)
        if self.decoder == "vote":
            self.bottleneck.grow_classes(number)
            if self.config:
                self.config = dict(self.config) | {"dim_value": None}
        else:
            self.head = grown(self.head, number)
        self._count_classes(number)

    # Parts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Take as many classes as the file has."""
        values = state_dict.get(f"{prefix}bottleneck.values")
        if self.decoder == "vote" and values is not None and values.shape[-1] > self.num_classes:
            self.grow_classes(values.shape[-1] - self.num_classes)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _vectors(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what is looked up: (batch, feature_dim), or (batch, tokens, feature_dim) and the mask of tokens."""
        z, mask = self._features(inputs, mask)
        if z.dim() == 3 and self.pool == "before":
            return masked_mean(z, mask), None
        return z, mask


class _Encoded:
    """What a model looks up of batches of inputs, as often as it is iterated over."""

    def __init__(self, model: DKVBClassifier, batches: Iterable[Inputs]) -> None:
        self.model, self.batches = model, batches

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for inputs, mask in pairs(self.batches):
            z, real = self.model._vectors(inputs, mask)
            yield z if real is None else z[real]


CARD = ModelCard(
    name="DKVB",
    title="Discrete Key-Value Bottleneck",
    paper="arXiv 2207.11240",
    memory="a table of values for each codebook, read at the key nearest to a head of a frozen encoder's features",
    written="by gradients, the values that training fetches and no others; keys once before, without labels",
    read="one value a codebook and token; their mean is the logits",
    fidelity=Fidelity.DESIGN,
    choices={
        "encoder": "frozen, in evaluation mode always; the paper's are large and pre-trained, 'pca' is the digits'",
        "num_classes": "given, since values are logits; `grow_classes` adds more",
        "feature_dim": "that of the encoder",
        "encoder_options": "of a named encoder",
        "decoder": "'vote', the mean of values, as in the paper; 'linear' and 'mlp' as in its ablations",
        "hidden_dim": "128, as published, for decoder 'mlp'",
        "train_decoder": "off: a decoder that is trained in the stream forgets",
        "pool": "'after' the bottleneck, token by token; 'before' is what the paper does to feature maps",
        "sparse": "off; on for SparseAdam, a lazy Adam that leaves other values alone",
        "num_codebooks": "256, as published",
        "num_pairs": "4096, as published",
        "dim_key": "14, as published",
        "dim_value": "the number of classes with 'vote'; 10 with a decoder",
        "bottleneck_options": "random projection, one nearest key, values from zero, no standardisation, as published",
        "save_encoder": "off: checkpoints have the encoder's fingerprint in place of its weights",
        "initialize_keys": "EMA with statistics that agree, from sampled heads; 'ema_official' is the published code",
    },
    claims=(Claim("forgets less than probes of the same encoder, without task boundaries", recipe="dkvb/digits_tiny"),),
    task="classification",
)


@register_model(CARD)
def dkvb_digits(**overrides: Any) -> DKVBClassifier:
    """82k values over 32 principal components of 8 x 8 digits; trains in seconds."""
    sizes: dict[str, Any] = dict(num_codebooks=64, num_pairs=128, dim_key=8, num_classes=10)
    encoder: dict[str, Any] = dict(encoder="pca", feature_dim=32, encoder_options={"input_dim": 64})
    return DKVBClassifier(**encoder | sizes | overrides)
