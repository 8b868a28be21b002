"""WISE: the checks of its spec, 1 to 16, beside hosts of every kind; 7, 11 and 15 are in test_wise_routing.py."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from memzoo.layers import Wise
from memzoo.layers.editor import NOT_SCORED, Edit, answer_loss
from memzoo.layers.reference import wise as reference
from memzoo.layers.wise_options import WiseOptions
from memzoo.layers.wise_routing import MAIN, routing_loss
from memzoo.layers.wise_shards import WiseShards
from tests.layers.side_hosts import HOSTS, WIDTH, make_host, make_inputs, read
from tests.layers.wise_cases import (
    EXACT,
    PROMPT,
    QUICK,
    activations,
    attach,
    down_of,
    every_host,
    hand_made,
    make_edit,
    matrix,
    on_paper,
    same_state,
    state,
)

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_host
def test_01_without_edits_the_host_says_what_it_said(name: str, dtype: torch.dtype) -> None:
    host, x = make_host(name, dtype), make_inputs(name, batch=3, dtype=dtype)

    def said() -> list[torch.Tensor]:
        torch.manual_seed(0)  # of dropout
        return [read(host.train(mode), inputs) for mode in (True, False) for inputs in (x, x[:1])]

    before = said()
    editor = Wise.attach(host)
    assert float(editor.threshold) == math.inf
    assert all(torch.equal(*pair) for pair in zip(said(), before, strict=True))
    assert editor.routing(x).chosen.tolist() == [MAIN] * 3


@every_host
def test_02_one_matrix_is_learned_and_nothing_else(name: str) -> None:
    host, editor, _ = attach(name)
    assert editor.sites == (f"{HOSTS[name].names[1]}.{editor.site.parts.down}",)
    assert [n for n, p in editor.named_parameters() if p.requires_grad] == ["delta"]
    assert editor.num_parameters() == matrix(editor).numel() == 16 * WIDTH
    assert not any(parameter.requires_grad for parameter in host.parameters())


def test_02_the_default_site_is_layer_27_of_32() -> None:
    for depth, expected in ((1, 0), (2, 1), (4, 2), (32, 26)):
        from memzoo.arch import create_model

        host = create_model("transformer_tiny", dim=8, depth=depth, num_heads=1, hidden_dim=8, vocab_size=5)
        assert Wise.attach(host).sites == (f"blocks.{expected}.ffn.down",)
    assert Wise.attach(make_host("ours"), site="blocks.0.ffn").sites == ("blocks.0.ffn.down",)


@BOTH
@every_host
def test_03_rows_that_are_not_routed_are_the_hosts_to_the_bit(name: str, wrap: bool) -> None:
    host, editor, _ = attach(name, wrap=wrap)
    x = make_inputs(name, batch=4, dtype=torch.float64)
    before = read(host, x)
    hand_made(editor, 0.0)
    activation = editor.routing(x).activations[0]
    editor.threshold.copy_(activation.sort().values[1:3].mean())  # two rows are above it
    routed = activation > editor.threshold
    y = read(host, x)
    assert routed.sum() == 2
    assert torch.equal(editor.routing(x).chosen, torch.where(routed, 0, MAIN))
    assert torch.equal(y[~routed], before[~routed])
    assert bool(((y - before).flatten(1).abs().amax(1) > 1e-3)[routed].all())
    for granularity, expected in (("batch", [0] * 4), ("token", None)):
        other = Wise.attach(make_host(name, torch.float64), granularity=granularity)
        hand_made(other, 0.0)
        if expected is None:
            lengths = (activations(other, x) @ other.delta.T).norm(dim=-1)
            other.threshold.copy_(lengths.median())
            assert torch.equal(other.routing(x).chosen, torch.where(lengths > other.threshold * (1 - 1e-6), 0, MAIN))
        else:
            other.threshold.copy_(activation.mean() * 0.999)
            assert other.routing(x).chosen.tolist() == [0]
            assert bool(((read(other.host, x) - before).flatten(1).abs().amax(1) > 1e-3).all())


@pytest.mark.parametrize("kind", ["exact", "bernoulli", "disjoint"])
def test_04_what_the_mask_leaves_out_stays_zero_whatever_the_optimiser(kind: str) -> None:
    def adam(own: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(own, lr=0.1, weight_decay=0.5)

    for optimizer in (None, adam):
        _, editor, _ = attach(optimizer=optimizer, mask=kind, norm_constraint=0.15)
        mask = editor.mask()
        editor.edit([make_edit()])
        assert not editor.delta[~mask].any()
        assert editor.delta[mask].ne(0).float().mean() > 0.9
        assert editor.delta.abs().max() == 0.15
        assert editor.delta.grad is None


def test_04_gradients_outside_the_mask_never_reach_the_optimiser() -> None:
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            super().step(closure)

    _, editor, _ = attach(optimizer=lambda own: Watching(own, lr=0.1))
    mask = editor.mask()
    editor.edit([make_edit()])
    assert len(seen) == QUICK["max_steps"]
    assert all(gradient[mask].any() and not gradient[~mask].any() for gradient in seen)


def test_05_masks_hold_the_share_and_come_from_the_seed() -> None:
    for ratio in (0.2, 0.31):
        _, editor, _ = attach(mask_ratio=ratio)
        assert int(editor.mask().sum()) == round(ratio * 16 * WIDTH)
        assert torch.equal(editor.mask(), attach(mask_ratio=ratio)[1].mask())
        assert not torch.equal(editor.mask(), attach(mask_ratio=ratio, seed=1)[1].mask())
    size = 16 * WIDTH
    _, editor, _ = attach(mask="bernoulli", mask_ratio=0.2)
    assert abs(int(editor.mask().sum()) - 0.2 * size) < 5 * (size * 0.2 * 0.8) ** 0.5
    masks = []
    for number in range(4):
        editor.open_id.fill_(number)
        masks.append(editor.mask())
    pairs = [(a & b).float().mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert float(torch.stack(pairs).mean()) == pytest.approx(0.04, abs=0.015)


def test_05_disjoint_masks_share_no_entry_within_a_merge() -> None:
    _, editor, _ = attach(mask="disjoint", mask_ratio=0.25, shards_per_merge=4)
    masks = []
    for number in range(8):
        editor.open_id.fill_(number)
        masks.append(editor.mask())
    assert torch.stack(masks[:4]).sum(0).eq(1).all()
    assert torch.stack(masks[4:]).sum(0).eq(1).all()
    assert not torch.equal(masks[0], masks[4])


def test_06_the_routing_loss_has_the_values_computed_by_hand() -> None:
    margins = torch.tensor([5.0, 20.0, 10.0])
    for inside, outside, expected in ((25.0, 3.0, 0.0), (12.0, 8.0, 17.0)):
        e, i = torch.tensor([inside], requires_grad=True), torch.tensor([outside], requires_grad=True)
        loss = routing_loss(e, i, margins)
        assert loss.item() == expected
        gradients = torch.autograd.grad(loss, [e, i])
        assert [float(g) for g in gradients] == ([0.0, 0.0] if expected == 0 else [-2.0, 2.0])
    assert float(routing_loss(torch.tensor([12.0]), torch.tensor([]), margins)) == 8
    edits, others = torch.tensor([12.0, 25.0, 17.0]), torch.tensor([3.0, 8.0])
    expected = reference.mean_routing_loss(edits, others, (5.0, 20.0, 10.0))
    torch.testing.assert_close(routing_loss(edits, others, margins), expected)


def finished(deltas: list[torch.Tensor], **options: Any) -> WiseShards:
    """Shards by hand, thresholds 1, 2 and so on, one edit each."""
    shards = WiseShards(WiseOptions(**options), deltas[0])
    for number, delta in enumerate(deltas):
        one = torch.tensor(number)
        shards.add(delta, one, threshold=one + 1, edits=torch.tensor(1))
    return shards


def test_08_shards_without_common_entries_merge_to_their_union() -> None:
    _, editor, _ = attach(mask="disjoint", mask_ratio=0.5, edits_per_shard=1, refresh_threshold=False)
    learned = []
    for seed in range(2):
        expected = copy.deepcopy(editor.delta.detach())
        editor.options.__dict__.update(edits_per_shard=9)  # to see the shard before it is finished
        editor.edit([make_edit(seed)])
        learned.append(editor.delta.detach().clone())
        editor._finish()
        assert not expected.any()
    assert torch.equal(editor.shards.memories[0], learned[0] + learned[1])


def test_09_of_shards_with_common_entries_the_stronger_sign_stays_and_small_entries_go() -> None:
    first, second = torch.tensor([[1.0, -3.0, 0.5, 0.1]]), torch.tensor([[3.0, 2.0, -0.5, 0.0]])
    shards = finished([first, second], density=0.75)
    shards.merge()
    assert shards.memories[0].tolist() == [[2.0, -3.0, 0.5, 0.0]]
    shards = finished([first, second], density=0.5, mask_ratio=0.5)
    shards.merge()
    assert shards.memories[0].tolist() == [[2.0, -3.0, 0.0, 0.0]]


@every_host
def test_10_the_threshold_is_the_least_response_to_what_was_edited(name: str) -> None:
    _, editor, _ = attach(name, edits_per_shard=9, refresh_threshold=False)
    recorded, thresholds = [], []
    for seed in range(4):
        edit = make_edit(seed, name)
        editor.edit([edit])
        recorded.append(float(editor.indicator(edit.inputs, asked=edit.asked).min()))
        thresholds.append(float(editor.threshold))
    assert thresholds == pytest.approx([min(recorded[: n + 1]) for n in range(4)], rel=1e-12)


def test_10_a_merged_memory_has_the_least_threshold_of_its_shards() -> None:
    shards = finished([torch.eye(3), torch.ones(3, 3)])
    shards.merge()
    assert shards.memory_threshold.tolist() == [1]


def test_10_measuring_again_lowers_thresholds_that_later_edits_made_stale() -> None:
    options = {"edits_per_shard": 3, "learning_rate": 0.3, "shards_per_merge": 9}
    (_, editor, _), (_, stale, _) = attach(**options), attach(**options, refresh_threshold=False)
    edits = [make_edit(seed) for seed in range(3)]
    seen = [stale.see(edit.inputs[:1, :PROMPT], None) for edit in edits]
    recorded = []
    for number, edit in enumerate(edits, start=1):
        editor.edit([edit])
        stale.edit([edit])
        shard = stale.delta if number < 3 else stale.shards.shards[0]
        recorded += [stale.response(one, shard).item() for one in seen[:number]]
    assert torch.equal(editor.shards.shards, stale.shards.shards)
    assert min(recorded) < float(stale.shards.shard_threshold)
    assert float(editor.shards.shard_threshold) == pytest.approx(min(recorded), rel=1e-12)
    memory = stale.shards.merge()
    stale.questions.join(memory, limit=9, generator=torch.Generator())
    stale.refresh_thresholds()
    assert float(stale.shards.memory_threshold) == pytest.approx(min(recorded[-3:]), rel=1e-12)


def test_12_a_full_shard_gives_way_to_the_next_and_full_groups_are_merged() -> None:
    for mode, memories in (("merge", [0, 1, 1, 1]), ("retrieve", [0, 1, 1, 2])):
        _, editor, _ = attach(mode=mode, max_steps=2)
        masks = []
        for number in range(8):
            masks.append(editor.mask().clone())
            editor.edit([make_edit(number)])
            assert int(editor.num_edits) == number + 1
            if number % 2:
                assert not editor.delta.any()
                assert (float(editor.threshold), int(editor.open_edits)) == (math.inf, 0)
                assert len(editor.shards.memories) == memories[number // 2]
                assert len(editor.sides()[0]) == memories[number // 2] + (number % 4 == 1) + 1
            else:
                assert editor.delta.any()
        assert all(torch.equal(masks[n], masks[n + 1]) for n in range(0, 8, 2))
        assert not any(torch.equal(masks[n], masks[m]) for n in range(0, 8, 2) for m in range(0, n, 2))


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_13_reading_changes_nothing_that_is_kept(granularity: str) -> None:
    host, editor, x = attach(granularity=granularity)
    for seed in range(3):
        editor.edit([make_edit(seed)])
    kept = state(editor)
    y = read(host, x)
    [*host.generate(x, 3)]
    editor.answer(x, torch.ones_like(x, dtype=torch.bool))
    editor.indicator(x)
    assert torch.equal(read(host, x), y)
    same_state(editor.state_dict(), kept)


@every_host
def test_14_an_edit_is_answered_after_the_next_one_too(name: str) -> None:
    _, editor, _ = attach(name, max_steps=50, edits_per_shard=5, learning_rate=0.3)
    edits = [make_edit(seed, name, rows=1) for seed in (1, 2)]
    before = [answer_loss(editor.answer(edit.inputs), edit.targets).item() for edit in edits]
    for edit in edits:
        editor.edit([edit])
    assert int(editor.num_edits) == 2
    for edit, loss in zip(edits, before, strict=True):
        after = answer_loss(editor.answer(edit.inputs, asked=edit.asked), edit.targets).item()
        assert after < loss - 0.1


@every_host
def test_14_the_stream_is_that_of_the_equations(name: str) -> None:
    margins = (0.3, 0.8, 0.4)
    options = {"edits_per_shard": 1, "refresh_threshold": False, "margins": margins, "max_steps": 3}
    for mode in ("merge", "retrieve"):
        _, editor, x = attach(name, mode=mode, mask_ratio=0.2, density=0.3, norm_constraint=0.02, **options)
        edits = [make_edit(seed, name) for seed in range(5)]
        masks = []
        for number in range(5):
            editor.open_id.fill_(number)
            masks.append(editor.mask())
        editor.open_id.zero_()
        expected = reference.stream(
            matrix(editor),
            [on_paper(editor, edit) for edit in edits],
            masks,
            shard_size=1,
            shards=2,
            steps=3,
            lr=0.1,
            margins=margins,
            density=0.3,
            retrieve=mode == "retrieve",
            limit=0.02,
        )
        for edit in edits:
            editor.edit([edit])
        deltas, _ = editor.sides()
        assert len(deltas) == len(expected.sides) == (3 if mode == "merge" else 4)
        thresholds = [*editor.shards.sides()[1].tolist(), float(editor.threshold)]
        for delta, threshold, side in zip(deltas, thresholds, expected.sides, strict=True):
            torch.testing.assert_close(delta.detach(), side.delta, **EXACT)
            assert threshold == pytest.approx(side.threshold, rel=1e-9)
        if mode == "retrieve":
            continue
        a = activations(editor, x)
        main = F.linear(a, matrix(editor), down_of(editor).bias)
        every = torch.ones(a.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(down_of(editor)(a), reference.read(a, every, main, expected.sides), **EXACT)


def test_15_an_edit_may_be_padded() -> None:
    edit = make_edit()
    pad = torch.nn.functional.pad
    mask = pad(torch.ones_like(edit.inputs, dtype=torch.bool), (0, 2))
    padded = Edit(
        pad(edit.inputs, (0, 2)), pad(edit.targets, (0, 2), value=NOT_SCORED), mask, edit.unrelated, edit.unrelated >= 0
    )
    deltas = []
    for one in (edit, padded):
        _, editor, _ = attach()
        editor.edit([one])
        deltas.append(editor.delta.detach())
        assert editor.questions.inputs.shape == (1, PROMPT, WIDTH)
    torch.testing.assert_close(*deltas, **EXACT)


@BOTH
@every_host
def test_16_detached_the_host_is_what_it_was_and_files_give_the_same_routing(
    name: str, wrap: bool, tmp_path: Path
) -> None:
    host, editor, x = attach(name, torch.float32, wrap=wrap, max_steps=2)
    tensors = copy.deepcopy(host.state_dict())
    with editor.disabled():
        before = read(host, x)
    for seed in range(7):  # a memory, a shard and an open one
        editor.edit([make_edit(seed, name, torch.float32)])
    assert [len(editor.shards.memories), len(editor.shards.shards), int(editor.open_edits)] == [1, 3, 1]
    editor.save(tmp_path / "edits")
    twin = Wise.attach(make_host(name), **{**QUICK, "max_steps": 2})
    twin.load(tmp_path / "edits")
    same_state(twin.state_dict(), state(editor))
    for inputs in (x, make_edit(0, name, torch.float32).inputs, make_edit(6, name, torch.float32).inputs):
        ours, theirs = editor.routing(inputs), twin.routing(inputs)
        assert torch.equal(ours.activations, theirs.activations)
        assert torch.equal(ours.chosen, theirs.chosen)
        assert torch.equal(read(host, inputs), read(twin.host, inputs))
    editor.detach()
    assert torch.equal(read(host, x), before)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in host.state_dict().items())
