"""Frozen encoders: nothing in them ever moves, and what they make of an input is what it should be."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import (
    FrozenEncoder,
    PrincipalComponents,
    RandomFeatures,
    TextEncoder,
    TimmEncoder,
    TimmTransform,
    create_model,
)
from memzoo.arch.encoders import build_encoder, masked_mean

RESNET, VIT = "test_resnet.r160_in1k", "test_vit.r160_in1k"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolutions(pooled: bool = True) -> nn.Module:
    """With statistics and dropout, which training would move."""
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else []))


class Permuted(nn.Module):
    """Returns maps with the channels last, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = convolutions(pooled=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.convolutions(inputs).movedim(1, -1)


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)


def test_05_neither_weights_nor_statistics_move_in_training() -> None:
    encoder = FrozenEncoder(convolutions(), 6)
    images, before = draw(5, 1, 8, 8), {name: t.clone() for name, t in encoder.state_dict().items()}
    expected = encoder(images)
    holder = nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(holder(3 * images + 1)[:0], expected[:0])
    assert not holder(images.requires_grad_()).requires_grad
    assert torch.equal(holder(images), expected)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


@pytest.mark.parametrize("model", [convolutions(pooled=False), Permuted()], ids=["channels_first", "channels_last"])
def test_maps_become_tokens_row_by_row(model: nn.Module) -> None:
    encoder = FrozenEncoder(model, 6)
    found, maps = encoder(draw(2, 1, 6, 7)), model(draw(2, 1, 6, 7))
    maps = maps if maps.shape[1] == 6 else maps.movedim(-1, 1)
    assert found.shape == (2, 20, 6)
    assert torch.equal(found[:, 7], maps[:, :, 1, 2])


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feature_dim=7, but the encoder returns \(2, 6\)"):
        FrozenEncoder(convolutions(), 7)(draw(2, 1, 8, 8))
    with pytest.raises(ValueError, match="feature_dim=None, and Sequential has no num_features"):
        FrozenEncoder(convolutions())
    with pytest.raises(ValueError, match=r"feature_dim=6, but the encoder returns tuple"):
        FrozenEncoder(nn.LSTM(3, 6, batch_first=True), 6)(draw(2, 4, 3))


def test_a_fingerprint_is_of_weights_statistics_and_structure() -> None:
    model = convolutions()
    encoder = FrozenEncoder(model, 6)
    first = encoder.fingerprint()
    assert first == encoder.fingerprint() == FrozenEncoder(model, 6).fingerprint()
    model[1].running_mean[0] += 1
    second = encoder.fingerprint()
    model[3] = nn.ReLU()
    assert len({first, second, encoder.fingerprint()}) == 3


def test_principal_components_are_those_of_the_centred_inputs_in_any_batches() -> None:
    inputs = draw(200, 1, 3, 4) * torch.arange(1, 13).view(1, 1, 3, 4)
    encoder = PrincipalComponents(5, 12)
    encoder.fit(inputs.split(30))
    rows = inputs.flatten(1).double()
    axes = torch.linalg.svd(rows - rows.mean(0)).Vh[:5]
    expected = (rows - rows.mean(0)) @ axes.T
    ratio = encoder(inputs) / expected
    assert torch.allclose(ratio.abs(), torch.ones_like(ratio), atol=1e-3)
    assert torch.allclose(encoder(inputs).abs(), expected.abs().float(), atol=1e-4)
    assert (encoder.components.gather(0, encoder.components.abs().argmax(0, keepdim=True)) > 0).all()
    other = PrincipalComponents(5, 12)
    other.load_state_dict(encoder.state_dict())
    assert other.fitted
    assert torch.equal(other(inputs), encoder(inputs))


def test_principal_components_come_from_inputs_that_fit() -> None:
    with pytest.raises(ValueError, match="the principal components are not fitted"):
        PrincipalComponents(2, 12)(draw(2, 12))
    with pytest.raises(ValueError, match="batches hold 1 inputs"):
        PrincipalComponents(2, 12).fit([draw(1, 12)])
    with pytest.raises(ValueError, match=r"shape \(2, 11\); each must have input_dim=12 numbers"):
        PrincipalComponents(2, 12).fit([draw(2, 11)])
    with pytest.raises(ValueError, match="feature_dim=13 is more than input_dim=12"):
        PrincipalComponents(13, 12)


