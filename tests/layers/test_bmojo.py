"""BMojo against the loop, and what is left of it where parts are off; checks numbered as in the specification."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.attention import Attention, SlidingWindowAttention
from memzoo.layers.bmojo import BMojo
from memzoo.layers.reference.bmojo import bmojo as reference
from memzoo.layers.reference.bmojo import visible
from tests.layers.bmojo_cases import (
    CASES,
    DIM,
    TIMES,
    WINDOW,
    Given,
    Identity,
    assert_close,
    assert_same_bits,
    build,
    tokens,
    weights_of_a_flat_softmax,
)

NOT_ON_A_BOUNDARY = 5 * WINDOW + 2


def plain_attention(layer: BMojo, window: int | None) -> Attention:
    """Attention with the projections of a layer: full, or over a window."""
    options: dict[str, Any] = {
        "num_heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "num_kv_heads": layer.num_kv_heads,
        "qk_norm": True,
    }
    own = Attention(DIM, **options) if window is None else SlidingWindowAttention(DIM, window=window, **options)
    weights = layer.state_dict()
    own.double().load_state_dict({name: weights[name] for name in own.state_dict()})
    return own


def heads_of(layer: BMojo, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of the window, keys and values of the fading tokens: (batch, heads, time, head_dim)."""
    steps = torch.arange(x.shape[1])

    def split(z: Tensor) -> Tensor:
        return z.unflatten(-1, (-1, layer.head_dim))

    q = layer.rotary(layer.query_norm(split(layer.query(x))), steps)
    k, kf = (layer.rotary(layer.key_norm(split(layer.key(z))), steps) for z in (x, f))
    v, vf = (split(layer.value(z)) for z in (x, f))
    return tuple(z.transpose(1, 2) for z in (q, k, v, kf, vf))


def aws_masks(time: int) -> tuple[Tensor, Tensor]:
    """(time, time) bool each: of item 3 of the specification, the window, and the fading keys."""
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return (distance >= 0) & (distance < WINDOW), (distance >= WINDOW) & (distance < 2 * WINDOW)


def joined(layer: BMojo, y: Tensor) -> Tensor:
    """(batch, heads, time, head_dim) -> (batch, time, dim)."""
    return layer.out(y.transpose(1, 2).flatten(2))


# 1. The loop, and brute force.


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_01_layer_equals_the_loop_over_tokens(options, time):
    layer, x = build(**options), tokens(time=time)
    assert_close(layer(x)[0], reference(layer, x)[0])


@pytest.mark.parametrize("time", [WINDOW + 1, NOT_ON_A_BOUNDARY])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_01_gradients_of_every_parameter_equal_those_of_the_loop(options, time):
    layer, x = build(**options), tokens(time=time).requires_grad_()
    leaves, probe = [x, *layer.parameters()], tokens(time=time, seed=2)
    expected = torch.autograd.grad(reference(layer, x)[0], leaves, probe, materialize_grads=True)
    actual = torch.autograd.grad(layer(x)[0], leaves, probe, materialize_grads=True)
    assert_close(actual, expected)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_01_rows_of_any_length_equal_the_loop(options):
    layer, x, lengths = build(**options), tokens(batch=4), torch.tensor([NOT_ON_A_BOUNDARY, 0, 1, 2 * WINDOW])
    real = torch.arange(x.shape[1]) < lengths[:, None]
    y, _ = layer(x.masked_fill(~real[..., None], torch.nan), mask=real)
    assert_close(y, reference(layer, x, lengths=lengths)[0])


@pytest.mark.parametrize("time", TIMES)
def test_01_window_and_fading_keys_by_brute_force(time):
    layer, x = build(), tokens(time=time)
    q, k, v, kf, vf = heads_of(layer, x, layer.ssm(x)[0])
    window, fading = aws_masks(time)
    mask = torch.cat([fading, window], 1)
    y = F.scaled_dot_product_attention(q, torch.cat([kf, k], 2), torch.cat([vf, v], 2), mask)
    assert_close(layer(x)[0], joined(layer, y))


