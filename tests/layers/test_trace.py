import pytest
import torch

from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.trace import Trace


def test_names_carry_the_path_of_the_layer_and_land_in_one_dict():
    trace = Trace()
    block = trace.scope("blocks.0")
    block.signal("gate", torch.ones(2))
    block.scope("mixer").loss("balance", torch.tensor(0.5))
    assert list(trace.signals) == ["blocks.0.gate"]
    assert list(trace.losses) == ["blocks.0.mixer.balance"]


def test_losses_keep_the_graph_and_signals_do_not():
    x = torch.ones((), requires_grad=True)
    trace = Trace()
    trace.loss("balance", 2 * x)
    trace.signal("surprise", 2 * x)
    trace.losses["balance"].backward()
    assert x.grad == 2
    assert not trace.signals["surprise"].requires_grad


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"'a.balance' has shape \(2,\); reduce"):
        Trace().scope("a").loss("balance", torch.ones(2))


@pytest.mark.parametrize("kind", ["loss", "signal"])
def test_a_name_recorded_twice_is_refused(kind):
    trace = Trace()
    getattr(trace, kind)("x", torch.zeros(()))
    with pytest.raises(ValueError, match=r"'x' was recorded twice.*scope"):
        getattr(trace, kind)("x", torch.zeros(()))


def test_one_name_may_be_both_a_loss_and_a_signal():
    trace = Trace()
    trace.loss("x", torch.zeros(()))
    trace.signal("x", torch.zeros(()))
    assert trace.losses.keys() == trace.signals.keys() == {"x"}


def test_unwanted_signals_are_neither_computed_nor_kept():
    trace = Trace(signals=False)
    scope = trace.scope("a")
    scope.signal("x", torch.zeros(()))
    scope.loss("y", torch.zeros(()))
    assert not scope.wants_signals
    assert (trace.signals, list(trace.losses)) == ({}, ["a.y"])
    NeuralMemory(8, num_heads=1)(torch.randn(1, 3, 8), trace=scope)
    assert trace.signals == {}
