"""CrossAttention, and the keys that ``Attention.share`` hands to it: masks, documents, streaming, the last token."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memzoo.layers import Attention, CrossAttention, DifferentialAttention, SharedKeys, SlidingWindowAttention, Trace
from memzoo.layers.reference.attention import attention as loop

EXACT = {"rtol": 0, "atol": 1e-10}
DIM, BATCH, TIME = 8, 3, 9
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2}
KINDS = {
    "plain": {"rotary_base": None},
    "rotated": {"rotary_base": 100.0, "scale": 0.4},
    "differential": {"rotary_base": None, "bias": True},
}
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1], [0] * 9]).bool()
DOCUMENTS = torch.tensor([[4] * 3 + [1] * 6, [4] * 9, [4] * 2 + [6] * 1 + [5] * 6])
GRIDS = {
    "": {},
    "mask": {"mask": MASK},
    "documents": {"doc_ids": DOCUMENTS},
    "both": {"mask": MASK, "doc_ids": DOCUMENTS},
    "nothing": {"mask": torch.zeros_like(MASK)},
}


@pytest.fixture(params=KINDS)
def layers(request) -> tuple[Attention, CrossAttention]:
    """A layer that shares, and one that reads with the same queries and outputs, so that both give the same."""
    options = HEADS | KINDS[request.param]
    if request.param == "differential":
        attention: Attention = DifferentialAttention(DIM, layer_index=2, **options)
        cross = CrossAttention(DIM, differential_layer=2, **options)
    else:
        attention, cross = Attention(DIM, **options), CrossAttention(DIM, **options)
    cross.load_state_dict({name: t for name, t in attention.state_dict().items() if name in cross.state_dict()})
    return attention.double(), cross.double()


@pytest.fixture(params=GRIDS)
def grids(request) -> dict[str, Tensor]:
    return GRIDS[request.param]


@pytest.fixture(params=[False, True], ids=["fresh", "continued"])
def is_continued(request) -> bool:
    return request.param


def tokens(batch: int = BATCH, time: int = TIME) -> Tensor:
    return torch.randn(batch, time, DIM, dtype=torch.float64)


def start(attention: Attention, is_continued: bool):
    """The state of rows that have seen 5, 2 and no tokens of document 4; or None."""
    if not is_continued:
        return None
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    return attention(tokens(time=5), mask=mask, doc_ids=torch.full((BATCH, 5), 4))[1]


def last_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The last real token of every row, and of a row without any the first."""
    places = torch.arange(TIME) if mask is None else torch.where(mask, torch.arange(TIME), 0)
    return x[torch.arange(BATCH), places.expand(BATCH, -1).amax(1)][:, None]


def test_it_is_queries_and_outputs_around_another_layers_keys_and_values():
    layer, x = CrossAttention(DIM, **HEADS).double(), tokens()
    keys, values = (torch.randn(BATCH, TIME, 2, 2, dtype=torch.float64) for _ in range(2))
    q = (x @ layer.query.weight.T).unflatten(-1, (4, 2))
    expected = loop(q, keys, values)[0].flatten(2) @ layer.out.weight.T
    torch.testing.assert_close(layer(x, SharedKeys(keys, values)), expected, **EXACT)


def test_08_it_has_no_keys_and_values_of_its_own():
    assert {*CrossAttention(DIM, **HEADS).state_dict()} == {"query.weight", "out.weight"}
    names = {*CrossAttention(DIM, bias=True, differential_layer=1, **HEADS).state_dict()}
    own = {"query.weight", "query.bias", "out.weight", "out.bias"}
    assert names == own | {f"differential.{name}" for name in ("lambda_query", "lambda_key", "norm.weight")}


def test_08_the_sharing_layers_key_projection_moves_its_outputs(layers):
    attention, cross = layers
    x = tokens()
    y = cross(x, attention.share(x)[2])
    attention.key.weight.data.mul_(1.1)
    assert (cross(x, attention.share(x)[2])[:, 1:] != y[:, 1:]).any(-1).all()


