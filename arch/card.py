"""ModelCard: what a model remembers, how faithful it is to its paper, and what it claims."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from memzoo.layers.registry import StateSize

Task = Literal["language", "classification"]


class Fidelity(StrEnum):
    """How much of a model its paper fixes.

    EXACT: every equation comes from the paper or its official code. DESIGN: some parts the paper leaves open; the
    card's ``choices`` list them.
    """

    EXACT = "exact"
    DESIGN = "design"


@dataclass(frozen=True)
class Claim:
    """Something the paper claims.

    Attributes:
        text: The claim, in one sentence.
        recipe: The recipe that tests it, such as ``titans/lmm_tiny``; None if none does yet.
    """

    text: str
    recipe: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """The provenance of an architecture; all its named sizes share it.

    Attributes:
        name: Short name.
        title: Full name.
        paper: arXiv id, such as ``arXiv 2501.00663``.
        memory: What holds the past.
        written: What is written when.
        read: What is read when.
        fidelity: Whether the paper fixes everything.
        choices: What the paper leaves open -> what was chosen. The key is the argument, where there is one.
        claims: What the paper claims.
        state_size: Whether the state is constant in the length of the context or grows with it; of a language model.
        routed: Whether the data decides the shape of products, as in ``LayerEntry``.
        skips: Contract tests the architecture does not keep, each with the reason.
        task: What its models do: "language" models continue tokens and carry a state, those of "classification" answer
            each input by itself.
    """

    name: str
    title: str
    paper: str
    memory: str
    written: str
    read: str
    fidelity: Fidelity
    choices: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    state_size: StateSize = "constant"
    routed: bool = False
    skips: Mapping[str, str] = field(default_factory=dict)
    task: Task = "language"

    @property
    def state(self) -> str:
        """How the state grows, in a word: "none" where there is no state."""
        return self.state_size if self.task == "language" else "none"

    def rows(self) -> list[tuple[str, str]]:
        """Return the one-line facts as (label, text), in reading order."""
        of_context = " in the length of the context" if self.task == "language" else ": each input by itself"
        return [
            ("paper", self.paper),
            ("memory", self.memory),
            ("written", self.written),
            ("read", self.read),
            ("state", f"{self.state}{of_context}"),
            ("fidelity", self.fidelity.value),
        ]

    def to_markdown(self) -> str:
        """Return the whole card as Markdown, for `memzoo info`, docs pages and saved models."""
        lines = [f"# {self.name}: {self.title}", "", "| | |", "|---|---|"]
        lines += [f"| {label} | {text} |" for label, text in self.rows()]
        if self.choices:
            lines += ["", "## Chosen where the paper is silent", ""]
            lines += [f"- `{argument}`: {choice}" for argument, choice in self.choices.items()]
        if self.claims:
            lines += ["", "## Claims", ""]
            lines += [f"- {claim.text} ({claim.recipe or 'no recipe yet'})" for claim in self.claims]
        if self.skips:
            lines += ["", "## Contract tests not kept", ""]
            lines += [f"- {test}: {reason}" for test, reason in self.skips.items()]
        return "\n".join(lines) + "\n"
