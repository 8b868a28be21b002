"""Cards: complete, and rendered without loss."""

import inspect
from importlib.resources import files

import pytest

from memzoo.arch import Claim, Fidelity, ModelCard, list_models, model_card, model_entry
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
MACHINERY = {"checkpoint_chunks", "checkpoint_blocks", "backend"}  # change how a model is computed, not what it is


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
    if "memory" in arguments:  # a mapping of the memory's options
        options = set(inspect.signature(NeuralMemory).parameters) - SIZES - MACHINERY - {"num_heads", "head_dim"}
        arguments = arguments - {"memory"} | {f"memory.{option}" for option in options}
    options = {"num_heads", "head_dim"} if entry.card.fidelity is Fidelity.EXACT else set()
    assert arguments - options <= set(entry.card.choices)


@pytest.mark.parametrize("name", list_models())
def test_the_recipes_that_claims_name_exist(name: str) -> None:
    for claim in model_card(name).claims:
        if claim.recipe is not None:
            assert files("memzoo.recipes").joinpath(f"{claim.recipe}.yaml").is_file(), claim.recipe
