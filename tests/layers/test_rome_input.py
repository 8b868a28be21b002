"""ROME: padding, masks and batches that it reads; inference mode and autocast; what fails and changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memzoo.layers import FineTuning, Rome
from memzoo.layers.editor import NOT_SCORED, Edit
from memzoo.layers.feed_forward_site import matrix_of
from tests.layers.rome_cases import attach, edit_of, site_call
from tests.layers.side_hosts import make_host, make_inputs, moe, read

F64 = torch.float64
EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-9}
SIDES = pytest.mark.parametrize("sides", [(3, 0), (0, 3), (2, 1)], ids=["left", "right", "both"])


# Padding


def padded(x: Tensor, sides: tuple[int, int], value: int = 7) -> tuple[Tensor, Tensor]:
    return F.pad(x, sides, value=value), F.pad(torch.ones_like(x, dtype=torch.bool), sides)


@SIDES
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_edit_is_the_same_with_padding_on_any_side(name: str, sides: tuple[int, int]) -> None:
    question, unrelated = make_inputs(name, batch=1, dtype=F64)[:, :5], make_inputs(name, batch=4, dtype=F64)[3:, :4]
    plain, other = attach(name, kl_weight=1.0, max_steps=6), attach(name, kl_weight=1.0, max_steps=6)
    edit = edit_of(question, 3, unrelated=unrelated)
    plain.edit([edit])
    targets = F.pad(edit.targets, sides, value=NOT_SCORED)
    tokens, mask = padded(question, sides)
    other.edit([Edit(tokens, targets, mask, *padded(unrelated, sides, 9))])
    torch.testing.assert_close(other.changes.matrix, plain.changes.matrix, **EXACT)
    assert plain.changes.matrix.abs().max() > 1e-2


@SIDES
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_keys_and_the_covariance_are_the_same_with_padding_on_any_side(name: str, sides: tuple[int, int]) -> None:
    x = make_inputs(name, batch=16, dtype=F64)
    tokens, mask = padded(x, sides)
    plain, other = attach(name), attach(name)
    plain.fit_covariance([x])
    other.fit_covariance([(tokens, mask)])
    torch.testing.assert_close(other.changes.covariance_factor, plain.changes.covariance_factor, **EXACT)
    plain.memorize(x[:2])
    other.memorize(tokens[:2], mask=mask[:2])
    torch.testing.assert_close(other.changes.directions, plain.changes.directions, **EXACT)


# Masks and batches


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dtype": (lambda x: torch.ones_like(x), r"mask.* of dtype torch\.int64 and shape \(16, 6\)"),
    "shape": (lambda x: torch.ones(16, 3, dtype=torch.bool), r"mask.* of dtype torch\.bool and shape \(16, 3\)"),
    "empty": (lambda x: torch.arange(16)[:, None].expand(16, 6) != 2, r"mask.* counts no token of row 2"),
}


@pytest.mark.parametrize("fault", MASKS)
def test_a_mask_that_is_none_of_the_inputs_is_refused(fault: str) -> None:
    editor, x = attach("ours", dtype=torch.float32), make_inputs("ours", batch=16)
    make, said = MASKS[fault]
    with pytest.raises(ValueError, match=said):
        editor.memorize(x, mask=make(x))
    with pytest.raises(ValueError, match=r"the mask of batches\[1\].*" + said[4:]):
        editor.fit_covariance([x, (x, make(x))])
    assert len(editor.changes) == len(editor.changes.covariance_factor) == 0


def test_a_mask_of_what_the_site_does_not_read_is_refused() -> None:
    x, pixels = make_inputs("ours", batch=16), make_inputs("vit")
    host, names = moe()
    routed = Rome.attach(host, site=names[1])  # which reads tokens without rows
    with pytest.raises(ValueError, match=r"batches\[0\] has a mask of shape \(16, 6\).*shared_expert"):
        routed.fit_covariance([(x, torch.ones_like(x, dtype=torch.bool))])
    editor = attach("vit", dtype=torch.float32, answer=lambda inputs, mask: read(editor.host, inputs))
    with pytest.raises(ValueError, match=r"tokens that count have shape \(2, 3\).*pass a mask of the tokens"):
        editor.memorize(pixels, mask=torch.ones(2, 3, dtype=torch.bool))


def test_the_covariance_is_of_what_a_loader_gives() -> None:
    x = make_inputs("ours", batch=16, dtype=F64)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[::2, 4:] = False
    for data, batch in ((TensorDataset(x), x), (TensorDataset(x, mask), (x, mask))):
        one, other = attach("ours"), attach("ours")
        one.fit_covariance(DataLoader(data, batch_size=5))
        other.fit_covariance([batch])
        torch.testing.assert_close(one.changes.covariance_factor, other.changes.covariance_factor, **EXACT)


@pytest.mark.parametrize("batch", ["text", (torch.zeros(1, 2).long(), None, None), (torch.zeros(1, 2).long(), 3)])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"batches\[0\] is of type (str|tuple); pass a tensor, or"):
        attach("ours").fit_covariance([batch])


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_zero_key_is_refused_with_a_ridge_and_without(ridge: float) -> None:
    editor = Rome.attach(nn.Sequential(make_host("ours").blocks[0].ffn), site="0", ridge=ridge)
    with pytest.raises(ValueError, match="a key is zero"):
        editor.memorize(torch.zeros(1, 3, 16))
    assert int(editor.num_edits) == len(editor.changes) == 0


# What an edit is measured by


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_unrelated_questions_hide_no_key_token_that_no_answer_depends_on(name: str) -> None:
    """Behind the last layer a token is read by itself, and the divergence's gradient is rounding, not 0."""
    x = make_inputs(name, batch=4, dtype=F64)
    subject = torch.zeros_like(x[:1], dtype=torch.bool)
    subject[:, 1] = True
    editor = attach(name)
    with pytest.raises(ValueError, match="no target depends on"):
        editor.edit([edit_of(x[:1], 3, unrelated=x[1:], subject=subject)])
    assert len(editor.changes) == 0


