"""The README: its code runs, its commands exist, its tables are true."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from memzoo.recipes import recipe_path
from tests.pages import README, ROOT, blocks, check_commands, commands, own_registries, run, with_promises

PYTHON = blocks(README, "python")
[LOOP] = [block for block in PYTHON if "optimizer.step()" in block]
SNIPPETS = [block for block in PYTHON if block != LOOP]
COMMANDS = commands(README)


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_a_block_of_python_runs_by_itself(index: int) -> None:
    with own_registries():
        run(SNIPPETS[index], {"__name__": f"readme_{index}"}, f"README.md, Python block {index}")


def test_the_plain_loop_is_short_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in LOOP.splitlines() if line]) <= 20
    assert "lightning" not in LOOP
    assert "lit_modules" not in LOOP
    run(LOOP, {"__name__": "readme_loop"}, "README.md, plain loop")
    losses = [float(value) for value in re.findall(r"step \d+: ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    "block",
    [
        "x = torch.zeros(2, 3)  # (2, 4)",
        "y, x = torch.zeros(2, 3), 1  # (3, 2): why",
        "1 + 1  # 3",
        "if 1:\n    []  # [1]",
    ],
)
def test_a_false_promise_in_a_comment_is_noticed(block: str) -> None:
    with pytest.raises(AssertionError):
        run(f"import torch\n{block}\n", {}, "false promise")


def test_the_promises_are_seen() -> None:
    assert [with_promises(block).count("assert") for block in SNIPPETS] == [1, 4]


def test_every_command_line_is_one_that_memzoo_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {command[0] for command in COMMANDS} == {"make", "memzoo"}
    assert len(COMMANDS) == 10
    check_commands(COMMANDS)


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z-]+)", README.read_text(encoding="utf-8").replace("make and", ""))
    assert {"demo", "test", "test-all", "test-gpu"} <= set(named)
    assert set(named) <= set(targets)


def test_make_demo_trains_the_model_that_is_named() -> None:
    [recipe] = re.findall(r"^demo:.*\n.*memzoo fit --config (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    model = yaml.safe_load(recipe_path(recipe).read_text(encoding="utf-8"))["model"]["init_args"]["model"]
    text = README.read_text(encoding="utf-8")
    assert f"`make demo` trains `{model}`" in text
    assert f"`runs/{model}/version_0/`" in text


def test_the_table_of_folders_names_every_package() -> None:
    rows = re.findall(r"^\| `([\w/]+)/` \| `(memzoo[\w.]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 6
    for folder, path in rows:
        assert path == f"memzoo.{folder.replace('/', '.')}"
        assert (ROOT / folder).is_dir()
        import_module(path)