def test_random_features_depend_on_their_seed_alone() -> None:
    inputs = draw(3, 1, 2, 5)
    torch.manual_seed(1)
    one, other = RandomFeatures(7, 10, seed=3), RandomFeatures(7, 10, seed=4)
    torch.manual_seed(2)
    assert torch.equal(one(inputs), RandomFeatures(7, 10, seed=3)(inputs))
    assert not torch.equal(one(inputs), other(inputs))
    assert torch.equal(one(inputs), (inputs.flatten(1) @ one.weight).relu())


@pytest.mark.parametrize("name", [RESNET, VIT])
def test_a_model_of_timm_has_no_classifier_and_its_own_preprocessing(name: str) -> None:
    from PIL import Image

    torch.manual_seed(0)
    encoder = TimmEncoder(name, pretrained=False)
    image = Image.new("RGB", (200, 170), (3, 100, 200))
    read = encoder.transform(image)
    assert read.shape == (3, 160, 160)
    assert encoder(read[None]).shape == (1, encoder.feature_dim)
    assert torch.equal(TimmTransform(name)(image), read)
    assert TimmTransform(name, input_size=(3, 64, 64))(image).shape == (3, 64, 64)


def test_unpooled_features_of_timm_are_tokens() -> None:
    encoder = TimmEncoder(RESNET, pretrained=False, global_pool="")
    assert encoder(draw(1, 3, 160, 160)).shape == (1, 25, encoder.feature_dim)


def test_a_misspelt_model_of_timm_is_refused() -> None:
    for build in (TimmEncoder, TimmTransform, build_encoder):
        with pytest.raises(ValueError, match=r"encoder='resnet5O' is no model of timm; did you mean 'resnet50"):
            build("resnet5O")  # type: ignore[operator]


def test_an_encoder_by_name_takes_its_own_options() -> None:
    assert build_encoder("pixels", 4)(draw(2, 1, 2, 2)).shape == (2, 4)
    assert isinstance(build_encoder("pca", 3, {"input_dim": 4}), PrincipalComponents)
    assert torch.equal(
        build_encoder("random_relu", 3, {"input_dim": 4, "seed": 2}).weight, RandomFeatures(3, 4, seed=2).weight
    )
    own = RandomFeatures(3, 4)
    assert build_encoder(own, 3) is own
    with pytest.raises(ValueError, match="feature_dim=5, but the encoder's features have 3"):
        build_encoder(own, 5)
    with pytest.raises(ValueError, match="feature_dim=None, but encoder='pca' has any width"):
        build_encoder("pca", None, {"input_dim": 4})
    with pytest.raises(ValueError, match=r"encoder_options=\{\} lack input_dim"):
        build_encoder("pca", 3)
    with pytest.raises(ValueError, match=r"encoder_options \['seed'\] are none of encoder='pca'"):
        build_encoder("pca", 3, {"input_dim": 4, "seed": 1})
    with pytest.raises(ValueError, match="are of an encoder given by name"):
        build_encoder(own, None, {"seed": 1})


@pytest.mark.parametrize("kind", ["ours", "bert"])
def test_a_text_encoder_gives_features_of_real_tokens_whatever_the_padding(kind: str) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(create_model("transformer_tiny", depth=1, dim=16, num_heads=2) if kind == "ours" else bert())
    tokens = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = encoder(tokens, mask)
    assert found.shape == (2, 6, encoder.feature_dim)
    assert torch.allclose(encoder(tokens[1:, :4])[0], found[1, :4], atol=1e-5)
    other = encoder(tokens.masked_fill(~mask, 7), mask)
    assert torch.allclose(other[1, :4], found[1, :4], atol=1e-6)


def test_what_is_no_model_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="model=Sequential is no CausalLM and no encoder of transformers"):
        TextEncoder(convolutions())


def test_a_mean_is_over_real_tokens_and_padding_may_hold_nan() -> None:
    features = draw(2, 3, 4)
    mask = torch.tensor([[True, True, True], [False, True, False]])
    dirty = features.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(masked_mean(dirty, mask)[1], features[1, 1])
    assert torch.allclose(masked_mean(dirty, mask)[0], features[0].mean(0))
    assert torch.equal(masked_mean(features, None), features.mean(1))


def test_timm_is_imported_by_those_who_name_a_model_of_it_alone() -> None:
    code = "import sys, memzoo.arch as a; a.create_model('dkvb_digits'); assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
