"""A replayed call against the full one, bit for bit: on hosts of every kind, and on modules called in odd orders."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from memzoo.arch import HuggingFaceLM
from memzoo.layers import TempLoRA
from memzoo.layers.call_replay import CallReplay
from memzoo.layers.feed_forward_site import matrix_of
from memzoo.layers.sites import find_feed_forwards
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read


def perturb(down: nn.Module) -> nn.Parameter:
    """Add ``a D^T`` to what a layer returns, as editors do; return D."""
    delta = nn.Parameter(torch.randn(matrix_of(down).shape, generator=torch.Generator().manual_seed(3)))
    down.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ delta.T)
    return delta


def gradients(logits: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logits.square().sum(), parameters)


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Count how often the own code of each module runs, ``forward`` of its class."""
    counts = Counter[str]()

    def counted(name: str, forward):
        def run(*inputs, **keywords):
            counts[name] += 1
            return forward(*inputs, **keywords)

        return run

    for name, module in model.named_modules():
        vars(module)["forward"] = counted(name, module.forward)
    yield counts
    for module in model.modules():
        del vars(module)["forward"]


@pytest.mark.parametrize("name", HOSTS)
def test_logits_and_gradients_are_those_of_a_full_call(name):
    host = make_host(name)
    site = find_feed_forwards(host)[HOSTS[name].names[1]]
    down = site.down
    delta = perturb(down)
    inputs = make_inputs(name)
    calls = CallReplay(host, down)
    with torch.no_grad(), calls.record():
        read(host, inputs)
    with torch.no_grad():
        delta.mul_(-2)
    parameters = [delta, *down.parameters()]
    for _ in range(2):
        with calls.replay():
            again = read(host, inputs)
            own = gradients(again, parameters)
        full = read(host, inputs)
        assert torch.equal(again, full)
        assert all(map(torch.equal, own, gradients(full, parameters)))


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2", "vit"])
def test_what_comes_before_is_not_run_and_what_comes_after_is(name):
    host, inputs = make_host(name), make_inputs(name)
    down = find_feed_forwards(host)[HOSTS[name].names[1]].down
    calls = CallReplay(host, down)
    with counting(host) as recorded, calls.record():
        read(host, inputs)
    with counting(host) as replayed, calls.replay():
        read(host, inputs)
    own = next(n for n, module in host.named_modules() if module is down)
    order = list(recorded)
    before, after = order[: order.index(own)], order[order.index(own) :]
    still_open = [n for n in before if not n or own.startswith(f"{n}.")]
    assert HOSTS[name].names[0] in before
    assert all(recorded.values())
    assert dict(replayed) == {n: recorded[n] for n in still_open + after}


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_memories_beside_any_module_take_part(name, wrap):
    host, inputs = make_host(name), make_inputs(name)
    memory = TempLoRA.attach(host, rank=2, dropout=0.0, wrap=wrap)
    with torch.no_grad():
        for parameter in memory.up:
            parameter.normal_(generator=torch.Generator().manual_seed(5))
    last = max(index for index, site in enumerate(memory.sites) if site.startswith(HOSTS[name].names[1]))
    calls = CallReplay(host, host.get_submodule(memory.sites[last]))
    with calls.record():
        full = read(host, inputs)
    with calls.replay():
        again = read(host, inputs)
    assert torch.equal(again, full)
    assert torch.equal(*(gradients(logits, [memory.up[last]])[0] for logits in (again, full)))
    with memory.disabled():
        assert not torch.equal(read(host, inputs), full)


def test_a_model_of_transformers_in_our_call_reads_and_pads_as_ever():
    model = HuggingFaceLM.of(make_host("llama"))
    inputs = make_inputs("llama")
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    down = find_feed_forwards(model)["model.model.layers.1.mlp"].down
    delta, calls = perturb(down), CallReplay(model, down)
    with calls.record():
        model(inputs, mask=mask)
    with calls.replay():
        again = model(inputs, mask=mask)[0]
    full = model(inputs, mask=mask)[0]
    assert torch.equal(again, full)
    assert torch.equal(*(gradients(logits, [delta])[0] for logits in (again, full)))


def test_what_dropout_drew_before_the_module_stays():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 8))
    x = torch.ones(2, 64)
    calls = CallReplay(model, model[1])
    with calls.record():
        full = model(x)
    assert not torch.equal(model(x), full)
    with calls.replay():
        assert torch.equal(model(x), full)


class Odd(nn.Module):
    """Calls one module thrice, the last time after the site, and changes in place what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.pair, self.site = nn.Linear(4, 4), Pair(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(x)
        second = self.shared(first)
        pair = self.pair(second)
        pair["sum"] += first
        first.mul_(2)
        return self.shared(self.site(pair["sum"] + first) * pair["sizes"][1])


class Pair(nn.Module):
    """Returns tensors and numbers in a dict, and calls what its parent calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[int, int]]:
        return {"sum": self.inner(x), "sizes": (1, 3)}


def test_a_module_called_several_times_returns_in_order_and_what_is_kept_never_changes():
    model, x = Odd().double(), torch.randn(3, 4, dtype=torch.float64)
    calls = CallReplay(model, model.site)
    with calls.record():
        full = model(x)
    parameters = list(model.site.parameters())
    for _ in range(2):
        with counting(model) as counts, calls.replay():
            again = model(x)
        assert torch.equal(again, full)
        assert all(map(torch.equal, gradients(again, parameters), gradients(model(x), parameters)))
        assert counts == {"": 1, "site": 1, "shared": 1}


