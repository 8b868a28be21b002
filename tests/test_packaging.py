"""Packaging: what pyproject.toml promises is what the folders hold and the code imports."""

import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from memzoo.layers.ops.backend import LIBRARIES
from tests.pages import ROOT
from tests.test_imports import FILES, PACKAGES, imports

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

# Core dependencies that no file of ours imports, and why they are there.
NOT_IMPORTED = {
    "tensorboard": "Lightning's TensorBoardLogger writes through it",
    "einops": "part of the core that every layer may use; none does yet",
}
# Where it is not the name of the distribution.
IMPORT_NAMES = {"fla-core": "fla", "pillow": "PIL", "scikit-learn": "sklearn"}


def names(requirements: list[str]) -> set[str]:
    """Return the import names of requirements."""
    distributions = [re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}


CORE = names(PROJECT["dependencies"])
EXTRAS = {name for requirements in PROJECT["optional-dependencies"].values() for name in names(requirements)}


def third_party(*, lazy: bool) -> dict[str, Path]:
    """Return the packages that our files import, when loaded or inside functions, each with one of the files.

    Kernels are files that are imported inside functions.
    """
    found = {
        name.partition(".")[0]: path
        for path in FILES
        for name, is_lazy in imports(path)
        if (is_lazy or path.parent.name == "kernels") == lazy
    }
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"memzoo"}}


def test_every_folder_with_python_is_a_package_of_the_wheel() -> None:
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    assert {f"memzoo.{'.'.join(folder.parts)}" for folder in folders} == set(SETUPTOOLS["packages"])
    assert len(SETUPTOOLS["packages"]) == len(folders)
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_the_namespace_owns_no_file() -> None:
    assert SETUPTOOLS["package-dir"] == {"memzoo": "."}
    assert not list(ROOT.glob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_beside_the_code_is_in_the_wheel(package: str) -> None:
    folder = ROOT / package
    shipped = {path for pattern in SETUPTOOLS["package-data"][f"memzoo.{package}"] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py" and not is_cache(path)}
    assert folder / "py.typed" in others
    assert others <= shipped


def is_cache(path: Path) -> bool:
    """Return whether a tool left the file."""
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)


def test_the_console_script_resolves() -> None:
    module, _, function = PROJECT["scripts"]["memzoo"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_what_is_imported_on_loading_is_a_core_dependency() -> None:
    undeclared = {name: path.name for name, path in third_party(lazy=False).items() if name not in CORE}
    assert not undeclared


def test_what_functions_import_is_a_dependency_or_an_extra() -> None:
    undeclared = {name: path.name for name, path in third_party(lazy=True).items() if name not in CORE | EXTRAS}
    assert not undeclared


def test_every_core_dependency_is_imported_or_said_why_not() -> None:
    assert CORE - third_party(lazy=False).keys() - third_party(lazy=True).keys() == NOT_IMPORTED.keys()


def test_the_cuda_extra_is_what_the_backends_look_for() -> None:
    assert names(PROJECT["optional-dependencies"]["cuda"]) == set(LIBRARIES)
    assert {name: IMPORT_NAMES.get(name, name.replace("-", "_")) for name in LIBRARIES.values()} == {
        distribution: library for library, distribution in LIBRARIES.items()
    }


def test_the_files_that_the_project_names_exist() -> None:
    for name in (PROJECT["readme"], *PROJECT["license-files"]):
        assert (ROOT / name).is_file()


def test_the_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == PROJECT["version"]


def test_one_least_version_of_python_everywhere() -> None:
    least = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == least
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{least.replace('.', '')}"
    assert f"version_info < ({least.replace('.', ', ')})" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"Python {least} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
