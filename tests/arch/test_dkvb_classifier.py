"""Classifiers over frozen encoders: the bottleneck's, and the probes it is compared with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memzoo.arch import DKVBClassifier, FrozenClassifier, TextEncoder, create_model, from_pretrained, save_pretrained
from memzoo.layers import IndexCache
from memzoo.layers.reference import discrete_key_value_bottleneck as reference
from tests.arch.test_encoders import RESNET, convolutions, draw

SIZES: dict[str, Any] = dict(num_codebooks=4, num_pairs=9, dim_key=3)
TOKENS = torch.randint(256, (3, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [False, True, False, True, True]])


def digits(**options: Any) -> DKVBClassifier:
    """Small, with its keys set."""
    torch.manual_seed(0)
    model: DKVBClassifier = create_model("dkvb_digits", **SIZES | options)
    model.initialize_keys([draw(60, 1, 8, 8)])
    return model


def over_convolutions(seed: int = 0, **options: Any) -> DKVBClassifier:
    torch.manual_seed(seed)
    model = DKVBClassifier(convolutions(), 5, feature_dim=6, **SIZES | options)
    model.initialize_keys([draw(30, 1, 8, 8)])
    return model


def of_text(method: str = "random", **options: Any) -> DKVBClassifier:
    torch.manual_seed(0)
    encoder = TextEncoder(create_model("transformer_tiny", depth=1, dim=16, num_heads=2))
    model = DKVBClassifier(encoder, 5, bottleneck_options={"value_init": "normal"}, **SIZES | options)
    model.initialize_keys([(TOKENS, MASK)], method=method)
    return model


def step(model: FrozenClassifier, codes: Tensor, labels: Tensor, rate: float = 1.0) -> None:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=rate)
    optimizer.zero_grad()
    F.cross_entropy(model.decode(codes), labels).backward()
    optimizer.step()


def test_05_the_encoder_does_not_move_while_the_values_learn() -> None:
    model, images = over_convolutions(), draw(12, 1, 8, 8, seed=1)
    before = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    model.train()
    for _ in range(3):
        step(model, model.encode(images), torch.arange(12) % 5)
    assert all(torch.equal(t, before[name]) for name, t in model.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert model.bottleneck.values.detach().any()


def test_11_new_classes_leave_values_and_answers_that_they_do_not_share() -> None:
    model, old, new = digits(num_codebooks=2), draw(40, 1, 8, 8, seed=1), draw(2, 1, 8, 8, seed=2)
    step(model, model.encode(old), torch.arange(40) % 8)
    codes, fresh, kept = model.encode(old), model.encode(new), model.bottleneck.values.detach().clone()
    logits = model.decode(codes).detach()
    step(model, fresh, torch.tensor([8, 9]))
    apart = (model.bottleneck.overlap(codes, fresh) == 0).all(1)
    assert 0 < apart.sum() < 40
    assert torch.equal(model.decode(codes)[apart], logits[apart])
    assert not torch.equal(model.decode(codes)[~apart], logits[~apart])
    fetched = torch.zeros(2, 9, dtype=torch.bool)
    fetched[torch.arange(2).expand(2, 2), fresh[..., 0, 0]] = True
    assert torch.equal((model.bottleneck.values != kept).any(-1), fetched)
    model.grow_classes(3)
    assert torch.equal(model.decode(codes)[apart, :10], logits[apart])
    assert model.num_classes == model.config["num_classes"] == 13


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
def test_a_decoder_reads_the_values_of_all_codebooks_and_is_left_as_it_is(decoder: str) -> None:
    model = digits(decoder=decoder, dim_value=3, hidden_dim=7)
    images, labels = draw(12, 1, 8, 8, seed=1), torch.arange(12) % 10
    values = model.bottleneck.read(codes := model.encode(images)).flatten(1)
    assert values.shape == (12, 4 * 3)
    assert torch.allclose(model(images), model.head(values))
    before, expected = copy.deepcopy(model.head.state_dict()), model(images).detach()
    step(model, codes, labels)
    assert not torch.equal(model(images), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.head.state_dict().items())
    assert model.trainable_parameters() == [model.bottleneck.values]
    grown = model(images).detach()
    model.grow_classes(2)
    assert torch.allclose(model(images)[:, :10], grown, atol=1e-6)
    assert not model(images)[:, 10:].any()


def test_training_a_decoder_is_warned_of_and_can_be_ended() -> None:
    with pytest.warns(
        UserWarning, match="every step moves the decoder 'linear', and with it the answers to all inputs"
    ):
        model = digits(decoder="linear", train_decoder=True)
    assert len(model.trainable_parameters()) == 3
    before = model.head.weight.detach().clone()
    for _ in range(2):  # values start at zero, so that the first step moves them and the bias alone
        step(model, model.encode(draw(12, 1, 8, 8)), torch.arange(12) % 10)
    assert not torch.equal(model.head.weight, before)
    model.freeze_decoder()
    assert len(model.trainable_parameters()) == 1
    assert not model.config["train_decoder"]
    assert not any(parameter.requires_grad for parameter in model.head.parameters())


@pytest.mark.parametrize("pool", ["before", "after"])
@pytest.mark.parametrize("decoder", ["vote", "linear"])
def test_text_is_pooled_over_real_tokens_before_or_after_the_bottleneck(pool: str, decoder: str) -> None:
    model = of_text(pool=pool, decoder=decoder)
    codes, logits = model.encode(TOKENS, MASK), model(TOKENS, MASK)
    assert codes.shape == (3, 4, 1, 1 if pool == "before" else 5)
    assert torch.equal(model.decode(codes), logits)
    for row, real in enumerate(MASK):
        z = model.encoder(TOKENS[row : row + 1], MASK[row : row + 1])[:, real]
        z = z.mean(1, keepdim=True) if pool == "before" else z
        values = model.bottleneck.eval()(z).mean(2)  # (1, codebooks, width)
        expected = values.mean(1) if decoder == "vote" else model.head(values.flatten(1))
        assert torch.allclose(logits[row], expected[0], atol=1e-6)
    if pool == "after":
        assert torch.equal((codes < 0)[:, 0, 0], ~MASK)


def test_padding_is_neither_counted_nor_trained() -> None:
    for decoder in ("vote", "linear"):
        model = of_text(decoder=decoder).train()
        step(model, model.encode(TOKENS, MASK), torch.tensor([0, 1, 2]))
        assert int(model.bottleneck.usage.sum()) == 4 * int(MASK.sum())


def test_keys_of_text_are_from_real_tokens_alone() -> None:
    model, other = of_text("sample"), of_text("sample")
    model.initialize_keys([(TOKENS.masked_fill(~MASK, 9), MASK)], method="sample", force=True)
    assert torch.equal(model.bottleneck.keys, other.bottleneck.keys)
    model.initialize_keys([TOKENS], method="sample", force=True)
    assert not torch.equal(model.bottleneck.keys, other.bottleneck.keys)


def test_a_row_of_padding_alone_is_refused() -> None:
    mask = MASK.clone()
    mask[1] = False
    with pytest.raises(ValueError, match="mask leaves row 1 without a token; leave such rows out"):
        of_text().encode(TOKENS, mask)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\)"):
        of_text().encode(TOKENS, mask[:, 1:])


def test_maps_are_looked_up_cell_by_cell_or_as_their_mean() -> None:
    for pool, cells in (("after", 36), ("before", 1)):
        model = DKVBClassifier(convolutions(pooled=False), 5, feature_dim=6, pool=pool, **SIZES)  # type: ignore[arg-type]
        images = draw(3, 1, 8, 8)
        model.initialize_keys([images])
        assert model.encode(images).shape == (3, 4, 1, cells)
        z = model.encoder(images)
        z = z if pool == "after" else z.mean(1)
        assert torch.equal(model.encode(images), model.bottleneck.lookup(z))


def test_indices_of_a_data_set_are_kept_in_a_byte_each_with_the_model_s_fingerprint() -> None:
    model, batches = digits(), [draw(6, 1, 8, 8, seed=1), draw(3, 1, 8, 8, seed=2)]
    cache = model.cache_indices(batches)
    assert isinstance(cache, IndexCache)
    assert (cache.nbytes, cache.fingerprint) == (9 * 4, model.fingerprint())
    assert torch.equal(cache[6:], model.encode(batches[1]))
    assert model.codes_are_constant
    with pytest.raises(ValueError, match="mask_unused=True makes indices depend on what was trained"):
        digits(bottleneck_options={"mask_unused": True}).cache_indices(batches)
    with pytest.raises(ValueError, match="batches have masked tokens, which have no index"):
        of_text().cache_indices([(TOKENS, MASK)])


def test_pairs_that_a_codebook_no_longer_has_are_kept_as_such() -> None:
    model, images = digits(bottleneck_options={"topk": 3, "value_init": "normal"}), draw(6, 1, 8, 8, seed=1)
    model.bottleneck.disabled[2, 2:] = True
    cache = model.cache_indices([images])
    assert (cache[:][:, 2, 2] == -1).all()
    assert cache.nbytes == 6 * 4 * 3
    assert torch.equal(model.decode(cache[:]), model(images))


def test_fingerprints_are_of_encoder_keys_and_pooling() -> None:
    model = digits()
    prints = {model.fingerprint(), of_text().fingerprint(), of_text(pool="before").fingerprint()}
    model.bottleneck.keys[0, 0, 0] += 1
    prints.add(model.fingerprint())
    model.encoder.mean[0] += 1
    prints.add(model.fingerprint())
    assert len(prints) == 5
    step(model, model.encode(draw(3, 1, 8, 8)), torch.arange(3))
    assert model.fingerprint() in prints


def test_keys_do_not_depend_on_whether_features_are_kept() -> None:
    images = list(draw(60, 1, 8, 8).split(20))
    one, other = over_convolutions(), over_convolutions()
    for model, keep in ((one, True), (other, False)):
        model.initialize_keys(images, keep=keep, epochs=3, seed=5, force=True)
    assert torch.equal(one.bottleneck.keys, other.bottleneck.keys)


def test_a_sparse_vote_trains_with_sparse_adam_and_leaves_the_rest() -> None:
    model = digits(sparse=True)
    optimizer = torch.optim.SparseAdam(model.trainable_parameters(), lr=0.1)
    codes = model.encode(draw(2, 1, 8, 8))
    F.cross_entropy(model.decode(codes), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert int(model.bottleneck.values.any(-1).sum()) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "voting"}, "decoder='voting'"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"dim_value": 3}, "dim_value=3, but the values are the logits with decoder='vote'; use 10 or None"),
        ({"train_decoder": True}, "train_decoder=True, but decoder='vote' has nothing to train"),
        ({"decoder": "mlp", "sparse": True}, "sparse=True needs decoder='vote', not 'mlp'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"bottleneck_options": {"topk": 99}}, "topk=99 is more than num_pairs=9"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("dkvb_digits", **SIZES | options)


# Checkpoints


def test_a_checkpoint_has_the_fingerprint_of_a_foreign_encoder_in_place_of_its_weights() -> None:
    model, images = over_convolutions(), draw(4, 1, 8, 8)
    stored = nn.ModuleDict({"model": model}).state_dict()
    assert [name for name in stored if "encoder" in name] == ["model.encoder_fingerprint"]
    twin = copy.deepcopy(model)
    twin.bottleneck.values.data.add_(1)
    nn.ModuleDict({"model": twin}).load_state_dict(stored)
    assert torch.equal(twin(images), model(images))
    other = over_convolutions(seed=1)
    with pytest.raises(RuntimeError, match="the file was written with an encoder of fingerprint"):
        other.load_state_dict(model.state_dict())
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert (len(missing), unexpected) == (1, [])
    assert torch.equal(other.bottleneck.values, model.bottleneck.values)
    stored = {name: t for name, t in model.state_dict().items() if name != "encoder_fingerprint"}
    with pytest.raises(RuntimeError, match="encoder_fingerprint"):
        twin.load_state_dict(stored)


def test_a_checkpoint_with_the_encoder_s_weights_is_loaded_whole() -> None:
    model, other, images = over_convolutions(save_encoder=True), over_convolutions(seed=1), draw(4, 1, 8, 8)
    assert "encoder.model.0.weight" in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    digits().load_state_dict(digits(num_classes=12, save_encoder=True).state_dict())


def test_a_file_brings_its_classes(tmp_path: Path) -> None:
    model, images = digits(), draw(4, 1, 8, 8)
    model.grow_classes(2)
    other = digits()
    other.load_state_dict(model.state_dict())
    assert other.num_classes == 12
    saved = from_pretrained(save_pretrained(other, tmp_path))
    assert torch.equal(saved(images), model(images))


def test_a_model_of_timm_by_name_is_saved_without_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DKVBClassifier(RESNET, 5, encoder_options={"pretrained": False}, **SIZES)
    model.initialize_keys([draw(9, 3, 160, 160)])
    assert model.transform is model.encoder.transform
    save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 30_000
    with pytest.raises(RuntimeError, match="fingerprint"):  # other random weights
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PrincipalComponents has no transform"):
        _ = digits().transform


# Probes


def test_probes_read_features_that_are_constant() -> None:
    images = draw(40, 1, 8, 8)
    for head, options in (("linear", {"bias": False}), ("mlp", {"hidden_dim": 5})):
        model = FrozenClassifier(
            "pca", 4, feature_dim=6, encoder_options={"input_dim": 64}, head=head, head_options=options
        )  # type: ignore[arg-type]
        assert model.needs_keys
        model.initialize_keys([images])
        assert not model.needs_keys
        codes, before = model.encode(images), model(images).detach()
        assert torch.equal(codes, model.encoder(images))
        model.grow_classes(2)
        assert torch.allclose(model(images)[:, :4], before, atol=1e-6)
        assert model.num_parameters() == {"linear": 6 * 6, "mlp": 6 * 5 + 5 + 5 * 6 + 6}[head]
        step(model, codes, torch.arange(40) % 6)
        assert torch.equal(model.encode(images), codes)


def test_an_analytic_head_learns_features_without_gradients() -> None:
    images, labels = draw(40, 1, 8, 8), torch.arange(40) % 3
    model = FrozenClassifier("pixels", 0, feature_dim=64, head="analytic", head_options={"hidden": 128})
    model.head.learn(model.encode(images), labels)
    assert torch.equal(model(images).argmax(1), labels)
    with pytest.raises(ValueError, match="number=2 classes cannot be added to AnalyticClassifier"):
        model.grow_classes(2)


def test_features_with_tokens_are_pooled_for_a_probe() -> None:
    encoder = of_text().encoder
    model = FrozenClassifier(encoder, 3)
    features = encoder(TOKENS, MASK)
    assert torch.allclose(model.encode(TOKENS, MASK)[1], features[1, :2].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "lda"}, "head='lda'"),
        (
            {"head": "linear", "head_options": {"hidden_dim": 3}},
            r"head_options \['hidden_dim'\] are none of head='linear'",
        ),
        ({"head": nn.Identity(), "head_options": {"bias": True}}, "are of a head given by name"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_heads_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenClassifier("pixels", feature_dim=64, **{"num_classes": 3} | options)


def test_the_vote_is_the_reference_s() -> None:
    model, images = digits(bottleneck_options={"value_init": "normal"}), draw(5, 1, 8, 8, seed=3)
    own, z = model.bottleneck, model.encoder(images)[:, None]
    indices = reference.lookup(z, own.projection, own.keys)
    assert torch.equal(model.encode(images), indices)
    assert torch.allclose(model(images), reference.vote(own.values, indices), atol=1e-6)
