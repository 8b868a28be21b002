"""scripts/benchmark_bank.py measures a small bank, and says so in a table."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.pages import ROOT

SMALL = ["--model", "hier_memory_tiny", "--rows", "8", "4", "--paths", "4", "--contexts", "2", "--tokens", "8"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "scripts"))
        return import_module("benchmark_bank")


def test_it_measures_and_renders(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.json"
    words = [*SMALL, "--rounds", "3", "--budget", "100000", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark_bank.py", *words])
    script.main()
    found = json.loads(out.read_text())
    assert found["parameters"] == 3 * 4 * 128 * (8 * 16 + 4 * 256)
    assert found["warm"]["bytes"] == 2 * 3 * 4 * 128 * 12
    assert found["memory"]["read"] >= 2 * 4 * 2 * 3 * 4 * 128 * 4, "every path was read, twice"
    assert found["memory"]["buffers"] <= 100000
    assert found["prefetch"]["contexts"] == 2
    assert list(tmp_path.iterdir()) == [out], "the bank is left behind"
    measured = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark_bank.py", "--out", str(out), "--render"])
    script.main()
    assert capsys.readouterr().out == measured
    assert any("warm" in line for line in script.table(found))


def test_too_few_paths_are_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_bank.py", "--paths", "1"])
    with pytest.raises(SystemExit):
        script.main()
