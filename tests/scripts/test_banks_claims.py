"""What the claims of hierarchical memory banks measure."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from memzoo.arch import HierarchicalMemoryLM, create_model
from memzoo.layers import MemoryBank
from memzoo.layers.banks.layout import Node
from memzoo.lit_modules.data import TopicData

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZES = dict(dim=8, depth=1, num_heads=1, hidden_dim=8)
TOPICS: dict[str, Any] = dict(
    num_topics=8,
    facts_per_topic=16,
    num_common_facts=4,
    num_values=16,
    num_statements=4,
    branching=2,
    depth=2,
    train_documents=64,
    documents_per_row=2,
    batch_size=8,
)


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield import_module("claims.banks")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def data() -> TopicData:
    return TopicData(**TOPICS)


@pytest.fixture
def settings(claims: ModuleType) -> dict[str, Any]:
    """A run that takes no time."""
    return claims.TRAINING | dict(data=TOPICS, sizes=SIZES, rows=[2, 2], alone=1, together=2, frozen=False)


@pytest.fixture
def model(data: TopicData) -> HierarchicalMemoryLM:
    torch.manual_seed(0)
    return create_model("hier_memory_tiny", vocab_size=data.vocab_size, **SIZES).eval()


@pytest.fixture
def bank(data: TopicData, model: HierarchicalMemoryLM) -> MemoryBank:
    """A bank whose blocks, generic ones among them, all say something else."""
    torch.manual_seed(1)
    layout = model.layout((2, 2), branching=2, dtype=torch.float32)
    bank = MemoryBank.create(data.tree, layout)
    nodes = [Node(level, node) for level in layout.levels for node in range(layout.num_nodes(level) + 1)]
    bank.put({node: torch.randn(layout.block_shape(node.level)) for node in nodes})
    return bank


@pytest.fixture
def asked(claims: ModuleType, data: TopicData, model: HierarchicalMemoryLM, bank: MemoryBank) -> dict[str, Any]:
    """Questions whose answers are what the fetched blocks say, but for the first."""
    own = claims.Asked.of(data, "rare")
    said = claims.answers(model, bank, own, own.paths).argmax(-1)
    said[0] = (said[0] + 1) % data.vocab_size
    return {"rare": replace(own, tokens=torch.cat([own.tokens[:, :-1], said[:, None]], 1))}


def test_a_run_measures_what_the_tables_show(claims, settings):
    once = claims.measure(settings, 0)
    assert {column for claim in claims.CLAIMS.claims.values() for column in claim.columns} <= once.keys()
    assert once == claims.measure(settings, 0)
    alone = claims.measure(settings | {"together": 0}, 0)
    assert alone.keys() == {f"{bucket}, none" for bucket in claims.BUCKETS}


def test_all_runs_see_as_many_tokens_and_claims_share_them(claims):
    runs = [settings for claim in claims.CLAIMS.claims.values() for settings in claim.variants.values()]
    assert {settings["alone"] + settings["together"] for settings in runs} == {claims.STEPS}
    identities = {repr(settings) for settings in runs}
    assert len(identities) == len(claims.RUNS) + len(claims.LEVELS)


# Training


def test_epochs_follow_each_other_in_another_order(claims, data):
    length = len(data.train_dataloader())
    batches = list(islice(claims.cycled(data), 2 * length))
    first, second = (torch.cat([batch["tokens"] for batch in half]) for half in (batches[:length], batches[length:]))
    assert len(first) == len(data.training_rows)
    assert not torch.equal(first, second)
    assert torch.equal(first.unique(dim=0), second.unique(dim=0))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_bank_is_trained_and_the_anchor_if_it_is_not_frozen(claims, data, model, settings, frozen):
    bank = MemoryBank.create(data.tree, model.layout((2, 2), branching=2))
    before = [own.clone() for own in model.parameters()]
    model.requires_grad_(not frozen)
    claims.train(model, bank, claims.cycled(data), settings, steps=2, seed=0)
    changed = [not torch.equal(own, old) for own, old in zip(model.parameters(), before, strict=True)]
    assert all(changed) != frozen
    assert any(changed) != frozen
    written = bank.written()
    assert {Node(1, 0), Node(1, 1)} <= set(written)
    assert {Node(1, 2), Node(2, 4)} <= set(written), "one row in three reads the generic blocks"


def test_an_anchor_alone_is_trained_without_a_bank(claims, data, model, settings):
    before = model.embedding.weight.clone()
    claims.train(model, None, claims.cycled(data), settings, steps=0, seed=0)
    assert torch.equal(model.embedding.weight, before)
    claims.train(model, None, claims.cycled(data), settings, steps=1, seed=0)
    assert not torch.equal(model.embedding.weight, before)


# Questions


def test_answers_are_what_the_model_says_behind_the_key(claims, model, bank, asked):
    own = asked["rare"]
    assert torch.equal(own.paths, bank.route(own.embeddings))
    logits = claims.answers(model, bank, own, own.paths)
    for row in (0, 7):
        alone, _ = model(own.tokens[row : row + 1, :-1], memories=bank.fetch(own.paths[row : row + 1]))
        torch.testing.assert_close(logits[row : row + 1], alone[:, -1], rtol=0, atol=1e-5)
    assert own.hits(logits).tolist() == [0, *[1] * (len(logits) - 1)]


def test_each_reading_reads_its_blocks(claims, model, bank, asked, monkeypatch):
    fetched, fetch = [], bank.fetch
    monkeypatch.setattr(bank, "fetch", lambda paths: fetched.append(paths) or fetch(paths))
    metrics = claims.readings(model, bank, asked, 0)
    assert list(metrics) == ["rare, none", "rare, fetched", "rare, generic", "rare, wrong path"]
    own, paths = asked["rare"], asked["rare"].paths
    assert torch.equal(fetched[0], paths)
    assert fetched[1].unique(dim=0).tolist() == [[2, 4]]
    assert torch.equal(fetched[2], claims.wrong_paths(paths, 0))
    assert metrics["rare, fetched"] == 1 - 1 / len(paths)
    assert metrics["rare, generic"] == own.hits(claims.answers(model, bank, own, fetched[1])).mean() < 0.5
    assert claims.readings(model, None, asked, 0) == {"rare, none": metrics["rare, none"]}


def test_a_wrong_path_is_one_of_the_others_and_shares_no_node(claims):
    paths = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3], [1, 3]]).repeat(20, 1)
    wrong = claims.wrong_paths(paths, 0)
    assert (wrong != paths).all()
    assert wrong.unique(dim=0).tolist() == paths.unique(dim=0).tolist()
    assert torch.equal(wrong, claims.wrong_paths(paths, 0))


def test_blocking_reaches_its_own_and_no_others_and_is_taken_back(claims, model, bank, asked):
    known = claims.readings(model, bank, asked, 0)
    metrics = claims.blocking(model, bank, asked)
    assert metrics["change of others"] == metrics["change of unblocked"] == 0
    assert metrics["rare, own"] == metrics["rare, others"] == metrics["rare, others, blocked"] == known["rare, fetched"]
    assert metrics["rare, own, omitted"] == known["rare, none"] < known["rare, fetched"]
    hits = []
    for node in range(2):
        own = asked["rare"].where(asked["rare"].paths[:, 0] == node)
        bank.block(1, node, subtree=True)
        hits.append(own.hits(claims.answers(model, bank, own, bank.route(own.embeddings, reroute=True))))
        bank.unblock(1, node, subtree=True)
    assert metrics["rare, own, rerouted"] == float(torch.cat(hits).mean())


def test_changes_of_others_and_what_stays_blocked_are_seen(claims, model, bank, asked, monkeypatch):
    block, unblock = bank.block, bank.unblock
    monkeypatch.setattr(bank, "block", lambda *node, **_: (block(*node), block(2, 0), block(2, 3)))
    monkeypatch.setattr(bank, "unblock", lambda *node, **_: (unblock(*node), unblock(2, 3)))
    metrics = claims.blocking(model, bank, asked)
    assert metrics["change of others"] > 0
    assert metrics["change of unblocked"] > 0


# Checks


def test_checks_ask_for_more_for_fewer_and_for_as_much(claims):
    one, two = claims.Row("one", "fetched"), claims.Row("two", "none")
    results = {"one": {"rare, fetched": 0.5}, "two": {"rare, none": 0.3}}
    assert claims.knows_more(one, two, "rare").margin(results) == pytest.approx(0.19)
    assert claims.knows_fewer(one, two, "rare").margin(results) == pytest.approx(-0.2)
    assert claims.knows_as_much(one, two, "rare").margin(results) == pytest.approx(-0.18)
    assert claims.knows_as_much(two, one, "rare").margin(results) == pytest.approx(-0.18)


def test_the_least_change_of_a_logit_fails_a_check(claims):
    check = claims.same_to_the_bit("one", "change of others", "they stay")
    assert check.margin({"one": {"change of others": 0.0}}) > 0
    assert check.margin({"one": {"change of others": 2.0**-24}}) < 0


def test_what_a_blocked_subtree_loses_and_keeps(claims):
    results = {
        "one": {
            "rare, own": 0.5,
            "rare, own, omitted": 0.1,
            "common, own": 1.0,
            "common, own, omitted": 0.97,
        }
    }
    assert claims.loses("one", "omitted", 0.1).margin(results) == pytest.approx(0.3)
    assert claims.keeps_common("one", "omitted").margin(results) == pytest.approx(-0.01)
