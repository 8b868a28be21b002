"""Write the generated parts of README.md and docs/: the catalog, model cards, recipes, recorded outcomes.

    python scripts/catalog.py            # name the pages that are out of date; exit code 1 if there are any
    python scripts/catalog.py --write    # write them again

A generated part stands between `<!-- generated: PART -->` and `<!-- end -->`; PART is a function below and its
arguments, names of models.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import yaml
from benchmark_bank import STORED as STORED_BANK
from benchmark_bank import table as bank_table
from benchmark_store import STORED
from benchmark_store import table as store_table
from torch import nn
from torch.overrides import TorchFunctionMode

from memzoo import layers as public
from memzoo.arch import create_model, list_models, model_card, model_entry
from memzoo.layers import create_layer, layer_entry, list_layers
from memzoo.recipes import list_recipes, read_reference, recipe_path, recipe_summary, reference_path

Built = type[nn.Module] | FunctionType  # a class, or a function that builds one with other settings

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(
    r"(?<=<!-- generated: )(?P<name>\w+)(?P<arguments>(?: \w+)*)(?P<open> -->\n).*?(?=<!-- end -->)", re.DOTALL
)


def pages() -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(page: Path, text: str) -> str:
    """Return the text of a page with its generated parts as they should be."""

    def generate(found: re.Match[str]) -> str:
        lines = PARTS[found["name"]](page, *found["arguments"].split())
        return found["name"] + found["arguments"] + found["open"] + "\n".join(lines) + "\n"

    return PART.sub(generate, text)


def layers(page: Path) -> list[str]:
    """The registered layers."""
    rows = []
    for name in list_layers():
        entry = layer_entry(name)
        built = built_by(name)
        state = "none" if entry.kind in ("channel", "reader", "side", "bottleneck") else entry.state_size
        rows.append([code(name), link(page, built), paper(built), summary(built), state, status(entry.skips)])
    return table(["name", "class or function", "paper", "what it is", "state", "status"], rows)


def models(page: Path) -> list[str]:
    """The registered models, a row a card."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(model_card(name).name, []).append(name)
    rows = []
    for names in families.values():
        card = model_card(names[0])
        parameters = sorted((on_meta(name).num_parameters(), name) for name in names)
        sizes = ", ".join(f"{code(name)} ({short(count)})" for count, name in parameters)
        architecture = link(page, model_entry(names[0]).architecture)
        rows.append([sizes, architecture, arxiv(card.paper), card.memory, card.state, status(card.skips)])
    return table(["name (parameters)", "class", "paper", "memory", "state", "status"], rows)


def card(page: Path, *names: str) -> list[str]:
    """What is known of a model's architecture; of several, what they differ in as a table, and what they share."""
    facts = {model_card(name).name: {label: arxiv(text) for label, text in model_card(name).rows()} for name in names}
    first, *others = facts.values()
    if not others:
        return table(["", ""], [[label, text] for label, text in first.items()])
    shared = [label for label in first if all(own[label] == first[label] for own in others)]
    differing = [label for label in first if label not in shared]
    rows = [[model, *(own[label] for label in differing)] for model, own in facts.items()]
    common = "; ".join(f"{label} {first[label]}" for label in shared)
    return [*table(["", *differing], rows), "", f"All of them: {common}."]


def choices(page: Path, *names: str) -> list[str]:
    """What the papers of models leave open. An option of a part, `part.option`, is left to the part's own page."""
    arguments = {key for name in names for key in inspect.signature(model_entry(name).architecture).parameters}
    chosen = {
        name: [
            (code(key) if key in arguments else key, text)
            for key, text in model_card(name).choices.items()
            if "." not in key
        ]
        for name in names
    }
    return merged(["argument, or part", "choice"], chosen)


def claims(page: Path, *names: str) -> list[str]:
    """What the papers of models claim."""
    claimed = {
        name: [(claim.text, code(claim.recipe) if claim.recipe else "none yet") for claim in model_card(name).claims]
        for name in names
    }
    return merged(["claim", "recipe"], claimed)


def merged(columns: list[str], rows: Mapping[str, list[tuple[str, str]]]) -> list[str]:
    """Return a table of rows of models, equal ones once; of several models, with a column that names them."""
    holders: dict[tuple[str, str], list[str]] = {}
    for name, own in rows.items():
        for row in own:
            holders.setdefault(row, []).append(model_card(name).name)
    if len(rows) == 1:
        return table(columns, [list(row) for row in holders])
    keys = [key for key, _ in holders]
    every = [model_card(name).name for name in rows]
    together = sorted(holders, key=lambda row: keys.index(row[0]))  # stable: rows of one key follow one another
    of = {row: "all" if models == every else "; ".join(models) for row, models in holders.items()}
    return table([*columns, "of"], [[*row, of[row]] for row in together])


def recipes(page: Path) -> list[str]:
    """The recipes of the package."""
    return table(["recipe", "what it trains"], [[code(name), recipe_summary(name)] for name in list_recipes()])


