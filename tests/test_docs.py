"""The docs: their code runs, their links lead somewhere, their generated parts are what would be generated today."""

import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memzoo.arch import list_models, model_card, model_entry
from memzoo.layers import create_layer, list_layers
from tests.pages import PAGES, README, ROOT, blocks, check_commands, commands, own_registries, run

EVERY = [README, *PAGES]
GENERATED = re.compile("^<!-- generated: (card|choices)", re.MULTILINE)
SYSTEMS = [page for page in PAGES if GENERATED.search(page.read_text(encoding="utf-8"))]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


@pytest.fixture(scope="module")
def catalog() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield import_module("catalog")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    with own_registries():
        for index, block in enumerate(blocks(page, "python")):
            run(block, namespace, f"{page.name}, Python block {index}")


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_commands(commands(page))


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_the_generated_parts_are_up_to_date(page: Path, catalog: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert catalog.rewritten(page, text) == text, "run: python scripts/catalog.py --write"
    marks = re.findall("^<!-- (generated|end)", text, re.MULTILINE)
    assert len(marks) == 2 * len(catalog.PART.findall(text)), "a mark without its other half"


def test_a_stale_or_empty_part_is_written_again(catalog: ModuleType) -> None:
    [part] = re.findall("<!-- generated: layers -->.*?<!-- end -->", README.read_text(encoding="utf-8"), re.DOTALL)
    for text in (part.replace("conformant", "verified"), "<!-- generated: layers -->\n<!-- end -->"):
        assert text != part
        assert catalog.rewritten(README, text) == part


def test_a_table_of_several_models_has_what_each_card_says_once_and_says_whose_it_is(catalog: ModuleType) -> None:
    names = ["titans_mac_tiny", "titans_mag_tiny", "titans_mal_tiny"]
    cards = [model_card(name) for name in names]
    said = {(key, text) for card in cards for key, text in card.choices.items() if "." not in key}
    rows = [row.strip("| ").split(" | ") for row in catalog.choices(README, *names)[2:]]
    assert sorted((key.strip("`"), text) for key, text, _ in rows) == sorted(said)
    for key, text, of in rows:
        holders = [card.name for card in cards if card.choices.get(key.strip("`")) == text]
        assert of == ("all" if len(holders) == len(cards) else "; ".join(holders))
    claims = [row.strip("| ").split(" | ")[0] for row in catalog.claims(README, *names)[2:]]
    assert sorted(claims) == sorted({claim.text for card in cards for claim in card.claims})
    text = "\n".join(catalog.card(README, *names))
    for card in cards:
        assert all(catalog.arxiv(fact) in text for _, fact in card.rows())


def test_options_that_a_model_leaves_to_its_memory_are_on_the_memory_s_page(catalog: ModuleType) -> None:
    [home] = [page for page in PAGES if "NeuralMemory" in catalog.on_page(page)]
    assert re.search("^<!-- generated: choices titans_lmm_tiny", home.read_text(encoding="utf-8"), re.MULTILINE)
    own = {f"memory.{key}": text for key, text in model_card("titans_lmm_tiny").choices.items()}
    for name in list_models():
        left = {key: text for key, text in model_card(name).choices.items() if "." in key}
        assert left.items() <= own.items(), f"{name} chooses another memory than the page says"


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}, which is no heading"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target, _ in links(index)}
    assert {page for page in PAGES if page != index} <= linked


def test_every_registered_layer_and_model_is_named_on_the_page_of_its_class(catalog: ModuleType) -> None:
    classes = {name: type(create_layer(name, 64)) for name in list_layers()}
    classes |= {name: model_entry(name).architecture for name in list_models()}
    for name, cls in classes.items():
        homes = [page for page in PAGES if cls.__name__ in catalog.on_page(page)]
        assert len(homes) == 1, f"{cls.__name__} is on {[page.name for page in homes]}"
        assert any(fnmatchcase(name, other) for other in catalog.on_page(homes[0])), f"{homes[0].name} lacks {name}"


@pytest.mark.parametrize("package", ["layers", "arch", "lit_modules"])
def test_everything_exported_has_one_page_that_speaks_of_it(package: str, catalog: ModuleType) -> None:
    for name in import_module(f"memzoo.{package}").__all__:
        homes = [page for page in PAGES if name in catalog.on_page(page)]
        assert len(homes) == 1, f"{name} is on {[page.name for page in homes]}"
        assert name in words_in_code(homes[0]), f"{homes[0].name} names {name} and says nothing of it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_about_things_that_exist(page: Path, catalog: ModuleType) -> None:
    names = [*list_layers(), *list_models()]
    for package in ("layers", "arch", "lit_modules"):
        names += import_module(f"memzoo.{package}").__all__
    for pattern in catalog.on_page(page):
        assert any(fnmatchcase(name, pattern) for name in names), f"there is no {pattern}"


@pytest.mark.parametrize("page", SYSTEMS, ids=lambda page: page.stem)
def test_the_page_of_a_system_has_the_sections_of_the_template(page: Path) -> None:
    wanted = headings(ROOT / "docs" / "template.md")
    assert [heading for heading in headings(page) if heading in wanted] == wanted


def test_no_result_is_typed_by_hand() -> None:
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    prose = re.sub("<!-- generated.*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not re.search(r"\d+[.,]\d", prose)


def links(page: Path) -> list[tuple[str, str]]:
    """Return (path, anchor) of every link of a page that stays in the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [(target.partition("#")[0], target.partition("#")[2]) for target in targets if "://" not in target]


def words_in_code(page: Path) -> set[str]:
    """Return the words that a page sets as code, in its text and its Python, but for what it says it is about."""
    text = re.sub(r"^On this page: .*?\n\n", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"\w+", " ".join([*re.findall(r"`([^`]+)`", plain), *blocks(page, "python")])))


def headings(page: Path, level: str = "##") -> list[str]:
    """Return the headings of a page, of one level or of all."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"^{level} (.*)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings(page, "#+")}
