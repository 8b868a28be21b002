"""The op of the Graph Memory Transformer against its loop; numbers are those of the spec, section 16."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memzoo.layers.ops.graph_memory import graph_memory, graph_tables
from memzoo.layers.reference.graph_memory import graph_memory as loop
from tests.layers.graph_memory_cases import DIM, NAVIGATION, ROUTES, assert_close, few_cases, make_case, randn

WEIGHTS = ("centroids", "edges", "query", "key")


def run(op, case, temperature, *, autocast=False, **options):
    """Outputs, and the gradients of a random projection of all of them."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in case.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        movement, routing = op(**inputs, temperature=temperature, **options)
    results = {"movement": movement} | {name: getattr(routing, name) for name in ROUTES}
    total = sum((result * randn(*result.shape, seed=i)).sum() for i, result in enumerate(results.values()))
    gradients = torch.autograd.grad(total, list(inputs.values()))
    return results | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def assert_is_the_loop(case, temperature=1.0, **options):
    assert_close(run(graph_memory, case, temperature, **options), run(loop, case, temperature, **options))


def test_the_routing_is_a_frozen_record_of_five_tensors():
    _, routing = graph_memory(**make_case(), temperature=1.0)
    assert tuple(field.name for field in dataclasses.fields(routing)) == ROUTES
    assert all(getattr(routing, name).shape == (2, 3, 5) for name in ROUTES)


def test_the_loop_is_the_equations_for_two_slots_by_hand():
    """x = (1, 0), C' = (1, 0), (0, 2): similarities 1, 0; logits 1 / 0.01 / 50 = 2 and 1 / 50; edges swap the slots."""
    x, centroids = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    query, key = torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 1.0]])
    movement, routing = loop(x, centroids, torch.full((2, 2), 7.0), query, key, 50.0)
    first = 1 / (1 + math.exp(1 / 50 - 2))
    target = 1 / (1 + math.exp((first + 3.0) - (1 - first + 1.5)))
    assert_close(routing.similarity, torch.tensor([[[1.0, 0.0]]]), 0)
    assert_close(routing.source, torch.tensor([[[first, 1 - first]]]), 1e-6)
    assert_close(routing.prior, torch.tensor([[[1 - first, first]]]), 1e-6)
    assert_close(routing.scores, torch.tensor([[[1.5, 3.0]]]), 1e-6)
    assert_close(routing.target, torch.tensor([[[target, 1 - target]]]), 1e-6)
    assert_close(movement, torch.tensor([[[target - first, 2 * (first - target)]]]), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("edge_mode", ["prob", "logprob"])
def test_it_equals_the_loop_with_all_gradients(edge_mode, hops, temperature):
    assert_is_the_loop(make_case(), temperature, edge_mode=edge_mode, hops=hops)


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_it_equals_the_loop_for_any_number_of_slots(slots):
    assert_is_the_loop(make_case(slots=slots), distance_floor=0.05, hops=2)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_it_equals_the_loop_for_tokens_at_the_floor(temperature):
    """Parallel to a centroid, antiparallel, and a copy of it: no gradient passes the floor."""
    case = make_case()
    case["x"][0, 0], case["x"][0, 1] = 3 * case["centroids"][2], -case["centroids"][1]
    case["x"][1, 0] = case["centroids"][4]
    assert_is_the_loop(case, temperature)


def test_it_equals_the_loop_for_one_token_and_for_one_row():
    assert_is_the_loop(make_case(batch=1, time=1))
    assert_is_the_loop(make_case(batch=3, time=1))


def test_it_equals_the_loop_for_a_tensor_as_temperature_and_with_its_gradient():
    temperatures = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    outputs = [op(**make_case(), temperature=t)[0] for op, t in zip((graph_memory, loop), temperatures, strict=True)]
    assert_close(*outputs)
    assert_close(*(torch.autograd.grad(y.square().sum(), t)[0] for y, t in zip(outputs, temperatures, strict=True)))


def test_memory_layout_makes_no_difference():
    case = make_case()
    strided = {name: tensor.mT.contiguous().mT for name, tensor in case.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_close(run(graph_memory, strided, 1.0), run(loop, case, 1.0))


@pytest.mark.parametrize("edge_mode", ["prob", "logprob"])
def test_gradcheck(edge_mode):
    case = make_case(batch=1, time=2, slots=3)
    inputs = [tensor.requires_grad_() for tensor in case.values()]

    def outputs(*tensors):
        movement, routing = graph_memory(*tensors, 1.0, edge_mode=edge_mode, hops=2)
        return movement, routing.source, routing.target

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("op", [graph_memory, loop])
def test_float64_stays_and_half_precision_becomes_float32(op):
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.half, torch.float32)):
        movement, routing = op(**{name: t.to(dtype) for name, t in make_case(time=1).items()}, temperature=0.1)
        assert {movement.dtype, *(getattr(routing, name).dtype for name in ROUTES)} == {wide}


