"""Dropout of the weights of attention: in training alone, right in the mean, on every path of the op."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from memzoo.layers import Attention, SlidingWindowAttention
from memzoo.layers.ops import attention as op
from memzoo.layers.ops.attention import AttentionState, attention, shared_attention

DIM, TIME = 8, 7
DRAWS = 4000
LAYERS = {
    "full": lambda **options: Attention(DIM, **dict(num_heads=4, num_kv_heads=2) | options),
    "window": lambda **options: SlidingWindowAttention(DIM, **dict(window=3, num_heads=4, num_kv_heads=2) | options),
}
# What the op does: blocks of a window, keys of a state, a step, a prefix, ragged rows, groups, wide values, maps.
PATHS = {
    "full": {},
    "window": {"window": 2},
    "prefix": {"prefix": 3},
    "window_prefix": {"window": 2, "prefix": 3},
    "state": {"state": True},
    "window_state": {"window": 2, "state": True},
    "step": {"state": True, "time": 1},
    "lengths": {"lengths": torch.tensor([7])},
    "groups": {"kv_heads": 1, "prefix": 1},
    "wide_values": {"value_dim": 4},
    "maps": {"key_heads": 2, "kv_heads": 1, "value_dim": 4},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SMALLEST_BLOCK", 2)  # so that short sequences have several blocks


def call(path: str, dropout: float | None, draws: int = 1) -> tuple[Tensor, AttentionState]:
    """Attend on a path of the op, as many times as there are draws: a row each."""
    options = dict(PATHS[path])
    window, prefix, time = (options.get(name) for name in ("window", "prefix", "time"))
    kv_heads, value_dim = options.get("kv_heads", 2), options.get("value_dim", 3)
    key_heads = options.get("key_heads", kv_heads)
    generator = torch.Generator().manual_seed(0)

    def randn(time: int, heads: int, dim: int) -> Tensor:
        row = torch.randn(1, time, heads, dim, generator=generator, dtype=torch.float64)
        return row.expand(draws, -1, -1, -1)

    def tokens(time: int) -> tuple[Tensor, Tensor, Tensor]:
        return randn(time, 2, 3), randn(time, key_heads, 3), randn(time, kv_heads, value_dim)

    state = attention(*tokens(5), window=window)[1] if options.get("state") else None
    q, k, v = tokens(time or TIME)
    lengths = options.get("lengths")
    return attention(
        q,
        k,
        v,
        window=window,
        prefix=None if prefix is None else (randn(prefix, key_heads, 3), randn(prefix, kv_heads, value_dim)),
        state=state,
        lengths=None if lengths is None else lengths.expand(draws),
        **({} if dropout is None else {"dropout": dropout}),
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_mean_over_many_draws_is_what_comes_without_dropout(path: str) -> None:
    torch.manual_seed(0)
    expected, _ = call(path, 0.0)
    drawn, _ = call(path, 0.3, DRAWS)
    assert not torch.equal(drawn[0], drawn[1]), "no weight was dropped"
    error = (drawn.mean(0) - expected[0]).abs()
    assert (error <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-12).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_probability_of_zero_draws_nothing_and_none_touches_the_state(path: str) -> None:
    before = torch.get_rng_state()
    y, state = call(path, 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(y, call(path, None)[0])
    _, dropped = call(path, 0.9)
    for name, tensor in state.named_tensors().items():
        assert torch.equal(dropped.named_tensors()[name], tensor), name


def test_weights_are_dropped_whole_and_the_rest_grow() -> None:
    """Of values that are all one, a read is the sum of the weights: of equal ones, a multiple of each."""
    torch.manual_seed(0)
    q, v = torch.zeros(50, 8, 1, 2), torch.ones(50, 8, 1, 2)
    y, _ = attention(q, q, v, dropout=0.5)
    kept = y * torch.arange(1, 9)[:, None, None] / 2  # weights are 1 / (t + 1), twice that where they are kept
    torch.testing.assert_close(kept, kept.round())
    assert set(kept[:, -1].round().unique().tolist()) > {2.0, 3.0, 4.0, 5.0, 6.0}


def test_both_halves_of_a_wide_value_lose_the_same_weights() -> None:
    torch.manual_seed(0)
    q, half = torch.randn(3, 6, 2, 2), torch.randn(3, 6, 2, 2)
    y, _ = attention(q, torch.randn(3, 6, 2, 2), torch.cat((half, half), -1), dropout=0.5)
    assert torch.equal(*y.chunk(2, -1))


def test_queries_of_another_layer_lose_weights_too() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2, 3).expand(DRAWS, -1, -1, -1) for _ in range(3))
    expected, drawn = shared_attention(q[:1], k[:1], v[:1]), shared_attention(q, k, v, dropout=0.3)
    assert not torch.equal(drawn[0], drawn[1])
    assert ((drawn.mean(0) - expected[0]).abs() <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-6).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_drops_weights_in_training_alone(kind: str) -> None:
    torch.manual_seed(0)
    plain, layer = LAYERS[kind]().double(), LAYERS[kind](dropout=0.3).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(1, TIME, DIM, dtype=torch.float64)
    expected, state = plain(x)
    assert torch.equal(layer.eval()(x)[0], expected)
    layer.train()
    drawn, end = layer(x.expand(DRAWS, -1, -1))
    assert ((drawn.mean(0) - expected[0]).abs() <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-12).all()
    assert drawn.std(0).amax() > 0.01
    torch.testing.assert_close(end.keys[:1], state.keys, rtol=0, atol=1e-12)
    assert not torch.equal(layer(x, state)[0], layer(x, state)[0]), "a call that goes on drops nothing"


def test_the_last_token_of_a_prompt_drops_weights_as_all_tokens_do() -> None:
    torch.manual_seed(0)
    layer, x = LAYERS["full"](dropout=0.5), torch.randn(1, TIME, DIM)
    reads = [layer.share(x, last_only=True)[0] for _ in range(2)]
    assert not torch.equal(*reads)
    layer.eval()
    torch.testing.assert_close(layer.share(x, last_only=True)[0], layer(x)[0][:, -1:])


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 7])])
def test_flash_attn_is_told(monkeypatch: pytest.MonkeyPatch, lengths: Tensor | None) -> None:
    told = []

    def record(q: Tensor, *_: object, dropout_p: float, **options: object) -> Tensor:
        told.append(dropout_p)
        return q

    module = ModuleType("flash_attn")
    module.flash_attn_func = module.flash_attn_varlen_func = record
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(op, "_choose_flash", lambda *_: True)
    q = torch.randn(2, TIME, 2, 4)
    attention(q, q, q, lengths=lengths, dropout=0.25)
    assert told == [0.25]


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, True, float("nan"), "0.1"])
def test_what_is_no_probability_is_refused(value: object) -> None:
    q = torch.zeros(1, 2, 1, 2)
    for build in (
        lambda: Attention(DIM, num_heads=2, dropout=value),
        lambda: SlidingWindowAttention(DIM, window=2, num_heads=2, dropout=value),
        lambda: attention(q, q, q, dropout=value),
        lambda: shared_attention(q, q, q, dropout=value),
    ):
        with pytest.raises(ValueError, match=rf"dropout={value!r} is not a probability in \[0, 1\); use 0"):
            build()
