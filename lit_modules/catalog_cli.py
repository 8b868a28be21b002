"""``memzoo list | info | recipes | env``: look at the catalog, without importing Lightning."""

import fnmatch
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table


def run_list(command: str, options: list[str]) -> None:
    """Name the models and layers that match a pattern."""
    from memzoo.arch import list_models, model_entry
    from memzoo.layers.registry import layer_entry, list_layers

    parser = _parser(command, "Name the models and layers of the catalog.")
    parser.add_argument("pattern", nargs="?", default="*", help='names to show, such as "titans*"')
    pattern = parser.parse_args(options).pattern
    models = list_models(pattern)
    layers = fnmatch.filter(list_layers(), pattern)
    if not models and not layers:
        raise ValueError(f"pattern={pattern!r} matches no model or layer; `memzoo list` names them all")
    if models:
        table = _table("model", "what", "memory", "state")
        for name in models:
            entry = model_entry(name)
            table.add_row(name, entry.summary, entry.card.memory, entry.card.state)
        _show(table)
    if layers:
        table = _table("layer", "kind", "state")
        for name in layers:
            layer = layer_entry(name)
            table.add_row(name, layer.kind, layer.state_size)
        _show(table)


def run_info(command: str, options: list[str]) -> None:
    """Show a model or a layer."""
    from memzoo.layers.registry import list_layers

    parser = _parser(command, "Show a model or layer: parts, parameters, state, provenance.")
    parser.add_argument("name", help="a name from `memzoo list`")
    name = parser.parse_args(options).name
    if name in list_layers():
        _show_layer(name)
    else:
        _show_model(name)


def _show_model(name: str) -> None:
    import torch

    from memzoo.arch import create_model, model_entry, part_sizes

    entry = model_entry(name)
    with torch.device("meta"):
        model = create_model(name)
    print(f"{name}: {entry.summary}\n\n{entry.card.title}\n")
    facts = _facts()
    if entry.card.task == "classification":
        parts = _table("part", "class", "parameters", "numbers in buffers")
        for part, module in model.named_children():
            own, kept = (sum(t.numel() for t in tensors()) for tensors in (module.parameters, module.buffers))
            parts.add_row(part, type(module).__name__, f"{own:,}", f"{kept:,}")
        _show(parts)
        facts.add_row("parameters", _parameters(model))
    else:
        parts = _table("part", "count", "parameters", "state bytes a row")
        for size in part_sizes(model):
            parts.add_row(size.part, f"{size.count}", f"{size.parameters:,}", f"{size.state_bytes:,}")
        _show(parts)
        facts.add_row("parameters", _parameters(model))
        growth = 0 if entry.card.state_size == "constant" else state_growth(model)
        at_first = f"{model.initial_state(1).nbytes:,} bytes at first"
        facts.add_row("state of a row", f"{at_first}, {growth:,} more with each token")
    for label, text in entry.card.rows():
        facts.add_row(label, text)
    for argument, choice in entry.card.choices.items():
        facts.add_row(f"chosen: {argument}", choice)
    for claim in entry.card.claims:
        facts.add_row("claim", f"{claim.text} ({claim.recipe or 'no recipe yet'})")
    _show(facts)


def _show_layer(name: str, dim: int = 128) -> None:
    import inspect

    from memzoo import layers
    from memzoo.layers.mixer import SequenceMixer
    from memzoo.layers.registry import create_layer, layer_entry

    entry, layer = layer_entry(name), create_layer(name, dim)
    # Some layers are another's class, built by a function of their name.
    built = getattr(layers, name) if name in layers.__all__ else type(layer)
    print(f"{name}: {(inspect.getdoc(built) or '').partition(chr(10))[0]}\n")
    facts = _facts()
    facts.add_row("class", f"{type(layer).__module__}.{type(layer).__name__}")
    facts.add_row("kind", entry.kind)
    facts.add_row(f"parameters at dim={dim}", _parameters(layer))
    if isinstance(layer, SequenceMixer):
        size = layer.initial_state(1).nbytes
        facts.add_row("state", f"{entry.state_size} in the length of the context; {size:,} bytes a row at first")
    for test, reason in entry.skips.items():
        facts.add_row(f"contract test not kept: {test}", reason)
    _show(facts)


def _parameters(module: Any) -> str:
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in module.buffers())
    return f"{trainable:,} trainable, {frozen:,} frozen; {buffers:,} in buffers"


def state_growth(model: Any) -> int:
    """Return the bytes by which a model's state of one row grows with each token; the meta device is enough."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        short, long = (model(torch.zeros(1, n, dtype=torch.long, device=device))[1].nbytes for n in (1, 33))
    return int(long - short) // 32


def run_recipes(command: str, options: list[str]) -> None:
    """List the recipes, show one, or copy one."""
    from memzoo.recipes import list_recipes, recipe_path, recipe_summary

    parser = _parser(command, "List, show or copy the recipes.")
    actions = parser.add_subcommands(dest="action")
    actions.add_subcommand("ls", _parser(f"{command} ls", "List the recipes."), help="list the recipes")
    show = _parser(f"{command} cat", "Show a recipe.")
    show.add_argument("name", help="a name from `memzoo recipes ls`")
    actions.add_subcommand("cat", show, help="show a recipe")
    copy = _parser(f"{command} cp", "Copy a recipe, to be changed.")
    copy.add_argument("name", help="a name from `memzoo recipes ls`")
    copy.add_argument("target", nargs="?", default=".", help="file or folder to copy to")
    actions.add_subcommand("cp", copy, help="copy a recipe")
    chosen = parser.parse_args(options)
    if chosen.action == "ls":
        table = _table("recipe", "what")
        for name in list_recipes():
            table.add_row(name, recipe_summary(name))
        _show(table)
    elif chosen.action == "cat":
        print(recipe_path(chosen.cat.name).read_text(encoding="utf-8"), end="")
    else:
        source, target = recipe_path(chosen.cp.name), Path(chosen.cp.target)
        target = target / source.name if target.is_dir() else target
        if target.exists():
            raise ValueError(f"target={str(target)!r} exists; choose another name, or remove it first")
        shutil.copyfile(source, target)
        print(f"copied to {target}; run: memzoo fit --config {target}")


def run_env(command: str, options: list[str]) -> None:
    """Show what matters in a bug report."""
    _parser(command, "Show versions, devices and optional backends.").parse_args(options)
    import torch

    from memzoo.layers.ops import cpp_library
    from memzoo.layers.ops.backend import report

    table = _facts()
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("memzoo", "torch", "lightning", "jsonargparse", "einops", "timm", "torchmetrics", "safetensors"):
        table.add_row(package, _version(package))
    table.add_row("threads", f"{torch.get_num_threads()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            table.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        table.add_row("cuda", "no device")
    for library, words in report().items():
        table.add_row(f"backend {library}", words)
    table.add_row("backend cpp", cpp_library.report())
    _show(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _parser(command: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"memzoo {command}", description=description, exit_on_error=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numbers = column in ("count", "parameters", "state bytes a row", "numbers in buffers")
        table.add_column(column, no_wrap=index == 0, justify="right" if numbers else "left")
    return table


def _facts() -> Table:
    table = _table("", "")
    table.show_header = False
    return table


def _show(table: Table) -> None:
    # Not cut to a terminal's width where there is no terminal: `memzoo list | grep` sees whole lines.
    console = Console()
    (console if console.is_terminal else Console(width=400)).print(table)
