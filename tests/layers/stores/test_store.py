"""What every store promises, against a store that is nothing but its definition."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memzoo.layers.stores import DiskStore, Entries, HostStore, TopKStore
from tests.layers.stores.store_cases import APPENDS, FEW, HEADS, WIDTH, Model, entries, queries, run, same

BRANCHING = ["host", "disk"]
EVERY = [*BRANCHING, "top_k"]
[QUERY] = queries(1)


@contextmanager
def opened(kind: str, *, synchronous: bool = True) -> Iterator[Any]:
    with TemporaryDirectory() as folder:
        store = {
            "host": lambda: HostStore(synchronous=synchronous),
            "disk": lambda: DiskStore(Path(folder) / "store", synchronous=synchronous),
            "top_k": lambda: TopKStore(9),
        }[kind]()
        with store:
            yield store


@pytest.mark.parametrize("kind", BRANCHING)
@FEW
@given(APPENDS, st.integers(1, 6))
def test_every_query_of_every_version_is_what_the_definition_says(kind, appends, count):
    model = Model()
    with opened(kind) as store:
        versions = run(store, model, appends)
        for sequence, held in model.sequences.items():
            for version in versions:
                for before in {0, max(held.end - 3, 0), held.end + 5}:
                    for query in queries(2):
                        expected = model.query(sequence, query, count, before, version)
                        same(store.query(sequence, query, count, before=before, version=version), expected)
            latest = store.query(sequence, QUERY, count, before=held.end)
            same(latest, store.query(sequence, QUERY, count, before=held.end, version=versions[-1]))


@pytest.mark.parametrize("kind", BRANCHING)
@FEW
@given(APPENDS, st.sets(st.integers(1, 5), max_size=3))
def test_dropping_takes_a_sequence_and_leaves_whole_what_others_share_with_it(kind, appends, dropped):
    model = Model()
    with opened(kind) as store:
        run(store, model, appends)
        dropped &= set(model.sequences)
        for sequence in sorted(dropped):
            store.drop([sequence])
        version = store.snapshot()
        for sequence, held in model.sequences.items():
            if sequence in dropped:
                with pytest.raises(ValueError, match=f"sequence={sequence} is not in the store"):
                    store.query(sequence, QUERY, 3, before=9)
            else:
                expected = model.query(sequence, QUERY, 50, held.end, version)
                same(store.query(sequence, QUERY, 50, before=held.end), expected)
        assert store.append(0, 0, entries([0])) == model.last + 1  # numbers are not given again


@pytest.mark.parametrize("kind", BRANCHING)
def test_a_dropped_sequence_is_kept_as_far_as_any_other_shares_it(kind):
    with opened(kind) as store:
        parent = store.append(0, 0, entries([0]))
        for start in (1, 2, 3):
            store.append(parent, start, entries([start]))
        forks = {start: store.append(parent, start, entries([])) for start in (1, 3, 2)}
        store.drop([parent])
        for start, fork in forks.items():
            assert store.query(fork, QUERY, 9, before=9).positions.tolist() == [*range(start)]


def test_nothing_is_left_of_a_host_store_whose_sequences_were_dropped():
    with HostStore() as store:
        parent = store.append(0, 0, entries([*range(50)]))
        child = store.append(parent, 20, entries([20]))
        store.drop([parent])
        assert [len(rows.buffers) for rows in store._rows.values()] == [20, 1]
        store.drop([child])
        assert store._rows == {}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_comes_back_bit_for_bit(kind, dtype):
    score_dtype = torch.promote_types(dtype, torch.float32)
    new = replace(
        entries([1, 4, 6]),
        keys=torch.randn(3, HEADS, WIDTH, dtype=torch.float64).to(dtype),
        values=torch.randn(3, HEADS, WIDTH, dtype=torch.float64).to(dtype),
        scores=torch.randn(3, dtype=score_dtype),
    )
    with opened(kind) as store:
        sequence = store.append(0, 0, new)
        same(store.query(sequence, QUERY.to(dtype), 3, before=9), new)
        found = store.query(sequence, QUERY.float(), 3, before=9)
        assert found.keys.dtype == found.values.dtype == torch.float32
        assert found.scores.dtype == score_dtype


@pytest.mark.parametrize("kind", EVERY)
def test_a_store_holds_what_its_dtype_holds_as_well(kind):
    """As where a layer is trained with autocast and used without."""
    with opened(kind) as store:
        sequence = store.append(0, 0, entries([0, 1]))
        half = replace(entries([2, 3], dtype=torch.bfloat16), keys=torch.randn(2, HEADS, WIDTH).bfloat16())
        assert store.append(sequence, 2, half) == sequence
        found = store.query(sequence, QUERY.bfloat16(), 9, before=9)
        assert found.keys.dtype == torch.bfloat16
        assert torch.equal(found.keys[2:], half.keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BRANCHING)
def test_rounding_chooses_nothing(kind, dtype):
    """Equal keys tie wherever they lie, and near ones are told apart as in float64."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(20, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    nearby = distinct[:1] * (1 + torch.arange(-20, 20, dtype=torch.float64)[:, None, None] * torch.finfo(dtype).eps)
    keys = torch.cat([distinct, nearby, distinct, nearby.flip(0)]).to(dtype)
    new = replace(entries([*range(len(keys))], dtype=dtype), keys=keys)
    query = torch.randn(HEADS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    products = (keys.double() * query.double()).flatten(1).sum(1)
    order = products.sort(descending=True, stable=True).indices
    with opened(kind) as store:
        sequence = store.append(0, 0, new)
        for count in (1, 5, 17, 60):
            assert torch.equal(store.query(sequence, query, count, before=999).positions, order[:count].sort().values)


@pytest.mark.parametrize("kind", BRANCHING)
def test_rounding_loses_nothing(kind):
    """In float32 the sum of (b, s, -b) depends on the order, and here what is best may seem worse."""
    places = torch.tensor([*permutations(range(HEADS * WIDTH), 3)])
    keys = torch.zeros(2, len(places), HEADS * WIDTH)
    for rows, (b, s) in zip(keys, [(1e8, 5.0), (3e8, 15.0)], strict=True):
        rows.scatter_(1, places, torch.tensor([b, s, -b]).expand(len(places), 3))
    keys = keys.view(-1, HEADS, WIDTH)
    approximate = keys.flatten(1) @ torch.ones(HEADS * WIDTH)
    assert approximate[: len(places)].max() > approximate[len(places) :].min()
    with opened(kind) as store:
        sequence = store.append(0, 0, replace(entries([*range(len(keys))], dtype=torch.float32), keys=keys))
        end = len(keys)
        store.append(sequence, end, entries([end], dtype=torch.float32))  # of a smaller norm
        found = store.query(sequence, torch.ones(HEADS, WIDTH), len(places), before=end + 1)
        assert torch.equal(found.positions, torch.arange(len(places), end))


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_appended_is_copied_and_carries_no_graph(kind):
    new = entries([0, 1])
    given_keys = new.keys.clone().requires_grad_()
    with opened(kind) as store:
        sequence = store.append(0, 0, replace(new, keys=given_keys * 1, values=new.values.clone()))
        passed = replace(new, keys=new.keys.clone())
        second = store.append(0, 0, passed)
        passed.keys.zero_()
        for one in (sequence, second):
            found = store.query(one, QUERY, 2, before=2)
            same(found, new)
            assert not found.keys.requires_grad


@pytest.mark.parametrize("kind", EVERY)
def test_what_begins_in_inference_mode_goes_on_outside_of_it(kind):
    with opened(kind) as store:
        sequence = 0
        with torch.inference_mode():
            for start in (0, 2, 4):
                sequence = store.append(sequence, start, entries([start, start + 1]))
        assert store.append(sequence, 6, entries([6])) == sequence
        found = store.query(sequence, QUERY, 9, before=9)
        assert found.positions.tolist() == [*range(7)]
        weight = torch.ones_like(found.keys, requires_grad=True)
        (weight * found.keys).sum().backward()
        assert torch.equal(weight.grad, found.keys)


@pytest.mark.parametrize("kind", EVERY)
def test_a_default_device_is_not_that_of_the_store(kind):
    new, wide = entries([0, 1, 2]), entries([3, 4])
    with opened(kind) as store, torch.device("meta"):
        sequence = store.append(store.append(0, 0, new), 3, wide)
        for count in (1, 9):
            assert len(store.query(sequence, QUERY, count, before=9)) == min(count, 5)
        assert len(store.query(sequence, QUERY, 9, before=0)) == 0
        same(store.query(sequence, QUERY, 9, before=3), new)


@pytest.mark.parametrize("kind", EVERY)
def test_empty_appends_have_a_sequence_and_hold_a_place(kind):
    with opened(kind) as store:
        sequence = store.append(0, 0, entries([]))
        assert sequence == 1
        assert len(store.query(sequence, QUERY, 3, before=9)) == 0
        assert store.append(sequence, 4, entries([])) == sequence
        fork = store.append(sequence, 4, entries([5]))
        assert fork == 2
        assert len(store.query(sequence, QUERY, 3, before=9)) == 0


@pytest.mark.parametrize("kind", EVERY)
def test_a_copy_is_the_store_and_a_closed_store_says_so(kind):
    with opened(kind) as store:
        assert copy.deepcopy({"store": store})["store"] is store
        sequence = store.append(0, 0, entries([0]))
        store.close()
        store.close()
        for call in (
            lambda: store.append(sequence, 1, entries([1])),
            lambda: store.query(sequence, QUERY, 1, before=1),
            lambda: store.drop([sequence]),
            store.flush,
        ):
            with pytest.raises(ValueError, match="is closed"):
                call()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 3)}, "entries.keys are"),
        ({"keys": torch.zeros(2, HEADS, WIDTH).long()}, "entries.keys are"),
        ({"keys": torch.zeros(2, HEADS, 0)}, "entries.keys are"),
        ({"values": torch.zeros(2, HEADS, WIDTH + 1).double()}, "entries.values are"),
        ({"values": torch.zeros(2, HEADS, WIDTH)}, "entries.values are"),
        ({"positions": torch.tensor([3])}, "entries.positions are"),
        ({"positions": torch.tensor([3.0, 4.0])}, "entries.positions are"),
        ({"scores": torch.zeros(2).half()}, "entries.scores are"),
        ({"scores": torch.zeros(3)}, "entries.scores are"),
        ({"positions": torch.tensor([4, 4])}, r"entries.positions must rise, .* but begin \[4, 4\]"),
        ({"positions": torch.tensor([1, 4])}, r"entries.positions must rise, .* but begin \[1, 4\]"),
        ({"keys": torch.zeros(2, 1, WIDTH), "values": torch.zeros(2, 1, WIDTH)}, "use another store for them"),
        (vars(entries([3, 4], dtype=torch.float64)), "use another store for them"),
        (vars(entries([3, 4], dtype=torch.float16)), "use another store for them"),
        ({"scores": torch.zeros(2).double()}, "use another store for them"),
    ],
    ids=str,
)
def test_bad_entries(kind, change, message):
    with opened(kind) as store:
        good = entries([3, 4], dtype=torch.bfloat16)
        sequence = store.append(0, 0, entries([0, 1], dtype=torch.bfloat16))
        version = store.snapshot()
        with pytest.raises(ValueError, match=message):
            store.append(sequence, 3, replace(good, **change))
        assert store.snapshot() == version
        assert store.append(sequence, 3, good) == sequence


