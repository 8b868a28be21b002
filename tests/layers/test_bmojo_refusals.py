"""B'MOJO: options that make no layer, and states of others, are refused."""

import math
import re

import pytest
import torch

from tests.layers.bmojo_cases import (
    DELTA,
    DIM,
    WINDOW,
    Identity,
    assert_close,
    build,
    tokens,
)

# What it refuses.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"num_eidetic": -1}, "num_eidetic=-1"),
        ({"num_heads": 2, "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"ssm": "mamba_2"}, "did you mean 'mamba2'"),
        ({"ssm": Identity(DIM), "ssm_options": {"head_dim": 4}}, "ssm_options="),
        ({"ssm": Identity(DIM + 1), "ssm_options": None}, f"dim={DIM}"),
        ({"fading_lag": -1}, "fading_lag=-1"),
        ({"fading_span": 1.5}, "fading_span=1.5"),
        ({"fading_stride": 0}, "fading_stride=0"),
        ({"target": "output"}, "target='output'"),
        ({"predictor": "mean"}, "predictor='mean'"),
        ({"predictor_taps": 0}, "predictor_taps=0"),
        ({"predictor_rate": 1.5}, "predictor_rate=1.5"),
        ({"score": "l1"}, "score='l1'"),
        ({"selection": "topk"}, "did you mean 'top_k'"),
        ({"selection": "threshold"}, "threshold=None"),
        ({"threshold": 0.5}, "selection='top_k'"),
        ({"eidetic_positions": "clip"}, "eidetic_positions='clip'"),
        ({"eidetic_dropout": -0.1}, "eidetic_dropout=-0.1"),
        ({"in_context": False, "fading_span": 0}, "in_context=False"),
        ({"num_eidetic": 2, "fading_span": 0}, "fading_span=0 leaves an SSM that nothing trains"),
        ({"segment_bias": True, "fading_span": 0}, "segment_bias=True tells one kind of keys from none"),
        ({"num_eidetic": 2, "predictor": "conv", "selection": "fifo"}, "selection='fifo' does not read"),
        ({"num_eidetic": 2, "score": "residual"}, "the SSM is a Mamba2; use ssm='gated_deltanet'"),
        ({"num_eidetic": 2, "score": "residual", "fading_span": 0} | DELTA, "the SSM is a NoneType"),
        ({"num_eidetic": 2, "score": "residual", "predictor": "previous"} | DELTA, "predictor='previous'"),
        ({"num_eidetic": 2, "score": "residual", "warmup_score": 0.0} | DELTA, "warmup_score=0.0"),
        ({"eidetic_norm": True}, "there are none or no others"),
        (
            {"eidetic_norm": True, "num_eidetic": 2, "in_context": False, "tie_projections": False},
            "there are none or no others",
        ),
        ({"predictor": torch.nn.Linear(DIM, DIM)}, "predictor=Linear has parameters that nothing would train"),
        ({"predictor": "previous", "predictor_taps": 0}, "predictor_taps=0"),
        ({"warmup_score": math.nan}, "warmup_score=nan is not a finite number"),
        ({"selection": "threshold", "threshold": "x"}, "threshold='x' is not a finite number"),
        ({"predictor_rate": "a"}, "predictor_rate='a'"),
        ({"ssm": torch.nn.Linear(DIM, DIM), "ssm_options": None}, "ssm is a Linear; use a SequenceMixer"),
    ],
)
def test_options_that_make_no_layer_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_a_layer_that_stores_nothing_asks_for_no_innovation():
    layer = build(score="residual")
    plain = build()
    assert_close(layer(tokens()), plain(tokens()))


def test_what_the_ssm_declares_as_its_outputs_is_declared():
    inner = build(ssm_output=True)
    outer = build(ssm=inner, ssm_options=None, ssm_output=True)
    assert outer.residual_outputs() == [outer.out, inner.out, inner.ssm.out]
    assert build().residual_outputs()[1:] == []


def test_a_predictor_that_returns_another_shape_is_refused():
    layer = build(num_eidetic=2, predictor=lambda past: past[..., 0, :1])
    with pytest.raises(ValueError, match=r"predictor returned shape \(2, 18, 1\); it must return .* \(2, 18, 8\)"):
        layer(tokens())


@pytest.mark.parametrize("other", [{"window": WINDOW + 1}, {"num_eidetic": 2}, {"fading_span": 0}, DELTA], ids=str)
def test_the_state_of_another_layer_is_refused(other):
    _, state = build(**other)(tokens())
    with pytest.raises(ValueError, match="previous call"):
        build(num_eidetic=3)(tokens(), state)
