"""The suite itself: it covers whatever is registered, and each of its checks can fail."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memzoo.layers  # noqa: F401  (registers the layers)
from memzoo.arch.registry import list_models, model_card, model_entry
from memzoo.layers import registry
from memzoo.layers.registry import layer_entry, list_layers
from tests.contract import example
from tests.contract.broken import BROKEN, VOCAB_SIZE, Reader, SmallLM, TokenWise, bottlenecks, classifiers, side
from tests.contract.checks import CHECKS, Part, cases
from tests.contract.checks.core import DIM
from tests.contract.test_classifiers import CASES as CLASSIFIER_CASES
from tests.contract.test_layers import CASES as LAYER_CASES
from tests.contract.test_layers import EXAMPLE
from tests.contract.test_models import CASES as MODEL_CASES

DOCS = Path(__file__).parents[2] / "docs" / "contract.md"
RIGHT = [
    EXAMPLE,
    Part("token_wise", "channel", lambda: TokenWise(DIM)),
    Part("reader", "reader", lambda: Reader(DIM)),
    Part("small_lm", "model", SmallLM, vocab_size=VOCAB_SIZE),
    Part("turns", "side", side.Turns.attach),
    Part("bottleneck", "bottleneck", lambda: bottlenecks.Bottleneck(DIM)),
    Part("classifier", "classifier", lambda: classifiers.Classifier(DIM)),
    Part("replaces", "side", side.Replaces.attach, skips=side.REPLACES),
]


@pytest.mark.parametrize(("part", "name"), BROKEN, ids=[f"{part.name}-{name}" for part, name in BROKEN])
def test_a_broken_part_is_noticed(part: Part, name: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[part.kind][name](part)


def test_every_check_fails_on_some_broken_part() -> None:
    failing = {name for _, name in BROKEN}
    assert failing == {name for table in CHECKS.values() for name in table}
    for kind in ("side", "bottleneck", "classifier"):
        assert {name for part, name in BROKEN if part.kind == kind} == {*CHECKS[kind]}


@pytest.mark.parametrize(("part", "name"), cases(RIGHT[1:]), ids=lambda value: getattr(value, "name", value))
def test_the_parts_that_the_broken_ones_differ_from_are_right(part: Part, name: str) -> None:
    if reason := part.exempt.get(name):
        pytest.skip(reason)
    CHECKS[part.kind][name](part)


def test_every_registered_layer_meets_every_check_of_its_kind() -> None:
    names = list_layers()
    assert names, "no layer is registered: memzoo.layers imports none"
    for name in names:
        assert [check for part, check in LAYER_CASES if part.name == name] == [*CHECKS[layer_entry(name).kind]]


def architecture(name: str) -> str:
    """Name of the class of a model; what its options make of it is for VARIANTS of ``test_models.py``."""
    return model_entry(name).architecture.__name__


def test_every_registered_architecture_meets_every_check() -> None:
    names = list_models("*_tiny")
    assert names, "no model is registered: memzoo.arch imports none"
    for name in names:
        assert [check for part, check in MODEL_CASES if part.name == name] == [*CHECKS["model"]]
    classifiers = [name for name in list_models() if model_card(name).task == "classification"]
    for name in classifiers:
        assert [check for part, check in CLASSIFIER_CASES if part.name == name] == [*CHECKS["classifier"]]
    tested = {architecture(name) for name in [*names, *classifiers]}
    untested = {architecture(name) for name in list_models()} - tested
    assert not untested, f"{untested} have no *_tiny size, so they are not tested"


def test_a_kind_without_checks_is_refused() -> None:
    with pytest.raises(LookupError, match="'oracle', which has no checks"):
        cases([replace(EXAMPLE, kind="oracle")])


def test_a_skip_needs_a_check_and_a_reason() -> None:
    with pytest.raises(LookupError, match=r"skips \['no_such_check'\]"):
        cases([replace(EXAMPLE, skips={"no_such_check": "because"})])
    cards = {name: model_card(name) for name in list_models("*_tiny")}
    for name, skips in [(name, layer_entry(name).skips) for name in list_layers()] + [
        (name, card.skips) for name, card in cards.items()
    ]:
        for check, reason in skips.items():
            assert len(reason.split()) >= 4, f"{name} skips {check} without saying why: {reason!r}"
            assert name not in cards or reason in cards[name].to_markdown()


def test_a_layer_is_covered_by_being_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By running docs/contract.md, whose layer is that of `example.py`, word for word."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert any(block in Path(example.__file__).read_text() for block in blocks), "the docs show another example.py"
    monkeypatch.setattr(registry, "_ENTRIES", {})
    namespace = {"__name__": "docs_contract"}
    for block in blocks:
        exec(block, namespace)
    assert list_layers() == ["exponential_average"]
    part = Part.of(layer_entry("exponential_average"))
    assert cases([part]) == [(part, name) for name in CHECKS["mixer"]]
    assert torch.equal(part.build()(part.inputs())[0], EXAMPLE.build()(part.inputs())[0])
