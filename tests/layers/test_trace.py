import pytest
import torch

from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.trace import Trace


def rate(hits, tokens):
    return hits.sum() / tokens.sum()


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


def test_a_pooled_loss_is_one_entry_made_of_all_layers():
    trace = Trace()
    for layer, (hits, tokens) in enumerate([(1.0, 2.0), (5.0, 8.0)]):
        trace.scope(f"blocks.{layer}").pool("rate", (torch.tensor(hits), torch.tensor(tokens)), rate)
    assert trace.losses == {"rate": 6 / 10}  # of all tokens, not the mean of 1/2 and 5/8


def test_a_pooled_loss_keeps_the_graph_of_every_layer():
    trace, parts = Trace(), [torch.tensor(float(i), requires_grad=True) for i in range(4)]
    for layer, part in enumerate(parts):
        trace.scope(f"{layer}").pool("mean", (part,), torch.mean)
    trace.losses["mean"].backward()
    assert [part.grad.item() for part in parts] == [0.25] * 4


@pytest.mark.parametrize(
    ("value", "combine"), [((torch.ones(3),), torch.mean), ((torch.ones(2),), torch.sum), ((torch.ones(2),) * 2, rate)]
)
def test_layers_that_pool_in_different_ways_are_refused(value, combine):
    trace = Trace()
    trace.scope("a").pool("balance", (torch.ones(2),), torch.mean)
    with pytest.raises(ValueError, match=r"'b.balance' and 'a.balance' are pooled in different ways; give all layers"):
        trace.scope("b").pool("balance", value, combine)


def test_a_layer_that_pools_twice_is_refused():
    trace = Trace()
    trace.scope("a").pool("balance", (torch.ones(()),), torch.mean)
    with pytest.raises(ValueError, match=r"'a.balance' was recorded twice.*scope"):
        trace.scope("a").pool("balance", (torch.ones(()),), torch.mean)


def test_a_loss_does_not_hide_behind_a_pooled_one_of_its_name():
    trace = Trace()
    trace.loss("balance", torch.ones(()))
    trace.scope("a").pool("balance", (torch.ones(()),), torch.mean)
    with pytest.raises(ValueError, match="'balance' was recorded twice"):
        _ = trace.losses


def test_merged_traces_are_as_if_recorded_here():
    def report(trace):
        trace.loss("norm", torch.tensor(2.0))
        trace.scope("inner").pool("balance", (torch.tensor(3.0),), torch.mean)
        trace.signal("gate", torch.tensor(4.0))

    apart, straight = Trace(), Trace()
    for name in ("a", "b"):
        own = Trace()
        report(own)
        apart.scope(name).merge(own)
        report(straight.scope(name))
    assert apart.losses == straight.losses == {"a.norm": 2, "b.norm": 2, "balance": 3}
    assert apart.signals == straight.signals == {"a.gate": 4, "b.gate": 4}
    with pytest.raises(ValueError, match=r"'b.inner.balance' was recorded twice"):
        straight.scope("b").scope("inner").pool("balance", (torch.tensor(3.0),), torch.mean)
    again = Trace()
    again.scope("inner").pool("balance", (torch.tensor(3.0),), torch.mean)
    with pytest.raises(ValueError, match=r"'b.inner.balance' was recorded twice"):
        apart.scope("b").merge(again)


def test_merging_transforms_signals_alone():
    own, trace = Trace(), Trace()
    own.loss("x", torch.tensor(1.0))
    own.pool("y", (torch.tensor(1.0),), torch.mean)
    own.signal("x", torch.tensor(1.0))
    trace.merge(own, lambda signal: signal + 1)
    assert (trace.losses, trace.signals) == ({"x": 1, "y": 1}, {"x": 2})