@pytest.mark.parametrize(
    ("i", "first", "last"),
    [(WINDOW - 1, 0, -1), (WINDOW, 0, 0), (WINDOW + 1, 0, 1), (2 * WINDOW - 1, 0, WINDOW - 1), (2 * WINDOW, 1, WINDOW)],
)
def test_01_the_first_fading_key_is_that_of_position_w(i, first, last):
    layer, x = build(), tokens(batch=1, time=2 * WINDOW + 2)
    layer.ssm = Given(DIM, x.shape[1]).double()
    (seen,) = torch.autograd.grad(layer(x)[0][0, i].sum(), layer.ssm.f)
    assert seen.abs().amax(-1).nonzero().flatten().tolist() == [*range(first, last + 1)]
    assert visible(layer, [], i)["fading"] == [*range(first, last + 1)]


@pytest.mark.parametrize(
    ("rule", "expected"),  # of the query at position 11
    [
        ({"fading_lag": WINDOW, "fading_span": 9, "fading_stride": WINDOW}, [2, 5, 8]),  # one for each past block
        ({"fading_lag": 0, "fading_span": 1}, [11]),
        ({"fading_lag": 4, "fading_span": 5, "fading_stride": 2}, [3, 5, 7]),
        ({"fading_lag": 1, "fading_span": 30, "fading_stride": 4}, [3, 7]),
    ],
)
def test_01_lag_span_and_stride_choose_the_fading_keys(rule, expected):
    layer, x = build(**rule), tokens(batch=1, time=14)
    layer.ssm = Given(DIM, x.shape[1]).double()
    (seen,) = torch.autograd.grad(layer(x)[0][0, 11].sum(), layer.ssm.f, materialize_grads=True)
    assert seen.abs().amax(-1).nonzero().flatten().tolist() == expected
    assert visible(layer, [], 11)["fading"] == expected


# 2. One softmax is two, merged by their log-sum-exp.


def test_02_two_reads_merged_by_log_sum_exp_are_the_layer():
    layer, x = build(), tokens(time=NOT_ON_A_BOUNDARY)
    q, k, v, kf, vf = heads_of(layer, x, layer.ssm(x)[0])
    parts = []
    for keys, values, mask in zip((k, kf), (v, vf), aws_masks(x.shape[1]), strict=True):
        scores = (q @ keys.mT / math.sqrt(layer.head_dim)).masked_fill(~mask, -math.inf)
        total = scores.logsumexp(-1, keepdim=True)
        parts.append((total, (scores - total.clamp_min(-1e300)).exp() @ values))  # no key at all: a sum of nothing
    (l1, o1), (l2, o2) = parts
    most = torch.maximum(l1, l2)
    y = (o1 * (l1 - most).exp() + o2 * (l2 - most).exp()) / ((l1 - most).exp() + (l2 - most).exp())
    assert_close(layer(x)[0], joined(layer, y))


def test_02_before_the_first_fading_key_it_is_sliding_window_attention():
    layer, x = build(), tokens(time=WINDOW)
    assert_close(layer(x)[0], plain_attention(layer, WINDOW)(x)[0], 1e-14)


# 3-6. What is left where parts are off.


def test_03_with_the_tokens_themselves_as_fading_tokens_the_window_is_twice_as_wide():
    layer, x = build(ssm=Identity(DIM), ssm_options=None), tokens()
    assert_close(layer(x)[0], plain_attention(layer, 2 * WINDOW)(x)[0])


def test_04_without_fading_keys_it_is_sliding_window_attention():
    layer, x = build(fading_span=0), tokens()
    assert_close(layer(x)[0], plain_attention(layer, WINDOW)(x)[0])


@pytest.mark.parametrize("options", [{}, {"fading_span": 0}])
def test_04_a_window_over_everything_is_full_attention(options):
    x = tokens()
    layer = build(window=x.shape[1], **options)
    assert_close(layer(x)[0], plain_attention(layer, None)(x)[0])


