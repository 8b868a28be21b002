"""TopKStore: its law, and how far back it is exact."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memzoo.layers.stores import Entries, TopKStore
from tests.layers.stores.store_cases import APPENDS, FEW, Model, entries, in_order, queries, run, same

[QUERY] = queries(1)


def law(rows: list[Entries], size: int) -> Entries:
    """The highest scores, of equal ones the earlier."""
    return in_order(sorted(rows, key=lambda row: (-float(row.scores), int(row.positions)))[:size])


@FEW
@given(APPENDS, st.integers(1, 5))
def test_it_keeps_the_highest_scores_in_all_versions_and_forks(appends, size):
    model = Model()
    with TopKStore(size, history=len(appends)) as store:
        versions = run(store, model, appends)
        for sequence, held in model.sequences.items():
            for version in versions:
                for before in {0, 2, held.end - 2, held.end, held.end + 5}:
                    expected = law(model.seen(sequence, max(before, 0), version), size)
                    same(store.query(sequence, QUERY, 9, before=max(before, 0), version=version), expected)


@FEW
@given(st.lists(st.integers(0, 4), min_size=4, max_size=8), st.integers(1, 3), st.integers(1, 4))
def test_what_lies_behind_the_history_is_refused_and_nothing_else_is(sizes, history, size):
    model, start, versions, ends = Model(), 0, [0], [0]
    store = TopKStore(size, history=history)
    for seed, number in enumerate(sizes):
        new = entries([*range(start, start + number)], seed=seed)
        sequence = model.place(1 if seed else 0, start)
        assert store.append(1 if seed else 0, start, new) == sequence == 1
        model.append(1, start, new, store.snapshot())
        versions.append(store.snapshot())
        ends.append(model.sequences[1].end)
        start = model.sequences[1].end
    for index, (version, end) in enumerate(zip(versions, ends, strict=True)):
        if index >= len(sizes) - history:
            same(store.query(1, QUERY, 9, before=start, version=version), law(model.seen(1, start, version), size))
            same(store.query(1, QUERY, 9, before=end), law(model.seen(1, end, versions[-1]), size))
            if end < start:
                fork = store.append(1, end, entries([]))
                same(store.query(fork, QUERY, 9, before=99), law(model.seen(1, end, versions[-1]), size))
            continue
        with pytest.raises(ValueError, match=f"version={version} lies before the last history={history}"):
            store.query(1, QUERY, 9, before=start, version=version)
        for refused in (
            lambda end=end: store.query(1, QUERY, 9, before=end),
            lambda end=end: store.append(1, end, new),
        ):
            with pytest.raises(ValueError, match=f"={end} lies before the last history={history}"):
                refused()


def test_a_count_below_the_size_takes_the_highest_scores():
    store, new = TopKStore(4), entries([*range(9)], seed=3)
    sequence = store.append(0, 0, new)
    rows = [new.select(slice(i, i + 1)) for i in range(9)]
    same(store.query(sequence, QUERY, 2, before=9), law(rows, 2))


def test_a_fork_has_a_history_of_its_own():
    store, first = TopKStore(2, history=2), entries([0, 1, 2], seed=4)
    sequence = store.append(store.append(0, 0, first), 3, entries([3, 4]))
    fork = store.append(sequence, 3, entries([3]))
    rows = [first.select(slice(i, i + 1)) for i in range(2)]
    same(store.query(fork, QUERY, 9, before=2), law(rows, 2))


@pytest.mark.parametrize("slope", [-1, 0])
def test_it_holds_nothing_that_would_be_left_out_at_once(slope):
    store = TopKStore(2)
    worse = entries([*range(100)])
    worse.scores.copy_(slope * worse.positions)
    sequence = store.append(0, 0, worse)
    [block] = store._kept[sequence].blocks
    assert block.entries.positions.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["size", "history"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        TopKStore(**{"size": 1} | {name: 0})
