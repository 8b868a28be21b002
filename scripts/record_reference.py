"""Run recipes on this machine and record what they measured, beside them: the figures that others are compared with.

python scripts/record_reference.py transformer/tiny titans/lmm_tiny
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from memzoo.lit_modules.cli import main

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def record(name: str) -> None:
    """Run a recipe in a folder of its own and write ``NAME.reference.json``."""
    recipe = RECIPES / f"{name}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if main(["fit", "--config", str(recipe)]):
            sys.exit(f"{name} failed; nothing was recorded")
        (summary,) = Path(folder).rglob("summary.json")
        measured = {"recipe": name} | json.loads(summary.read_text())
        os.chdir(RECIPES)
    target = RECIPES / f"{name}.reference.json"
    target.write_text(json.dumps(measured, indent=2) + "\n")
    print(f"recorded {target}")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for recipe_name in sys.argv[1:]:
        record(recipe_name.removesuffix(".yaml"))