@pytest.mark.parametrize("narrow", [("x",), ("x", *WEIGHTS)])
def test_bfloat16_input_is_computed_in_float32(narrow):
    case = {name: tensor.float() for name, tensor in make_case(slots=8).items()}
    case |= {name: case[name].bfloat16() for name in narrow}
    actual = graph_memory(**case, temperature=0.1)
    expected = graph_memory(**{name: tensor.float() for name, tensor in case.items()}, temperature=0.1)
    assert_close(actual[0], expected[0], 0)
    assert_close(actual[1], expected[1], 0)


def test_autocast_is_computed_in_float32_with_its_gradients():
    case = {name: tensor.float() for name, tensor in make_case(slots=8).items()}
    assert_close(run(graph_memory, case, 0.1, autocast=True), run(graph_memory, case, 0.1), 0)


@given(seed=st.integers(0, 1000), slots=st.integers(2, 9), temperature=st.sampled_from([0.1, 0.5, 1.0, 10.0]))
@few_cases
def test_03_distributions_are_distributions(seed, slots, temperature):
    case = {name: tensor.float() for name, tensor in make_case(slots=slots, seed=seed).items()}
    tables = graph_tables(*(case[name] for name in WEIGHTS))
    _, routing = graph_memory(**case, temperature=temperature)
    for probabilities in (routing.source, routing.prior, routing.target, tables.transitions):
        assert (probabilities >= 0).all()
        assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]), 1e-6)
    assert torch.equal(tables.transitions.diagonal(), torch.zeros(slots))


@given(order=st.permutations(range(5)), seed=st.integers(0, 1000), edge_mode=st.sampled_from(["prob", "logprob"]))
@few_cases
def test_04_the_order_of_the_slots_has_no_meaning(order, seed, edge_mode):
    case = make_case(seed=seed)
    movement, routing = graph_memory(**case, temperature=0.5, edge_mode=edge_mode)
    permuted = case | {"centroids": case["centroids"][order], "edges": case["edges"][order][:, order]}
    other, other_routing = graph_memory(**permuted, temperature=0.5, edge_mode=edge_mode)
    assert_close(other, movement)
    for name in ROUTES:
        assert_close(getattr(other_routing, name), getattr(routing, name)[..., order])


def test_04_centroids_without_their_edges_are_another_graph():
    case = make_case()
    order = [1, 2, 3, 4, 0]
    moved, _ = graph_memory(**case | {"centroids": case["centroids"][order]}, temperature=1.0)
    assert (moved - graph_memory(**case, temperature=1.0)[0]).abs().max() > 1e-3


def test_05_the_source_knows_directions_and_the_target_lengths_too():
    case = {name: tensor.float() for name, tensor in make_case().items()}
    _, once = graph_memory(**case, temperature=1.0)
    _, thrice = graph_memory(**case | {"x": 3 * case["x"]}, temperature=1.0)
    assert_close(thrice.source, once.source, 1e-6)
    assert (thrice.target - once.target).abs().max() > 1e-2


