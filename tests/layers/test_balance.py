"""Balance losses: exact values (spec check 15), what their gradients reach, and what does not count."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from memzoo.layers.balance import BALANCES, report_balance
from memzoo.layers.trace import Trace

M = 4
EXACT = {"rtol": 0.0, "atol": 1e-12}


def balance_of(kind: str, *layers: tuple[Tensor, Tensor], row_of: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """The balance loss of a model's layers, each given as probabilities and indices."""
    trace = Trace()
    for number, (probabilities, indices) in enumerate(layers):
        rows = torch.zeros(len(indices), dtype=torch.long) if row_of is None else row_of
        report_balance(trace.scope(f"{number}"), kind, weight, probabilities, indices, rows, int(rows.max()) + 1)
    assert list(trace.losses) == ["balance"]
    return trace.losses["balance"]


def routed(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    probabilities = logits.softmax(-1)
    return probabilities, probabilities.topk(top_k).indices


def collapsed(memories: list[int], tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Every token gives all its probability to the same memories."""
    probabilities = torch.zeros(tokens, M, dtype=torch.float64)
    probabilities[:, memories] = 1 / len(memories)
    return probabilities, torch.tensor(memories).expand(tokens, -1)


def random_logits(tokens: int = 24, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, M, generator=draw, dtype=torch.float64)


def assert_is(loss: Tensor, expected: float | Tensor) -> None:
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=loss.dtype), **EXACT)


@pytest.mark.parametrize(("kind", "top_k", "expected"), [("layer", 2, 2), ("pooled", 2, 2), ("layer", 1, 1)])
def test_15_uniform_probabilities_cost_k_whatever_is_chosen(kind: str, top_k: int, expected: int) -> None:
    uniform = torch.full((24, M), 1 / M, dtype=torch.float64)
    _, scattered = routed(random_logits(), top_k)
    assert_is(balance_of(kind, (uniform, scattered)), expected)
    assert_is(balance_of(kind, (uniform, torch.arange(top_k).expand(24, -1))), expected)


def test_15_uniform_probabilities_cost_m_by_sequence_if_ties_send_all_tokens_to_the_same() -> None:
    uniform = torch.full((24, M), 1 / M, dtype=torch.float64)
    assert_is(balance_of("layer_sequence", (uniform, torch.tensor([0, 1]).expand(24, -1))), M)


@pytest.mark.parametrize("kind", BALANCES)
@pytest.mark.parametrize("memories", [[2], [3, 1]])
def test_15_collapse_costs_m(kind: str, memories: list[int]) -> None:
    assert_is(balance_of(kind, collapsed(memories)), M)


@pytest.mark.parametrize("kind", BALANCES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_15_a_balanced_router_costs_k(kind: str, top_k: int) -> None:
    """Token n takes memories n, n + 1, ... of M in equal shares."""
    indices = (torch.arange(2 * M)[:, None] + torch.arange(top_k)) % M
    probabilities = torch.zeros(2 * M, M, dtype=torch.float64).scatter(1, indices, 1 / top_k)
    assert_is(balance_of(kind, (probabilities, indices)), top_k)


@pytest.mark.parametrize(("kind", "expected"), [("pooled", 1), ("layer", M), ("layer_sequence", M)])
def test_15_only_pooling_over_layers_overlooks_that_each_collapsed_on_a_memory_of_its_own(
    kind: str, expected: int
) -> None:
    assert_is(balance_of(kind, *(collapsed([memory]) for memory in range(M))), expected)


@pytest.mark.parametrize("kind", BALANCES)
def test_15_gradients_of_logits_sum_to_zero_over_memories(kind: str) -> None:
    logits = random_logits().requires_grad_()
    balance_of(kind, routed(logits, 2)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 1e-3
    assert_is(logits.grad.sum(1), torch.zeros(len(logits)))


@pytest.mark.parametrize(("kind", "everywhere"), [("layer", True), ("pooled", True), ("layer_sequence", False)])
def test_only_the_sparse_form_keeps_gradients_from_memories_not_chosen(kind: str, everywhere: bool) -> None:
    logits = random_logits().requires_grad_()
    probabilities, indices = routed(logits, 2)
    balance_of(kind, (probabilities, indices)).backward()
    assert logits.grad is not None
    chosen = torch.zeros_like(logits).scatter(1, indices, 1).bool()
    assert logits.grad[chosen].abs().min() > 0
    assert (logits.grad[~chosen].abs().max() > 1e-12) == everywhere


def test_pooling_counts_tokens_not_layers() -> None:
    """As one layer that saw the tokens of both, of which the second has more."""
    layers = [routed(random_logits(tokens, seed=tokens), 2) for tokens in (5, 17)]
    joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True))
    assert_is(balance_of("pooled", *layers), balance_of("layer", joined))
    assert (balance_of("layer", *layers) - balance_of("layer", joined)).abs() > 1e-3


@pytest.mark.parametrize("kind", ["layer", "layer_sequence"])
def test_the_losses_of_layers_are_averaged(kind: str) -> None:
    first, second = collapsed([0]), routed(random_logits(), 1)
    assert_is(balance_of(kind, first, second), (balance_of(kind, first) + balance_of(kind, second)) / 2)


@pytest.mark.parametrize(("first", "second"), [*permutations(BALANCES, 2)])
def test_layers_that_balance_in_different_ways_are_refused(first: str, second: str) -> None:
    trace, row_of = Trace(), torch.zeros(24, dtype=torch.long)
    report_balance(trace.scope("0"), first, 1.0, *routed(random_logits(), 2), row_of, 1)
    with pytest.raises(ValueError, match=r"'1\.balance' and '0\.balance' are pooled in different ways"):
        report_balance(trace.scope("1"), second, 1.0, *routed(random_logits(), 2), row_of, 1)


@pytest.mark.parametrize("kind", BALANCES)
def test_the_weight_multiplies_once(kind: str) -> None:
    layers = [routed(random_logits(seed=seed), 2) for seed in range(3)]
    assert_is(balance_of(kind, *layers, weight=0.25), 0.25 * balance_of(kind, *layers))


def test_sequences_weigh_the_same_whatever_their_length_and_empty_ones_nothing() -> None:
    pieces = [routed(random_logits(tokens, seed=tokens), 2) for tokens in (3, 20)]
    joined = tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
    row_of = torch.tensor([0] * 3 + [2] * 20)  # nothing of sequence 1
    each = [balance_of("layer_sequence", piece) for piece in pieces]
    shuffled = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    for order in (torch.arange(23), shuffled):
        loss = balance_of("layer_sequence", (joined[0][order], joined[1][order]), row_of=row_of[order])
        assert_is(loss, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("kind", BALANCES)
def test_no_tokens_cost_nothing(kind: str) -> None:
    logits, trace = torch.zeros(0, M, requires_grad=True), Trace()
    probabilities, indices = routed(logits, 2)
    report_balance(trace, kind, 1.0, probabilities, indices, indices[:, 0], 2)
    trace.losses["balance"].backward()
    assert trace.losses["balance"] == 0


@pytest.mark.parametrize("kind", BALANCES)
def test_low_precision_is_summed_in_float32(kind: str) -> None:
    """2,049 tokens are not 2,048, which is what bfloat16 and float16 make of them."""
    probabilities, indices = collapsed([2], tokens=2049)
    loss = balance_of(kind, (probabilities.bfloat16(), indices))
    assert (loss.dtype, loss.item()) == (torch.float32, M)
