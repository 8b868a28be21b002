"""What the tests of the claims' script share."""

import json
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def stored(store: Path) -> dict:
    return json.loads(store.read_text())
