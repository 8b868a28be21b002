"""FrozenClassifier: an encoder that is never trained, and a head on what it makes of an input."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memzoo.arch.encoders import build_encoder, check_real, masked_mean
from memzoo.arch.registry import record_config
from memzoo.layers.analytic_classifier import AnalyticClassifier
from memzoo.layers.bottleneck_checks import check_mask
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ops.precision import no_autocast

HeadName = Literal["linear", "mlp", "analytic"]
Inputs = Tensor | tuple[Tensor, Tensor]  # a batch, of text with the mask of its real tokens
FINGERPRINT = "encoder_fingerprint"  # in a checkpoint, where the encoder's weights are not


class FrozenClassifier(nn.Module):
    """``logits = head(encode(inputs))``, where ``encode`` is constant: its codes can be computed once and kept.

    With its own heads the probes that memories are compared with: "linear", one matrix; "mlp", a hidden layer with a
    ReLU; "analytic", ``AnalyticClassifier``, which learns without gradients. Their codes are the features of the
    encoder, the mean over tokens where it has some.

    **Checkpoints** leave out the encoder's weights where these come from elsewhere (``encoder.is_external``), and hold
    its fingerprint instead. Loading such a file takes the encoder as it is, whose fingerprint must be the same:
    otherwise ``load_state_dict`` raises, or with ``strict=False`` loads the rest. ``save_encoder=True`` puts the
    weights in; a file that has them is always loaded whole.

    Args:
        encoder: As in ``build_encoder``: "pixels", "pca", "random_relu", a model of timm by name, or a module.
        num_classes: Classes; 0 for a head that learns of them on the way, such as "analytic".
        feature_dim: Width of the encoder's features, where it does not know it.
        encoder_options: Further arguments of a named encoder.
        head: "linear", "mlp", "analytic", or a module: (batch, feature_dim) -> (batch, classes).
        head_options: Of a named head: ``bias`` of "linear"; ``hidden_dim`` (128) of "mlp"; those of
            ``AnalyticClassifier``.
        save_encoder: Keep the weights of any encoder in checkpoints.

    Attributes:
        name: Name in the registry; None for a model built otherwise.
        config: Constructor arguments.
        encoder: The ``FrozenEncoder``.
        num_classes: Classes of the logits.

    Shape:
        inputs: (batch, ...). mask: (batch, tokens) bool, for text, with a real token in each row. Returns logits
        (batch, classes).

    Raises:
        ValueError: There is no such encoder or head, or an argument does not go with it.

    Example:
        >>> import torch
        >>> from memzoo.arch import FrozenClassifier
        >>> model = FrozenClassifier("random_relu", 10, feature_dim=32, encoder_options={"input_dim": 64})
        >>> images = torch.randn(5, 1, 8, 8)
        >>> model(images).shape, model.encode(images).shape
        (torch.Size([5, 10]), torch.Size([5, 32]))
    """

    name: str | None = None
    config: Mapping[str, Any]

    @record_config
    def __init__(
        self,
        encoder: str | nn.Module,
        num_classes: int,
        *,
        feature_dim: int | None = None,
        encoder_options: Mapping[str, Any] | None = None,
        head: HeadName | nn.Module = "linear",
        head_options: Mapping[str, Any] | None = None,
        save_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.config = {}
        if num_classes != 0 or head in ("linear", "mlp"):
            check_positive("num_classes", num_classes)
        self.encoder = build_encoder(encoder, feature_dim, encoder_options)
        self.num_classes, self.save_encoder = num_classes, save_encoder
        self.head = build_head(head, self.encoder.feature_dim, num_classes, head_options)
        self._fingerprint: tuple[Any, str] | None = None
        self.register_state_dict_post_hook(_leave_out_encoder)  # type: ignore[no-untyped-call]

    @property
    def transform(self) -> Any:
        """What makes an image the encoder's input; of a timm model the preprocessing it was trained with.

        Raises:
            ValueError: The encoder has none.
        """
        if not hasattr(self.encoder, "transform"):
            raise ValueError(f"{type(self.encoder).__name__} has no transform; that of a timm model by name has")
        return self.encoder.transform

    # What is constant

    @torch.no_grad()
    def encode(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the codes of inputs, without gradients: features (batch, feature_dim).

        Autocast is off within: a frozen encoder computes in its own precision, so that codes that were kept and codes
        of a step under autocast are the same.
        """
        features, mask = self._features(inputs, mask)
        return masked_mean(features, mask) if features.dim() == 3 else features

    @property
    def codes_are_constant(self) -> bool:
        """Whether codes may be kept: they depend on nothing that is trained."""
        return True

    def fingerprint(self) -> str:
        """Return SHA-256 of all that ``encode`` depends on."""
        return hashlib.sha256(f"{type(self).__name__} {self._encoder_fingerprint()}".encode()).hexdigest()

    @property
    def needs_keys(self) -> bool:
        """Whether inputs without labels are needed before anything can be encoded: ``initialize_keys``."""
        return not self.encoder.fitted

    def initialize_keys(self, batches: Iterable[Inputs]) -> None:
        """Fit the encoder to inputs, if it is one that is fitted.

        Args:
            batches: Of inputs, without labels; of text, pairs of tokens and mask. Gone through again and again.
        """
        if not self.encoder.fitted:
            self.encoder.fit(pair[0] for pair in pairs(batches))

    # What learns

    def decode(self, codes: Tensor) -> Tensor:
        """Return logits (batch, classes) of codes."""
        logits: Tensor = self.head(codes)
        return logits

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (batch, classes) of inputs."""
        return self.decode(self.encode(inputs, mask))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what an optimiser is to be given: the head's."""
        return list(self.head.parameters())

    def num_parameters(self) -> int:
        """Return the number of parameters, without the encoder's."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("encoder."))

    def grow_classes(self, number: int) -> None:
        """Add so many classes, with weights of zero; logits of the others stay, up to the rounding of a wider product.

        Parameters are others then: give them to a new optimiser.

        Raises:
            ValueError: ``number`` is below 1, or the head is not one of "linear" and "mlp".
        """
        check_positive("number", number)
        self.head = grown(self.head, number)
        self._count_classes(number)

    # Parts

    def _features(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return features, with the mask if they have tokens."""
        if mask is not None:
            check_real(mask, tuple(inputs.shape[:2]))
        with no_autocast(inputs.device):
            features: Tensor = self.encoder(inputs, mask)
        if features.dim() == 2:
            return features, None
        if mask is not None:
            check_mask(mask, features.shape[:2])
        return features, mask

    def _count_classes(self, number: int) -> None:
        self.num_classes += number
        if self.config:
            self.config = dict(self.config) | {"num_classes": self.num_classes}

    def _encoder_fingerprint(self) -> str:
        """Hash the encoder, but only once as long as nothing in it has changed."""
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            return "0" * 64  # there is nothing in it yet
        seen = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
        if self._fingerprint is None or self._fingerprint[0] != seen:
            self._fingerprint = seen, self.encoder.fingerprint()
        return self._fingerprint[1]

    def _leaves_out_encoder(self) -> bool:
        return self.encoder.is_external and not self.save_encoder

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Take the encoder as it is, if a file has only its fingerprint and that is right."""
        stored = state_dict.pop(f"{prefix}{FINGERPRINT}", None)
        inside = f"{prefix}encoder."
        missing_keys: list[str] = more[2]
        super()._load_from_state_dict(state_dict, prefix, *more)
        if any(name.startswith(inside) for name in state_dict) or not self._leaves_out_encoder():
            return
        state_dict.update({inside + name: tensor for name, tensor in self.encoder.state_dict().items()})
        if stored is None:
            missing_keys.append(f"{prefix}{FINGERPRINT}")
        elif bytes(stored.cpu().tolist()).hex() != self._encoder_fingerprint():
            missing_keys.append(
                f"{inside}* (the file was written with an encoder of fingerprint {bytes(stored.tolist()).hex()}, and "
                f"this one has {self._encoder_fingerprint()}: build the model with the same weights and options)"
            )

    def extra_repr(self) -> str:
        """Name the number of classes."""
        return f"num_classes={self.num_classes}"


def _leave_out_encoder(
    module: FrozenClassifier, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    if not module._leaves_out_encoder():
        return
    for name in [name for name in state_dict if name.startswith(f"{prefix}encoder.")]:
        del state_dict[name]
    print_of = bytes.fromhex(module._encoder_fingerprint())
    state_dict[f"{prefix}{FINGERPRINT}"] = torch.tensor(list(print_of), dtype=torch.uint8)


def pairs(batches: Iterable[Inputs]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Return inputs and masks, None where a batch has none."""
    for batch in batches:
        inputs, mask = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        yield inputs, mask


