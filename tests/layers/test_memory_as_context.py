"""Memory as context: its two forms against the loop, causality, streaming; checks numbered as in the specification."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from memzoo.layers.memory_as_context import MemoryAsContext
from memzoo.layers.neural_memory import NeuralMemory
from memzoo.layers.reference.memory_as_context import memory_as_context as reference
from memzoo.layers.segments import visible_keys
from memzoo.layers.trace import Trace
from tests.layers.memory_as_context_cases import OPTIONS, build, tokens
from tests.layers.neural_memory_cases import assert_close, assert_same_bits

CASES = [options | {"literal": literal} for literal in (False, True) for options in OPTIONS]


def derivative(y: Tensor, x: Tensor, t: int) -> Tensor:
    """How much the output at t of the first row depends on every token of it, (time,)."""
    (g,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
    return g[0].abs().amax(-1)


# 1, 3. The reference.


@pytest.mark.parametrize("options", CASES, ids=str)
def test_01_layer_equals_the_loop_over_tokens(options):
    layer, x = build(**options), tokens(time=9)
    y, state = layer(x)
    expected, weights, momentum = reference(layer, x)
    assert_close((y, state.memory.weights), (expected, weights))
    assert_close(state.memory.momentum, momentum if layer.memory.momentum else ())


@pytest.mark.parametrize("options", CASES, ids=str)
def test_03_gradients_of_every_parameter_equal_those_of_the_loop(options):
    layer, x = build(**options), tokens(batch=1, time=7).requires_grad_()
    leaves, probe = [x, *layer.parameters()], tokens(batch=1, time=7, seed=1)
    expected = torch.autograd.grad(reference(layer, x)[0], leaves, probe)
    assert_close(torch.autograd.grad(layer(x)[0], leaves, probe), expected)
    assert all(g.any() for g in expected)


# 4. Causality.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_04_no_output_of_the_causal_form_depends_on_a_later_token(options):
    layer, x = build(**options), tokens(time=11).requires_grad_()
    y, _ = layer(x)
    for t in range(11):
        seen = derivative(y, x, t)
        assert seen[: t + 1].all()
        assert not seen[t + 1 :].any()
        other = x.detach().clone()
        other[:, t + 1 :] = 9.0
        assert_same_bits(layer(other)[0][:, : t + 1], y[:, : t + 1])


def test_04_the_literal_form_sees_ahead_within_its_segment_and_no_further():
    layer, x = build(literal=True), tokens(time=11).requires_grad_()
    y, _ = layer(x)
    for t in range(11):
        border = min(11, 4 * (t // 4 + 1))
        seen = derivative(y, x, t)
        assert seen[:border].all()
        assert not seen[border:].any()


@pytest.mark.parametrize("leak", ["h", "M"])
@torch.no_grad()
def test_04_the_literal_form_leaks_in_two_places(leak):
    layer, x = build(literal=True, memory={"memory_depth": 1}), tokens(batch=1, time=4)
    if leak == "h":  # retrieved with later tokens
        layer.memory.gates.weight.zero_()
        layer.memory.gates.bias.fill_(-torch.inf)  # theta = alpha = 0: nothing is ever written
    else:  # a memory that is read once later tokens are written
        layer.memory.initial_weights[0].zero_()  # all that is retrieved is zero
    for t in range(1, 4):
        other = x.clone()
        other[:, t] = 9.0
        assert not torch.allclose(layer(other)[0][:, 0], layer(x)[0][:, 0])


# 17, 18. The mask, and what is left when the memory does nothing.


def test_17_mask_table():
    table = [
        # P  P  h  h  h  S  S  S
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    expected = torch.tensor(table, dtype=torch.bool)
    assert_same_bits(visible_keys(torch.arange(3), 3, 2), expected)
    slots = torch.tensor([[1, 2], [0, 1]])  # of two tokens of two rows
    assert_same_bits(visible_keys(slots, 3, 2), expected[slots][:, None])


def test_18_with_a_frozen_memory_and_one_segment_it_is_attention_with_two_prefixes():
    layer, x = build(segment_size=16), tokens()
    with torch.no_grad():
        layer.memory.gates.weight.zero_()
        layer.memory.gates.bias.fill_(-torch.inf)  # theta = alpha = 0
    memory, weights = layer.memory, layer.memory.current_weights(None, 2)

    def ask(x: Tensor) -> Tensor:
        return memory.output(memory.recall(memory.queries(x)[0], weights), x)

    def keys_and_values(x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        k, v = layer.key_value(x).unflatten(-1, (2, 2, 4)).unbind(2)
        return layer.rotary(k, position), v

    steps, start = torch.arange(10), torch.zeros(2)
    persistent = layer.persistent_memory.tokens.expand(2, -1, -1)
    parts = keys_and_values(persistent, start), keys_and_values(ask(x), steps), keys_and_values(x, steps)
    k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    scores = torch.einsum("bihd,bjhd->bhij", layer.rotary(layer.query(x).unflatten(-1, (2, 4)), steps), k) / 2
    past = torch.ones(10, 10).tril()
    mask = torch.cat([torch.ones(10, 2), past, past], 1)
    y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(mask == 0, -math.inf).softmax(-1), v)
    y = layer.attention_out(y.flatten(2))
    o, state = layer(x)
    assert_close(o, layer.out(layer.gate(y, ask(y))))
    assert_same_bits(state.memory.weights, weights)


@pytest.mark.parametrize("literal", [False, True])
def test_18_without_persistent_tokens_there_are_none(literal):
    layer, x = build(literal=literal), tokens()
    bare = build(literal=literal, num_persistent_tokens=0)
    bare.load_state_dict({name: p for name, p in layer.state_dict().items() if "persistent" not in name})
    assert not torch.allclose(layer(x)[0], bare(x)[0])
    layer.persistent_memory, layer.num_persistent_tokens = None, 0
    assert_same_bits(tree_leaves(layer(x)), tree_leaves(bare(x)))


# 19. Masks and documents. What the causal form owes the contract is tested with all layers.


@pytest.mark.parametrize("chunk_size", [2, 3, 4])
@pytest.mark.parametrize("literal", [False, True])
def test_19_masked_tokens_do_not_exist(literal, chunk_size):
    layer, x = build(literal=literal, memory={"chunk_size": chunk_size}), tokens(batch=3, time=14)
    mask = torch.tensor([[1, 0, 1, 1] + [0] * 10, [0, 0, 0, 1, 1, 0] + [1] * 8, [0] * 14]).bool()
    spoiled = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y, state = layer(spoiled, mask=mask)
    assert not y[~mask].any()
    for row in range(2):
        alone, end = layer(x[row : row + 1, mask[row]])
        assert_close(y[row, mask[row]], alone[0])
        assert_close(tree_leaves(state.reorder([row])), tree_leaves(end))
    assert not any(t.any() for t in state.reorder([2]).named_tensors().values())
    for g in torch.autograd.grad(y.sum(), [spoiled, *layer.parameters()]):
        assert g.isfinite().all()


@pytest.mark.parametrize(("literal", "seen"), [(False, 3), (False, 4), (True, 4)])
def test_19_a_row_without_tokens_keeps_its_state_bit_for_bit(literal, seen):
    layer, x = build(literal=literal), tokens(time=13)
    _, state = layer(x[:, :seen])
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1] = True
    _, after = layer(x[:, 4:], state, mask=mask)
    assert_same_bits(tree_leaves(after.reorder([0])), tree_leaves(state.reorder([0])))
    assert after.position.tolist() == [seen, seen + 9]


def test_19_the_literal_form_takes_packed_documents():
    layer, x = build(literal=True), tokens(batch=1, time=9)
    packed, end = layer(x, doc_ids=torch.tensor([[7, 7, 7, 7, 7, 8, 9, 9, 9]]))
    results = [layer(x[:, start:stop]) for start, stop in ((0, 5), (5, 6), (6, 9))]
    assert_close(packed, torch.cat([y for y, _ in results], 1))
    assert_close((end.memory.weights, end.queries.tail), (results[-1][1].memory.weights, results[-1][1].queries.tail))


# 20. Learning at test time, precision.


@pytest.mark.parametrize("literal", [False, True])
def test_20_eval_and_no_grad_learn_like_training(literal):
    layer, x = build(literal=literal), tokens()
    trained, end = layer(x)
    assert not torch.equal(end.memory.weights[0][0], layer.memory.initial_weights[0])
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert_same_bits(tree_leaves(evaluated), tree_leaves((trained.detach(), end.detach())))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_20_autocast_stays_near_float64_and_keeps_the_memory_in_float32(options):
    layer, x = build(**options), tokens(time=24)
    exact, _ = layer(x)
    layer = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x.float())
        y_next, state = layer(x.float(), state)
    assert (y.double() - exact).norm() < 3e-2 * exact.norm()
    assert y_next.isfinite().all()
    memory = state.memory
    assert all(w.dtype == torch.float32 for w in (*memory.weights, *memory.momentum, *memory.base, *state.frozen))
    for g in torch.autograd.grad(y.float().sum(), layer.parameters()):
        assert g.isfinite().all()


def test_20_a_state_in_another_precision_is_taken():
    layer, x = build().float(), tokens().float()
    _, state = layer(x)
    layer, x = layer.bfloat16(), x.bfloat16()
    for piece in (x, x[:, :1]):
        y, end = layer(piece, state)
        assert y.isfinite().all()
        assert (y.dtype, end.context.dtype, end.memory.weights[0].dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
        )


def test_20_shapes_can_be_traced_on_the_meta_device():
    with torch.device("meta"):
        layer = MemoryAsContext(8, segment_size=4, num_heads=2)
        y, state = layer(torch.empty(2, 6, 8))
        y, state = layer(torch.empty(2, 3, 8), state)
    assert (y.shape, y.device.type, state.context.shape) == ((2, 3, 8), "meta", (2, 4, 4, 2, 4))


# What it is built of, what it reports, and refuses.


def test_the_memory_follows_the_layer_unless_told_otherwise():
    def shape(memory: NeuralMemory) -> tuple[int, int, int]:
        return memory.num_heads, memory.head_dim, memory.chunk_size

    assert shape(MemoryAsContext(128).memory) == (2, 64, 64)
    assert shape(MemoryAsContext(128, segment_size=512, num_heads=4).memory) == (4, 32, 64)
    assert shape(MemoryAsContext(128, segment_size=16, num_heads=4).memory) == (4, 32, 16)
    options = {"num_heads": 8, "chunk_size": 256}
    assert shape(MemoryAsContext(128, segment_size=16, num_heads=4, memory=options).memory) == (8, 16, 256)


@pytest.mark.parametrize("literal", [False, True])
def test_trace_shows_what_the_memory_does_at_every_token(literal):
    layer, x, trace = build(literal=literal), tokens(time=10), Trace()
    y, state = layer(x, trace=trace)
    assert_same_bits(y, layer(x)[0])
    assert sorted(trace.signals) == ["memory.alpha", "memory.eta", "memory.surprise", "memory.theta"]
    assert {signal.shape for signal in trace.signals.values()} == {(2, 10, 2)}
    if literal:
        return
    pieces, state = [Trace(), Trace()], None
    for trace_piece, piece in zip(pieces, (x[:, :3], x[:, 3:]), strict=True):
        _, state = layer(piece, state, trace=trace_piece)
    for name, signal in trace.signals.items():
        assert_close(torch.cat([piece.signals[name] for piece in pieces], 1), signal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_size": 0}, "segment_size=0"),
        ({"num_persistent_tokens": -1}, "num_persistent_tokens=-1"),
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"num_heads": 8}, "head_dim=1 is not divisible"),
        ({"num_heads": None}, "dim=8 is not divisible by head_dim=64"),
        ({"rotary_base": 0.0}, "base=0.0"),
        ({"gate": "sigmoid"}, "form='sigmoid'"),
        ({"memory": {"chunksize": 4}}, "did you mean 'chunk_size'"),
        ({"memory": {"chunk_size": 0}}, "chunk_size=0"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryAsContext(8, **{"num_heads": 2} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_size": 5}, r"context of shape \(5, 4, 2, 4\)"),
        ({"num_heads": 1}, "context of shape"),
        ({"literal": True}, "context of shape None"),
        ({"memory": {"memory_expansion": 3.0}}, r"memories of \[\(2, 4, 12\)"),
        ({"memory": {"momentum": False}}, "momentum=False"),
        ({"memory": {"conv_width": None}}, "convolution=False"),
    ],
    ids=str,
)
def test_a_state_of_another_layer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(), build(**options).initial_state(2))


def test_the_literal_form_refuses_to_go_on_within_a_segment():
    layer, x = build(literal=True), tokens()
    _, state = layer(x[:, :6])
    with pytest.raises(ValueError, match=r"state ends within a segment, after \[6, 6\] tokens with segment_size=4"):
        layer(x[:, 6:], state)
    fresh = state.reset([1])
    mask = torch.tensor([[False], [True]]).expand(2, 4)
    _, state = layer(x[:, 6:], fresh, mask=mask)  # the row within a segment has no tokens
    assert state.position.tolist() == [6, 4]


def test_both_forms_have_the_same_parameters():
    causal, literal = build(), build(literal=True)
    assert {n: p.shape for n, p in causal.named_parameters()} == {n: p.shape for n, p in literal.named_parameters()}
    assert not F.mse_loss(causal(tokens())[0], literal(tokens())[0]) < 1e-6
