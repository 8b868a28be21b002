"""Attention and SlidingWindowAttention as layers; the op they stand on has its own tests."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from memzoo.layers import (
    Attention,
    BMojo,
    DifferentialAttention,
    MemoryAsContext,
    MixerState,
    SlidingWindowAttention,
    create_layer,
)
from memzoo.layers.reference import attention as loop

EXACT = {"rtol": 0, "atol": 1e-10}
DIM = 8
KINDS = {
    "full": lambda **options: Attention(DIM, **dict(num_heads=4, num_kv_heads=2) | options),
    "window": lambda **options: SlidingWindowAttention(DIM, **dict(window=3, num_heads=4, num_kv_heads=2) | options),
}


@pytest.fixture(params=KINDS)
def layer(request) -> Attention:
    return KINDS[request.param](num_prefix_tokens=2, qk_norm=True).double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(batch: int, time: int) -> Tensor:
    return randn(batch, time, DIM)


def rotated(x: Tensor, first: int = 0) -> Tensor:
    """Two-wide heads turned by their position, one radian a token."""
    angle = (torch.arange(x.shape[1], dtype=torch.float64) + first)[:, None]
    a, b = x[..., 0], x[..., 1]
    return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary_base", [10000.0, None])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_it_is_projections_norm_rotation_and_attention_in_this_order(kind, rotary_base, qk_norm, num_prefix_tokens):
    options = dict(rotary_base=rotary_base, qk_norm=qk_norm, num_prefix_tokens=num_prefix_tokens)
    layer = KINDS[kind](**options).double()
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    x = tokens(2, 7)

    def heads(source: Tensor, weight: Tensor, norm: torch.nn.Module | None = None) -> Tensor:
        y = (source @ weight.T).unflatten(-1, (-1, 2))
        return y if norm is None or not qk_norm else y / (y.square().mean(-1, True) + norm.eps).sqrt() * norm.weight

    q, k = heads(x, layer.query.weight, layer.query_norm), heads(x, layer.key.weight, layer.key_norm)
    if rotary_base is not None:
        q, k = rotated(q), rotated(k)
    prefix = None
    if num_prefix_tokens:
        learned = layer.prefix_tokens[None]
        prefix = heads(learned, layer.key.weight, layer.key_norm), heads(learned, layer.value.weight)
    y, _ = loop.attention(q, k, heads(x, layer.value.weight), window=layer.window, prefix=prefix)
    torch.testing.assert_close(layer(x)[0], y.flatten(2) @ layer.out.weight.T, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_norm_is_one_over_all_heads_before_they_are_split(kind):
    layer = KINDS[kind](qk_norm="full", num_prefix_tokens=2).double()
    widths = [norm.weight.numel() for norm in (layer.query_norm, layer.key_norm)]
    assert widths == [DIM, DIM // 2]  # 2 h d_h gains where there are as many key heads
    for norm in (layer.query_norm, layer.key_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    x, prefix = tokens(2, 7), layer.prefix_tokens[None]

    def heads(source: Tensor, weight: Tensor, norm: torch.nn.Module) -> Tensor:
        y = source @ weight.T
        return (y / (y.square().mean(-1, True) + norm.eps).sqrt() * norm.weight).unflatten(-1, (-1, 2))

    q = heads(x, layer.query.weight, layer.query_norm)
    k, prefix_keys = (heads(source, layer.key.weight, layer.key_norm) for source in (x, prefix))
    v, prefix_values = ((source @ layer.value.weight.T).unflatten(-1, (-1, 2)) for source in (x, prefix))
    y, _ = loop.attention(rotated(q), rotated(k), v, window=layer.window, prefix=(prefix_keys, prefix_values))
    torch.testing.assert_close(layer(x)[0], y.flatten(2) @ layer.out.weight.T, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_10_without_rotary_a_query_does_not_know_the_order_of_the_keys(kind):
    layer = KINDS[kind](rotary_base=None, window=9) if kind == "window" else KINDS[kind](rotary_base=None)
    x = tokens(1, 6).float()
    shuffled = x[:, [3, 1, 4, 0, 2, 5]]
    torch.testing.assert_close(layer(x)[0][:, -1], layer(shuffled)[0][:, -1])
    assert not torch.allclose(KINDS[kind]()(x)[0][:, -1], KINDS[kind]()(shuffled)[0][:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_added_to_all_four_projections_and_the_scale_is_that_of_the_scores(kind):
    layer = KINDS[kind](bias=True, scale=0.7, rotary_base=None).double()
    x = tokens(2, 5)
    q, k, v = (part(x).unflatten(-1, (-1, 2)) for part in (layer.query, layer.key, layer.value))
    y, _ = loop.attention(q, k, v, window=layer.window, scale=0.7)
    torch.testing.assert_close(layer(x)[0], y.flatten(2) @ layer.out.weight.T + layer.out.bias, **EXACT)
    assert [name for name, _ in KINDS[kind]().named_parameters() if "bias" in name] == []


def test_its_memory_is_what_the_heads_read_before_the_last_projection(layer):
    x, mask = tokens(2, 5), torch.tensor([[True] * 5, [False, True, True, False, True]])
    for grids in ({}, {"mask": mask}, {"mask": mask, "doc_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)}):
        y, _, memory = layer(x, return_memory=True, **grids)
        assert torch.equal(y, layer(x, **grids)[0])
        torch.testing.assert_close(layer.out(memory), y, **EXACT)
    assert memory.shape == (2, 5, layer.memory_dim)
    assert layer.memory_dim == 8


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([*KINDS]), st.lists(st.integers(1, 6), min_size=2, max_size=6), st.booleans())
def test_any_cutting_gives_the_outputs_and_state_of_one_call(kind, pieces, donate):
    layer = KINDS[kind](num_prefix_tokens=1).double()
    x = tokens(2, sum(pieces))
    with torch.no_grad():
        y, end = layer(x)
        state, outputs = None, []
        for piece in x.split(pieces, dim=1):
            out, state = layer(piece, state, donate=donate)
            outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, **EXACT)
    for name, tensor in state.named_tensors().items():
        torch.testing.assert_close(tensor, end.named_tensors()[name], **EXACT)


def test_packed_documents_equal_separate_rows_in_outputs_and_gradients(layer):
    x = tokens(1, 9).requires_grad_()
    pieces = [3, 1, 5]
    doc_ids = torch.tensor([[0, 0, 0, 4, 2, 2, 2, 2, 2]])
    packed, end = layer(x, doc_ids=doc_ids)
    separate = [layer(piece) for piece in x.split(pieces, dim=1)]
    rows = torch.cat([y for y, _ in separate], 1)
    torch.testing.assert_close(packed, rows, **EXACT)
    leaves, probe = [x, *layer.parameters()], randn(1, 9, DIM)
    torch.testing.assert_close(
        torch.autograd.grad(packed, leaves, probe, allow_unused=True),
        torch.autograd.grad(rows, leaves, probe, allow_unused=True),
        **EXACT,
    )
    last = separate[-1][1]
    assert (end.position.item(), end.document.item()) == (5, 2)
    torch.testing.assert_close(end.keys, last.keys, **EXACT)
    torch.testing.assert_close(end.values, last.values, **EXACT)


def test_nan_in_a_masked_token_reaches_no_output_state_or_gradient(layer):
    x = tokens(2, 6)
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    x[~mask] = torch.nan
    x.requires_grad_()
    y, state = layer(x, mask=mask)
    expected, expected_state = layer(x[:1, mask[0]])
    torch.testing.assert_close(y[:1, mask[0]], expected, **EXACT)
    torch.testing.assert_close(state.keys[:1], expected_state.keys, **EXACT)
    assert not y[~mask].any()
    assert not state.keys[1].any()
    assert state.position.tolist() == [4, 0]
    gradients = torch.autograd.grad(y.sum() + state.keys.sum() + state.values.sum(), [x, *layer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_call_of_masked_tokens_alone_leaves_the_state_as_it_was(layer):
    _, state = layer(tokens(2, 5))
    _, kept = layer(tokens(2, 3), state, mask=torch.zeros(2, 3, dtype=torch.bool))
    for name, tensor in kept.named_tensors().items():
        assert torch.equal(tensor, state.named_tensors()[name]), name


def test_a_state_goes_on_after_save_load_deepcopy_and_pytree_as_if_nothing_had_been(layer, tmp_path):
    with torch.no_grad():
        _, state = layer(tokens(2, 5))
        x = tokens(2, 3)
        y, _ = layer(x, state)
        state.save(tmp_path / "cache.safetensors")
        leaves, structure = pytree.tree_flatten(state)
        for same in (
            layer.initial_state(2).load(tmp_path / "cache.safetensors"),
            copy.deepcopy(state),
            pytree.tree_unflatten(leaves, structure),
        ):
            assert torch.equal(layer(x, same)[0], y)


def test_reordered_and_reset_rows_go_on_as_their_sources(layer):
    x, more = tokens(2, 5), tokens(1, 4)
    _, state = layer(x)
    state = state.reorder(torch.tensor([1, 0, 1])).reset([1])
    y, end = layer(more.expand(3, -1, -1), state)
    whole, _ = layer(torch.cat((x[1:], more), 1))
    torch.testing.assert_close(y[[0]], whole[:, 5:], **EXACT)
    torch.testing.assert_close(y[[1]], layer(more)[0], **EXACT)
    assert torch.equal(y[0], y[2])
    assert end.position.tolist() == [9, 4, 9]


def test_a_window_keeps_a_constant_state_and_full_attention_one_that_grows_by_a_token():
    def sizes(layer: Attention) -> list[int]:
        states, state = [], None
        for _ in range(6):
            _, state = layer(tokens(1, 1).float(), state)
            states.append(state)
        return [s.nbytes for s in states]

    assert len(set(sizes(KINDS["window"]()))) == 1
    growth = torch.tensor(sizes(KINDS["full"]())).diff()
    assert (growth == 2 * 2 * 2 * 4).all()  # keys and values, two heads, two wide, four bytes


def test_every_parameter_gets_a_gradient(layer):
    layer(tokens(1, 4))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_whole_fresh_and_continued(kind):
    layer = KINDS[kind](num_prefix_tokens=1)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x, step = tokens(2, 6).float(), tokens(2, 1).float()
    y, state = compiled(x)
    assert torch.equal(y, layer(x)[0])
    assert torch.equal(compiled(step, state)[0], layer(step, state)[0])


def test_under_autocast_the_cache_has_the_dtype_of_the_products(layer):
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(tokens(2, 4).float())
        again, end = layer(tokens(2, 1).float(), state)
        assert layer(tokens(2, 2).float(), layer.initial_state(2))[0].dtype == torch.bfloat16
    assert {t.dtype for t in (y, again, state.keys, end.keys, end.values)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, (2, 2, 64)),
        ({"num_heads": 4}, (4, 4, 32)),
        ({"head_dim": 16}, (8, 8, 16)),
        ({"num_heads": 3, "head_dim": 10, "num_kv_heads": 1}, (3, 1, 10)),
    ],
)
def test_the_number_and_width_of_heads_follow_from_each_other(options, heads):
    layer = Attention(128, **options)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == heads
    assert layer(torch.randn(1, 2, 128))[0].shape == (1, 2, 128)


def test_prefix_tokens_are_drawn_as_large_as_normalised_tokens_also_after_meta():
    with torch.device("meta"):
        layer = Attention(64, num_prefix_tokens=100)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert abs(layer.prefix_tokens.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 100}, r"dim=100 is not divisible by head_dim=64; use dim=64 or 128"),
        ({"dim": 10, "num_heads": 4}, r"dim=10 is not divisible by num_heads=4"),
        ({"dim": 8, "num_heads": 0}, "num_heads=0"),
        ({"dim": 8, "num_heads": 0, "head_dim": 2}, "num_heads=0"),
        ({"dim": 8, "num_heads": 2, "head_dim": 0}, "head_dim=0"),
        ({"dim": 8, "num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"dim": 9, "num_heads": 3}, "head_dim=3 is not divisible"),
        ({"dim": 8, "num_heads": 2, "rotary_base": -1.0}, "base=-1.0"),
        ({"dim": 8, "num_heads": 2, "num_prefix_tokens": -1}, "num_prefix_tokens=-1 .*use 0 for none"),
        ({"dim": 8, "num_heads": 2, "backend": "cuda"}, "backend='cuda' is not one of 'auto', 'torch', 'flash_attn'"),
        ({"dim": 8, "num_heads": 2, "window": 0}, "window=0 keeps no keys"),
        ({"dim": 8, "num_heads": 2, "qk_norm": "ful"}, "qk_norm='ful' is not one of .*did you mean 'full'"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        (SlidingWindowAttention if "window" in options else Attention)(**options)


def test_the_state_of_another_kind_of_layer_is_refused(layer):
    state = MixerState(torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"state is a MixerState, [a-zA-Z]*Attention carries AttentionState"):
        layer(tokens(1, 2), state)


def test_registered_layers_are_built_with_overrides():
    layer = create_layer("sliding_window_attention", 16, window=7)
    assert (layer.window, layer.num_heads, layer.num_kv_heads) == (7, 4, 2)
    assert create_layer("attention", 16, num_kv_heads=1).num_kv_heads == 1


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: BMojo(64, num_heads=2, **options),
        lambda **options: MemoryAsContext(16, num_heads=2, **options),
        lambda **options: DifferentialAttention(16, layer_index=1, num_heads=4, **options),
    ],
    ids=["bmojo", "memory_as_context", "differential"],
)
def test_layers_that_normalise_head_by_head_refuse_the_norm_over_all_heads(build):
    build(qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm='full' is not one of False, True"):
        build(qk_norm="full")