@pytest.mark.parametrize("kind", EVERY)
def test_bad_arguments(kind):
    with opened(kind) as store:
        sequence = store.append(0, 0, entries([0, 1]))
        for arguments, message in [
            (dict(sequence=7), "sequence=7 is not in the store"),
            (dict(sequence=0), "sequence=0 is not in the store"),
            (dict(query=QUERY[:1]), "query has shape"),
            (dict(count=0), "count=0"),
            (dict(before=-1), "before=-1"),
            (dict(version=store.snapshot() + 1), "is not committed"),
            (dict(version=-1), "is not committed"),
        ]:
            with pytest.raises(ValueError, match=message):
                store.query(**dict(sequence=sequence, query=QUERY, count=1, before=1) | arguments)
        with pytest.raises(ValueError, match="start=-1"):
            store.append(0, -1, entries([0]))
        with pytest.raises(ValueError, match="sequence=7"):
            store.append(7, 0, entries([0]))
        with pytest.raises(ValueError, match="sequence=7"):
            store.drop([sequence, 7])
        assert len(store.query(sequence, QUERY, 2, before=9)) == 2


@pytest.mark.parametrize("kind", EVERY)
def test_dropping_nothing_is_nothing(kind):
    with opened(kind) as store:
        before = store.snapshot()
        store.drop([])
        sequence = store.append(0, 0, entries([0]))
        assert len(store.query(sequence, QUERY, 1, before=1)) == 1
        assert before == 0


