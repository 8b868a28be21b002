"""``memzoo bank``: look into a memory bank on disk, edit it, merge what was trained apart."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

EDITS = {
    "block": "leave a node out of what is fetched",
    "unblock": "take a block back",
    "delete": "overwrite a node's block, for good",
}


def run(command: str, options: list[str]) -> None:
    """Run ``memzoo bank ACTION``."""
    chosen = _parser(command).parse_args(options)
    action = chosen.action
    arguments = getattr(chosen, action)
    if action == "info":
        _info(arguments.path)
    elif action == "verify":
        _verify(arguments.path)
    elif action in EDITS:
        _edit(action, arguments)
    elif action == "merge":
        _merge(arguments)
    else:
        _copy(arguments)


def _parser(command: str) -> ArgumentParser:
    def parser(name: str, description: str) -> ArgumentParser:
        return ArgumentParser(prog=f"memzoo {name}", description=description, exit_on_error=False)

    whole = parser(command, "Look into a memory bank on disk, edit it, merge what was trained apart.")
    actions = whole.add_subcommands(dest="action")

    def add(name: str, summary: str) -> ArgumentParser:
        own = parser(f"{command} {name}", summary[0].upper() + summary[1:] + ".")
        own.add_argument("path", type=Path, help="folder of the bank")
        actions.add_subcommand(name, own, help=summary)
        return own

    add("info", "show what a bank holds")
    add("verify", "read every block and compare it with its checksum")
    for name, summary in EDITS.items():
        edit = add(name, summary)
        edit.add_argument("level", type=int, help="level of the node, from 1")
        edit.add_argument("node", type=int, help="its number in the level, from 0")
        edit.add_argument("--subtree", action="store_true", help="its descendants too")
    add("merge", "take over subtrees of the root that were trained apart").add_argument(
        "parts", nargs="+", help="SUBTREE=PATH: a child of the root, and the copy of the bank to take it from"
    )
    copy = add("copy", "copy a bank, maybe with room for more children")
    copy.add_argument("target", type=Path, help="folder to make")
    copy.add_argument("--branching", type=int | None, default=None, help="children of a node in the copy")
    return whole


def _part(text: str) -> tuple[int, Path]:
    subtree, sign, path = text.partition("=")
    if not sign or not subtree.isdecimal() or not path:
        raise ValueError(f"parts={text!r} names no subtree and bank; write 3=runs/part3")
    return int(subtree), Path(path)


def _open(path: Path, *, read_only: bool) -> Any:
    from memzoo.layers import MemoryBank

    return MemoryBank.open(path, read_only=read_only)


def _info(path: Path) -> None:
    from memzoo.layers.banks.storage import Mark

    with _open(path, read_only=True) as bank:
        layout = bank.layout
        print(
            f"{layout.kind} memories for {layout.num_layers} layers of width {layout.dim}, {layout.dtype}; "
            f"{layout.bank_parameters:,} parameters, {layout.fetched_parameters:,} on a path; "
            f"tree {bank.tree.fingerprint[:12]}"
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("level", "nodes", "rows", "bytes of a block", "written", "blocked", "deleted"):
            table.add_column(column, justify="right")
        for level in layout.levels:
            marks = bank.marks(level)
            counts = [int((marks & int(kind) > 0).sum()) for kind in (Mark.WRITTEN, Mark.BLOCKED, Mark.DELETED)]
            sizes = (layout.num_nodes(level), layout.rows[level - 1], layout.block_bytes(level))
            table.add_row(str(level), *(f"{number:,}" for number in (*sizes, *counts)))
        Console(width=120).print(table)


def _verify(path: Path) -> None:
    with _open(path, read_only=True) as bank:
        written, corrupt = bank.written(), bank.verify()
    for node in corrupt:
        print(f"level {node.level}, node {node.node}: not what was written", file=sys.stderr)
    if corrupt:
        raise ValueError(
            f"path={str(path)!r} has {len(corrupt)} damaged blocks; copy its files again, or delete these nodes: "
            f"memzoo bank delete PATH LEVEL NODE"
        )
    print(f"{len(written):,} blocks are as they were written")


def _edit(action: str, arguments: Any) -> None:
    with _open(arguments.path, read_only=False) as bank:
        getattr(bank, action)(arguments.level, arguments.node, subtree=arguments.subtree)
    print(f"{action}: node {arguments.node} of level {arguments.level}{' and below' * arguments.subtree}")


def _merge(arguments: Any) -> None:
    from contextlib import ExitStack

    with ExitStack() as opened:
        bank = opened.enter_context(_open(arguments.path, read_only=False))
        given = [_part(words) for words in arguments.parts]
        if len(dict(given)) < len(given):
            raise ValueError(f"parts={' '.join(arguments.parts)!r} names a subtree twice; take it from one bank")
        parts = {subtree: opened.enter_context(_open(part, read_only=True)) for subtree, part in given}
        bank.merge(parts)
    print(f"merged {len(parts)} subtrees into {arguments.path}")


def _copy(arguments: Any) -> None:
    with _open(arguments.path, read_only=True) as bank:
        bank.copy_to(arguments.target, branching=arguments.branching).close()
    print(f"copied to {arguments.target}")
