"""Analytic classifier: ridge regression on a random expansion, learnt and unlearnt exactly, batch by batch.

What is learnt does not depend on how samples were cut into batches, in which order they came or which classes were
mixed: it is the ridge regression on all of them. So nothing is forgotten but what is asked to be.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.ops.precision import no_autocast

Form = Literal["recursive", "gram"]
ROWS = 512  # learnt at once; a batch of more is cut


class AnalyticClassifier(nn.Module):
    """Classify by least squares: ``logits = relu(x W_r) W`` with a fixed random ``W_r`` and the ridge solution ``W``.

    Rows ``X = relu(features W_r)`` and one-hot ``Y``, of classes that grow as they come. "recursive" keeps
    ``R = (Phi^T Phi + ridge I)^-1`` and W, at first ``I / ridge`` and 0:

        learn:   K = (I + X R X^T)^-1,   R <- R - R X^T K X R,   W <- W + R X^T (Y - X W)
        forget:  K = (I - X R X^T)^-1,   R <- R + R X^T K X R,   W <- W - R X^T (Y - X W)

    with the new R. "gram" keeps ``Phi^T Phi`` and ``Phi^T Y``, is quicker to learn, and solves for W in the first call
    after. Both take ``8 hidden^2`` bytes, however many samples, and with ``remember`` 8 a sample more: in float32 the
    recursion diverges, so all is float64, in a module of less too. There is no gradient and no parameter.

    Args:
        dim: Width of the features.
        num_classes: Classes to begin with; others come with their first label.
        hidden: Width of the expansion.
        ridge: gamma, the weight of the penalty.
        form: "recursive" or "gram".
        seed: Of ``W_r``.
        remember: Keep a hash of 64 bits of every sample and its label, so that ``forget`` refuses what is not learnt.

    Attributes:
        expansion: (dim, hidden), W_r, uniform as ``nn.Linear`` draws it.
        weight: (hidden, classes), W; of "gram" as of the last call.
        counts: (classes,) int64, samples learnt and not forgotten.
        learnt: (samples,) int64, their hashes, ascending; with ``remember``.

    Shape:
        features: (batch, dim). labels: (batch,), integers >= 0. Returns (batch, classes) in float64.

    Raises:
        ValueError: An argument is out of range or does not fit.

    Reference:
        ACIL (arXiv 2205.14922) and G-ACIL (arXiv 2403.15706), ZHUANGHP/Analytic-continual-learning; forgetting: ACU
        (arXiv 2505.12239). Joint solution: ``memzoo.layers.reference.analytic_classifier``.

    Example:
        >>> import torch
        >>> classifier = AnalyticClassifier(4, hidden=32)
        >>> x, y = torch.randn(20, 4), torch.arange(20) % 2
        >>> classifier.learn(x[:10], y[:10])
        >>> classifier.learn(x[10:], y[10:] + 2)
        >>> classifier(x).shape, classifier.counts.tolist()
        (torch.Size([20, 4]), [5, 5, 5, 5])
    """

    expansion: Tensor
    weight: Tensor
    counts: Tensor
    matrix: Tensor
    targets: Tensor
    _solved: Tensor
    learnt: Tensor
    _names: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int = 0,
        *,
        hidden: int = 8192,
        ridge: float = 1e-3,
        form: Form = "recursive",
        seed: int = 0,
        remember: bool = False,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("hidden", hidden)
        if num_classes != 0:
            check_positive(
                "num_classes", num_classes, "use the number of classes, or 0 to have them come with their labels"
            )
        check_number("ridge", ridge)
        check_choice("form", form, get_args(Form))
        self.dim, self.hidden, self.ridge, self.form = dim, hidden, float(ridge), form
        self.remember = remember
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.rand(dim, hidden, generator=generator, dtype=torch.float64)
        device = torch.empty(0).device  # whatever modules are built on
        self.register_buffer("expansion", ((2 * drawn - 1) * dim**-0.5).to(device))
        self.register_buffer("weight", torch.zeros(hidden, num_classes, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        start = 1 / self.ridge if form == "recursive" else 0.0
        self.register_buffer("matrix", start * torch.eye(hidden, dtype=torch.float64))
        if form == "gram":
            self.register_buffer("targets", torch.zeros(hidden, num_classes, dtype=torch.float64))
            self.register_buffer("_solved", torch.tensor(True))
        if remember:
            self.register_buffer("learnt", torch.zeros(0, dtype=torch.int64))
            # What hashes call the classes: a class that is dropped renumbers the columns, and not what was hashed.
            self.register_buffer("_names", torch.arange(num_classes))

    @property
    def num_classes(self) -> int:
        """How many classes there are, learnt or not."""
        return len(self.counts)

    @torch.no_grad()
    def learn(self, features: Tensor, labels: Tensor) -> None:
        """Add samples. A label that is new adds classes up to it, with columns of zeros."""
        self._check(features, labels)
        if len(labels):
            self._set_classes(max(self.num_classes, int(labels.max()) + 1))
            if self.remember:
                first = int(self._names.max()) + 1 if len(self._names) else 0
                new = torch.arange(self.num_classes - len(self._names), device=self._names.device) + first
                self._names = torch.cat([self._names, new])
        state = self._state()
        for rows, classes in self._pieces(features, labels):
            state = self._added(*state, rows, classes)
        self._accept(state, self.counts + labels.bincount(minlength=self.num_classes))
        if self.remember:
            self.learnt = torch.cat([self.learnt, self._hashes(features, labels)]).sort()[0]

    @torch.no_grad()
    def forget(self, features: Tensor, labels: Tensor, *, drop_class: int | None = None) -> None:
        """Take samples out, to what would have been learnt without them. If that fails, nothing is changed.

        They must be the features that were learnt, to the bit, of a deterministic encoder and without augmentation.
        With ``remember`` that is checked, and each is taken out once. Without it there is no trace of single samples to
        compare them with: a sample that was never learnt, is forgotten twice or had another label is taken out as well,
        and what is left is wrong, unless it is so far from what was learnt that no least squares problem would be
        left. With fewer samples than ``hidden`` most such features are noticed so; with more, hardly any.

        Args:
            features: That were learnt.
            labels: With which they were.
            drop_class: Remove the column of a class of which nothing is left; the classes above it move down by one.

        Raises:
            ValueError: There are not so many of a class, samples of ``drop_class`` are left, or what would be left is
                no least squares problem. With ``remember``, also whenever a sample was not learnt with its label or is
                forgotten already.
        """
        self._check(features, labels)
        number = self.num_classes
        if len(labels) and int(labels.max()) >= number:
            raise ValueError(f"labels holds {int(labels.max())}, of which nothing was learnt; forget what was")
        counts = self.counts - labels.bincount(minlength=number)
        if (counts < 0).any():
            label = int((counts < 0).nonzero()[0])
            raise ValueError(
                f"labels holds {int(self.counts[label] - counts[label])} samples of class {label}, of which "
                f"{int(self.counts[label])} are learnt; forget each once"
            )
        if drop_class is not None and (drop_class not in range(number) or counts[drop_class] > 0):
            left = int(counts[drop_class]) if drop_class in range(number) else "no"
            raise ValueError(
                f"drop_class={drop_class!r} would have {left} samples left, of {number} classes; forget all samples of "
                f"a class to drop it"
            )
        left_over = self._without(self._hashes(features, labels)) if self.remember else None
        state = self._state()
        for rows, classes in self._pieces(features, labels):
            state = self._removed(*state, rows, classes)
        self._accept(state, counts)
        if left_over is not None:
            self.learnt = left_over
        if drop_class is not None:
            kept = torch.arange(number, device=self.counts.device) != drop_class
            self._keep_classes(kept)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits; a one for a class and zeros for the others is what they were fitted to."""
        self._check(features, None)
        with torch.no_grad(), no_autocast(features.device):
            if self.form == "gram" and not self._solved:
                self._solve()
            return self._expand(features) @ self.weight

    # What is remembered

    def _hashes(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return 64 bits of each sample and its label, whatever the floating dtype of the features."""
        factors = torch.arange(1, self.dim + 1, device=features.device) * -0x61C8864680B583EB
        found = [
            _mixed(_mixed((some.double() + 0.0).view(torch.int64) ^ factors).sum(1) + own)  # -0.0 is 0.0
            for some, own in zip(features.split(ROWS), _mixed(self._names[labels.long()] + 1).split(ROWS), strict=True)
        ]
        return torch.cat(found)

    def _without(self, hashes: Tensor) -> Tensor:
        """Return what is left of those learnt, each taken once."""
        wanted = hashes.sort()[0]
        again = torch.arange(len(wanted), device=wanted.device) - torch.searchsorted(wanted, wanted)
        place = torch.searchsorted(self.learnt, wanted) + again
        missing = int((place >= torch.searchsorted(self.learnt, wanted, right=True)).sum())
        if missing:
            raise ValueError(
                f"features holds {missing} samples that were not learnt with their labels, or are forgotten already; "
                f"forget the very features that were learnt, with the labels they had, each once"
            )
        kept = torch.ones_like(self.learnt, dtype=torch.bool)
        kept[place] = False
        return self.learnt[kept]

    # The two forms

    def _state(self) -> tuple[Tensor, Tensor]:
        return self.matrix, (self.weight if self.form == "recursive" else self.targets)

    def _accept(self, state: tuple[Tensor, Tensor], counts: Tensor) -> None:
        self.counts = counts
        if self.form == "recursive":
            self.matrix, self.weight = state
        else:
            self.matrix, self.targets = state
            self._solved.fill_(False)

    def _added(self, matrix: Tensor, other: Tensor, rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "gram":
            return matrix + rows.T @ rows, other + rows.T @ classes
        spread = rows @ matrix
        inner = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) + spread @ rows.T
        matrix = _symmetric(matrix - spread.T @ torch.cholesky_solve(spread, torch.linalg.cholesky(_symmetric(inner))))
        return matrix, other + matrix @ (rows.T @ (classes - rows @ other))

    def _removed(self, matrix: Tensor, other: Tensor, rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "gram":
            matrix = matrix - rows.T @ rows
            self._factor(matrix + self.ridge * torch.eye(self.hidden, dtype=rows.dtype, device=rows.device))
            return matrix, other - rows.T @ classes
        spread = rows @ matrix
        inner = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) - spread @ rows.T
        matrix = _symmetric(matrix + spread.T @ torch.cholesky_solve(spread, self._factor(_symmetric(inner))))
        return matrix, other - matrix @ (rows.T @ (classes - rows @ other))

    def _factor(self, matrix: Tensor) -> Tensor:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise ValueError(
                "features were not all learnt, or are forgotten already: what would be left is no least squares "
                "problem; forget the very features that were learnt, once"
            )
        return factor

    def _solve(self) -> None:
        system = self.matrix + self.ridge * torch.eye(self.hidden, dtype=self.matrix.dtype, device=self.matrix.device)
        self.weight = torch.cholesky_solve(self.targets, torch.linalg.cholesky(system)).contiguous()
        self._solved.fill_(True)

    # Parts

    def _pieces(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Expanded rows with their one-hot classes, some at a time."""
        for some, own in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            if len(own):
                with no_autocast(features.device):
                    one_hot = nn.functional.one_hot(own.long(), self.num_classes).to(self.weight)
                    yield self._expand(some), one_hot

    def _expand(self, features: Tensor) -> Tensor:
        return (features.to(self.expansion.dtype) @ self.expansion).relu()

    def _set_classes(self, number: int) -> None:
        more = number - self.num_classes
        self.counts = nn.functional.pad(self.counts, (0, more))
        for name in self._columns():
            setattr(self, name, nn.functional.pad(getattr(self, name), (0, more)))

    def _keep_classes(self, kept: Tensor) -> None:
        self.counts = self.counts[kept]
        if self.remember:
            self._names = self._names[kept]
        for name in self._columns():
            setattr(self, name, getattr(self, name)[:, kept])

    def _columns(self) -> tuple[str, ...]:
        return ("weight",) if self.form == "recursive" else ("weight", "targets")

    def _check(self, features: Tensor, labels: Tensor | None) -> None:
        if features.dim() != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"features has shape {tuple(features.shape)} and dtype {features.dtype}; it must be floating point, "
                f"(batch, {self.dim})"
            )
        if labels is None:
            return
        integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.shape != features.shape[:1] or not integer or (len(labels) and int(labels.min()) < 0):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; it must hold an integer >= 0 for "
                f"each of {len(features)} rows"
            )
        if not features.isfinite().all():
            raise ValueError("features holds NaN or infinity, which nothing could undo; leave such samples out")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Stay in float64, whatever the module is cast to."""

        def placed(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(placed, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        """Take as many classes as the file has."""
        if f"{prefix}counts" in state_dict:
            number = len(state_dict[f"{prefix}counts"])
            self._keep_classes(torch.arange(self.num_classes, device=self.counts.device) < number)
            self._set_classes(number)
        if self.remember and f"{prefix}learnt" in state_dict:
            self.learnt = self.learnt.new_zeros(state_dict[f"{prefix}learnt"].shape)
            self._names = self._names.new_zeros(number)
        super()._load_from_state_dict(state_dict, prefix, *more)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _mixed(numbers: Tensor) -> Tensor:
    """Scatter int64 over all 64 bits, as the finaliser of SplitMix64 does."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return numbers
