"""Lessons of WISE: an edit as each step of its training sees it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.layers.call_replay import CallReplay
from memzoo.layers.editor import Edit, answer_loss
from memzoo.layers.wise_questions import WiseQuestions
from memzoo.layers.wise_routing import routing_loss
from memzoo.layers.wise_shards import PENDING

if TYPE_CHECKING:
    from memzoo.layers.wise import Wise

STOP_LOSS, STOP_CHANGE = 0.02, 1e-4  # where EasyEdit ends an edit: a loss this low, that moved by no more


@dataclass(frozen=True)
class Seen:
    """What a site read in one call, and which of its tokens count.

    Attributes:
        x: (rows, tokens, width).
        y: (rows, tokens, dim) what the main matrix returned.
        counted: (rows, tokens) bool, or None for all.
    """

    x: Tensor
    y: Tensor
    counted: Tensor | None


class Lesson:
    """One edit: what depends on the side memory is computed in each step, the rest in the first.

    Only the layers above the site run again; of the unrelated questions only the side matrix itself.

    Args:
        editor: Who learns it.
        edit: The edit.
    """

    def __init__(self, editor: "Wise", edit: Edit) -> None:
        self.editor, self.edit = editor, edit
        self.calls = CallReplay(editor.host, editor.down)
        self.seen: Seen | None = None  # the edit's own rows
        self.unrelated: Seen | None = None
        if edit.unrelated is not None:
            self.unrelated = editor.see(edit.unrelated, edit.unrelated_mask)

    def losses(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the answer, and that with the routing loss."""
        edit, editor = self.edit, self.editor
        with self.calls.record() if self.seen is None else self.calls.replay(), editor.seeing() as seen:
            logits = editor.answer(edit.inputs, edit.mask, asked=edit.asked)
        self.seen, z = seen[0]
        answer = answer_loss(logits, edit.targets)
        inside = editor.indicator_of.of_rows(self.seen.y, z, self.seen.counted)
        outside = inside[:0] if self.unrelated is None else editor.response(self.unrelated)
        return answer, answer + routing_loss(inside, outside, margins)

    @torch.no_grad()
    def activations(self) -> Tensor:
        """Return how far the side memory responds to every wording, (rows,)."""
        assert self.seen is not None
        return self.editor.response(self.seen)

    def question(self) -> tuple[Tensor, Tensor]:
        """Return what the site reads of the question itself, (tokens, width), and which tokens count."""
        assert self.seen is not None
        x, counted = self.seen.x[0], self.seen.counted
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return x, every if counted is None else counted[0]


@dataclass(frozen=True)
class Replayed:
    """Stored questions that an edit is trained with: others' it must not respond to, those of its group it must."""

    past: Seen | None
    present: Seen | None

    @classmethod
    def draw(cls, editor: "Wise", questions: WiseQuestions, count: int, generator: torch.Generator) -> "Replayed":
        """Draw ``count`` of each memory, and of the present group."""
        if not count or not len(questions):
            return cls(None, None)
        groups = [questions.draw(questions.memory == m, count, generator) for m in questions.memory.unique().tolist()]
        present = groups.pop(0) if bool((questions.memory == PENDING).any()) else None  # PENDING comes first
        past = (torch.cat([x for x, _ in groups]), torch.cat([counted for _, counted in groups])) if groups else None
        return cls(*(None if own is None else editor.stored(*own) for own in (past, present)))

    def loss(self, editor: "Wise", margins: Tensor) -> Tensor:
        """Return ``max(0, D - alpha)`` of the past, ``max(0, beta - D)`` of the present group, means over questions."""
        alpha, beta, _ = margins
        loss = margins.new_zeros(())
        if self.past is not None:
            loss = loss + F.relu(editor.response(self.past) - alpha).mean()
        if self.present is not None:
            loss = loss + F.relu(beta - editor.response(self.present)).mean()
        return loss


def is_learned(loss: float, before: float) -> bool:
    """Whether an edit can end."""
    return loss <= STOP_LOSS and abs(loss - before) <= STOP_CHANGE