def test_sharing_changes_neither_outputs_nor_state_nor_memory(layers, grids, is_continued):
    attention, _ = layers
    x, state = tokens(), start(attention, is_continued)
    y, end, _, memory = attention.share(x, state, **grids)
    expected, last, read = attention(x, state, return_memory=True, **grids)
    assert torch.equal(y, expected)
    assert torch.equal(memory, read)
    for name, tensor in last.named_tensors().items():
        assert torch.equal(end.named_tensors()[name], tensor), name


def test_it_sees_what_the_sharing_layer_sees(layers, grids, is_continued):
    attention, cross = layers
    x, state = tokens(), start(attention, is_continued)
    y, _, shared, _ = attention.share(x, state, **grids)
    torch.testing.assert_close(cross(x, shared), y, **EXACT)


def test_the_last_token_alone_is_that_of_the_whole_call(layers, grids, is_continued):
    attention, cross = layers
    x, state = tokens(), start(attention, is_continued)
    y, end, _, memory = attention.share(x, state, **grids)
    y_last, end_last, shared, memory_last = attention.share(x, state, last_only=True, **grids)
    mask = grids.get("mask")
    torch.testing.assert_close(y_last, last_tokens(y, mask), **EXACT)
    torch.testing.assert_close(memory_last, last_tokens(memory, mask), **EXACT)
    real = torch.ones(BATCH, dtype=torch.bool) if mask is None else mask.any(1)
    read = cross(last_tokens(x, mask), shared)
    torch.testing.assert_close(read[real], last_tokens(y, mask)[real], **EXACT)
    assert read.isfinite().all()
    assert shared.rows is None
    for name, tensor in end.named_tensors().items():
        assert torch.equal(end_last.named_tensors()[name], tensor), name


def test_for_the_last_token_alone_queries_and_outputs_are_computed_once_a_row():
    attention, counts = Attention(DIM, **HEADS), {}
    for name in ("query", "key", "value", "out"):
        layer = getattr(attention, name)
        layer.register_forward_hook(lambda _, given, y, name=name: counts.update({name: tuple(given[0].shape[:2])}))
    attention.share(tokens().float(), last_only=True)
    assert counts == {"query": (BATCH, 1), "key": (BATCH, TIME), "value": (BATCH, TIME), "out": (BATCH, 1)}


@pytest.mark.parametrize("donate", [False, True])
def test_any_cutting_gives_the_outputs_of_one_call(layers, donate):
    attention, cross = layers
    x, state, outputs = tokens(), None, []
    with torch.no_grad():
        expected = cross(x, attention.share(x)[2])
        for piece in x.split([1, 4, 1, 1, 2], dim=1):
            _, state, shared, _ = attention.share(piece, state, donate=donate)
            outputs.append(cross(piece, shared))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **EXACT)


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
def test_packed_documents_equal_separate_ones_with_gradients(layers, with_mask):
    attention, cross = layers
    x = tokens(1).requires_grad_()
    documents = torch.tensor([[0, 0, 0, 0, 5, 3, 3, 3, 3]])
    mask = MASK[:1] if with_mask else torch.ones(1, TIME, dtype=torch.bool)
    packed = cross(x, attention.share(x, mask=mask, doc_ids=documents)[2])
    separate = torch.zeros_like(packed)
    for document in (0, 5, 3):
        here = mask & (documents == document)
        if here.any():
            alone = x[here][None]
            separate = separate.index_put(tuple(here.nonzero().T), cross(alone, attention.share(alone)[2])[0])
    torch.testing.assert_close(packed, separate, **EXACT)
    leaves = [x, attention.key.weight, attention.value.weight, *cross.parameters()]
    probe = torch.randn_like(packed)
    torch.testing.assert_close(
        torch.autograd.grad(packed, leaves, probe), torch.autograd.grad(separate, leaves, probe), **EXACT
    )


def test_masked_tokens_give_zero_whatever_they_hold(layers):
    attention, cross = layers
    x = tokens()
    y = cross(x, attention.share(x, mask=MASK)[2])
    x[~MASK] = torch.nan
    assert torch.equal(cross(x, attention.share(x, mask=MASK)[2]), y)
    assert not y[~MASK].any()
    last = [attention.share(x, mask=MASK, last_only=True)[i] for i in (0, 3)]
    assert all(t.isfinite().all() and not t[2].any() for t in last)


