"""MixtureOfMemories in time and across rows: spec section 7, checks 6-9, 11, 14, 16, 22 and 24; states of others."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memzoo.layers.mixture_of_memories import MixtureOfMemories
from memzoo.layers.reference.mixture_of_memories import mixture_of_memories
from memzoo.layers.trace import Trace
from tests.layers.mixture_cases import (
    DIM,
    HEADS,
    KEY,
    MEMORIES,
    PLACES,
    PLAIN,
    RULES,
    SIZES,
    VALUE,
    WIDTH,
    assert_close,
    build,
    choose,
    few_cases,
    mixture_of,
    pad,
    run_by,
    tokens,
)

EXACT = 1e-12
LOW = (torch.float32, torch.bfloat16, torch.float16)


def edited(x: Tensor, where: Any, *, reroute: bool) -> Tensor:
    """Other tokens in some places, which choose the same memories unless they are to choose others."""
    other = tokens(*x.shape[:2], seed=9).to(x)
    if not reroute:
        other[..., :MEMORIES] = x[..., :MEMORIES]
    changed = x.clone()
    changed[where] = other[where]
    return changed


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("time", [8, 40, 96, 300])
def test_06_no_token_sees_a_later_one(time: int, training: bool, place: str) -> None:
    """Bit for bit, while the buckets keep their sizes and so the products their shapes."""
    layer, x = build(conv=place).train(training), tokens(time=time)
    y, _ = layer(x)
    for start in (time // 3, time - 1):
        future = (slice(None), slice(start, None))
        again, _ = layer(edited(x, future, reroute=False))
        assert torch.equal(again[:, :start], y[:, :start])
        assert (again[:, start:] - y[:, start:]).abs().amax(-1).min() > 1e-6
        again, _ = layer(edited(x, future, reroute=True))
        assert_close(again[:, :start], y[:, :start], EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_06_no_token_sees_a_later_one_whatever_the_rule(rule: str) -> None:
    layer, x = build(rule=rule), tokens(time=40)
    y, _ = layer(x)
    future = (slice(None), slice(13, None))
    assert torch.equal(layer(edited(x, future, reroute=False))[0][:, :13], y[:, :13])
    assert_close(layer(edited(x, future, reroute=True))[0][:, :13], y[:, :13], EXACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_07_rows_do_not_see_each_other(place: str, training: bool) -> None:
    layer, x = build(conv=place).train(training), tokens(batch=3, time=40)
    y, state = layer(x)
    others = (slice(0, 3, 2),)  # the rows before and after row 1
    again, end = layer(edited(x, others, reroute=False))
    assert torch.equal(again[1], y[1])
    assert_close(end.reorder([1]), state.reorder([1]), 0)
    again, end = layer(edited(x, others, reroute=True))
    assert_close(again[1], y[1], EXACT)
    assert_close(end.reorder([1]), state.reorder([1]), EXACT)
    alone, end = layer(x[1:2])
    assert_close(alone[0], y[1], EXACT)
    assert_close(end, state.reorder([1]), EXACT)


@pytest.mark.parametrize("place", PLACES)
def test_08_training_and_evaluation_are_the_same(place: str) -> None:
    layer, x = build(conv=place), tokens(time=70)
    y, state = layer.train()(x)
    again, end = layer.eval()(x)
    assert torch.equal(y, again)
    assert_close(state, end, 0)


def unevenly_used(time: int = 70) -> Tensor:
    """A prefix that hits two memories, then others, and one memory that no token ever chooses."""
    plan = [[0, 1]] * 20 + [[0, 2]] * 15 + [[2, 1]] * (time - 35)
    return choose(tokens(time=time), plan)


def cuts_every(step: int, time: int = 70) -> list[int]:
    return list(range(step, time, step))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "cuts", [cuts_every(1), cuts_every(3), cuts_every(4), [65], [2, 3, 31, 32, 69], [1, 18, 22, 35, 36, 40]]
)
def test_09_every_way_of_cutting_gives_the_same(cuts: list[int], place: str) -> None:
    layer, x = build(conv=place), unevenly_used()
    y, state = layer(x)
    again, end = run_by(layer, x, cuts)
    assert_close(again, y)
    assert_close(end, state)
    assert place == "input" or state.tokens_seen[:, 3].tolist() == [0, 0]


@pytest.mark.parametrize(
    "options", [*(dict(rule=rule) for rule in RULES), dict(shared=False, top_k=1), dict(conv=None)]
)
def test_09_every_way_of_cutting_gives_the_same_with_every_option(options: dict[str, Any]) -> None:
    layer, x = build(**options), tokens(time=20)
    y, state = layer(x)
    for cuts in (cuts_every(1, 20), [3, 5, 14]):
        again, end = run_by(layer, x, cuts)
        assert_close(again, y)
        assert_close(end, state)


@few_cases
@given(
    st.sampled_from(RULES),
    st.sampled_from(PLACES),
    st.lists(st.integers(1, 39), min_size=1, unique=True).map(sorted),
    st.lists(st.permutations(range(MEMORIES)), min_size=40, max_size=40),
)
def test_09_random_cuts_of_random_routes_give_the_same(
    rule: str, place: str, cuts: list[int], routes: list[list[int]]
) -> None:
    layer, x = build(rule=rule, conv=place, chunk_size=4), choose(tokens(time=40), [route[:2] for route in routes])
    y, state = layer(x)
    again, end = run_by(layer, x, cuts)
    assert_close(again, y)
    assert_close(end, state)


@pytest.mark.parametrize("new", [1, 2, 4, 5, 66])
def test_09_any_number_of_tokens_may_follow_memories_that_were_never_used(new: int) -> None:
    """Public code indexes past the end here unless exactly k or all memories of the rows are hit."""
    layer = build()
    for before, after in (([[1, 0]], [[1, 2]]), ([[1, 0]], [[3, 2]]), ([[0, 1], [2, 3]], [[1, 0]])):
        x = choose(tokens(time=len(before) + new, seed=new), before + after * new)
        y, state = layer(x)
        again, end = run_by(layer, x, [len(before)])
        assert_close(again, y)
        assert_close(end, state)


def test_09_a_state_that_is_passed_stays_as_it_is() -> None:
    layer, x = build(), tokens()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            _, state = layer(x)
            before = state.clone()
            layer(x, state)
            assert_close(state, before, 0)


def test_09_rows_of_a_batch_may_stand_anywhere() -> None:
    """The row's own past counts, not that of the row beside it."""
    layer = build()
    x = [tokens(1, length, seed=length) for length in (3, 17, 8)]
    starts = [layer(row[:, :-2])[1] for row in x]
    joined = type(starts[0])(
        *(torch.cat(parts) for parts in zip(*(s.named_tensors().values() for s in starts), strict=True))
    )
    y, end = layer(torch.cat([row[:, -2:] for row in x]), joined)
    for number, (row, start) in enumerate(zip(x, starts, strict=True)):
        alone, state = layer(row[:, -2:], start)
        assert_close(y[number], alone[0], EXACT)
        assert_close(end.reorder([number]), state, EXACT)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shared", [True, False])
