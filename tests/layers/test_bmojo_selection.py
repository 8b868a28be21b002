"""What BMojo keeps: surprise, the law of the largest scores, gradients; checks numbered as in the specification."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers.reference.bmojo import bmojo as reference
from memzoo.layers.reference.bmojo import keep
from memzoo.layers.trace import Trace
from tests.layers.bmojo_cases import (
    DELTA,
    DIM,
    WINDOW,
    Given,
    assert_close,
    build,
    kept_positions,
    kept_scores,
    tokens,
)

BY_SCORE: list[dict[str, Any]] = [
    {"num_eidetic": 4},
    {"num_eidetic": 7, "score": "l2", "target": "input"},
    {"num_eidetic": 3, "score": "cosine", "predictor": "previous"},
    {"num_eidetic": 4, "predictor": "conv"},
]
BY_RULE: list[dict[str, Any]] = [
    {"num_eidetic": 4, "selection": "threshold", "threshold": 0.7},
    {"num_eidetic": 20, "selection": "threshold", "threshold": 0.7},
    {"num_eidetic": 4, "selection": "fifo"},
    {"num_eidetic": 4, "selection": "random"},
]


def with_outliers(places: list[int], time: int) -> Tensor:
    """A constant stream with a token of its own at every place."""
    x = tokens(time=1).expand(-1, time, -1).clone()
    x[:, places] = tokens(time=len(places), seed=3)
    return x


# 7. Surprise.


@pytest.mark.parametrize("score", ["norm", "l2", "cosine"])
def test_07_a_constant_stream_is_surprising_at_outliers_and_right_after_alone(score):
    places, time = [5, 9, 16, 20], 8 * WINDOW
    layer = build(target="input", predictor="previous", warmup_score=0.0, num_eidetic=8, score=score)
    x, trace = with_outliers(places, time), Trace()
    surprising = sorted(places + [s + 1 for s in places])
    _, state = layer(x, trace=trace)
    assert kept_positions(state) == [surprising] * 2
    for row in trace.signals["score"]:
        assert (row > 1e-5).nonzero().flatten().tolist() == surprising


def test_07_a_periodic_stream_is_surprising_where_it_breaks_its_period():
    period, places, time = 4, [9, 14], 8 * WINDOW
    layer = build(
        target="input", predictor=lambda past: past[..., 3, :], predictor_taps=4, warmup_score=0.0, num_eidetic=4
    )
    x = tokens(time=period).repeat(1, time // period, 1)
    x[:, places] = tokens(time=len(places), seed=3)
    _, state = layer(x)
    assert kept_positions(state) == [sorted(places + [s + period for s in places])] * 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ssm", ["mamba2", "gated_deltanet"])
def test_07_an_ssm_is_surprised_by_every_outlier(ssm, seed):
    """Without a convolution, which would be surprised by an outlier until it has left all taps."""
    options = {
        "mamba2": {"head_dim": 4, "state_dim": 3, "conv_width": 1},
        "gated_deltanet": {"num_heads": 2, "head_dim": 4, "conv_width": None},
    }
    places, time = [14, 20, 27], 12 * WINDOW
    chosen = {"predictor": "previous", "warmup_score": 0.0, "num_eidetic": 2 * len(places)}
    layer = build(seed, ssm=ssm, ssm_options=options[ssm], **chosen)
    _, state = layer(with_outliers(places, time))
    assert all({*places} <= {*kept} for kept in kept_positions(state))


@pytest.mark.parametrize("warmup_score", [None, 0.0])
def test_07_the_first_tokens_surprise_unless_told_otherwise(warmup_score):
    layer = build(target="input", num_eidetic=3, warmup_score=warmup_score)
    x = tokens(time=1).expand(-1, 4 * WINDOW, -1) + 0.01 * tokens(time=4 * WINDOW, seed=3)
    _, state = layer(x)
    for kept in kept_positions(state):
        assert (min(kept) >= layer.eidetic.taps) == (warmup_score == 0.0)
        assert (kept[0] == 0) == (warmup_score is None)


# 8. The law of the largest scores.


@pytest.mark.parametrize("options", BY_SCORE, ids=str)
def test_08_a_block_sees_the_largest_scores_of_all_tokens_before_it(options):
    layer, x = build(**options), tokens(time=8 * WINDOW)
    state, lowest = None, [0.0, 0.0]
    _, rows = reference(layer, x)
    for b, piece in enumerate(x.split(WINDOW, 1), 1):
        _, state = layer(piece, state)
        positions, scores = kept_positions(state), kept_scores(state)
        for r, row in enumerate(rows):
            before = torch.tensor(row.scores[: b * WINDOW])
            assert positions[r] == sorted(before.argsort(descending=True, stable=True)[: layer.num_eidetic].tolist())
            assert positions[r] == row.kept[b]
            assert_close(torch.tensor(scores[r]), before[positions[r]].float(), 1e-6)
            if len(positions[r]) == layer.num_eidetic:
                assert min(scores[r]) >= lowest[r]
                lowest[r] = min(scores[r])
    assert kept_positions(layer(x)[1]) == positions


@pytest.mark.parametrize("options", BY_RULE, ids=str)
def test_08_block_by_block_and_at_once_keep_the_same(options):
    layer, x = build(**options), tokens(time=8 * WINDOW)
    _, rows = reference(layer, x)
    state = None
    for b, piece in enumerate(x.split(WINDOW, 1), 1):
        _, state = layer(piece, state)
        assert kept_positions(state) == [row.kept[b] for row in rows]
    assert kept_positions(layer(x)[1]) == [row.kept[-1] for row in rows]
    assert any(len(row.kept[-1]) > 1 for row in rows)


def test_08_of_equal_scores_the_earlier_tokens_stay():
    layer = build(target="input", predictor="previous", warmup_score=0.0, num_eidetic=5)
    x = tokens(time=2).repeat(1, 4 * WINDOW, 1)  # two tokens in turn: from the second on, all are equally surprising
    _, state = layer(x)
    assert kept_positions(state) == [[1, 2, 3, 4, 5]] * 2
    assert keep(layer, [0.0, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5], 7) == [1, 2, 3, 4, 5]


def test_08_a_threshold_keeps_what_lies_above_it_up_to_the_budget():
    layer = build(selection="threshold", threshold=0.5, num_eidetic=3)
    assert keep(layer, [0.5, 0.6, 0.4, 0.1], 4) == [1]
    assert keep(layer, [0.7, 0.6, 0.9, 0.8, 0.7], 5) == [0, 2, 3]


@pytest.mark.parametrize("score", ["norm", "l2"])
def test_08_a_threshold_of_zero_leaves_out_what_was_predicted_exactly(score):
    places, rule = [5, 9, 16], {"selection": "threshold", "threshold": 0.0, "warmup_score": 0.0}
    layer = build(target="input", predictor="previous", num_eidetic=20, score=score, **rule)
    _, state = layer(with_outliers(places, 8 * WINDOW))
    assert kept_positions(state) == [sorted(places + [s + 1 for s in places])] * 2


def test_08_the_rules_that_read_no_score():
    scores = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4]
    assert keep(build(selection="fifo", num_eidetic=3), scores, 8) == [5, 6, 7]
    random = build(selection="random", num_eidetic=50)
    kept = torch.tensor(keep(random, [0.0] * 400, 400))
    assert kept.tolist() == keep(random, [*range(400)], 400)
    assert 0.3 < (kept < 200).double().mean() < 0.7  # neither the first nor the last
    assert kept.diff().unique().numel() > 5  # at no fixed distance


@pytest.mark.parametrize("options", BY_SCORE, ids=str)
def test_08_scores_are_those_of_the_loop(options):
    layer, x, trace = build(**options), tokens(), Trace()
    layer(x, trace=trace)
    scores = torch.tensor([row.scores for row in reference(layer, x)[1]], dtype=x.dtype)
    assert_close(trace.signals["score"], scores)


def test_08_scores_of_half_precision_tokens_are_float32():
    layer, x = build(target="input", num_eidetic=6), tokens(batch=3, time=12 * WINDOW).bfloat16()
    exact = [row.kept[-1] for row in reference(layer, x.double())[1]]
    _, state = layer.bfloat16()(x)
    assert (state.eidetic_scores.dtype, state.pending_scores.dtype) == (torch.float32, torch.float32)
    assert kept_positions(state) == exact


# 14. Gradients.


def test_14_keys_and_values_learn_through_what_was_kept():
    layer, x = build(num_eidetic=4, fading_span=0, target="input"), tokens(batch=1).requires_grad_()
    _, (row,) = reference(layer, x)
    y, _ = layer(x)
    i = x.shape[1] - 1
    (seen,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
    assert row.attended[i]["eidetic"]
    assert seen[0].abs().amax(-1).nonzero().flatten().tolist() == row.attended[i]["eidetic"] + row.attended[i]["window"]


def test_14_with_kept_tokens_alone_projections_still_learn():
    layer, x = build(num_eidetic=4, in_context=False), tokens()
    layer.ssm = Given(DIM, x.shape[1]).double()
    with torch.no_grad():
        layer.ssm.f.zero_()
    for g in torch.autograd.grad(
        layer(x)[0].square().sum(), [layer.query.weight, layer.key.weight, layer.value.weight]
    ):
        assert g.any()


@pytest.mark.parametrize("options", [{}, {"tie_projections": False, "eidetic_positions": "clamp"}], ids=str)
def test_14_gradients_by_finite_differences(options):
    layer, x = build(num_eidetic=2, **options), tokens(batch=1, time=2 * WINDOW + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)


@pytest.mark.parametrize("predictor", ["ema", "previous", "conv"])
def test_14_nothing_is_differentiated_through_the_choice(predictor):
    layer, x = build(num_eidetic=4, predictor=predictor), tokens().requires_grad_()
    y, state = layer(x)
    assert not any(part.requires_grad for part in (state.eidetic_scores, state.targets))
    grads = torch.autograd.grad(y.sum(), layer.parameters(), allow_unused=True)
    unused = [name for (name, _), g in zip(layer.named_parameters(), grads, strict=True) if g is None]
    assert len(unused) == (predictor == "conv")


def test_14_a_learned_predictor_learns_from_its_own_error_alone():
    layer, x, trace = build(num_eidetic=4, predictor="conv"), tokens().requires_grad_(), Trace()
    layer(x, trace=trace)
    (loss,) = trace.losses.values()
    leaves = dict(layer.named_parameters()) | {"x": x}
    grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    assert [name for name, g in zip(leaves, grads, strict=True) if g is not None] == ["predictor_weight"]


# What is reported.


def test_signals_tell_what_comes_and_how_old_it_is():
    layer, x = build(num_eidetic=4), tokens(time=4 * WINDOW + 2)
    _, rows = reference(layer, x)
    state, seen, kept = None, 0, [set[int](), set[int]()]
    for piece in x.split([2 * WINDOW, 1, 2 * WINDOW, 1], 1):
        trace = Trace()
        _, state = layer(piece, state, trace=trace)
        seen += piece.shape[1]
        for r, row in enumerate(rows):
            now = {*row.kept[seen // WINDOW]}
            assert float(trace.signals["eidetic_turnover"][r]) == pytest.approx(len(now - kept[r]) / len(now))
            assert float(trace.signals["eidetic_age"][r]) == pytest.approx(seen - sum(now) / len(now))
            kept[r] = now


@pytest.mark.parametrize("score", ["norm", "cosine"])
@torch.no_grad()
def test_scores_do_not_depend_on_the_scale_of_the_target(score):
    layer, x = build(num_eidetic=4, target="input", score=score), tokens()
    traces = Trace(), Trace()
    layer(x, trace=traces[0])
    layer(1e-8 * x, trace=traces[1])
    assert_close(traces[1].signals["score"], traces[0].signals["score"])


# 19. The innovation of a delta rule.


@torch.no_grad()
def test_19_what_a_delta_rule_corrects_is_the_score():
    layer, x, trace = build(num_eidetic=4, score="residual", **DELTA), tokens(), Trace()
    _, state = layer(x, trace=trace)
    ssm, scores = layer.ssm, trace.signals["score"]
    projected, _ = ssm.conv(ssm.query_key_value(x))
    q, k, v = projected.split(ssm.widths, dim=-1)
    q, k = (part.unflatten(-1, (ssm.rule.num_heads, -1)) for part in (q, k))
    v, gates = v.unflatten(-1, (ssm.rule.num_value_heads, -1)), ssm.gates(x)
    _, k = ssm.rule.prepare(q, k, torch.arange(x.shape[1]))
    beta, log_decay = ssm.rule.gate_values(gates, v)
    for row in range(len(x)):
        memory, expected = torch.zeros(*ssm.rule.state_shape).double(), []
        for t in range(x.shape[1]):
            memory = memory * log_decay[row, t, :, None, None].exp()
            error = beta[row, t, :, None] * (v[row, t] - torch.einsum("hk,hkv->hv", k[row, t], memory))
            memory = memory + torch.einsum("hk,hv->hkv", k[row, t], error)
            expected.append(error.norm())
        assert_close(scores[row], torch.stack(expected))
        ended = x.shape[1] // WINDOW * WINDOW
        best = torch.stack(expected)[:ended].topk(4).indices.sort().values
        assert kept_positions(state)[row] == best.tolist()


@torch.no_grad()
def test_what_the_ssm_gives_can_be_added():
    """A delta rule's own read beside a cache of the tokens it was wrong about: the composition of arXiv 2607.02303."""
    options = {"num_eidetic": 3, "fading_span": 0, "window": 2, "score": "residual"} | DELTA
    layer, x = build(**options, ssm_output=True, eidetic_norm=True), tokens()
    y, state = layer(x)
    assert state.fading_keys is None
    fading, _ = layer.ssm(x)
    assert (y - fading).abs().amax(-1).all()
    layer.out.weight.zero_()
    assert_close(layer(x)[0], fading)
