"""B'MOJO as a language model: sizes and states, options that arrive, hybrids, stores, cards."""

import inspect
import json
from itertools import pairwise
from typing import Any

import pytest
import torch

from memzoo.arch import BMojoLM, Fidelity, bmojo, create_model, list_models, model_card, part_sizes
from memzoo.layers import Attention, BMojo, RMSNorm, Trace
from memzoo.layers.stores import HostStore

SIZES = {  # vocabulary, width, depth, width of a head, channels of the SSM and numbers each of them has, hidden width
    "tiny": (256, 128, 4, 32, 128, 32, 360),
    "130m": (50280, 768, 8, 64, 1536, 128, 2304),
    "370m": (50280, 1024, 16, 64, 2048, 128, 3072),
    "1b4": (50280, 2048, 16, 64, 4096, 128, 6144),
}
PARAMETERS = {"tiny": 1_084_056, "130m": 130_087_232, "370m": 375_226_880, "1b4": 1_389_014_016}
SSM = {"num_heads": 2, "head_dim": 8, "state_dim": 6, "chunk_size": 4}
SMALL: dict[str, Any] = dict(
    vocab_size=11, dim=16, depth=2, num_heads=2, window=4, num_eidetic=3, ssm_options=SSM, hidden_dim=24
)
sizes = pytest.mark.parametrize("size", SIZES)


def meta(name: str, **overrides: Any) -> BMojoLM:
    with torch.device("meta"):
        model: BMojoLM = create_model(name, **overrides)
    return model


def small(**options: Any) -> BMojoLM:
    torch.manual_seed(0)
    return BMojoLM(**SMALL | options).double()


# Sizes


def parameters(vocab_size: int, dim: int, depth: int, head: int, inner: int, state: int, hidden: int) -> int:
    """Embeddings tied; Mamba-2 with heads of 64 channels."""
    channels, heads = inner + 2 * state, inner // 64
    ssm = dim * (inner + channels + heads) + 5 * channels + 3 * heads + inner + inner * dim
    attention = 4 * dim**2 + 2 * head
    return vocab_size * dim + depth * (ssm + attention + 3 * dim * hidden + 2 * dim) + dim


def test_every_named_size_is_counted() -> None:
    assert {f"bmojo_{size}" for size in SIZES} | {f"bmojo_f_{size}" for size in SIZES} == {*list_models("bmojo_*")}


@sizes
@pytest.mark.parametrize("family", ["bmojo", "bmojo_f"])
def test_sizes_are_the_announced_ones_with_a_store_and_without(family: str, size: str) -> None:
    model = meta(f"{family}_{size}")
    assert model.num_parameters() == parameters(*SIZES[size]) == PARAMETERS[size]
    parts = part_sizes(model)
    assert sum(part.parameters for part in parts) == PARAMETERS[size]
    assert sum(part.state_bytes for part in parts) == model.initial_state(1).nbytes
    assert [part.part for part in parts] == ["Embedding", "RMSNorm", "BMojo", "SwiGLU"]


@pytest.mark.parametrize(("size", "named"), [("130m", 130e6), ("370m", 370e6), ("1b4", 1.4e9)])
def test_a_size_is_near_its_name(size: str, named: float) -> None:
    assert PARAMETERS[size] == pytest.approx(named, rel=0.02)


@sizes
def test_11_the_state_is_what_section_6_counts(size: str) -> None:
    _, dim, depth, _, inner, state, _ = SIZES[size]
    window, slots, taps = (32, 16, 4) if size == "tiny" else (512, 32, 4)
    ssm = inner * state + (inner + 2 * state) * 3
    rings = 2 * window * dim + 4 * window * dim
    store = 2 * slots * dim + slots + window + taps * dim  # keys and values, scores; those of the chunk; targets
    counters = 2 + 2  # tokens and document of layer and SSM
    numbers, counts = ssm + rings, counters
    assert meta(f"bmojo_f_{size}").initial_state(3).nbytes == 3 * depth * (4 * numbers + 8 * counts)
    numbers, counts = numbers + store, counts + slots + 1  # positions, and how many slots are taken
    assert meta(f"bmojo_{size}").initial_state(3).nbytes == 3 * depth * (4 * numbers + 8 * counts)


def test_one_summary_a_chunk_leaves_six_thousand_numbers_of_the_largest_ring() -> None:
    model = meta("bmojo_130m", num_eidetic=0)
    sparse = meta("bmojo_130m", num_eidetic=0, fading_stride=512)
    saved = 2 * (2 * 512) * 768 - 2 * 2 * 768
    assert model.initial_state(1).nbytes - sparse.initial_state(1).nbytes == 8 * 4 * saved


# Options


def test_every_option_of_the_layer_is_one_of_the_model_with_its_default() -> None:
    layer, model = (inspect.signature(cls).parameters for cls in (BMojo, BMojoLM))
    for name in layer.keys() - {"dim", "store"}:
        assert model[name].default == layer[name].default, name


