"""What keeps a model from forgetting while it is trained by gradients: replay of samples, or a pull on its weights."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.errors import check_choice, check_number, check_positive
from memzoo.layers.ops.precision import wider
from memzoo.lit_modules.causal_lm import data_module
from memzoo.lit_modules.class_incremental_parts import as_in_a_step, in_evaluation_mode

if TYPE_CHECKING:
    from memzoo.lit_modules.class_incremental import ClassIncrementalModule

Batch = dict[str, Tensor]
FisherLabels = Literal["data", "model"]


class ContinualStrategy:
    """What a ``ClassIncrementalModule`` calls around its steps; all of it does nothing here.

    Attributes:
        needs_boundaries: Whether it must be told when a task ends, by the callback ``TaskBoundary``.
        one_device: Whether it works on one device alone.
    """

    needs_boundaries = False
    one_device = False

    def reset(self) -> None:
        """Start a stream."""

    def extend(self, batch: Batch) -> Batch:
        """Return the batch to train on. Added rows come last; ``replayed`` (batch,) bool says which they are."""
        return batch

    def penalty(self, module: "ClassIncrementalModule") -> Tensor | None:
        """Return what is added to the loss, None for nothing."""
        return None

    def observe(self, batch: Batch, *, first_pass: bool) -> None:
        """See a batch of the stream, after its loss; ``first_pass`` in the first epoch of its task."""

    def on_task_end(self, module: "ClassIncrementalModule", task: int) -> None:
        """A task is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up."""

    def describe(self) -> dict[str, Any]:
        """Return its name and its options, in plain values."""
        return {"name": type(self).__name__}


class Replay(ContinualStrategy):
    """Train on some samples of the past beside each batch: a buffer in which every sample is equally likely to be.

    Reservoir sampling: of the first ``n`` samples of the stream each is in the buffer with probability ``capacity /
    n``; no boundaries are needed. A sample is offered to it once, in the first pass over its task. What is replayed is
    the input (or its code) with its class, on one device.

    Args:
        capacity: Samples kept.
        replayed: Samples added to each batch, or as many as there are; as many as the batch has by default.
        seed: Of what is kept and drawn.

    Attributes:
        seen: Samples offered so far.

    Raises:
        ValueError: A number is below 1, or the seed is negative.

    Reference:
        Vitter, "Random Sampling with a Reservoir" (1985), algorithm R; Chaudhry et al., arXiv 1902.10486.
    """

    one_device = True

    def __init__(self, capacity: int = 200, *, replayed: int | None = None, seed: int = 0) -> None:
        check_positive("capacity", capacity)
        if replayed is not None:
            check_positive("replayed", replayed)
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; use a whole number >= 0")
        self.capacity, self.replayed, self.seed = capacity, replayed, seed
        self.reset()

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def reset(self) -> None:
        """Empty the buffer."""
        self.seen = 0
        self._kept: Batch = {}
        self._generator = torch.Generator().manual_seed(self.seed)

    def extend(self, batch: Batch) -> Batch:
        """Return the batch with samples of the buffer behind it, none of them twice."""
        rows = len(batch["labels"])
        count = min(len(self), self.replayed or rows)
        drawn = torch.randperm(len(self), generator=self._generator)[:count]
        both = {
            name: torch.cat([value, self._kept[name][drawn].to(value)]) if count else value
            for name, value in batch.items()
        }
        return both | {"replayed": torch.arange(rows + count, device=batch["labels"].device) >= rows}

    def observe(self, batch: Batch, *, first_pass: bool) -> None:
        """Offer the samples of a batch to the buffer."""
        if not first_pass:
            return
        rows = {name: value.detach().cpu() for name, value in batch.items()}
        if not self._kept:
            self._kept = {name: value.new_zeros(self.capacity, *value.shape[1:]) for name, value in rows.items()}
        for row in range(len(rows["labels"])):
            self.seen += 1
            place = self.seen - 1
            if place >= self.capacity:
                place = int(torch.randint(self.seen, (), generator=self._generator))
            if place < self.capacity:
                for name, value in rows.items():
                    self._kept[name][place] = value[row]

    def state_dict(self) -> dict[str, Any]:
        """Return the buffer and its source of randomness."""
        kept = {name: value.clone() for name, value in self._kept.items()}
        return {"seen": self.seen, "kept": kept, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up.

        Raises:
            ValueError: The buffer has another capacity.
        """
        if state["kept"] and len(state["kept"]["labels"]) != self.capacity:
            raise ValueError(
                f"capacity={self.capacity}, but the checkpoint's buffer has {len(state['kept']['labels'])}; use that"
            )
        self.seen = state["seen"]
        self._kept = {name: value.cpu().clone() for name, value in state["kept"].items()}
        self._generator.set_state(state["generator"].cpu())

    def describe(self) -> dict[str, Any]:
        """Return its name and its options."""
        return super().describe() | dict(capacity=self.capacity, replayed=self.replayed, seed=self.seed)


