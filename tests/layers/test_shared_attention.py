"""ops.attention with several maps over the same values, and its parts for queries and keys that come apart."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from memzoo.layers.ops import attention as op
from memzoo.layers.ops.attention import attention, remember, shared_attention
from memzoo.layers.reference import attention as loop

EXACT = {"rtol": 0, "atol": 1e-10}
HEADS = {"plain": (4, 4, 4, 3), "wide": (4, 2, 2, 8), "maps": (4, 4, 2, 6), "grouped_maps": (8, 4, 2, 5)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(op, "SMALLEST_BLOCK", 2)  # so that short sequences have several blocks


@pytest.fixture(params=HEADS)
def heads(request) -> tuple[int, int, int, int]:
    """Heads of queries, keys and values, and the width of values; keys are three wide."""
    return HEADS[request.param]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(batch: int, time: int, heads: tuple[int, int, int, int]) -> list[Tensor]:
    shapes = ((heads[0], 3), (heads[1], 3), heads[2:])
    return [randn(batch, time, *shape).requires_grad_() for shape in shapes]


def assert_same_with_gradients(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected, **EXACT)
    probe = randn(*ours.shape)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, probe), torch.autograd.grad(expected, leaves, probe), **EXACT
    )


@pytest.mark.parametrize("name", ["maps", "grouped_maps"])
@pytest.mark.parametrize("with_prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_maps_of_one_set_of_values_equal_the_loop_fresh_and_continued(window, time, with_prefix, name):
    heads = HEADS[name]
    prefix = (randn(1, 2, heads[1], 3), randn(2, 2, *heads[2:])) if with_prefix else None
    state = loop.attention(*inputs(2, 4, heads), window=window, lengths=torch.tensor([4, 1]))[1].detach()
    for start in (None, state):
        leaves = inputs(2, time, heads)
        y, end = attention(*leaves, window=window, prefix=prefix, state=start)
        expected, last = loop.attention(*leaves, window=window, prefix=prefix, state=start)
        assert y.shape == (2, time, heads[0], heads[3])
        assert end.values.shape[2:] == heads[2:]
        torch.testing.assert_close((end.keys, end.values), (last.keys, last.values), **EXACT)
        if window != 1 or with_prefix:  # over one key there is nothing to weigh, so queries have no gradient
            assert_same_with_gradients(y, expected, leaves)
        torch.testing.assert_close(y, expected, **EXACT)


def test_the_maps_are_plain_attentions_over_the_same_values():
    q, k, v = inputs(2, 5, HEADS["grouped_maps"])
    y, _ = attention(q, k, v)
    maps = [attention(q[:, :, 4 * m : 4 * m + 4], k[:, :, 2 * m : 2 * m + 2], v)[0] for m in range(2)]
    torch.testing.assert_close(y, torch.cat(maps, 2), **EXACT)


@pytest.mark.parametrize("first", [None, [2, 0, 5]], ids=["same_tokens", "later_tokens"])
@pytest.mark.parametrize("time", [1, 4])
def test_shared_attention_equals_the_loop(heads, time, first):
    q, *_ = inputs(3, time, heads)
    _, keys, values = inputs(3, time if first is None else 9, heads)
    before = None if first is None else torch.tensor(first)
    ours = shared_attention(q, keys, values, before, scale=0.7)
    assert_same_with_gradients(ours, loop.shared_attention(q, keys, values, before, scale=0.7), [q, keys, values])
    torch.testing.assert_close(
        shared_attention(q, keys, values, before), shared_attention(q, keys, values, before, scale=3**-0.5), **EXACT
    )


def test_shared_attention_over_a_state_is_attention(heads):
    q, k, v = inputs(2, 6, heads)
    y, state = attention(q, k, v)
    torch.testing.assert_close(shared_attention(q, state.keys, state.values), y, **EXACT)
    last = shared_attention(q[:, -1:], state.keys, state.values, state.position - 1)
    torch.testing.assert_close(last, y[:, -1:], **EXACT)
    more = inputs(2, 3, heads)
    y, end = attention(*more, state=state)
    torch.testing.assert_close(shared_attention(more[0], end.keys, end.values, state.position), y, **EXACT)


def test_slots_after_the_query_may_hold_anything_finite(heads):
    q, k, v = (x.detach() for x in inputs(2, 8, heads))
    q, first = q[:, :2], torch.tensor([1, 4])
    expected = shared_attention(q, k, v, first)
    for row, n in enumerate((3, 6)):
        k[row, n:], v[row, n:] = 1e3, -1e3
    torch.testing.assert_close(shared_attention(q, k, v, first), expected, **EXACT)


@pytest.mark.parametrize("lengths", [None, [3, 0, 5]])
def test_remember_returns_the_state_of_attention_to_the_last_bit(heads, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    _, state = attention(*(x.detach() for x in inputs(3, 4, heads)), lengths=torch.tensor([4, 2, 1]))
    q, k, v = (x.detach() for x in inputs(3, 5, heads))
    for start in (None, state):
        ours = remember(k, v, state=start, lengths=lengths)
        expected = attention(q, k, v, state=start, lengths=lengths)[1]
        for name, tensor in expected.named_tensors().items():
            assert torch.equal(ours.named_tensors()[name], tensor), name


@torch.no_grad()
def test_remember_writes_into_a_donated_state():
    heads = HEADS["maps"]
    state = remember(*inputs(2, 3, heads)[1:])
    state = remember(*inputs(2, 1, heads)[1:], state=state, donate=True)  # makes room
    after = remember(*inputs(2, 1, heads)[1:], state=state, donate=True)
    assert after.keys.data_ptr() == state.keys.data_ptr()
    assert after.position.tolist() == [5, 5]


def test_flash_attn_is_given_a_value_head_for_every_key_head(monkeypatch):
    def kernel(q, k, v, *, dropout_p, softmax_scale, causal, window_size):
        assert k.shape == v.shape
        return loop.attention(q, k, v, scale=softmax_scale)[0]

    fake = SimpleNamespace(flash_attn_func=kernel, flash_attn_varlen_func=None)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(op, "_choose_flash", lambda *_: True)
    q, k, v = inputs(2, 4, (8, 4, 2, 3))
    torch.testing.assert_close(attention(q, k, v)[0], loop.attention(q, k, v)[0], **EXACT)


def test_widths_that_differ_do_not_change_the_scale():
    q, k, v = inputs(1, 6, HEADS["maps"])
    narrow = attention(q, k, v[..., :3])[0]
    torch.testing.assert_close(attention(q, k, v)[0][..., :3], narrow, **EXACT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q has shape \(2, 3, 4\); it must be \(batch, time, heads, key_dim\)"),
        ({"keys": torch.zeros(2, 4, 2, 3)}, r"keys has shape \(2, 4, 2, 3\).*\(2, 3, a divisor of 4, 3\)"),
        ({"keys": torch.zeros(2, 9, 3, 3), "first": torch.zeros(2).long()}, r"keys has shape .*a divisor of 4"),
        ({"keys": torch.zeros(3, 3)}, r"keys has shape \(3, 3\)"),
        ({"values": torch.zeros(2, 3, 4, 3)}, r"values has shape \(2, 3, 4, 3\).*a divisor of 2, value_dim\) to match"),
        ({"values": torch.zeros(2, 3, 0, 3)}, r"values has shape \(2, 3, 0, 3\)"),
        ({"values": torch.zeros(2, 4, 2, 3)}, r"values has shape \(2, 4, 2, 3\)"),
        ({"q": torch.zeros(2, 3, 4, 3).half()}, "q, keys, values have dtypes torch.float16, torch.float32"),
        ({"first": torch.zeros(3).long()}, r"first has shape \(3,\); it must be \(rows,\) = \(2,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, words):
    fitting = {"q": torch.zeros(2, 3, 4, 3), "keys": torch.zeros(2, 3, 2, 3), "values": torch.zeros(2, 3, 2, 3)}
    with pytest.raises(ValueError, match=words):
        shared_attention(**fitting | change)


def test_remember_refuses_what_does_not_fit():
    _, k, v = inputs(2, 3, HEADS["maps"])
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\)"):
        remember(k, v, lengths=torch.zeros(3))
    with pytest.raises(ValueError, match=r"state values have shape \(2, 3, 2, 6\); they must be \(2, 3, 4, 3\)"):
        remember(k, k, state=remember(k, v))