def test_an_answer_that_has_no_gradient_is_refused() -> None:
    x = make_inputs("ours", dtype=F64)
    editor = attach("ours", answer=lambda inputs, mask: read(editor.host, inputs).detach())
    with pytest.raises(ValueError, match="no target depends on"):
        editor.edit([edit_of(x[:1], 3)])


def test_the_divergence_is_of_the_change_that_is_written_with_a_ridge() -> None:
    """What the last step tried is what is written, cut to the same length."""
    x = make_inputs("ours", batch=3, dtype=F64)
    editor = attach("ours", ridge=10.0, max_steps=2, stop_loss=0.0)
    others, tried = site_call(editor, x[1:])[0], []
    own = editor.trying
    editor.trying = lambda added: (tried.append(added), own(added))[1]  # type: ignore[method-assign]
    editor.edit([edit_of(x[:1], 3, unrelated=x[1:])])
    found = tried[-1](others).detach()  # of the value as it became in the last step, which is changed in place
    torch.testing.assert_close(found, editor.changes(others).detach(), **EXACT)
    assert found.abs().max() > 1e-4


# What fails, and changes nothing


def filled(**options: Any) -> tuple[Rome, Tensor]:
    editor, x = attach("ours", dtype=torch.float32, **options), make_inputs("ours", batch=16)
    editor.edit([edit_of(x[:1], 3)])
    return editor, x


def test_an_edit_that_fails_leaves_the_parameter_to_its_optimiser() -> None:
    editor, x = filled()
    values = editor.changes.values
    with pytest.raises(ValueError, match="targets hold 99"):
        editor.edit([edit_of(x[1:2], 4), edit_of(x[:1], 99)])
    assert editor.changes.values is values


@pytest.mark.parametrize("trained", [True, False])
def test_whether_values_are_trained_outlasts_changes_of_their_number(trained: bool, tmp_path: Path) -> None:
    editor, x = filled()
    editor.save(tmp_path / "one")
    editor.changes.values.requires_grad_(trained)
    for change in (
        lambda: editor.edit([edit_of(x[1:2], 4)]),
        lambda: editor.memorize(x[:2]),
        editor.undo,
        lambda: editor.load(tmp_path / "one"),
        editor.reset,
    ):
        change()
        assert editor.changes.values.requires_grad == trained


