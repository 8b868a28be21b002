"""What the evaluation of a graph memory cell keeps from call to call: never stale, never saved."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from memzoo.layers.graph_memory_upkeep import set_temperature
from tests.layers.graph_memory_cases import DIM, SLOTS, assert_close, build, randn, run


def evaluated(cell, x):
    """The output in evaluation, without setting a mode that is set: that would drop what is kept."""
    with torch.no_grad():
        return (cell.eval() if cell.training else cell)(x)


def fresh(cell, x):
    """What a cell that has kept nothing gives."""
    other = build(dtype=cell.centroids.dtype)
    other.load_state_dict(cell.state_dict())
    return other(x).detach()


def step_of(optimizer, **options):
    def change(cell):
        adapt = optimizer(cell.parameters(), lr=0.1, **options)
        with torch.enable_grad():
            cell(randn(1, 4, DIM)).square().sum().backward()
        adapt.step()

    return change


def in_place(name):
    @torch.no_grad()
    def change(cell):
        cell.get_parameter(name).mul_(1.5).add_(0.1 * randn(*cell.get_parameter(name).shape))

    return change


def replace_parameters(cell):
    for module in cell.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(parameter.detach() + 0.1))


CHANGES = {
    "sgd": step_of(torch.optim.SGD),
    "adamw": step_of(torch.optim.AdamW),
    "adamw, loop": step_of(torch.optim.AdamW, foreach=False),
    "adamw, foreach": step_of(torch.optim.AdamW, foreach=True),
    "adamw, fused": step_of(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda cell: cell.load_state_dict(build(seed=9).state_dict()),
    "load_state_dict, assign": lambda cell: cell.load_state_dict(build(seed=9).state_dict(), assign=True),
    "load into the parent": lambda cell: nn.ModuleList([cell]).load_state_dict(nn.ModuleList([build(9)]).state_dict()),
    "new parameters": replace_parameters,
    "reset_parameters": lambda cell: cell.reset_parameters(),
    "vector_to_parameters": lambda cell: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(build(9).parameters()), cell.parameters()
    ),
    "temperature": lambda cell: set_temperature(cell, 0.3),
    "maintenance": lambda cell: (cell.usage.zero_(), cell.maintain(randn(7, DIM), torch.Generator().manual_seed(0))),
} | {
    f"in place: {name}": in_place(name)
    for name in (
        "centroids",
        "edges",
        "query.weight",
        "key.weight",
        "gate",
        "centroid_norm.weight",
        "movement_norm.bias",
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_never_uses_what_is_stale(change):
    cell, x = build(), randn(2, 7, DIM)
    before = evaluated(cell, x)
    assert_close(before, fresh(cell, x), 1e-12)
    CHANGES[change](cell)
    after = evaluated(cell, x)
    assert_close(after, fresh(cell, x), 1e-12)
    assert (after - before).abs().max() > 1e-4
    assert not cell.training


def test_a_commit_in_evaluation_is_seen():
    cell, x = build(write_back="deferred"), randn(2, 7, DIM)
    statistics = run(cell, x)[1].statistics
    before = evaluated(cell, x)
    cell.commit(statistics)
    assert (evaluated(cell, x) - before).abs().max() > 1e-3
    assert_close(evaluated(cell, x), fresh(cell, x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_follows_the_dtype(dtype):
    cell, x = build(), randn(2, 7, DIM)
    exact = evaluated(cell, x)
    cell.to(dtype)
    assert evaluated(cell, x.to(dtype)).dtype == dtype
    assert_close(evaluated(cell, x.to(dtype)), fresh(cell, x.to(dtype)), 1e-6 if dtype == torch.float32 else 0.02)
    assert_close(evaluated(build().to(torch.float32).double(), x), exact, 1e-4)
    cell.double()
    assert_close(evaluated(cell, x), fresh(cell, x), 1e-12)


def test_a_copy_keeps_its_own():
    cell, x = build(), randn(2, 7, DIM)
    before = evaluated(cell, x)
    other = copy.deepcopy(cell)
    assert_close(evaluated(other, x), before, 0)
    in_place("centroids")(other)
    assert_close(evaluated(other, x), fresh(other, x), 1e-12)
    assert_close(evaluated(cell, x), before, 0)
    assert (evaluated(other, x) - before).abs().max() > 1e-3


def test_other_parameters_for_one_call_are_used_for_one_call():
    cell, x, other = build(), randn(2, 7, DIM), build(seed=9)
    before = evaluated(cell, x)
    with torch.no_grad():
        assert_close(functional_call(cell, dict(other.named_parameters()), (x,)), evaluated(other, x), 0)
    assert_close(evaluated(cell, x), before, 0)


def test_an_ensemble_is_evaluated_in_one_call():
    cells, x = [build(seed=seed).eval() for seed in range(2)], randn(2, 7, DIM)
    parameters, buffers = torch.func.stack_module_state(cells)
    with torch.no_grad():
        y = torch.vmap(lambda p, b: functional_call(cells[0], (p, b), (x,)))(parameters, buffers)
    assert_close(y, torch.stack([evaluated(cell, x) for cell in cells]), 1e-12)


def test_inference_mode_and_no_grad_may_alternate():
    cell, x = build(), randn(2, 7, DIM)
    before = evaluated(cell, x)
    with torch.inference_mode():
        assert_close(cell(x), before, 0)
        in_place("edges")(cell)
        cell(x)
    assert_close(evaluated(cell, x), fresh(cell, x), 1e-12)
    cell.train()
    cell(x).sum().backward()
    with torch.inference_mode():
        made_there = build().eval()
        first = made_there(x)
        made_there.centroids.mul_(torch.linspace(1, 2, SLOTS, dtype=torch.float64)[:, None] * randn(SLOTS, DIM))
        assert (made_there(x) - first).abs().max() > 1e-3


def test_what_is_kept_is_never_saved_and_makes_evaluation_exact():
    cell, x = build(), randn(2, 7, DIM)
    names, trained, size = [*cell.state_dict()], cell(x).detach(), len(pickle.dumps(cell.eval()))
    assert_close(evaluated(cell, x), trained, 1e-12)
    assert [*cell.state_dict()] == names
    assert len(pickle.dumps(cell)) == size
    assert torch.equal(evaluated(cell, x), evaluated(cell, x))
    with torch.no_grad():
        assert cell.tables() is cell.tables()
        assert not cell.tables().projection.requires_grad
        assert cell.train().tables() is not cell.tables()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_right_after_evaluation(training):
    x, gradients = randn(2, 7, DIM), []
    for cell in (build(), build()):
        if gradients:
            evaluated(cell, x)
            if training:
                cell.train()
        token = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(cell(token).square().sum(), [token, *weights_of(cell)]))
    for right, actual in zip(*gradients, strict=True):
        assert_close(actual, right, 1e-12)
        assert actual.abs().max() > 1e-6


def weights_of(cell):
    return [parameter for name, parameter in cell.named_parameters() if name != "momentum"]
