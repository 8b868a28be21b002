"""ROME: the checks of its specification, what an edit reads and runs, and what taking it back leaves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers import Rome, layer_entry
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.feed_forward_site import matrix_of
from memzoo.layers.reference import rome as reference
from tests.layers.rome_cases import KINDS, answers, attach, edit_of, random, site_call
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

EVERYWHERE = pytest.mark.parametrize("name", KINDS)
F64 = torch.float64


def fitted(name: str, **options: Any) -> tuple[Rome, Tensor]:
    """An editor with a covariance, and that covariance from the equations."""
    editor, x = attach(name, **options), make_inputs(name, batch=16, dtype=F64)
    editor.fit_covariance([x])
    return editor, reference.covariance(site_call(editor, x)[0].flatten(0, 1))


def matrix(editor: Rome) -> Tensor:
    return matrix_of(editor.host.get_submodule(editor.sites[0])).detach().clone()


# The specification


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rows", [1, 3])
@EVERYWHERE
def test_01_the_key_gives_the_value(name: str, rows: int, dtype: torch.dtype) -> None:
    editor, x = attach(name, dtype=dtype), make_inputs(name, batch=rows, dtype=dtype)
    token = 0 if HOSTS[name].images else -1
    reads, before = site_call(editor, x)
    report = editor.edit([edit_of(x, 3)])
    assert 0 < report.steps <= 25
    assert report.loss < 5e-2 or report.steps == 25
    added = editor.changes.values[0]
    assert added.norm() > 0.1 * before[:, token].mean(0).norm()
    after = site_call(editor, x)[1]
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-10}
    torch.testing.assert_close(after[:, token].mean(0), before[:, token].mean(0) + added, **tolerance)
    editor.merge()
    key = reads[:, token].mean(0)
    bias = editor.host.get_submodule(editor.sites[0]).bias
    said = matrix(editor) @ key + (0 if bias is None else bias)
    torch.testing.assert_close(said, before[:, token].mean(0) + added, **tolerance)
    if rows == 1:
        assert answers(editor.host, x) == [3]


@EVERYWHERE
def test_02_an_edit_has_rank_one(name: str) -> None:
    editor, x = attach(name), make_inputs(name, batch=2, dtype=F64)
    base = matrix(editor)
    for rank, row in enumerate(x.split(1), start=1):
        editor.edit([edit_of(row, 3)])
        editor.merge()
        assert int(torch.linalg.matrix_rank(matrix(editor) - base)) == rank
        editor.unmerge()


@pytest.mark.parametrize("covariance", [False, True])
@EVERYWHERE
def test_03_what_has_nothing_of_the_key_is_as_before(name: str, covariance: bool) -> None:
    editor, square = fitted(name) if covariance else (attach(name), torch.eye(24, dtype=F64))
    x = make_inputs(name, batch=1, dtype=F64)
    key = site_call(editor, x)[0][0, 0 if HOSTS[name].images else -1]
    editor.edit([edit_of(x, 3)])
    others = random(20, 24)
    whitened = torch.linalg.inv(square) @ key
    without = others - torch.outer(others @ whitened, whitened) / (whitened @ whitened)
    assert editor.changes(others).abs().max() > 1e-2
    assert editor.changes(without).abs().max() < 1e-10


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_04_memit_of_one_fact_in_one_layer_tends_to_rome(name: str, covariance: bool) -> None:
    found, x = {}, make_inputs(name, batch=2, dtype=F64)
    for ridge in (0.0, 1e-9, 0.5):
        editor, square = fitted(name, ridge=ridge) if covariance else (attach(name, ridge=ridge), None)
        square = torch.eye(24, dtype=F64) if square is None else square
        key = site_call(editor, x)[0][:, -1].mean(0)
        editor.edit([edit_of(x, 3)])
        found[ridge] = editor.changes.matrix
        whitened = torch.linalg.inv(square) @ key
        expected = torch.outer(editor.changes.values[0], whitened) / (ridge + key @ whitened)
        torch.testing.assert_close(found[ridge], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[1e-9], found[0.0], rtol=1e-6, atol=1e-8)
    assert found[0.5].norm() < 0.99 * found[0.0].norm()


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@EVERYWHERE
def test_05_undone_and_unmerged_it_is_what_it_was_to_the_bit(name: str, ridge: float) -> None:
    host, x = make_host(name), make_inputs(name, batch=4)
    plain, base = read(host, x), copy.deepcopy(host.state_dict())
    editor = attach(name, host, ridge=ridge)
    editor.edit([edit_of(x[:1], 3)])
    one = read(host, x)
    editor.edit([edit_of(x[1:2], 4), edit_of(x[2:], 2)])
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    beside = read(host, x)
    editor.merge()
    changed = [key for key, tensor in host.state_dict().items() if not torch.equal(tensor, base[key])]
    assert changed == [f"{editor.sites[0]}.weight"]
    torch.testing.assert_close(read(host, x), beside, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"undo\(\) of a memory that is part of the host's weights"):
        editor.undo()
    editor.unmerge()
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    assert torch.equal(read(host, x), beside)
    editor.undo()
    assert torch.equal(read(host, x), one)
    assert int(editor.num_edits) == len(editor.changes) == 1
    editor.undo()
    assert torch.equal(read(host, x), plain)
    with pytest.raises(ValueError, match="holds no edits"):
        editor.undo()


# Several edits


def test_edits_of_one_call_are_written_one_after_the_other_and_undone_together() -> None:
    x = make_inputs("ours", batch=2, dtype=F64)
    first, second = attach("ours"), attach("ours")
    contradicting = [edit_of(x[:1], 3), edit_of(x[:1], 4)]
    report = first.edit(contradicting)
    apart = [second.edit([edit]) for edit in contradicting]
    assert torch.equal(first.changes.matrix, second.changes.matrix)
    assert report.steps == sum(one.steps for one in apart)
    assert report.loss == pytest.approx(sum(one.loss for one in apart) / 2)
    assert answers(first.host, x[:1]) == [4]
    first.undo()
    assert int(first.num_edits) == 0
    second.undo()
    assert answers(second.host, x[:1]) == [3]


@EVERYWHERE
def test_with_a_ridge_edits_of_one_call_are_solved_together(name: str) -> None:
    editor, square = fitted(name, ridge=0.3)
    x = make_inputs(name, batch=3, dtype=F64)
    reads = site_call(editor, x)[0][:, 0 if HOSTS[name].images else -1]
    singles = []
    for row in x.split(1):
        editor.edit([edit_of(row, 3)])
        singles.append(editor.changes.values[0].detach())
        editor.undo()
    editor.edit([edit_of(row, 3) for row in x.split(1)])
    assert torch.equal(editor.changes.values, torch.stack(singles))  # each as if it were alone
    weight, bias = random(16, 24), random(16, seed=1)
    values = (weight @ reads.T) + bias[:, None] + torch.stack(singles).T
    expected = reference.memit(weight, bias, reads.T, values, square, 0.3)
    torch.testing.assert_close(editor.changes.matrix, expected - weight, rtol=0, atol=1e-10)


# Where the key is


@pytest.mark.parametrize("subject", [None, 2])
def test_the_key_is_read_at_the_end_of_the_question_or_of_its_subject(subject: int | None) -> None:
    x = make_inputs("ours", batch=3, dtype=F64)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 5:] = mask[2, 4:] = False
    targets = torch.full_like(x, NOT_SCORED)
    targets[0, 5] = targets[1, 4] = targets[2, 3] = 3
    marked = None
    if subject is not None:
        marked = torch.zeros_like(mask)
        marked[:, 1 : subject + 1] = True
        marked[:, 5] = True  # behind two of the questions, and the end of the first
    editor = attach("ours")
    places = torch.tensor([5, 4, 3] if subject is None else [5, subject, subject])
    keys = editor.see(lambda: editor.answer(x, mask)).x[torch.arange(3), places]
    editor.edit([Edit(x, targets, mask, subject=marked)])
    direction = keys.mean(0) / keys.mean(0).square().sum()
    torch.testing.assert_close(editor.changes.directions[0], direction, rtol=0, atol=1e-12)


@pytest.mark.parametrize("token", ["first", "last"])
def test_of_an_image_a_token_is_chosen(token: Any) -> None:
    x = make_inputs("vit", batch=2, dtype=F64)
    editor = attach("vit", token=token, site="blocks.0.mlp")
    key = site_call(editor, x)[0][:, 0 if token == "first" else -1].mean(0)
    editor.edit([edit_of(x, 3)])
    torch.testing.assert_close(editor.changes.directions[0], key / key.square().sum(), rtol=0, atol=1e-12)


# What an edit takes into account, and runs


def test_what_is_unrelated_holds_an_edit_back() -> None:
    x, moved = make_inputs("ours", batch=4, dtype=F64), []
    mask = torch.ones_like(x[1:], dtype=torch.bool)
    mask[0, 3:] = False
    for weight in (0.0, 100.0):
        editor = attach("ours", kl_weight=weight)
        before = editor.answer(x[1:], mask)[torch.arange(3), mask.sum(1) - 1]
        editor.edit([edit_of(x[:1], 3, unrelated=x[1:], unrelated_mask=mask)])
        after = editor.answer(x[1:], mask)[torch.arange(3), mask.sum(1) - 1]
        moved.append(reference.divergence(before, after).item())
    assert moved[1] < 0.5 * moved[0]


def test_what_is_added_is_clamped_and_decays() -> None:
    x = make_inputs("ours", batch=1, dtype=F64)
    length = float(site_call(attach("ours"), x)[1][0, -1].norm())
    options: Any = {"stop_loss": 0.0, "max_steps": 5}
    clamped, free, decayed = (attach("ours", **options, **more) for more in ({"clamp": 0.1}, {}, {"weight_decay": 1e3}))
    for editor in (clamped, free, decayed):
        editor.edit([edit_of(x, 3)])
    lengths = [editor.changes.values.norm().item() for editor in (clamped, free, decayed)]
    assert lengths[0] == pytest.approx(0.1 * length)
    assert lengths[1] > 2 * lengths[2] > 0


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_only_what_lies_above_the_site_runs_in_every_step(name: str) -> None:
    editor, x = attach(name, max_steps=4, stop_loss=0.0), make_inputs(name, dtype=F64)
    calls = {0: 0, 1: 0}
    for layer in calls:
        place = editor.host.get_submodule(HOSTS[name].sites.format(layer))

        def count(*_: object, layer: int = layer) -> None:
            calls[layer] += 1

        up = next(module for module in place.modules() if not [*module.children()])
        own = up.forward
        up.forward = lambda *a, own=own, count=count: (count(), own(*a))[1]
    last = editor.host.get_submodule(editor.sites[0])
    editor.edit([edit_of(x[:1], 3, unrelated=x[1:])])
    assert calls == {0: 2, 1: 2}  # to record, the edit and what is unrelated
    assert last.weight.grad is None


def test_edits_go_in_whether_it_is_enabled_or_gradients_are() -> None:
    x = make_inputs("ours")[:1]
    one, other = attach("ours", dtype=torch.float32), attach("ours", dtype=torch.float32)
    one.edit([edit_of(x, 3)])
    with torch.no_grad(), other.disabled():
        other.edit([edit_of(x, 3)])
        assert not other.enabled
    assert torch.equal(one.changes.matrix, other.changes.matrix)
    assert all(parameter.grad is None for parameter in (*other.host.parameters(), *other.parameters()))


def test_the_registry_attaches_it_to_one_site() -> None:
    host = make_host("ours")
    editor = layer_entry("rome").build(host, sites=["blocks.0.ffn"], ridge=0.1)
    assert (type(editor), editor.sites, editor.host) == (Rome, ("blocks.0.ffn.down",), host)
    assert editor.options.ridge == 0.1
