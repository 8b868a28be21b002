"""RecallData: multi-query associative recall (MQAR), the synthetic task on which memories are compared.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927). A row shows
key-value pairs, then asks for the value of every key, at distances drawn from a power law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from memzoo.layers.errors import check_choice, check_divisible, check_positive
from memzoo.lit_modules.data.tasks import Size, TaskData, draw_distinct
from memzoo.lit_modules.objective import NOT_SCORED

Filler = Literal["zero", "random"]


@dataclass(frozen=True)
class RecallTask:
    """Rows of multi-query associative recall.

    A row begins with its pairs, ``key value key value ...``; then every key comes once more, in a place of its own
    among filler, and is to be answered with its value, which is not shown:

        tokens   2  8  4  7  0  0  4  0  0  0  2  0
        targets                    7           8

    Keys are drawn from the lower half of the vocabulary without 0, values from the upper half, both without repetition
    within a row. Queries stand in every second place behind the pairs, the i-th of them (from 1) drawn with a weight of
    ``i ** (power - 1)``, without repetition.

    Args:
        sequence_length: Inputs in a row.
        num_pairs: Keys, and so queries, of an episode.
        vocab_size: Token ids, keys and values together.
        num_updates: Keys, drawn at random, that are bound once more behind the pairs, to a new value, which is then the
            right one.
        episode_length: Inputs of an episode: a row is as many as fit, one behind the other, each with pairs and queries
            of its own. What was bound in one episode no longer holds in the next. All of the row by default.
        min_gap: Tokens at least between the last pair and the first query. ``n`` layers of sliding-window attention see
            no pair from a query if ``n * (window - 1) <= min_gap``.
        power: Exponent of the queries' places; small is near the pairs, 1 is uniform.
        filler: What stands in all other places: "zero", token 0, or "random", tokens drawn from all of the vocabulary,
            keys and values among them.

    Raises:
        ValueError: An argument is out of range, or the episode or the vocabulary is too small for the pairs.
    """

    sequence_length: int = 64
    num_pairs: int = 4
    vocab_size: int = 8192
    num_updates: int = 0
    episode_length: int | None = None
    min_gap: int = 0
    power: float = 0.01
    filler: Filler = "zero"

    def __post_init__(self) -> None:
        check_positive("num_pairs", self.num_pairs)
        check_positive("vocab_size", self.vocab_size)
        check_positive("sequence_length", self.sequence_length)
        if self.episode_length is not None:
            check_divisible("sequence_length", self.sequence_length, "episode_length", self.episode_length)
        check_choice("filler", self.filler, ("zero", "random"))
        if not 0 <= self.num_updates <= self.num_pairs:
            raise ValueError(
                f"num_updates={self.num_updates} is not within [0, num_pairs={self.num_pairs}]; a key is updated once"
            )
        if self.min_gap < 0:
            raise ValueError(f"min_gap={self.min_gap} is negative; use 0 for queries right behind the pairs")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power={self.power} is not positive and finite; use 0.01, or 1.0 for uniform places")
        pairs = f"num_pairs={self.num_pairs} and num_updates={self.num_updates}"
        if (length := self._episode_length) < (least := self._first_query + 2 * self.num_pairs):
            name = "sequence_length" if self.episode_length is None else "episode_length"
            raise ValueError(
                f"{name}={length} is too short for {pairs} with min_gap={self.min_gap}; use at least {least}: the gap, "
                f"and two tokens for each pair, update and query"
            )
        if self.vocab_size < (least := 2 * max(self.num_pairs + 1, self.num_pairs + self.num_updates)):
            raise ValueError(
                f"vocab_size={self.vocab_size} has too few keys or values for {pairs}; use at least {least}"
            )

    def rows(self, num_rows: int, seed: int | Sequence[int]) -> dict[str, Tensor]:
        """Draw rows; every seed, a number or a sequence of them, gives its own.

        Returns:
            ``tokens`` and ``labels``, each (num_rows, sequence_length + 1) int64, as ``NextTokens`` takes them: the
            answer to ``tokens[:, t]`` is ``labels[:, t + 1]``, and all other labels are ``NOT_SCORED``.
        """
        rng = np.random.default_rng(seed)
        episodes = num_rows * (self.sequence_length // self._episode_length)
        num_keys = self.vocab_size // 2
        keys = 1 + draw_distinct(rng, episodes, np.ones(num_keys - 1), self.num_pairs)
        values = num_keys + draw_distinct(
            rng, episodes, np.ones(self.vocab_size - num_keys), self.num_pairs + self.num_updates
        )
        updated = draw_distinct(rng, episodes, np.ones(self.num_pairs), self.num_updates)
        places = np.arange(1, 1 + (self._episode_length - self._first_query) // 2)
        queries = self._first_query + 2 * draw_distinct(rng, episodes, places ** (self.power - 1.0), self.num_pairs)

        shape, bound = (episodes, self._episode_length), 2 * (self.num_pairs + self.num_updates)
        tokens = torch.from_numpy(rng.integers(self.vocab_size if self.filler == "random" else 1, size=shape))
        tokens[:, 0:bound:2] = torch.cat([keys, keys.gather(1, updated)], 1)
        tokens[:, 1:bound:2] = values
        tokens.scatter_(1, queries, keys)
        answers = values[:, : self.num_pairs].scatter(1, updated, values[:, self.num_pairs :])
        targets = torch.full(shape, NOT_SCORED).scatter_(1, queries, answers)
        edge = torch.zeros(num_rows, 1, dtype=torch.long)
        return {
            "tokens": torch.cat([tokens.view(num_rows, -1), edge], 1),
            "labels": torch.cat([edge + NOT_SCORED, targets.view(num_rows, -1)], 1),
        }

    @property
    def size(self) -> Size:
        """Inputs in a row, and keys of an episode."""
        return self.sequence_length, self.num_pairs

    @property
    def num_queries(self) -> int:
        """Queries of a row."""
        return self.num_pairs * (self.sequence_length // self._episode_length)

    @property
    def _episode_length(self) -> int:
        return self.sequence_length if self.episode_length is None else self.episode_length

    @property
    def _first_query(self) -> int:
        return 2 * (self.num_pairs + self.num_updates) + self.min_gap


class RecallData(TaskData[RecallTask]):
    """Multi-query associative recall (MQAR): pairs of key and value, then every key again, to be answered.

    ``RecallTask`` says what a row is. The defaults are Zoology's figure 2, whose further sizes are (128, 8) and
    (256, 16); its mixture, on which newer layers are compared, is

        RecallData(
            train_sizes=[(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)],
            train_rows=[100_000, 20_000, 20_000, 20_000, 20_000],
            val_sizes=[(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)],
            val_rows=1000, filler="random", batch_size=256,
        )

    Validation sizes longer than those of training show whether what was learned holds beyond the trained length.

    Args:
        train_sizes: Pairs of a sequence length and a number of key-value pairs. A batch is of one size; the batches of
            the sizes are mixed.
        val_sizes: Sizes to validate, test and predict on, each with a loader of its own, named ``LENGTHxPAIRS``. Those
            of training by default.
        vocab_size: Token ids, keys and values together.
        num_updates: As in ``RecallTask``, and so up to ``filler``.
        episode_length: Inputs of an episode.
        min_gap: Tokens at least between the last pair and the first query: what puts pairs beyond a window.
        power: Exponent of the queries' places.
        filler: "zero" or "random".
        train_rows: Rows of an epoch for each size, or one number for all.
        val_rows: Rows of each validation size; testing has as many others.
        batch_size: Rows in a batch of one device.
        num_workers: Worker processes of each loader; 0 draws in the main process.
        seed: Of all rows and their order. The splits are drawn from different seeds.

    Shape:
        A batch is a dict of ``tokens`` and ``labels``, each (batch, sequence_length + 1) int64. Inputs are
        ``tokens[:, :-1]``; targets are ``labels[:, 1:]``, with ``NOT_SCORED`` where nothing is asked.

    Raises:
        ValueError: An argument is out of range, or a size has too many pairs for its length.

    Reference:
        HazyResearch/zoology: zoology/data/multiquery_ar.py, and forgetting_mqar.py for ``num_updates`` (there, the new
        value may be that of another key).
    """

    def __init__(
        self,
        train_sizes: Sequence[Size] = ((64, 4),),
        val_sizes: Sequence[Size] | None = None,
        *,
        vocab_size: int = 8192,
        num_updates: int = 0,
        episode_length: int | None = None,
        min_gap: int = 0,
        power: float = 0.01,
        filler: Filler = "zero",
        train_rows: int | Sequence[int] = 100_000,
        val_rows: int = 3_000,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = dict(
            vocab_size=vocab_size,
            num_updates=num_updates,
            episode_length=episode_length,
            min_gap=min_gap,
            power=power,
            filler=filler,
        )
        super().__init__(
            lambda size: RecallTask(*size, **options),
            train_sizes,
            val_sizes,
            train_rows=train_rows,
            val_rows=val_rows,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)
        self.vocab_size = vocab_size