class ElasticWeightConsolidation(ContinualStrategy):
    """Pull each weight to where earlier tasks left it, the harder the more their predictions depend on it.

    ``strength / 2 * sum_k sum_i F_ki (w_i - w_ki)^2``: ``w_k`` are the weights after task ``k``, ``F_k`` the diagonal
    of its Fisher information, the mean of squared gradients of single samples' log-likelihood. The sum over tasks is
    kept as one ``F``, one mean of the ``w_k`` and one constant, exactly: memory does not grow with the number of tasks.
    It needs the callback ``TaskBoundary``. The likelihood is over the classes that ``train_logits`` has in the loss;
    what was never in it has no importance.

    Args:
        strength: Of the pull.
        samples: Of those that were shown in a task, for its Fisher information; they are the first, which is a random
            choice, one backward pass each.
        labels: Whose likelihood: that of the "data", the empirical Fisher information that most code uses, or of
            classes drawn from the "model", which is the Fisher information itself.
        decay: Of the Fisher information of earlier tasks, whenever a task ends.
        seed: Of the classes drawn.

    Raises:
        ValueError: An argument is out of range.

    Reference:
        Kirkpatrick et al., arXiv 1612.00796, equation 3; ``decay`` as Schwarz et al., arXiv 1805.06370.
    """

    needs_boundaries = True

    def __init__(
        self,
        strength: float = 100.0,
        *,
        samples: int = 200,
        labels: FisherLabels = "data",
        decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_number("strength", strength)
        check_positive("samples", samples)
        check_choice("labels", labels, get_args(FisherLabels))
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} is not within (0, 1]; 1 keeps all tasks alike")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; use a whole number >= 0")
        self.strength, self.samples, self.labels, self.decay, self.seed = strength, samples, labels, decay, seed
        self.reset()

    def reset(self) -> None:
        """Forget the tasks."""
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}
        self._constant = 0.0
        self._generator = torch.Generator().manual_seed(self.seed)

    def penalty(self, module: "ClassIncrementalModule") -> Tensor | None:
        """Return the pull; None before the first task has ended."""
        if not self._fisher:
            return None
        terms = []
        for name, weight in _trained(module).items():
            fisher, anchor = self._fisher[name].to(weight.device), self._anchor[name].to(weight.device)
            terms.append((fisher * (wider(weight) - anchor).square()).sum())
        return self.strength / 2 * (torch.stack(terms).sum() + self._constant)

    def on_task_end(self, module: "ClassIncrementalModule", task: int) -> None:
        """Measure the Fisher information of the task, and add its pull."""
        self._constant *= self.decay
        for name, (fisher, weight) in self._measure(module, task).items():
            if name not in self._fisher:
                self._fisher[name], self._anchor[name] = fisher, weight
                continue
            before, anchor = self.decay * self._fisher[name].to(fisher), self._anchor[name].to(weight)
            total = before + fisher
            share = torch.where(total > 0, fisher / total, 0.0)
            # F1 (w - a1)^2 + F2 (w - a2)^2 = (F1 + F2) (w - a)^2 + F1 F2 / (F1 + F2) (a1 - a2)^2
            apart = float((before * share * (anchor - weight).square()).sum())
            self._constant += apart
            self._fisher[name], self._anchor[name] = total, anchor + share * (weight - anchor)

    def _measure(self, module: "ClassIncrementalModule", task: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the Fisher information and the weights, by name."""
        weights, trainer = _trained(module), module.trainer
        sums = {name: torch.zeros_like(wider(weight)) for name, weight in weights.items()}
        loader = data_module(trainer).task_loader("train", task, batch_size=1, limit=self.samples, shown=True)
        with in_evaluation_mode(module), torch.enable_grad(), as_in_a_step(trainer) as ready:
            for batch in map(ready, loader):
                logits = module.class_logits(batch)
                if (allowed := module.in_loss(logits, task, batch)) is not None:
                    logits = logits.masked_fill(~allowed, -torch.inf)
                grads = torch.autograd.grad(self._loss(logits, batch), [*weights.values()], allow_unused=True)
                for total, grad in zip(sums.values(), grads, strict=True):
                    if grad is not None:
                        total += wider(grad.to_dense() if grad.is_sparse else grad).square()
        count = len(loader)
        return {name: (sums[name] / count, wider(weight).detach().clone()) for name, weight in weights.items()}

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.labels == "data":
            return F.cross_entropy(logits, batch["labels"])
        likely = wider(logits.detach()).softmax(1).cpu()
        drawn = torch.multinomial(likely, 1, generator=self._generator).squeeze(1)
        return F.cross_entropy(logits, drawn.to(logits.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the Fisher information, and what it pulls to."""
        return {
            "fisher": dict(self._fisher),
            "anchor": dict(self._anchor),
            "constant": self._constant,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up."""
        self._fisher, self._anchor = dict(state["fisher"]), dict(state["anchor"])
        self._constant = state["constant"]
        self._generator.set_state(state["generator"].cpu())

    def describe(self) -> dict[str, Any]:
        """Return its name and its options."""
        options = dict(
            strength=self.strength, samples=self.samples, labels=self.labels, decay=self.decay, seed=self.seed
        )
        return super().describe() | options


def _trained(module: "ClassIncrementalModule") -> dict[str, Tensor]:
    trained = {id(weight) for weight in module.trained_parameters()}
    return {name: weight for name, weight in module.named_parameters() if id(weight) in trained}