@pytest.mark.parametrize("window", [1, 2, WINDOW, 7, 40])
@pytest.mark.parametrize("selection", ["top_k", "fifo", "random"])
def test_05_with_room_for_everything_it_is_full_attention(window, selection):
    x = tokens(time=5 * WINDOW + 3)
    layer = build(
        window=window, fading_span=0, target="input", num_eidetic=x.shape[1], selection=selection, num_kv_heads=1
    )
    assert_close(layer(x)[0], plain_attention(layer, None)(x)[0])


@pytest.mark.parametrize("positions", ["true", "clamp", "none"])
def test_05_kept_tokens_stand_where_told_and_every_set_has_its_bias(positions):
    """Brute force with room for everything: logits for every pair of tokens, by their distance."""
    time, far = 5 * WINDOW + 3, 2 * WINDOW
    layer, x = build(num_eidetic=time, eidetic_positions=positions, segment_bias=True), tokens(time=time)
    steps, zeros = torch.arange(time), torch.zeros(time)
    distance = steps[:, None] - steps
    window, fading = aws_masks(time)
    f, _ = layer.ssm(x)

    def split(z: Tensor) -> Tensor:
        return z.unflatten(-1, (-1, layer.head_dim))

    q, k, kf = layer.query_norm(split(layer.query(x))), *(layer.key_norm(split(layer.key(z))) for z in (x, f))
    products = [torch.einsum("bihd,bjhd->bhij", layer.rotary(q, steps), layer.rotary(z, steps)) for z in (kf, k)]
    stand = {"true": distance, "clamp": distance.clamp(max=far), "none": 0 * distance}[positions]
    kept = torch.empty_like(products[0])
    for d in stand.unique():
        product = torch.einsum("bihd,bjhd->bhij", layer.rotary(q, zeros + d), layer.rotary(k, zeros))
        kept = torch.where(stand == d, product, kept)
    logits = [
        (product / math.sqrt(layer.head_dim) + bias[:, None, None]).masked_fill(~mask, -math.inf)
        for product, bias, mask in zip(
            [kept, *products], layer.segment_bias, [distance >= WINDOW, fading, window], strict=True
        )
    ]
    values = [split(layer.value(z)) for z in (x, f, x)]
    reads = torch.einsum("bhij,bjhd->bhid", torch.cat(logits, -1).softmax(-1), torch.cat(values, 1))
    assert_close(layer(x)[0], joined(layer, reads))


@torch.no_grad()
def test_05_dropout_leaves_out_all_kept_tokens_in_training_alone():
    layer, x = build(num_eidetic=4, eidetic_dropout=1.0), tokens()
    without = build(num_eidetic=0)
    without.load_state_dict(layer.state_dict())
    assert_close(layer(x)[0], without(x)[0])
    layer.eval()
    assert_close(layer(x)[0], reference(layer, x)[0])
    assert not torch.allclose(layer(x)[0], without(x)[0])


@torch.no_grad()
def test_05_dropout_is_drawn_row_by_row_and_leaves_the_store_alone():
    layer, x = build(num_eidetic=4, eidetic_dropout=0.5), tokens(batch=1).expand(32, -1, -1)
    torch.manual_seed(0)
    y, state = layer(x)
    torch.manual_seed(0)
    assert_same_bits(layer(x)[0], y)
    layer.eval()
    whole, kept = layer(x)
    seen = sum(torch.allclose(one, other) for one, other in zip(y, whole, strict=True))
    assert 8 <= seen <= 24
    assert_close(state, kept)


