"""SambaY: its layer map, what its halves hand each other, states, documents."""

from typing import Any

import pytest
import torch

from memzoo.arch import CausalLMState, SambaY, create_model, part_sizes
from memzoo.arch.block import Block
from memzoo.arch.sambay_blocks import ReadingBlock, SharingBlock
from memzoo.arch.sambay_layers import layer_map
from memzoo.layers import (
    Attention,
    CrossAttention,
    GatedMemoryUnit,
    Mamba,
    RMSNorm,
    SlidingWindowAttention,
    Trace,
)
from tests.arch.sambay_cases import GATED_DELTANET, MAMBA2, VARIANTS, WINDOW, small, tokens

CLASSES = {
    "ssm": Mamba,
    "window": SlidingWindowAttention,
    "attention": Attention,
    "gmu": GatedMemoryUnit,
    "cross": CrossAttention,
}


def kinds_of(model: SambaY) -> list[str]:
    names = {cls: kind for kind, cls in CLASSES.items()}
    return [names[type(block.mixer)] for block in model.blocks]


# 5: the layer map


@pytest.mark.parametrize("depth", [8, 12, 16, 32])
def test_05_every_layer_is_of_the_kind_the_paper_says(depth: int) -> None:
    expected = []
    for index in range(depth):
        if index <= depth // 2:
            expected.append("window" if index % 2 else "ssm")
        elif index == depth // 2 + 1:
            expected.append("attention")
        else:
            expected.append("cross" if index % 2 else "gmu")
    assert list(layer_map(depth)) == expected
    quarter = depth // 4
    counts = {"ssm": quarter + 1, "window": quarter, "attention": 1, "gmu": quarter - 1, "cross": quarter - 1}
    assert {kind: expected.count(kind) for kind in counts} == counts
    if depth <= 12:
        assert kinds_of(small(depth=depth)) == expected


def test_05_32_layers_are_9_8_1_7_7() -> None:
    kinds = layer_map(32)
    assert [kinds.count(kind) for kind in ("ssm", "window", "attention", "gmu", "cross")] == [9, 8, 1, 7, 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"self_pattern": "ssm"}, ["ssm"] * 5 + ["attention", "gmu", "cross"]),
        ({"self_pattern": "window", "cross": "attention"}, ["window"] * 5 + ["attention", "cross", "cross"]),
        ({"cross": "gmu"}, ["ssm", "window", "ssm", "window", "ssm", "attention", "gmu", "gmu"]),
        ({"cross": None}, ["ssm", "window"] * 4),
        ({"self_pattern": "attention", "cross": None}, ["attention"] * 8),
        ({"self_pattern": "local_global", "cross": None}, (["window"] * 3 + ["attention"]) * 2),
    ],
)
def test_05_the_other_patterns(options: dict[str, Any], expected: list[str]) -> None:
    assert list(layer_map(8, **options)) == expected
    assert kinds_of(small(**options)) == expected


