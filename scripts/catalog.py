"""Write the generated parts of README.md and docs/: the catalog, model cards, recipes, recorded outcomes.

    python scripts/catalog.py            # name the pages that are out of date; exit code 1 if there are any
    python scripts/catalog.py --write    # write them again

A generated part stands between `<!-- generated: PART -->` and `<!-- end -->`; PART is a function below and its
argument.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import yaml
from torch import nn

from memzoo.arch import create_model, list_models, model_card, model_entry
from memzoo.layers import create_layer, layer_entry, list_layers
from memzoo.recipes import list_recipes, read_reference, recipe_path, recipe_summary, reference_path

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(
    r"(?<=<!-- generated: )(?P<name>\w+) ?(?P<argument>\w*)(?P<open> -->\n).*?(?=<!-- end -->)", re.DOTALL
)


def pages() -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewritten(page: Path, text: str) -> str:
    """Return the text of a page with its generated parts as they should be."""

    def generate(found: re.Match[str]) -> str:
        name, argument = found["name"], found["argument"]
        lines = PARTS[name](page, *filter(None, [argument]))
        return f"{name} {argument}".rstrip() + found["open"] + "\n".join(lines) + "\n"

    return PART.sub(generate, text)


def layers(page: Path) -> list[str]:
    """The registered layers."""
    rows = []
    for name in list_layers():
        entry = layer_entry(name)
        layer = create_layer(name, 64)
        state = "none" if entry.kind == "channel" else entry.state_size
        what = summary(type(layer))
        rows.append([code(name), class_link(page, layer), paper(type(layer)), what, state, status(entry.skips)])
    return table(["name", "class", "paper", "what it is", "state", "status"], rows)


def models(page: Path) -> list[str]:
    """The registered models, a row an architecture."""
    sizes: dict[type[nn.Module], list[str]] = {}
    for name in list_models():
        sizes.setdefault(model_entry(name).architecture, []).append(name)
    rows = []
    for names in sizes.values():
        built = {name: on_meta(name) for name in names}
        card = model_card(names[0])
        parameters = sorted((model.num_parameters(), name) for name, model in built.items())
        named = ", ".join(f"{code(name)} ({count / 1e6:.3g}M)" for count, name in parameters)
        architecture = class_link(page, built[names[0]])
        rows.append([named, architecture, arxiv(card.paper), card.memory, card.state_size, status(card.skips)])
    return table(["name (parameters)", "class", "paper", "memory", "state", "status"], rows)


def card(page: Path, name: str) -> list[str]:
    """What is known of a model's architecture."""
    return table(["", ""], [[label, arxiv(text)] for label, text in model_card(name).rows()])


def choices(page: Path, name: str) -> list[str]:
    """What the paper of a model leaves open."""
    arguments = inspect.signature(model_entry(name).architecture).parameters
    rows = [[code(key) if key in arguments else key, text] for key, text in model_card(name).choices.items()]
    return table(["argument, or part", "choice"], rows)


def claims(page: Path, name: str) -> list[str]:
    """What the paper of a model claims."""
    return table(
        ["claim", "recipe"],
        [[claim.text, code(claim.recipe) if claim.recipe else "none yet"] for claim in model_card(name).claims],
    )


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


PARTS: Mapping[str, Callable[..., list[str]]] = {
    part.__name__: part for part in (layers, models, card, choices, claims, recipes, results)
}


def status(skips: Mapping[str, str]) -> str:
    """Return the status of an entry: the contract suite runs over all that is registered, but for what they skip."""
    return "experimental" if skips else "conformant"


def summary(cls: type) -> str:
    """Return the first line of a class's docstring as Markdown, without its full stop."""
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".").replace("``", "`")


def paper(cls: type) -> str:
    """Return the paper that a class, or the class it extends, names first."""
    docs = "\n".join(base.__dict__.get("__doc__") or "" for base in cls.__mro__)
    found = re.search(r"arXiv \d{4}\.\d{5}", docs)
    return arxiv(found[0]) if found else ""


def arxiv(text: str) -> str:
    """Make the arXiv ids of a text links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text)


def class_link(page: Path, module: nn.Module) -> str:
    """Return the name of a module's class, linked to the page that is about it."""
    name = type(module).__name__
    homes = [other for other in pages() if name in on_page(other)]
    if len(homes) != 1:
        raise ValueError(f"{name} is on {len(homes)} pages; name it behind `On this page:` on one page of docs/")
    return f"[`{name}`]({homes[0].relative_to(page.parent).as_posix()})"


def on_page(page: Path) -> list[str]:
    """Return the names that a page says it is about, in its paragraph ``On this page: ...``."""
    paragraph = re.search(r"^On this page: (.*?)\n\n", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return re.findall(r"`(\w+)`", paragraph[1]) if paragraph else []


def on_meta(name: str) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
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
