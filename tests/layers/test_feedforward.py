import pytest
import torch

from memzoo.layers import FeedForward, SwiGLU, Trace, create_layer


def test_it_is_the_formula():
    layer = SwiGLU(3, hidden_dim=5).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    gate, up, down = (weight.T for weight in (layer.gate.weight, layer.up.weight, layer.down.weight))
    gated = x @ gate
    expected = ((gated * torch.sigmoid(gated)) * (x @ up)) @ down
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "hidden"), [(768, 2048), (1024, 2752), (1536, 4096), (3, 64)])
def test_the_default_width_is_eight_thirds_rounded_up(dim, hidden):
    with torch.device("meta"):
        assert SwiGLU(dim).gate.out_features == hidden


def test_the_rounding_can_be_chosen():
    assert SwiGLU(10, multiple_of=1).gate.out_features == 27
    assert create_layer("swiglu", 16).gate.out_features == 48


def test_every_token_is_transformed_by_itself_and_nothing_is_reported():
    layer, trace = SwiGLU(4), Trace()
    x = torch.randn(2, 3, 4)
    changed = x.clone()
    changed[0, 1] += 1
    y, z = layer(x, trace=trace), layer(changed, trace=trace)
    different = (y != z).any(-1)
    assert different.tolist() == [[False, True, False], [False, False, False]]
    assert not trace.losses
    assert not trace.signals


def test_its_memory_is_the_half_that_is_not_activated():
    layer, x = SwiGLU(4, hidden_dim=6), torch.randn(2, 3, 4)
    y, memory = layer(x, return_memory=True)
    assert torch.equal(y, layer(x))
    assert torch.equal(memory, layer.up(x))
    assert memory.shape[-1] == layer.memory_dim == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 4, "hidden_dim": 0}, "hidden_dim=0"),
        ({"dim": 4, "multiple_of": -1}, "multiple_of=-1"),
    ],
)
def test_a_width_below_one_is_refused(options, words):
    with pytest.raises(ValueError, match=words + " is not a whole number >= 1"):
        SwiGLU(**options)


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 5\).*built for 4"):
        SwiGLU(4)(torch.zeros(1, 2, 5))


@pytest.mark.parametrize("bias", [False, True])
def test_the_plain_feed_forward_is_the_formula(bias):
    layer = FeedForward(3, hidden_dim=5, bias=bias).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    biases = [layer.up.bias, layer.down.bias] if bias else [0, 0]
    hidden = x @ layer.up.weight.T + biases[0]
    activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x), activated @ layer.down.weight.T + biases[1], rtol=0, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 3 * 5 + bias * (5 + 3)


def test_the_plain_feed_forward_is_four_times_as_wide_inside_unless_told():
    assert FeedForward(6).up.out_features == 24
    assert create_layer("feed_forward", 16, hidden_dim=7).down.in_features == 7


def test_the_plain_feed_forward_transforms_every_token_by_itself_and_reports_nothing():
    layer, trace = FeedForward(4), Trace()
    x = torch.randn(2, 3, 4)
    changed = x.clone()
    changed[0, 1] += 1
    different = (layer(x, trace=trace) != layer(changed, trace=trace)).any(-1)
    assert different.tolist() == [[False, True, False], [False, False, False]]
    assert not trace.losses
    assert not trace.signals


@pytest.mark.parametrize(("options", "words"), [({"dim": 0}, "dim=0"), ({"dim": 4, "hidden_dim": 0}, "hidden_dim=0")])
def test_a_plain_width_below_one_is_refused(options, words):
    with pytest.raises(ValueError, match=words + " is not a whole number >= 1"):
        FeedForward(**options)


def test_an_input_that_the_plain_feed_forward_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 5\).*built for 4"):
        FeedForward(4)(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"x has dtype torch.float64"):
        FeedForward(4)(torch.zeros(1, 2, 4, dtype=torch.float64))
