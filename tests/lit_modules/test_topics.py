"""TopicData: facts of topics, how often they are told, and that no answer tells the router anything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from memzoo.layers import HashedNgrams
from memzoo.lit_modules import CausalLMModule, TopicData
from memzoo.lit_modules.data.topic_task import BUCKETS, TopicTask
from memzoo.lit_modules.objective import NOT_SCORED, NextTokens

TASK = TopicTask(num_topics=6, facts_per_topic=27, num_common_facts=3, num_values=50, num_statements=5)


def small(**options: Any) -> TopicData:
    sizes = dict(num_topics=6, facts_per_topic=27, num_common_facts=3, num_values=50, num_statements=5)
    return TopicData(**sizes | dict(branching=3, depth=2, train_documents=300, batch_size=4) | options)


@pytest.fixture(scope="module")
def data() -> TopicData:
    data = small()
    data.setup()
    return data


def told(tokens: Tensor, task: TopicTask = TASK) -> Tensor:
    """The (key, value) pairs of documents, (documents, statements, 2)."""
    return tokens[:, task.context_words :].unflatten(1, (-1, 2))


# Documents


def test_a_document_is_words_of_its_topic_and_common_ones_then_facts_of_it_none_twice() -> None:
    tokens, topics = TASK.documents(500, seed=1)
    assert tokens.shape == (500, TASK.document_length) == (500, 8 + 10)
    assert topics.unique().tolist() == list(range(6))
    words = tokens[:, :8]
    own = (words >= TASK.num_common_words) & (words < TASK.first_key)
    assert (own.sum(1) == 6).all()
    assert ((words[own] - TASK.num_common_words) // TASK.words_per_topic == topics.repeat_interleave(6)).all()
    assert own.float().mean(0).min() > 0.6  # in any order
    for pairs, topic in zip(told(tokens).tolist(), topics.tolist(), strict=True):
        facts = TASK.facts[topic].tolist()
        assert all(pair in facts for pair in pairs)
        assert len({key for key, _ in pairs}) == 5
    assert int(tokens.max()) < TASK.vocab_size


def test_topics_share_keys_and_have_values_of_their_own_and_common_facts_are_the_same() -> None:
    keys, values = TASK.facts.unbind(-1)
    assert (keys[:, :3] == keys[0, :3]).all()
    assert (values[:, :3] == values[0, :3]).all()
    own = keys[:, 3:].sort(1)
    assert (own.values == torch.arange(TASK.first_key + 3, TASK.first_value)).all()
    assert not torch.equal(keys[0], keys[1])  # other keys are frequent in another topic
    by_key = values[:, 3:].gather(1, own.indices)
    assert (by_key[0] == by_key[1]).float().mean() < 0.3  # 1 / 50 by chance
    assert values.min() >= TASK.first_value
    assert values.max() < TASK.vocab_size


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_the_first_fact_of_a_document_is_drawn_by_zipfs_law(zipf: float) -> None:
    task, count = replace(TASK, zipf=zipf), 30_000
    tokens, topics = task.documents(count, seed=3)
    place = (task.facts[topics, :, 0] == told(tokens, task)[:, :1, 0]).int().argmax(1)
    shares = place.bincount(minlength=30) / count
    ranks = torch.arange(1, 28, dtype=torch.float64) ** -zipf
    expected = torch.cat([torch.full((3,), 0.25 / 3, dtype=torch.float64), 0.75 * ranks / ranks.sum()])
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_buckets_go_by_rank_and_the_topics_own_have_about_equal_weight() -> None:
    assert TASK.buckets == {"common": range(3), "frequent": range(3, 6), "middle": range(6, 12), "rare": range(12, 30)}
    large = replace(TASK, facts_per_topic=8000)
    weights = [large.weights[list(places)].sum() for places in large.buckets.values()]
    assert weights == pytest.approx([0.25, 0.25, 0.25, 0.25], abs=0.06)


def test_every_seed_has_its_own_facts_and_documents() -> None:
    assert torch.equal(TASK.documents(9, seed=1)[0], TASK.documents(9, seed=1)[0])
    assert not torch.equal(TASK.documents(9, seed=1)[0], TASK.documents(9, seed=2)[0])
    assert not torch.equal(TASK.facts, replace(TASK, seed=1).facts)


# Data


def test_frequencies_are_counts_of_the_training_documents(data: TopicData) -> None:
    found = data.frequencies()
    pairs, counts = {}, {name: [] for name in BUCKETS}
    tokens, topics = data.task.documents(300, (0, 0))
    for topic, facts in zip(topics.tolist(), told(tokens).tolist(), strict=True):
        for key, _ in facts:
            pairs[topic, key] = pairs.get((topic, key), 0) + 1
    for name, places in data.task.buckets.items():
        for topic in range(6):
            counts[name] += [pairs.get((topic, int(data.task.facts[topic, place, 0])), 0) for place in places]
    common = [sum(counts["common"][place::3]) for place in range(3)]
    for name, expected in (counts | {"common": common}).items():
        assert found[name] == (
            len(expected),
            min(expected),
            pytest.approx(sum(expected) / len(expected)),
            max(expected),
        )
    means = [found[name].mean for name in BUCKETS]
    assert means == sorted(means, reverse=True)


def test_training_rows_hold_every_document_once_with_the_path_of_its_words(data: TopicData) -> None:
    tokens, _ = data.task.documents(300, (0, 0))
    paths = dict(zip(map(tuple, tokens.tolist()), data.tree.route(data.embed(tokens)).tolist(), strict=True))
    seen = []
    for batch in data.train_dataloader():
        for row, path, mask in zip(batch["tokens"], batch["paths"], batch["mask"], strict=True):
            real = row[:-1][mask[:-1]].view(-1, data.task.document_length)  # the last token is the next row's first
            seen += [tuple(document) for document in real.tolist()]
            assert all(paths[tuple(document)] == path.tolist() for document in real.tolist())
    assert sorted(seen) == sorted(paths)


def test_the_router_reads_words_and_neither_keys_nor_values() -> None:
    class Spy:
        fingerprint = "spy"
        texts: Sequence[str] = ()

        def embed(self, texts: Sequence[str]) -> Tensor:
            self.texts = [*self.texts, *texts]
            return HashedNgrams(64).embed(texts)

    spy = Spy()
    data = small(embedder=spy)
    questions = data.questions("val", "rare")
    words = set(data.task.render(torch.arange(data.vocab_size).unsqueeze(0))[0].split())
    assert len(words) == data.task.first_key
    assert len(spy.texts) == 300 + len(questions)
    for text in spy.texts:
        assert len(text.split()) == data.task.context_words
        assert set(text.split()) <= words
    tokens = questions[list(range(len(questions)))]["tokens"]
    other = tokens.clone()
    other[:, data.task.context_words :] = data.task.first_value
    assert torch.equal(data.embed(other), data.embed(tokens))


def test_topics_come_to_leaves_of_their_own() -> None:
    data = small(num_topics=9, train_documents=900)
    tokens, topics = data.task.documents(900, (0, 0))
    met = torch.zeros(9, 9)
    leaves = data.tree.route(data.embed(tokens))[:, -1]
    met.index_put_((topics, leaves), torch.ones(900), accumulate=True)
    assert met.amax(0).sum() > 0.85 * 900


def test_validation_asks_for_every_fact_that_training_tells(data: TopicData) -> None:
    loaders = data.val_dataloader()
    assert list(loaders) == ["common", "frequent", "middle", "rare"]
    for name, loader in loaders.items():
        asked = []
        for batch in loader:
            assert set(batch) == {"tokens", "paths", "labels"}
            tokens = NextTokens.of(batch)
            assert tokens.counted.sum(1).tolist() == [1] * len(batch["tokens"])
            assert tokens.counted[:, -1].all()  # behind words and key, which are all that is read
            asked += torch.stack([tokens.inputs[:, -1], tokens.targets[:, -1]], 1).tolist()
        places = data.task.buckets[name]
        facts = [
            data.task.facts[topic, place].tolist() for topic in range(6) for place in places if data._told[topic, place]
        ]
        assert sorted(asked) == sorted(facts)
    assert 0 in data._told[:, data.task.buckets["rare"]]


def test_splits_ask_with_other_words_and_some_facts_where_there_are_many() -> None:
    data, fewer = small(), small(max_questions=20)
    assert data.training_rows.stored.tokens.tolist() == fewer.training_rows.stored.tokens.tolist()
    questions = [data.questions(split, "rare") for split in ("val", "val", "test")]
    first, again, other = ([tuple(row["tokens"].tolist()) for row in rows] for rows in questions)
    assert first == again
    assert not set(first) & set(other)
    assert [row[-2:] for row in first] == [row[-2:] for row in other]  # all facts, behind other words
    facts = [
        [tuple(row["tokens"].tolist()[-2:]) for row in fewer.questions(split, "rare")] for split in ("val", "test")
    ]
    assert len(facts[0]) == len(facts[1]) == 20
    assert set(facts[0]) != set(facts[1])
    assert set(facts[0]) <= {row[-2:] for row in first}


def test_training_may_score_answers_alone() -> None:
    batch = next(iter(small(train_on="answers").train_dataloader()))
    values = batch["tokens"] >= TASK.first_value
    assert torch.equal(batch["labels"], batch["tokens"].where(values, NOT_SCORED))
    assert NextTokens.of(batch).counted.sum() == (values & batch["mask"]).sum()


def test_batches_keep_to_a_level_and_a_subtree(data: TopicData) -> None:
    one_node = small(level=2).train_dataloader()
    assert all(len(batch["paths"].unique(dim=0)) == 1 for batch in one_node)
    node = int(data.tree.route(data.embed(data.task.documents(1, 0)[0]))[0, 0])
    within = small(within=(1, node)).train_dataloader()
    assert all((batch["paths"][:, 0] == node).all() for batch in within)


def test_a_subtree_is_asked_its_own_questions(data: TopicData) -> None:
    asked: dict[str, int] = dict.fromkeys(BUCKETS, 0)
    for node in range(3):
        for loaders in (small(within=(1, node)).val_dataloader(), small(within=(1, node)).test_dataloader()):
            assert all((batch["paths"][:, 0] == node).all() for loader in loaders.values() for batch in loader)
        for name, loader in small(within=(1, node)).val_dataloader().items():
            asked[name] += sum(len(batch["tokens"]) for batch in loader)
    assert asked == {name: len(data.questions("val", name)) for name in BUCKETS}


def test_a_bucket_without_a_question_in_the_node_has_no_loader() -> None:
    few = [small(num_topics=3, depth=3, max_questions=1, within=(1, node)) for node in range(3)]
    held = [set(data.val_dataloader()) if any(held_by(data)) else set() for data in few]
    assert held == [{name for name, has in zip(BUCKETS, held_by(data), strict=True) if has} for data in few]
    assert any(0 < len(names) < 4 for names in held)


def held_by(data: TopicData) -> list[bool]:
    """For every bucket, whether a validation question comes to the node."""
    level, node = data.within
    paths = [data.questions("val", name)[:]["paths"][:, level - 1] for name in BUCKETS]
    return [bool((own == node).any()) for own in paths]


def test_a_node_without_questions_is_named() -> None:
    asked = small(max_questions=1)
    leaves = torch.cat([asked.questions("val", name).leaves for name in BUCKETS])
    empty = next(leaf for leaf in range(9) if leaf not in leaves)
    with pytest.raises(ValueError, match=rf"within=\(2, {empty}\) holds none of the 4 val questions; name a node"):
        small(max_questions=1, within=(2, empty)).val_dataloader()


def test_overfitting_keeps_to_a_level_and_a_subtree(tmp_path: Any) -> None:
    class Noting(CausalLMModule):
        def on_fit_start(self) -> None:
            self.seen: list[list[list[int]]] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.seen.append(batch["paths"].tolist())
            return super().training_step(batch, index)

    module = Noting("transformer_tiny", {"vocab_size": TASK.vocab_size, "dim": 16, "depth": 1, "num_heads": 2})
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        overfit_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    node = int(small().training_rows.leaves[-1]) // 3
    trainer.fit(module, datamodule=small(level=2, within=(1, node), batch_size=2))
    assert len(module.seen) == 4
    assert module.seen[:2] == module.seen[2:]
    for paths in module.seen:
        assert {path[0] for path in paths} == {node}
        assert len({path[1] for path in paths}) == 1


def test_a_language_model_is_scored_by_bucket(tmp_path: Any) -> None:
    module = CausalLMModule("transformer_tiny", {"vocab_size": TASK.vocab_size, "dim": 16, "depth": 1, "num_heads": 2})
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=small())
    names = set(trainer.callback_metrics)
    assert {f"val/{bucket}/accuracy" for bucket in BUCKETS} <= names
    assert "val/bits_per_byte" not in names


@pytest.mark.parametrize("name", ["TopicData", "ClusteredTextData"])
def test_the_command_line_takes_an_embedder_by_class_path(name: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    embedder = {"class_path": "memzoo.layers.HashedNgrams", "init_args": {"dim": 32}}
    arguments = {"embedder": embedder, "within": [1, 2]}
    config = parser.parse_object({"data": {"class_path": f"memzoo.lit_modules.{name}", "init_args": arguments}})
    data = parser.instantiate_classes(config).data
    assert data.embedder == HashedNgrams(32)
    assert data.within == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_topics": 0}, r"num_topics=0 is not a whole number >= 1"),
        ({"facts_per_topic": 7}, r"facts_per_topic=7 fills no three buckets; use at least 8"),
        ({"num_statements": 31}, r"num_statements=31 is more than the 30 facts of a topic"),
        ({"common_share": 1.0}, r"common_share=1.0 is not between 0 and 1"),
        ({"zipf": -1.0}, r"zipf=-1.0 is not a finite number >= 0"),
        ({"train_on": "values"}, r"train_on='values' is not one of 'all', 'answers'"),
        ({"within": (3, 0)}, r"within=\(3, 0\) is no node of the tree"),
        ({"seed": -1}, r"seed=-1 is negative"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_the_first_questions_are_about_many_topics_and_always_the_same():
    data = small(batch_size=1)
    for name, loader in data.val_dataloader().items():
        first = next(iter(loader))
        assert len(first["paths"][:, -1].unique()) > 2
        assert torch.equal(first["tokens"], next(iter(data.val_dataloader()[name]))["tokens"])
