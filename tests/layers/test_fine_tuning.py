"""FineTuning: one change of one matrix that every edit trains, with and without a penalty, merged and unmerged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import FineTuning, layer_entry
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.feed_forward_site import matrix_of
from tests.layers.side_hosts import HOSTS, make_host, make_inputs, read

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
EVERYWHERE = pytest.mark.parametrize("name", HOSTS)


def edit_of(inputs: Tensor, answer: int) -> Edit:
    """Say one token after each question, or one class of each image."""
    if inputs.is_floating_point():
        return Edit(inputs, torch.full((len(inputs),), answer))
    targets = torch.full_like(inputs, NOT_SCORED)
    targets[:, -1] = answer
    return Edit(inputs, targets)


def answers(host: nn.Module, inputs: Tensor) -> list[int]:
    logits = read(host, inputs)
    return (logits if logits.dim() == 2 else logits[:, -1]).argmax(-1).tolist()  # type: ignore[no-any-return]


@BOTH
@EVERYWHERE
def test_an_edit_is_learnt_beside_the_host_and_merged_and_taken_out_to_the_bit(name: str, wrap: bool) -> None:
    host, x = make_host(name, torch.float64), make_inputs(name, batch=1, dtype=torch.float64)
    before, base = read(host, x), copy.deepcopy(host.state_dict())
    editor = FineTuning.attach(host, learning_rate=0.05, wrap=wrap)
    assert torch.equal(read(host, x), before)
    report = editor.edit([edit_of(x, 3)])
    assert answers(host, x) == [3]
    assert 0 < report.steps <= 25
    assert int(editor.num_edits) == 1
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    beside = read(host, x)
    editor.merge()
    torch.testing.assert_close(read(host, x), beside, rtol=0, atol=1e-10)
    written = [key for key, tensor in host.state_dict().items() if not torch.equal(tensor, base[key])]
    assert written == [f"{editor.sites[0]}.weight"]
    with pytest.raises(ValueError, match=r"edit\(\) of a memory that is part of the host's weights"):
        editor.edit([edit_of(x, 4)])
    editor.unmerge()
    assert all(torch.equal(tensor, base[key]) for key, tensor in host.state_dict().items())
    assert torch.equal(read(host, x), beside)
    editor.reset()
    assert torch.equal(read(host, x), before)
    assert int(editor.num_edits) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_is_fine_tuning_of_the_matrix_itself(name: str, optimizer: Any) -> None:
    """All wordings of all edits, each edit with the same weight, whole calls on the matrix itself."""
    x = make_inputs(name, batch=3, dtype=torch.float64)
    edits = [edit_of(x[:2], 3), edit_of(x[2:], 4)]
    host = make_host(name, torch.float64)
    options: Any = {"learning_rate": 0.01, "max_steps": 4, "optimizer": optimizer, "stop_loss": 0.0}
    editor = FineTuning.attach(host, **options)
    report = editor.edit(edits)
    tuned = make_host(name, torch.float64).requires_grad_(False)
    weight = tuned.get_submodule(editor.sites[0]).weight.requires_grad_()
    learning = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([weight], lr=0.01)
    loss = torch.zeros(())
    for _ in range(4):
        learning.zero_grad()
        parts = [nn.functional.cross_entropy(read(tuned, e.inputs)[:, -1], e.targets[:, -1]) for e in edits]
        loss = torch.stack(parts).mean()
        loss.backward()
        learning.step()
    layer = host.get_submodule(editor.sites[0])
    expected = matrix_of(tuned.get_submodule(editor.sites[0]))
    torch.testing.assert_close(matrix_of(layer) + editor.delta, expected, rtol=0, atol=1e-9)
    assert report.loss == pytest.approx(float(loss.detach()))
    assert report.steps == 4


def test_the_penalty_is_on_the_change_from_the_host_over_all_edits() -> None:
    x = make_inputs("ours", batch=2)

    def learnt(l2: float) -> FineTuning:
        editor = FineTuning.attach(make_host("ours"), learning_rate=0.02, max_steps=10, stop_loss=0.0, l2=l2)
        for row in x:
            editor.edit([edit_of(row[None], 3)])
        return editor

    lengths = [float(learnt(l2).delta.detach().norm()) for l2 in (0.0, 0.1, 10.0)]
    assert lengths[0] > 1.2 * lengths[1] > 1.2 * lengths[2] > 0
    editor = FineTuning.attach(make_host("ours"), learning_rate=0.1, optimizer="sgd", max_steps=1, l2=0.5)
    other = FineTuning.attach(make_host("ours"), learning_rate=0.1, optimizer="sgd", max_steps=1)
    for one in (editor, other):
        nn.init.constant_(one.delta, 0.01)
        one.edit([edit_of(x[:1], 3)])
    torch.testing.assert_close(other.delta - editor.delta, torch.full_like(editor.delta, 0.1 * 2 * 0.5 * 0.01))


def test_an_edit_stops_where_its_loss_is_small() -> None:
    x = make_inputs("ours")[:1]
    editor = FineTuning.attach(make_host("ours"), learning_rate=0.05, stop_loss=2.0)
    report = editor.edit([edit_of(x, 3)])
    assert 0 < report.steps < 25
    assert report.loss < 2.0
    before = editor.delta.detach().clone()
    report = editor.edit([edit_of(x, 3)])
    assert report.steps == 0
    assert torch.equal(editor.delta, before)
    assert (int(editor.num_edits), editor.delta.grad) == (2, None)


def test_edits_go_in_whether_it_is_enabled_or_gradients_are() -> None:
    x = make_inputs("ours")[:1]
    one, other = (FineTuning.attach(make_host("ours"), learning_rate=0.05) for _ in range(2))
    one.edit([edit_of(x, 3)])
    with torch.no_grad(), other.disabled():
        other.edit([edit_of(x, 3)])
        assert not other.enabled
    assert torch.equal(one.delta, other.delta)
    assert all(parameter.grad is None for parameter in other.host.parameters())


def test_it_goes_on_from_a_file_to_the_bit(tmp_path: Path) -> None:
    x = make_inputs("gpt2")
    first, second = (FineTuning.attach(make_host("gpt2"), learning_rate=0.01) for _ in range(2))
    first.edit([edit_of(x[:1], 3)])
    first.save(tmp_path / "change")
    second.load(tmp_path / "change")
    for editor in (first, second):
        editor.edit([edit_of(x[1:], 4)])
    assert torch.equal(first.delta, second.delta)
    assert int(second.num_edits) == 2


def test_bf16_hosts_are_changed_in_float32() -> None:
    x = make_inputs("llama")[:1]
    editor = FineTuning.attach(make_host("llama", torch.bfloat16), learning_rate=0.05)
    editor.edit([edit_of(x, 3)])
    assert editor.delta.dtype == torch.float32
    assert read(editor.host, x).dtype == torch.bfloat16
    assert answers(editor.host, x) == [3]


REFUSED = {"max_steps": 0, "stop_loss": -1.0, "learning_rate": 0.0, "optimizer": "lion", "l2": -0.1, "site": "nowhere"}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_out_of_range_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{REFUSED[option]}"):
        FineTuning.attach(make_host("ours"), **{option: REFUSED[option]})  # type: ignore[arg-type]


def test_what_is_no_edit_is_refused() -> None:
    x = make_inputs("ours")
    editor = FineTuning.attach(make_host("ours"))
    for edits, said in (([], "nothing to learn"), ([edit_of(x, 3), Edit(x, torch.full_like(x, NOT_SCORED))], "target")):
        with pytest.raises(ValueError, match=said):
            editor.edit(edits)
    assert not editor.delta.any()


@pytest.mark.parametrize("fault", ["interrupt", "diverge"])
def test_an_edit_that_fails_leaves_the_change_as_it_was(fault: str) -> None:
    host, x, calls = make_host("ours"), make_inputs("ours")[:1], [0]

    def answer(inputs: Tensor, mask: Tensor | None) -> Tensor:
        calls[0] += 1
        if calls[0] == 5 and fault == "interrupt":
            raise KeyboardInterrupt("ctrl-c")
        return read(host, inputs) * (torch.nan if calls[0] == 5 else 1.0)

    editor = FineTuning.attach(host, answer=answer, learning_rate=0.1)
    nn.init.constant_(editor.delta, 0.01)
    before = editor.delta.detach().clone()
    said = "ctrl-c" if fault == "interrupt" else r"loss of the edits is nan; lower learning_rate=0\.1"
    with pytest.raises((KeyboardInterrupt, ValueError), match=said):
        editor.edit([edit_of(x, 3)])
    assert torch.equal(editor.delta, before)
    assert (editor.delta.grad, int(editor.num_edits)) == (None, 0)


def test_the_registry_attaches_it_to_one_site() -> None:
    host = make_host("ours")
    editor = layer_entry("fine_tuning").build(host, sites=["blocks.0.ffn"], l2=0.1)
    assert (type(editor), editor.sites, editor.host) == (FineTuning, ("blocks.0.ffn.down",), host)