@pytest.mark.parametrize("ssm", ["mamba2", "gated_deltanet"])
def test_06_with_the_current_fading_token_alone_it_is_the_ssm(ssm):
    options = {"num_heads": 2, "head_dim": 4, "chunk_size": 4} if ssm == "gated_deltanet" else {"head_dim": 4}
    layer = build(
        ssm=ssm, ssm_options=options, num_heads=1, in_context=False, fading_lag=0, fading_span=1, num_eidetic=0
    )
    x = tokens()
    f, _ = layer.ssm(x)
    assert_close(layer(x)[0], layer.out(layer.value(f)))
    with torch.no_grad():
        layer.value.weight.copy_(torch.eye(DIM))
        layer.out.weight.copy_(torch.eye(DIM))
    assert_close(layer(x)[0], f, 1e-15)


# 12. No token is counted twice.


@pytest.mark.parametrize(
    "options",
    [
        {"num_eidetic": 4},
        {"num_eidetic": 100},
        {"num_eidetic": 5, "selection": "fifo"},
        {"num_eidetic": 5, "selection": "random", "fading_lag": 2, "fading_span": 4},
        {"num_eidetic": 5, "selection": "threshold", "threshold": 0.7, "fading_stride": 2},
        {"num_eidetic": 2, "window": 1},
    ],
    ids=str,
)
def test_12_every_query_sees_every_key_once(options):
    layer, x = build(**options, num_heads=1, qk_norm=False), tokens(batch=1)
    layer.ssm = Given(DIM, x.shape[1]).double()
    raw, fading = weights_of_a_flat_softmax(layer, x)
    _, (row,) = reference(layer, x)
    for i, seen in enumerate(row.attended):
        positions = seen["eidetic"] + seen["window"]
        assert len({*positions}) == len(positions)
        assert max(positions) == i
        share = 1 / sum(map(len, seen.values()))
        expected = torch.zeros(2, x.shape[1], dtype=x.dtype)
        expected[0, positions] = share
        expected[1, seen["fading"]] = share
        assert_close((raw[i], fading[i]), tuple(expected))


# 13. An ordinary sliding window over interleaved tokens.


def test_13_interleaving_fading_tokens_with_the_input_gives_the_same():
    layer, x = build(), tokens()
    q, k, v, kf, vf = heads_of(layer, x, layer.ssm(x)[0])
    late = F.pad(kf, (0, 0, WINDOW, 0))[:, :, : x.shape[1]], F.pad(vf, (0, 0, WINDOW, 0))[:, :, : x.shape[1]]
    keys, values = (torch.stack(pair, 3).flatten(2, 3) for pair in zip(late, (k, v), strict=True))
    place = torch.arange(2 * x.shape[1])
    distance = place[1::2, None] - place
    mask = (distance >= 0) & (distance < 2 * WINDOW) & ((place % 2 == 1) | (place >= 2 * WINDOW))
    assert_close(layer(x)[0], joined(layer, F.scaled_dot_product_attention(q, keys, values, mask)))


# 15. Shared projections.


@pytest.mark.parametrize("num_eidetic", [0, 3])
def test_15_untied_projections_with_the_same_weights_are_tied_ones(num_eidetic):
    tied, untied = (build(tie_projections=tie, num_eidetic=num_eidetic) for tie in (True, False))
    weights = tied.state_dict()
    untied.load_state_dict({name: weights[name.removeprefix("fading_")] for name in untied.state_dict()})
    assert any(name.startswith("fading_") for name in untied.state_dict())
    assert_close(tied(tokens())[0], untied(tokens())[0])


@pytest.mark.parametrize("options", [{}, {"num_eidetic": 3, "tie_projections": False, "segment_bias": True}], ids=str)
def test_15_grouped_queries_are_heads_with_repeated_keys_and_values(options):
    grouped = build(num_heads=4, num_kv_heads=2, head_dim=2, **options)
    full = build(num_heads=4, num_kv_heads=4, head_dim=2, **options)
    weights = grouped.state_dict()
    for name in weights:
        if name.startswith(("key.", "value.", "fading_key.", "fading_value.")):
            weights[name] = weights[name].unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    assert_close(grouped(tokens())[0], full(tokens())[0])
