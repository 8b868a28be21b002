"""Replay and elastic weight consolidation."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memzoo.lit_modules import ElasticWeightConsolidation, Replay, TaskBoundary
from tests.lit_modules.continual_cases import CLASSES, Coded, linear, module, pictures, stream, trainer


def numbered(first: int, count: int) -> dict[str, torch.Tensor]:
    """Return a batch of samples that are their own numbers."""
    index = torch.arange(first, first + count)
    return {"inputs": index[:, None].float(), "labels": index, "index": index, "task": torch.zeros_like(index)}


def fitted(lit: Any, data: Any, *callbacks: Any) -> Any:
    run = trainer(data, *callbacks)
    run.fit(lit, data)
    return run


# Replay


def test_every_sample_so_far_is_equally_likely_to_be_kept():
    capacity, count, runs = 5, 20, 2000
    kept = torch.zeros(count)
    for seed in range(runs):
        replay = Replay(capacity, seed=seed)
        for first in range(0, count, 4):
            replay.observe(numbered(first, 4), first_pass=True)
        kept[replay._kept["index"]] += 1
    expected, spread = runs * capacity / count, (runs * 0.25 * 0.75) ** 0.5
    assert (kept - expected).abs().max() < 5 * spread
    assert kept.sum() == runs * capacity  # none twice


def test_the_buffer_adds_samples_behind_the_batch_and_says_which():
    replay = Replay(8, replayed=3)
    first = replay.extend(numbered(0, 4))
    assert first["replayed"].tolist() == [False] * 4
    replay.observe(numbered(0, 4), first_pass=True)
    both = replay.extend(numbered(10, 4))
    assert both["labels"][:4].tolist() == [10, 11, 12, 13]
    assert both["replayed"].tolist() == [False] * 4 + [True] * 3
    drawn = both["labels"][4:].tolist()
    assert len({*drawn}) == 3
    assert {*drawn} <= {0, 1, 2, 3}
    assert torch.equal(both["inputs"][4:, 0].long(), both["labels"][4:])
    assert len(replay.extend(numbered(20, 2))["labels"]) == 5
    assert len(Replay(8).extend(numbered(0, 2))["labels"]) == 2


def test_later_passes_are_not_offered():
    replay = Replay(8)
    replay.observe(numbered(0, 4), first_pass=False)
    assert len(replay) == replay.seen == 0


def test_a_stream_offers_each_sample_once():
    data, replay = stream(epochs_per_task=2), Replay(1000)
    fitted(module(strategy=replay), data)
    assert replay.seen == len(replay) == data.size("train")
    assert sorted(replay._kept["index"][: len(replay)].tolist()) == list(range(data.size("train")))


def test_replay_forgets_less_than_no_strategy():
    def last(strategy: Any) -> float:
        data = stream(epochs_per_task=10, **pictures(common=2.0))
        lit = module(linear(), strategy=strategy)
        run = fitted(lit, data)
        run.test(lit, data, verbose=False)
        return float(run.callback_metrics["test/accuracy"])

    assert last(Replay(20)) > last(None) + 0.1


def test_replayed_samples_have_all_classes_seen_where_others_have_those_of_the_task():
    data = stream(epochs_per_task=1, class_order=[0, 1, 2, 3, 4, 5])
    lit = module(linear(), strategy=Replay(50), train_logits="current")
    fitted(lit, data)  # whose last task has the classes 4 and 5
    allowed = lit.in_loss(torch.zeros(3, CLASSES), 2, {"replayed": torch.tensor([False, True, False])})
    assert allowed.tolist() == [[False] * 4 + [True] * 2, [True] * 6, [False] * 4 + [True] * 2]
    assert lit.model[1].weight.isfinite().all()


def test_codes_are_replayed_as_codes():
    data, replay = stream(), Replay(9)
    fitted(module(Coded(), strategy=replay, precompute=True), data)
    assert "inputs" not in replay._kept
    assert torch.equal(replay._kept["codes"], data._rows["train"].codes[replay._kept["index"]].long())


def test_another_capacity_than_the_checkpoints_is_refused():
    replay = Replay(5)
    replay.observe(numbered(0, 3), first_pass=True)
    with pytest.raises(ValueError, match="capacity=6, but the checkpoint's buffer has 5; use that"):
        Replay(6).load_state_dict(replay.state_dict())


# Elastic weight consolidation


def of_tasks(strategy: ElasticWeightConsolidation, tasks: int) -> tuple[Any, Any, list[Any], list[Any]]:
    """Fit, and return with it the weights after each task and the gradients of its samples one by one, by a loop."""
    data = stream(num_tasks=tasks, epochs_per_task=1)
    lit = module(linear().double(), strategy=strategy).double()
    data.source.images = data.source.images.double()
    anchors, fishers = [], []
    inner = strategy.on_task_end

    def on_task_end(owner: Any, task: int) -> None:
        anchors.append([weight.detach().clone() for weight in lit.model.parameters()])
        squares = [torch.zeros_like(weight) for weight in lit.model.parameters()]
        batch = next(iter(data.task_loader("train", task, batch_size=strategy.samples, limit=strategy.samples)))
        for image, label in zip(batch["inputs"], batch["labels"], strict=True):
            loss = F.cross_entropy(lit.model(image[None]), label[None])
            for square, grad in zip(squares, torch.autograd.grad(loss, [*lit.model.parameters()]), strict=True):
                square += grad**2
        fishers.append([square / len(batch["labels"]) for square in squares])
        inner(owner, task)

    strategy.on_task_end = on_task_end  # type: ignore[method-assign]
    fitted(lit, data, TaskBoundary())
    return lit, data, anchors, fishers


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_pull_is_the_sum_over_tasks(decay):
    strategy = ElasticWeightConsolidation(3.0, samples=6, decay=decay)
    lit, _, anchors, fishers = of_tasks(strategy, 3)
    torch.manual_seed(1)
    for weight in lit.model.parameters():
        nn.init.normal_(weight)
    expected = 0.0
    for task, (anchor, fisher) in enumerate(zip(anchors, fishers, strict=True)):
        for weight, start, square in zip(lit.model.parameters(), anchor, fisher, strict=True):
            expected += 1.5 * decay ** (2 - task) * (square * (weight - start) ** 2).sum().item()
    assert strategy.penalty(lit).item() == pytest.approx(expected, rel=1e-10)
    assert len(strategy._fisher) == 2  # one for each weight, however many tasks


def test_blurry_boundaries_have_the_importance_of_samples_that_were_shown():
    """Some of a task's own are shown later: nothing is known of them yet."""
    data = stream(blurry=0.5, epochs_per_task=1)
    shown: set[int] = set()
    before: list[bool] = []

    class Strategy(ElasticWeightConsolidation):
        def observe(self, batch: Any, *, first_pass: bool) -> None:
            shown.update(batch["index"].tolist())

        def _loss(self, logits: Any, batch: Any) -> Any:
            before.append(int(batch["index"]) in shown)
            return super()._loss(logits, batch)

    fitted(module(linear(), strategy=Strategy(samples=1000)), data, TaskBoundary())
    assert len(before) == data.size("train")  # each in the task that it was shown in
    assert all(before)


