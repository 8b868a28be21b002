"""MemoryGate: every form against its formula, written out."""

import pytest
import torch
from torch import Tensor

from memzoo.layers.memory_gate import FORMS, MemoryGate


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


FORMULAS = {
    "sigmoid_memory": lambda y, m, s: y * sigmoid(m),
    "sigmoid_both": lambda y, m, s: sigmoid(y) * sigmoid(m),
    "silu_memory": lambda y, m, s: y * m * sigmoid(m),
    "convex": lambda y, m, s: s * y + (1 - s) * m,
}


def build(form: str) -> MemoryGate:
    torch.manual_seed(0)
    gate = MemoryGate(6, form=form).double()
    for parameter in gate.parameters():
        parameter.data.normal_()
    return gate


def inputs() -> tuple[Tensor, Tensor]:
    y, m = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.requires_grad_(), m.requires_grad_()


def by_the_formula(gate: MemoryGate, y: Tensor, m: Tensor) -> Tensor:
    y = gate.norm.weight * y / (y.square().mean(-1, keepdim=True) + gate.norm.eps).sqrt()
    m = gate.memory_norm.weight * m / (m.square().mean(-1, keepdim=True) + gate.memory_norm.eps).sqrt()
    return FORMULAS[gate.form](y, m, None if gate.balance is None else sigmoid(gate.balance))


def test_every_form_has_a_formula():
    assert set(FORMS) == set(FORMULAS)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_formula(form):
    gate, (y, m) = build(form), inputs()
    torch.testing.assert_close(gate(y, m), by_the_formula(gate, y, m), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_both_inputs_and_every_parameter_are_those_of_the_formula(form):
    gate, (y, m) = build(form), inputs()
    leaves, probe = [y, m, *gate.parameters()], torch.randn(2, 5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(by_the_formula(gate, y, m), leaves, probe)
    torch.testing.assert_close(torch.autograd.grad(gate(y, m), leaves, probe), expected, rtol=0, atol=1e-10)
    assert all(g.any() for g in expected)


def test_only_the_convex_form_learns_a_balance_and_it_begins_in_the_middle():
    assert {form for form in FORMS if MemoryGate(6, form=form).balance is not None} == {"convex"}
    y, m = (x.float() for x in inputs())
    gate = MemoryGate(6, form="convex")
    torch.testing.assert_close(gate(y, m), (gate.norm(y) + gate.memory_norm(m)) / 2)
    assert not torch.equal(gate(y, m), gate(m, m))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_inputs_whatever_that_of_the_gains(form, dtype):
    y, m = (x.to(dtype) for x in inputs())
    assert MemoryGate(6, form=form)(y, m).dtype == dtype


def test_it_is_made_whole_after_the_meta_device():
    with torch.device("meta"):
        gate = MemoryGate(6, form="convex")
    gate = gate.to_empty(device="cpu")
    for module in gate.modules():
        module.reset_parameters()
    assert {name: p.unique().tolist() for name, p in gate.named_parameters()} == {
        "balance": [0.0],
        "norm.weight": [1.0],
        "memory_norm.weight": [1.0],
    }


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"form='sigmoid' is not one of .*did you mean 'sigmoid_"):
        MemoryGate(6, form="sigmoid")
    with pytest.raises(ValueError, match="dim=0"):
        MemoryGate(0)
    gate, (y, m) = build("convex"), inputs()
    with pytest.raises(ValueError, match=r"y has shape .* its width is 5"):
        gate(y[..., 1:], m)
    with pytest.raises(ValueError, match=r"m has shape \(2, 4, 6\), but the input has \(batch, time\) = \(2, 5\)"):
        gate(y, m[:, 1:])