def results(page: Path) -> list[str]:
    """What recipes measured where they were recorded."""
    rows = []
    for name in list_recipes():
        if not reference_path(name).exists():
            continue
        outcome = read_reference(name)
        seed = yaml.safe_load(recipe_path(name).read_text())["seed_everything"]
        rows.append(
            [
                code(name),
                code(outcome["model"]),
                f"{outcome['parameters']:,}",
                f"{outcome['tokens']:,}",
                f"{outcome['val_bits_per_byte']:.3f}",
                f"{outcome['unigram_bits_per_byte']:.3f}",
                f"{outcome['seconds']:.0f}",
                f"seed {seed}; {outcome['device']}, {outcome['threads']} threads; "
                f"torch {outcome['torch']}, Python {outcome['python']}",
            ]
        )
    columns = [
        "recipe",
        "model",
        "parameters",
        "tokens",
        "validation bits/byte",
        "unigrams",
        "seconds",
        "measured with",
    ]
    return table(columns, rows)


def reproduced(page: Path, name: str) -> list[str]:
    """What the miniatures of a paper's claims measured: `scripts/reproduce.py NAME`."""
    store = ROOT / "docs" / "results" / f"{name}.json"
    if not store.exists():
        return [f"Not measured yet: `python scripts/reproduce.py {name}` does."]
    lines = []
    for claim in json.loads(store.read_text(encoding="utf-8"))["claims"]:
        heads = [head for head in claim["rows"][0] if head not in ("variant", "seconds")]
        rows = [
            [row["variant"], *(figure(row[head]) for head in heads), figure(row["seconds"], 0)] for row in claim["rows"]
        ]
        lines += [f"**{claim['statement']}.** {claim['test']}", "", *table(["", *heads, "seconds"], rows), ""]
        lines += [
            f"- {VERDICTS[check['held']]}: {check['statement']} (margin {figure(check['margin'])})"
            for check in claim["checks"]
        ]
        machines = "; ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in claim["machines"])
        seeds = sorted({row["seconds"]["seeds"] for row in claim["rows"]})
        lines += ["", f"{' to '.join(map(str, seeds))} seeds; {machines}.", ""]
    return lines[:-1]


def memory_store(page: Path) -> list[str]:
    """What `scripts/benchmark_store.py` measured."""
    if not STORED.exists():
        return ["Not measured yet."]
    return store_table(json.loads(STORED.read_text(encoding="utf-8")))


def memory_bank(page: Path) -> list[str]:
    """What `scripts/benchmark_bank.py` measured."""
    if not STORED_BANK.exists():
        return ["Not measured yet."]
    return bank_table(json.loads(STORED_BANK.read_text(encoding="utf-8")))


PARTS: Mapping[str, Callable[..., list[str]]] = {
    part.__name__: part
    for part in (layers, models, card, choices, claims, recipes, results, reproduced, memory_store, memory_bank)
}
VERDICTS = {True: "Held", False: "**Did not hold**", None: "Not judged"}


def figure(values: Mapping[str, float | None] | None, digits: int = 3) -> str:
    """Write a mean with its standard deviation, where there is one."""
    if values is None:
        return "none"
    text = f"{values['mean']:.{digits}f}"
    return text if values["sd"] is None else f"{text} ± {values['sd']:.{digits}f}"


def status(skips: Mapping[str, str]) -> str:
    """Return the status of an entry: the contract suite runs over all that is registered, but for what they skip."""
    return "experimental" if skips else "conformant"


def built_by(name: str) -> Built:
    """Return what a user builds a registered layer with: the exported function of its name, or else its class."""
    return getattr(public, name) if name in public.__all__ else type(create_layer(name, 64))


def summary(built: Built) -> str:
    """Return the first line of a docstring as Markdown, without its end, of a function what it builds."""
    return (built.__doc__ or "").partition("\n")[0].removeprefix("Build ").rstrip(".:").replace("``", "`")


def paper(built: Built) -> str:
    """Return the first paper under `Reference:`, where a class has none of the class it extends."""
    sources = built.__mro__ if isinstance(built, type) else (built,)
    docs = "\n".join(source.__doc__ or "" for source in sources)
    found = re.search(r"Reference:.*?(arXiv \d{4}\.\d{5})", docs, re.DOTALL)
    return arxiv(found[1]) if found else ""


def short(count: int) -> str:
    """Return a number in thousands, millions or billions."""
    if count < 1e6:
        return f"{count / 1e3:.3g}k"
    return f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"


def arxiv(text: str) -> str:
    """Make the arXiv ids of a text links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def link(page: Path, built: Built) -> str:
    """Return the name of a class or function, linked to the page that is about it."""
    name = built.__name__
    homes = [other for other in pages() if name in on_page(other)]
    if len(homes) != 1:
        raise ValueError(f"{name} is on {len(homes)} pages; name it behind `On this page:` on one page of docs/")
    return f"[`{name}`]({homes[0].relative_to(page.parent).as_posix()})"


def on_page(page: Path) -> list[str]:
    """Return the names, and patterns of names, that a page says it is about: its paragraph ``On this page: ...``."""
    paragraph = re.search(r"^On this page: (.*?)\n\n", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w*]+)`", paragraph[1]) if paragraph else []


class Undrawn(TorchFunctionMode):
    """Leave tensors as ``torch.nn.init`` gets them: on the meta device, drawing numbers is all that takes time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor at once where a function would fill it."""
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def on_meta(name: str) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"), Undrawn():
        return create_model(name)


def code(text: str) -> str:
    """Set a word as code."""
    return f"`{text}`"


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return a Markdown table."""
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def main() -> int:
    """Write or check."""
    write, stale = "--write" in sys.argv[1:], 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = rewritten(page, text)
        if new == text:
            continue
        if write:
            page.write_text(new, encoding="utf-8")
        print(f"{page.relative_to(ROOT)} {'written' if write else 'is out of date'}")
        stale += not write
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