def test_options_arrive_at_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict(
        num_heads=4, head_dim=6, num_kv_heads=2, window=6, num_eidetic=5, ssm="mamba", ssm_options={"state_dim": 3},
        fading_lag=5, fading_span=7, fading_stride=2, tie_projections=False, qk_norm=False, rotary_base=100.0,
        bias=True, target="input", predictor="conv", predictor_taps=3, predictor_rate=0.25, score="l2",
        warmup_score=0.0, selection="threshold", threshold=0.5, eidetic_positions="clamp", in_context=False,
        segment_bias=True, eidetic_dropout=0.125, eidetic_norm=True, ssm_output=True,
    )  # fmt: skip
    assert given.keys() == inspect.signature(BMojo).parameters.keys() - {"dim", "store"}
    calls: list[dict[str, Any]] = []

    def build(dim: int, **options: Any) -> BMojo:
        calls.append({"dim": dim, **options})
        return BMojo(dim, num_heads=2, ssm_options=SSM)

    monkeypatch.setattr(bmojo, "BMojo", build)
    model = BMojoLM(11, 16, 2, hidden_dim=24, checkpoint_blocks=True, tie_embeddings=False, **given)
    assert calls == [{"dim": 16, **given}] * 2
    assert model.blocks[0].ffn.down.in_features == 24
    assert model.checkpoint_blocks
    assert model.head is not None


