"""The rows of a neural memory layer: their initial memory, masks and documents (checks 14, 15 and 19)."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from memzoo.layers import NeuralMemory
from tests.layers.neural_memory_cases import assert_close, assert_same_bits
from tests.layers.neural_memory_layer_cases import build, tokens

# 14, 15, 19. Rows, initial memory, masks, documents.


def test_14_rows_do_not_see_each_other():
    layer, x = build(), tokens()
    other = torch.stack([x[0], tokens(seed=1)[1]])
    assert_same_bits(layer(other)[0][0], layer(x)[0][0])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_15_the_initial_memory_is_learned(depth):
    torch.manual_seed(0)
    layer = NeuralMemory(8, num_heads=2, chunk_size=3, memory_depth=depth)
    layer(tokens().float())[0].square().sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in layer.initial_weights)


def test_15_only_a_matrix_may_start_empty():
    matrix, deep = NeuralMemory(8, num_heads=2, memory_depth=1), NeuralMemory(8, num_heads=2, memory_depth=2)
    assert not matrix.initial_weights[0].any()
    assert all(w.any() for w in deep.initial_weights)


def test_19_masked_tokens_do_not_exist():
    layer, x = build(), tokens(time=9)
    mask = torch.tensor([[True, True, False, True, False, False, True, True, True], [False] * 4 + [True] * 5])
    spoiled = x.masked_fill(~mask[..., None], float("nan"))
    y, state = layer(spoiled, mask=mask)
    assert not y[~mask].any()
    for row in range(2):
        alone, end = layer(x[row : row + 1, mask[row]])
        assert_close(y[row, mask[row]], alone[0])
        assert_close(tree_map(lambda a, row=row: a[row : row + 1], state), end)


@pytest.mark.parametrize("seen", [0, 4])
def test_19_a_call_of_masked_tokens_leaves_the_state_bit_for_bit(seen):
    layer, x = build(), tokens()
    state = layer(x[:, :seen])[1] if seen else layer.initial_state(2)
    mask = torch.tensor([[False] * 4, [True] * 4])
    _, after = layer(x[:, 4:], state, mask=mask)
    assert_same_bits(tree_leaves(tree_map(lambda a: a[0], after)), tree_leaves(tree_map(lambda a: a[0], state)))


def test_19_packed_documents_equal_separate_ones():
    layer, x = build(), tokens(batch=1, time=9).requires_grad_()
    packed, end = layer(x, doc_ids=torch.tensor([[7, 7, 7, 7, 8, 9, 9, 9, 9]]))
    results = [layer(x[:, start:stop]) for start, stop in ((0, 4), (4, 5), (5, 9))]
    separate = torch.cat([y for y, _ in results], 1)
    assert_close(packed, separate)
    assert_close((end.weights, end.momentum), (results[-1][1].weights, results[-1][1].momentum))
    leaves, probe = [x, *layer.parameters()], tokens(batch=1, time=9, seed=1)
    assert_close(torch.autograd.grad(packed, leaves, probe), torch.autograd.grad(separate, leaves, probe))


def test_19_a_document_continues_in_the_next_call():
    layer, x = build(), tokens(batch=1, time=9)
    whole, _ = layer(x[:, 2:])
    first, state = layer(x[:, :5], doc_ids=torch.tensor([[1, 1, 2, 2, 2]]))
    second, _ = layer(x[:, 5:], state, doc_ids=torch.tensor([[2, 2, 2, 2]]))
    assert_close(torch.cat([first[:, 2:], second], 1), whole)