def test_11_the_state_has_one_size(shared: bool, place: str) -> None:
    layer, memories, channels = build(conv=place, shared=shared), MEMORIES + shared, HEADS * (2 * KEY + VALUE)
    x, state = tokens(batch=2, time=10_000), None
    sizes = []
    for start, end in ((0, 1), (1, 100), (100, 10_000)):
        _, state = layer(x[:, start:end], state)
        sizes.append(state.nbytes)
    tail = memories * channels if place == "bucket" else DIM
    kept = memories * HEADS * KEY * VALUE + (WIDTH - 1) * tail
    counters = 2 + MEMORIES  # position, document, tokens_seen
    assert sizes == [2 * 8 * (kept + counters)] * 3


def saturated(dtype: torch.dtype, time: int = 24) -> tuple[MixtureOfMemories, Tensor]:
    """Logits 500 and more apart: the weight of the second memory is zero in every one of these types."""
    layer = build(dtype=dtype)
    with torch.no_grad():
        layer.router.weight.mul_(1000)
    draw = torch.Generator().manual_seed(0)
    plan = [torch.randperm(MEMORIES, generator=draw)[:2].tolist() for _ in range(time)]
    return layer, choose(tokens(time=time), plan).to(dtype)


def few_roundings(y: Tensor) -> float:
    return 64 * torch.finfo(y.dtype).eps * y.abs().max().item()


