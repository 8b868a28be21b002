"""MixtureOfMemories against its equations: spec section 7, checks 1-3, 5, 10, 12, 13, 15, 17, 20 and 25."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers.mixture_of_memories import MixtureOfMemories
from memzoo.layers.reference.mixture_of_memories import mixture_of_memories, query_after_mixing
from tests.layers.mixture_cases import (
    DIM,
    EXACT,
    HEADS,
    KEY,
    MEMORIES,
    PLACES,
    RULES,
    assert_close,
    assert_is,
    build,
    choose,
    chosen_by,
    fla_state_dict,
    mixture_of,
    mixture_of_fla,
    pad,
    plain,
    tokens,
)


@pytest.mark.parametrize(
    ("rule", "output_gate"), [*((rule, False) for rule in RULES), *((rule, True) for rule in RULES if rule != "kda")]
)
def test_01_one_memory_is_the_base_layer(rule: str, output_gate: bool) -> None:
    layer = build(rule=rule, num_memories=1, top_k=1, shared=False, output_gate=output_gate)
    y, state = layer(tokens())
    expected, end = plain(layer, 0, rule)(tokens())
    assert_close(y, expected, EXACT)
    assert_close(state.memories[:, 0], end.memory, EXACT)
    assert_close(state.conv[:, 0], end.conv.tail, EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_02_memories_without_values_leave_the_shared_one_a_base_layer(rule: str) -> None:
    layer = build(rule=rule, output_gate=False)
    with torch.no_grad():
        for projection in layer.key_value[:MEMORIES]:
            projection.weight[HEADS * KEY :] = 0
    y, state = layer(tokens())
    expected, end = plain(layer, MEMORIES, rule)(tokens())
    assert_close(y, expected, EXACT)
    assert_close(state.memories[:, MEMORIES], end.memory, EXACT)
    assert_close(state.conv[:, MEMORIES], end.conv.tail, EXACT)


@pytest.mark.parametrize("place", PLACES)
def test_03_the_order_of_memories_does_not_matter(place: str) -> None:
    """Not even to a layer that takes over in mid-sequence, if its state is put in its order."""
    layer, order = build(conv=place), torch.tensor([2, 0, 3, 1])
    weights = layer.state_dict()
    permuted = weights | {"router.weight": weights["router.weight"][order]}
    for new, old in enumerate(order.tolist()):
        for name in weights:
            for kind in ("key_value", "gates"):
                if name.startswith(f"{kind}.{old}."):
                    permuted[name.replace(f"{kind}.{old}.", f"{kind}.{new}.")] = weights[name]
    other = build(seed=1, conv=place)
    other.load_state_dict(permuted)

    with_shared = torch.tensor([*order, MEMORIES])
    x, tails = tokens(), with_shared if place == "bucket" else torch.tensor([0])
    y, state = layer(x)
    for start, end in ((0, 4), (4, 11)):
        _, before = layer(x[:, :start]) if start else (None, layer.initial_state(2))
        before = replace(
            before, memories=before.memories[:, with_shared], conv=before.conv[:, tails],
            tokens_seen=before.tokens_seen[:, order],
        )  # fmt: skip
        again, after = other(x[:, start:end], before)
        assert_close(again, y[:, start:end], EXACT)
    assert_close(after.memories, state.memories[:, with_shared], EXACT)
    assert_close(after.conv, state.conv[:, tails], EXACT)
    assert torch.equal(after.tokens_seen, state.tokens_seen[:, order])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("time", "chunk_size"), [(11, 64), (40, 4)])
def test_05_it_is_the_loop_over_tokens(rule: str, place: str, time: int, chunk_size: int) -> None:
    layer, x = build(rule=rule, conv=place, chunk_size=chunk_size), tokens(time=time)
    assert_is(layer, x, mixture_of_memories(x, mixture_of(layer)))


OPTIONS: tuple[dict[str, Any], ...] = (
    dict(shared=False),
    dict(top_k=3),
    dict(renormalize=False),
    dict(conv=None),
    dict(conv=None, rule="gla"),
    dict(num_value_heads=2 * HEADS),
    dict(tie_key_values=True),
    dict(output_gate=False),
)


@pytest.mark.parametrize("options", OPTIONS)
def test_05_options_are_those_of_the_loop_over_tokens(options: dict[str, Any]) -> None:
    layer = build(**options)
    assert_is(layer, tokens(), mixture_of_memories(tokens(), mixture_of(layer)))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "linear_attention"])  # whose quotient is not linear
def test_05_mixing_states_before_the_query_is_the_same_where_all_are_asked_the_same(rule: str) -> None:
    layer = build(rule=rule, conv="input")
    assert_is(layer, tokens(), query_after_mixing(tokens(), mixture_of(layer)), EXACT)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("time", "chunk_size"), [(11, 64), (40, 4)])
def test_05_gradients_are_those_of_the_loop_over_tokens(place: str, time: int, chunk_size: int) -> None:
    layer = build(conv=place, chunk_size=chunk_size)
    results = []
    for reference in (False, True):
        x = tokens(time=time).requires_grad_()
        if reference:
            y, memories, tails, _ = mixture_of_memories(x, mixture_of(layer))
        else:
            y, state = layer(x)
            memories, tails = state.memories, state.conv
        draw = torch.Generator().manual_seed(2)
        parts = (y, memories, tails)
        objective = sum((torch.randn(part.shape, generator=draw, dtype=part.dtype) * part).sum() for part in parts)
        results.append(torch.autograd.grad(objective, [x, *layer.parameters()]))
    for name, got, expected in zip(["x", *dict(layer.named_parameters())], *results, strict=True):
        assert expected.abs().max() > 1e-6, name
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_05_nothing_is_dropped_however_many_tokens_choose_the_same_memories() -> None:
    layer, x = build(), choose(tokens(time=25), [[1, 3]] * 25)
    assert_is(layer, x, mixture_of_memories(x, mixture_of(layer)))
    assert layer(x)[1].tokens_seen.tolist() == [[0, 25, 0, 25]] * 2


def test_05_memories_keep_the_order_of_their_tokens_under_a_sort_that_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sort that is not asked to be stable may return equal keys in any order, and on some machines does."""
    layer, x = build(), choose(tokens(batch=3, time=25), [[1, 3]] * 25)
    truth = mixture_of_memories(x, mixture_of(layer))
    argsort = torch.argsort

    def backwards(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Tensor:
        if stable:
            return argsort(input, dim=dim, descending=descending, stable=True)
        order = argsort(input.flip(dim), dim=dim, descending=descending, stable=True)
        return input.shape[dim] - 1 - order

    def backwards_sort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
        order = backwards(input, dim, descending, stable)
        return torch.return_types.sort((input.gather(dim, order), order))

    for owner in (torch, Tensor):
        monkeypatch.setattr(owner, "argsort", backwards)
        monkeypatch.setattr(owner, "sort", backwards_sort)
    assert_is(layer, x, truth)


def test_10_a_memory_that_is_not_chosen_keeps_every_bit() -> None:
    layer = build()
    _, state = layer(tokens())
    assert state.tokens_seen.min() > 0
    _, end = layer(choose(tokens(time=7, seed=3), [[0, 2]] * 7), state)
    for unused in (1, 3):
        for name in ("memories", "conv", "tokens_seen"):
            assert torch.equal(getattr(end, name)[:, unused], getattr(state, name)[:, unused]), (name, unused)
    assert (end.tokens_seen - state.tokens_seen).tolist() == [[7, 0, 7, 0]] * 2


def test_10_a_memory_that_is_not_chosen_has_gradients_and_they_are_zero() -> None:
    layer = build()
    y, state = layer(choose(tokens(), [[0, 2]] * 11))
    (y.square().sum() + state.memories.square().sum()).backward()
    for unused in (1, 3):
        for part in (layer.key_value[unused], layer.gates[unused]):
            for parameter in part.parameters():
                assert parameter.grad is not None
                assert not parameter.grad.any()


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_17_gradients_are_differences_where_segments_are_shorter_than_the_convolution(place: str, time: int) -> None:
    layer = build(conv=place)
    x = choose(tokens(batch=2, time=time), [[0, 1]] * time) if place == "bucket" else tokens(batch=2, time=time)
    filters = layer.conv.weight.detach().clone()
    _, start = layer(tokens(seed=5))

    def run(x: Tensor, filters: Tensor, memories: Tensor, tails: Tensor) -> tuple[Tensor, ...]:
        state = replace(start, memories=memories, conv=tails)
        y, end = torch.func.functional_call(layer, {"conv.weight": filters}, (x, state))
        return y, end.memories, end.conv

    inputs = (x, filters, start.memories.detach(), start.conv.detach())
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs], fast_mode=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_17_gradients_of_all_weights_are_differences(rule: str, place: str) -> None:
    layer, x = (
        build(rule=rule, conv=place, chunk_size=2),
        choose(tokens(time=5), [[0, 1], [2, 0], [0, 1], [1, 0], [0, 2]]),
    )
    names, values = zip(*((name, value.detach().clone()) for name, value in layer.named_parameters()), strict=True)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        y, end = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y, end.memories, end.conv

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in values], fast_mode=True)


