"""BMojo with its tokens in a store: check 17 of the specification, and what a layer owes its callers with one."""

import copy
import pickle
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memzoo.layers import BMojo
from memzoo.layers.bmojo_retrieval import numbers
from memzoo.layers.reference.bmojo import bmojo as reference
from memzoo.layers.stores import DiskStore, Entries, HostStore, MemoryStore, TopKStore
from memzoo.layers.trace import Trace
from tests.layers.bmojo_cases import DELTA, WINDOW, assert_close, build, few_cases, kept_positions, run_by, tokens

TIME = 5 * WINDOW + 3
CASES: list[dict[str, Any]] = [
    {"num_eidetic": 3},
    {"num_eidetic": 4, "num_kv_heads": 1, "fading_span": 0, "target": "input", "rotary_base": None},
    {"num_eidetic": 2, "eidetic_positions": "clamp", "tie_projections": False, "segment_bias": True},
    {"num_eidetic": 3, "eidetic_positions": "none", "selection": "threshold", "threshold": 0.6},
    {"num_eidetic": 2, "in_context": False, "window": 2, "score": "residual"} | DELTA,
    {"num_eidetic": 9, "window": 1, "selection": "threshold", "threshold": 1e9},
    {"num_eidetic": 3, "eidetic_norm": True, "ssm_output": True, "eidetic_positions": "clamp"},
]


def comparable(state: Any) -> Any:
    """A state without what only a store can read: the numbers that it gave its sequences."""
    return replace(state, eidetic_sequence=None)


def same_weights(layer: BMojo, **options: Any) -> BMojo:
    """Another layer with the parameters of this one."""
    other = build(**options)
    other.load_state_dict(layer.state_dict())
    return other


# 17. A store.


@pytest.mark.parametrize("options", CASES, ids=str)
def test_17_the_layer_equals_the_loop(options):
    layer, x = build(**options, store=HostStore()), tokens(time=TIME)
    y, state = layer(x)
    expected, rows = reference(layer, x)
    assert_close(y, expected)
    assert kept_positions(state) == [row.kept[-1] for row in rows]


@pytest.mark.parametrize("positions", ["true", "clamp", "none"])
@pytest.mark.parametrize("store", ["host", "disk"])
@torch.no_grad()
def test_17_a_store_that_gives_everything_is_an_eidetic_memory_without_bound(store, positions, tmp_path):
    options: dict[str, Any] = {"num_eidetic": TIME, "eidetic_positions": positions}
    layer, x = build(**options), tokens(time=TIME)
    with HostStore() if store == "host" else DiskStore(tmp_path / "store", synchronous=True) as held:
        y, state = same_weights(layer, **options, store=held)(x)
        expected, end = layer(x)
        assert_close(y, expected)
        assert kept_positions(state) == kept_positions(end)


@pytest.mark.parametrize("law", [{}, {"selection": "threshold", "threshold": 0.6}, {"score": "l2"}], ids=str)
@torch.no_grad()
def test_17_a_store_with_the_law_of_the_layer_is_the_layer(law):
    layer, x = build(num_eidetic=4, **law), tokens(time=TIME)
    other = same_weights(layer, num_eidetic=4, **law, store=TopKStore(4))
    expected, end = layer(x)
    for cuts in ([], [2, 7, 8, 16]):
        y, state = run_by(other, x, cuts)
        assert_close(y, expected)
        for name in ("eidetic_keys", "eidetic_values", "eidetic_scores", "eidetic_positions", "eidetic_count"):
            assert_close(getattr(state, name), getattr(end, name))


@torch.no_grad()
def test_17_what_is_not_committed_is_not_seen(tmp_path):
    """A writer that lags: the reader's version stays what it was, and what it gives does not change."""
    layer, x = build(num_eidetic=TIME), tokens(time=TIME)
    with DiskStore(tmp_path / "store") as store:
        lagging = same_weights(layer, num_eidetic=TIME, store=Lagging(store, committed=2))
        y, state = lagging(x[:1])
        version = store.snapshot()
        assert kept_positions(state) == [[*range(2 * WINDOW)]]
        everything = layer(x[:1])[0]
        current = [
            torch.allclose(*blocks) for blocks in zip(y.split(WINDOW, 1), everything.split(WINDOW, 1), strict=True)
        ]
        assert current == [True, False, True, False, False, False]
        [sequence], query = numbers(store, state.eidetic_sequence), torch.ones(2, 4).double()
        pinned = store.query(sequence, query, TIME, before=TIME, version=version)
        store.flush()
        again = store.query(sequence, query, TIME, before=TIME, version=version)
        for field in fields(Entries):
            assert torch.equal(getattr(pinned, field.name), getattr(again, field.name))


