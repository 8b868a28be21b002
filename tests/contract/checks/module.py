"""Checks of everything that is a module: gradients, copies, files, devices, traces, compilation."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from memzoo.layers.trace import Trace
from tests.contract.checks.core import (
    Part,
    check,
    close,
    close_state,
    gradients,
    output,
    probe,
    random_mask,
    reached_by_losses,
    same,
)

EVERY = ("mixer", "channel", "reader", "model")
SEQUENCE = ("mixer", "model")
BF16_EPS = 2.0**-8


@check(*EVERY)
def every_parameter_gets_a_gradient(part: Part) -> None:
    module = part.build()
    y = probe(output(module(part.inputs())))
    listed = {name: module.get_parameter(name) for name in sorted(reached_by_losses(module))}
    from_outputs = torch.autograd.grad(y, list(listed.values()), retain_graph=True, allow_unused=True) if listed else ()
    assert not any(g is not None and g.any() for g in from_outputs), f"outputs reach one of {list(listed)}"
    for name, gradient in gradients(module, y).items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        assert gradient.any(), f"the gradient of {name} is zero everywhere"
    if listed:
        trace = Trace(signals=False)
        module(part.inputs(), trace=trace)
        found = torch.autograd.grad(sum(trace.losses.values(), torch.zeros(())), list(listed.values()))
        assert all(g.any() for g in found), f"no loss moves one of {list(listed)}"


@check("mixer", "model")
def every_parameter_takes_part_in_a_call_that_goes_on(part: Part) -> None:
    """Distributed training waits for the gradient of every parameter, also where a state was cut from its past."""
    module = part.build()
    _, state = module(part.inputs())
    y, _ = module(part.inputs(), state.detach())
    listed = reached_by_losses(module)
    parameters = {name: p for name, p in module.named_parameters() if name not in listed}
    given = torch.autograd.grad(probe(y), list(parameters.values()), allow_unused=True)
    left_out = [name for name, gradient in zip(parameters, given, strict=True) if gradient is None]
    assert not left_out, f"no gradient reaches {left_out}"


@check(*EVERY)
def the_gradient_is_the_derivative(part: Part) -> None:
    """Along one random direction, in float64; rounding to float32 anywhere inside shows here too."""
    module, x, step = part.build(), part.inputs(), 1e-6
    listed = reached_by_losses(module)
    along = {name: p for name, p in module.named_parameters() if name not in listed}
    if x.is_floating_point():
        along["x"] = x.requires_grad_()
    generator = torch.Generator().manual_seed(5)
    direction = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in along.items()}
    loss = probe(output(module(x)))
    slope = sum(
        (g * d).sum() for g, d in zip(torch.autograd.grad(loss, list(along.values())), direction.values(), strict=True)
    )
    sides = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, tensor in along.items():
                tensor.add_(sign * step * direction[name])
            sides.append(probe(output(module(x))))
    close((sides[0] - sides[1]) / (2 * step), slope, "the derivative", tolerance=1e-6)


@check(*EVERY)
def calls_are_repeatable(part: Part) -> None:
    """Nothing is carried from call to call but the state, and no random number is drawn."""
    module, x = part.build(), part.inputs()
    before = torch.get_rng_state()
    first = output(module(x))
    module(part.inputs(time=5))
    same(output(module(x)), first, "the second call on the same input")
    same(torch.get_rng_state(), before, "the global random state")


@check(*EVERY)
def evaluation_and_no_grad_change_nothing(part: Part) -> None:
    module, x = part.build(), part.inputs()
    expected = module.train()(x)
    with torch.no_grad():
        _same_result(module(x), expected, "under no_grad")
    with torch.inference_mode():
        _same_result(module(x), expected, "under inference_mode")
    _same_result(module.eval()(x), expected, "in eval()")


@check(*EVERY)
def float32_and_bfloat16_follow_the_input(part: Part) -> None:
    """Outputs have the dtype of the module; float32 stays near float64, and bfloat16 finite."""
    expected = output(part.build()(part.inputs()))
    single = output(part.build(torch.float32)(part.inputs(dtype=torch.float32)))
    assert single.dtype == torch.float32
    _near(single, expected, "float32", 1e-4)
    half = output(part.build(torch.bfloat16)(part.inputs(dtype=torch.bfloat16)))
    assert half.isfinite().all(), "bfloat16 is not finite"
    if part.kind != "model":  # a model's logits may be float32
        assert half.dtype == torch.bfloat16, f"a bfloat16 input gives a {half.dtype} output"


@check(*EVERY)
def autocast_stays_near_float64(part: Part) -> None:
    expected = output(part.build()(part.inputs()))
    module = part.build(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = output(module(part.inputs(dtype=torch.float32)))
        found = gradients(module, probe(y))
    _near(y, expected, "bfloat16 autocast", 8 * BF16_EPS)
    for name, gradient in found.items():
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite under autocast"


@check(*EVERY)
def strides_do_not_matter(part: Part) -> None:
    module, x = part.build(), part.inputs()
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    spaced = torch.stack([x, x], 2)[:, :, 0]
    expected = output(module(x))
    for other in (transposed, spaced):
        assert not other.is_contiguous()
        close(output(module(other)), expected, "a non-contiguous input")


@check(*EVERY)
def tracing_changes_nothing(part: Part) -> None:
    module, x = part.build(), part.inputs()
    calls: list[dict[str, Tensor]] = [{}]
    if part.kind in SEQUENCE:
        mask = random_mask()
        calls += [{"mask": mask}, {"doc_ids": mask.long()}]
    for grids in calls:
        trace = Trace()
        _same_result(module(x, trace=trace, **grids), module(x, **grids), f"with a trace and {[*grids]}")
        for name, loss in trace.losses.items():
            assert loss.isfinite(), f"the loss {name!r} is not finite"
        for name, signal in trace.signals.items():
            assert not signal.requires_grad, f"the signal {name!r} carries a graph"


@check(*EVERY)
def nothing_is_left_on_the_module(part: Part) -> None:
    module, x = part.build(), part.inputs()
    before = _attributes(module)
    result = module(x, trace=Trace())
    if part.kind in SEQUENCE:
        module(x, result[1], mask=random_mask())
    after = _attributes(module)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    assert not changed, f"forward changed {changed}"


@check(*EVERY)
def deepcopies_are_equal_and_separate(part: Part) -> None:
    module, x = part.build(), part.inputs()
    expected = output(module(x)).detach()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    same(output(twin(x)).detach(), expected, "a deep copy, once the original changed")


@check(*EVERY)
def pickles_are_equal(part: Part) -> None:
    module, x = part.build(), part.inputs()
    try:
        twin = pickle.loads(pickle.dumps(module))
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(f"it does not pickle: {error}") from error
    _same_result(twin(x), module(x), "an unpickled module")


@check(*EVERY)
def the_state_dict_is_all_there_is(part: Part) -> None:
    """A second instance with other weights becomes the first by loading its ``state_dict``."""
    module, other, x = part.build(), part.build(seed=9), part.inputs()
    expected = output(module(x))
    assert not torch.equal(output(other(x)), expected)
    other.load_state_dict(module.state_dict())
    same(output(other(x)), expected, "after load_state_dict")


@check(*EVERY)
def it_builds_on_the_meta_device(part: Part) -> None:
    """And ``to_empty`` with a ``state_dict`` makes it whole: whatever is not in the file must not be needed."""
    module, x = part.build(), part.inputs()
    with torch.device("meta"):
        hollow = part.bare().to(torch.float64)
    placed = {n: t for n, t in (*hollow.named_parameters(), *hollow.named_buffers()) if not t.is_meta}
    assert not placed, f"{sorted(placed)} are not on the meta device"
    hollow.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*hollow.parameters(), *hollow.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    hollow.load_state_dict(module.state_dict())
    same(output(hollow(x)), output(module(x)), "after to_empty and load_state_dict")


@check(*EVERY)
def it_compiles_as_one_graph(part: Part) -> None:
    module, x = part.build(), part.inputs(time=3)  # the call that continues crosses borders of chunks and windows
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    try:
        expected, result = module(x), compiled(x)
    except TorchDynamoException as error:
        raise AssertionError(f"it does not compile as one graph: {error}") from error
    _close_result(result, expected, "compiled")
    ours, theirs = gradients(module, probe(output(result))), gradients(module, probe(output(expected)))
    for name, gradient in theirs.items():
        close(ours[name], gradient, f"the compiled gradient of {name}")
    if part.kind in SEQUENCE:
        state = expected[1].detach()
        mask = random_mask(time=3) if part.kind == "mixer" else None  # a model hands it on to its mixers
        _close_result(compiled(x, state, mask=mask), module(x, state, mask=mask), f"compiled, {mask=}")
    torch._dynamo.reset()


def _near(y: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    error = (y.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"{what} is off by {error:.3g} of the output's norm, more than {tolerance:.3g}"


def _same_result(actual: Any, expected: Any, what: str) -> None:
    same(output(actual), output(expected), what)
    for left, right in zip(_state_tensors(actual), _state_tensors(expected), strict=True):
        same(left, right, f"the state, {what}")


def _close_result(actual: Any, expected: Any, what: str) -> None:
    close(output(actual), output(expected), what)
    if isinstance(expected, tuple):
        close_state(actual[1], expected[1], what)


def _state_tensors(result: Any) -> list[Tensor]:
    return [*result[1].named_tensors().values()] if isinstance(result, tuple) else []


class _Held:
    """A value and, for tensors, how often it was changed in place; kept alive, so that no other takes its identity."""

    def __init__(self, value: object) -> None:
        self.value, self.version = value, value._version if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value and self.version == other.version

    __hash__ = None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Every attribute of every submodule, in a form that shows whether it was replaced or changed in place."""
    return {
        f"{path}.{name}".lstrip("."): _fingerprint(value)
        for path, child in module.named_modules()
        for name, value in vars(child).items()
    }


def _fingerprint(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fingerprint(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fingerprint(item) for item in value]
    return value if isinstance(value, int | float | str | set) else _Held(value)
