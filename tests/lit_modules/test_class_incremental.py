"""ClassIncrementalModule: losses, which classes count, keys and codes, learning without gradients, refusals."""

import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn import functional as F

from memzoo.lit_modules import ClassIncrementalModule, ClassStreamData, ElasticWeightConsolidation, Replay
from memzoo.lit_modules.class_incremental_parts import masked_cross_entropy
from tests.lit_modules.continual_cases import (
    CLASSES,
    Coded,
    Learner,
    Net,
    Seen,
    linear,
    module,
    pictures,
    stream,
    trainer,
)


class Unconstant(Coded):
    """Its codes depend on what was trained."""

    codes_are_constant = False


def fitted(lit: ClassIncrementalModule, *callbacks: Any, data: Any = None, **options: Any) -> Any:
    data = stream() if data is None else data
    run = trainer(data, *callbacks, **options)
    run.fit(lit, data)
    return run


class Uniform(nn.Module):
    """Says what it is told to, whatever it reads."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores.expand(len(x), -1)


# Training


def test_a_fit_equals_a_plain_loop():
    """Steps of SGD on the smoothed cross-entropy over all classes, task after task: no more and no less."""
    data, seen = stream(), Seen()
    lit = module(linear(), learning_rate=0.2)
    plain = linear()
    fitted(lit, seen, data=data)
    inputs = torch.cat(list(data.unlabelled()))
    optimizer = torch.optim.SGD(plain.parameters(), 0.2)
    for _, labels, index in seen.batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs[index]), torch.tensor(labels), label_smoothing=0.1).backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(lit.model.parameters(), plain.parameters(), strict=True))
    assert lit.seen == list(range(CLASSES))


def test_only_trainable_parameters_of_the_model_are_trained():
    lit = module(Coded(), learning_rate=0.5)
    fitted(lit)
    assert lit.model.values.any()
    assert torch.equal(lit.model.extra, torch.ones(3))
    assert lit.trained_parameters() == [lit.model.values]
    frozen = Net()
    frozen.norm.requires_grad_(False)
    assert {id(p) for p in module(frozen).trained_parameters()} == {id(p) for p in frozen.head.parameters()}


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_the_optimiser_has_neither_momentum_nor_decay(name, kind):
    optimizer = module(optimizer=name, learning_rate=0.7).configure_optimizers()
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.7
    assert optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults.get("momentum", 0) == 0


def test_sparse_adam_moves_only_the_values_that_were_read():
    data = stream(num_tasks=2, epochs_per_task=1)
    lit = module(Coded(pairs=40, sparse=True), optimizer="sparse_adam", learning_rate=0.01, key_options={"shift": 1.0})
    fitted(lit, data=data)
    read = torch.zeros(40, dtype=torch.bool)
    read[lit.model.encode(torch.cat(list(data.unlabelled()))).flatten()] = True
    assert not read.all()
    assert lit.model.values[read].any(1).all()
    assert not lit.model.values[~read].any()


@pytest.mark.parametrize(("sparse", "name", "remedy"), [(True, "adam", "sparse_adam"), (False, "sparse_adam", "adam")])
def test_an_optimiser_that_does_not_take_the_gradients_says_so(sparse, name, remedy):
    with pytest.raises(ValueError, match=f"optimizer='{name}' takes .* use '{remedy}'"):
        fitted(module(Coded(sparse=sparse), optimizer=name))


# Which classes count


def test_the_loss_over_some_classes_is_that_of_a_head_with_only_these():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([True, False, True, True, False, False]).expand(5, -1)
    labels = torch.tensor([0, 2, 3, 3, 0])
    loss = masked_cross_entropy(logits, labels, allowed, 0.1)
    own = F.cross_entropy(logits[:, [0, 2, 3]], torch.tensor([0, 1, 2, 2, 0]), label_smoothing=0.1)
    torch.testing.assert_close(loss, own)
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[:, [1, 4, 5]].any()
    assert grad.isfinite().all()
    whole = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(masked_cross_entropy(logits, labels, torch.ones(5, 6).bool(), 0.1), whole)
    torch.testing.assert_close(masked_cross_entropy(logits, labels, None, 0.1), whole)
    assert masked_cross_entropy(logits, labels + 1, allowed, 0.1).isinf()


@pytest.mark.parametrize("policy", ["all", "seen", "current"])
def test_training_leaves_the_scores_of_other_classes_alone(policy):
    """A bias per class: what is in no softmax gets no gradient."""
    data = stream(epochs_per_task=1)
    moved: list[set[int]] = []

    class Moved(Seen):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.before = pl_module.model.scores.detach().clone()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            moved.append({*(pl_module.model.scores != self.before).nonzero().flatten().tolist()})

    fitted(module(Uniform([0.0] * CLASSES), train_logits=policy), Moved(), data=data)
    tasks = [set(classes) for classes in data.task_classes]
    so_far = [tasks[0], tasks[0] | tasks[1], tasks[0] | tasks[1] | tasks[2]]
    assert moved == {"all": [so_far[2]] * 3, "seen": so_far, "current": tasks}[policy]


def test_answers_are_of_all_classes_of_those_seen_or_of_the_task():
    data = stream(scenario="task", class_order=[0, 1, 2, 3, 4, 5])
    lit = module(Uniform([1.0, 0.0, 3.0, 4.0, 6.0, 5.0]))
    run = trainer(data)
    run.datamodule = data  # type: ignore[attr-defined]
    lit.trainer = run
    batch = {"inputs": torch.zeros(3, 1, 4, 4), "labels": torch.zeros(3).long(), "task": torch.tensor([0, 1, 2])}
    assert lit.predict(batch).tolist() == [4, 4, 4]
    assert lit.predict(batch, "task").tolist() == [0, 3, 4]
    assert lit.predict(batch, "seen").tolist() == [4, 4, 4]  # before anything was seen
    lit.seen = [0, 1, 2]
    assert lit.predict(batch, "seen").tolist() == [2, 2, 2]


def test_the_online_accuracy_is_of_predictions_before_the_step():
    class Memory(nn.Module):
        """Says the class of the batch before."""

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores.expand(len(x), -1)

    data, seen = stream(num_tasks=6, epochs_per_task=1, batch_size=4), Seen()
    lit = module(Memory(), learning_rate=1e3, label_smoothing=0.0)
    run = fitted(lit, seen, data=data)
    batches = [labels for _, labels, _ in seen.batches]
    said = [0, *(labels[0] for labels in batches[:-1])]
    right = sum(labels.count(one) for one, labels in zip(said, batches, strict=True))
    assert lit.online_accuracy == right / sum(map(len, batches))
    assert float(run.callback_metrics["train/online_accuracy"]) == pytest.approx(lit.online_accuracy)
    assert math.isnan(module().online_accuracy)


# Validation and test


def test_accuracies_are_logged_for_each_task():
    data = stream()
    lit = module(Uniform([0.0, 0.0, 0.0, 0.0, 0.0, 9.0]), learning_rate=1e-9)
    run = fitted(lit, data=data)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    home = data.class_order.index(5) // 2
    expected = {f"val/accuracy/task_{task}": 0.5 * (task == home) for task in range(3)}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["val/accuracy"] == pytest.approx(1 / 6)
    run.test(lit, data, verbose=False)
    tested = run.callback_metrics
    assert tested["test/accuracy"] == pytest.approx(1 / 6)
    assert tested[f"test/accuracy/task_{home}"] == 0.5


# Keys and codes


def test_keys_are_initialised_once_from_all_training_inputs_without_classes():
    data = stream()
    lit = module(Coded(), key_options={"shift": 0.5})
    fitted(lit, data=data)
    inputs = torch.cat(list(data.unlabelled())).flatten(1)
    assert torch.equal(lit.model.keys, inputs[:12] + 0.5)
    kept = lit.model.keys.clone()
    fitted(lit, data=stream(seed=3))
    assert torch.equal(lit.model.keys, kept)


def test_computing_codes_once_changes_nothing_but_how_often_they_are_computed():
    runs = [(module(Coded(), precompute=choice), stream()) for choice in (False, True)]
    for lit, data in runs:
        fitted(lit, data=data)
    (plain, plain_data), (quick, quick_data) = runs
    assert torch.equal(plain.model.values, quick.model.values)
    assert quick.model.encoded == sum(quick_data.size(split) for split in ("train", "val", "test"))
    assert plain.model.encoded > 2 * plain_data.size("train")
    assert quick_data._rows["train"].codes.dtype == torch.uint8


def test_codes_of_another_model_are_never_trained_on():
    data = stream()
    fitted(module(Coded(), precompute=True), data=data)
    other, alone = module(Coded(pairs=5)), module(Coded(pairs=5))
    fitted(other, data=data)
    fitted(alone)
    assert torch.equal(other.model.values, alone.model.values)


# Learning without gradients


def test_a_head_that_learns_is_taught_each_sample_once_and_a_batch_is_a_step():
    data = stream(epochs_per_task=1)
    lit = module(Learner())
    run = fitted(lit, data=data)
    inputs = torch.cat(list(data.unlabelled())).flatten(1).double()
    labels = data._rows["train"].samples.label
    for label in range(CLASSES):
        torch.testing.assert_close(lit.model.head.sums[label], inputs[labels == label].sum(0))
    assert run.global_step == sum(-(-data.task_size(task) // 8) for task in range(3))
    assert lit.seen == list(range(CLASSES))
    assert 0.3 < lit.online_accuracy < 1
    run.test(lit, data, verbose=False)
    tested = run.callback_metrics
    assert tested["test/accuracy"] > 0.9


def test_a_head_without_classes_says_none():
    lit = module(Learner())
    batch = {"inputs": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2).long()}
    assert lit.predict(batch).tolist() == [-1, -1]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"optimizer": "sgdm"}, "optimizer='sgdm'"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 is no share"),
        ({"train_logits": "task"}, "train_logits='task'"),
        ({"eval_logits": "current"}, "eval_logits='current'"),
        ({"overrides": {"dim": 3}}, "overrides=.* only apply to a model given by name"),
        ({"precompute": True}, r"precompute=True needs encode\(\) and decode\(\) of the model, which Net lacks"),
        ({"model": Learner(), "strategy": Replay()}, "strategy=Replay acts on gradients, but MeanHead learns without"),
        ({"model": "no_such_model"}, "no_such_model"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("options", "of_data", "of_trainer", "message"),
    [
        ({}, {}, {"max_epochs": 5}, r"max_epochs=5 .* 3 tasks of 2 epochs take 6; use Trainer\(max_epochs=6\)"),
        ({}, {}, {"max_steps": 3}, "max_steps=3 of the trainer cuts the stream"),
        ({}, {}, {"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs=2 .* use 1"),
        ({"eval_logits": "task"}, {}, {}, r"eval_logits='task' .* use ClassStreamData\(scenario='task'\)"),
        ({"train_logits": "current"}, {"blurry": 0.2}, {}, "train_logits='current' leaves out .* use 'seen'"),
        ({"model": Learner()}, {}, {}, "epochs_per_task=2 would teach MeanHead each sample so many times"),
        (
            {"strategy": ElasticWeightConsolidation()},
            {},
            {},
            "must be told where tasks end; add the callback TaskBoundary",
        ),
        (
            {"model": Coded(), "precompute": True},
            {"augment": torch.neg},
            {},
            "precompute=True computes codes once, but the data augment inputs anew",
        ),
        (
            {"model": Unconstant(), "precompute": True},
            {},
            {},
            "precompute=True computes codes once, but mask_unused=True",
        ),
        ({"model": Net(4)}, {"class_order": [5, 4, 3, 2, 1, 0]}, {}, "has 4 classes and the data a class 5"),
    ],
)
def test_data_and_trainers_that_do_not_go_through_a_stream_are_refused(options, of_data, of_trainer, message):
    with pytest.raises(ValueError, match=message):
        fitted(module(**options), data=stream(**of_data), **of_trainer)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="model=Net has nothing to train"):
        fitted(module(Net().requires_grad_(False)))


def test_data_that_are_no_stream_are_refused():
    rows = torch.utils.data.TensorDataset(*pictures().values())
    run = trainer(stream())
    with pytest.raises(ValueError, match="NoneType is no stream of tasks; use ClassStreamData"):
        run.fit(module(), torch.utils.data.DataLoader(rows))


def test_a_trial_run_needs_no_whole_stream():
    run = trainer(stream(), fast_dev_run=1)
    run.fit(module(), stream())
    assert run.global_step == 1


# Files


def test_a_module_can_be_named_in_a_configuration_with_its_strategy_and_data():
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassIncrementalModule, "model")
    parser.add_subclass_arguments(ClassStreamData, "data")
    chosen = {
        "model": {
            "class_path": "memzoo.lit_modules.ClassIncrementalModule",
            "init_args": {
                "model": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 16, "out_features": 6}},
                "strategy": {"class_path": "memzoo.lit_modules.Replay", "init_args": {"capacity": 7}},
                "train_logits": "seen",
            },
        },
        "data": {
            "class_path": "memzoo.lit_modules.ClassStreamData",
            "init_args": {"transform": {"class_path": "torch.nn.Flatten", "init_args": {"start_dim": 0}}, "seed": 3},
        },
    }
    parsed = parser.parse_object(chosen)
    lit = parser.instantiate_classes({"model": parsed["model"]})["model"]
    assert type(lit.strategy) is Replay
    assert lit.strategy.capacity == 7
    assert lit.hparams["train_logits"] == "seen"
    assert parsed["data"]["init_args"]["transform"]["class_path"] == "torch.nn.Flatten"


def test_a_trained_module_is_read_from_its_checkpoint_by_itself(tmp_path):
    lit = module(strategy=Replay(5), train_logits="seen")
    run = fitted(lit)
    run.save_checkpoint(tmp_path / "last.ckpt")
    other = ClassIncrementalModule.load_from_checkpoint(tmp_path / "last.ckpt", model=Net())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in lit.state_dict().items())
    assert other.seen == lit.seen == list(range(CLASSES))
    assert other.online_accuracy == lit.online_accuracy
    assert other.hparams["train_logits"] == "seen"
