"""Cards: complete, and rendered without loss."""

import inspect
from functools import cache
from importlib.resources import files

import pytest
import torch

from memzoo.arch import (
    Claim,
    Fidelity,
    MambaLM,
    ModelCard,
    SambaY,
    create_model,
    list_models,
    model_card,
    model_entry,
)
from memzoo.layers import NeuralMemory

CARD = ModelCard(
    name="Toy",
    title="A toy",
    paper="arXiv 0000.00000",
    memory="a vector",
    written="always",
    read="never",
    fidelity=Fidelity.DESIGN,
    choices={"width": "four"},
    claims=(Claim("it is small", recipe="toy/tiny"), Claim("it is fast")),
    state_size="grows",
    skips={"compiles": "it is a toy"},
)
SIZES = {"vocab_size", "dim", "depth"}
PARTS = {  # argument or method: the kinds of SambaY's layers that it is about
    "ssm": {"ssm"},
    "ssm_options": {"ssm"},
    "window": {"window"},
    "gmu_source": {"gmu"},
    "gmu_norm": {"gmu"},
    "prefill": {"gmu", "cross"},
    "differential": {"gmu", "cross"},  # the models it is compared with have none
}
WORDS = {"layout", "sizes"}  # choices that are no arguments, in one word
MACHINERY = {"checkpoint_chunks", "checkpoint_blocks", "backend"}  # change how a model is computed, not what it is


@cache
def kinds(name: str) -> set[str]:
    with torch.device("meta"):
        return set(create_model(name).kinds)


def sambays(name: str) -> list[str]:
    """The models of SambaY's classes that carry the card of one."""
    return [other for other in list_models() if model_card(other) is model_card(name)]


@cache
def arguments_of(name: str) -> dict[str, object]:
    """What a named model sets, or leaves at its architecture's default; without what is about layers it has not."""
    with torch.device("meta"):
        model = create_model(name)
    absent = {key for key, needed in PARTS.items() if isinstance(model, SambaY) and not needed & set(model.kinds)}
    return {key: value for key, value in model.config.items() if key not in SIZES | MACHINERY | absent}


def shown(value: object) -> str:
    """A value as cards write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else repr(value)


def test_rows_are_the_one_line_facts_in_reading_order() -> None:
    assert CARD.rows() == [
        ("paper", "arXiv 0000.00000"),
        ("memory", "a vector"),
        ("written", "always"),
        ("read", "never"),
        ("state", "grows in the length of the context"),
        ("fidelity", "design"),
    ]


def test_markdown_has_every_part() -> None:
    text = CARD.to_markdown()
    assert text.startswith("# Toy: A toy\n")
    assert "| memory | a vector |" in text
    assert "- `width`: four" in text
    assert "- it is small (toy/tiny)" in text
    assert "- it is fast (no recipe yet)" in text
    assert "- compiles: it is a toy" in text


def test_markdown_leaves_out_what_is_empty() -> None:
    bare = ModelCard("Toy", "A toy", "none", "a vector", "always", "never", Fidelity.EXACT)
    assert "##" not in bare.to_markdown()


@pytest.mark.parametrize("name", list_models())
def test_a_registered_card_renders_as_one_table(name: str) -> None:
    rows = [line for line in model_card(name).to_markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3}


@pytest.mark.parametrize("name", list_models())
def test_the_card_says_what_was_chosen_for_every_argument(name: str) -> None:
    entry = model_entry(name)
    arguments = set(inspect.signature(entry.architecture).parameters) - SIZES - MACHINERY
    if entry.architecture is SambaY:
        arguments &= {*arguments_of(name)}
    if "memory" in arguments:  # a mapping of the memory's options
        options = set(inspect.signature(NeuralMemory).parameters) - SIZES - MACHINERY - {"num_heads", "head_dim"}
        arguments = arguments - {"memory"} | {f"memory.{option}" for option in options}
    options = {"num_heads", "head_dim"} if entry.card.fidelity is Fidelity.EXACT else set()
    assert arguments - options <= set(entry.card.choices)


@pytest.mark.parametrize("name", list_models())
def test_a_choice_is_of_an_argument_or_a_method_that_exists(name: str) -> None:
    entry = model_entry(name)
    known = set(inspect.signature(entry.architecture).parameters) | set(dir(entry.architecture)) | WORDS
    assert {key for key in entry.card.choices if key.isidentifier()} <= known


@pytest.mark.parametrize("name", [name for name in list_models() if model_entry(name).architecture is SambaY])
def test_a_choice_about_some_layers_is_on_cards_of_models_that_have_them(name: str) -> None:
    every = [kinds(other) for other in sambays(name)]
    for key, needed in PARTS.items():
        if key in model_card(name).choices:
            some = any if key in ("ssm", "ssm_options", "window") else all  # SWA+YOCO, MambaY: the card says so
            assert some(needed & found for found in every), key


@pytest.mark.parametrize(
    "name", [name for name in list_models() if model_entry(name).architecture in (SambaY, MambaLM)]
)
def test_a_choice_is_what_the_named_model_has_or_says_that_it_is_a_default(name: str) -> None:
    for key, value in arguments_of(name).items():
        text = model_card(name).choices[key]
        if "by default" in text or (value is None and model_entry(name).architecture is MambaLM):
            continue
        assert shown(value) in text, (key, value)


@pytest.mark.parametrize("name", list_models())
def test_the_recipes_that_claims_name_exist(name: str) -> None:
    for claim in model_card(name).claims:
        if claim.recipe is not None:
            assert files("memzoo.recipes").joinpath(f"{claim.recipe}.yaml").is_file(), claim.recipe
