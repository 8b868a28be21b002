"""The ``memzoo`` command.

Training goes through Lightning's command line (``train_cli``), everything else through small functions
(``catalog_cli``, ``generate_cli``, ``inspect_cli``, ``bank_cli``), each imported when it is asked for. What a user got
wrong ends in one line on stderr and exit code 2; with MEMZOO_TRACEBACK=1 in the environment it ends in the traceback.
"""

import os
import re
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# Command -> (what it does, the module that runs it, the function there).
COMMANDS = {
    "fit": ("train a model", "train_cli", "run"),
    "validate": ("measure a checkpoint on the validation data", "train_cli", "run"),
    "test": ("measure a checkpoint on the test data (TextData: the validation split)", "train_cli", "run"),
    "predict": ("run a checkpoint over data", "train_cli", "run"),
    "list": ("name the models and layers", "catalog_cli", "run_list"),
    "info": ("show a model or layer: parts, parameters, state, provenance", "catalog_cli", "run_info"),
    "recipes": ("list, show or copy the recipes", "catalog_cli", "run_recipes"),
    "generate": ("continue a text with a checkpoint", "generate_cli", "run"),
    "inspect": ("look into a checkpoint reading a text: tables and figures", "inspect_cli", "run"),
    "bank": ("look into a memory bank on disk, edit it, merge banks that were trained apart", "bank_cli", "run"),
    "env": ("show versions, devices and optional backends", "catalog_cli", "run_env"),
}

COMPUTING = ("train_cli", "generate_cli", "inspect_cli")
"""Modules of commands that run models."""

HELP = f"""usage: memzoo COMMAND [OPTIONS]

A catalog of neural memories for PyTorch.

commands:
{chr(10).join(f"  {name:10}{summary}" for name, (summary, _, _) in COMMANDS.items())}

examples:
  memzoo list "titans*"
  memzoo fit --config titans/lmm_tiny.yaml
  memzoo fit --config titans/lmm_tiny.yaml --trainer.max_steps 100
  memzoo generate --checkpoint last.ckpt --prompt "def "
  memzoo inspect --checkpoint last.ckpt --text story.txt

`memzoo COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 if the user can put it right.

    Args:
        argv: Words after ``memzoo``; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, raised when the process is told to end
            return 128 + signal.SIGTERM
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `memzoo list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("MEMZOO_TRACEBACK") == "1" or not _is_users(error):
            raise
        print(f"memzoo: error: {one_line(error)}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if words else 2
    name, *options = words
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        raise ValueError(f"command={name!r} does not exist; {remedy}")
    _, module, function = COMMANDS[name]
    if module in COMPUTING:
        import_module("memzoo.layers").keep_freed_memory()
    getattr(import_module(f"memzoo.lit_modules.{module}"), function)(name, options)
    return 0


def _is_users(error: Exception) -> bool:
    """Whether the user can put it right: a bad argument, file, or combination of options."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: Lightning need not have been imported
    return isinstance(error, (ValueError, OSError, ArgumentError)) or "MisconfigurationException" in kinds


# What jsonargparse says about the types it tried, and about what it was given.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>"
    r"|Not a valid subclass of |Subclass types expect one of:$|a class path \(str\)$|a dict with"
)


def one_line(error: Exception) -> str:
    """Return the message of an error without jsonargparse's enumeration of types, with the nearest name if one fits."""
    message = error.message if isinstance(error, ArgumentError) else str(error)
    lines = (line.strip().removeprefix("- ") for line in str(message).splitlines())
    text = " ".join(line for line in lines if line and not _NOISE.match(line))
    text = text or type(error).__name__
    return text + _suggestion(text)


_TOP = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "print_config")


def _suggestion(text: str) -> str:
    """Return `` ; did you mean ...?`` for an option that is close to one that its owner has."""
    refused = re.search(r"[Oo]ption '([\w.]+)'|unrecognized arguments: --([\w.]+)|has no attribute '(\w+)'", text)
    if refused is None or "did you mean" in text:
        return ""
    *path, key = next(filter(None, refused.groups())).split(".")
    if path and path[0] not in _TOP:
        path, key = [], path[0]
    near = get_close_matches(key, _names_beside(text, path), n=1)
    return f"; did you mean {'.'.join([*path, near[0]])!r}?" if near else ""


def _names_beside(text: str, path: list[str]) -> list[str]:
    """Return the names that the owner of a refused option has: a class's arguments, a module's names, the trainer's."""
    from inspect import signature

    from lightning.pytorch import Trainer

    owner = re.findall(r"class_path '([\w.]+)'", text)
    module = re.search(r"module '([\w.]+)' has no attribute", text)
    if module is not None:
        return dir(import_module(module[1]))
    if owner:
        home, _, name = owner[-1].rpartition(".")
        return list(signature(getattr(import_module(home), name)).parameters)
    if path[:1] == ["trainer"]:
        return list(signature(Trainer).parameters)
    return list(_TOP)


if __name__ == "__main__":
    sys.exit(main())