class Lagging:
    """A store of which a layer sees the version after so many appends and no later one."""

    def __init__(self, store: MemoryStore, committed: int) -> None:
        self.store, self.left, self.version = store, committed, store.snapshot()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def append(self, sequence: int, start: int, entries: Entries) -> int:
        sequence = self.store.append(sequence, start, entries)
        self.left -= 1
        if self.left == 0:
            self.store.flush()
            self.version = self.store.snapshot()
        return sequence

    def snapshot(self) -> int:
        return self.version


# What a layer owes its callers.


@few_cases
@given(st.sampled_from(CASES), st.lists(st.integers(1, TIME - 1), unique=True, max_size=6).map(sorted))
@torch.no_grad()
def test_any_cut_into_calls_equals_one_call(options, cuts):
    layer, x = build(**options, store=HostStore()), tokens(time=TIME)
    whole, end = layer(x)
    y, state = run_by(layer, x, cuts)
    assert_close(y, whole)
    assert_close(comparable(state), comparable(end))


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.no_grad()
def test_what_comes_later_changes_no_bit_of_what_came_before(options):
    layer, x = build(**options, store=HostStore()), tokens(time=TIME)
    y, _ = layer(x)
    for t in range(1, TIME):
        other = x.clone()
        other[:, t:] = 9.0 * tokens(time=TIME, seed=t)[:, t:]
        assert torch.equal(layer(other)[0][:, :t], y[:, :t])


@pytest.mark.parametrize("steps", [False, True])
@torch.no_grad()
def test_a_state_may_be_continued_twice(steps):
    """Branches do not see one another's tokens, and the passed state is as it was."""
    layer, x = build(num_eidetic=4, store=HostStore()), tokens(time=TIME)
    _, state = layer(x[:, :7])
    before = state.clone()
    for seed in (3, 4):
        more = tokens(time=11, seed=seed)
        whole = torch.cat([x[:, :7], more], 1)
        y, end = run_by(layer, more, [*range(1, 11)] if steps else [], state)
        expected, other = layer(whole)
        assert_close(y, expected[:, 7:])
        assert_close(comparable(end), comparable(other))
        assert_close(state, before, 0)


@torch.no_grad()
def test_beams_that_share_a_row_go_apart():
    layer, x = build(num_eidetic=4, store=HostStore()), tokens(batch=2, time=TIME)
    _, state = layer(x[:, :8])
    more = tokens(batch=3, time=10, seed=5)
    y, _ = run_by(layer, more, [4], state.reorder([1, 0, 1]))
    for row, source in enumerate((1, 0, 1)):
        whole = torch.cat([x[source, :8], more[row]])[None]
        assert_close(y[row], layer(whole)[0][0, 8:])


@pytest.mark.parametrize("options", CASES[:3], ids=str)
@torch.no_grad()
def test_documents_and_masks(options):
    layer, x = build(**options, store=HostStore()), tokens(batch=1, time=20)
    ids = torch.tensor([[7] * 8 + [8] + [9] * 11])
    y, end = layer(x, doc_ids=ids)
    results = [layer(x[:, a:b]) for a, b in pairwise([0, 8, 9, 20])]
    assert_close(y, torch.cat([y for y, _ in results], 1))
    assert_close(replace(comparable(end), document=torch.zeros(1).long()), comparable(results[-1][1]))
    mask = torch.tensor([[1, 0, 1, 1, 0] * 4]).bool()
    y, _ = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    assert_close(y[mask], layer(x[:, mask[0]])[0][0])


@torch.no_grad()
def test_a_stream_goes_on_in_another_process(tmp_path):
    """The state in a file, the tokens in another: both outlive the process that wrote them."""
    layer, x = build(num_eidetic=4), tokens(time=TIME)
    with DiskStore(tmp_path / "tokens", synchronous=True) as store:
        layer.store = store
        whole, _ = layer(x)
        _, state = layer(x[:, :10])
        state.save(tmp_path / "state.safetensors")
    with DiskStore(tmp_path / "tokens", synchronous=True) as store:
        layer.store = store
        state = layer.initial_state(2).load(tmp_path / "state.safetensors")
        assert_close(run_by(layer, x[:, 10:], [3], state)[0], whole[:, 10:])


@pytest.mark.parametrize("options", CASES[:3], ids=str)
@torch.no_grad()
def test_steps_that_may_reuse_the_state_equal_one_call(options):
    layer, x = build(**options, store=HostStore()), tokens(time=TIME)
    whole, _ = layer(x)
    y, state = layer(x[:, :4])
    outputs = [y]
    for t in range(4, TIME):
        y, state = layer(x[:, t : t + 1], state, donate=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole)
    again, _ = layer(x[:, :4], state.reset([1]))
    assert_close(again[1], whole[1, :4])


