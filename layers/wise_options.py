"""WiseOptions: what WISE can be told when it is attached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from memzoo.layers.errors import check_choice, check_number, check_positive

Mode = Literal["merge", "retrieve"]
MaskKind = Literal["exact", "bernoulli", "disjoint"]
Indicator = Literal["linear", "activated"]
Reduce = Literal["mean", "max", "last", "easyedit"]
Granularity = Literal["sample", "batch", "token"]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class WiseOptions:
    """Options of ``Wise``; the defaults are the paper's, but for what says so.

    Attributes:
        mode: "merge" keeps one side memory, into which finished shards are merged. "retrieve" makes another of every
            ``shards_per_merge`` shards and reads the one that responds most.
        edits_per_shard: Edits after which a shard is finished and the next begins, with another mask. Edits learned in
            one call are not split.
        shards_per_merge: Finished shards that are merged at a time.
        mask_ratio: Share of the matrix that a shard may change.
        mask: "exact" draws so many entries, "bernoulli" each with that probability, "disjoint" such that the shards of
            one merge share none.
        density: Share of each shard's entries that Ties keeps, the largest; at least ``mask_ratio``.
        keep_shards: Merged shards that are kept, for ``rollback`` and, in mode "merge", so that every merge is one of
            all shards with equal weights. When they are more, they are dropped, a memory's at a time, and the next
            merge is one of the memory, with weight 0.6, and of the new shards, which share 0.4, as in EasyEdit.
        learning_rate: Of SGD without weight decay.
        optimizer: Makes another optimiser of the one parameter, for every edit anew.
        max_steps: Of an edit. It ends before where its loss is at most 0.02 and moved by at most 1e-4, as in EasyEdit.
        norm_constraint: No entry of the side matrix departs further from the main one; None for no bound.
        margins: Of the routing loss: (alpha, beta, gamma) as numbers, (5, 20, 10) in the paper; or a factor c of the
            scale s that ``calibrate`` measures: alpha = c s / 4, beta = c s, gamma = c s / 2.
        threshold_ratio: Factor of the threshold, 1 in the paper, 0.88 and less in EasyEdit. 0 has no router: every
            input reads the side memory that responds most.
        refresh_threshold: Measure the stored questions of a shard again after each edit, and those of a memory after
            each merge, and lower the threshold to the least of what they show. The paper does not.
        stored_questions: Questions stored of each shard, then of each merged memory: drawn from all. What is stored is
            what the site reads of them.
        replay: Stored questions of each merged memory that an edit learns not to respond to, and as many of the
            present group that it learns to respond to; the paper's replay of WISE-Retrieve. 0 for none.
        indicator: "linear" measures ``|a dW|``; "activated" as EasyEdit does ``|act(y + a dW) - act(y)|``.
        reduce: How the tokens that count become one number. "easyedit" is the mean, and of more than 100 the largest;
            in training too, where EasyEdit takes the mean.
        granularity: What is decided for each: "sample", a row; "batch", all rows, by their mean; "token", every token
            by its own response, against the same threshold.
        sticky: Keep the decision of a call in the calls of one token a row that follow it.

    Raises:
        ValueError: One is out of range.
    """

    mode: Mode = "merge"
    edits_per_shard: int = 500
    shards_per_merge: int = 2
    mask_ratio: float = 0.2
    mask: MaskKind = "exact"
    density: float = 0.53
    keep_shards: int = 8
    learning_rate: float = 1.0
    optimizer: MakeOptimizer | None = None
    max_steps: int = 70
    norm_constraint: float | None = 1.0
    margins: float | Sequence[float] = 0.5
    threshold_ratio: float = 1.0
    refresh_threshold: bool = True
    stored_questions: int = 32
    replay: int = 0
    indicator: Indicator = "linear"
    reduce: Reduce = "mean"
    granularity: Granularity = "sample"
    sticky: bool = True

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {"mode": Mode, "mask": MaskKind, "indicator": Indicator, "reduce": Reduce}
        for name, kind in (choices | {"granularity": Granularity}).items():
            check_choice(name, getattr(self, name), get_args(kind))
        for name in ("edits_per_shard", "shards_per_merge", "max_steps", "stored_questions"):
            check_positive(name, getattr(self, name))
        for name in ("keep_shards", "replay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} is not a whole number >= 0; use one")
        for name in ("learning_rate", "mask_ratio", "density"):
            check_number(name, getattr(self, name))
        check_number("threshold_ratio", self.threshold_ratio, zero=True)
        if self.norm_constraint is not None:
            check_number("norm_constraint", self.norm_constraint)
        self._check_margins()
        self._check_shares()

    def _check_margins(self) -> None:
        if isinstance(self.margins, int | float):
            check_number("margins", self.margins)
        elif len(self.margins) != 3 or not all(isinstance(m, int | float) and m >= 0 for m in self.margins):
            raise ValueError(
                f"margins={self.margins!r} are not three numbers >= 0, alpha, beta and gamma; use (5, 20, 10), or one "
                f"number, a factor of the host's own scale"
            )

    def _check_shares(self) -> None:
        if self.mask_ratio > 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} is a share; use at most 1")
        if not self.mask_ratio <= self.density <= 1:
            raise ValueError(
                f"density={self.density} must be from mask_ratio={self.mask_ratio}, or Ties drops what a shard has "
                f"learned, to 1; use 0.53 or more"
            )
        if self.mask == "disjoint" and self.shards_per_merge * self.mask_ratio > 1:
            raise ValueError(
                f"mask='disjoint' has no room for shards_per_merge={self.shards_per_merge} shards of "
                f"mask_ratio={self.mask_ratio}; use a ratio of at most {1 / self.shards_per_merge:.3g}"
            )
        if self.replay > self.stored_questions:
            raise ValueError(
                f"replay={self.replay} is more than stored_questions={self.stored_questions}; store as many"
            )
