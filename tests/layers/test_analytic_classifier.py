"""Analytic classifier: the ridge regression on all data, however it came, and without what was taken out."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from memzoo.layers import AnalyticClassifier
from memzoo.layers.reference.analytic_classifier import joint_ridge

FORMS = pytest.mark.parametrize("form", ["recursive", "gram"])
CLOSE: dict[str, float] = {"rtol": 0, "atol": 1e-6}


def data(rows: int = 300, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Clusters, sorted by class: a stream of new classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) * classes // rows
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + 0.3 * torch.randn(rows, 8, generator=generator), labels


def build(form: Any = "recursive", **options: Any) -> AnalyticClassifier:
    return AnalyticClassifier(8, **{"hidden": 60, "ridge": 1e-3, "form": form} | options)


def learned(form: Any, x: Tensor, y: Tensor, size: int, **options: Any) -> AnalyticClassifier:
    classifier = build(form, **options)
    for some, own in zip(x.split(size), y.split(size), strict=True):
        classifier.learn(some, own)
    return classifier


def weight(classifier: AnalyticClassifier) -> Tensor:
    classifier(torch.zeros(1, 8))
    return classifier.weight


@FORMS
@pytest.mark.parametrize("size", [3, 37, 300])
def test_c4_it_is_the_joint_ridge_for_any_batches(form: str, size: int) -> None:
    x, y = data()
    classifier = learned(form, x, y, size)
    expected = joint_ridge(x, y, classifier.expansion, 1e-3, 6)
    torch.testing.assert_close(weight(classifier), expected, **CLOSE)
    torch.testing.assert_close(classifier(x), (x.double() @ classifier.expansion).relu() @ expected, **CLOSE)
    assert (classifier(x).argmax(1) == y).double().mean() > 0.95
    assert classifier.counts.tolist() == [50] * 6


@FORMS
def test_c4_a_batch_may_be_larger_than_what_is_learnt_at_once(form: str) -> None:
    x, y = data(1200)
    classifier = learned(form, x, y, 1200)
    torch.testing.assert_close(weight(classifier), joint_ridge(x, y, classifier.expansion, 1e-3, 6), **CLOSE)


@FORMS
def test_c4_the_order_and_mixture_of_classes_do_not_matter(form: str) -> None:
    x, y = data()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one, two = learned(form, x, y, 50), learned(form, x[order], y[order], 31)
    torch.testing.assert_close(weight(two), weight(one), **CLOSE)


@FORMS
def test_c4_the_column_of_a_new_class_changes_no_old_prediction(form: str) -> None:
    x, y = data()
    classifier = learned(form, x[:100], y[:100], 50)
    before = classifier(x)
    classifier.learn(x[:0], y[:0])
    more = learned(form, x[:100], y[:100], 50, num_classes=6)
    after = more(x)
    torch.testing.assert_close(after[:, : before.shape[1]], before, rtol=0, atol=1e-10)
    assert not after[:, before.shape[1] :].any()
    assert (before.shape[1], more.num_classes) == (2, 6)


@FORMS
def test_c4_its_size_does_not_depend_on_how_much_it_has_learnt(form: str) -> None:
    x, y = data()
    classifier = learned(form, x, y, 100)
    before = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    for _ in range(3):
        classifier.learn(x, y)
    assert {name: tensor.shape for name, tensor in classifier.state_dict().items()} == before
    assert not [*classifier.parameters()]


@FORMS
def test_c4_what_it_keeps_stays_float64(form: str) -> None:
    x, y = data()
    expected = weight(learned(form, x, y, 50))
    classifier = build(form).bfloat16()
    for start in range(0, 300, 50):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            classifier.half().learn(x[start : start + 50], y[start : start + 50].int())
    torch.testing.assert_close(weight(classifier), expected, rtol=0, atol=0)
    floating = [tensor for tensor in classifier.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float64}
    assert torch.equal(classifier.matrix, classifier.matrix.T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(x).dtype == torch.float64


@FORMS
def test_c5_what_is_forgotten_might_never_have_been_there(form: str) -> None:
    x, y = data()
    classifier, kept = learned(form, x, y, 64), torch.arange(300) % 3 != 0
    weight(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.forget(x[~kept], y[~kept])
    expected = joint_ridge(x[kept], y[kept], classifier.expansion, 1e-3, 6)
    torch.testing.assert_close(weight(classifier), expected, **CLOSE)
    classifier.learn(x[~kept], y[~kept])
    weight(classifier)
    for name, tensor in classifier.state_dict().items():
        if name != "matrix":
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(classifier.matrix, before["matrix"], rtol=1e-6, atol=1e-6)


@FORMS
def test_c5_the_order_of_requests_does_not_matter(form: str) -> None:
    x, y = data()
    classifiers = [learned(form, x, y, 64) for _ in range(2)]
    parts = [torch.arange(300) % 5 == part for part in range(3)]
    for part, other in zip(parts, reversed(parts), strict=True):
        classifiers[0].forget(x[part], y[part])
        classifiers[1].forget(x[other], y[other])
    torch.testing.assert_close(weight(classifiers[0]), weight(classifiers[1]), **CLOSE)


@FORMS
def test_c5_a_class_is_forgotten_with_its_column(form: str) -> None:
    x, y = data()
    classifier, own = learned(form, x, y, 64), y == 3
    with pytest.raises(ValueError, match="drop_class=3 would have 20 samples left"):
        classifier.forget(x[own][:30], y[own][:30], drop_class=3)
    classifier.forget(x[own], y[own])
    assert classifier.counts.tolist() == [50, 50, 50, 0, 50, 50]
    assert (classifier(x[own]).argmax(1) != 3).all()
    dropped = learned(form, x, y, 64)
    dropped.forget(x[own], y[own], drop_class=3)
    left = torch.tensor([0, 1, 2, 4, 5])
    torch.testing.assert_close(dropped(x), classifier(x)[:, left], rtol=0, atol=1e-10)
    expected = joint_ridge(x[~own], y[~own], dropped.expansion, 1e-3, 6)[:, left]
    torch.testing.assert_close(weight(dropped), expected, **CLOSE)
    assert dropped.counts.tolist() == [50] * 5


@FORMS
def test_c5_what_was_not_learnt_cannot_be_forgotten(form: str) -> None:
    x, y = data()
    x, y = x[::15], y[::15]  # fewer than hidden units: what is left has directions of nothing
    classifier = learned(form, x, y, 5)
    classifier.forget(x[:3], y[:3])
    weight(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    for features, labels, words in (
        (x[:3], y[:3], "labels holds 3 samples of class 0, of which 1 are learnt"),
        (x[:1], y[:1], "features were not all learnt, or are forgotten already"),
        (x[5:6] + 5, y[5:6], "features were not all learnt"),
        (x[[5, 5]], y[[5, 5]], "features were not all learnt"),
        (x[:1], y[:1] + 9, "labels holds 9, of which nothing was learnt"),
        (x[3:4], y[3:4] - y[3:4] - 1, "an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            classifier.forget(features, labels)
        assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@FORMS
def test_c5_of_many_samples_those_that_were_not_learnt_are_refused_if_it_remembers(form: str) -> None:
    """As often as they were learnt, with their label; nothing is changed by what is refused."""
    x, y = data(1200)
    x = torch.cat([x, x[:1]])
    y = torch.cat([y, y[:1]])
    classifier = learned(form, x, y, 500, remember=True)
    assert classifier.learnt.nbytes == 8 * 1201
    classifier.forget(x[:2].double(), y[:2].int())
    classifier.forget(x[-1:], y[-1:])
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    for features, labels, number in (
        (x[:1], y[:1], 1),
        (x[[5, 5]], y[[5, 5]], 1),
        (x[2:9] + 1e-6, y[2:9], 7),
        (x[2:9], y[2:9] + 1, 7),
        (x[[3, 4, 1]], y[[3, 4, 1]], 1),
    ):
        with pytest.raises(ValueError, match=f"features holds {number} samples that were not learnt with their labels"):
            classifier.forget(features, labels)
        assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    expected = joint_ridge(x[2:-1], y[2:-1], classifier.expansion, 1e-3, 6)
    torch.testing.assert_close(weight(classifier), expected, **CLOSE)
    classifier.forget(x[2:-1], y[2:-1])
    assert (len(classifier.learnt), int(classifier.counts.sum())) == (0, 0)


@FORMS
def test_c5_of_many_samples_it_takes_out_what_it_is_told_to_if_it_does_not_remember(form: str) -> None:
    x, y = data(1200)
    classifier = learned(form, x, y, 500)
    classifier.forget(x[:1], y[:1])
    classifier.forget(x[:1], y[:1])
    classifier.forget(x[1:2], y[1:2] + 1)
    assert classifier.counts.tolist() == [198, 199, 200, 200, 200, 200]
    assert {"learnt", "_names"}.isdisjoint(classifier.state_dict())


@FORMS
def test_c5_what_it_remembers_goes_along_with_files_and_with_dropped_classes(form: str) -> None:
    x, y = data()
    classifier = learned(form, x, y, 64, remember=True)
    classifier.forget(x[y == 3], y[y == 3], drop_class=3)
    other = build(form, remember=True, num_classes=2)
    with torch.device("meta"):
        hollow = build(form, remember=True)
    state = copy.deepcopy(classifier.state_dict())
    for own in (classifier, other, hollow.to_empty(device="cpu")):
        own.load_state_dict(state)
        with pytest.raises(ValueError, match="features holds 50 samples"):
            own.forget(x[y == 4], y[y == 4])
        own.learn(x[y == 3], y[y == 3] + 2)
        own.forget(x[y == 4], y[y == 4] - 1)
        own.forget(x[y == 3], y[y == 3] + 2, drop_class=5)
        assert own.counts.tolist() == [50, 50, 50, 0, 50]


@FORMS
def test_it_goes_on_from_a_file_and_from_a_copy(form: str) -> None:
    x, y = data()
    classifier, other = learned(form, x[:150], y[:150], 50), build(form, seed=1, num_classes=5)
    other.load_state_dict(classifier.state_dict())  # of fewer classes
    twins = [other, copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))]
    for own in (classifier, *twins):
        own.learn(x[150:], y[150:])
        assert torch.equal(own(x), classifier(x))
    fresh = build(form)
    fresh.load_state_dict(classifier.state_dict())  # of more
    assert torch.equal(fresh(x), classifier(x))


def test_it_builds_on_the_meta_device_and_of_a_seed() -> None:
    x, y = data()
    classifier = learned("gram", x, y, 50)
    with torch.device("meta"):
        hollow = build("gram", num_classes=6)
    assert all(tensor.is_meta for tensor in hollow.buffers())
    hollow.to_empty(device="cpu").load_state_dict(classifier.state_dict())
    assert torch.equal(hollow(x), classifier(x))
    assert torch.equal(build().expansion, build().expansion)
    assert not torch.equal(build().expansion, build(seed=1).expansion)


def test_bad_arguments_are_refused() -> None:
    for options, words in (
        ({"hidden": 0}, "hidden=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"form": "grams"}, "form='grams'.*did you mean 'gram'"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)
    x, y = data()
    classifier, nan = learned("recursive", x, y, 50), x.clone()
    nan[3, 3] = torch.nan
    before = classifier.weight.clone()
    calls: list[tuple[Any, str]] = [
        (lambda: classifier(x[:, 1:]), r"features has shape \(300, 7\)"),
        (lambda: classifier(x.long()), "torch.int64"),
        (lambda: classifier.learn(x, y[1:]), r"labels has shape \(299,\)"),
        (lambda: classifier.learn(x, y.double()), "labels .*torch.float64"),
        (lambda: classifier.learn(nan, y), "features holds NaN"),
        (lambda: classifier.forget(nan, y), "features holds NaN"),
        (lambda: classifier.forget(x[:0], y[:0], drop_class=9), "drop_class=9"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
    assert torch.equal(classifier.weight, before)