def build_head(
    head: str | nn.Module, feature_dim: int, num_classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a head: (batch, feature_dim) -> (batch, num_classes).

    Raises:
        ValueError: There is no such head, or an option is none of its.
    """
    given = dict(options or {})
    if isinstance(head, nn.Module):
        if given:
            raise ValueError(f"head_options={given!r} are of a head given by name; build the module with them")
        return head
    check_choice("head", head, get_args(HeadName))
    if head == "analytic":
        return AnalyticClassifier(feature_dim, num_classes, **given)
    known = {"linear": {"bias"}, "mlp": {"hidden_dim"}}[head]
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"head_options {unknown} are none of head={head!r}; it takes {sorted(known)}")
    if head == "linear":
        return nn.Linear(feature_dim, num_classes, **given)
    hidden = given.get("hidden_dim", 128)
    check_positive("hidden_dim", hidden)
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


@torch.no_grad()
def grown(head: nn.Module, number: int) -> nn.Module:
    """Return a head with outputs more, of zero.

    Raises:
        ValueError: It does not end in ``nn.Linear``.
    """
    last = head[-1] if isinstance(head, nn.Sequential) else head
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"number={number} classes cannot be added to {type(head).__name__}, only to a head that ends in nn.Linear; "
            f"build it for all classes"
        )
    wide = nn.Linear(last.in_features, last.out_features + number, bias=last.bias is not None).to(last.weight)
    for own, before in ((wide.weight, last.weight), (wide.bias, last.bias)):
        if before is not None:
            own.zero_()[: len(before)] = before
    wide.requires_grad_(last.weight.requires_grad)
    return nn.Sequential(*head[:-1], wide) if isinstance(head, nn.Sequential) else wide
