"""The docs: their code runs, their links lead somewhere, their generated parts are what would be generated today."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memzoo.arch import list_models, model_entry
from memzoo.layers import create_layer, list_layers
from tests.pages import PAGES, README, ROOT, blocks, check_commands, commands, own_registries, run

EVERY = [README, *PAGES]
SYSTEMS = [page for page in PAGES if re.search("^<!-- generated: card", page.read_text(encoding="utf-8"), re.MULTILINE)]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


@pytest.fixture(scope="module")
def catalog() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catalog", ROOT / "scripts" / "catalog.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        assert name in catalog.on_page(homes[0]), f"{homes[0].name} does not name {name}"


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


def headings(page: Path, level: str = "##") -> list[str]:
    """Return the headings of a page, of one level or of all."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"^{level} (.*)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings(page, "#+")}