def test_17_a_single_token_leaves_most_memories_empty_and_nothing_infinite() -> None:
    layer, x = build(top_k=1), tokens(batch=1, time=1).requires_grad_()
    y, state = layer(x)
    (y.sum() + state.memories.sum()).backward()
    assert all(value.isfinite().all() for value in (y, state.memories, state.conv, x.grad))
    assert state.tokens_seen.sum() == 1


def recall(num_memories: int) -> tuple[Tensor, Tensor]:
    """Store two values under one key and ask twice; return what was stored and what was read.

    Inputs: 0-1 choose the memory, 2-5 are the key, 6-7 the value, 8 the write strength. The weights make each of them
    what it says: keys so long that scaling them to unit length is exact, values so large that SiLU keeps them, write
    strengths of exactly 1 and 0, a convolution of the current token alone.
    """
    layer = MixtureOfMemories(
        DIM, num_heads=1, head_dim=4, value_dim=2, num_memories=num_memories, top_k=1, shared=False, rule="deltanet",
        output_gate=False,
    ).double()  # fmt: skip
    layer.norm = torch.nn.Identity()
    select = torch.eye(DIM, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(10 * select[:num_memories])
        layer.query.weight.copy_(1e5 * select[2:6])
        for projection, gates in zip(layer.key_value, layer.gates, strict=True):
            projection.weight.copy_(torch.cat((1e5 * select[2:6], select[6:8])))
            gates.weight.copy_(1e3 * select[8:9])
        layer.conv.weight.copy_(torch.tensor([0.0, 0, 0, 1]).expand_as(layer.conv.weight))
        layer.out.weight.copy_(2 * select[:, :2])  # K ** 0.5, which the read was divided by
    key, values = select[2], torch.tensor([[50.0, 100.0], [100.0, 50.0]], dtype=torch.float64)
    x = torch.zeros(1, 4, DIM, dtype=torch.float64)
    for t in range(4):
        x[0, t] = select[t % 2] + key + (1 if t < 2 else -1) * select[8]
    x[0, :2, 6:8] = values
    return values, layer(x)[0][0, 2:, :2]


def test_20_equal_keys_in_different_memories_are_both_recalled() -> None:
    values, read = recall(num_memories=2)
    assert_close(read, values, 1e-10)


def test_20_equal_keys_in_one_memory_are_not() -> None:
    values, read = recall(num_memories=1)
    assert_close(read, values[[1, 1]], 1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_25_every_projection_sees_the_tokens_of_its_memory_and_no_other(masked: bool) -> None:
    layer, pieces = build(), [tokens(1, 9), tokens(1, 4, seed=2)]
    rows: dict[str, int] = {}
    for kind in ("key_value", "gates"):
        for number, projection in enumerate(getattr(layer, kind)):
            name = f"{kind}.{number}"
            projection.register_forward_hook(
                lambda _, inputs, output, name=name: rows.update({name: rows.get(name, 0) + inputs[0].numel() // DIM})
            )
    if masked:
        x, mask = pad(pieces, 12, left=False)
        layer(x, mask=mask)
    else:
        pieces = list(tokens(3, 13).split(1))
        layer(torch.cat(pieces))
    counts = torch.stack([chosen_by(layer, piece)[0] for piece in pieces]).sum(0).tolist()
    counts.append(sum(piece.shape[1] for piece in pieces))
    assert rows == {f"{kind}.{m}": count for kind in ("key_value", "gates") for m, count in enumerate(counts)}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_named_as_in_fla_compute_what_its_equations_say(shared: bool, single: bool) -> None:
    layer, weights = build(shared=shared, tie_key_values=single), fla_state_dict(shared=shared, single=single)
    layer.load_fla_state_dict(weights)
    truth = mixture_of_fla(weights, top_k=2, shared=shared, eps=layer.norm.eps)
    assert_is(layer, tokens(), mixture_of_memories(tokens(), truth))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_layer_are_refused_by_name(change: str) -> None:
    weights = fla_state_dict()
    if change == "missing":
        del weights["k_proj.1.weight"]
    elif change == "unknown":
        weights["k_proj.4.weight"] = weights["k_proj.1.weight"]
    else:
        weights["k_proj.1.weight"] = torch.zeros(3, DIM)
    with pytest.raises(ValueError, match=r"k_proj\.1|k_proj\.4|key_value\.1"):
        build().load_fla_state_dict(weights)
