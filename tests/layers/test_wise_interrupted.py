"""WISE: an edit that does not come to its end leaves everything as it was."""

import math
from typing import Any

import pytest
import torch

from memzoo.layers import wise_shards
from memzoo.layers.wise import Wise
from memzoo.layers.wise_lesson import Lesson
from memzoo.layers.wise_questions import WiseQuestions
from tests.layers.wise_cases import attach, learn, make_edit, same_state, state

PLACES = {
    "after the last step": (Lesson, "activations"),
    "storing a question": (WiseQuestions, "offer"),
    "measuring again": (Wise, "_refresh_open"),
    "merging": (wise_shards, "ties"),
    "after merging": (WiseQuestions, "join"),
    "measuring the memory": (Wise, "_refresh_memory"),
    "the next shard": (Wise, "_open"),
}
MODES = {"merge": {}, "blend": {"keep_shards": 0}, "retrieve": {"mode": "retrieve"}}


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(*PLACES[where], fail)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", PLACES)
def test_an_edit_that_is_interrupted_leaves_everything_as_it_was(
    where: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place, here of the edit that finishes the last shard of a merge, and it can be made again."""
    options = {"max_steps": 2, "refresh_threshold": True} | MODES[mode]
    _, editor, _ = attach(**options)
    learn(editor, *range(7))  # the eighth merges for the second time
    before = state(editor)
    with monkeypatch.context() as patch:
        interrupt(patch, where, KeyboardInterrupt() if where == "merging" else torch.OutOfMemoryError(where))
        with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
            editor.edit([make_edit(7)])
    same_state(editor.state_dict(), before)
    assert editor.routing(make_edit(0).inputs).activations.shape == (3, 2)  # a memory, a shard, the open one
    _, other, _ = attach(**options)
    same_state(learn(editor, 7, 8).state_dict(), state(learn(other, *range(9))))


@pytest.mark.parametrize("where", ["merging", "measuring the memory"])
def test_a_shard_whose_rollback_is_interrupted_is_kept(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, editor, _ = attach(max_steps=2)
    learn(editor, *range(4))
    before = state(editor)
    with monkeypatch.context() as patch:
        interrupt(patch, where, torch.OutOfMemoryError(where))
        with pytest.raises(torch.OutOfMemoryError):
            editor.rollback(0)
    same_state(editor.state_dict(), before)
    editor.rollback(0)
    assert editor.shards.shard_id.tolist() == [1]


def test_a_last_step_that_goes_too_far_is_refused() -> None:
    """No loss is computed behind it, so that only what the shard responds with then tells."""
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e38, "norm_constraint": None}
    _, editor, _ = attach(dtype=torch.float32, **options)
    before = state(editor)
    with pytest.raises(ValueError, match=r"not finite after its last step; use a learning_rate below 1e\+38"):
        editor.edit([make_edit(dtype=torch.float32)])
    same_state(editor.state_dict(), before)
    assert float(editor.threshold) == math.inf
