"""WISE over a stream: kept bit for bit, taken back, replayed, learned until it is known."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers import Wise
from memzoo.layers.editor import NOT_SCORED, Edit, answer_loss
from memzoo.layers.ties import ties
from memzoo.layers.wise_questions import WiseQuestions, derived_seed
from memzoo.layers.wise_routing import MAIN
from memzoo.layers.wise_shards import PENDING
from tests.layers.side_hosts import make_host, read
from tests.layers.wise_cases import (
    EXACT,
    PROMPT,
    SHORT,
    activations,
    attach,
    learn,
    make_edit,
    matrix,
    same_state,
    state,
)

EVERYTHING = {"mode": "retrieve", "replay": 1, "stored_questions": 2, "mask": "disjoint", "mask_ratio": 0.2}


# Going on


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_stream_that_was_killed_goes_on_bit_for_bit(options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    def fresh() -> Wise:
        return attach(dtype=torch.float32, max_steps=2, seed=3, **options)[1]

    def edits(*seeds: int) -> list[Edit]:
        return [make_edit(seed, rows=1 + seed % 2) for seed in seeds]

    whole = fresh()
    for edit in edits(*range(9)):
        whole.edit([edit])
    first = fresh()
    for edit in edits(*range(stop)):
        first.edit([edit])
    first.save(tmp_path / "edits")
    torch.save(first.state_dict(), tmp_path / "checkpoint")
    for load in (
        lambda other: other.load(tmp_path / "edits"),
        lambda other: other.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True)),
    ):
        other = learn(fresh(), 7, 8, 9)  # it held something else
        load(other)
        same_state(other.state_dict(), state(first))
        for edit in edits(*range(stop, 9)):
            other.edit([edit])
        same_state(other.state_dict(), state(whole))


def test_a_file_that_does_not_fit_leaves_everything_as_it_was(tmp_path: Path) -> None:
    learn(attach(**SHORT)[1], 0, 1, 2).save(tmp_path / "edits")
    for options, said in (
        ({"seed": 1}, "seed=0, this one has 1"),
        ({"mode": "retrieve"}, "mode='merge', this one has 'retrieve'"),
        ({"margins": (5, 20, 10)}, r"margins=0.5, this one has \[5, 20, 10\]"),
        ({"threshold_ratio": 0.5}, "threshold_ratio=1.0, this one has 0.5"),
        ({"granularity": "token"}, "granularity='sample', this one has 'token'"),
        ({"reduce": "max"}, "reduce='mean', this one has 'max'"),
        ({"indicator": "activated"}, "indicator='linear', this one has 'activated'"),
        ({"density": 0.9}, "density=0.53, this one has 0.9"),
        ({"sticky": False}, "sticky=True, this one has False"),
        ({"refresh_threshold": False}, "refresh_threshold=True, this one has False"),
    ):
        editor = learn(attach(**{**SHORT, **options})[1], 5, 6, 7, 8)
        kept = state(editor)
        with pytest.raises(ValueError, match=said):
            editor.load(tmp_path / "edits")
        same_state(editor.state_dict(), kept)
    with pytest.raises(ValueError, match="is no file that save"):
        editor.load(tmp_path / "none")
    same_state(editor.state_dict(), kept)


def test_after_a_reset_the_same_stream_is_learned_again() -> None:
    _, editor, x = attach(**SHORT, replay=1)
    fresh = state(editor)
    before = read(editor.host, x)
    learned = state(learn(editor, 0, 1, 2, 3))
    editor.reset()
    same_state(editor.state_dict(), fresh)
    assert torch.equal(read(editor.host, x), before)
    same_state(learn(editor, 0, 1, 2, 3).state_dict(), learned)


# Shards


def test_merged_shards_are_merged_from_scratch_while_they_are_kept() -> None:
    _, editor, _ = attach(**SHORT, keep_shards=4, refresh_threshold=False, density=0.6)
    kept = []
    for seed in range(6):
        learn(editor, seed)
        kept.append(editor.shards.shards.clone())
    shards = kept[3]
    assert editor.options.density == 0.6
    _, other, _ = attach(**SHORT, keep_shards=4, refresh_threshold=False, density=0.6)
    learn(other, 0, 1, 2, 3)
    assert torch.equal(other.shards.memories[0], ties([*shards], [0.25] * 4, density=0.6))
    assert other.shards.shard_memory.tolist() == [0] * 4
    assert len(editor.shards.shards) == 0  # six are more than four
    old, new = other.shards.memories[0], [kept[4][4], editor_shard(5)]
    assert torch.equal(editor.shards.memories[0], ties([old, *new], [0.6, 0.2, 0.2], density=[1.0, 0.6, 0.6]))
    assert bool(editor.shards.memories[0][old != 0].all())  # nothing of it is trimmed
    assert float(editor.shards.memory_threshold) <= float(other.shards.memory_threshold)
    learn(editor, 6, 7)
    assert [len(editor.shards.memories), len(editor.shards.shards), int(editor.num_edits)] == [1, 0, 8]


def editor_shard(seed: int) -> Tensor:
    """The shard that the edit of this number makes, by itself."""
    _, editor, _ = attach(**SHORT | {"edits_per_shard": 2}, refresh_threshold=False)
    editor.open_id.fill_(seed)
    return learn(editor, seed).delta.detach()


def test_in_retrieve_mode_the_shards_of_the_oldest_memories_are_dropped() -> None:
    _, editor, _ = attach(**SHORT, mode="retrieve", keep_shards=4)
    learn(editor, *range(9))
    assert editor.shards.memory_id.tolist() == [0, 1, 2, 3]
    assert editor.shards.shard_id.tolist() == [4, 5, 6, 7, 8]
    assert editor.shards.shard_memory.tolist() == [2, 2, 3, 3, PENDING]
    with pytest.raises(ValueError, match=r"shard=1 is not kept, only \[4, 5, 6, 7, 8\] and .*keep_shards=4"):
        editor.rollback(1)


def test_a_shard_that_is_taken_back_leaves_what_the_others_make() -> None:
    options = {**SHORT, "refresh_threshold": False}
    _, editor, x = attach(**options)
    learn(editor, 0, 1, 2)
    assert editor.shards.shard_id.tolist() == [0, 1, 2]
    shards = editor.shards.shards.clone()
    editor.rollback(2)  # not merged yet
    assert (editor.shards.shard_id.tolist(), int(editor.num_edits)) == ([0, 1], 2)
    editor.rollback(0)  # merged
    assert torch.equal(editor.shards.memories[0], shards[1])
    assert torch.equal(editor.shards.memory_threshold, editor.shards.shard_threshold)
    assert editor.questions.shard.tolist() == [1]
    editor.rollback(1)
    assert (len(editor.shards.memories), int(editor.num_edits)) == (0, 0)
    assert editor.routing(x).chosen.tolist() == [MAIN] * 2
    with pytest.raises(ValueError, match=r"shard=1 is not kept, only \[\]"):
        editor.rollback(1)


def test_what_is_left_of_a_memory_is_measured_again_unless_that_is_off() -> None:
    """What the other shard makes of its own questions alone is not what both made of them."""
    found = {}
    for refresh in (True, False):
        _, editor, _ = attach(**SHORT, refresh_threshold=refresh)
        learn(editor, 0, 1)
        kept = editor.shards.shard_threshold[1] * 2  # so that what is measured is less
        editor.shards.shard_threshold = torch.stack([kept, kept])
        editor.rollback(0)
        own = editor.stored(editor.questions.inputs, editor.questions.counted)
        least = editor.response(own, editor.shards.memories[0]).min()
        assert least < kept
        found[refresh] = [float(editor.shards.memory_threshold), float(least if refresh else kept)]
    assert all(actual == expected for actual, expected in found.values())


def test_the_open_shard_is_taken_back_by_default_and_its_place_is_free() -> None:
    _, editor, _ = attach(max_steps=2)
    learn(editor, 0, 1, 2)
    before = editor.shards.shards.clone()
    editor.rollback()
    assert not editor.delta.any()
    assert (float(editor.threshold), int(editor.num_edits), int(editor.open_id)) == (math.inf, 2, 1)
    assert editor.questions.shard.tolist() == [0, 0]
    learn(editor, 2, 3)
    assert torch.equal(attach_and_learn(0, 1, 2, 3).shards.memories, editor.shards.memories)
    _, other, _ = attach(**SHORT, shards_per_merge=3)
    learn(other, 0, 1)
    other.rollback(0)
    assert int(other.open_id) == 2
    learn(other, 2)
    assert int(other.open_id) == 0  # its mask is drawn again
    assert torch.equal(editor.shards.shards[0], before[0])


def attach_and_learn(*seeds: int) -> Wise:
    return learn(attach(max_steps=2)[1], *seeds)


def test_what_is_kept_is_bounded_by_the_options() -> None:
    for mode, memories in (("merge", [1, 1, 1]), ("retrieve", [4, 8, 12])):
        _, editor, _ = attach(**SHORT | {"max_steps": 1}, mode=mode, keep_shards=2, stored_questions=1)
        found, sizes = [], []
        for seed in range(24):
            learn(editor, seed)
            if seed % 8 == 7:
                found.append(len(editor.shards.memories))
                sizes.append(sum(tensor.nbytes for tensor in editor.state_dict().values()))
        assert found == memories
        assert len(editor.shards.shards) <= 2
        each = editor.delta.nbytes + editor.questions.inputs[:1].nbytes
        grown = (memories[1] - memories[0]) * each
        assert all(0 <= b - a - grown < 0.05 * each for a, b in pairwise(sizes))


# Questions


def test_stored_questions_are_what_the_site_reads_of_them_and_bounded() -> None:
    _, editor, _ = attach(**SHORT | {"edits_per_shard": 3}, stored_questions=2, shards_per_merge=2, mode="retrieve")
    learn(editor, 0)
    edit = make_edit(0)
    assert torch.equal(editor.questions.inputs, activations(editor, edit.inputs)[:1, :PROMPT])
    learn(editor, *range(1, 13))
    assert len(editor.questions) == 2 * 2 + 1
    assert editor.questions.memory.tolist().count(PENDING) == 1
    assert sorted(editor.questions.memory.tolist()) == [PENDING, 0, 0, 1, 1]


def test_padding_that_no_question_needs_is_not_stored() -> None:
    _, editor, _ = attach(**SHORT, shards_per_merge=1, stored_questions=1)
    long = make_edit(0)
    pad = torch.nn.functional.pad
    editor.edit([Edit(pad(long.inputs, (9, 0), value=3), pad(long.targets, (9, 0), value=NOT_SCORED))])
    assert editor.questions.inputs.shape[1] == PROMPT + 9
    for seed in range(1, 9):
        learn(editor, seed)
        longest = int(editor.questions.counted.sum(1).max())
        assert editor.questions.inputs.shape[1] == editor.questions.counted.shape[1] == longest
    assert longest == PROMPT  # the long one was dropped


def test_every_question_is_as_likely_to_be_stored() -> None:
    found = torch.zeros(6)
    for seed in range(600):
        questions = WiseQuestions(1, torch.zeros(()))
        for number in range(6):
            generator = torch.Generator().manual_seed(derived_seed(seed, number))
            x, counted = torch.full((2, 1), float(number)), torch.tensor([True, False])
            questions.offer(x, counted, 0, before=number, limit=2, generator=generator)
        assert len(questions) == 2
        found += torch.bincount(questions.inputs[:, 0, 0].long(), minlength=6)
    assert found.sum() == 1200
    assert (found - 200).abs().max() < 5 * (600 * 2 / 9) ** 0.5


def test_replay_keeps_a_shard_silent_on_edits_of_others() -> None:
    edits = [make_edit(seed) for seed in range(4)]
    said = []
    for replay in (0, 2):
        options = {"mode": "retrieve", "edits_per_shard": 1, "shards_per_merge": 1, "refresh_threshold": False}
        _, editor, _ = attach(**options, max_steps=40, replay=replay, learning_rate=0.02)
        for edit in edits[:3]:
            editor.edit([edit])
        later = editor.shards.memories[2]
        said.append([float(editor.response(editor.see(e.inputs[:1, :PROMPT], None), later)) for e in edits[:3]])
    (first, second, _), (quiet, silent, _) = said
    assert quiet + silent < 0.7 * (first + second)


# Learning


def test_an_edit_ends_when_its_loss_is_low_and_still() -> None:
    _, editor, _ = attach(max_steps=400, learning_rate=0.0001, margins=(9.0, 0.0, 0.0))
    edit = make_edit(rows=1)
    with torch.no_grad():  # a host that is certain of what it says
        editor.host.embedding.weight.mul_(40)
    said = editor.answer(edit.inputs).argmax(-1)
    certain = Edit(edit.inputs, torch.where(edit.targets == NOT_SCORED, NOT_SCORED, said))
    report = editor.edit([certain])
    assert report.loss <= 0.02
    assert report.steps == 1  # the second loss is the first that can be compared
    assert int(editor.num_edits) == 1


def test_the_report_is_the_loss_of_the_answer_before_the_last_step() -> None:
    _, editor, _ = attach(max_steps=1)
    edit = make_edit()
    expected = answer_loss(editor.answer(edit.inputs), edit.targets).item()
    report = editor.edit([edit])
    assert report.steps == 1
    assert report.loss == pytest.approx(expected, rel=1e-12)


def test_edits_of_one_call_are_learned_together() -> None:
    _, editor, _ = attach(max_steps=1, learning_rate=0.01, margins=(0.1, 0.2, 0.1))
    edits = [make_edit(0), make_edit(1, rows=1), make_edit(2)]
    mask, gradients = editor.mask(), []
    for edit in edits:
        editor.edit([edit])
        gradients.append(editor.delta.detach().clone() if int(editor.open_edits) else editor.shards.shards[0].clone())
        editor.reset()
    editor.edit(edits)
    torch.testing.assert_close(editor.shards.shards[0], torch.stack(gradients).mean(0) * mask, **EXACT)
    assert (int(editor.num_edits), editor.shards.shard_edits.tolist()) == (3, [3])
    assert len(editor.questions) == 3


def test_relative_margins_follow_the_scale_of_the_host() -> None:
    _, editor, x = attach("gpt2", margins=0.4)
    assert editor.margins().tolist() == [0, 0, 0]
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 3:] = False
    lengths = (activations(editor, x) @ matrix(editor).T).norm(dim=-1)
    editor.calibrate(x)
    assert float(editor.scale) == pytest.approx(float(lengths.median()))
    assert editor.margins().tolist() == pytest.approx([float(editor.scale) * c for c in (0.1, 0.4, 0.2)])
    masked = Wise.attach(editor.host, answer=lambda inputs, mask: editor.host(inputs).logits)
    masked.calibrate(x, mask)
    assert float(masked.scale) == pytest.approx(float(lengths[mask].median()))
    assert Wise.attach(make_host("ours"), margins=(5, 20, 10)).margins().tolist() == [5, 20, 10]


def test_the_first_edit_measures_the_scale_if_nobody_has() -> None:
    for unrelated in (True, False):
        edit = make_edit()
        edit = edit if unrelated else Edit(edit.inputs, edit.targets)
        _, editor, _ = attach(**SHORT)
        a = activations(editor, edit.unrelated if edit.unrelated is not None else edit.inputs)
        learn(editor).edit([edit])
        assert float(editor.scale) == pytest.approx(float((a @ matrix(editor).T).norm(dim=-1).median()))


def test_a_disabled_editor_learns_and_stays_disabled() -> None:
    _, editor, x = attach(**SHORT)
    before = read(editor.host, x)
    with editor.disabled():
        learn(editor, 0)
        assert torch.equal(read(editor.host, x), before)
    same_state(editor.state_dict(), state(learn(attach(**SHORT)[1], 0)))


def test_no_gradient_is_left_and_the_global_random_state_is_not_touched() -> None:
    torch.manual_seed(3)
    seen = torch.get_rng_state()
    _, editor, _ = attach(**SHORT, replay=1)
    with torch.no_grad():
        learn(editor, 0, 1, 2)
    assert torch.equal(torch.get_rng_state(), seen)
    assert all(parameter.grad is None for parameter in (*editor.parameters(), *editor.host.parameters()))
