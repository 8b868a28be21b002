"""Imports: the layers load torch and nothing else, quickly; arrows between the packages point one way."""

import ast
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.pages import ROOT

HEAVY = ("lightning", "timm", "triton", "matplotlib", "jsonargparse", "rich", "tensorboard", "torchmetrics", "einops")
PACKAGES = ("layers", "arch", "lit_modules", "recipes")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# What may be imported: `memzoo.` names by prefix, other packages by name (the standard library is free).
FUNCTIONAL = {"memzoo.layers.ops", "memzoo.layers.errors", "memzoo.layers.state", "memzoo.layers.trace", "torch"}
ALLOWED = {
    "layers/reference": {"memzoo.layers", "torch"},  # a loop may read the parameters of the layer it spells out
    "layers/ops": FUNCTIONAL,
    "layers/ops/kernels": {"memzoo.layers.ops.kernels", "triton"},
    "layers/banks": {"memzoo.layers", "torch"},
    "layers/stores": {"memzoo.layers", "torch"},
    "layers": {"memzoo.layers", "torch", "einops"},
    "arch": {"memzoo.arch", "memzoo.layers", "torch", "einops", "safetensors"},
    "recipes": set(),
}
# Optional libraries, imported inside the function that was asked for them.
LAZY = {
    "layers/ops": {"flash_attn", "fla", "mamba_ssm", "causal_conv1d", "filelock"},
    "layers/banks": {"filelock", "safetensors", "xxhash"},
    "layers/stores": {"filelock"},
    "layers": {"safetensors", "sentence_transformers", "sklearn"},
    "arch": {"timm", "transformers"},
}


ENOUGH = 0.3  # seconds


@cache
def imported() -> tuple[set[str], float]:
    """Import ``memzoo.layers`` after torch in fresh processes: what it adds to sys.modules, and the least time.

    Time of the processor, so that what else runs does not count much; a busy machine gets three tries.
    """
    code = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import memzoo.layers
seconds = time.process_time() - start
print(json.dumps([sorted({name.partition(".")[0] for name in set(sys.modules) - before}), seconds]))
"""
    least = math.inf
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        added, seconds = json.loads(done.stdout)
        least = min(least, seconds)
        if least < ENOUGH:
            break
    return set(added), least


def test_the_layers_load_nothing_but_torch() -> None:
    added, _ = imported()
    assert "memzoo" in added
    assert not added & set(HEAVY)
    assert added - {"memzoo", "torch"} <= sys.stdlib_module_names


def test_the_layers_load_in_less_than_a_third_of_a_second_beyond_torch() -> None:
    _, seconds = imported()
    assert seconds < ENOUGH


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    place = place_of(path)
    for name, lazy in imports(path):
        if name.partition(".")[0] in sys.stdlib_module_names or place not in ALLOWED:
            continue
        allowed = ALLOWED[place] | (LAZY.get(place, set()) if lazy else set())
        assert any(name == one or name.startswith(f"{one}.") for one in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_import_is_absolute_and_by_the_installed_name(path: Path) -> None:
    relative = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative
    assert not {name.partition(".")[0] for name, _ in imports(path)} & {*PACKAGES, "tests", "scripts"}


def test_no_package_is_imported_whole_from_within_itself() -> None:
    """``from memzoo.layers import X`` inside ``layers`` would import the file that imports it."""
    for package in ("layers", "arch", "lit_modules"):
        for path in (ROOT / package).rglob("*.py"):
            assert f"memzoo.{package}" not in [name for name, lazy in imports(path) if not lazy], path


def test_kernels_are_imported_where_they_run() -> None:
    for path in FILES:
        if path.parent.name != "kernels":
            assert not [name for name, lazy in imports(path) if "layers.ops.kernels" in name and not lazy], path


def test_nothing_that_runs_depends_on_a_reference() -> None:
    for path in FILES:
        if "reference" not in path.parts:
            assert not [name for name, _ in imports(path) if name.startswith("memzoo.layers.reference")], path


def test_a_forbidden_import_is_noticed(tmp_path: Path) -> None:
    source = "import lightning\nfrom memzoo.arch import Block\ndef f():\n    from flash_attn import g\n"
    (tmp_path / "file.py").write_text(source)
    assert list(imports(tmp_path / "file.py")) == [("lightning", False), ("memzoo.arch", False), ("flash_attn", True)]


def place_of(path: Path) -> str:
    """Return the folder whose rules a file follows."""
    folder = path.parent.relative_to(ROOT).as_posix()
    return folder if folder in ALLOWED else folder.partition("/")[0]


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Return the modules that a file imports, and whether only when a function runs or a type checker reads it."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", lazy
        lazy = lazy or isinstance(node, ast.FunctionDef)
        lazy = lazy or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(tree(path), lazy=False)