@given(seed=st.integers(0, 1000), sharpness=st.sampled_from([1.0, 30.0]))
@few_cases
def test_06_the_prior_moves_log_odds_by_at_most_one(seed, sharpness):
    case = make_case(seed=seed)
    case["edges"] *= sharpness
    _, routing = graph_memory(**case, temperature=0.1)
    change = routing.target.log() - routing.scores
    assert (change[..., :, None] - change[..., None, :]).abs().max() <= 1 + 1e-12


def test_06_as_a_logarithm_the_prior_has_no_such_bound():
    case = make_case()
    case["edges"] *= 30
    _, routing = graph_memory(**case, temperature=0.1, edge_mode="logprob")
    change = routing.target.log() - routing.scores
    assert (change.amax(-1) - change.amin(-1)).max() > 5


def test_07_a_hot_source_is_uniform():
    _, routing = graph_memory(**make_case(), temperature=1e9)
    assert_close(routing.source, torch.full_like(routing.source, 1 / 5), 1e-6)
    assert_close(graph_memory(**make_case(), temperature=math.inf)[1].source, torch.full_like(routing.source, 1 / 5), 0)


def test_07_at_a_centroid_the_logit_is_one_over_floor_and_temperature():
    """Two slots, the other one orthogonal: logits 1 / (0.2 tau) and 1 / tau, so the log-odds are 4 / tau."""
    case = make_case(slots=2)
    case["centroids"] = torch.eye(2, DIM, dtype=torch.float64)
    case["x"] = 3 * case["centroids"][1].expand(1, 1, DIM)
    _, routing = graph_memory(**case, temperature=2.0, distance_floor=0.2)
    assert_close(routing.source[0, 0].log().diff(), torch.tensor([2.0], dtype=torch.float64), 1e-14)


def test_08_without_queries_and_edges_a_token_leaves_for_any_other_slot():
    case = make_case()
    case |= {"query": torch.zeros_like(case["query"]), "edges": torch.zeros_like(case["edges"])}
    _, routing = graph_memory(**case, temperature=0.5)
    assert_close(routing.prior, (1 - routing.source) / 4, 1e-14)
    assert_close(routing.target, routing.prior.softmax(-1), 1e-14)


def test_10_merged_products_equal_the_separate_ones():
    """In float32, with the tables the centres and the scores as the equations have them."""
    case = {name: tensor.float() for name, tensor in make_case(slots=8).items()}
    x, centroids, _, query, key = case.values()
    tables = graph_tables(*(case[name] for name in WEIGHTS))
    movement, routing = graph_memory(**case, temperature=0.1)
    assert_close(movement, routing.target @ centroids - routing.source @ centroids, 1e-5)
    assert tables.projection.shape == (DIM, 16)
    similarity, scores = (x @ tables.projection).chunk(2, -1)
    assert_close(
        similarity / x.norm(dim=-1, keepdim=True), F.normalize(x, dim=-1) @ F.normalize(centroids, dim=-1).T, 1e-4
    )
    assert_close(scores, (x @ query.T) @ (centroids @ key.T).T / NAVIGATION**0.5, 1e-4)
    assert_close(tables.centroids, centroids, 0)


def test_the_diagonal_of_the_edges_plays_no_part():
    case = make_case()
    case["edges"].fill_diagonal_(1e6)
    case["edges"].requires_grad_()
    other = make_case()
    other["edges"].fill_diagonal_(-3.0)
    movement, _ = graph_memory(**case, temperature=1.0)
    assert_close(movement, graph_memory(**other, temperature=1.0)[0], 0)
    (gradient,) = torch.autograd.grad(movement.square().sum(), case["edges"])
    assert torch.equal(gradient.diagonal(), torch.zeros(5, dtype=torch.float64))
    assert (gradient.abs().sum() > 0).all()


def test_a_token_of_zeros_is_equally_far_from_every_slot():
    case = make_case()
    case["x"] = torch.zeros_like(case["x"])
    movement, routing = graph_memory(**case, temperature=0.1)
    assert torch.equal(routing.similarity, torch.zeros_like(routing.similarity))
    assert_close(routing.source, torch.full_like(routing.source, 1 / 5), 1e-15)
    assert movement.isfinite().all()
