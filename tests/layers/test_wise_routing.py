"""WISE: which inputs read a side memory; checks 7, 11 and 15 of its spec."""

import math

import pytest
import torch
from torch.nn import functional as F

from memzoo.layers import Wise
from memzoo.layers.reference import wise as reference
from memzoo.layers.wise_routing import MAIN, Indicator, Routing
from tests.layers.side_hosts import VOCAB_SIZE, make_host, make_inputs, read
from tests.layers.wise_cases import EXACT, activations, attach, down_of, every_host, hand_made, matrix, site_inputs

BOTH = pytest.mark.parametrize("wrap", [False, True], ids=["hooks", "wrappers"])
BEYOND = math.inf  # a threshold that nothing is above


@every_host
def test_07_the_indicator_is_the_distance_of_two_full_products(name: str) -> None:
    _, editor, x = attach(name)
    (delta,) = hand_made(editor, 0.0)
    a, down = activations(editor, x), down_of(editor)
    weight, bias = matrix(editor), 0 if down.bias is None else down.bias
    full = (F.linear(a, weight + delta) + bias) - (F.linear(a, weight) + bias)
    found = editor.indicator(x)
    torch.testing.assert_close(found, full.norm(dim=-1).mean(1), **EXACT)
    every = torch.ones(a.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(found, reference.indicator(a, every, delta), **EXACT)
    with torch.no_grad():
        editor.delta.mul_(-2.5)
    torch.testing.assert_close(editor.indicator(x), 2.5 * found, **EXACT)


@pytest.mark.parametrize("reduce", ["mean", "max", "last"])
@pytest.mark.parametrize("indicator", ["linear", "activated"])
def test_07_every_kind_of_indicator_is_that_of_the_equations(indicator: str, reduce: str) -> None:
    _, editor, x = attach("gpt2", indicator=indicator, reduce=reduce)
    (delta,) = hand_made(editor, 0.0)
    counted = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    a, down = activations(editor, x), down_of(editor)

    def token(t: torch.Tensor) -> torch.Tensor:
        if indicator == "linear":
            return reference.token_indicator(t, delta)
        return reference.activated_indicator(t, delta, matrix(editor), editor.site.activation, down.bias)

    rows = [
        reference.reduce_tokens(torch.stack([token(t) for t in row]), counts, reduce)
        for row, counts in zip(a, counted, strict=True)
    ]
    torch.testing.assert_close(editor.indicator(x, asked=counted), torch.stack(rows).detach(), **EXACT)


def test_07_a_row_in_which_nothing_counts_responds_to_nothing() -> None:
    y = torch.zeros(2, 3, 4)
    counted = torch.tensor([[False] * 3, [True] * 3])
    for reduce in ("mean", "max", "last", "easyedit"):
        assert Indicator(reduce, None).of_rows(y, y + 1, counted).tolist() == [0, 2]


def test_10_easyedit_is_the_mean_of_up_to_a_hundred_tokens_and_the_largest_of_more() -> None:
    """Of those that count, in each row by itself."""
    z = torch.randn(3, 130, 4, generator=torch.Generator().manual_seed(0)).double()
    counted = torch.arange(130) < torch.tensor([[100], [101], [3]])
    found = Indicator("easyedit", None).of_rows(torch.zeros_like(z), z, counted)
    lengths = z.norm(dim=-1)
    expected = [reference.reduce_tokens(row, counts, "easyedit") for row, counts in zip(lengths, counted, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)
    assert found[1] == lengths[1, :101].max()
    _, editor, x = attach(reduce="easyedit")
    hand_made(editor, 0.0)
    _, other, _ = attach()
    hand_made(other, 0.0)
    assert torch.equal(editor.indicator(x), other.indicator(x))


@BOTH
def test_11_the_memory_that_responds_most_is_read_and_none_below_the_thresholds(wrap: bool) -> None:
    host, editor, _ = attach("gpt2", mode="retrieve", wrap=wrap)
    x = make_inputs("gpt2", batch=8, dtype=torch.float64)
    before, deltas = read(host, x), hand_made(editor, 0.0, 0.0)
    a, every = activations(editor, x), torch.ones(8, 6, dtype=torch.bool)
    found = editor.routing(x)
    said = torch.stack([reference.indicator(a, every, delta) for delta in deltas])
    torch.testing.assert_close(found.activations, said, **EXACT)
    assert {*found.chosen.tolist()} == {0, 1}
    limit = float(said.amax(0).median())
    for thresholds in ((0.0, 0.0), (limit, limit), (BEYOND, 0.0), (BEYOND, BEYOND)):
        editor.shards.memory_threshold.fill_(thresholds[0])
        editor.threshold.fill_(thresholds[1])
        with site_inputs(editor) as seen:
            y = read(host, x)
        sides = [reference.Side(delta, threshold) for delta, threshold in zip(deltas, thresholds, strict=True)]
        main = F.linear(seen[0], matrix(editor), down_of(editor).bias)
        expected = reference.read(seen[0], every, main, sides)
        torch.testing.assert_close(down_of(editor)(seen[0]), expected, **EXACT)
        chosen = [reference.route(said[:, row].tolist(), thresholds) for row in range(8)]
        assert editor.routing(x).chosen.tolist() == [MAIN if side is None else side for side in chosen]
        untouched = torch.tensor([side is None for side in chosen])
        assert torch.equal(y[untouched], before[untouched])


def test_11_a_prompt_decides_for_what_is_generated() -> None:
    host, editor, _ = attach()
    x = make_inputs("ours", batch=6, time=8, dtype=torch.float64)
    hand_made(editor, 0.0)
    prompt = editor.routing(x[:, :4]).activations[0]
    editor.threshold.copy_(prompt.median() * 1.001)
    _, carried = host(x[:, :4])
    decided = prompt > editor.threshold * (1 - 1e-6)
    states = [carried]
    for place in range(4, 8):
        with site_inputs(editor) as seen:
            _, after = host(x[:, place : place + 1], states[-1])
        states.append(after)
        y = down_of(editor)(seen[0])
        main = F.linear(seen[0], matrix(editor))
        assert torch.equal((y != main).flatten(1).any(1), decided)
    editor.new_prompt()
    own = reference.indicator(seen[0], torch.ones(6, 1, dtype=torch.bool), editor.delta.detach())
    alone = own > editor.threshold * (1 - 1e-6)
    assert not torch.equal(alone, decided)
    assert torch.equal((down_of(editor)(seen[0]) != main).flatten(1).any(1), alone)
    with editor.reading(torch.ones(6, 4, dtype=torch.bool)):
        host(x[:, :4])
        assert torch.equal((down_of(editor)(seen[0]) != main).flatten(1).any(1), decided)
    with editor.reading(None):  # decides anew
        assert torch.equal((down_of(editor)(seen[0]) != main).flatten(1).any(1), alone)
    host(x[:, :4])
    assert torch.equal((down_of(editor)(seen[0][:3]) != main[:3]).flatten(1).any(1), alone[:3])  # of other rows
    free = Wise.attach(make_host("ours", torch.float64), sticky=False)
    hand_made(free, float(editor.threshold))
    with free.reading(torch.ones(6, 4, dtype=torch.bool)):
        free.host(x[:, :4])
        assert torch.equal((down_of(free)(seen[0]) != main).flatten(1).any(1), alone)
    assert torch.equal((down_of(free)(seen[0]) != main).flatten(1).any(1), alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_15_padding_has_no_part_in_routing(name: str, side: str) -> None:
    host = make_host(name, torch.float64)

    def masked(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if name == "ours":
            result: torch.Tensor = host(inputs, mask=mask)[0]
            return result
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)
        return host(inputs, attention_mask=mask, position_ids=positions).logits  # type: ignore[no-any-return]

    editor = Wise.attach(host, answer=masked)
    hand_made(editor, 0.0)
    x = make_inputs(name)
    plain = editor.routing(x)
    pad = torch.full((2, 3), VOCAB_SIZE - 1)
    padded, mask = torch.cat([pad, x] if side == "left" else [x, pad], 1), torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = side == "right"
    mask[:, -3:] = side == "left"
    found = editor.routing(padded, mask)
    torch.testing.assert_close(found.activations, plain.activations, **EXACT)
    editor.threshold.copy_(plain.activations.mean())
    assert torch.equal(editor.routing(padded, mask).chosen, editor.routing(x).chosen)
    assert len({*editor.routing(x).chosen.tolist()}) == 2
    assert not torch.allclose(editor.routing(padded).activations, plain.activations)
    y = editor.answer(padded, mask)[mask]
    torch.testing.assert_close(y, editor.answer(x).flatten(0, 1), **EXACT)


def test_routing_is_decided_by_the_strongest_alone() -> None:
    activations = torch.tensor([[1.0, 3.0, 5.0], [2.0, 1.0, 6.0]])
    assert Routing.decide(activations, torch.tensor([0.5, 5.5])).chosen.tolist() == [MAIN, 0, 1]