def test_a_later_call_inside_is_a_full_one():
    model, x = Odd(), torch.randn(3, 4)
    calls = CallReplay(model, model.site)
    with calls.record():
        model(x)
        other = model(2 * x)
    with calls.replay():
        assert torch.equal(model(-x), model(x))  # the first does not read its input
        assert torch.equal(model(2 * x), other)


def test_the_model_itself_is_a_module_with_nothing_before_it():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    calls = CallReplay(model, model)
    with calls.record():
        model(x)
    with calls.replay():
        assert torch.equal(model(2 * x), nn.functional.linear(2 * x, model.weight, model.bias))


def test_nothing_before_the_module_gets_a_gradient():
    model, x = Odd(), torch.randn(3, 4)
    calls = CallReplay(model, model.site)
    with calls.record():
        model(x)
    with calls.replay():
        model(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.pair.parameters())
    assert model.site.weight.grad is not None
    assert model.shared.weight.grad is not None  # of its last call


# What is refused, and what is left behind


def test_replay_needs_a_record():
    model = Odd()
    with pytest.raises(ValueError, match=r"replay\(\) before record\(\)"), CallReplay(model, model.site).replay():
        pass


def test_a_module_that_is_not_called_or_called_twice_is_refused():
    model, x = Odd(), torch.randn(3, 4)
    calls = CallReplay(model, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"saw no call of module=Linear"), calls.record():
        model(x)
    with pytest.raises(ValueError, match=r"saw no call of module=Linear"), calls.record():
        pass
    calls = CallReplay(model, model.shared)
    with pytest.raises(ValueError, match=r"saw 3 calls of module=Linear"), calls.record():
        model(x)
    with pytest.raises(ValueError, match="before record"), calls.replay():
        pass


def test_another_call_than_the_recorded_one_is_refused():
    model, x = Odd(), torch.randn(3, 4)
    calls = CallReplay(model, model.site)
    with calls.record():
        model(x)
    with pytest.raises(ValueError, match=r"did not come by recorded calls of \['Linear'\]"), calls.replay():
        model.pair(model.shared(x))
    with pytest.raises(ValueError, match="did not come by"), calls.replay():
        pass


@pytest.mark.parametrize("context", ["record", "replay"])
def test_modules_are_as_before_even_after_an_error_in_nested_contexts(context):
    model, x = Odd(), torch.randn(3, 4)
    vars(model.pair)["forward"] = own = model.pair.forward  # as libraries that patch modules leave it
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    outer, inner = CallReplay(model, model.site), CallReplay(model, model.pair)
    for calls in (outer, inner):
        with calls.record():
            full = model(x)
    with pytest.raises(RuntimeError, match="stop"), getattr(outer, context)(), inner.replay():
        raise RuntimeError("stop")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.pair.forward is own
    if context == "replay":
        with outer.replay():
            assert torch.equal(model(x), full)


def test_an_error_in_the_recorded_call_leaves_nothing_to_replay():
    model = Odd()
    calls = CallReplay(model, model.site)
    with calls.record():
        model(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="shape"), calls.record():
        model(torch.randn(3, 5))
    with pytest.raises(ValueError, match="before record"), calls.replay():
        pass


class InPlace(nn.Module):
    """Changes what one module before the site returned, and not what the other did."""

    def __init__(self) -> None:
        super().__init__()
        self.changed, self.left, self.site = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, side = self.changed(x), self.left(x)
        y = self.site(h.mul_(2) + side)
        return y, side


def test_only_what_the_call_changes_in_place_is_copied_for_each_replay():
    model, x = InPlace(), torch.randn(3, 4)
    returned: dict[nn.Module, list[Tensor]] = {model.changed: [], model.left: []}
    for module, own in returned.items():
        module.register_forward_hook(lambda _, inputs, output, own=own: own.append(output))
    calls = CallReplay(model, model.site)
    with torch.no_grad():
        with calls.record():
            expected, _ = model(x)
        for _ in range(3):
            with calls.replay():
                assert torch.equal(model(x)[0], expected)
    places = {module: len({output.data_ptr() for output in own[1:]}) for module, own in returned.items()}
    assert places == {model.changed: 3, model.left: 1}


def test_what_is_changed_outside_of_the_call_is_not_replayed():
    model, x = InPlace(), torch.randn(3, 4)
    calls = CallReplay(model, model.site)
    with torch.no_grad():
        with calls.record():
            model(x)
        with calls.replay():
            _, side = model(x)
        side.zero_()
        with pytest.raises(ValueError, match=r"\['Linear'\] returned was changed in place since; rec"), calls.replay():
            model(x)


def test_only_outermost_outputs_are_kept_and_memory_is_given_back():
    seen: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.append(weakref.ref(output)))
    calls = CallReplay(model, model[2])
    gc.disable()  # nothing waits for a collector of cycles
    try:
        with calls.record():
            model(torch.randn(3, 4))
        assert all(ref() is None for ref in seen)
        kept = [weakref.ref(output.again()) for _, output in calls._kept or []]
        assert len(kept) == 2  # of the inner pair and the ReLU
        with calls.replay():
            model(torch.randn(3, 4))
        assert all(ref() is None or any(ref() is own() for own in kept) for ref in seen)
        assert all(ref() is not None for ref in kept)
        del calls
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()
