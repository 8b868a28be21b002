"""Encoders that are never trained: what a classifier of frozen representations reads its inputs through."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn

from memzoo.arch.causal_lm import CausalLM
from memzoo.layers.bottleneck_checks import check_mask
from memzoo.layers.errors import check_positive

OWN_ENCODERS = ("pixels", "pca", "random_relu")  # any other name is timm's


class FrozenEncoder(nn.Module):
    """A module that is not trained: no gradients, no dropout, and running statistics that stay what they are.

    ``train()`` leaves it in evaluation mode. The module it is given becomes a part of it and is frozen.

    Args:
        model: Inputs -> features, in one of the shapes below.
        feature_dim: Width of the features; ``model.num_features`` by default, as timm's models have it.

    Attributes:
        feature_dim: Width of the features.
        fitted: Whether it can encode; some are fitted to inputs first, without labels: ``fit(batches)``.
        is_external: Whether its weights come from elsewhere, so that a classifier's checkpoint need not hold them.

    Shape:
        Of ``model``: (batch, feature_dim), (batch, tokens, feature_dim), or maps (batch, feature_dim, height, width) or
        (batch, height, width, feature_dim). Returns (batch, feature_dim) or (batch, tokens, feature_dim).

    Raises:
        ValueError: The width is not known, or features have another.
    """

    is_external = True

    def __init__(self, model: nn.Module, feature_dim: int | None = None) -> None:
        super().__init__()
        width = getattr(model, "num_features", None) if feature_dim is None else feature_dim
        if width is None:
            raise ValueError(
                f"feature_dim=None, and {type(model).__name__} has no num_features; pass the width of its features"
            )
        check_positive("feature_dim", width)
        self.feature_dim = int(width)
        self.model = model
        self.requires_grad_(False)
        self.eval()

    @property
    def fitted(self) -> bool:
        """Whether it can encode."""
        return True

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Fit it to inputs; nothing to do for most."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features of inputs; ``mask`` is for encoders of text."""
        return self._tokens(self.features(inputs, mask))

    def features(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the model makes of inputs."""
        found: Tensor = self.model(inputs)
        return found

    def fingerprint(self) -> str:
        """Return SHA-256 of all that features depend on: structure, weights and statistics."""
        digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(self)).encode())
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _tokens(self, found: Any) -> Tensor:
        width = self.feature_dim
        if isinstance(found, Tensor):
            if found.dim() in (2, 3) and found.shape[-1] == width:
                return found
            if found.dim() == 4 and found.shape[1] == width:
                return found.flatten(2).mT
            if found.dim() == 4 and found.shape[-1] == width:
                return found.flatten(1, 2)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"feature_dim={width}, but the encoder returns {shape}; it must be (batch, {width}), (batch, tokens, "
            f"{width}) or a map of them"
        )

    def extra_repr(self) -> str:
        """Name the width."""
        return f"feature_dim={self.feature_dim}"


class TextEncoder(FrozenEncoder):
    """A model of text, frozen: its features of every token.

    Args:
        model: A ``CausalLM`` of ours, whose features are what its head reads, or an encoder of transformers (of
            ``AutoModel``), whose are its last hidden states.
        feature_dim: Width of the features; that of the model by default.

    Shape:
        inputs: (batch, tokens) ids. mask: (batch, tokens), True at real tokens. Returns (batch, tokens, feature_dim).

    Raises:
        ValueError: It is no such model.
    """

    def __init__(self, model: nn.Module, feature_dim: int | None = None) -> None:
        own = isinstance(model, CausalLM)
        width = model.dim if own else getattr(getattr(model, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(
                f"model={type(model).__name__} is no CausalLM and no encoder of transformers; pass one of these, or "
                f"any module to FrozenEncoder"
            )
        super().__init__(model, width if feature_dim is None else feature_dim)

    def features(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the features of all tokens."""
        if isinstance(self.model, CausalLM):
            return self.model.forward_features(inputs, mask=mask)[0]
        real = torch.ones_like(inputs) if mask is None else mask.long()
        states: Tensor = self.model(input_ids=inputs, attention_mask=real).last_hidden_state
        return states


class TimmEncoder(FrozenEncoder):
    """A model of timm by name, without its classifier: pooled features, and the preprocessing it was trained with.

    Args:
        model_name: Of timm, such as ``"resnet50.tv2_in1k"``.
        pretrained: Download its weights, once; False leaves them random.
        **options: Of ``timm.create_model``, such as ``global_pool="", img_size=112``.

    Attributes:
        transform: Makes a PIL image what the model reads.

    Raises:
        ValueError: timm has no such model.
    """

    def __init__(self, model_name: str, *, pretrained: bool = True, **options: Any) -> None:
        timm = _timm()
        _check_name(model_name)
        super().__init__(timm.create_model(model_name, pretrained=pretrained, num_classes=0, **options))
        self.model_name = model_name
        self.transform = _transform(timm.data.resolve_data_config({}, model=self.model))


class TimmTransform:
    """The preprocessing of a timm model by the model's name, without the model; for recipes.

    Args:
        model_name: Of timm.
        **options: Of ``timm.data.resolve_data_config``, in place of the model's own, such as ``crop_pct=1.0``.

    Raises:
        ValueError: timm has no such model.
    """

    def __init__(self, model_name: str, **options: Any) -> None:
        timm = _timm()
        _check_name(model_name)
        known = timm.models.get_pretrained_cfg(model_name)
        self._transform = _transform(timm.data.resolve_data_config(options, pretrained_cfg=known.to_dict()))

    def __call__(self, image: Any) -> Tensor:
        """Return a PIL image as the model reads it, (channels, height, width)."""
        made: Tensor = self._transform(image)
        return made


class PrincipalComponents(FrozenEncoder):
    """Coordinates of an input along the principal components of inputs it was fitted to, without labels.

    The components are exact: eigenvectors of the covariance, in float64, each with its largest entry positive.

    Args:
        feature_dim: Number of components.
        input_dim: Numbers in an input, of any shape.

    Attributes:
        mean: (input_dim,).
        components: (input_dim, feature_dim), largest variance first.

    Raises:
        ValueError: There are more components than numbers, or it is called before it is fitted.
    """

    is_external = False
    mean: Tensor
    components: Tensor
    _fitted: Tensor

    def __init__(self, feature_dim: int, input_dim: int) -> None:
        check_positive("input_dim", input_dim)
        super().__init__(nn.Flatten(), feature_dim)
        if feature_dim > input_dim:
            raise ValueError(f"feature_dim={feature_dim} is more than input_dim={input_dim}; use as many at most")
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("components", torch.zeros(input_dim, feature_dim))
        self.register_buffer("_fitted", torch.tensor(False))

    @property
    def fitted(self) -> bool:
        """Whether ``fit`` was called."""
        return bool(self._fitted)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find the components of all inputs of some batches.

        Raises:
            ValueError: There are fewer than two inputs, or they have another size.
        """
        count, size = 0, len(self.mean)
        sums = torch.zeros(size, dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros(size, size, dtype=torch.float64, device=self.mean.device)
        for batch in batches:
            rows = self._rows(batch).double()
            count += len(rows)
            sums += rows.sum(0)
            squares += rows.mT @ rows
        if count < 2:
            raise ValueError(f"batches hold {count} inputs; principal components need two or more")
        mean = sums / count
        vectors = torch.linalg.eigh(squares / count - mean[:, None] * mean).eigenvectors
        components = vectors.flip(1)[:, : self.feature_dim]
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.mean.copy_(mean)
        self._fitted.fill_(True)

    def features(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the coordinates."""
        if not self.fitted:
            raise ValueError("the principal components are not fitted; call fit(batches) first")
        return (self._rows(inputs) - self.mean) @ self.components

    def _rows(self, inputs: Tensor) -> Tensor:
        return _sized(self.model(inputs), len(self.mean)).to(self.mean)


class RandomFeatures(FrozenEncoder):
    """``relu(x W)`` of an input with a fixed Gaussian ``W``: as little of an encoder as there can be.

    Args:
        feature_dim: Columns of ``W``.
        input_dim: Numbers in an input, of any shape.
        seed: Of ``W``.

    Raises:
        ValueError: An input has another size.
    """

    is_external = False
    weight: Tensor

    def __init__(self, feature_dim: int, input_dim: int, *, seed: int = 0) -> None:
        check_positive("input_dim", input_dim)
        super().__init__(nn.Flatten(), feature_dim)
        drawn = torch.randn(
            input_dim, feature_dim, generator=torch.Generator("cpu").manual_seed(seed), device=torch.device("cpu")
        )
        self.register_buffer("weight", (drawn * input_dim**-0.5).to(torch.empty(0).device))

    def features(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the features."""
        return (_sized(self.model(inputs), len(self.weight)).to(self.weight) @ self.weight).relu()


def build_encoder(
    encoder: str | nn.Module, feature_dim: int | None = None, options: Mapping[str, Any] | None = None
) -> FrozenEncoder:
    """Return an encoder.

    Args:
        encoder: "pixels", the input itself; "pca", ``PrincipalComponents``; "random_relu", ``RandomFeatures``; any
            other name is of a model of timm; or a module, which is frozen.
        feature_dim: Width of the features, where the encoder does not know it.
        options: Further arguments of a named encoder.

    Raises:
        ValueError: There is no such encoder, or an argument does not go with it.
    """
    given = dict(options or {})
    if isinstance(encoder, nn.Module):
        if given:
            raise ValueError(f"encoder_options={given!r} are of an encoder given by name; build the module with them")
        if isinstance(encoder, FrozenEncoder):
            _check_width(encoder, feature_dim)
            return encoder
        return FrozenEncoder(encoder, feature_dim)
    if encoder in OWN_ENCODERS:
        if feature_dim is None:
            raise ValueError(f"feature_dim=None, but encoder={encoder!r} has any width; pass one")
        known = {"pixels": set(), "pca": {"input_dim"}, "random_relu": {"input_dim", "seed"}}[encoder]
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"encoder_options {unknown} are none of encoder={encoder!r}; it takes {sorted(known)}")
        if "input_dim" in known and "input_dim" not in given:
            raise ValueError(f"encoder_options={given!r} lack input_dim, the numbers in an input; pass it")
        if encoder == "pixels":
            return FrozenEncoder(nn.Flatten(), feature_dim)
        return PrincipalComponents(feature_dim, **given) if encoder == "pca" else RandomFeatures(feature_dim, **given)
    built = TimmEncoder(encoder, **given)
    _check_width(built, feature_dim)
    return built


def masked_mean(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over real tokens; what is masked may hold anything.

    Shape:
        features: (batch, tokens, dim). mask: (batch, tokens) bool, a True in each row. Returns (batch, dim).
    """
    if mask is None:
        return features.mean(1)
    real = features.masked_fill(~mask[..., None], 0)
    return real.sum(1) / mask.sum(1, keepdim=True).to(features.dtype)


def check_real(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Require a mask (batch, tokens) bool with a real token in each row.

    Raises:
        ValueError: It is none.
    """
    check_mask(mask, shape)
    if not mask.any(1).all():
        raise ValueError(f"mask leaves row {int((~mask.any(1)).nonzero()[0])} without a token; leave such rows out")


def _check_width(encoder: FrozenEncoder, feature_dim: int | None) -> None:
    if feature_dim is not None and feature_dim != encoder.feature_dim:
        raise ValueError(
            f"feature_dim={feature_dim}, but the encoder's features have {encoder.feature_dim}; use that, or None"
        )


def _check_name(model_name: str) -> None:
    timm = _timm()
    if ":" in model_name or timm.is_model(model_name):  # hf-hub:... and local-dir:... are looked up by timm itself
        return
    near = get_close_matches(model_name, [*OWN_ENCODERS, *timm.list_models()], n=3)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() returns the names"
    raise ValueError(f"encoder={model_name!r} is no model of timm; {remedy}")


def _transform(config: Mapping[str, Any]) -> Any:
    return _timm().data.create_transform(**config, is_training=False)


def _timm() -> Any:
    import timm

    return timm


def _sized(rows: Tensor, size: int) -> Tensor:
    if rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(f"inputs flattened have shape {tuple(rows.shape)}; each must have input_dim={size} numbers")
    return rows