def test_a_later_token_changes_no_earlier_output(layers):
    attention, cross = layers
    x = tokens()
    y = cross(x, attention.share(x)[2])
    x[:, 6:] += 3
    assert torch.equal(cross(x, attention.share(x)[2])[:, :6], y[:, :6])


@pytest.mark.parametrize("last_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_compiles_with_the_layer_that_shares(layers, last_only):
    attention, cross = layers

    def both(x: Tensor, state=None):
        y, end, shared, _ = attention.share(x, state, mask=MASK, last_only=last_only)
        return cross(y, shared), end

    x = tokens()
    torch._dynamo.reset()  # `both` is the same code for every kind of layer
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    _, state = both(x)
    for given in (None, state):
        torch.testing.assert_close(compiled(x, given)[0], both(x, given)[0], **EXACT)


def test_under_autocast_and_in_bfloat16_it_follows_the_input(layers):
    attention, cross = (layer.float() for layer in layers)
    x, trace = tokens().float(), Trace()
    with torch.autocast("cpu", torch.bfloat16):
        for last_only in (False, True):
            y, _, shared, _ = attention.share(x, trace=trace, last_only=last_only)
            assert cross(y.float(), shared, trace=trace).dtype == torch.bfloat16
    attention, cross = attention.bfloat16(), cross.bfloat16()
    assert cross(x.bfloat16(), attention.share(x.bfloat16())[2]).dtype == torch.bfloat16
    assert not trace.losses
    assert not trace.signals


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (SlidingWindowAttention(DIM, window=3, num_heads=2), "window=3 forgets keys .*window=None"),
        (DifferentialAttention(DIM, layer_index=0, window=2, num_heads=2), "window=2 forgets keys"),
        (Attention(DIM, num_heads=2, num_prefix_tokens=4), "num_prefix_tokens=4 are read by this layer alone"),
        (Attention(DIM, num_heads=2, qk_norm=True), "qk_norm=True makes keys for normalised queries"),
    ],
)
def test_a_layer_whose_queries_see_more_or_less_does_not_share(layer, words):
    with pytest.raises(ValueError, match=words):
        layer.share(tokens().float())


def test_wrong_arguments_are_named():
    attention = Attention(DIM, **HEADS, rotary_base=None).double()
    cross = CrossAttention(DIM, **HEADS).double()
    x = tokens()
    _, state, shared, _ = attention.share(x)
    _, _, ragged, _ = attention.share(x, mask=MASK)
    _, _, later, _ = attention.share(x, state)
    other = Attention(DIM, num_heads=4, num_kv_heads=4, head_dim=2).double().share(x)[2]
    paired = DifferentialAttention(DIM, layer_index=0, **HEADS).double().share(x)[2]
    for given, keys, words in (
        (x[0], shared, r"x has shape \(9, 8\)"),
        (x.float(), shared, r"x has dtype torch.float32"),
        (x[..., 1:], shared, "built for 8"),
        (x[:2], shared, r"x has shape \(2, 9, 8\), but what is shared is for \(batch, time\) = \(3, 9\)"),
        (x[:, 1:], shared, r"\(batch, time\) = \(3, 9\)"),
        (x[:, 1:], ragged, r"\(batch, time\) = \(3, 9\)"),
        (x[:1], later, r"\(batch, time\) = \(3, 9\)"),
        (x, other, r"shared keys have shape \(3, 9, 4, 2\); .* = \(2, 2\)"),
        (x, paired, r"shared values have shape \(3, 9, 1, 4\); .* both layers must be differential, or none"),
        (
            x,
            replace(shared, rotary_base=10.0),
            "rotary_base=10.0, this layer's queries None; give both layers the same",
        ),
        (x, replace(shared, first=torch.zeros(1).long()), r"first has shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            cross(given, keys)
    with pytest.raises(ValueError, match=r"x has dtype torch.float32"):
        attention.share(x.float())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim=0"),
        ({"num_heads": 3}, "num_heads=3 is not divisible by num_kv_heads=2"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"scale": 0.0}, "scale=0.0 is not a finite number > 0"),
        ({"rotary_base": 1.0, "head_dim": 3}, "head_dim=3 is not divisible"),
        ({"num_kv_heads": 1, "differential_layer": 0}, "num_kv_heads=1 is not a multiple of 2"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        CrossAttention(**{"dim": DIM} | HEADS | options)