@pytest.mark.parametrize("policy", ["seen", "current"])
@pytest.mark.parametrize("labels", ["data", "model"])
def test_classes_that_were_never_in_the_loss_have_no_importance(policy, labels):
    importance: list[torch.Tensor] = []

    class Strategy(ElasticWeightConsolidation):
        def on_task_end(self, owner: Any, task: int) -> None:
            super().on_task_end(owner, task)
            importance.append(self._fisher["model.1.weight"].sum(1))

    data = stream(epochs_per_task=1)
    strategy = Strategy(1e-3, samples=10, labels=labels)
    fitted(module(linear(), strategy=strategy, train_logits=policy), data, TaskBoundary())
    for task, found in enumerate(importance):
        so_far = {one for classes in data.task_classes[: task + 1] for one in classes}
        assert {*found.nonzero().flatten().tolist()} == so_far


def test_there_is_no_pull_before_the_first_task_has_ended():
    assert ElasticWeightConsolidation().penalty(module()) is None


def test_a_strong_pull_keeps_the_weights_that_matter():
    def moved(strength: float) -> float:
        strategy = ElasticWeightConsolidation(strength, samples=20)
        lit, _, anchors, fishers = of_tasks(strategy, 2)
        shift = [w - a for w, a in zip(lit.model.parameters(), anchors[0], strict=True)]
        return sum((f * s**2).sum().item() for f, s in zip(fishers[0], shift, strict=True))

    assert moved(10.0) < 0.5 * moved(1e-6)


def test_measuring_changes_neither_modes_nor_normalisation():
    data, strategy = stream(epochs_per_task=1), ElasticWeightConsolidation(1e-9, samples=4)
    lit, plain = module(strategy=strategy), module()
    for one, callbacks in ((lit, [TaskBoundary()]), (plain, [])):
        torch.manual_seed(5)
        fitted(one, data, *callbacks)
    assert torch.equal(lit.model.norm.running_mean, plain.model.norm.running_mean)
    assert int(lit.model.usage) == int(plain.model.usage)


def test_classes_drawn_from_the_model_give_the_fisher_information():
    """Of a softmax without inputs it is known: diag(p) - p p^T, whose diagonal is p (1 - p)."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.linspace(-1, 1, CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(x), -1)

    data = stream(num_tasks=1, epochs_per_task=1)
    strategy = ElasticWeightConsolidation(1.0, samples=1000, labels="model")
    lit = module(Bias(), strategy=strategy, learning_rate=1e-9)
    fitted(lit, data, TaskBoundary())
    for _ in range(40):
        strategy.on_task_end(lit, 0)
    p = lit.model.bias.detach().softmax(0)
    assert torch.allclose(strategy._fisher["model.bias"] / 41, p * (1 - p), atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Replay(0), "capacity=0"),
        (lambda: Replay(5, replayed=0), "replayed=0"),
        (lambda: Replay(seed=-1), "seed=-1 is negative"),
        (lambda: ElasticWeightConsolidation(0.0), "strength=0"),
        (lambda: ElasticWeightConsolidation(samples=0), "samples=0"),
        (lambda: ElasticWeightConsolidation(labels="true"), "labels='true'"),
        (lambda: ElasticWeightConsolidation(decay=0.0), r"decay=0.0 is not within \(0, 1\]"),
        (lambda: ElasticWeightConsolidation(seed=-1), "seed=-1 is negative"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_does_not_go_on_with_another_strategy(tmp_path):
    data, path = stream(), str(tmp_path / "last.ckpt")
    run = fitted(module(strategy=Replay(5)), data)
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match="strategy=None cannot go on from a checkpoint of strategy=Replay"):
        trainer(data).fit(module(), data, ckpt_path=path)


def test_strategies_describe_themselves():
    assert Replay(7).describe() == {"name": "Replay", "capacity": 7, "replayed": None, "seed": 0}
    described = ElasticWeightConsolidation(2.0).describe()
    assert described == {
        "name": "ElasticWeightConsolidation",
        "strength": 2.0,
        "samples": 200,
        "labels": "data",
        "decay": 1.0,
        "seed": 0,
    }