def test_every_block_has_an_ssm_of_its_own_and_the_configuration_is_json() -> None:
    model = create_model("bmojo_tiny")
    assert len({id(mixer.ssm) for mixer in model.mixers()}) == 4
    assert BMojoLM(**json.loads(json.dumps(model.config))).config == model.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssm": "mamba3"}, "ssm='mamba3' is not one of 'mamba2', 'mamba', 'gated_deltanet'"),
        ({"ssm": BMojo(16, num_heads=2, ssm_options=SSM)}, r"ssm=BMojo\("),
        ({"predictor": torch.zeros_like}, "predictor=<built-in method zeros_like"),
        ({"attention_layers": [0, 2]}, r"attention_layers=\[0, 2\] are not all blocks; use numbers from 0 to 1"),
        ({"attention_layers": [-1]}, r"attention_layers=\[-1\]"),
        ({"attention": {"num_heads": 2}}, r"attention={'num_heads': 2} is used by no block; name its blocks"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_the_learned_predictor_of_every_block_learns_by_its_loss_alone(checkpoint_blocks: bool) -> None:
    model, trace = small(predictor="conv", checkpoint_blocks=checkpoint_blocks), Trace()
    logits, _ = model(torch.randint(11, (2, 9)), trace=trace)
    assert list(trace.losses) == ["blocks.0.mixer.predictor", "blocks.1.mixer.predictor"]
    logits.sum().backward(retain_graph=True)
    assert all(mixer.predictor_weight.grad is None for mixer in model.mixers())
    model.zero_grad()
    sum(trace.losses.values()).backward()
    assert all(mixer.predictor_weight.grad.abs().max() > 0 for mixer in model.mixers())
    assert all(mixer.key.weight.grad is None for mixer in model.mixers())


# Hybrids


def hybrid() -> BMojoLM:
    """Every other attention layer replaced, as in the official recipe."""
    return small(depth=3, attention_layers=[1], attention={"num_heads": 4, "num_kv_heads": 2})


def test_a_hybrid_has_attention_in_the_blocks_named() -> None:
    model = hybrid()
    assert [type(block.mixer) for block in model.blocks] == [BMojo, Attention, BMojo]
    assert model.blocks[1].mixer.num_kv_heads == 2
    assert model.mixers() == [model.blocks[0].mixer, model.blocks[2].mixer]


def test_attention_of_a_hybrid_is_as_that_of_b_mojo_but_for_what_is_given() -> None:
    own: dict[str, Any] = dict(num_heads=4, head_dim=6, num_kv_heads=2, rotary_base=100.0, qk_norm=False, bias=True)
    given: dict[str, Any] = dict(num_heads=8, head_dim=2, num_kv_heads=4, rotary_base=None, qk_norm=True, bias=False)

    def built(attention: dict[str, Any] | None) -> dict[str, Any]:
        mixer = small(**own, attention_layers=[1], attention=attention).blocks[1].mixer
        return dict(
            num_heads=mixer.num_heads,
            head_dim=mixer.head_dim,
            num_kv_heads=mixer.num_kv_heads,
            rotary_base=mixer.rotary and mixer.rotary.base,
            qk_norm=isinstance(mixer.key_norm, RMSNorm),
            bias=mixer.out.bias is not None,
        )

    assert built(None) == own
    assert built(given) == given
    for name, value in given.items():
        assert built({name: value}) == own | {name: value}


def test_a_hybrid_streams_and_its_state_grows_by_keys_and_values_alone() -> None:
    model, tokens = hybrid(), torch.randint(11, (2, 15))
    whole, end = model(tokens)
    first, state = model(tokens[:, :6])
    second, last = model(tokens[:, 6:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-10)
    assert last.blocks[1].nbytes > state.blocks[1].nbytes
    for states in (state, last, end):
        assert [block.nbytes for block in states.blocks[::2]] == [end.blocks[0].nbytes] * 2


# Stores


def test_a_store_is_given_to_every_layer_of_b_mojo_and_taken_away() -> None:
    model, store = hybrid(), HostStore()
    model.use_store(store)
    assert [mixer.store for mixer in model.mixers()] == [store, store]
    assert not hasattr(model.blocks[1].mixer, "store")
    model.use_store(None)
    assert [mixer.store for mixer in model.mixers()] == [None, None]


def test_layers_share_a_store_and_the_model_streams() -> None:
    model, tokens = hybrid(), torch.randint(11, (2, 15))
    with HostStore() as store, torch.no_grad():
        model.use_store(store)
        whole, _ = model(tokens)
        first, state = model(tokens[:, :6])
        second, _ = model(tokens[:, 6:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-10)


def storing(**options: Any) -> BMojoLM:
    """Weights large enough that tokens and stores make a difference; a store of which a chunk sees a part."""
    model = small(**{"num_eidetic": 2} | options)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.use_store(HostStore())
    return model


@torch.no_grad()
def test_generation_with_a_store_agrees_with_one_forward() -> None:
    model, prompt = storing(), torch.randint(11, (2, 14))
    new = torch.stack([*model.generate(prompt, 10, temperature=0)], 1)
    whole = torch.cat((prompt, new), 1)
    logits, _ = model(whole)
    assert torch.equal(logits[:, 13:-1].argmax(-1), new)
    assert len(new.unique()) > 2
    model.use_store(None)
    assert (model(whole)[0] - logits)[:, 13:].abs().amax() > 1e-3, "the store matters"


@torch.no_grad()
def test_beams_that_share_a_row_go_apart_in_the_store() -> None:
    model, prompt, more = storing(), torch.randint(11, (2, 10)), torch.randint(11, (3, 9))
    _, state = model(prompt)
    first, branched = model(more[:, :4], state.reorder([1, 0, 1]))
    chosen = [2, 0, 2]
    second, _ = model(more[:, 4:], branched.reorder(chosen))
    texts = torch.cat((prompt[[1, 0, 1]], more[:, :4]), 1)
    torch.testing.assert_close(first, model(texts)[0][:, 10:], rtol=0, atol=1e-10)
    whole = torch.cat((texts[chosen], more[:, 4:]), 1)
    torch.testing.assert_close(second, model(whole)[0][:, 14:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_documents_packed_in_a_row_do_not_see_each_other_in_a_store_that_layers_share() -> None:
    model, tokens = storing(depth=3, attention_layers=[1]), torch.randint(11, (1, 26))
    borders = [0, 9, 10, 26]
    doc_ids = torch.cat([torch.full((1, stop - start), start) for start, stop in pairwise(borders)], 1)
    packed, _ = model(tokens, doc_ids=doc_ids)
    alone = torch.cat([model(tokens[:, start:stop])[0] for start, stop in pairwise(borders)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_a_state_has_in_the_store_is_forgotten_by_every_layer() -> None:
    model, tokens = storing(depth=3, attention_layers=[1]), torch.randint(11, (2, 10))
    (_, kept), (_, state) = model(tokens), model(tokens)
    more = torch.randint(11, (2, 9))
    expected, _ = model(more, kept)
    model.forget(state)
    torch.testing.assert_close(model(more, kept)[0], expected, rtol=0, atol=0)
    store = model.mixers()[0].store
    for block in state.blocks[::2]:
        for sequence in block.eidetic_sequence.tolist():
            with pytest.raises(ValueError, match=f"sequence={sequence} is not in the store"):
                store.drop([sequence])
    model.use_store(None)
    with pytest.raises(ValueError, match="no store to forget in"):
        model.forget(kept)


@pytest.mark.parametrize("every", [True, 2])
def test_blocks_that_are_computed_twice_would_store_twice(every: bool | int) -> None:
    model = small(checkpoint_blocks=every)
    with pytest.raises(ValueError, match=f"checkpoint_blocks={every} computes blocks twice"):
        model.use_store(HostStore())
    model.use_store(None)


def test_what_the_ssm_adds_to_the_residual_stream_starts_as_small_as_the_rest() -> None:
    for added in (False, True):
        mixer = small(ssm_output=added).mixers()[0]
        assert (mixer.ssm.out.weight.std() < 0.8 * mixer.query.weight.std()) == added


def test_b_mojo_f_has_nothing_to_store() -> None:
    with pytest.raises(ValueError, match="num_eidetic=0"):
        small(num_eidetic=0).use_store(HostStore())


def test_a_model_of_attention_alone_has_no_layer_for_a_store() -> None:
    model = small(attention_layers=[0, 1])
    with pytest.raises(ValueError, match="store is given, but every block has attention"):
        model.use_store(HostStore())
    model.use_store(None)


# Cards


def test_cards_say_what_is_exact_and_what_is_a_design() -> None:
    fading, eidetic = model_card("bmojo_f_tiny"), model_card("bmojo_tiny")
    assert (fading.fidelity, eidetic.fidelity) == (Fidelity.EXACT, Fidelity.DESIGN)
    assert "eidetic part is a design that satisfies every published statement" in eidetic.to_markdown()
    assert "design" not in fading.to_markdown()