@pytest.mark.parametrize("dtype", LOW)
def test_14_a_saturated_router_is_right(dtype: torch.dtype) -> None:
    """The memory of no weight is still written: what chooses is the index, not the weight."""
    layer, x = saturated(dtype)
    y, state = layer(x)
    assert all(value.isfinite().all() for value in (y, *state.named_tensors().values()))
    truth = mixture_of_memories(x.double(), mixture_of(layer.double()))
    assert torch.equal(state.tokens_seen, truth.tokens_seen)
    assert_close(y.double(), truth.y, few_roundings(y))
    assert_close(state.memories.double(), truth.memories, few_roundings(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_14_routing_is_wider_than_the_inputs(dtype: torch.dtype) -> None:
    """Two tokens whose logits differ by 1 at a magnitude where ``dtype`` has steps of 2."""
    layer, x = build(top_k=1, dtype=dtype), torch.zeros(1, 2, DIM, dtype=dtype)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2, 4] = 2 / torch.finfo(dtype).eps
        layer.router.weight[[0, 1], [5, 6]] = 1
    x[0, :, 4] = 1
    x[0, [0, 1], [5, 6]] = 1
    assert layer(x)[1].tokens_seen.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", LOW)
def test_14_a_saturated_router_is_causal_and_streams(dtype: torch.dtype) -> None:
    layer, x = saturated(dtype)
    y, state = layer(x)
    again, _ = layer(edited(x, (slice(None), slice(9, None)), reroute=False))
    assert torch.equal(again[:, :9], y[:, :9])
    again, end = run_by(layer, x, [1, 2, 9, 15])
    assert_close(again, y, few_roundings(y))
    assert_close(end, state, few_roundings(y))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_16_padded_or_packed_is_as_one_by_one(layout: str, place: str) -> None:
    layer, lengths = build(conv=place), (5, 1, 17)
    pieces = [tokens(1, length, seed=length) for length in lengths]
    expected = [layer(piece) for piece in pieces]
    if layout == "packed":
        doc_ids = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
        y, state = layer(torch.cat(pieces, 1), doc_ids=doc_ids)
        outputs = y[0].split(lengths)
        expected_state = replace(expected[-1][1], document=torch.tensor([2]))
        assert_close(state, expected_state, EXACT)
    else:
        x, mask = pad(pieces, 20, left=layout == "left")
        y, state = layer(x, mask=mask)
        outputs = [row[real] for row, real in zip(y, mask, strict=True)]
        for number, (_, end) in enumerate(expected):
            assert_close(state.reorder([number]), end, EXACT)
        assert not y[~mask].any()
    for output, (alone, _) in zip(outputs, expected, strict=True):
        assert_close(output, alone[0], EXACT)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_16_a_call_of_masked_tokens_alone_gives_every_parameter_a_gradient_of_zero(rule: str, place: str) -> None:
    layer, x = build(rule=rule, conv=place), tokens().requires_grad_()
    y, state = layer(x, mask=torch.zeros(2, 11, dtype=torch.bool))
    assert_close(state, layer.initial_state(2), 0)
    (y.square().sum() + y.sum()).backward()
    for name, value in {"x": x, **dict(layer.named_parameters())}.items():
        assert value.grad is not None, name
        assert not value.grad.any(), name


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("rule", ["gated_deltanet", "kda"])
def test_22_thousands_of_steps_that_forget_all_are_finite_and_right(rule: str, mixture: bool) -> None:
    """Log decays of about -200 a step: softplus(20) of -10."""
    if mixture:
        layer = build(rule=rule, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        layer = PLAIN[rule](DIM, **SIZES)
    with torch.no_grad():
        layer.rule.step_bias.fill_(20)
        layer.rule.decay_log.fill_(math.log(10))
    _, decay = layer.rule.gate_values(torch.zeros(1, 1, layer.rule.gate_width), torch.zeros(1, 1, HEADS, VALUE))
    torch.testing.assert_close(decay, torch.full_like(decay, -200.0))
    x = tokens(batch=1, time=4000).float().requires_grad_()
    y, state = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(value.isfinite().all() for value in (y, *state.named_tensors().values(), *gradients))
    exact, _ = layer.double()(x.detach().double())
    assert_close(y.double(), exact, few_roundings(y))


OTHERS: dict[str, dict[str, Any]] = {
    "fewer_memories": dict(num_memories=3),
    "a_memory_more_and_none_shared": dict(num_memories=5, shared=False),
    "none_shared": dict(shared=False),
    "wider_values": dict(value_dim=2 * VALUE),
    "other_rule": dict(rule="linear_attention"),
    "no_convolution": dict(conv=None),
    "convolved_input": dict(conv="input"),
    "longer_convolution": dict(conv_width=WIDTH + 1),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_layer_is_refused_and_kept(options: dict[str, Any], donate: bool) -> None:
    with torch.no_grad():
        _, state = MixtureOfMemories(DIM, **SIZES | options).double()(tokens())
        before = state.clone()
        with pytest.raises(ValueError, match=r"state holds memories .*this layer's are .*start afresh"):
            build()(tokens(), state, donate=donate)
    assert_close(state, before, 0)


@pytest.mark.parametrize("donate", [False, True])
def test_a_state_that_counts_other_memories_is_refused_and_kept(donate: bool) -> None:
    layer = build()
    with torch.no_grad():
        _, state = layer(tokens())
        state = replace(state, tokens_seen=state.tokens_seen[:, 1:])
        before = state.clone()
        with pytest.raises(ValueError, match=r"counts of 3 memories.* and 4"):
            layer(tokens(), state, donate=donate)
    assert_close(state, before, 0)


@pytest.mark.parametrize("place", PLACES)
def test_24_a_state_from_disk_continues(place: str, tmp_path: Path) -> None:
    layer, x = build(conv=place), tokens()
    _, state = layer(x[:, :6])
    expected, end = layer(x[:, 6:], state)
    state.save(tmp_path / "state.safetensors")
    other = build(seed=1, conv=place)
    other.load_state_dict(layer.state_dict())
    loaded = other.initial_state(1).load(tmp_path / "state.safetensors")
    y, again = other(x[:, 6:], loaded)
    assert torch.equal(y, expected)
    assert_close(again, end, 0)


@pytest.mark.parametrize("place", PLACES)
def test_24_gradients_flow_through_the_state_until_it_is_detached(place: str) -> None:
    layer = build(conv=place)
    gradients = []
    for cut in (None, "kept", "detached"):
        x = tokens().requires_grad_()
        if cut is None:
            y = layer(x)[0][:, 6:]
        else:
            _, state = layer(x[:, :6])
            y, _ = layer(x[:, 6:], state.detach() if cut == "detached" else state)
        y.square().sum().backward()
        gradients.append(x.grad)
    whole, kept, detached = gradients
    assert_close(kept, whole)
    assert whole[:, :6].abs().max() > 1e-3
    assert not detached[:, :6].any()


def test_the_norms_of_memories_are_those_of_the_returned_state():
    """A mask as long as there are memories must not be taken for their axis, nor documents for rows."""
    layer, x = MixtureOfMemories(16, num_heads=2), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    documents = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    for grids in ({}, {"mask": mask}, {"doc_ids": documents}, {"mask": mask, "doc_ids": documents}):
        trace = Trace()
        _, state = layer(x, trace=trace, **grids)
        assert torch.equal(trace.signals["memory_norm"], state.memories.flatten(2).norm(dim=-1))
