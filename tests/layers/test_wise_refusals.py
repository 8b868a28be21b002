"""WISE: what it refuses, and that nothing is left of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memzoo.layers import Wise
from memzoo.layers.editor import NOT_SCORED, Edit
from tests.layers.side_hosts import WIDTH, make_host
from tests.layers.wise_cases import attach, make_edit, same_state, state

SHORT = {"max_steps": 2, "edits_per_shard": 1}


def edit_with(**changes: Any) -> Callable[[], object]:
    edit = make_edit()
    return lambda: attach(**SHORT)[1].edit([Edit(**{**vars(edit), **changes})])


def of_attach(**options: Any) -> Callable[[], object]:
    return lambda: attach(**options)


QUESTION = make_edit()
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "mode": (of_attach(mode="both"), "mode='both' is not one of 'merge', 'retrieve'"),
    "mask": (of_attach(mask="exactly"), "mask='exactly' is not one of .* did you mean 'exact'"),
    "indicator": (of_attach(indicator="norm"), "indicator='norm' is not one of"),
    "reduce": (of_attach(reduce="sum"), "reduce='sum' is not one of"),
    "granularity": (of_attach(granularity="row"), "granularity='row' is not one of"),
    "edits": (of_attach(edits_per_shard=0), "edits_per_shard=0 is not a whole number >= 1"),
    "shards": (of_attach(shards_per_merge=1.5), "shards_per_merge=1.5 is not a whole number >= 1"),
    "keep": (of_attach(keep_shards=-1), "keep_shards=-1 is not a whole number >= 0"),
    "replay": (of_attach(replay=3, stored_questions=2), "replay=3 is more than stored_questions=2"),
    "rate": (of_attach(learning_rate=0), "learning_rate=0 is not a finite number > 0"),
    "ratio": (of_attach(mask_ratio=1.2, density=1.0), "mask_ratio=1.2 is a share; use at most 1"),
    "density": (of_attach(density=0.4), "density=0.4 must be from mask_ratio=0.5"),
    "disjoint": (of_attach(mask="disjoint", shards_per_merge=3), "mask='disjoint' has no room for shards_per_merge=3"),
    "margins": (of_attach(margins=(5, 20)), r"margins=\(5, 20\) are not three numbers"),
    "margin": (of_attach(margins=-1.0), "margins=-1.0 is not a finite number > 0"),
    "norm": (of_attach(norm_constraint=0.0), "norm_constraint=0.0 is not a finite number > 0"),
    "threshold": (of_attach(threshold_ratio=-1), "threshold_ratio=-1 is not a finite number >= 0"),
    "site": (lambda: Wise.attach(make_host("ours"), site="blocks.7.ffn"), r"sites=\['blocks.7.ffn'\] are not names"),
    "nothing": (lambda: attach(**SHORT)[1].edit([]), r"edits=\[\] has nothing to learn"),
    "no target": (edit_with(targets=torch.full_like(QUESTION.targets, NOT_SCORED)), r"edits\[0\] has no target"),
    "targets": (edit_with(targets=QUESTION.targets[:, 1:]), r"targets of shape \(2, 4\) do not fit inputs .*\(2, 5\)"),
    "one edit": (lambda: attach(**SHORT)[1].edit(QUESTION), r"edits is of type Edit, and no list .*edits=\[edit\]"),
    "no edit": (lambda: attach(**SHORT)[1].edit([QUESTION, "it"]), r"edits\[1\] is of type str; pass Edit"),
    "no inputs": (edit_with(inputs=[[1, 2]]), r"edits\[0\]: inputs of type list are not rows"),
    "flat": (edit_with(inputs=QUESTION.inputs[0], targets=QUESTION.targets[0]), r"inputs of shape \(5,\), torch.int64"),
    "float targets": (edit_with(targets=QUESTION.targets.float()), "targets of shape .*torch.float32 are not of torch"),
    "negative": (edit_with(targets=torch.full_like(QUESTION.targets, -5)), "targets hold -5; leave -100"),
    "vocabulary": (edit_with(targets=QUESTION.targets.clamp_min(31)), "targets hold 31, and the host answers 0 to 30"),
    "edit mask": (
        edit_with(mask=torch.ones(2, 4, dtype=torch.bool)),
        r"mask of shape \(2, 4\), torch.bool does not fit",
    ),
    "mask type": (edit_with(mask=torch.ones(2, 5)), r"mask of shape \(2, 5\), torch.float32 does not fit"),
    "no unrelated": (edit_with(unrelated=QUESTION.inputs[:0]), r"unrelated of shape \(0, 5\), .* or None"),
    "other unrelated": (
        edit_with(unrelated=torch.rand(1, 5)),
        r"unrelated of shape \(1, 5\), torch.float32 is nothing",
    ),
    "unrelated mask": (
        edit_with(unrelated_mask=torch.ones(1, 4, dtype=torch.bool)),
        r"unrelated_mask of shape \(1, 4\), torch.bool does not fit what it masks, of shape \(1, 5\)",
    ),
    "unrelated padding": (edit_with(unrelated_mask=torch.zeros(1, 5, dtype=torch.bool)), "row without a real token;"),
    "mask of nothing": (
        edit_with(unrelated=None, unrelated_mask=torch.ones(1, 5, dtype=torch.bool)),
        "unrelated_mask without unrelated",
    ),
    "asks": (edit_with(mask=torch.arange(5).expand(2, 5) > 3), r"edits\[0\] has a row without a real token up to"),
    "beams": (
        lambda: attach()[1].answer(QUESTION.inputs, asked=torch.ones(4, 5, dtype=torch.bool)),
        r"the tokens that count, \(4, 5\), .* of each row or of what its beams share",
    ),
    "counted": (
        lambda: attach()[1].answer(QUESTION.inputs, asked=torch.ones(2, 6, dtype=torch.bool)),
        r"the tokens that count, \(2, 6\), are not those that 'blocks.1.ffn.down' reads, \(2, 5\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_edit_that_is_refused_leaves_nothing() -> None:
    _, editor, _ = attach(**SHORT)
    kept = state(editor)
    wrong = Edit(QUESTION.inputs, QUESTION.targets.clamp_min(31))  # seen in the first step, before anything is learned
    for edits in ([QUESTION, wrong], [QUESTION, Edit(QUESTION.inputs, QUESTION.targets[:1])]):
        with pytest.raises(ValueError, match="targets"):
            editor.edit(edits)
        same_state(editor.state_dict(), kept)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"edit\(\) inside of torch.inference_mode"):
        editor.edit([QUESTION])
    same_state(editor.state_dict(), kept)


def test_an_edit_that_diverges_is_refused_and_leaves_nothing() -> None:
    _, editor, _ = attach(max_steps=30, learning_rate=1e200, norm_constraint=None)
    kept = state(editor)
    with pytest.raises(ValueError, match=r"loss=\S+ in step \d+ of an edit; use a learning_rate below 1e\+200"):
        editor.edit([make_edit()])
    same_state(editor.state_dict(), kept)
    assert len(editor.questions) == 0
    assert editor.questions.inputs.shape[-1] == WIDTH


def test_a_host_that_does_not_call_the_site_is_told() -> None:
    host = make_host("ours")
    editor = Wise.attach(
        host, site="blocks.0.ffn", answer=lambda inputs, mask: host.blocks[1](host.embedding(inputs))[0]
    )
    for call in (lambda: editor.routing(QUESTION.inputs), lambda: editor.edit([QUESTION])):
        with pytest.raises(ValueError, match=r"sites \['blocks.0.ffn.down'\] are not called by the host"):
            call()
