"""TopicData: facts of many topics, some told often and most of them seldom, to be known by heart.

The miniature of pretraining with hierarchical memories (arXiv 2510.02375): what all topics share should end up in the
model, and the long tail of each topic in the memories of its nodes. Nothing is read from a file.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from memzoo.layers.cluster_tree import ClusterTree
from memzoo.layers.errors import check_choice, check_positive
from memzoo.layers.ngram_embedding import Embedder, HashedNgrams
from memzoo.lit_modules.data.leaf_rows import (
    LeafRows,
    StoredRows,
    bucketed_loader,
    check_level,
    numbers_within,
    pack_leaves,
    refuse_empty,
)
from memzoo.lit_modules.data.tasks import SPLITS
from memzoo.lit_modules.data.topic_task import TopicTask
from memzoo.lit_modules.objective import NOT_SCORED

TrainOn = Literal["all", "answers"]


class TopicRows(LeafRows):
    """Rows whose labels are values: all other tokens are shown, and not asked for.

    Args:
        stored: The rows.
        first_value: Least id of a value.
        options: As in ``LeafRows``.
    """

    def __init__(self, stored: StoredRows, first_value: int, **options: Any) -> None:
        super().__init__(stored, **options)
        self.first_value = first_value

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return row | {"labels": row["tokens"].where(row["tokens"] >= self.first_value, NOT_SCORED)}


class Frequencies(NamedTuple):
    """How often the facts of a bucket are told in the training documents.

    Attributes:
        facts: In the bucket, those of all topics together.
        least: Times that the rarest is told.
        mean: On average.
        most: Times that the most frequent is told.
    """

    facts: int
    least: int
    mean: float
    most: int


class TopicData(pl.LightningDataModule):
    """Documents of topics to train on, packed by the leaf of their words, and the facts of each bucket to answer.

    ``TopicTask`` says what documents and facts are. Documents are routed by their words alone: neither keys nor values
    are embedded, in training as in validation. Validation asks for facts that training tells, behind words drawn anew,
    with a loader for each bucket of frequency: "common", "frequent", "middle" and "rare". ``CausalLMModule`` logs
    ``val/rare/accuracy`` and so on.

    The defaults have 4096 facts of 8 bits, and 16 common ones. An epoch of 16384 documents, 129 batches, tells each of
    the common facts about 2260 times, of the frequent ones 130, of the middle ones 38, of the rare ones 10. That is for
    short trainings. For longer ones there are ``facts_per_topic=512, num_statements=16, batch_size=16``: 500 steps tell
    a rare fact 5 times.

    Args:
        num_topics: As in ``TopicTask``, and so up to ``zipf``.
        facts_per_topic: Facts that a topic has of its own.
        num_common_facts: Facts that hold in all topics.
        num_values: Values to guess from.
        words_per_topic: Words that no other topic has.
        num_common_words: Words that all have.
        context_words: Words of a document.
        num_statements: Facts that a document tells.
        common_share: Of the weight of all facts, what common facts have.
        zipf: Exponent of the frequencies.
        branching: Children of a node of the tree that documents are routed by.
        depth: Its levels.
        embedder: Of the words; ``HashedNgrams()`` by default.
        train_documents: Documents of an epoch, the same in all.
        documents_per_row: Documents that fill a row of training. The last row of a leaf may have fewer.
        train_on: "all" tokens, or "answers", the values alone.
        max_questions: Facts of a bucket to ask for in validation, drawn alike, if it has more; testing draws others.
        batch_size: Training rows in a batch of one device; validation has as many tokens in a batch, at least a row.
        level: Rows of a training batch share the node of this level; 0 mixes all.
        within: (level, node) to train on the documents of one node alone, and to ask the questions that are routed
            there; a bucket that has none has no loader.
        num_workers: Worker processes of each loader; 0 loads in the main process.
        seed: Of all that is drawn. The splits are drawn from different seeds.

    Shape:
        A batch is a dict of ``tokens`` (batch, time + 1) and ``paths`` (batch, depth), int64. Training adds ``doc_ids``
        like ``tokens``, and ``mask``, if a row is padded; ``labels`` like ``tokens``, ``NOT_SCORED`` where nothing is
        asked, are there in validation and with ``train_on="answers"``.

    Raises:
        ValueError: An argument is out of range; from the loaders: nothing is ``within`` the node.
    """

    def __init__(
        self,
        num_topics: int = 64,
        *,
        facts_per_topic: int = 64,
        num_common_facts: int = 16,
        num_values: int = 256,
        words_per_topic: int = 3,
        num_common_words: int = 32,
        context_words: int = 8,
        num_statements: int = 8,
        common_share: float = 0.25,
        zipf: float = 1.0,
        branching: int = 4,
        depth: int = 3,
        embedder: Embedder | None = None,
        train_documents: int = 16384,
        documents_per_row: int = 4,
        train_on: TrainOn = "all",
        max_questions: int = 2048,
        batch_size: int = 32,
        level: int = 0,
        within: tuple[int, int] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, count in dict(
            branching=branching,
            depth=depth,
            train_documents=train_documents,
            documents_per_row=documents_per_row,
            max_questions=max_questions,
            batch_size=batch_size,
        ).items():
            check_positive(name, count)
        check_choice("train_on", train_on, get_args(TrainOn))
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; use 0 to load in the main process")
        check_level(level, within, branching, depth)
        self.task = TopicTask(
            num_topics,
            facts_per_topic,
            num_common_facts,
            num_values,
            words_per_topic,
            num_common_words,
            context_words,
            num_statements,
            common_share,
            zipf,
            seed,
        )
        self.save_hyperparameters(ignore=["embedder"], logger=False)
        self.vocab_size = self.task.vocab_size
        self.embedder: Embedder = HashedNgrams() if embedder is None else embedder
        self.branching = branching
        self.depth = depth
        self.train_documents = train_documents
        self.documents_per_row = documents_per_row
        self.train_on = train_on
        self.max_questions = max_questions
        self.batch_size = batch_size
        self.level = level
        self.within = within
        self.num_workers = num_workers
        self.seed = seed
        self._prepared: tuple[ClusterTree, LeafRows] | None = None

    @property
    def tree(self) -> ClusterTree:
        """The tree, fitted on the words of the training documents."""
        return self._prepare()[0]

    @property
    def training_rows(self) -> LeafRows:
        """The training documents, packed."""
        return self._prepare()[1]

    def embed(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Embed texts, or the words of (rows, time) token ids: what ``tree.route`` takes.

        Shape:
            Returns (rows, width).
        """
        return self.embedder.embed(self.task.render(texts) if isinstance(texts, Tensor) else texts)

    def frequencies(self) -> dict[str, Frequencies]:
        """Count, for every bucket, how often its facts are told in the training documents."""
        found = {}
        for name, places in self.task.buckets.items():
            told = self._told[:1, places] if name == "common" else self._told[:, places]
            found[name] = Frequencies(told.numel(), int(told.min()), float(told.double().mean()), int(told.max()))
        return found

    def setup(self, stage: str | None = None) -> None:
        """Draw the training documents, fit the tree, and pack them. Every process comes to the same."""
        self._prepare()

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the loader of the training rows. In a plain loop, call ``loader.sampler.set_epoch(epoch)``."""
        return bucketed_loader(
            self.training_rows,
            self.batch_size,
            self.trainer,
            self._loader_options(),
            level=self.level,
            within=self.within,
            seed=self.seed,
        )

    def val_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the validation questions, by bucket, in one order that mixes the topics."""
        return self._loaders("val")

    def test_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the test questions, by bucket."""
        return self._loaders("test")

    def predict_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """Return the loaders of the test questions, by bucket."""
        return self._loaders("test")

    def questions(self, split: str, bucket: str) -> TopicRows:
        """Return the questions of a split, "val" or "test", for the facts of a bucket, with the paths of their words.

        They are in the order of the topics, then of the frequencies. What no training document tells is not asked for.
        """
        rng = np.random.default_rng((self.seed, SPLITS.index(split), list(self.task.buckets).index(bucket)))
        places = self.task.buckets[bucket]
        told = (self._told[:, places] > 0).nonzero()
        asked = torch.from_numpy(rng.permutation(len(told)))[: self.max_questions].sort().values
        topics, facts = told[asked].unbind(1)
        tokens = self.task.questions(topics, facts + places.start, rng)
        leaves = self.tree.route(self.embed(tokens))[:, -1:]
        documents = np.ones(tuple(tokens.shape), dtype=np.uint8)
        return TopicRows(
            StoredRows(torch.cat([leaves, tokens], 1).numpy(), documents),
            self.task.first_value,
            branching=self.branching,
            depth=self.depth,
            with_documents=False,
        )

    @cached_property
    def _told(self) -> Tensor:
        """How often the training documents tell every fact, in all topics for common ones: (num_topics, facts)."""
        tokens, topics = self._training_documents()
        keys = tokens[:, self.task.context_words :: 2] - self.task.first_key
        count = self.task.first_value - self.task.first_key
        by_key = (topics[:, None] * count + keys).flatten().bincount(minlength=self.task.num_topics * count)
        told = by_key.view(-1, count).gather(1, self.task.facts[..., 0] - self.task.first_key)
        common = slice(self.task.num_common_facts)
        told[:, common] = told[:, common].sum(0)
        return told

    def _prepare(self) -> tuple[ClusterTree, LeafRows]:
        if self._prepared is None:
            tokens, _ = self._training_documents()
            embedded = self.embed(tokens)
            tree = ClusterTree.fit(embedded, branching=self.branching, depth=self.depth, seed=self.seed)
            stored = pack_leaves(
                list(tokens.numpy()),
                np.full(len(tokens), tokens.shape[1]),
                tree.route(embedded)[:, -1].numpy(),
                self.documents_per_row * self.task.document_length,
                vocab_size=self.vocab_size,
            )
            options: dict[str, Any] = dict(branching=self.branching, depth=self.depth)
            rows = LeafRows(stored, **options)
            if self.train_on == "answers":
                rows = TopicRows(stored, self.task.first_value, **options)
            self._prepared = tree, rows
        return self._prepared

    def _training_documents(self) -> tuple[Tensor, Tensor]:
        return self.task.documents(self.train_documents, (self.seed, SPLITS.index("train")))

    def _loaders(self, split: str) -> dict[str, DataLoader[dict[str, Tensor]]]:
        length = self.task.context_words + 1
        batch_size = max(1, self.batch_size * self.training_rows.sequence_length // length)
        asked = {name: self.questions(split, name) for name in self.task.buckets}
        # In one order that mixes the topics, so that a trainer's limit_val_batches asks about many of them.
        generator = torch.Generator().manual_seed(self.seed)
        chosen = {}
        for name, rows in asked.items():
            numbers = numbers_within(rows, self.within)
            chosen[name] = numbers[torch.randperm(len(numbers), generator=generator)].tolist()
        if not any(chosen.values()):
            raise refuse_empty(self.within, sum(map(len, asked.values())), f"{split} questions")
        return {
            name: DataLoader(Subset(rows, chosen[name]), batch_size=batch_size, **self._loader_options())
            for name, rows in asked.items()
            if chosen[name]
        }

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
