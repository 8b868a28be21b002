"""Recipes: YAML files for the command line, shipped inside the package.

A recipe is named by its path without the ending: ``titans/lmm_tiny``. What it measured lies beside it, in
``titans/lmm_tiny.reference.json``.
"""

import json
from difflib import get_close_matches
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any


def list_recipes() -> list[str]:
    """Return the names of all recipes, sorted."""
    root = _root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe, given with or without its ending.

    Raises:
        ValueError: No such recipe; the nearest is suggested.
    """
    known = list_recipes()
    bare = name.removesuffix(".yaml")
    if bare not in known:
        near = get_close_matches(bare, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "`memzoo recipes ls` names them all"
        raise ValueError(f"recipe={name!r} does not exist; {remedy}")
    return _root() / f"{bare}.yaml"


def recipe_summary(name: str) -> str:
    """Return the first line of a recipe's header."""
    with recipe_path(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def reference_path(name: str) -> Path:
    """Return the file that holds what a recipe measured; it exists once the recipe was recorded."""
    return recipe_path(name).with_suffix(".reference.json")


def read_reference(name: str) -> dict[str, Any]:
    """Return what a recipe measured where it was recorded.

    Raises:
        ValueError: No such recipe, or it was never recorded.
    """
    path = reference_path(name)
    if not path.exists():
        raise ValueError(f"recipe={name!r} has no recorded outcome; run `python scripts/record_reference.py {name}`")
    return json.loads(path.read_text(encoding="utf-8"))


def _root() -> Path:
    with as_file(files("memzoo.recipes")) as root:
        return Path(root)