@pytest.mark.parametrize("kind", BRANCHING)
def test_what_is_dropped_while_it_is_found_is_not_found_in_part(kind, monkeypatch):
    with opened(kind) as store:
        parent = store.append(0, 0, entries([0, 1, 2]))
        child = store.append(parent, 2, entries([2, 3]))
        find = store._find

        def dropping(*arguments: Any) -> Any:
            store.drop([child])
            return find(*arguments)

        monkeypatch.setattr(store, "_find", dropping)
        with pytest.raises(ValueError, match=f"sequence={child} is not in the store"):
            store.query(child, QUERY, 9, before=9)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_stays_with_its_process(kind):
    with opened(kind) as store:
        sequence = store.append(0, 0, entries([0]))
        child = os.fork()
        if child == 0:
            try:
                store.append(sequence, 1, entries([1]))
            except ValueError as error:
                store.close()
                os._exit(0 if "belongs to process" in str(error) else 1)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert store.append(sequence, 1, entries([1])) == sequence


@pytest.mark.parametrize("kind", EVERY)
def test_a_closed_store_holds_nothing(kind):
    with opened(kind) as store:
        store.append(0, 0, entries([0]))
    assert not getattr(store, "_rows", None)
    assert not getattr(store, "_kept", None)


def test_products_that_overflow_choose_nothing():
    keys = torch.tensor([-3e38, -0.75e38]).view(2, 1, 1).expand(2, HEADS, WIDTH).contiguous()
    with HostStore() as store:
        sequence = store.append(0, 0, Entries(keys, keys, torch.arange(2), torch.zeros(2)))
        found = store.query(sequence, torch.ones(HEADS, WIDTH), 1, before=2)
    assert found.positions.tolist() == [1]
