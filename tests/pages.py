"""Pages: the code that README.md and docs/ show, run as it stands there, with what its comments promise checked."""

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from memzoo.arch import registry as model_registry
from memzoo.layers import registry as layer_registry
from memzoo.lit_modules.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TRAINING = ("fit", "validate", "test", "predict")
READING = ("generate", "inspect")  # of a checkpoint


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(block: str, namespace: dict[str, Any], name: str) -> None:
    """Execute a block, with its promises checked."""
    exec(compile(with_promises(block), f"<{name}>", "exec"), namespace)


def with_promises(block: str) -> str:
    """Turn comments that are Python literals, up to a colon, into checks.

    Behind an assignment it is the shape of the first name assigned; behind an expression it is its value:

        y, state = mixer(x)  # (2, 10, 64): as x
        state.batch_size  # 2
    """
    lines = []
    for line in block.splitlines():
        lines.append(line)
        source, _, comment = line.partition("  # ")
        try:
            promised = ast.literal_eval(comment.partition(":")[0].strip())
            [statement] = ast.parse(source.strip()).body
        except (SyntaxError, ValueError):
            continue
        indent = source[: len(source) - len(source.lstrip())]
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            lines.append(f"{indent}assert tuple({ast.unparse(first)}.shape) == {promised}, {ast.unparse(first)}.shape")
        elif isinstance(statement, ast.Expr):
            # One call, so that what the line does is done once.
            lines[-1] = f"{indent}_value = {source.strip()}"
            lines.append(f"{indent}assert _value == {promised!r}, _value")
    return "\n".join(lines) + "\n"


def commands(page: Path) -> list[list[str]]:
    """Return the words of every line of a page's shell blocks."""
    return [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]


def check_commands(lines: list[list[str]]) -> None:
    """Run the lines that call memzoo in the working folder, training only as far as its options are parsed."""
    for name, *options in (words for program, *words in lines if program == "memzoo"):
        if "--ckpt_path" in options:  # a file that only a run leaves
            del options[options.index("--ckpt_path") :][:2]
        errors = StringIO()
        with redirect_stderr(errors):
            code = main([name, *options, *(["--print_config"] if name in TRAINING else [])])
        # Options are parsed before the checkpoint, or the bank, is looked for.
        missing = f"memzoo: error: checkpoint='{options[1]}' does not exist" if name in READING else ""
        missing = (
            f"memzoo: error: path='{Path(options[1]).absolute()}' holds no memory bank" if name == "bank" else missing
        )
        assert code == (2 if missing else 0), (name, options, errors.getvalue())
        assert errors.getvalue().startswith(missing)


@contextmanager
def own_registries() -> Iterator[None]:
    """Undo at the end what is registered inside."""
    with patch.dict(layer_registry._ENTRIES), patch.dict(model_registry._ENTRIES):
        yield