@torch.no_grad()
def test_rows_of_no_token_stay_as_they_are():
    layer, x = build(num_eidetic=3, store=HostStore()), tokens(time=TIME)
    _, state = layer(x[:, :8])
    _, after = layer.mix(x[:, 8:14], state, lengths=torch.tensor([6, 0]), trace=None, donate=False)
    assert_close(after.reorder([1]), state.reorder([1]), 0)


@pytest.mark.parametrize("positions", ["true", "clamp", "none"])
@torch.no_grad()
def test_half_precision_finds_about_the_same(positions):
    layer, x = (
        build(num_eidetic=TIME, eidetic_positions=positions, store=HostStore()).float(),
        tokens(time=TIME).float(),
    )
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert state.eidetic_keys.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


def test_a_stream_may_begin_in_inference_mode():
    layer, x = build(num_eidetic=4, store=HostStore()), tokens(time=TIME)
    with torch.no_grad():
        whole, _ = layer(x)
        with torch.inference_mode():
            first, state = run_by(layer, x[:, :8], [2, 4, 6])
        state = state.clone()
        rest, _ = run_by(layer, x[:, 8:], [3, 6], state)
    assert_close(torch.cat([first.clone(), rest], 1), whole)


@torch.no_grad()
def test_a_compiled_layer_asks_the_store_outside_of_its_graphs():
    torch.compiler.reset()
    no_ssm = {"fading_span": 0, "target": "input"}  # it has been compiled elsewhere
    layer, x = build(num_eidetic=3, store=HostStore(), **no_ssm), tokens(batch=1, time=7)
    y, _ = torch.compile(layer, backend="eager")(x)
    assert_close(y, layer(x)[0])


@torch.no_grad()
def test_turnover_is_what_came_with_the_call():
    layer, x = build(num_eidetic=100, store=HostStore()), tokens(batch=1, time=6 * WINDOW)
    _, state = layer(x[:, : 5 * WINDOW])
    trace = Trace()
    layer(x[:, 5 * WINDOW :], state, trace=trace)
    assert_close(trace.signals["eidetic_turnover"], torch.tensor([1 / 6]).float())


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_what_is_forgotten_leaves_the_store(kind, tmp_path):
    layer, x = build(num_eidetic=4), tokens(time=TIME)
    with torch.no_grad(), HostStore() if kind == "host" else DiskStore(tmp_path / "s", synchronous=True) as store:
        layer.store = store
        layer.forget(layer.initial_state(2))
        _, kept = layer(x)
        _, state = layer(x[:, :8])
        layer.forget(state)
        assert_close(layer(x, kept)[0], layer(torch.cat([x, x], 1))[0][:, TIME:])
        with pytest.raises(ValueError, match=f"sequence={numbers(layer.store, state.eidetic_sequence)[0]} is not in"):
            layer(x, state)
    layer.store = None
    with pytest.raises(ValueError, match="no store to forget in"):
        layer.forget(state)


def test_training_reads_the_store_and_sends_nothing_back():
    layer, x = build(num_eidetic=TIME, fading_span=0, target="input", store=HostStore()), tokens(batch=1, time=TIME)
    x.requires_grad_()
    y, state = layer(x)
    assert not state.eidetic_keys.requires_grad
    first = torch.autograd.grad(y[0, -1].sum(), x)[0]
    assert not first[0, : TIME - WINDOW].any()
    assert first[0, TIME - WINDOW :].abs().sum(-1).all()


def test_a_copy_of_the_layer_shares_the_store():
    layer = build(num_eidetic=2, store=HostStore())
    assert copy.deepcopy(layer).store is layer.store


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_eidetic=0"),
        ({"num_eidetic": 2, "selection": "fifo"}, "selection='fifo'"),
        ({"num_eidetic": 2, "selection": "random"}, "selection='random'"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options, store=HostStore())
    layer = build(**options)
    with pytest.raises(ValueError, match=message):
        layer.store = HostStore()
    assert layer.store is None


@torch.no_grad()
def test_a_state_of_another_store_is_refused():
    layer, x = build(num_eidetic=2, store=HostStore()), tokens(time=TIME)
    _, state = layer(x)
    layer.store = HostStore()
    layer(x)  # it has sequences of the same numbers now
    with pytest.raises(ValueError, match="is of another store"):
        layer(x, state)
    with pytest.raises(ValueError, match="is of another store"):
        layer.forget(state)


def test_a_layer_with_a_store_is_not_pickled():
    with pytest.raises(TypeError, match="a HostStore belongs to its process"):
        pickle.dumps(build(num_eidetic=2, store=HostStore()))


def test_a_state_from_before_the_store_is_refused():
    layer, x = build(num_eidetic=2), tokens(time=4)
    _, state = layer(x)
    layer.store = HostStore()
    with pytest.raises(ValueError, match="eidetic_sequence"):
        layer(x, state)