def test_05_only_the_self_decoder_has_blocks_with_a_state() -> None:
    blocks = list(small().blocks)
    assert [type(block) for block in blocks] == [Block] * 5 + [SharingBlock] + [ReadingBlock] * 2
    for block in blocks:
        assert [name for name, _ in block.named_children()] == ["mixer_norm", "mixer", "ffn_norm", "ffn"]
        assert block.dim == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 10}, "depth=10 is not a multiple of 4; use depth=8 or 12"),
        ({"depth": 2}, "depth=2 is not a multiple of 4; use depth=4"),
        ({"depth": 0}, "depth=0 is not a whole number >= 1"),
        ({"ssm": "mamba3"}, "ssm='mamba3' is not one of 'mamba', 'mamba2', 'gated_deltanet'; did you mean"),
        ({"self_pattern": "sambas"}, "self_pattern='sambas' is not one of .*did you mean 'samba'"),
        ({"cross": "gmus"}, "cross='gmus' is not one of"),
        ({"gmu_source": "mamba"}, "gmu_source='mamba' is not one of 'ssm', 'attention', 'mlp'"),
        ({"gmu_norm": "always"}, "gmu_norm='always' is not one of"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is not one of"),
        ({"backend": "fla"}, "backend='fla' is not one of 'auto', 'torch'"),
        ({"aspect_ratio": 0}, "aspect_ratio=0 is not a whole number >= 1"),
        ({"self_pattern": "window"}, "gmu_source='ssm', but layer 4 is of kind 'window'"),
        ({"num_heads": 3}, "num_heads=3 is not divisible by num_kv_heads=2"),
        ({"depth": 4}, r"depth=4 has no layer left for cross='gmu\+attention'; use depth=8, or cross=None"),
        ({"self_pattern": "attention", "cross": None, "ssm": "mamba3"}, "ssm='mamba3' is not one of"),
        ({"ssm_options": {"state_dims": 4}}, "ssm_options='state_dims' is not one of .*did you mean 'state_dim'"),
        ({"ssm_options": {"dim": 4}}, "ssm_options='dim' is not one of 'state_dim', 'conv_width'"),
        ({"ssm": "gated_deltanet", "ssm_options": {"num_head": 4}}, "ssm_options='num_head'.*did you mean 'num_heads'"),
        ({"gmu_source": "mlp", "cross": "attention"}, "gmu_source='mlp', but with cross='attention' there are no"),
        ({"gmu_source": "attention", "cross": None}, "gmu_source='attention', but with cross=None there are no"),
        ({"attention_scale": 0.0}, "attention_scale=0.0 is not a positive number"),
        ({"attention_scale": float("nan")}, "attention_scale=nan is not a positive number"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05 is not a positive number"),
        (
            {"depth": 12, "num_heads": None, "num_kv_heads": None, "differential": True},
            "num_kv_heads=3 is odd, .*use an even number, or a depth that is a multiple of 8",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_without_a_cross_decoder_four_layers_are_enough() -> None:
    assert kinds_of(small(depth=4, cross=None)) == ["ssm", "window"] * 2


def test_widths_and_heads_follow_the_depth() -> None:
    with torch.device("meta"):
        model = SambaY(16, 12)
    attention, ffn = model.blocks[7].mixer, model.blocks[7].ffn
    assert (model.dim, attention.num_heads, attention.num_kv_heads, attention.head_dim) == (1488, 12, 3, 128)
    assert ffn.gate.out_features == 4 * 1488
    assert model.blocks[1].mixer.window == 128
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_options_arrive_at_every_layer_of_attention() -> None:
    model = small(differential=True, rotary_base=50.0, attention_scale=0.25, attention_bias=True)
    layers = {index: model.blocks[index].mixer for index in (1, 3, 5, 7)}
    for index, layer in layers.items():
        assert layer.scale == 0.25
        assert layer.rotary.base == 50.0
        assert None not in (layer.query.bias, layer.out.bias)
        assert layer.differential.layer_index == index
    plain = small(num_heads=None, num_kv_heads=None)
    for layer in (plain.blocks[1].mixer, plain.blocks[5].mixer, plain.blocks[7].mixer):
        assert (layer.num_heads, layer.num_kv_heads, layer.rotary, layer.query.bias) == (8, 2, None, None)


# 3: the memory


@pytest.mark.parametrize("name", ["sambay", "sambay2", "gdny", "sambayattn", "sambaymlp"])
def test_03_gated_memory_units_read_what_the_source_read(name: str) -> None:
    """Before the source's own gate and projection; seen by hooks on the Gated Memory Unit and on the source."""
    model, seen = small(**VARIANTS[name]), {}

    def keep(key: str, value: Any) -> None:
        seen[key] = value

    model.blocks[6].mixer.register_forward_pre_hook(lambda _, inputs: keep("memory", inputs[1]))
    source = model.blocks[5 if name in ("sambayattn", "sambaymlp") else 4]
    if name == "sambaymlp":
        source.ffn.up.register_forward_hook(lambda _, inputs, output: keep("expected", output))
    elif name == "sambayattn":
        source.mixer.out.register_forward_pre_hook(lambda _, inputs: keep("expected", inputs[0]))
    else:
        source.mixer_norm.register_forward_hook(lambda _, inputs, output: keep("normed", output))
    model(tokens(2, 9))
    if "normed" in seen:
        seen["expected"] = source.mixer(seen["normed"], return_memory=True)[2]
    torch.testing.assert_close(seen["memory"], seen["expected"], rtol=0, atol=0)
    assert model.blocks[6].mixer.norm is None or name in ("sambay2", "gdny")


def test_the_gated_memory_is_normalised_where_the_released_code_does() -> None:
    for options, normed in [
        ({}, False),
        (MAMBA2, True),
        (GATED_DELTANET, True),
        (MAMBA2 | {"gmu_source": "attention"}, False),
        (MAMBA2 | {"gmu_norm": False}, False),
        ({"gmu_norm": True}, True),
    ]:
        assert (small(**options).blocks[6].mixer.norm is not None) == normed, options


# 8: what cross layers read


@pytest.mark.parametrize("name", ["sambay", "sambayda", "sambayoco", "swayoco"])
def test_08_cross_layers_have_no_keys_of_their_own_and_read_those_of_full_attention(name: str) -> None:
    model = small(**VARIANTS[name])
    cross = [block for block in model.blocks if isinstance(block.mixer, CrossAttention)]
    for block in cross:
        names = {name.split(".")[0] for name, _ in block.mixer.named_parameters()}
        assert names <= {"query", "out", "differential"}
    added: list[torch.Tensor] = []
    for block in cross:
        block.mixer.register_forward_hook(lambda _, inputs, output: added.append(output))
    # With the full attention's own output projection zero, its keys reach the stream by cross-attention alone.
    sharing = model.blocks[5].mixer
    with torch.no_grad():
        sharing.out.weight.zero_()
        before = model(tokens(2, 9))[0]
        first = added[: len(cross)]
        sharing.key.weight.mul_(-1.5)
        after = model(tokens(2, 9))[0]
    for old, new in zip(first, added[len(cross) :], strict=True):
        assert ((old - new).abs().amax((0, 2))[1:] > 1e-6).all()
    assert (before[:, 0] - after[:, 0]).abs().max() < 1e-12, "one key: its softmax is 1 whatever it is"
    assert (before[:, 1:] - after[:, 1:]).abs().amax(-1).min() > 1e-9


@pytest.mark.parametrize("name", VARIANTS)
def test_08_logits_do_not_depend_on_a_state_being_there(name: str) -> None:
    model, ids = small(**VARIANTS[name]), tokens(2, 3 * WINDOW)
    fresh, end = model(ids)
    given, same_end = model(ids, model.initial_state(2))
    torch.testing.assert_close(given, fresh, rtol=0, atol=1e-12)
    for value, other in zip(end.named_tensors().values(), same_end.named_tensors().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_09_the_future_is_not_seen(name: str) -> None:
    model, ids = small(**VARIANTS[name]), tokens(2, 12)
    logits = model(ids)[0]
    for changed in (0, 4, 11):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 13
        moved = (model(other)[0] - logits).abs().amax((0, 2))
        assert (moved[:changed] == 0).all()
        assert moved[changed] > 1e-6


def test_10_there_is_no_position_anywhere() -> None:
    """The last token's full attention does not see in which order the earlier keys came: it is a set."""
    model = small()
    assert not list(model.named_buffers())
    attention, x = model.blocks[5].mixer, torch.randn(1, 9, 16, dtype=torch.float64)
    order = torch.cat([torch.randperm(8), torch.tensor([8])])
    torch.testing.assert_close(attention(x[:, order])[0][:, -1], attention(x)[0][:, -1], rtol=0, atol=1e-12)


# 11: the state


def test_11_only_the_shared_keys_and_values_grow() -> None:
    model = small()
    states = [model(tokens(1, time))[1] for time in (20, 21, 33)]
    first, second, third = ({name: x.numel() for name, x in state.named_tensors().items()} for state in states)
    grown = {name for name in first if first[name] != second[name]}
    assert grown == {"blocks.5.keys", "blocks.5.values"}
    a_token = 2 * 2 * 4  # keys and values, kv heads, head width
    assert sum(second.values()) - sum(first.values()) == a_token
    assert sum(third.values()) - sum(first.values()) == 13 * a_token


def test_11_the_state_has_the_size_of_the_formula() -> None:
    length, depth, width, kv_heads, head_dim = 40, 8, 2 * 16, 2, 4
    state = small()(tokens(1, length))[1]
    sizes = {name: x.numel() for name, x in state.named_tensors().items() if x.is_floating_point()}
    ssm, windows = depth // 4 + 1, depth // 4
    assert sum(size for name, size in sizes.items() if name.endswith("memory")) == ssm * width * 3
    assert sum(size for name, size in sizes.items() if name.endswith("tail")) == ssm * width * 3
    rings = sum(sizes[f"blocks.{index}.{part}"] for index in (1, 3) for part in ("keys", "values"))
    assert rings == windows * WINDOW * 2 * kv_heads * head_dim
    assert sizes["blocks.5.keys"] + sizes["blocks.5.values"] == length * 2 * kv_heads * head_dim
    assert len(sizes) == 2 * ssm + 2 * windows + 2, "Gated Memory Units and cross-attention carry nothing"


def test_11_phi4_mini_flash_carries_what_the_specification_says() -> None:
    with torch.device("meta"):
        model = create_model("phi4_mini_flash").to(torch.bfloat16)
        sizes = [model(torch.zeros(1, time, dtype=torch.long))[1].nbytes for time in (1, 2)]
        state = model.initial_state(1)
    assert sizes[1] - sizes[0] == 5120
    numbers: dict[str, int] = {"memory": 0, "tail": 0, "keys": 0, "values": 0}
    for name, tensor in state.named_tensors().items():
        kind = name.rpartition(".")[2]
        if kind in numbers:
            numbers[kind] += tensor.numel()
    assert numbers == {
        "memory": 9 * 5120 * 16,  # 0.74M
        "tail": 9 * 5120 * 3,  # 0.14M
        "keys": 8 * 512 * 20 * 64,
        "values": 8 * 512 * 20 * 64,  # with the keys 10.5M
    }


def test_the_sizes_of_the_parts_add_up() -> None:
    model = small()
    state = model(tokens(2, 9))[1]
    sizes = part_sizes(model, state)
    assert sum(size.parameters for size in sizes) == model.num_parameters()
    assert sum(size.state_bytes for size in sizes) == state.nbytes // 2
    by_name = {size.part: size for size in sizes}
    assert by_name["GatedMemoryUnit"].state_bytes == by_name["CrossAttention"].state_bytes == 0
    assert by_name["GatedMemoryUnit"].count == by_name["CrossAttention"].count == 1


def test_a_state_of_another_number_of_blocks_is_refused() -> None:
    model = small()
    state = model(tokens(2, 3))[1]
    assert len(state.blocks) == 6
    with pytest.raises(ValueError, match="state is of 5 blocks, the model has 6 that carry one"):
        model(tokens(2, 1), CausalLMState(state.blocks[:5]))


# 16: documents


@pytest.mark.parametrize("name", VARIANTS)
def test_16_packed_documents_equal_separate_ones(name: str) -> None:
    """In logits and in the gradient of every parameter; the last document goes on in a second call."""
    model, ids = small(**VARIANTS[name]), tokens(2, 14)
    borders = [(0, 0, 4), (0, 4, 14), (1, 0, 9), (1, 9, 10), (1, 10, 14)]
    doc_ids = torch.zeros(2, 14, dtype=torch.long)
    for number, (row, start, stop) in enumerate(borders):
        doc_ids[row, start:stop] = number
    parameters = list(model.parameters())
    packed, state = model(ids, doc_ids=doc_ids)
    loss = packed.square().sum()
    gradients = torch.autograd.grad(loss, parameters)
    apart = torch.zeros_like(packed)
    for row, start, stop in borders:
        apart[row, start:stop] = model(ids[row : row + 1, start:stop])[0][0]
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-10)
    for gradient, expected in zip(gradients, torch.autograd.grad(apart.square().sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)
    more = tokens(2, 3, seed=5)
    going_on = model(more, state, doc_ids=torch.tensor([[1, 1, 7], [8, 8, 8]]))[0]
    whole = model(torch.cat([ids[:1, 4:], more[:1, :2]], 1))[0][:, -2:]
    torch.testing.assert_close(going_on[:1, :2], whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(going_on[1:], model(more[1:])[0], rtol=0, atol=1e-10)


# What only shows from outside


@pytest.mark.parametrize("name", ["sambay", "sambay2", "gdny"])
def test_under_autocast_the_residual_stream_and_the_recurrent_states_are_float32(name: str) -> None:
    model, streams = small(**VARIANTS[name]).float(), []
    for norm in (model.norm, *(part for block in model.blocks for part in (block.mixer_norm, block.ffn_norm))):
        norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens(2, 9))
        logits, state = model(tokens(2, 1), state)
    assert streams == [torch.float32] * (2 * 17)
    memories = [x.dtype for path, x in state.named_tensors().items() if path.endswith("memory")]
    assert memories == [torch.float32] * (5 if name == "gdny" else 3)
    assert logits.dtype == torch.bfloat16, "the head is a product as any other"


def test_checkpointed_blocks_give_equal_gradients() -> None:
    ids, gradients = tokens(2, 9), []
    for checkpoint_blocks in (False, True):
        model = small(gmu_source="mlp", checkpoint_blocks=checkpoint_blocks)
        loss = model(ids)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))


def test_traces_are_of_the_blocks_that_report() -> None:
    model, trace = small(), Trace()
    model(tokens(2, 9), trace=trace)
    reports = {name.rpartition(".")[0] for name in trace.signals if not name.endswith("_update")}
    assert reports == {f"blocks.{index}.mixer" for index in (0, 2, 4)}