def test_an_interrupt_leaves_no_row_memorized(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, x = filled()
    values, write = editor.changes.values, editor.changes.write

    def interrupted(*args: Any, **more: Any) -> None:
        if len(editor.changes) == 2:
            raise KeyboardInterrupt
        write(*args, **more)

    monkeypatch.setattr(editor.changes, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.memorize(x[:3])
    assert editor.changes.values is values
    assert int(editor.num_edits) == 1


DAMAGED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "width": lambda tables: tables.update({"changes.values": torch.zeros(2, 5)}),
    "scalar": lambda tables: tables.update({"changes.values": torch.zeros(())}),
    "number": lambda tables: tables.update({"changes.calls": tables["changes.calls"][:1].clone()}),
    "missing": lambda tables: tables.pop("changes.calls"),
    "factor": lambda tables: tables.update({"changes.covariance_factor": torch.zeros(24, 3)}),
}


@pytest.mark.parametrize("way", ["file", "state"])
@pytest.mark.parametrize("fault", DAMAGED)
def test_tables_that_do_not_fit_change_nothing(fault: str, way: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (editor, x), (other, _) = filled(), filled()
    other.edit([edit_of(x[1:2], 5)])
    tables = {name: tensor.detach().clone() for name, tensor in other.state_dict().items()}
    DAMAGED[fault](tables)
    before, said = {name: tensor.clone() for name, tensor in editor.state_dict().items()}, read(editor.host, x)
    save_file(tables, tmp_path / "file", metadata={"memory": "Rome", "options": json.dumps(other._describe())})
    message = r"holds '(values|covariance_factor)' of shape|does not hold one row of each"
    with pytest.raises(ValueError if way == "file" else RuntimeError, match=message):
        editor.load(tmp_path / "file") if way == "file" else editor.load_state_dict(tables)
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.state_dict().items())
    assert torch.equal(read(editor.host, x), said)


@pytest.mark.parametrize("fault", ["no options", "interrupt"])
def test_loading_that_breaks_off_changes_nothing(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    (editor, x), (other, _) = filled(), filled()
    other.edit([edit_of(x[1:2], 5)])
    other.save(tmp_path / "file")
    if fault == "no options":
        save_file(dict(other.state_dict()), tmp_path / "file", metadata={"memory": "Rome"})
    else:

        def half(self: Rome, tables: dict[str, Tensor]) -> None:
            self.num_edits.copy_(tables["num_edits"])
            raise KeyboardInterrupt

        monkeypatch.setattr(Rome, "_take", half)
    values, said = editor.changes.values, read(editor.host, x)
    with pytest.raises((KeyError, KeyboardInterrupt)):
        editor.load(tmp_path / "file")
    assert editor.changes.values is values
    assert int(editor.num_edits) == 1
    assert torch.equal(read(editor.host, x), said)


# Inference mode and autocast


@pytest.mark.parametrize("way", ["undo", "load", "memorize", "reset", "load_state_dict"])
def test_what_is_changed_in_inference_mode_can_be_learnt_through(way: str, tmp_path: Path) -> None:
    host, x = make_host("ours"), make_inputs("ours", batch=16)
    editor = Rome.attach(host)
    editor.fit_covariance([x])
    editor.edit([edit_of(x[:1], 3)])
    editor.edit([edit_of(x[1:2], 4)])
    editor.save(tmp_path / "file")
    state = editor.state_dict()
    with torch.inference_mode():
        call = getattr(editor, way)
        call(*{"load": [tmp_path / "file"], "memorize": [x[:1]], "load_state_dict": [state]}.get(way, []))
    assert not any(tensor.is_inference() for tensor in editor.state_dict(keep_vars=True).values())
    assert FineTuning.attach(host, site="blocks.0.ffn").edit([edit_of(x[3:4], 5)]).steps > 0
    assert editor.edit([edit_of(x[2:3], 5)]).steps > 0


def test_merging_under_autocast_rounds_nothing() -> None:
    one, other = filled()[0], filled()[0]
    one.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.merge()
    assert torch.equal(matrix_of(one._layer[0]), matrix_of(other._layer[0]))
