"""ROME: files, dtypes, optimisers of its values, and what is refused or fails and leaves everything as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import Rome
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.feed_forward_site import matrix_of
from tests.layers.rome_cases import answers, attach, edit_of
from tests.layers.side_hosts import make_host, make_inputs, moe, read

F64 = torch.float64


# Files


def test_it_goes_on_from_a_file_to_the_bit(tmp_path: Path) -> None:
    x = make_inputs("gpt2", batch=16)
    first, second = attach("gpt2", dtype=torch.float32), attach("gpt2", dtype=torch.float32)
    first.fit_covariance([x])
    first.edit([edit_of(x[:1], 3)])
    first.edit([edit_of(x[1:2], 4), edit_of(x[2:3], 5)])
    first.save(tmp_path / "facts")
    second.edit([edit_of(x[5:6], 9)])
    second.load(tmp_path / "facts")
    assert int(second.num_edits) == 3
    for editor in (first, second):
        editor.edit([edit_of(x[3:4], 6)])
    assert torch.equal(first.changes.matrix, second.changes.matrix)
    for edits in (3, 1, 0):
        first.undo()
        second.undo()
        assert int(second.num_edits) == edits
        assert torch.equal(read(first.host, x), read(second.host, x))


def test_a_file_of_another_rule_or_width_is_refused_and_edits_stay(tmp_path: Path) -> None:
    x = make_inputs("ours", batch=16)
    for name, other in {"ridge": attach("ours", ridge=0.1), "token": attach("ours", token="first")}.items():
        other.save(tmp_path / name)
    wide = Rome.attach(nn.Sequential(make_host("ours").blocks[0].ffn), site="0")
    wide.save(tmp_path / "sites")
    (tmp_path / "path").write_bytes(b"nothing")
    editor = attach("ours", dtype=torch.float32)
    editor.fit_covariance([x])
    editor.edit([edit_of(x[:1], 3)])
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    for name in ("ridge", "token", "sites", "path"):
        with pytest.raises(ValueError, match=name):
            editor.load(tmp_path / name)
        assert all(torch.equal(tensor, before[key]) for key, tensor in editor.state_dict().items())


# Dtypes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16_hosts_are_changed_in_float32(name: str) -> None:
    x = make_inputs(name)[:1]
    editor = attach(name, dtype=torch.bfloat16)
    editor.edit([edit_of(x, 3, unrelated=make_inputs(name)[1:])])
    assert {tensor.dtype for tensor in (editor.changes.values, editor.changes.directions)} == {torch.float32}
    assert read(editor.host, x).dtype == torch.bfloat16
    assert answers(editor.host, x) == [3]


def test_what_is_cast_keeps_its_precision() -> None:
    x = make_inputs("ours", batch=16)
    editor = attach("ours", dtype=torch.float32)
    editor.fit_covariance([x])
    editor.edit([edit_of(x[:1], 3)])
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    nn.ModuleDict({"host": editor.host, "editor": editor}).half()
    assert editor.host.embedding.weight.dtype == torch.float16
    own = editor.state_dict()
    assert all(own[name].dtype == tensor.dtype and torch.equal(own[name], tensor) for name, tensor in before.items())


def test_it_is_learnt_under_autocast() -> None:
    x = make_inputs("ours")
    editor = attach("ours", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        editor.edit([edit_of(x[:1], 3, unrelated=x[1:])])
        assert answers(editor.host, x[:1]) == [3]
    assert editor.changes.directions.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bf16_host_is_merged_with_one_rounding(name: str) -> None:
    x = make_inputs(name)[:1]
    editor = attach(name, dtype=torch.bfloat16)
    editor.edit([edit_of(x, 3)])
    weight = matrix_of(editor.host.get_submodule(editor.sites[0]))
    base, change = weight.detach().clone(), editor.changes.matrix
    editor.merge()
    assert torch.equal(weight, (base.float() + change).bfloat16())
    assert not torch.equal(weight, base + change.bfloat16())
    assert answers(editor.host, x) == [3]
    editor.unmerge()
    assert torch.equal(weight, base)


# An optimiser of its values


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_what_is_memorized_changes_nothing_until_an_optimiser_moves_it(ridge: float) -> None:
    x = make_inputs("ours", dtype=F64)
    editor = attach("ours", ridge=ridge)
    before = read(editor.host, x)
    editor.memorize(x)
    assert torch.equal(read(editor.host, x), before)
    assert int(editor.num_edits) == len(editor.changes) == 2
    assert editor.num_parameters() == 2 * 16
    read(editor.host, x).square().sum().backward()
    assert bool(editor.changes.values.grad.any(1).all())
    editor.undo()
    assert int(editor.num_edits) == 0


def test_edits_before_the_last_stay_as_an_optimiser_moved_them() -> None:
    x = make_inputs("ours", dtype=F64)
    editor = attach("ours")
    editor.edit([edit_of(x[:1], 3)])
    editor.edit([edit_of(x[1:], 4)])
    before = editor.changes.values.detach().clone()
    read(editor.host, x).square().sum().backward()
    torch.optim.SGD(editor.parameters(), lr=0.1).step()
    moved = editor.changes.values.detach().clone()
    editor.undo()
    assert torch.equal(editor.changes.values, moved[:1])
    assert not torch.equal(moved[:1], before[:1])


def test_it_memorizes_and_estimates_whether_it_is_enabled() -> None:
    x = make_inputs("ours", batch=16, dtype=F64)
    one, other = attach("ours"), attach("ours")
    for editor in (one, other):
        editor.edit([edit_of(x[:1], 3)])
    other.enabled = False
    for editor in (one, other):
        editor.memorize(x[:2])
        editor.fit_covariance([x])
    assert not other.enabled
    assert torch.equal(one.changes.directions, other.changes.directions)


def test_what_is_read_is_kept_for_one_call_and_without_a_graph() -> None:
    x = make_inputs("ours", dtype=F64)
    editor = attach("ours")
    editor.memorize(x)  # whose values are trained, so that what the site says has a graph
    says = []
    seen = editor.see(lambda: says.append(read(editor.host, x)))
    assert not says[0].requires_grad
    assert not seen.y.requires_grad
    read(editor.host, x)
    assert editor._seen is None


def test_what_is_reset_is_counted_from_none() -> None:
    x = make_inputs("ours")
    editor = attach("ours", dtype=torch.float32)
    plain = read(editor.host, x)
    editor.edit([edit_of(x[:1], 3)])
    editor.reset()
    assert int(editor.num_edits) == len(editor.changes) == 0
    assert torch.equal(read(editor.host, x), plain)


def test_a_mask_says_where_the_key_of_what_is_memorized_is() -> None:
    x = make_inputs("ours", dtype=F64)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    short, masked = attach("ours"), attach("ours")
    short.memorize(x[:1, :4])
    masked.memorize(x, mask=mask)
    torch.testing.assert_close(masked.changes.directions[:1], short.changes.directions, rtol=0, atol=1e-12)


def test_of_rows_of_which_one_has_no_key_none_is_memorized() -> None:
    editor = Rome.attach(nn.Sequential(make_host("ours").blocks[0].ffn), site="0")
    x = torch.ones(2, 3, 16)
    x[1] = 0
    with pytest.raises(ValueError, match="a key is zero"):
        editor.memorize(x)
    assert int(editor.num_edits) == len(editor.changes) == 0
    editor.memorize(x[:1])
    assert int(editor.num_edits) == len(editor.changes) == 1


# Refusals


REFUSED = {
    "token": "middle",
    "ridge": -1.0,
    "max_steps": 0,
    "stop_loss": -1.0,
    "learning_rate": 0.0,
    "clamp": 0.0,
    "kl_weight": -1.0,
    "weight_decay": -1.0,
    "site": "nowhere",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_out_of_range_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{REFUSED[option]}"):
        Rome.attach(make_host("ours"), **{option: REFUSED[option]})


def marked(x: Tensor, *places: int) -> Tensor:
    subject = torch.zeros_like(x, dtype=torch.bool)
    subject[:, list(places)] = True
    return subject


@pytest.mark.parametrize("fault", ["none", "target", "shape", "dtype", "behind", "image"])
def test_what_is_no_edit_is_refused(fault: str) -> None:
    name = "vit" if fault == "image" else "ours"
    x = make_inputs(name)
    faults = {"shape": lambda: marked(x[:, 1:], 1), "dtype": lambda: marked(x, 1).int()}
    faults |= {"behind": lambda: marked(x, 5), "image": lambda: torch.ones(2, dtype=torch.bool)}
    said = {"none": "nothing to learn", "target": "target", "behind": "no token of the question"}.get(fault, "subject")
    editor = attach(name, dtype=torch.float32)
    edits = [] if fault == "none" else [edit_of(x, 3)]
    if fault == "target":
        edits.append(Edit(x, torch.full_like(x, NOT_SCORED)))
    elif fault == "behind":
        targets = torch.full_like(x, NOT_SCORED)
        targets[:, 3:] = 3
        edits.append(Edit(x, targets, subject=faults[fault]()))
    elif fault in faults:
        edits.append(edit_of(x, 3, subject=faults[fault]()))
    with pytest.raises(ValueError, match=said):
        editor.edit(edits)
    assert int(editor.num_edits) == len(editor.changes) == 0


def test_a_key_token_that_no_answer_depends_on_is_refused() -> None:
    """The class token alone is read behind the last layer."""
    editor = attach("vit", token="last", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"token='last'.*use token='first'"):
        editor.edit([edit_of(make_inputs("vit"), 3)])


@pytest.mark.parametrize("zero", ["reads", "says"])
def test_a_site_that_reads_or_says_nothing_is_refused(zero: str) -> None:
    host, x = make_host("plain"), make_inputs("ours")
    ffn = host.blocks[1].ffn
    for layer in (ffn.up,) if zero == "reads" else (ffn.down,):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    with pytest.raises(ValueError, match="a key is zero" if zero == "reads" else r"has the length 0\.0"):
        attach("plain", host).edit([edit_of(x, 3)])


def test_a_site_that_reads_no_rows_of_tokens_is_refused() -> None:
    host, names = moe()
    editor = Rome.attach(host, site=names[1])
    with pytest.raises(ValueError, match=r"shared_expert.*\(6, 24\).*key tokens are not known"):
        editor.edit([edit_of(make_inputs("ours")[:1], 3)])


@torch.inference_mode()
def test_nothing_is_learnt_or_estimated_in_inference_mode() -> None:
    with torch.inference_mode(False):
        editor, x = attach("ours", dtype=torch.float32), make_inputs("ours", batch=16)
        edit = edit_of(x[:1], 3)
    with pytest.raises(ValueError, match=r"edit\(\) inside of torch.inference_mode"):
        editor.edit([edit])
    with pytest.raises(ValueError, match=r"fit_covariance\(\) inside of torch.inference_mode"):
        editor.fit_covariance([x])


@pytest.mark.parametrize("fault", ["interrupt", "diverge"])
def test_an_edit_that_fails_leaves_all_as_it_was(fault: str) -> None:
    host, x, calls = make_host("ours"), make_inputs("ours"), [0]

    def answer(inputs: Tensor, mask: Tensor | None) -> Tensor:
        calls[0] += 1
        if calls[0] == 99 and fault == "interrupt":
            raise KeyboardInterrupt("ctrl-c")
        return read(host, inputs) * (torch.nan if calls[0] == 99 else 1.0)

    editor = attach("ours", host, answer=answer, stop_loss=0.0, max_steps=5)
    editor.edit([edit_of(x[:1], 3)])
    before, said = {name: tensor.clone() for name, tensor in editor.state_dict().items()}, read(host, x)
    calls[0] = 99 - 9  # the first edit of the two takes six calls
    raises = "ctrl-c" if fault == "interrupt" else r"loss of an edit is nan; lower learning_rate=0\.5"
    with pytest.raises((KeyboardInterrupt, ValueError), match=raises):
        editor.edit([edit_of(x[:1], 4), edit_of(x[1:], 4)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.state_dict().items())
    assert torch.equal(read(host, x), said)
